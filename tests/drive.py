"""Runs a script as its command line would, with a reward that an untrained model can earn, and writes down what tests
compare: every gradient (gathered), every answer. `python tests/drive.py grpo --model ...`, torchrun likewise.

LOGITS=16384 makes small chunks of the head's positions.
TERM_AT=3 has the last process signalled to end there (SIGNAL=USR1: by SIGUSR1), and its launcher too.
NODES=2 makes the processes believe that they are spread over two nodes.
KILL_AT=3 ends the process with SIGKILL once the line of step 3 is written; KILL_AT=checkpoint while a checkpoint is.
JUDGED=1 leaves the script its own reward, for which a whole text is an answer: then an untrained model gives answers
that a reward model can score. Every accuracy is written down.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import sys
from unittest import mock

import common
import harness.reward_model
import harness.run
from harness.flags import ALL_TABLES, launch
from harness.rollout import Rollout
from harness.run import write_atomically
from lab import report

import torch
from torch.distributed.tensor import DTensor


def even_length(problem, text, judge=None):
    return float(len(text) % 2 == 0)


def whole_text(text):
    """Plays final_answer."""
    return text.strip() or None


def no_page(folder, pictures=None):
    """Plays lab.report.finish, whose pictures take seconds."""
    return "no page"


def no_pictures(results, groups, folder):
    """Plays lab.report.measured, likewise."""
    return []


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


class Run(harness.run.Run):
    """A run on one thread, which can be killed after a line of its log."""

    def __init__(self, args):
        super().__init__(args)
        torch.set_num_threads(1)  # tests compare runs bitwise, and their models are tiny

    def log(self, step, *args, **kwargs):
        super().log(step, *args, **kwargs)
        if os.environ.get("KILL_AT") == str(step):
            die()
        if os.environ.get("TERM_AT") == str(step) and self.rank == self.world - 1:
            number = signal.Signals[f"SIG{os.environ.get('SIGNAL', 'TERM')}"]
            if self.world > 1:
                os.kill(os.getppid(), number)
            os.kill(os.getpid(), number)


class Watch:
    """Stands in for some of a script's functions, and writes down what passes through them."""

    def __init__(self, script):
        self.script = script
        self.run = None
        self.updates = 0

    def make_run(self, args):
        self.run = Run(args)
        return self.run

    def plan_updates(self, run, *args):
        plan = harness.updates.plan_updates(run, *args)
        padding = sum(len(update.batches) - update.real for update in plan)
        everyones = run.gather(padding)
        real = run.gather([update.real for update in plan])
        if run.is_main:
            write_atomically(run.path("padding.json"), json.dumps(everyones))
            write_atomically(run.path("real_passes.json"), json.dumps(real))
        return plan

    def clip_gradients(self, model, most):
        gradients = {}
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                whole = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad.clone()
                gradients[name] = whole
        self.updates += 1
        if self.run.is_main:
            torch.save(gradients, self.run.path(f"grad-{self.updates}.pt"))
        return harness.sharding.clip_gradients(model, most)

    def answers(self, make):
        """`make` (sample, or forced), which then writes down the answers of a step."""

        def watched(*args, **kwargs):
            rollout = make(*args, **kwargs)
            if hasattr(self.run, "step"):
                ours = [(problem["id"], text) for problem, text in zip(rollout.problems, rollout.texts, strict=True)]
                everyones = [row for rows in self.run.gather(ours) for row in rows]
                if self.run.is_main:
                    write_atomically(self.run.path(f"answers-{self.run.step}.json"), json.dumps(sorted(everyones)))
            return rollout

        return watched

    def grades(self, score):
        """Rollout.score, which then writes down what the answers of a step earn."""

        def watched(rollout, fn, judge=None):
            scores_PG = score(rollout, fn, judge)
            if hasattr(self.run, "step") and fn is self.script.grade:
                ours = [(problem["id"], text, reward) for problem, text, reward in zip(
                    rollout.problems, rollout.texts, scores_PG.flatten().tolist(), strict=True)]
                everyones = [row for rows in self.run.gather(ours) for row in rows]
                if self.run.is_main:
                    write_atomically(self.run.path(f"grades-{self.run.step}.json"), json.dumps(sorted(everyones)))
            return scores_PG

        return watched


def load_script(name):
    """A script by its name, or a fork by its path."""
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(os.path.basename(name)[:-3], name)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        return script
    return importlib.import_module(name)


def go(name, *argv, page=False):
    """One run in this process, which draws its `page` or none. Raises SystemExit as the command line would."""
    script = load_script(name)
    watch = Watch(script)
    stand_ins = dict(
        Run=watch.make_run, grade=even_length, is_right=even_length, plan_updates=watch.plan_updates,
        clip_gradients=watch.clip_gradients,
    )
    if "sample" in vars(script) and script.__name__ != "sft":
        stand_ins["sample"] = watch.answers(common.sample)
    if "forced" in vars(script):
        stand_ins["forced"] = watch.answers(common.forced)
    judged = "JUDGED" in os.environ
    if judged:
        del stand_ins["grade"], stand_ins["is_right"]
    ours = {key: value for key, value in stand_ins.items() if key in vars(script)}
    finish = report.finish if page else no_page
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.multiple(script, **ours))
        patches.enter_context(mock.patch.object(report, "finish", finish))
        if judged:
            patches.enter_context(mock.patch.object(common, "final_answer", whole_text))
            patches.enter_context(mock.patch.object(harness.reward_model, "final_answer", whole_text))
            patches.enter_context(mock.patch.object(Rollout, "score", watch.grades(Rollout.score)))
        launch(
            script.__name__, script.main, script.flags, doc=script.__doc__, recipe=script.RECIPE, toy=script.TOY,
            argv=[str(word) for word in argv], tables=vars(script).get("TABLES", ALL_TABLES))


def measure(*argv, page=False):
    """eval_passk.py in this process, which draws its pictures or none."""
    script = importlib.import_module("eval_passk")
    draw = report.measured if page else no_pictures
    with mock.patch.object(report, "measured", draw):
        launch(
            "eval_passk", script.main, script.flags, doc=script.__doc__, recipe=script.RECIPE, toy=script.TOY,
            argv=[str(word) for word in argv], tables=script.TABLES)


if __name__ == "__main__":
    common.LOGITS = int(os.environ.get("LOGITS", common.LOGITS))
    if "NODES" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // int(os.environ["NODES"]))
    if os.environ.get("KILL_AT") == "checkpoint":

        def kill_at_state(path, text):
            if str(path).endswith("state.json"):
                die()
            write_atomically(path, text)

        harness.run.write_atomically = kill_at_state
    go(*sys.argv[1:])

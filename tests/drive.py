"""Runs a script as its command line would, with a reward that an untrained model can earn, and writes down what tests
compare: every gradient (gathered), every answer. `python tests/drive.py grpo --model ...`, torchrun likewise.

LOGITS=16384 makes small chunks of the head's positions.
KILL_AT=3 ends the process with SIGKILL once the line of step 3 is written; KILL_AT=checkpoint while a checkpoint is."""

import importlib
import json
import os
import signal
import sys

import torch

import common


def even_length(problem, text):
    return float(len(text) % 2 == 0)


def measure(*argv):
    """eval_passk.py in this process."""
    import eval_passk as script
    common.launch("eval_passk", script.main, script.__doc__, script.flags, script.RECIPE, script.TOY,
                  argv=list(map(str, argv)), tables=(common.MODEL_FLAGS,))


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


class Run(common.Run):
    def __init__(self, args):
        super().__init__(args)
        torch.set_num_threads(1)  # tests compare runs bitwise, and their models are tiny

    def optimizer_step(self):
        grads = {name: p.grad.full_tensor() if isinstance(p.grad, common.DTensor) else p.grad.clone()
                 for name, p in self.policy.named_parameters() if p.grad is not None}
        self.updates = 1 + (self.updates if hasattr(self, "updates") else 0)
        if self.is_main:
            torch.save(grads, self.path(f"grad-{self.updates}.pt"))
        return super().optimizer_step()

    def plan(self, rollout, live_B):
        updates = super().plan(rollout, live_B)
        spare = self.gather(sum(alive == 0 for update in updates for _, alive in update))
        if self.is_main:
            common.write_atomically(self.path("spare.json"), json.dumps(spare))
        return updates

    def log(self, step, rollout, *args, **kwargs):
        ours = [(problem["id"], text) for problem, text in zip(rollout.problems, rollout.texts)]
        everyones = [row for rows in self.gather(ours) for row in rows]
        if self.is_main:
            common.write_atomically(self.path(f"answers-{step}.json"), json.dumps(sorted(everyones)))
        super().log(step, rollout, *args, **kwargs)
        if os.environ.get("KILL_AT") == str(step):
            die()


def go(name, *argv):
    """One run in this process. Raises SystemExit as the command line would."""
    script = importlib.import_module(name)
    before = {key: vars(script)[key] for key in ("Run", "grade", "is_right") if key in vars(script)}
    ours = dict(Run=Run, grade=even_length, is_right=even_length)
    vars(script).update({key: ours[key] for key in before})
    usual = (common.MODEL_FLAGS, common.TRAIN_FLAGS) + (common.ROLLOUT_FLAGS,) * (name != "sft")
    tables = vars(script).get("TABLES", usual)
    try:
        common.launch(name, script.main, script.__doc__, script.flags, script.RECIPE, script.TOY, argv=list(map(str, argv)),
                      tables=tables)
    finally:
        vars(script).update(before)


if __name__ == "__main__":
    common.LOGITS = int(os.environ.get("LOGITS", common.LOGITS))
    if os.environ.get("KILL_AT") == "checkpoint":
        common.write_atomically = lambda path, text, plain=common.write_atomically: (
            die() if path.endswith("state.json") else plain(path, text))
    go(*sys.argv[1:])

"""Runs a script as its command line would, with a reward that an untrained model can earn, and writes down what tests
compare: every gradient (gathered), every answer. `python tests/drive.py grpo --model ...`, torchrun likewise.

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


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


class Run(common.Run):
    def optimizer_step(self):
        grads = {name: p.grad.full_tensor() if isinstance(p.grad, common.DTensor) else p.grad.clone()
                 for name, p in self.policy.named_parameters() if p.grad is not None}
        self.updates = 1 + (self.updates if hasattr(self, "updates") else 0)
        if self.is_main:
            torch.save(grads, self.path(f"grad-{self.updates}.pt"))
        return super().optimizer_step()

    def log(self, step, rollout, *args, **kwargs):
        ours = [(problem["id"], text) for problem, text in zip(rollout.problems, rollout.texts)]
        everyones = [row for rows in self.gather(ours) for row in rows]
        if self.is_main:
            common.write_atomically(self.path(f"answers-{step}.json"), json.dumps(sorted(everyones)))
        super().log(step, rollout, *args, **kwargs)
        if os.environ.get("KILL_AT") == str(step):
            die()


if __name__ == "__main__":
    script = importlib.import_module(sys.argv.pop(1))
    script.Run = Run
    if hasattr(script, "grade"):
        script.grade = even_length
    if os.environ.get("KILL_AT") == "checkpoint":
        common.write_atomically = lambda path, text, plain=common.write_atomically: (
            die() if path.endswith("state.json") else plain(path, text))
    tables = (common.MODEL_FLAGS, common.TRAIN_FLAGS) + (common.ROLLOUT_FLAGS,) * (script.__name__ != "sft")
    common.launch(script.__name__, script.main, script.__doc__, script.flags, script.RECIPE, script.TOY, tables=tables)

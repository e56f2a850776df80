"""Whole runs of a script on a small model, and how tests compare them."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from conftest import run_script
from drive import go

SMALL = (
    "--dataset", "toy@train:64",
    "--eval_dataset", "toy@test:6",
    "--num_generations_eval", 2,
    "--prompts_per_step", 8,
    "--max_completion_length", 24,
    "--micro_batch_size", 6,
    "--max_steps", 2,
    "--train_vision",
    "--no-gradient_checkpointing",
    "--learning_rate", 1e-3,
    "--warmup_steps", 0,
    "--max_prompt_length", 512,
)


def drive(folder, place, *flags, script="grpo", processes=1, page=False, **environment):
    """One run of `script` (a name, or the path of a fork) on the model in `folder`. Returns its output folder.

    A single process is this one; several are started by run_script. A flag that is given twice has its last value.
    """
    groups = () if script == "sft" else ("--num_generations", 3)
    command = (str(script), "--model", folder, "--output_dir", place, *SMALL, *groups, *flags)
    if processes == 1:
        go(*command, page=page)
        return Path(place)
    done = run_script("tests/drive.py", *command, processes=processes, timeout=180, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(place)


def metrics(place):
    """The lines of metrics.jsonl, without their times."""
    lines = []
    for text in Path(place, "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines.append({key: value for key, value in line.items() if not key.startswith("seconds")})
    return lines


def gradients(place, update=1):
    """{name of a weight: its whole gradient} at an update (from 1), before they were clipped."""
    return torch.load(Path(place, f"grad-{update}.pt"))


def gradient(place, update=1):
    """The same as one vector."""
    parts = gradients(place, update)
    return torch.cat([parts[name].flatten() for name in sorted(parts)])


def assert_same_run(one, other, gradients=2):
    """The same answers, the same losses to 1e-5, the same gradients to 1e-4 relative."""
    one, other = Path(one), Path(other)
    assert (one / "answers-1.json").read_text() == (other / "answers-1.json").read_text()
    for ours, theirs in zip(metrics(one)[:2], metrics(other)[:2], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-4)
    for update in range(1, gradients + 1):
        ours, theirs = gradient(one, update), gradient(other, update)
        assert ours.norm() > 1e-4
        # From the second update on, the weights differ by what the first left of rounding.
        most = 1e-4 if update == 1 else 1e-2
        assert (ours - theirs).norm() < most * ours.norm()


def refusal(capsys, folder, place, *flags, script="grpo"):
    """The one line with which a run is refused: with status 2, before it has written anything."""
    with pytest.raises(SystemExit) as caught:
        drive(folder, place, *flags, script=script)
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert caught.value.code == 2
    assert not Path(place).exists()
    return line


class Recorded:
    """A function that remembers its calls: the arguments without a name, those with one, and what it returned."""

    def __init__(self, fn):
        self.fn = fn
        self.given = []
        self.named = []
        self.returned = []

    def __call__(self, *args, **named):
        self.given.append(args)
        self.named.append(named)
        result = self.fn(*args, **named)
        self.returned.append(result)
        return result


def drive_watching(function, folder, place, *flags, script):
    """A run, and one of its script's functions as Recorded."""
    module = importlib.import_module(script)
    recorded = Recorded(vars(module)[function])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, recorded)
        return drive(folder, place, *flags, script=script), recorded

"""Whole runs: one process against two, a kill against no kill, bad flags against one clear line."""

import importlib
import json
import weakref
from pathlib import Path

import pytest
import torch

import common
from conftest import run_script
from drive import go, measure
from lab import report

SMALL = [
    "--dataset", "toy@train:64", "--eval_dataset", "toy@test:6", "--num_generations_eval", 2, "--prompts_per_step", 8,
    "--max_completion_length", 24, "--micro_batch_size", 6, "--max_steps", 2, "--train_vision",
    "--no-gradient_checkpointing", "--learning_rate", 1e-3, "--warmup_steps", 0, "--max_prompt_length", 512,
]


def drive(folder, place, *flags, script="grpo", processes=1):
    """One run, in this process or under torchrun; returns its folder."""
    group = ["--num_generations", 3] if script != "sft" else []
    flags = [script, "--model", folder, "--output_dir", place, *SMALL, *group, *flags]
    if processes == 1:
        go(*flags)
    else:
        done = run_script("tests/drive.py", *flags, processes=processes, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
    return Path(place)


def metrics(place):
    lines = [json.loads(line) for line in (Path(place) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def assert_same_run(one, other, gradients=2):
    """The same answers, losses to 1e-5, gradients to 1e-4 relative."""
    assert (one / "answers-1.json").read_text() == (other / "answers-1.json").read_text()
    for a, b in zip(metrics(one)[:2], metrics(other)[:2], strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], abs=1e-5, rel=1e-4) for k in a)
    for n in range(1, gradients + 1):
        a, b = (torch.load(place / f"grad-{n}.pt") for place in (one, other))
        assert a.keys() == b.keys()
        a, b = (torch.cat([g[k].flatten() for k in sorted(g)]) for g in (a, b))
        assert a.norm() > 1e-4 and (a - b).norm() < (1e-4 if n == 1 else 1e-2) * a.norm()


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """One process, two updates per rollout, a KL to the reference."""
    return drive(folder, tmp_path_factory.mktemp("alone") / "run", "--updates_per_step", 2, "--beta", 0.1)


def test_trap_sharded_generate(folder, tmp_path, alone):
    """Two sharded processes, whose answers end at different lengths, give the answers and gradients of one."""
    flags = "--updates_per_step", 2, "--beta", 0.1
    assert_same_run(alone, drive(folder, tmp_path / "two", *flags, processes=2))


def test_trap_unwrapped_forward(folder, tmp_path):
    """Two sharded processes reduce their gradients to those of one: a pass around the registered methods would not.

    Groups without advantage are not read, so the processes need different numbers of passes; the spare weigh nothing.
    """
    flags = "--updates_per_step", 1, "--micro_batch_size", 3, "--max_steps", 1
    one, two = (drive(folder, tmp_path / f"{n}", *flags, processes=n) for n in (1, 2))
    assert max(json.loads((two / "spare.json").read_text())) > 0 == json.loads((one / "spare.json").read_text())[0]
    assert_same_run(one, two, gradients=1)


def test_processes_with_other_numbers_of_chunks(folder, tmp_path):
    """A process with more answer tokens meets more chunks of the head; the other must not wait for it half-way."""
    flags = "--updates_per_step", 1, "--micro_batch_size", 3, "--max_steps", 1
    one = drive(folder, tmp_path / "one", *flags, script="vepo")
    command = "vepo", "--model", folder, "--output_dir", tmp_path / "two", *SMALL, "--num_generations", 3, *flags
    done = run_script("tests/drive.py", *command, processes=2, timeout=180, LOGITS=str(2**13))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(one, tmp_path / "two", gradients=1)


def test_micro_batches_do_not_change_the_run(folder, tmp_path, alone):
    """One answer to a pass or all in one: the same run; so is a group in one packed row or in three."""
    for size in (1, 100):
        flags = "--updates_per_step", 2, "--beta", 0.1, "--micro_batch_size", size
        assert_same_run(alone, drive(folder, tmp_path / f"size{size}", *flags))


FOUR_STEPS = "--max_steps", 4, "--save_steps", 2, "--updates_per_step", 1, "--eval_steps", 2


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    return drive(folder, tmp_path_factory.mktemp("whole") / "run", *FOUR_STEPS)


@pytest.mark.parametrize("moment", ["1", "3", "checkpoint"])
def test_killed_and_resumed_to_the_same_numbers(folder, tmp_path, whole, moment):
    """SIGKILL before the first checkpoint, after one, or while one is written; then --resume: bitwise the same."""
    flags = "--model", folder, *SMALL, "--num_generations", 3, *FOUR_STEPS, "--output_dir", tmp_path / "killed"
    assert run_script("tests/drive.py", "grpo", *flags, KILL_AT=moment).returncode == -9
    go("grpo", *flags, "--resume")
    assert metrics(tmp_path / "killed") == metrics(whole)
    assert (tmp_path / "killed/samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    one, other = ((place / "model.safetensors").read_bytes() for place in (whole, tmp_path / "killed"))
    assert one == other
    assert not list((tmp_path / "killed").glob("checkpoint*"))


def test_an_all_masked_batch_gives_zero(folder, tmp_path):
    """Every answer cut off and --mask_truncated: both sums of the loss are empty, and nothing is NaN."""
    place = drive(folder, tmp_path / "run", "--max_completion_length", 1, "--mask_truncated", "--updates_per_step", 1,
                  "--eval_dataset", "none", "--weight_decay", 0)
    for line in metrics(place):
        assert line["truncated"] == 1 and line["loss"] == 0 and line["grad_norm"] == 0
    before, after = (common.load_policy(str(path))[0].state_dict() for path in (folder, place))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("script", ["grpo", "eval_passk"])
def test_pictures_are_not_all_in_memory_at_once(folder, tmp_path, monkeypatch, script):
    """A data set is gone through problem by problem: when its prompts are checked, and when they are answered."""
    opened, alive = [], []

    class Counted:
        def __init__(self, problems):
            self.problems = problems

        def __len__(self):
            return len(self.problems)

        def __getitem__(self, place):
            problem = self.problems[place]
            opened.append(weakref.ref(problem["images"][0]))
            alive.append(sum(picture() is not None for picture in opened))
            return problem
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "load_problems", lambda name: Counted(common.load_problems(name)) if "@" in name else [])
    monkeypatch.setattr(report, "finish", lambda *given: "no page")
    if script == "grpo":
        drive(folder, tmp_path / "run", "--dataset", "toy@train:48", "--eval_dataset", "none", "--max_steps", 1)
    else:
        measure("--model", folder, "--dataset", "toy@test:48", "--output_dir", tmp_path / "run", "--num_samples", 2,
                "--ks", 1, "--max_completion_length", 4, "--sample_batch_size", 8)
    assert len(opened) >= 48 and max(alive) < 12

"""Whole runs: one process against two, small forward passes against large ones, and how much a run holds at a time."""

import importlib
import json
import weakref

import common

import pytest
import torch
from drive import measure
from whole_runs import assert_same_run, drive, metrics

# --- one run, however it is cut up ------------------------------------------------------------------------------------

TWO_UPDATES = ("--updates_per_step", 2, "--beta", 0.1)
ONE_UPDATE = ("--updates_per_step", 1, "--micro_batch_size", 3, "--max_steps", 1, "--eval_dataset", "none")


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """One process, two updates per rollout, a KL to the reference."""
    return drive(folder, tmp_path_factory.mktemp("alone") / "run", *TWO_UPDATES)


def test_trap_sharded_generate(folder, tmp_path, alone):
    """Two sharded processes, whose answers end at different lengths, give the answers and gradients of one."""
    assert_same_run(alone, drive(folder, tmp_path / "two", *TWO_UPDATES, processes=2))


def test_trap_unwrapped_forward(folder, tmp_path):
    """Two sharded processes reduce their gradients to those of one: a pass around the registered methods would not.

    Groups without advantage are not read, so the processes need different numbers of passes; the padding weighs
    nothing. A process with more answer tokens meets more chunks of the head; the other must not wait for it half-way.
    """
    one = drive(folder, tmp_path / "one", *ONE_UPDATE, script="vepo")
    two = drive(folder, tmp_path / "two", *ONE_UPDATE, script="vepo", processes=2, LOGITS=str(2**13))
    assert max(json.loads((one / "padding.json").read_text())) == 0
    assert max(json.loads((two / "padding.json").read_text())) > 0
    assert_same_run(one, two, gradients=1)


@pytest.mark.parametrize("size", [1, 100])
def test_micro_batches_do_not_change_the_run(folder, tmp_path, alone, size):
    """One answer to a pass or all in one: the same run; so is a group in one packed row or in three."""
    assert_same_run(alone, drive(folder, tmp_path / "run", *TWO_UPDATES, "--micro_batch_size", size))


# --- nothing to learn from --------------------------------------------------------------------------------------------


def test_an_all_masked_batch_gives_zero(folder, tmp_path):
    """Every answer cut off and --mask_truncated: both sums of the loss are empty, and nothing is NaN."""
    place = drive(
        folder, tmp_path / "run", "--max_completion_length", 1, "--mask_truncated", "--updates_per_step", 1,
        "--eval_dataset", "none", "--weight_decay", 0)
    for line in metrics(place):
        assert line["truncated"] == 1
        assert line["loss"] == 0
        assert line["grad_norm"] == 0
    before = common.load_policy(str(folder))[0].state_dict()
    after = common.load_policy(str(place))[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- memory -----------------------------------------------------------------------------------------------------------


class Counted:
    """A data set that counts how many of its pictures are in memory whenever one more is opened."""

    def __init__(self, problems):
        self.problems = problems
        self.opened = []
        self.alive = []

    def __len__(self):
        return len(self.problems)

    def __getitem__(self, place):
        problem = self.problems[place]
        self.opened.append(weakref.ref(problem["images"][0]))
        self.alive.append(sum(picture() is not None for picture in self.opened))
        return problem


@pytest.mark.parametrize("script", ["grpo", "eval_passk"])
def test_pictures_are_not_all_in_memory_at_once(folder, tmp_path, monkeypatch, script):
    """A data set is gone through problem by problem: when its prompts are checked, and when they are answered."""
    counted = []

    def load(spec, run):
        if spec == "none":
            return []
        counted.append(Counted(common.load_problems(spec)))
        return counted[-1]

    monkeypatch.setattr(importlib.import_module(script), "load_problems", load)
    if script == "grpo":
        drive(folder, tmp_path / "run", "--dataset", "toy@train:48", "--eval_dataset", "none", "--max_steps", 1)
    else:
        measure(
            "--model", folder, "--dataset", "toy@test:48", "--output_dir", tmp_path / "run", "--num_samples", 2,
            "--ks", 1, "--max_completion_length", 4, "--sample_batch_size", 8)
    data, = counted
    assert len(data.opened) >= 48
    assert max(data.alive) < 12

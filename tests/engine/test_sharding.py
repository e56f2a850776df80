"""A second model that only reads, beside one that learns: chunked, sharded, in its own dtype, with its own padding.

opd.py is the script that has one: a teacher reads what the student wrote.
"""

import argparse
import json
import os
import shutil
import sys

import common
import harness.sharding
from harness.flags import of_the_world
from tabletop import models

import drive as driver
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run_script
from references import draw
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from whole_runs import SMALL, assert_same_run, drive_watching, metrics

FLAGS = ("--eval_dataset", "none", "--lr_scheduler_type", "constant", "--max_completion_length", 8)
FOUR_STEPS = (*FLAGS, "--max_steps", 4, "--save_steps", 2)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """Another untrained model, wider than the student and with more rows of padding after its vocabulary."""
    place = tmp_path_factory.mktemp("model") / "teacher"
    models.untrained(str(place), models.RECIPES["toy-teacher"], seed=2)
    return str(place)


def distilled_run(folder, place, *flags):
    """A run of opd.py; returns its folder, and opd.distil as Recorded."""
    return drive_watching("distil", folder, place, *flags, script="opd")


@pytest.fixture(scope="module")
def alone(folder, teacher_folder, tmp_path_factory):
    """The folder of a run of one process, four steps."""
    place = tmp_path_factory.mktemp("alone") / "run"
    return distilled_run(folder, place, *FOUR_STEPS, "--teacher", teacher_folder)[0]


# --- in chunks --------------------------------------------------------------------------------------------------------


def test_no_models_logits_exist_for_more_than_a_chunk(policy, processor, problems, teacher_folder, monkeypatch):
    """Neither model's, in the forward pass or when the backward pass recomputes them."""
    teacher = common.load_policy(teacher_folder)[0]
    rollout = draw(policy, processor, problems[:3], G=2, temperature=1.0)
    plain_head = common.Policy.head
    rows_met = {"student": [], "teacher": []}

    def head(self, hidden_ND, temperature):
        rows_met["teacher" if self is teacher else "student"].append(len(hidden_ND))
        return plain_head(self, hidden_ND, temperature)

    def difference(logits_NV, teacher_logits_NV, tokens_N):
        return (logits_NV - teacher_logits_NV.detach()).square().mean(1)

    monkeypatch.setattr(common.Policy, "head", head)
    monkeypatch.setattr(common, "LOGITS", 16 * policy.vocabulary)
    common.read(difference, rollout, policy, teacher).sum().backward()
    tokens = int(rollout.mask_BT.sum())
    assert tokens > 50
    for rows in rows_met.values():
        assert max(rows) == 16
        assert sum(rows) == 2 * tokens


# --- over processes ---------------------------------------------------------------------------------------------------


def test_two_sharded_processes_give_the_run_of_one(folder, teacher_folder, tmp_path, alone):
    """Also where they meet other numbers of chunks and make other numbers of passes: padding passes weigh nothing."""
    place = tmp_path / "two"
    flags = (*SMALL, "--num_generations", 3, *FLAGS, "--teacher", teacher_folder, "--output_dir", place)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = run_script(__file__, "opd", "--model", folder, *flags, processes=2, timeout=180, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (place / "padding.json").read_text() == "[2, 0]"
    assert_same_run(alone, place)


def one_of_two_processes(*argv):
    """Chunks of 8 positions and passes of 6 answers in the first process, 34 positions and 3 answers in the other."""
    rank = int(os.environ["RANK"])
    common.LOGITS = [2**12, 2**14][rank]
    driver.go(*argv, "--micro_batch_size", [6, 3][rank])


@pytest.mark.parametrize("size", [1, 100])
def test_micro_batches_do_not_change_the_run(folder, teacher_folder, tmp_path, alone, size):
    flags = (*FLAGS, "--teacher", teacher_folder, "--micro_batch_size", size)
    assert_same_run(alone, distilled_run(folder, tmp_path / "run", *flags)[0])


# --- through a kill ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a process that nothing in it can catch."""


def die():
    raise Killed


def test_killed_and_resumed_to_the_same_numbers(folder, teacher_folder, tmp_path, alone, monkeypatch):
    """Ends after the third line, a checkpoint after the second; then --resume: bitwise the same."""
    place = tmp_path / "killed"
    flags = (*FOUR_STEPS, "--teacher", teacher_folder)
    monkeypatch.setattr(driver, "die", die)
    monkeypatch.setenv("KILL_AT", "3")
    with pytest.raises(Killed):
        distilled_run(folder, place, *flags)
    assert (place / "checkpoint-2").exists()
    assert len(metrics(place)) == 3

    monkeypatch.delenv("KILL_AT")
    _, distil = distilled_run(folder, place, *flags, "--resume")
    assert len(distil.given) == 2
    assert metrics(place) == metrics(alone)
    assert (place / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


# --- padding and dtype of a checkpoint --------------------------------------------------------------------------------


def rewritten(source, place, change):
    """A copy of a model's folder with `change(model)` done to it."""
    shutil.copytree(source, place)
    model = AutoModelForImageTextToText.from_pretrained(source)
    change(model)
    model.save_pretrained(place)
    return str(place)


def test_padding_behind_the_teachers_vocabulary_does_not_count(
    folder, teacher_folder, processor, tmp_path, alone,
):
    """A teacher whose embedding has 64 more rows, all that have no word large: the same loss and gradient."""

    def widen(model):
        model.resize_token_embeddings(model.lm_head.out_features + 64, mean_resizing=False)
        model.lm_head.weight.data[len(processor.tokenizer):] = 5.0

    wide = rewritten(teacher_folder, tmp_path / "wide", widen)
    widths = {common.load_policy(name)[0].lm_head.out_features for name in (folder, teacher_folder, wide)}
    assert len(widths) == 3
    place, _ = distilled_run(folder, tmp_path / "run", *FLAGS, "--max_steps", 1, "--teacher", wide)
    line, = metrics(place)
    assert line == pytest.approx(metrics(alone)[0], rel=1e-5, abs=1e-7)


def in_half_precision(model):
    model.to(torch.bfloat16)


@pytest.fixture
def halves(folder, teacher_folder, tmp_path):
    """Student and teacher as bf16 checkpoints."""
    student = rewritten(folder, tmp_path / "student", in_half_precision)
    teacher = rewritten(teacher_folder, tmp_path / "teacher", in_half_precision)
    return student, teacher


def types(model):
    return {weight.dtype for weight in model.parameters()}


def test_a_teacher_in_bf16_stays_so_and_a_student_is_fp32(folder, halves, tmp_path):
    """A model that is only read keeps its checkpoint's dtype; what is trained has fp32 masters, and is saved in bf16.
    """
    student_folder, teacher_folder = halves
    flags = (*FLAGS, "--max_steps", 1, "--teacher", teacher_folder)
    place, distil = distilled_run(student_folder, tmp_path / "run", *flags)
    _, student, _, _ = distil.given[0]
    assert types(student) == {torch.float32}
    assert types(distil.named[0]["teacher"]) == {torch.bfloat16}
    assert types(common.load_policy(str(place))[0]) == {torch.bfloat16}
    assert types(common.load_policy(folder)[0]) == {torch.float32}
    assert_is_rounded(student, place, student_folder)


def assert_is_rounded(student, place, source):
    """What a run saved is its fp32 masters in bf16, under the names of what it was loaded from; config.json says so."""
    saved = load_file(place / "model.safetensors")
    assert saved.keys() == load_file(f"{source}/model.safetensors").keys()
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = common.load_policy(str(place))[0].state_dict()
    for name, weight in harness.sharding.whole_weights(student).items():
        assert weight.dtype == torch.float32
        assert torch.equal(loaded[name], weight.to(torch.bfloat16))


def test_shards_are_saved_in_the_dtype_they_came_in(halves, tmp_path):
    """A sharded model of fp32 masters gives the same folder; trained or not, it is the checkpoint that it came from."""
    args = of_the_world(train_vision=True, gradient_checkpointing=False)
    run = argparse.Namespace(args=args, sharded=True, device=torch.device("cpu"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy, processor = common.load_policy(halves[0], run, train=True)
        assert types(policy) == {torch.float32}
        common.save_policy(policy, processor, str(tmp_path / "saved"))
        assert_is_rounded(policy, tmp_path / "saved", halves[0])
    finally:
        dist.destroy_process_group()
    before = load_file(f"{halves[0]}/model.safetensors")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("train, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_shards_have_the_dtype_of_what_they_are_for(halves, train, dtype):
    """The same of a model in shards."""
    args = of_the_world(train_vision=True, gradient_checkpointing=False)
    run = argparse.Namespace(args=args, sharded=True, device=torch.device("cpu"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy, _ = common.load_policy(halves[0], run, train=train)
        assert types(policy) == {dtype}
        assert len(harness.sharding.whole_weights(policy)) > 50
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    one_of_two_processes(*sys.argv[1:])

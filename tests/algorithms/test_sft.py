"""sft.py: what is trained on, early stopping, a teacher's verified answers and its distributions, a budget."""

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import common
import harness.memory
import sft
from harness.problems import WithTraces
from tabletop import models

import pytest
import torch
from references import brute_kl, finite_differences, one_more_word, plain_logits, random_logits
from whole_runs import Recorded, drive, metrics, refusal

# --- eq. (1): cross-entropy on the answer alone -----------------------------------------------------------------------


def test_trains_on_the_answer_alone(policy, processor, problems):
    """The loss is the cross-entropy of trace and end token, nothing of the prompt: against the plain forward pass."""
    texts = ["<think>one two</think>\\boxed{1}", "red", "a b c", "\\boxed{2}", "x"]
    rollout = common.forced(policy, processor, problems, texts)
    expected_costs = []
    for b, logits in enumerate(plain_logits(policy, processor, rollout)):
        ids = processor.tokenizer(texts[b]).input_ids + [processor.tokenizer.eos_token_id]
        assert rollout.tokens_BT[b, :len(ids)].tolist() == ids
        assert rollout.mask_BT[b].sum() == len(ids)
        expected_costs.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="none"))
    cost_BT, entropy_BT = common.read(sft.hard, rollout, policy)
    loss = (cost_BT.detach() * rollout.mask_BT).sum() / rollout.mask_BT.sum()
    assert float(loss) == pytest.approx(float(torch.cat(expected_costs).mean()), rel=1e-5)
    assert cost_BT.requires_grad
    assert not entropy_BT.requires_grad


def test_has_stopped_falling():
    """The last `patience` losses all failed to get below the lowest before them. Equal is not lower."""
    assert sft.has_stopped_falling([3.0, 2.0, 2.0], patience=1)
    assert sft.has_stopped_falling([1.0, 2.0, 1.5], patience=2)
    assert not sft.has_stopped_falling([3.0, 2.0, 1.0], patience=1)
    assert not sft.has_stopped_falling([3.0, 2.0, 2.5, 1.9], patience=2)
    assert not sft.has_stopped_falling([3.0, 2.0], patience=2)  # too few to tell


FLAGS = ("--held_out_traces", 8, "--loss_steps", 2, "--lr_scheduler_type", "constant", "--micro_batch_size", 8)


def test_a_run_learns(folder, tmp_path):
    """From about the log of the vocabulary, as an untrained model must begin, down by more than a nat."""
    flags = (*FLAGS, "--eval_dataset", "none", "--max_steps", 12, "--learning_rate", 3e-3)
    place = drive(folder, tmp_path / "run", *flags, script="sft")
    losses = [line["loss"] for line in metrics(place)]
    assert losses[0] > math.log(400) - 1
    assert losses[-1] < losses[0] - 1.5


def test_a_run_stops_early(folder, tmp_path):
    """At the first evaluation that shows it, with an evaluation and a saved model, as if it had been the last step."""
    flags = (*FLAGS, "--max_steps", 40, "--learning_rate", 1.0, "--early_stop", 2)
    place = drive(folder, tmp_path / "high", *flags, script="sft")
    lines = metrics(place)[1:]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(lines) < 40
    assert sft.has_stopped_falling(losses, 2)
    assert not sft.has_stopped_falling(losses[:-1], 2)
    assert "eval_accuracy" in lines[-1]
    assert (place / "model.safetensors").exists()


def test_max_tokens_is_met_as_nearly_as_whole_steps_can(folder, tmp_path):
    """The tokens of so many steps are nearer to the budget than those of any other number; never no step at all."""
    flags = (*FLAGS, "--eval_dataset", "none", "--loss_steps", 100, "--prompts_per_step", 4)
    five_steps = metrics(drive(folder, tmp_path / "long", *flags, "--max_steps", 5, script="sft"))
    totals = list(itertools.accumulate(line["tokens"] for line in five_steps))
    for budget in (1, int(0.48 * totals[4]), int(0.72 * totals[4])):  # 0, 2.4 or 3.6 steps, or so
        lines = metrics(drive(folder, tmp_path / f"{budget}", *flags, "--max_tokens", budget, script="sft"))
        nearest = min(totals, key=lambda total, budget=budget: abs(total - budget))
        assert sum(line["tokens"] for line in lines) == nearest


# --- a teacher's verified answers -------------------------------------------------------------------------------------


def has_a_space(problem, text):
    """Plays the format reward: about half of an untrained model's answers pass."""
    return float(" " in text)


def flags_of_teaching(folder, place):
    """A run that learns from a teacher, 3 answers to each of 24 problems, kept in the traces.jsonl of `place`."""
    return (
        *FLAGS,
        "--teacher", folder,
        "--teacher_samples", 3,
        "--traces", place / "traces.jsonl",
        "--dataset", "toy@train:24",
        "--eval_dataset", "none",
        "--max_steps", 1,
        "--held_out_traces", 4,
    )


@pytest.fixture
def taught(folder, tmp_path, monkeypatch):
    """The flags of such a run in this test's folder."""
    monkeypatch.setattr(sft, "format_reward", has_a_space)
    return flags_of_teaching(folder, tmp_path)


@pytest.fixture(scope="module")
def first_run(folder, tmp_path_factory):
    """The folder of such a run, beside its traces."""
    place = tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "format_reward", has_a_space)
        return drive(folder, place / "run", *flags_of_teaching(folder, place), script="sft")


@pytest.fixture
def one(first_run, tmp_path):
    """The same, with a copy of the traces in this test's folder."""
    shutil.copy(first_run.parent / "traces.jsonl", tmp_path)
    return first_run


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_teachers_answers_are_verified_and_kept(tmp_path, one):
    """Only right and well-formed answers are trained on. (Right: of even length.)"""
    rows = rows_of(tmp_path / "traces.jsonl")
    assert len(rows) == 24 * 3
    good = set()
    for row in rows:
        assert row["right"] == (len(row["text"]) % 2 == 0 and " " in row["text"])
        if row["right"]:
            good.add(row["text"])
    trained = {row["text"] for row in rows_of(one / "samples.jsonl")}
    assert trained
    assert trained <= good


def test_kept_answers_are_not_sampled_again(folder, tmp_path, monkeypatch, taught, one):
    """Nor does it matter in which order several processes wrote the problems, or what else is in the file."""
    monkeypatch.setattr(sft, "sample", None)  # a call would raise
    two = drive(folder, tmp_path / "two", *taught, script="sft")
    assert metrics(two) == metrics(one)

    rows = rows_of(tmp_path / "traces.jsonl")
    of_problems = [rows[start:start + 3] for start in range(0, len(rows), 3)]
    of_another_seed = [row | dict(seed=9, text="right ") for row in rows[:6]]
    shuffled = [*of_problems[1::2], of_another_seed, *of_problems[::2]]
    write_rows(tmp_path / "traces.jsonl", itertools.chain(*shuffled))
    three = drive(folder, tmp_path / "three", *taught, script="sft")
    assert metrics(three) == metrics(one)


def test_a_stopped_teacher_goes_on(folder, tmp_path, monkeypatch, taught, one):
    """After the last whole problem: what a kill left of one is sampled again, and the run is the same."""
    traces = tmp_path / "traces.jsonl"
    lines = traces.read_text().splitlines(keepends=True)
    traces.write_text("".join(lines[:20 * 3 + 2]) + lines[-1][:30])  # 20 problems, two thirds of one, half a line
    sampling = Recorded(sft.sample)
    monkeypatch.setattr(sft, "sample", sampling)
    two = drive(folder, tmp_path / "two", *taught, script="sft")
    assert sum(len(problems) for _, _, problems, _ in sampling.given) == 4
    assert metrics(two) == metrics(one)


def test_a_teacher_with_other_weights_is_another_teacher(folder, tmp_path, monkeypatch, taught):
    """Its answers of before are not taken for its own, though its name and its folder are the same."""
    teacher = shutil.copytree(folder, tmp_path / "teacher")
    sampling = Recorded(sft.sample)
    monkeypatch.setattr(sft, "sample", sampling)
    for number in (1, 2):
        os.utime(teacher / "model.safetensors", (number, number))
        sampling.given.clear()
        drive(folder, tmp_path / f"run{number}", *taught, "--teacher", teacher, script="sft")
        assert sum(len(problems) for _, _, problems, _ in sampling.given) == 24


@pytest.mark.parametrize("text", ["no json\n", "[1]\n"])
def test_a_file_that_holds_no_answers_is_one_line(capsys, folder, tmp_path, text):
    """And it is left as it was."""
    path = tmp_path / "traces.jsonl"
    path.write_text(text)
    flags = (*FLAGS, "--teacher", folder, "--traces", path)
    assert f"{path} is no file of answers" in refusal(capsys, folder, tmp_path / "out", *flags, script="sft")
    assert path.read_text() == text


def test_a_folder_in_the_place_of_the_answers_is_one_line(capsys, folder, tmp_path):
    flags = (*FLAGS, "--teacher", folder, "--traces", tmp_path)
    assert f"{tmp_path} is no file of answers" in refusal(capsys, folder, tmp_path / "out", *flags, script="sft")


# --- traces that were written elsewhere -------------------------------------------------------------------------------


def test_a_file_of_traces_needs_no_teacher(folder, tmp_path, monkeypatch, taught, one):
    """What a teacher's run has kept trains the same run without the teacher; nothing is sampled, no second model."""
    loading = Recorded(sft.load_policy)
    monkeypatch.setattr(sft, "load_policy", loading)
    monkeypatch.setattr(sft, "sample", None)  # a call would raise
    two = drive(folder, tmp_path / "two", *taught, "--teacher", "none", script="sft")
    assert metrics(two) == metrics(one)
    assert len(loading.given) == 1


def test_what_is_not_graded_yet_is_graded_here(folder, tmp_path, taught, one):
    """Rows that say nothing of themselves, in any order: the same traces are left as of the teacher's own file."""
    rows = [dict(id=row["id"], text=row["text"]) for row in rows_of(tmp_path / "traces.jsonl")]
    write_rows(tmp_path / "bare.jsonl", [dict(id="elsewhere", text="x"), *rows[36:], *rows[:36]])
    flags = (*taught, "--teacher", "none", "--traces", tmp_path / "bare.jsonl")
    two = drive(folder, tmp_path / "two", *flags, script="sft")
    assert metrics(two) == metrics(one)


@pytest.mark.parametrize("text, said", [
    (None, "cannot be read (["),
    ('{"id": "a", "text": "b"}\nno json\n', "row 2: it is no JSON object"),
    ('["a"]\n', "row 1: it is no JSON object"),
    ('{"id": "a", "trace": "b"}\n', "row 1, column text: None is no text"),
    ('{"id": 7, "text": "b"}\n', "row 1, column id: 7 is no text"),
    ('{"id": "a", "text": "b"}\n', "none of its ids is one of toy@train:64, whose first is toy-train-0; the file's"),
    ("", "none of its ids is one of toy@train:64"),
    ('{"id": "toy-train-0", "text": "abc"}\n', "none of its 1 answers to problems of toy@train:64 is right and"),
])
def test_a_file_that_gives_no_traces_is_one_line(capsys, folder, tmp_path, text, said):
    path = tmp_path / "traces.jsonl"
    if text is not None:
        path.write_text(text)
    line = refusal(capsys, folder, tmp_path / "out", *FLAGS, "--traces", path, script="sft")
    assert f"--traces {path}" in line
    assert said in line


def test_a_teacher_that_does_not_fit_is_not_loaded(capsys, folder, tmp_path, monkeypatch, taught, one):
    """It is one line with its size, what is free and what to do; where its answers are there already, it may be large.
    """
    monkeypatch.setattr(harness.memory, "free_memory", lambda device: 1_000_000)
    monkeypatch.setattr(sft, "sample", None)
    drive(folder, tmp_path / "kept", *taught, script="sft")
    line = refusal(capsys, folder, tmp_path / "out", *taught, "--seed", 2, script="sft")
    assert f"--teacher {folder} has 0.00 B weights, and stands whole in every process while it samples" in line
    assert re.search("at a time that takes .* MB each, and 1.0 MB are free on cpu; have it write its answers", line)


class CountedProblems(Sequence):
    """Three problems that remember which of them were opened."""

    def __init__(self):
        self.opened = []

    def __len__(self):
        return 3

    def __getitem__(self, place):
        if place >= 3:
            raise IndexError
        self.opened.append(place)
        return dict(id=f"p{place}", images=["picture"])


def test_pictures_are_opened_when_asked_for():
    """Otherwise all pictures of a data set would be in memory at once, in every process."""
    problems = CountedProblems()
    rows = [dict(id="p2", text="b"), dict(id="p0", text="a"), dict(id="p2", text="c"), dict(id="p2", text="b")]
    traced = WithTraces(problems, rows)
    assert [problem["trace"] for problem in traced] == ["a", "b", "c"]  # in the problems' order, each text once
    problems.opened.clear()
    assert len(traced[1:]) == 2
    assert problems.opened == []
    assert traced[1:][0] == dict(id="p2", images=["picture"], trace="b")
    assert problems.opened == [2]
    assert traced[-1]["trace"] == "c"


# --- eq. (2): the teacher's distributions -----------------------------------------------------------------------------


@pytest.mark.parametrize("banned", [[], [2, 7]])
@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_forward_kl_against_exact_sums(shape, banned):
    """The teacher's distribution comes first. Any leading shape; also with ids that both forbid."""
    ours, theirs = random_logits(*shape, 9), random_logits(*shape, 9, seed=1)
    for logits in (ours, theirs):
        logits[..., banned] = -1e9
    pairs = zip(theirs.reshape(-1, 9).tolist(), ours.reshape(-1, 9).tolist(), strict=True)
    kl = sft.forward_kl(ours, theirs)
    assert kl.shape == shape
    assert kl.flatten().tolist() == pytest.approx([brute_kl(*pair) for pair in pairs], abs=1e-12)


def test_forward_kl_gradient_against_finite_differences():
    """The slope is the student's alone."""
    ours, theirs = random_logits(9).requires_grad_(), random_logits(9, seed=1).requires_grad_()
    sft.forward_kl(ours, theirs).backward()
    expected = finite_differences(lambda x: brute_kl(theirs.tolist(), x), ours.detach())
    assert torch.allclose(ours.grad, expected, atol=1e-8)
    assert ours.grad.norm() > 0.1
    assert theirs.grad is None


def test_forward_kl_is_zero_without_gradient_between_equals():
    """Also between logits that differ by a constant, and where ids are forbidden."""
    logits = random_logits(6, 9)
    logits[:, 3] = -1e9
    ours = logits.clone().requires_grad_()
    kl = sft.forward_kl(ours, torch.where(logits < -1e8, logits, logits + 2.0))
    kl.sum().backward()
    assert kl.abs().max() < 1e-12
    assert ours.grad.abs().max() < 1e-12


@torch.no_grad()
def mean_forward_kl(teacher, student, rollout):
    """Over all tokens of the rollout, term by term, from the logits of both models."""
    rows = []
    for path in (teacher, student):
        logits_BTV = common.completion_logits(common.load_policy(str(path))[0], rollout)
        rows.append(logits_BTV[rollout.mask_BT.bool()].tolist())
    kls = [brute_kl(*pair) for pair in zip(*rows, strict=True)]
    return math.fsum(kls) / len(kls)


@pytest.fixture
def other_teacher(tmp_path):
    """Another untrained model, of the same family."""
    models.untrained(str(tmp_path / "teacher"), seed=2)
    return tmp_path / "teacher"


def test_soft_targets(folder, tmp_path, monkeypatch, taught, other_teacher):
    """The loss is the forward KL on the teacher's own traces; eval_loss too, of the student that the step has left."""
    forced = Recorded(common.forced)
    monkeypatch.setattr(common, "forced", forced)
    flags = (*taught, "--soft_targets", "--teacher", other_teacher, "--micro_batch_size", 3)
    place = drive(folder, tmp_path / "run", *flags, script="sft")
    line, = metrics(place)
    trained_on, held_out = forced.returned
    assert set(trained_on.texts) <= {row["text"] for row in rows_of(tmp_path / "traces.jsonl")}
    assert line["loss"] == pytest.approx(mean_forward_kl(other_teacher, folder, trained_on), abs=1e-5)
    assert line["eval_loss"] == pytest.approx(mean_forward_kl(other_teacher, place, held_out), abs=1e-5)
    assert line["loss"] > 0.1
    assert line["grad_norm"] > 0.01


def test_too_few_traces_for_a_step_are_one_line(capsys, folder, tmp_path, taught, one):
    """24 problems have at most 72 traces: with 70 held back, no step of 8 is left."""
    flags = (*taught, "--held_out_traces", 70, "--prompts_per_step", 8)
    line = refusal(capsys, folder, tmp_path / "out", *flags, script="sft")
    assert "there are only" in line
    assert "fewer --held_out_traces" in line


def test_soft_targets_need_a_teacher(capsys, folder, tmp_path):
    line = refusal(capsys, folder, tmp_path / "out", *FLAGS, "--soft_targets", script="sft")
    assert "name a --teacher" in line


def test_soft_targets_need_the_same_tokenizer(capsys, folder, tmp_path, taught, other_teacher):
    """Known before the teacher has sampled anything."""
    one_more_word(other_teacher)
    flags = (*taught, "--soft_targets", "--teacher", other_teacher)
    assert "different tokenizers" in refusal(capsys, folder, tmp_path / "out", *flags, script="sft")
    assert not (tmp_path / "traces.jsonl").exists()

"""sft.py: what is trained on, early stopping, a teacher's verified answers and its distributions, a budget."""

import itertools
import json
import math
import os
import shutil

import pytest
import torch

import common
import sft
from lab import report, toy
from test_opd import brute_kl, finite_differences, one_more_word
from test_run import drive, metrics
from test_sample import plain_logits
from test_vepo import random_logits


def test_trains_on_the_answer_alone(policy, processor, problems):
    """The loss is the cross-entropy of trace and end token, nothing of the prompt: against the plain forward pass."""
    texts = ["<think>one two</think>\\boxed{1}", "red", "a b c", "\\boxed{2}", "x"]
    rollout = sft.forced(policy, processor, problems, texts)
    tokenizer = processor.tokenizer
    assert [row[:int(m.sum())].tolist() for row, m in zip(rollout.tokens_BT, rollout.mask_BT)] == [
        tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]
    cost_BT, entropy_BT = sft.read(sft.hard, rollout, policy)
    tokens = rollout.mask_BT.sum()
    expected = torch.cat([
        torch.nn.functional.cross_entropy(logits, rollout.tokens_BT[b, :len(logits)], reduction="none")
        for b, logits in enumerate(plain_logits(policy, processor, problems, rollout))]).mean()
    assert float((cost_BT.detach() * rollout.mask_BT).sum() / tokens) == pytest.approx(float(expected), rel=1e-5)
    assert not entropy_BT.requires_grad and cost_BT.requires_grad


def test_has_stopped_falling():
    assert not sft.has_stopped_falling([3.0, 2.0], 2) and not sft.has_stopped_falling([3.0, 2.0, 1.0], 1)
    assert sft.has_stopped_falling([3.0, 2.0, 2.0], 1) and sft.has_stopped_falling([1.0, 2.0, 1.5], 2)
    assert not sft.has_stopped_falling([3.0, 2.0, 2.5, 1.9], 2)


FLAGS = "--held_out_traces", 8, "--loss_steps", 2, "--lr_scheduler_type", "constant", "--micro_batch_size", 8


def test_learns_and_stops(folder, tmp_path):
    place = drive(folder, tmp_path / "run", *FLAGS, "--max_steps", 12, "--learning_rate", 3e-3, script="sft")
    losses = [line["loss"] for line in metrics(place)[1:]]
    assert losses[0] > math.log(400) - 1 and losses[-1] < losses[0] - 1.5
    place = drive(folder, tmp_path / "high", *FLAGS, "--max_steps", 40, "--learning_rate", 1.0, "--early_stop", 2,
                  script="sft")
    lines = metrics(place)[1:]
    evals = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(lines) < 40 and sft.has_stopped_falling(evals, 2) and not sft.has_stopped_falling(evals[:-1], 2)
    assert "eval_accuracy" in lines[-1] and (place / "model.safetensors").exists()


def test_teachers_answers_are_verified_and_kept(folder, tmp_path, monkeypatch):
    """Only right, well-formed, distinct answers are trained on; a second run samples nothing."""
    monkeypatch.setattr(sft, "format_reward", lambda problem, text: float(" " in text))
    traces = tmp_path / "traces.jsonl"
    flags = (*FLAGS, "--teacher", folder, "--teacher_samples", 3, "--traces", traces, "--dataset", "toy@train:24",
             "--max_steps", 1, "--held_out_traces", 4)
    one = drive(folder, tmp_path / "one", *flags, script="sft")
    rows = [json.loads(line) for line in traces.read_text().splitlines()]
    assert len(rows) == 24 * 3
    assert all(row["right"] == (len(row["text"]) % 2 == 0 and " " in row["text"]) for row in rows)
    trained = [json.loads(line)["text"] for line in (one / "samples.jsonl").read_text().splitlines()]
    assert set(trained) <= {row["text"] for row in rows if row["right"]}
    monkeypatch.setattr(sft, "sample", None)  # would raise
    two = drive(folder, tmp_path / "two", *flags, script="sft")
    assert metrics(two) == metrics(one)
    # Nor does it matter in which order several processes wrote the problems, or what else stands in the file.
    blocks = [rows[n:n + 3] for n in range(0, len(rows), 3)]
    others = [row | dict(seed=9, text="right ") for row in rows[:6]]
    traces.write_text("".join(json.dumps(row) + "\n" for block in [*blocks[1::2], others, *blocks[::2]] for row in block))
    three = drive(folder, tmp_path / "three", *flags, script="sft")
    assert metrics(three) == metrics(one)


def test_a_stopped_teacher_goes_on(folder, tmp_path, monkeypatch):
    """Behind the last whole problem: what a kill left of one is sampled again, and the run is the same."""
    monkeypatch.setattr(sft, "format_reward", lambda problem, text: float(" " in text))
    traces, asked, plain = tmp_path / "traces.jsonl", [], sft.sample
    flags = (*FLAGS, "--teacher", folder, "--teacher_samples", 3, "--traces", traces, "--dataset", "toy@train:24",
             "--max_steps", 1, "--held_out_traces", 4)
    one = drive(folder, tmp_path / "one", *flags, script="sft")
    lines = traces.read_text().splitlines(True)
    traces.write_text("".join(lines[:20 * 3 + 2]) + lines[-1][:30])
    monkeypatch.setattr(sft, "sample", lambda *args, **named: asked.append(len(args[2])) or plain(*args, **named))
    two = drive(folder, tmp_path / "two", *flags, script="sft")
    assert sum(asked) == 4 and metrics(two) == metrics(one)
    teacher = shutil.copytree(folder, tmp_path / "teacher")  # and one whose weights have changed since is another
    for n in (1, 2):
        asked.clear()
        os.utime(teacher / "model.safetensors", (n, n))
        drive(folder, tmp_path / f"again{n}", *flags, "--teacher", teacher, script="sft")
        assert sum(asked) == 24


@pytest.mark.parametrize("text", ["no json\n", "[1]\n", None])
def test_a_file_that_holds_no_traces_is_one_line(capsys, folder, tmp_path, text):
    path = tmp_path / "traces.jsonl"
    path.write_text(text) if text else path.mkdir()
    with pytest.raises(SystemExit) as caught:
        drive(folder, tmp_path / "out", *FLAGS, "--teacher", folder, "--traces", path, script="sft")
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert caught.value.code == 2 and f"--traces {path} is no file of traces" in line
    assert path.is_dir() or path.read_text() == text  # and it is left as it was


def test_pictures_are_opened_when_asked_for():
    """Else all pictures of a data set would stand in memory at once, in every process."""
    opened = []

    class Problems(list):
        def __getitem__(self, place):
            opened.append(place)
            return dict(id=f"p{place}", images=["picture"])
    traced = sft.Traced(Problems(range(3)), [(0, "a"), (2, "b"), (2, "c")])
    assert len(traced[1:]) == 2 and not opened
    assert traced[1:][0] == dict(id="p2", images=["picture"], trace="b") and opened == [2]
    assert [problem["trace"] for problem in traced] == ["a", "b", "c"] and traced[-1]["trace"] == "c"


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_forward_kl_against_exact_sums(shape):
    """The teacher's distribution comes first; also with ids that both forbid; the slope is the student's alone."""
    ours, theirs = random_logits(*shape, 9), random_logits(*shape, 9, seed=1)
    for banned in ([], [2, 7]):
        ours[..., banned] = theirs[..., banned] = -1e9
        pairs = zip(theirs.reshape(-1, 9).tolist(), ours.reshape(-1, 9).tolist())
        kl = sft.forward_kl(ours, theirs)
        assert kl.shape == shape
        assert kl.flatten().tolist() == pytest.approx([brute_kl(*pair) for pair in pairs], abs=1e-12)
    ours, theirs = random_logits(9).requires_grad_(), random_logits(9, seed=1).requires_grad_()
    sft.forward_kl(ours, theirs).backward()
    expected = finite_differences(lambda x: brute_kl(theirs.tolist(), x), ours.detach())
    assert torch.allclose(ours.grad, expected, atol=1e-8) and ours.grad.norm() > 0.1 and theirs.grad is None


def test_forward_kl_is_zero_without_gradient_between_equals():
    logits = random_logits(6, 9)
    logits[:, 3] = -1e9
    ours = logits.clone().requires_grad_()
    kl = sft.forward_kl(ours, torch.where(logits < -1e8, logits, logits + 2.0))
    kl.sum().backward()
    assert kl.abs().max() < 1e-12 and ours.grad.abs().max() < 1e-12


@pytest.fixture
def taught(folder, tmp_path, monkeypatch):
    """Another untrained model as the teacher, half of whose answers are good enough, and the flags of a short run."""
    toy.untrained(str(tmp_path / "teacher"), seed=2)
    monkeypatch.setattr(sft, "format_reward", lambda problem, text: float(" " in text))
    monkeypatch.setattr(report, "finish", lambda *given: "no page")
    return (*FLAGS, "--teacher", tmp_path / "teacher", "--teacher_samples", 3, "--traces", tmp_path / "traces.jsonl",
            "--dataset", "toy@train:24", "--eval_dataset", "none", "--max_steps", 1, "--held_out_traces", 4,
            "--micro_batch_size", 3, "--soft_targets")


@torch.no_grad()
def mean_forward_kl(teacher, student, rollout):
    """Over all tokens of the rollout, term by term, from the logits of both models."""
    theirs, ours = (common.completion_logits(common.load_policy(str(path))[0], rollout)[rollout.mask_BT.bool()].tolist()
                    for path in (teacher, student))
    return math.fsum(map(brute_kl, theirs, ours)) / len(ours)


def test_soft_targets(folder, tmp_path, monkeypatch, taught):
    """The loss is the forward KL on the teacher's own traces; eval_loss too, of the student that the step has left."""
    rollouts, plain = [], sft.forced
    monkeypatch.setattr(sft, "forced", lambda *args: rollouts.append(plain(*args)) or rollouts[-1])
    place = drive(folder, tmp_path / "run", *taught, script="sft")
    line, = metrics(place)
    assert set(rollouts[0].texts) <= {json.loads(row)["text"] for row in open(tmp_path / "traces.jsonl")}
    assert line["loss"] == pytest.approx(mean_forward_kl(tmp_path / "teacher", folder, rollouts[0]), abs=1e-5)
    assert line["eval_loss"] == pytest.approx(mean_forward_kl(tmp_path / "teacher", place, rollouts[1]), abs=1e-5)
    assert line["loss"] > 0.1 and line["grad_norm"] > 0.01 and len(rollouts) == 2


def test_soft_targets_need_a_teacher_with_the_same_tokenizer(capsys, folder, tmp_path, taught):
    def line(*flags):
        with pytest.raises(SystemExit) as caught:
            drive(folder, tmp_path / "out", *flags, script="sft")
        line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert caught.value.code == 2 and not (tmp_path / "out").exists()
        return line
    assert "name a --teacher" in line(*FLAGS, "--soft_targets")
    one_more_word(shutil.copytree(tmp_path / "teacher", tmp_path / "other"))
    assert "another tokenizer" in line(*taught, "--teacher", tmp_path / "other")
    assert not (tmp_path / "traces.jsonl").exists()  # known before the teacher has sampled anything


def test_max_tokens_is_met_as_nearly_as_whole_steps_can(folder, tmp_path, monkeypatch):
    """The tokens of so many steps are nearer to the budget than those of any other number; never no step at all."""
    monkeypatch.setattr(report, "finish", lambda *given: "no page")
    flags = *FLAGS, "--eval_dataset", "none", "--loss_steps", 100
    long = metrics(drive(folder, tmp_path / "long", *flags, "--max_steps", 5, script="sft"))
    totals = list(itertools.accumulate(line["tokens"] for line in long))
    for budget in (1, int(0.48 * totals[4]), int(0.72 * totals[4])):  # 2.4 and 3.6 steps, or so
        lines = metrics(drive(folder, tmp_path / f"{budget}", *flags, "--max_tokens", budget, script="sft"))
        assert sum(line["tokens"] for line in lines) == min(totals, key=lambda total: abs(total - budget))

"""sft.py: what is trained on, early stopping, and a teacher's verified answers kept on disk."""

import json
import math

import pytest
import torch

import sft
from test_run import drive, metrics
from test_sample import plain_logits


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
    assert float((cost_BT * rollout.mask_BT).sum() / tokens) == pytest.approx(float(expected), rel=1e-5)
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

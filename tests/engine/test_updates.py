"""harness.updates: which answers share a forward pass, and what becomes of a pass's loss."""

import argparse

from common import read, token_logps
from harness.updates import micro_batches, plan_updates

import pytest
import torch
from references import draw


class FakeRun:
    """One process of `world`, whose fellows make `theirs` forward passes to each update."""

    def __init__(self, updates=1, size=4, world=1, theirs=0):
        self.args = argparse.Namespace(updates_per_step=updates, micro_batch_size=size)
        self.world = world
        self.theirs = theirs
        self.step = 7

    def gather(self, thing):
        """Of every process: its passes, or the sizes of its groups, which are the same everywhere."""
        return [thing, thing if isinstance(thing, list) else self.theirs]

    def sum(self, value):
        return torch.as_tensor(value, dtype=torch.float32)


@pytest.fixture(scope="module")
def rollout(loaded, problems):
    """Three answers to each of five problems."""
    return draw(*loaded, problems)


def mask_of(answers, rollout):
    """(B,) true at these answers."""
    read_B = torch.zeros(len(rollout), dtype=torch.bool)
    read_B[answers] = True
    return read_B


# --- forward passes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [range(15), [3, 4, 5, 9, 10, 11], [14, 2, 7], []])
@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_every_answer_is_read_once_and_no_other(rollout, answers, size):
    batches = micro_batches(rollout, answers, size)
    assert sorted(b for batch in batches for b in batch.tolist()) == sorted(answers)
    assert all(1 <= len(batch) <= size for batch in batches)


def test_a_group_shares_a_pass_where_it_fits(rollout):
    """A group's prompt is read once for all its answers: six answers to a pass are two whole groups."""
    for batch in micro_batches(rollout, range(15), 6):
        for p in set(rollout.group_B[batch].tolist()):
            assert (rollout.group_B[batch] == p).sum() == 3


def test_the_longest_rows_come_first(rollout):
    """Memory peaks in the first pass: what fits there fits everywhere."""
    tokens = []
    for batch in micro_batches(rollout, range(15), 3):
        p = int(rollout.group_B[batch[0]])
        tokens.append(len(rollout.prompts.ids[p]) + int(rollout.mask_BT[batch].sum()))
    assert tokens == sorted(tokens, reverse=True)
    assert len(set(tokens)) > 1


# --- updates ----------------------------------------------------------------------------------------------------------


def test_each_update_has_its_share_of_the_answers(loaded, problems):
    rollout = draw(*loaded, problems[:4])
    plan = plan_updates(FakeRun(updates=2), rollout)
    assert len(plan) == 2
    assert [update.answers for update in plan] == [slice(0, 6), slice(6, 12)]
    for update in plan:
        found = sorted(b for batch in update for b in batch.tolist())
        assert found == list(range(12))[update.answers]
    assert sorted(torch.cat(plan.batches).tolist()) == list(range(12))


def test_only_what_is_asked_for_is_read(rollout):
    plan = plan_updates(FakeRun(), rollout, mask_of([3, 4, 5, 9, 10, 11], rollout))
    assert sorted(torch.cat(plan.batches).tolist()) == [3, 4, 5, 9, 10, 11]


def gradient_of(plan, policy, rollout):
    """The gradient that the first update of a plan leaves of the mean log-prob, as one vector."""
    policy.zero_grad()
    for update in list(plan)[:1]:
        for batch in update:
            loss = read(token_logps, rollout[batch], policy).sum() / rollout.mask_BT.sum()
            update.backward(batch, loss, answers=torch.tensor(float(len(batch))))
    return torch.cat([weight.grad.flatten() for weight in policy.parameters()])


def test_an_update_with_nothing_to_read_reads_one_answer_for_nothing(policy, rollout):
    """The other processes wait for this one's part of every weight: it reads, and the loss is taken times zero."""
    plan = plan_updates(FakeRun(), rollout, mask_of([], rollout))
    assert [batch.tolist() for batch in plan.batches] == [[0]]
    gradient = gradient_of(plan, policy, rollout)
    assert (gradient == 0).all()
    assert all(weight.grad is not None for weight in policy.parameters())
    assert plan.metrics() == dict(loss=0.0, answers=0.0)


def test_a_pass_that_keeps_step_reads_real_answers_and_counts_for_nothing(policy, rollout):
    """The other process makes nine passes, this one needs five: four more, of answers that are there, times zero."""
    alone = plan_updates(FakeRun(size=3), rollout)
    in_step = plan_updates(FakeRun(size=3, theirs=9), rollout)
    assert len(alone.batches) == 5
    assert len(in_step.batches) == 9
    assert all(rollout.mask_BT[batch].sum(1).min() >= 1 for batch in in_step.batches)
    expected = gradient_of(alone, policy, rollout)
    assert (gradient_of(in_step, policy, rollout) == expected).all()
    assert in_step.metrics() == alone.metrics()
    assert in_step.metrics()["answers"] == 15


def test_a_loss_is_a_sum_over_processes_whose_gradients_are_averaged(policy, rollout):
    """With two processes the gradient is doubled before it is averaged; the loss in the metrics is not."""
    one = plan_updates(FakeRun(), rollout)
    two = plan_updates(FakeRun(world=2), rollout)
    expected = 2 * gradient_of(one, policy, rollout)
    assert torch.allclose(gradient_of(two, policy, rollout), expected, rtol=1e-6)
    assert two.metrics() == one.metrics()


def test_metrics_are_averaged_over_updates(rollout):
    """The numbers of an update are parts of its sum; those of a step are the mean of its updates."""
    rollout = rollout[torch.arange(9)]
    plan = plan_updates(FakeRun(updates=3, size=100), rollout)
    for number, update in enumerate(plan):
        for batch in update:
            update.add(batch, kl=torch.tensor(float(number)))
    assert plan.metrics() == dict(kl=1.0)


def test_the_gap_to_the_sampler_is_a_mean_over_tokens(rollout):
    """sampler_gap: not averaged over updates, which may hold different numbers of tokens."""
    rollout = rollout[torch.arange(12)]
    plan = plan_updates(FakeRun(updates=2, size=100), rollout)
    for update in plan:
        for batch in update:
            update.compare(batch, rollout[batch].logp_BT + 0.25)
    assert plan.metrics()["sampler_gap"] == pytest.approx(0.25, rel=1e-5)
    assert "gap" not in plan.metrics()


def test_a_rollout_that_cannot_be_split_into_updates_is_refused(rollout):
    """Five groups for two updates would cut one; groups of two sizes, or other numbers elsewhere, would hang."""
    with pytest.raises(ValueError, match="whole groups"):
        plan_updates(FakeRun(updates=2), rollout)
    with pytest.raises(ValueError, match="whole groups"):
        plan_updates(FakeRun(updates=2), rollout[torch.arange(5)])
    with pytest.raises(ValueError, match="without answers"):
        plan_updates(FakeRun(), rollout[torch.arange(0)])
    assert len(plan_updates(FakeRun(updates=1), rollout[torch.arange(5)])) == 1

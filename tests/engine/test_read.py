"""common.read: packed rows and chunks against ordinary forward passes."""

import copy

import pytest
import torch

import common
from common import completion_logits, micro_batches, read, token_entropy, token_logps
from test_sample import both, draw, plain_logits


def gradient(policy, rollout, batches, weights_BT):
    """The gradient of Σ weight·log p, one backward pass per batch, as one vector."""
    policy.zero_grad()
    for index_b in batches:
        (read(token_logps, rollout[index_b], policy) * weights_BT[index_b]).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def everyone(rollout, micro_batch_size):
    every = torch.arange(len(rollout))
    return micro_batches(rollout, every, every, micro_batch_size)


def test_trap_mrope(policy, processor, problems):
    """A packed row gives the log-probs of the plain forward pass, which has 3-D positions from mm_token_type_ids."""
    rollout = draw(policy, processor, problems, temperature=1.0)
    logits_BTV = completion_logits(policy, rollout).detach()
    for b, expected in enumerate(plain_logits(policy, processor, problems, rollout)):
        assert (logits_BTV[b, :len(expected)] - expected).abs().max() < 1e-4
    positions_3S, first = rollout.prompts.positions(3, policy)
    assert (positions_3S[1] != positions_3S[2]).any()  # height and width differ inside a picture: not 1-D
    assert first < positions_3S.shape[1]  # a picture of 4x4 tokens takes 4 positions, not 16


def test_trap_left_padding(policy, processor, problems):
    """A problem alone, or beside others with longer prompts and other pictures: the same answers and log-probs."""
    together = draw(policy, processor, problems)
    for p in range(len(problems)):
        alone = draw(policy, processor, problems[p:p + 1])
        assert alone.texts == together.texts[3 * p:3 * p + 3]
        own = torch.arange(3 * p, 3 * p + 3)
        T = alone.mask_BT.shape[1]
        assert (alone.logp_BT - together.logp_BT[own, :T]).abs().max() < 1e-4


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 100])
def test_trap_normaliser(policy, processor, problems, size):
    """Loss and gradient do not depend on how answers are packed: one pass or fifteen, groups whole or in slices."""
    rollout = draw(policy, processor, problems)
    weights_BT = rollout.mask_BT * torch.linspace(-1, 1, len(rollout))[:, None] / rollout.mask_BT.sum()
    whole = gradient(policy, rollout, [torch.arange(len(rollout))], weights_BT)
    batches = everyone(rollout, size)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(rollout))) and max(map(len, batches)) <= size
    assert (gradient(policy, rollout, batches, weights_BT) - whole).norm() < 1e-4 * whole.norm()
    with torch.no_grad():
        by_batches = read(token_logps, rollout, policy, batches=batches)
        assert (by_batches - read(token_logps, rollout, policy)).abs().max() < 1e-5


def test_micro_batches_only_the_live_and_never_none(policy, processor, problems):
    rollout = draw(policy, processor, problems)
    every, none = torch.arange(len(rollout)), torch.tensor([], dtype=torch.long)
    live = torch.tensor([3, 4, 5, 9, 10, 11])
    assert sorted(torch.cat(micro_batches(rollout, live, every, 4)).tolist()) == live.tolist()
    assert [batch.tolist() for batch in micro_batches(rollout, none, every, 4)] == [[0]]


def test_gradient_against_the_plain_forward_pass(policy, processor, problems):
    """Packed rows and recomputed chunks against policy.forward and autograd: gradients equal to 1e-5 relative."""
    rollout = draw(policy, processor, problems[:3], G=2, temperature=1.0)
    ours = gradient(policy, rollout, everyone(rollout, 4), rollout.mask_BT)
    policy.zero_grad()
    for b in range(len(rollout)):
        logits = plain_logits.__wrapped__(policy, processor, problems, rollout[torch.tensor([b])])[0]
        n = len(logits)
        logits.log_softmax(1).gather(1, rollout.tokens_BT[b, :n, None]).sum().backward()
    plain = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert (ours - plain).norm() < 1e-5 * plain.norm()


def test_gradient_against_finite_differences(policy, processor, problems):
    """Along the gradient, turned a little at random: nothing in the chain is detached that should not be."""
    rollout, policy = draw(policy, processor, problems[:2], G=2), copy.deepcopy(policy)
    analytic = gradient(policy, rollout, everyone(rollout, 2), rollout.mask_BT)
    random = torch.randn(analytic.shape, generator=torch.Generator().manual_seed(0))
    direction = analytic / analytic.norm() + random / random.norm()
    values = []
    for step in (2e-3, -4e-3):
        offset = 0
        for p in policy.parameters():
            p.data += step * direction[offset:offset + p.numel()].view_as(p)
            offset += p.numel()
        with torch.no_grad():
            values.append(float(read(token_logps, rollout, policy).double().sum()))
    assert (values[0] - values[1]) / 4e-3 == pytest.approx(float(analytic @ direction), rel=1e-2)


def test_chunks_do_not_change_the_result(policy, processor, problems, monkeypatch):
    rollout = draw(policy, processor, problems)
    whole = read(both, rollout, policy)
    monkeypatch.setattr(common, "LOGITS", 7 * policy.vocabulary)
    for one, other in zip(whole, read(both, rollout, policy)):
        assert (one - other).abs().max() < 1e-5


def test_reading_with_and_without_grad_is_bitwise_equal(policy, processor, problems):
    rollout = draw(policy, processor, problems)
    with torch.no_grad():
        quiet = read(token_logps, rollout, policy)
    assert (read(token_logps, rollout, policy) == quiet).all()


def test_two_readings_meet_position_by_position(policy, processor, problems):
    """fn gets the logits of both models for the same token, in the order of the readings."""
    rollout = draw(policy, processor, problems)
    other = [torch.zeros_like(pixels) for pixels in rollout.prompts.pixels]
    blind = common.Reading(policy, other)
    one, two = read(token_logps, rollout, policy), read(token_logps, rollout, blind)
    pair = read(lambda a_NV, b_NV, tokens_N: (token_logps(a_NV, tokens_N), token_logps(b_NV, tokens_N)),
                rollout, policy, blind)
    assert (pair[0] == one).all() and (pair[1] == two).all() and (one != two).any()


def test_trap_masks(policy, processor, problems):
    """Answers of very different lengths share rows: padding is read as nothing, never as NaN, with or without grad."""
    rollout = draw(policy, processor, problems)
    rollout.mask_BT = rollout.mask_BT.clone()
    for b in range(len(rollout)):
        rollout.mask_BT[b, 1 + 2 * (b % 7):] = 0
    logp_BT = read(token_logps, rollout, policy)
    assert logp_BT.isfinite().all() and (logp_BT * (1 - rollout.mask_BT) == 0).all()
    assert ((logp_BT != 0) == rollout.mask_BT.bool()).all()
    logp_BT.sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters())


def test_trap_entropy():
    """The full distribution's entropy, not the surprise of the sampled token; log V when uniform, 0 when certain."""
    logits_NV = torch.randn(50, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p_NV = logits_NV.softmax(1)
    assert torch.allclose(token_entropy(logits_NV), -(p_NV * p_NV.log()).sum(1), atol=1e-12)
    assert token_entropy(torch.zeros(1, 11)).item() == pytest.approx(torch.tensor(11.0).log().item(), rel=1e-6)
    assert token_entropy(torch.tensor([[0.0, -1e9, -1e9]])).item() == 0.0
    tokens_N = torch.arange(50) % 11
    assert torch.allclose(token_logps(logits_NV, tokens_N), p_NV.log()[torch.arange(50), tokens_N])


def test_entropy_memory_is_a_chunks(policy, processor, problems, monkeypatch):
    """No tensor of the reading holds more than a chunk of logits: (B, T, V) never exists."""
    rollout = draw(policy, processor, problems)
    largest = []
    monkeypatch.setattr(common, "LOGITS", 16 * policy.vocabulary)
    read(lambda logits_NV, tokens_N: largest.append(logits_NV.shape) or token_entropy(logits_NV), rollout, policy)
    assert max(rows for rows, _ in largest) == 16 and sum(rows for rows, _ in largest) == rollout.mask_BT.sum()

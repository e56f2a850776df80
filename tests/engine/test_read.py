"""common.read: packed rows and chunks against ordinary forward passes."""

import copy

import common
from common import completion_logits, positions_of, read, token_entropy, token_logps
from harness.updates import micro_batches

import pytest
import torch
from references import draw, plain_logits, plain_logits_of


def logps_and_entropies(logits_NV, tokens_N):
    return token_logps(logits_NV, tokens_N), token_entropy(logits_NV)


def gradient(policy, rollout, batches, weights_BT):
    """The gradient of Σ weight·log p, one backward pass for each batch, as one vector."""
    policy.zero_grad()
    for index_b in batches:
        logp_bT = read(token_logps, rollout[index_b], policy)
        (logp_bT * weights_BT[index_b]).sum().backward()
    return torch.cat([weight.grad.flatten() for weight in policy.parameters()])


def in_batches_of(size, rollout):
    """All answers, at most `size` of them to a forward pass."""
    return micro_batches(rollout, range(len(rollout)), size)


# --- packed rows against the plain forward pass -----------------------------------------------------------------------


def test_trap_mrope(policy, processor, problems):
    """A packed row gives the logits of the plain forward pass, which has 3-D positions from mm_token_type_ids."""
    rollout = draw(policy, processor, problems, temperature=1.0)
    logits_BTV = completion_logits(policy, rollout).detach()
    for b, expected in enumerate(plain_logits(policy, processor, rollout)):
        assert (logits_BTV[b, :len(expected)] - expected).abs().max() < 1e-4
    positions_3S, first = positions_of(policy, rollout.prompts, 3)
    height, width = positions_3S[1], positions_3S[2]
    assert (height != width).any()  # they differ inside a picture, so the positions are not 1-D
    assert first < positions_3S.shape[1]  # a picture of 4x4 tokens takes 4 positions, not 16


def test_trap_left_padding(policy, processor, problems):
    """A problem alone, or beside others with longer prompts and other pictures: the same answers and log-probs."""
    together = draw(policy, processor, problems)
    for p in range(len(problems)):
        alone = draw(policy, processor, problems[p:p + 1])
        own = slice(3 * p, 3 * p + 3)
        T = alone.mask_BT.shape[1]
        assert alone.texts == together.texts[own]
        assert (alone.logp_BT - together.logp_BT[own, :T]).abs().max() < 1e-4


def test_trap_masks(policy, processor, problems):
    """Answers of very different lengths share rows: padding is read as nothing, never as NaN, with or without grad."""
    rollout = draw(policy, processor, problems)
    rollout.mask_BT = rollout.mask_BT.clone()
    for b in range(len(rollout)):
        length = 1 + 2 * (b % 7)
        rollout.mask_BT[b, length:] = 0
    logp_BT = read(token_logps, rollout, policy)
    assert logp_BT.isfinite().all()
    assert ((logp_BT != 0) == rollout.mask_BT.bool()).all()
    logp_BT.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in policy.parameters())


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [7, 10**6], ids=["recomputed chunks", "one chunk"])
def test_gradient_against_the_plain_forward_pass(policy, processor, problems, monkeypatch, positions):
    """Packed rows and chunks of positions against policy.forward and autograd: gradients equal to 1e-5 relative."""
    monkeypatch.setattr(common, "LOGITS", positions * policy.vocabulary)
    rollout = draw(policy, processor, problems[:3], G=2, temperature=1.0)
    ours = gradient(policy, rollout, in_batches_of(4, rollout), rollout.mask_BT)
    policy.zero_grad()
    for b in range(len(rollout)):
        logits_TV = plain_logits_of(policy, processor, rollout, b)
        tokens_T = rollout.tokens_BT[b, :len(logits_TV)]
        logits_TV.log_softmax(1).gather(1, tokens_T[:, None]).sum().backward()
    plain = torch.cat([weight.grad.flatten() for weight in policy.parameters()])
    assert (ours - plain).norm() < 1e-5 * plain.norm()


def test_gradient_against_finite_differences(policy, processor, problems):
    """Along the gradient, turned a little at random: nothing in the chain is detached that should not be."""
    rollout = draw(policy, processor, problems[:2], G=2)
    policy = copy.deepcopy(policy)
    slope = gradient(policy, rollout, in_batches_of(2, rollout), rollout.mask_BT)
    random = torch.randn(slope.shape, generator=torch.Generator().manual_seed(0))
    direction = slope / slope.norm() + random / random.norm()

    def value_after(step):
        """Σ log p after a move by `step` along the direction."""
        offset = 0
        for weight in policy.parameters():
            part = direction[offset:offset + weight.numel()]
            weight.data += step * part.view_as(weight)
            offset += weight.numel()
        with torch.no_grad():
            return float(read(token_logps, rollout, policy).double().sum())

    above = value_after(2e-3)
    below = value_after(-4e-3)
    assert (above - below) / 4e-3 == pytest.approx(float(slope @ direction), rel=1e-2)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 100])
def test_trap_normaliser(policy, processor, problems, size):
    """Loss and gradient do not depend on how answers are packed: one pass or fifteen, groups whole or in slices."""
    rollout = draw(policy, processor, problems)
    scale_B = torch.linspace(-1, 1, len(rollout))
    weights_BT = rollout.mask_BT * scale_B[:, None] / rollout.mask_BT.sum()
    whole = gradient(policy, rollout, [torch.arange(len(rollout))], weights_BT)
    batches = in_batches_of(size, rollout)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(rollout)))
    assert max(len(batch) for batch in batches) <= size
    assert (gradient(policy, rollout, batches, weights_BT) - whole).norm() < 1e-4 * whole.norm()
    with torch.no_grad():
        by_batches_BT = read(token_logps, rollout, policy, batches=batches)
        at_once_BT = read(token_logps, rollout, policy)
    assert (by_batches_BT - at_once_BT).abs().max() < 1e-5


def test_chunks_do_not_change_the_result(policy, processor, problems, monkeypatch):
    rollout = draw(policy, processor, problems)
    whole = read(logps_and_entropies, rollout, policy)
    monkeypatch.setattr(common, "LOGITS", 7 * policy.vocabulary)  # seven positions at a time
    in_chunks = read(logps_and_entropies, rollout, policy)
    for one_BT, other_BT in zip(whole, in_chunks, strict=True):
        assert (one_BT - other_BT).abs().max() < 1e-5


def test_logits_exist_for_one_chunk_of_positions_only(policy, processor, problems, monkeypatch):
    """fn never meets more positions than common.LOGITS allows: (B, T, V) would not fit at V = 152k."""
    rollout = draw(policy, processor, problems)
    monkeypatch.setattr(common, "LOGITS", 7 * policy.vocabulary)
    met = []

    def watched(logits_NV, tokens_N):
        met.append(len(logits_NV))
        return token_logps(logits_NV, tokens_N)

    with torch.no_grad():
        read(watched, rollout, policy)
    assert max(met) == 7
    assert sum(met) == int(rollout.mask_BT.sum())


@pytest.mark.parametrize("positions, times", [(7, 2), (10**6, 1)])
def test_chunks_are_recomputed_only_where_there_are_several(policy, processor, problems, monkeypatch, positions, times):
    """In the backward pass: one chunk's logits are there already, and recomputing them would save no memory."""
    rollout = draw(policy, processor, problems[:2], G=2)
    monkeypatch.setattr(common, "LOGITS", positions * policy.vocabulary)
    met = []

    def watched(logits_NV, tokens_N):
        met.append(len(logits_NV))
        return token_logps(logits_NV, tokens_N)

    read(watched, rollout, policy).sum().backward()
    assert sum(met) == times * int(rollout.mask_BT.sum())


def test_reading_with_and_without_grad_is_bitwise_equal(policy, processor, problems):
    rollout = draw(policy, processor, problems)
    with torch.no_grad():
        without_BT = read(token_logps, rollout, policy)
    assert (read(token_logps, rollout, policy) == without_BT).all()


# --- two readings, and what is made of logits -------------------------------------------------------------------------


def test_two_readings_meet_position_by_position(policy, processor, problems):
    """fn gets the logits of both readings for the same token, in the order in which they are given."""
    rollout = draw(policy, processor, problems)
    blank_pictures = [torch.zeros_like(pixels) for pixels in rollout.prompts.pixels]
    blind = common.Reading(policy, blank_pictures)

    def of_both(seeing_NV, blind_NV, tokens_N):
        return token_logps(seeing_NV, tokens_N), token_logps(blind_NV, tokens_N)

    seeing_BT, blind_BT = read(of_both, rollout, policy, blind)
    assert (seeing_BT == read(token_logps, rollout, policy)).all()
    assert (blind_BT == read(token_logps, rollout, blind)).all()
    assert (seeing_BT != blind_BT).any()


def test_trap_image_rows(policy, processor, problems):
    """Another picture for one problem changes that problem's log-probs and no other's."""
    rollout = draw(policy, processor, problems)
    before_BT = read(token_logps, rollout, policy)
    for p in range(len(problems)):
        pixels = list(rollout.prompts.pixels)
        pixels[p] = torch.randn(pixels[p].shape, generator=torch.Generator().manual_seed(p))
        after_BT = read(token_logps, rollout, common.Reading(policy, pixels))
        changed_B = ((after_BT - before_BT).abs() > 1e-4).any(1)
        assert set(rollout.group_B[changed_B].tolist()) == {p}


def test_trap_entropy():
    """The full distribution's entropy, not the surprise of the sampled token; log V when uniform, 0 when certain."""
    logits_NV = torch.randn(50, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p_NV = logits_NV.softmax(1)
    assert torch.allclose(token_entropy(logits_NV), -(p_NV * p_NV.log()).sum(1), atol=1e-12)
    assert token_entropy(torch.zeros(1, 11)).item() == pytest.approx(torch.tensor(11.0).log().item(), rel=1e-6)
    assert token_entropy(torch.tensor([[0.0, -1e9, -1e9]])).item() == 0.0
    tokens_N = torch.arange(50) % 11
    assert torch.allclose(token_logps(logits_NV, tokens_N), p_NV.log()[torch.arange(50), tokens_N])

"""grpo.py's pure functions against closed forms, brute force and five-word vocabularies."""

import math

import grpo

import pytest
import torch


def log_probs(seed, words=5):
    """The log-probs of a policy over a few words, fp64."""
    logits = torch.randn(words, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.log_softmax(0)


# --- eq. (1): the advantage -------------------------------------------------------------------------------------------


def test_group_advantages_against_the_definition():
    rewards_PG = torch.rand(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages_PG = grpo.group_advantages(rewards_PG)
    for rewards, advantages in zip(rewards_PG.tolist(), advantages_PG.tolist(), strict=True):
        mean = sum(rewards) / 6
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 5)  # n − 1
        assert advantages == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards], rel=1e-12)


def test_trap_group_std():
    """Fifteen rewards of 0.9 do not have std 0 in fp32; their advantages must be 0 all the same."""
    values = (0.9, 0.1, 0.7, 0.3, 1 / 3)
    assert any(torch.full((15,), value).std() > 0 for value in values)  # otherwise this test would guard nothing
    for value in values:
        assert (grpo.group_advantages(torch.full((2, 15), value)) == 0).all()


def test_a_group_of_equals_beside_a_group_of_unequals():
    mixed_PG = grpo.group_advantages(torch.tensor([[1.0, 0.0], [0.3, 0.3]]))
    assert mixed_PG[0].tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-5)
    assert (mixed_PG[1] == 0).all()


# --- eq. (2) and (3): the clipped loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", [1.5, -0.5, 0.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 3.0])
def test_policy_loss_and_its_gradient_by_cases(ratio, advantage):
    """ε_low = 0.2, ε_high = 0.28: the clip takes the gradient away only where the ratio has gone far enough already."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old_logp = torch.zeros(1, 1, dtype=torch.float64)
    inputs = (logp, old_logp, torch.full((1, 1), advantage, dtype=torch.float64))
    loss = grpo.policy_loss(*inputs, epsilon=0.2, epsilon_high=0.28)
    loss.sum().backward()

    too_good = ratio > 1.28 and advantage > 0
    too_bad = ratio < 0.8 and advantage < 0
    if too_good:
        expected, slope = -advantage * 1.28, 0.0
    elif too_bad:
        expected, slope = -advantage * 0.8, 0.0
    else:
        expected, slope = -advantage * ratio, -advantage * ratio
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert logp.grad.item() == pytest.approx(slope, abs=1e-12)
    clipped = grpo.is_clipped(*inputs, epsilon=0.2, epsilon_high=0.28)
    assert bool(clipped.item()) == (too_good or too_bad)


def test_trap_ratio():
    """With one update per rollout ρ is 1, and the gradient is REINFORCE's, −A·∇log π. The value alone says nothing."""
    logits = log_probs(0).requires_grad_()
    advantage = torch.tensor([[2.0]], dtype=torch.float64)
    logp = logits.log_softmax(0)[None, 3:4]
    grpo.policy_loss(logp, logp.detach(), advantage, epsilon=0.2, epsilon_high=0.2).sum().backward()
    one_hot = torch.eye(5, dtype=torch.float64)[3]
    expected = -2.0 * (one_hot - logits.detach().softmax(0))
    assert torch.allclose(logits.grad, expected, atol=1e-12)


# --- eq. (4): the weights ---------------------------------------------------------------------------------------------


def test_token_weights():
    """By token all tokens weigh the same; by answer all answers do."""
    mask_BT = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    assert (grpo.token_weights(mask_BT, "token") == mask_BT).all()
    by_answer_BT = grpo.token_weights(mask_BT, "answer")
    assert by_answer_BT.tolist() == [[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]]


# --- eq. (5): the KL --------------------------------------------------------------------------------------------------


def test_trap_kl():
    """k3's mean under π is KL(π‖π_ref); its gradient as a loss, sample by sample, is that of KL(π_ref‖π)."""
    logits = log_probs(1).requires_grad_()
    ref_logp = log_probs(2)
    logp = logits.log_softmax(0)
    p = logp.exp().detach()  # the probabilities by which answers are drawn: held fixed
    q = ref_logp.exp()

    mean_k3 = (p * grpo.k3(logp, ref_logp)).sum()
    exact_kl = (p * (logp.detach() - ref_logp)).sum()
    assert mean_k3.item() == pytest.approx(exact_kl.item(), rel=1e-12)

    mean_k3.backward()
    kl_of_ref = (q * (ref_logp - logits.log_softmax(0))).sum()
    expected, = torch.autograd.grad(kl_of_ref, logits)
    assert torch.allclose(logits.grad, expected, atol=1e-12)


def test_the_naive_kl_has_no_gradient():
    """k1 = log π − log π_ref, taken as a loss, teaches nothing: Σ p·∇log p = 0."""
    logits = log_probs(1).requires_grad_()
    logp = logits.log_softmax(0)
    k1 = (logp.exp().detach() * (logp - log_probs(2))).sum()
    slope, = torch.autograd.grad(k1, logits)
    assert slope.abs().max() < 1e-12


def test_k3_is_never_negative_and_zero_between_equals():
    logp = log_probs(1)
    ref_logp = log_probs(2)
    assert (grpo.k3(logp, ref_logp) >= 0).all()
    assert (grpo.k3(logp, logp) == 0).all()


def test_adapted_beta_moves_towards_the_target_and_no_faster_than_its_clip():
    assert grpo.adapted_beta(0.01, kl=0.5, target=0.0, answers=512) == 0.01  # no target: β stays
    assert grpo.adapted_beta(0.01, kl=0.5, target=0.5, answers=512) == 0.01
    fastest = 0.2 * 512 / 10_000
    assert grpo.adapted_beta(0.01, kl=5.0, target=0.5, answers=512) == pytest.approx(0.01 * (1 + fastest))
    assert grpo.adapted_beta(0.01, kl=0.0, target=0.5, answers=512) == pytest.approx(0.01 * (1 - fastest))
    a_tenth_above = 0.1 * 1000 / 10_000
    assert grpo.adapted_beta(0.01, kl=0.55, target=0.5, answers=1000) == pytest.approx(0.01 * (1 + a_tenth_above))

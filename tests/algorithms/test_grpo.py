"""grpo.py's pure functions against closed forms, brute force and five-word vocabularies."""

import math

import pytest
import torch

import grpo


def softmax_policy(seed, words=5):
    return torch.randn(words, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_group_advantages_against_the_definition():
    rewards_PG = torch.rand(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rewards, advantages in zip(rewards_PG.tolist(), grpo.group_advantages(rewards_PG).tolist()):
        mean = sum(rewards) / 6
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 5)  # n − 1
        assert advantages == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards], rel=1e-12)


def test_trap_group_std():
    """Fifteen rewards of 0.9 do not have std 0 in fp32; their advantages must be 0 all the same."""
    values = (0.9, 0.1, 0.7, 0.3, 1 / 3)
    assert any(torch.full((15,), value).std() > 0 for value in values)  # else this test would guard nothing
    for value in values:
        assert (grpo.group_advantages(torch.full((2, 15), value)) == 0).all()
    mixed = grpo.group_advantages(torch.tensor([[1.0, 0.0], [0.3, 0.3]]))
    assert mixed[0] == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-5) and (mixed[1] == 0).all()


@pytest.mark.parametrize("advantage", [1.5, -0.5, 0.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 3.0])
def test_policy_loss_and_its_gradient_by_cases(ratio, advantage):
    """ε_low = 0.2, ε_high = 0.28: the clip takes the gradient away only where moving on would overshoot."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero, advantage_BT = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), advantage, dtype=torch.float64)
    terms = logp, zero, advantage_BT, 0.2, 0.28
    loss = grpo.policy_loss(*terms)
    loss.sum().backward()
    clipped = (ratio > 1.28 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    bound = 1.28 if advantage > 0 else 0.8
    assert loss.item() == pytest.approx(-advantage * (bound if clipped else ratio), abs=1e-12)
    assert logp.grad.item() == pytest.approx(0.0 if clipped else -advantage * ratio, abs=1e-12)
    assert grpo.is_clipped(*terms).item() == float(clipped)


def test_trap_ratio():
    """With one update ρ is 1, and the gradient is REINFORCE's, −A·∇log π; the value alone says nothing."""
    logits = softmax_policy(0).requires_grad_()
    advantage = torch.tensor([[2.0]], dtype=torch.float64)
    logp = logits.log_softmax(0)[None, 3:4]
    grpo.policy_loss(logp, logp.detach(), advantage, 0.2, 0.2).sum().backward()
    expected = -2.0 * (torch.eye(5, dtype=torch.float64)[3] - logits.detach().softmax(0))
    assert torch.allclose(logits.grad, expected, atol=1e-12)


def test_trap_kl():
    """k3's mean under π is KL(π‖π_ref); its gradient as a loss, sample by sample, is that of KL(π_ref‖π)."""
    logits, ref = softmax_policy(1).requires_grad_(), softmax_policy(2).log_softmax(0)
    logp = logits.log_softmax(0)
    p, q = logp.exp().detach(), ref.exp()
    assert (p * grpo.k3(logp, ref)).sum().item() == pytest.approx((p * (logp.detach() - ref)).sum().item(), rel=1e-12)
    (p * grpo.k3(logp, ref)).sum().backward()  # samples from π, held fixed
    forward_kl = torch.autograd.grad((q * (ref - logits.log_softmax(0))).sum(), logits)[0]
    assert torch.allclose(logits.grad, forward_kl, atol=1e-12)
    k1 = torch.autograd.grad((p * (logits.log_softmax(0) - ref)).sum(), logits)[0]
    assert k1.abs().max() < 1e-12  # the naive form has no gradient at all: Σ p·∇log p = 0
    assert (grpo.k3(logp, ref) >= 0).all() and (grpo.k3(ref, ref) == 0).all()


def test_adapted_beta_moves_towards_the_target_and_no_faster_than_the_clip():
    assert grpo.adapted_beta(0.01, 0.5, 0.0, 512) == 0.01
    assert grpo.adapted_beta(0.01, 0.5, 0.5, 512) == 0.01
    assert grpo.adapted_beta(0.01, 5.0, 0.5, 512) == pytest.approx(0.01 * (1 + 0.2 * 512 / 10_000))
    assert grpo.adapted_beta(0.01, 0.0, 0.5, 512) == pytest.approx(0.01 * (1 - 0.2 * 512 / 10_000))
    assert grpo.adapted_beta(0.01, 0.55, 0.5, 1000) == pytest.approx(0.01 * (1 + 0.1 * 1000 / 10_000))


def test_token_weights():
    mask_BT = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    assert (grpo.token_weights(mask_BT, "token") == mask_BT).all()
    by_answer = grpo.token_weights(mask_BT, "answer")
    assert by_answer.sum(1).tolist() == [1.0, 1.0] and (by_answer * (1 - mask_BT) == 0).all()

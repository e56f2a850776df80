"""vepo.py: signals, score and selection against brute force; the noise; and GRPO where it must be GRPO."""

import math
from fractions import Fraction

import pytest
import torch

import common
import vepo
from test_run import drive, metrics


def brute_force_signals(p_logits, q_logits):
    p, q = ([math.exp(x) for x in row.log_softmax(0).tolist()] for row in (p_logits, q_logits))
    m = [(a + b) / 2 for a, b in zip(p, q)]
    kl = [sum(a * math.log(a / b) for a, b in zip(x, m) if a > 0) for x in (p, q)]
    entropy = [-sum(a * math.log(a) for a in x if a > 0) for x in (p, q)]
    return sum(kl) / 2, abs(entropy[1] - entropy[0]), entropy[0]


def random_logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_visual_signals_against_brute_force():
    p, q = random_logits(4, 6, 11), random_logits(4, 6, 11, seed=1)
    signals = vepo.visual_signals(p, q)
    for i in range(4):
        for t in range(6):
            expected = brute_force_signals(p[i, t], q[i, t])
            assert [float(x[i, t]) for x in signals] == pytest.approx(expected, abs=1e-12)


def test_jsd_is_symmetric_bounded_and_zero_for_equals():
    p, q = random_logits(50, 7), random_logits(50, 7, seed=2)
    one, other = vepo.visual_signals(p, q)[0], vepo.visual_signals(q, p)[0]
    assert torch.allclose(one, other, atol=1e-12) and (one >= 0).all() and (one <= math.log(2)).all()
    assert (vepo.visual_signals(p, p + 5.0)[0] < 1e-12).all() and (vepo.visual_signals(p, p)[1] == 0).all()
    apart = torch.tensor([[0.0, -1e9], [-1e9, 0.0]])
    jsd, shift, entropy = vepo.visual_signals(apart, apart.flip(0))
    assert jsd.tolist() == pytest.approx([math.log(2)] * 2) and shift.tolist() == [0, 0] == entropy.tolist()
    half = vepo.visual_signals(torch.randn(9, 30).float(), torch.randn(9, 30).float())
    assert all(x.isfinite().all() for x in half)


MASK = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


def brute_force_score(j, d, h, alpha):
    """One answer: lists of its valid tokens' signals → list of scores, eq. (2) and (3)."""
    def spread(x):
        return [(v - min(x)) / max(1e-8, max(x) - min(x)) for v in x]
    j, d, h = spread(j), spread(d), spread(h)
    return [(1 - (1 - a) ** alpha * (1 - b) ** (1 - alpha)) * c for a, b, c in zip(j, d, h)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_score_against_brute_force(alpha):
    signals = [torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    signals[1][0] = 0.25  # a constant signal
    score_BT = vepo.vision_entropy_score(*signals, MASK, alpha)
    for b in range(3):
        n = int(MASK[b].sum())
        expected = brute_force_score(*(x[b, :n].tolist() for x in signals), alpha)
        assert score_BT[b, :n].tolist() == pytest.approx(expected, abs=1e-12)
        assert (score_BT[b, n:] == 0).all()


def test_alpha_reduces_to_one_signal():
    """At α = 1 only the JSD couples with the entropy, at α = 0 only the entropy shift."""
    j, d, h = (torch.rand(3, 5, dtype=torch.float64) for _ in range(3))
    normal = [vepo.min_max(x, MASK) for x in (j, d, h)]
    assert torch.allclose(vepo.vision_entropy_score(j, d, h, MASK, 1.0), normal[0] * normal[2], atol=1e-12)
    assert torch.allclose(vepo.vision_entropy_score(j, d, h, MASK, 0.0), normal[1] * normal[2], atol=1e-12)


@pytest.mark.parametrize("select, expected", [
    ("entropy", lambda j, d, h: h), ("jsd", lambda j, d, h: j), ("delta_entropy", lambda j, d, h: d),
    ("ungated", lambda j, d, h: 1 - (1 - j) ** 0.7 * (1 - d) ** 0.3), ("product", lambda j, d, h: j * d * h),
    ("linear", lambda j, d, h: (0.7 * j + 0.3 * d) * h),
])
def test_ablations_are_what_they_are_called(select, expected):
    signals = [torch.rand(3, 5, dtype=torch.float64) for _ in range(3)]
    normal = [vepo.min_max(x, MASK) for x in signals]
    assert torch.allclose(vepo.vision_entropy_score(*signals, MASK, 0.7, select), expected(*normal))


@pytest.mark.parametrize("fraction", [0.2, 0.28, 0.07, 0.5, 1.0, 0.7, 0.01])
def test_top_fraction_against_brute_force(fraction):
    generator = torch.Generator().manual_seed(3)
    for n in list(range(1, 41)) + [100, 300]:
        score_BT = torch.randint(0, 4, (1, n + 3), generator=generator).float()  # many ties
        mask_BT = torch.cat([torch.ones(1, n), torch.zeros(1, 3)], 1)
        score_BT[0, n:] = 9.0  # beyond the answer, and must not count
        kept = vepo.top_fraction(score_BT, mask_BT, fraction)[0]
        order = sorted(range(n), key=lambda t: (-float(score_BT[0, t]), t))
        count = -int(-Fraction(str(fraction)) * n // 1)  # ⌈fraction·n⌉ in exact arithmetic: 0.28·25 is 7, not 8
        assert kept.nonzero()[:, 0].tolist() == sorted(order[:count]) and 1 <= count


@pytest.fixture(scope="module")
def rollout(loaded, problems):
    return common.sample(*loaded, problems, 3, seed=(1,), max_completion_length=16)


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_noise_is_drawn_once_per_picture_with_its_std_whatever_the_group(loaded, problems, rollout, std):
    """A released implementation adds the noise once per answer, so that its std grows with √G."""
    for G in (2, 12):
        prompts = common.sample(*loaded, problems[:2], G, seed=(1,), max_completion_length=1).prompts
        noised = vepo.counterfactual(prompts, "noise", std, (1, 7))
        assert len(noised) == 2  # one I' for each problem, not for each answer
        for pixels, other in zip(prompts.pixels, noised):
            noise = other - pixels
            assert noise.std().item() == pytest.approx(std, rel=0.02) and abs(noise.mean().item()) < 0.05 * std
    same, step = (vepo.counterfactual(prompts, "noise", std, seed) for seed in ((1, 7), (1, 8)))
    assert torch.equal(same[0], noised[0]) and not torch.equal(step[0], noised[0])
    assert not torch.equal(noised[0] - prompts.pixels[0], noised[1][:len(noised[0])] - prompts.pixels[1][:len(noised[0])])
    assert all((pixels == 0).all() for pixels in vepo.counterfactual(prompts, "blank", std, (1, 7)))


def test_the_whole_group_sees_one_noise(policy, rollout):
    """In a group of equal answers every answer has the same signals."""
    index_b = torch.tensor([0, 0, 0])
    twins = rollout[index_b]
    noised = common.Reading(policy, vepo.counterfactual(rollout.prompts, "noise", 2.0, (1, 7)))
    with torch.no_grad():
        signals = common.read(vepo.look, twins, policy, noised)
    for signal_BT in signals:
        assert (signal_BT - signal_BT[0]).abs().max() < 1e-5
    assert signals[0].max() > 1e-4


def test_a_blind_policy_has_no_jsd(policy, rollout):
    """A policy whose picture features are a constant: no picture changes its mind."""
    hook = policy.model.visual.merger.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    noised = common.Reading(policy, vepo.counterfactual(rollout.prompts, "noise", 2.0, (1, 7)))
    with torch.no_grad():
        jsd_BT, delta_BT, _, _ = common.read(vepo.look, rollout, policy, noised)
    hook.remove()
    assert jsd_BT.abs().max() < 1e-6 and delta_BT.abs().max() < 1e-5


@pytest.mark.parametrize("updates", [1, 4])
def test_select_all_is_grpo(folder, tmp_path, updates):
    """The same answers, losses and gradients, bitwise: randomness has no state, and nothing is read twice."""
    flags = "--updates_per_step", updates, "--learning_rate", 1e-3
    grpo = drive(folder, tmp_path / "grpo", *flags)
    ours = drive(folder, tmp_path / "vepo", *flags, "--select", "all", script="vepo")
    for a, b in zip(metrics(grpo), metrics(ours), strict=True):
        assert a == {k: b[k] for k in a}
    for n in range(1, 2 * updates + 1):
        a, b = (torch.load(place / f"grad-{n}.pt") for place in (grpo, ours))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_keeps_the_share_it_says(folder, tmp_path):
    place = drive(folder, tmp_path / "run", "--keep", 0.5, script="vepo")
    for line in metrics(place)[1:]:
        assert 0.5 <= line["kept_fraction"] < 0.56 and 0 <= line["missed_by_entropy"] <= 1 and line["jsd"] > 0
    assert (place / "signals.jsonl").exists()


def test_only_the_kept_tokens_carry_the_gradient(folder, tmp_path):
    """Keeping everything is grpo.py; keeping a fifth is another gradient, of about √5 the size, not a fifth of it."""
    grpo = drive(folder, tmp_path / "grpo", "--updates_per_step", 1, "--max_steps", 1)
    runs = {keep: drive(folder, tmp_path / str(keep), "--updates_per_step", 1, "--max_steps", 1, "--keep", keep,
                        "--select", "random", script="vepo") for keep in (0.2, 1.0)}
    plain, fifth, whole = (torch.cat([g.flatten() for g in torch.load(place / "grad-1.pt").values()])
                           for place in (grpo, runs[0.2], runs[1.0]))
    assert torch.equal(whole, plain)
    assert torch.nn.functional.cosine_similarity(fifth, plain, dim=0) < 0.9
    assert 1.2 * plain.norm() < fifth.norm() < 5 * plain.norm()


@pytest.mark.slow
def test_tokens_that_name_the_picture_look_more(tmp_path):
    """On the trained tabletop, the JSD of words that say what is in the picture, against the other words."""
    from lab import toy
    policy, processor = common.load_policy("toy")
    problems = toy.problems("test", 64)[:]
    rollout = common.sample(policy, processor, problems, 2, seed=(1,), max_completion_length=96)
    noised = common.Reading(policy, vepo.counterfactual(rollout.prompts, "noise", 2.0, (1, 1)))
    with torch.no_grad():
        jsd_BT = common.read(vepo.look, rollout, policy, noised)[0]
    named, other = [], []
    for b in range(len(rollout)):
        n = int(rollout.mask_BT[b].sum())
        words = processor.tokenizer.batch_decode(rollout.tokens_BT[b, :n, None])
        for word, jsd in zip(words, jsd_BT[b, :n].tolist()):
            (named if toy.names_picture(word) else other).append(jsd)
    assert len(named) > 500 and sum(named) / len(named) > 2 * sum(other) / len(other)

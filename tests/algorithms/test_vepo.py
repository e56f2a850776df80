"""vepo.py: signals, score and selection against brute force; the noise; and GRPO where it must be GRPO."""

import math
from fractions import Fraction

import common
import vepo
from harness import selections
from harness.selections import SELECTIONS, other_score, random_scores

import pytest
import torch
from references import probabilities, random_logits
from whole_runs import drive, drive_watching, gradient, metrics

# --- eq. (1): the three signals ---------------------------------------------------------------------------------------


def brute_force_entropy(p):
    return -sum(a * math.log(a) for a in p if a > 0)


def brute_force_signals(p_logits, q_logits):
    """jsd, delta_entropy and entropy of two lists of logits, term by term."""
    p = probabilities(p_logits)
    q = probabilities(q_logits)
    jsd = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        jsd += (a * math.log(a / m) + b * math.log(b / m)) / 2
    entropy = brute_force_entropy(p)
    return jsd, abs(brute_force_entropy(q) - entropy), entropy


def test_visual_signals_against_brute_force():
    p, q = random_logits(4, 6, 11), random_logits(4, 6, 11, seed=1)
    signals = vepo.visual_signals(p, q)
    for i in range(4):
        for t in range(6):
            found = [float(signal[i, t]) for signal in signals]
            expected = brute_force_signals(p[i, t].tolist(), q[i, t].tolist())
            assert found == pytest.approx(expected, abs=1e-12)


def test_jsd_is_symmetric_and_bounded():
    p, q = random_logits(50, 7), random_logits(50, 7, seed=2)
    one = vepo.visual_signals(p, q)[0]
    other = vepo.visual_signals(q, p)[0]
    assert torch.allclose(one, other, atol=1e-12)
    assert one.min() >= 0
    assert one.max() <= math.log(2)


def test_equal_readings_have_no_jsd():
    """Also where the logits differ by a constant: the distributions are the same."""
    p = random_logits(50, 7)
    assert vepo.visual_signals(p, p + 5.0)[0].max() < 1e-12
    assert (vepo.visual_signals(p, p)[1] == 0).all()


def test_opposite_readings_have_the_highest_jsd():
    """Two sure readings, of different words: ln 2, and no entropy anywhere. Forbidden ids give no NaN."""
    sure = torch.tensor([[0.0, -1e9], [-1e9, 0.0]])
    jsd, delta_entropy, entropy = vepo.visual_signals(sure, sure.flip(0))
    assert jsd.tolist() == pytest.approx([math.log(2)] * 2)
    assert delta_entropy.tolist() == [0, 0]
    assert entropy.tolist() == [0, 0]


def test_signals_in_single_precision_are_finite():
    signals = vepo.visual_signals(torch.randn(9, 30), torch.randn(9, 30))
    assert all(signal.isfinite().all() for signal in signals)


# --- eq. (2) and (3): the score ---------------------------------------------------------------------------------------

MASK_BT = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


def random_signals():
    """Three signals of three answers, (3, 5) each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 5, dtype=torch.float64, generator=generator) for _ in range(3)]


def spread(values):
    """Eq. (2) of one answer: a list of numbers, scaled to [0, 1]."""
    width = max(1e-8, max(values) - min(values))
    return [(value - min(values)) / width for value in values]


def brute_force_score(j, d, h, alpha):
    """Eq. (3) of one answer, from lists of its valid tokens' signals."""
    scores = []
    for a, b, c in zip(spread(j), spread(d), spread(h), strict=True):
        scores.append((1 - (1 - a) ** alpha * (1 - b) ** (1 - alpha)) * c)
    return scores


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_score_against_brute_force(alpha):
    signals = random_signals()
    signals[1][0] = 0.25  # a constant signal
    score_BT = vepo.vision_entropy_score(*signals, MASK_BT, alpha=alpha)
    for b in range(3):
        n = int(MASK_BT[b].sum())
        j, d, h = (signal_BT[b, :n].tolist() for signal_BT in signals)
        assert score_BT[b, :n].tolist() == pytest.approx(brute_force_score(j, d, h, alpha=alpha), abs=1e-12)
        assert (score_BT[b, n:] == 0).all()


def test_alpha_leaves_one_visual_signal_at_its_ends():
    """At α = 1 only the JSD couples with the entropy, at α = 0 only the entropy shift."""
    signals = random_signals()
    j_BT, d_BT, h_BT = (vepo.min_max(signal_BT, MASK_BT) for signal_BT in signals)
    assert torch.allclose(vepo.vision_entropy_score(*signals, MASK_BT, alpha=1.0), j_BT * h_BT, atol=1e-12)
    assert torch.allclose(vepo.vision_entropy_score(*signals, MASK_BT, alpha=0.0), d_BT * h_BT, atol=1e-12)


# --- --select: the paper's baselines and ablations --------------------------------------------------------------------


def test_ablations_are_what_they_are_called(monkeypatch):
    j, d, h = (vepo.min_max(signal_BT, MASK_BT) for signal_BT in random_signals())
    random_BT = torch.rand(3, 5, dtype=torch.float64)
    monkeypatch.setattr(selections, "random_scores", lambda rollout, seed: random_BT)
    expected = {
        "entropy": h,
        "jsd": j,
        "delta_entropy": d,
        "random": random_BT,
        "ungated": 1 - (1 - j) ** 0.7 * (1 - d) ** 0.3,
        "linear": (0.7 * j + 0.3 * d) * h,
        "product": j * d * h,
        "bottom": -vepo.vision_entropy_score(*random_signals(), MASK_BT, alpha=0.7),
    }
    assert {*expected, "vepo", "all", "kl"} == set(SELECTIONS)
    for select, score_BT in expected.items():
        found_BT = other_score(select, None, (j, d, h), alpha=0.7, seed=(1, 7))
        assert torch.allclose(found_BT, score_BT), select


def test_kl_against_brute_force():
    """KL(P‖Q), term by term; 0 where the readings agree, and not symmetric."""
    p, q = random_logits(30, 7), random_logits(30, 7, seed=2)
    found = selections.kl_of_readings(p, q, None)
    for i in range(30):
        terms = zip(probabilities(p[i].tolist()), probabilities(q[i].tolist()), strict=True)
        assert float(found[i]) == pytest.approx(sum(a * math.log(a / b) for a, b in terms), abs=1e-12)
    assert selections.kl_of_readings(p, p + 5.0, None).max() < 1e-12
    assert not torch.allclose(selections.kl_of_readings(q, p, None), found)


def test_random_scores_depend_on_the_answer_alone(rollout):
    """Not on the batch: a part of a rollout has the scores it has in the whole. Another step has others."""
    whole_BT = random_scores(rollout, (1, 7))
    part_bT = random_scores(rollout[torch.arange(6, 9)], (1, 7))
    assert torch.equal(part_bT, whole_BT[6:9])
    assert not torch.equal(random_scores(rollout, (1, 8)), whole_BT)
    assert len(whole_BT.unique()) == whole_BT.numel()


# --- eq. (4): the tokens that are kept --------------------------------------------------------------------------------


def brute_force_top(scores, fraction):
    """The places of the ⌈fraction·n⌉ highest of n scores, in order; of equal scores the earlier."""
    count = math.ceil(Fraction(str(fraction)) * len(scores))  # exact: 0.28·25 is 7, in floats it is above 7
    places = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    return sorted(places[:count])


@pytest.mark.parametrize("fraction", [0.2, 0.28, 0.07, 0.5, 1.0, 0.7, 0.01])
def test_top_fraction_against_brute_force(fraction):
    generator = torch.Generator().manual_seed(3)
    for n in [*range(1, 41), 100, 300]:
        score_BT = torch.randint(0, 4, (1, n + 3), generator=generator).float()  # many ties
        score_BT[0, n:] = 9.0  # after the answer's end, and must not count
        mask_BT = torch.cat([torch.ones(1, n), torch.zeros(1, 3)], 1)
        kept_BT = vepo.top_fraction(score_BT, mask_BT, fraction)
        expected = brute_force_top(score_BT[0, :n].tolist(), fraction)
        assert kept_BT[0].nonzero()[:, 0].tolist() == expected
        assert len(expected) >= 1


# --- I': the noised picture -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollout(loaded, problems):
    return common.sample(*loaded, problems, 3, seed=(1,), max_completion_length=16)


@pytest.mark.parametrize("std", [0.5, 2.0])
@pytest.mark.parametrize("G", [2, 12])
def test_noise_is_drawn_once_for_a_picture_with_its_std_whatever_the_group(loaded, problems, std, G):
    """The released code adds noise once for each answer, so that its std grows with √G."""
    prompts = common.sample(*loaded, problems[:2], G, seed=(1,), max_completion_length=1).prompts
    noised = vepo.counterfactual(prompts, "noise", std, (1, 7))
    assert len(noised) == 2  # one I' for each problem, not for each answer
    for pixels, other in zip(prompts.pixels, noised, strict=True):
        noise = other - pixels
        assert noise.std().item() == pytest.approx(std, rel=0.02)
        assert abs(noise.mean().item()) < 0.05 * std


def test_noise_depends_on_step_and_problem_alone(rollout):
    prompts = rollout.prompts
    noised = vepo.counterfactual(prompts, "noise", 2.0, (1, 7))
    again = vepo.counterfactual(prompts, "noise", 2.0, (1, 7))
    next_step = vepo.counterfactual(prompts, "noise", 2.0, (1, 8))
    assert torch.equal(again[0], noised[0])
    assert not torch.equal(next_step[0], noised[0])
    one, other = noised[0] - prompts.pixels[0], noised[4] - prompts.pixels[4]  # pictures of one size
    assert one.shape == other.shape
    assert (one - other).std() > 2


def test_a_blank_picture_is_blank(rollout):
    for pixels in vepo.counterfactual(rollout.prompts, "blank", 2.0, (1, 7)):
        assert (pixels == 0).all()


def look_twice(policy, rollout):
    """vepo.look at every token: the rollout's own pictures against noised ones."""
    noised = common.Reading(policy, vepo.counterfactual(rollout.prompts, "noise", 2.0, (1, 7)))
    with torch.no_grad():
        return common.read(vepo.look, rollout, policy, noised)


def test_the_whole_group_sees_one_noise(policy, rollout):
    """In a group of three equal answers all three have the same signals."""
    triplets = rollout[torch.tensor([0, 0, 0])]
    signals = look_twice(policy, triplets)
    for signal_BT in signals:
        assert (signal_BT - signal_BT[0]).abs().max() < 1e-5
    assert signals[0].max() > 1e-4


def test_a_blind_policy_has_no_jsd(policy, rollout):
    """A policy whose picture features are all zero: no picture changes its mind."""

    def go_blind(module, inputs, output):
        return torch.zeros_like(output)

    hook = policy.model.visual.merger.register_forward_hook(go_blind)
    try:
        jsd_BT, delta_entropy_BT, _, _ = look_twice(policy, rollout)
    finally:
        hook.remove()
    assert jsd_BT.abs().max() < 1e-6
    assert delta_entropy_BT.abs().max() < 1e-5


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 4])
def test_select_all_is_grpo(folder, tmp_path, updates):
    """The same answers, losses and gradients, bitwise: randomness has no state, and looking twice changes nothing."""
    flags = ("--updates_per_step", updates, "--learning_rate", 1e-3, "--eval_dataset", "none")
    plain = drive(folder, tmp_path / "grpo", *flags)
    ours = drive(folder, tmp_path / "vepo", *flags, "--select", "all", script="vepo")
    for line, our_line in zip(metrics(plain), metrics(ours), strict=True):
        assert {name: our_line[name] for name in line} == line
    for update in range(1, 2 * updates + 1):
        assert torch.equal(gradient(plain, update), gradient(ours, update))


def test_a_run_keeps_the_share_it_says(folder, tmp_path):
    place = drive(folder, tmp_path / "run", "--keep", 0.5, "--eval_dataset", "none", script="vepo")
    for line in metrics(place):
        assert 0.5 <= line["kept_fraction"] < 0.56
        assert 0 <= line["missed_by_entropy"] <= 1
        assert line["jsd"] > 0
    assert (place / "signals.jsonl").exists()


def test_only_the_kept_tokens_carry_the_gradient(folder, tmp_path):
    """Keeping all tokens is grpo.py. Keeping a fifth gives another gradient, about √5 times as large."""
    flags = ("--updates_per_step", 1, "--max_steps", 1, "--eval_dataset", "none")
    plain = gradient(drive(folder, tmp_path / "grpo", *flags))
    random = (*flags, "--select", "random")
    whole = gradient(drive(folder, tmp_path / "whole", *random, "--keep", 1.0, script="vepo"))
    fifth = gradient(drive(folder, tmp_path / "fifth", *random, "--keep", 0.2, script="vepo"))
    assert torch.equal(whole, plain)
    assert torch.nn.functional.cosine_similarity(fifth, plain, dim=0) < 0.9
    assert 1.2 * plain.norm() < fifth.norm() < 5 * plain.norm()


def test_kl_takes_the_place_of_the_jsd(folder, tmp_path):
    """--select kl keeps what eq. (3) ranks highest with KL(P‖Q) for the JSD: another choice than VEPO's own."""
    flags = ("--updates_per_step", 1, "--max_steps", 1, "--eval_dataset", "none")
    _, by_jsd = drive_watching("vision_entropy_score", folder, tmp_path / "jsd", *flags, script="vepo")
    _, by_kl = drive_watching(
        "vision_entropy_score", folder, tmp_path / "kl", *flags, "--select", "kl", script="vepo")
    first, *others = by_jsd.given[0]
    kl_BT, *same = by_kl.given[0]
    assert (kl_BT > first + 1e-6).any()  # the JSD is never above ln 2, and half of KL(P‖M) is below KL(P‖Q)
    for one, other in zip(others[:2], same[:2], strict=True):
        assert torch.equal(one, other)  # the other two signals stay

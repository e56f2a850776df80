"""opd.py: the divergence, what its gradient is and is not, the cheap estimator, and whole runs with a teacher."""

import argparse
import json
import math
import shutil
from pathlib import Path

import common
import opd
from harness.run import Run
from tabletop import models

import pytest
import torch
from references import (
    brute_kl,
    draw,
    finite_differences,
    one_more_word,
    plain_logits,
    plain_logits_of,
    probabilities,
    random_logits,
)
from whole_runs import Recorded, drive, drive_watching, metrics, refusal

V = 5  # words of a small vocabulary

# --- eq. (1): the divergence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("banned", [[], [2, 7]])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_reverse_kl_against_exact_sums(shape, banned):
    """Any leading shape; also where both hold the same ids forbidden, with -1e9 as the head gives it."""
    ours, theirs = random_logits(*shape, 9), random_logits(*shape, 9, seed=1)
    for logits in (ours, theirs):
        logits[..., banned] = -1e9
    pairs = zip(ours.reshape(-1, 9).tolist(), theirs.reshape(-1, 9).tolist(), strict=True)
    kl = opd.reverse_kl(ours, theirs)
    assert kl.shape == shape
    assert kl.flatten().tolist() == pytest.approx([brute_kl(*pair) for pair in pairs], abs=1e-12)
    assert kl.min() > 0.01


def test_reverse_kl_is_zero_without_gradient_between_equals():
    """Also between logits that differ by a constant, and where ids are forbidden."""
    logits = random_logits(6, 9)
    logits[:, 3] = -1e9
    ours = logits.clone().requires_grad_()
    kl = opd.reverse_kl(ours, torch.where(logits < -1e8, logits, logits + 2.0))
    kl.sum().backward()
    assert kl.abs().max() < 1e-12
    assert ours.grad.abs().max() < 1e-12


def test_reverse_kl_gradient_against_finite_differences():
    """The student's gradient is the slope, and the teacher's logits get none at all."""
    ours, theirs = random_logits(9).requires_grad_(), random_logits(9, seed=1).requires_grad_()
    opd.reverse_kl(ours, theirs).backward()
    expected = finite_differences(lambda x: brute_kl(x, theirs.tolist()), ours.detach())
    assert torch.allclose(ours.grad, expected, atol=1e-8)
    assert ours.grad.norm() > 0.1
    assert theirs.grad is None


def test_a_forbidden_id_has_no_gradient():
    ours, theirs = random_logits(9), random_logits(9, seed=1)
    for logits in (ours, theirs):
        logits[4] = -1e9
    opd.reverse_kl(ours.requires_grad_(), theirs).backward()
    assert ours.grad[4] == 0
    assert ours.grad.isfinite().all()


# --- what the gradient is: answers of two tokens ----------------------------------------------------------------------
#
# A policy over answers of two tokens is one vector of V + V·V logits: V for the first token, then V for the second
# after each first. There are few enough answers to enumerate.

ANSWERS = [(a, b) for a in range(V) for b in range(V)]
STUDENT = random_logits(V + V * V, scale=1.0)
TEACHER = random_logits(V + V * V, seed=1, scale=1.0)


def first(x):
    """The logits of the first token."""
    return x[:V]


def second(x, a):
    """The logits of the second token after the first token a."""
    return x[V + V * a:V + V * a + V]


def answer_probability(x, a, b):
    return probabilities(first(x))[a] * probabilities(second(x, a))[b]


def mean_opd_gradient():
    """The gradient of opd.py's loss of each answer (the sum over its two tokens), times the answer's probability."""
    x = STUDENT.clone().requires_grad_()
    for a, b in ANSWERS:
        logits = torch.stack([first(x), second(x, a)])
        teacher_logits = torch.stack([first(TEACHER), second(TEACHER, a)])
        loss_T, _, _ = opd.exact(logits, teacher_logits, torch.tensor([a, b]))
        (answer_probability(STUDENT.tolist(), a, b) * loss_T.sum()).backward()
    return x.grad


def test_the_mean_gradient_holds_prefixes_fixed():
    """Over all 25 answers: the slope of the mean of KL_1 + KL_2, each weighted as the unmoved student would."""
    q = TEACHER.tolist()
    weights = [answer_probability(STUDENT.tolist(), *answer) for answer in ANSWERS]

    def held(x):
        total = 0.0
        for weight, (a, _) in zip(weights, ANSWERS, strict=True):
            total += weight * (brute_kl(first(x), first(q)) + brute_kl(second(x, a), second(q, a)))
        return total

    assert torch.allclose(mean_opd_gradient(), finite_differences(held, STUDENT), atol=1e-8)


def test_departure_from_the_sequence_kl_is_one_term():
    """The slope of KL(π‖π_T) is opd.py's gradient plus the score-function term, which is not small."""
    p, q = STUDENT.tolist(), TEACHER.tolist()

    def sequence_kl(x):
        total = 0.0
        for answer in ANSWERS:
            ours = answer_probability(x, *answer)
            total += ours * math.log(ours / answer_probability(q, *answer))
        return total

    score = torch.zeros_like(STUDENT)
    for a, b in ANSWERS:
        later = brute_kl(second(p, a), second(q, a))  # what follows the first token; nothing follows the second
        grad_logp = torch.eye(V, dtype=torch.float64)[a] - torch.tensor(probabilities(first(p)))
        score[:V] += answer_probability(p, a, b) * later * grad_logp
    true = finite_differences(sequence_kl, STUDENT)
    assert torch.allclose(true, mean_opd_gradient() + score, atol=1e-8)
    assert score.norm() > 0.1 * true.norm()


# --- eq. (3): the estimator that knows the sampled token only ---------------------------------------------------------


def test_the_sampled_estimator_is_right_on_average():
    """Over all tokens, weighted with their probabilities: the gradient of eq. (1), and its value."""
    logits, theirs = random_logits(V), random_logits(V, seed=1)
    x = logits.clone().requires_grad_()
    loss_N, kl_N, _ = opd.sampled(x.expand(V, V), theirs.expand(V, V), torch.arange(V))
    p = torch.tensor(probabilities(logits.tolist()), dtype=torch.float64)
    (p * loss_N).sum().backward()

    y = logits.clone().requires_grad_()
    exact = opd.reverse_kl(y, theirs)
    exact.backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-12)
    assert x.grad.norm() > 0.1
    assert float(p @ kl_N) == pytest.approx(exact.item(), abs=1e-12)
    assert kl_N.min() < 0  # a single draw may be
    assert not kl_N.requires_grad


def test_the_sampled_estimator_by_monte_carlo():
    """The mean of 4,000 draws lies within four of its own standard errors of the exact gradient, each component."""
    N = 4000
    logits, theirs = random_logits(V, scale=1.0), random_logits(V, seed=1, scale=1.0)
    generator = torch.Generator().manual_seed(0)
    tokens_N = torch.multinomial(logits.softmax(0), N, replacement=True, generator=generator)
    draws_NV = logits.repeat(N, 1).requires_grad_()
    opd.sampled(draws_NV, theirs.expand(N, V), tokens_N)[0].sum().backward()

    y = logits.clone().requires_grad_()
    opd.reverse_kl(y, theirs).backward()
    spread = draws_NV.grad.std(0)
    error = spread / math.sqrt(N)
    assert (error > 0).all()
    assert ((draws_NV.grad.mean(0) - y.grad).abs() < 4 * error).all()
    assert (spread > 2 * y.grad.abs()).any()  # one draw alone says little


def test_the_sampled_estimator_is_a_policy_gradient_step(monkeypatch):
    """Its loss is what policy_loss returns for the log-ratio as the advantage."""
    x = random_logits(4, V).requires_grad_()
    theirs = random_logits(4, V, seed=1).requires_grad_()
    tokens_N = torch.tensor([0, 2, 4, 2])
    policy_loss = Recorded(opd.policy_loss)
    monkeypatch.setattr(opd, "policy_loss", policy_loss)
    loss_N, kl_N, logp_N = opd.sampled(x, theirs, tokens_N)

    (logp, old_logp, advantage), = policy_loss.given
    log_ratios = []
    for ours, teachers, token in zip(x.tolist(), theirs.tolist(), tokens_N.tolist(), strict=True):
        log_ratios.append(math.log(probabilities(teachers)[token]) - math.log(probabilities(ours)[token]))
    for values in (advantage, -loss_N, -kl_N):
        assert values.tolist() == pytest.approx(log_ratios, abs=1e-12)

    loss_N.sum().backward()
    one_hot_NV = torch.eye(V, dtype=torch.float64)[tokens_N]
    assert torch.allclose(x.grad, -advantage[:, None] * (one_hot_NV - x.detach().softmax(1)), atol=1e-12)
    assert theirs.grad is None
    assert logp.requires_grad
    for constant in (old_logp, advantage, kl_N, logp_N):
        assert not constant.requires_grad


def test_the_sampled_estimator_has_no_gradient_beside_policy_loss(monkeypatch):
    monkeypatch.setattr(opd, "policy_loss", lambda logp, *others, **settings: 0 * logp)
    x = random_logits(4, V).requires_grad_()
    loss_N, _, _ = opd.sampled(x, random_logits(4, V, seed=1), torch.tensor([0, 2, 4, 2]))
    slope, = torch.autograd.grad(loss_N.sum(), x)
    assert (slope == 0).all()


# --- the other direction of the KL ------------------------------------------------------------------------------------


def test_forward_is_the_other_direction_on_the_students_answers():
    """What it costs against exact sums and their slope, the student's alone; what it logs is still KL(p‖q)."""
    x = random_logits(3, V).requires_grad_()
    y = random_logits(3, V, seed=1).requires_grad_()
    loss_N, kl_N, logp_N = opd.forward(x, y, torch.arange(3))
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    assert loss_N.tolist() == pytest.approx([brute_kl(q, p) for p, q in pairs], abs=1e-12)
    assert kl_N.tolist() == pytest.approx([brute_kl(p, q) for p, q in pairs], abs=1e-12)
    expected_logps = [math.log(probabilities(p)[token]) for token, (p, _) in enumerate(pairs)]
    assert logp_N.tolist() == pytest.approx(expected_logps, abs=1e-12)
    assert (loss_N - kl_N).abs().min() > 1e-3  # the two directions are not the same
    assert not kl_N.requires_grad
    assert not logp_N.requires_grad
    loss_N.sum().backward()
    assert torch.allclose(x.grad, x.detach().softmax(1) - y.detach().softmax(1), atol=1e-12)
    assert y.grad is None


# --- eq. (2): the update, with models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """Another untrained model, wider than the student and with more rows of padding after its vocabulary."""
    place = tmp_path_factory.mktemp("model") / "teacher"
    models.untrained(str(place), models.RECIPES["toy-teacher"], seed=2)
    return str(place)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return common.load_policy(teacher_folder)[0]


class OneProcess(Run):
    """A run of one process, without a folder."""

    def __init__(self, micro_batch_size):
        self.args = argparse.Namespace(
            estimator="exact", updates_per_step=1, micro_batch_size=micro_batch_size, max_grad_norm=math.inf)
        self.rank = 0
        self.world = 1
        self.device = torch.device("cpu")
        self.step = 1


class NoOptimizer:
    """Leaves weights and gradients as they are."""

    def step(self):
        pass

    def zero_grad(self):
        pass


def gradient_of(policy):
    return torch.cat([weight.grad.flatten() for weight in policy.parameters()])


def distilled(policy, teacher, rollout, micro_batch_size=100):
    """The metrics and the gradient, as one vector, of one update by opd.distil."""
    policy.zero_grad()
    found = opd.distil(OneProcess(micro_batch_size), policy, NoOptimizer(), rollout, teacher=teacher)
    return {name: float(value) for name, value in found.items()}, gradient_of(policy)


@pytest.fixture
def rollout(policy, processor, problems):
    """Eight answers to four problems, of 3, 5, 7, ... tokens at most."""
    rollout = draw(policy, processor, problems[:4], G=2, temperature=1.0)
    T = rollout.mask_BT.shape[1]
    most_B = 3 + 2 * torch.arange(8)
    rollout.mask_BT = rollout.mask_BT * (torch.arange(T) < most_B[:, None])
    return rollout


def test_trap_double_detach(policy, processor, teacher, rollout):
    """The student has the gradient, the teacher none; divided by the tokens once; nothing is shifted by a token.

    All against an ordinary forward pass of each model for each answer, and autograd.
    """
    teacher.requires_grad_(True)
    found, gradient = distilled(policy, teacher, rollout)
    assert all(weight.grad is None for weight in teacher.parameters())
    teacher.requires_grad_(False)
    kl_BT = common.read(opd.exact, rollout, policy, teacher)[1]

    policy.zero_grad()
    total = 0.0
    for b, theirs in enumerate(plain_logits(teacher, processor, rollout)):
        logp = plain_logits_of(policy, processor, rollout, b).double().log_softmax(1)
        teacher_logp = theirs.double().log_softmax(1)  # row t of both is predicted by the prompt and t answer tokens
        kl_T = torch.nn.functional.kl_div(teacher_logp, logp, log_target=True, reduction="none").sum(1)
        assert (kl_BT[b, :len(kl_T)] - kl_T).abs().max() < 1e-4
        assert (kl_BT[b, len(kl_T):] == 0).all()
        total += float(kl_T.detach().sum())
        kl_T.sum().backward()
    tokens = float(rollout.mask_BT.sum())
    expected = gradient_of(policy) / tokens
    assert (gradient - expected).norm() < 1e-4 * gradient.norm()
    assert gradient.norm() > 1e-3
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["teacher_kl"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["sampler_gap"] < 1e-5


def test_the_update_is_a_mean_over_tokens(policy, teacher, rollout):
    """The same answers twice, or in small micro-batches: the same metrics and the same gradient."""
    found, gradient = distilled(policy, teacher, rollout)
    every_answer_twice = rollout[torch.arange(2 * len(rollout)) % len(rollout)]
    for others in (distilled(policy, teacher, every_answer_twice), distilled(policy, teacher, rollout, 3)):
        other_found, other_gradient = others
        assert (other_gradient - gradient).norm() < 1e-4 * gradient.norm()
        assert other_found == pytest.approx(found, rel=1e-4, abs=1e-6)


# --- whole runs -------------------------------------------------------------------------------------------------------

FLAGS = ("--eval_dataset", "none", "--lr_scheduler_type", "constant", "--max_completion_length", 8)
ONE_STEP = (*FLAGS, "--max_steps", 1)
FOUR_STEPS = (*FLAGS, "--max_steps", 4)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_run_learns_and_leaves_the_teacher_as_it_was(folder, teacher_folder, teacher, tmp_path):
    """Neither the teacher's files nor its weights change, it has no gradient, and it is not the student."""
    before = contents(teacher_folder)
    flags = (*FOUR_STEPS, "--teacher", teacher_folder)
    place, distil = drive_watching("distil", folder, tmp_path / "run", *flags, script="opd")
    assert contents(teacher_folder) == before
    used = distil.named[0]["teacher"]
    assert all(named["teacher"] is used for named in distil.named)
    assert not used.training
    for (name, weight), (_, fresh) in zip(used.named_parameters(), teacher.named_parameters(), strict=True):
        assert torch.equal(weight, fresh), name
        assert not weight.requires_grad
        assert weight.grad is None

    lines = metrics(place)
    assert [line["teacher_kl"] for line in lines] == [line["loss"] for line in lines]
    assert lines[-1]["teacher_kl"] < 0.8 * lines[0]["teacher_kl"]
    learnt = common.load_policy(str(place))[0].state_dict()
    start = common.load_policy(folder)[0].state_dict()
    assert any(not torch.equal(learnt[name], weight) for name, weight in start.items())


def test_a_run_ends_with_a_page(folder, teacher_folder, tmp_path):
    place = drive(folder, tmp_path / "run", *ONE_STEP, "--teacher", teacher_folder, script="opd", page=True)
    assert (place / "report.html").exists()
    assert (place / "curves.png").exists()


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(folder, tmp_path):
    place, _ = drive_watching("distil", folder, tmp_path / "run", *ONE_STEP, "--teacher", folder, script="opd")
    line, = metrics(place)
    assert abs(line["loss"]) < 1e-6
    assert abs(line["teacher_kl"]) < 1e-6
    assert line["grad_norm"] < 1e-6


def test_a_run_with_the_sampled_estimator(folder, teacher_folder, teacher, policy, processor, tmp_path):
    """teacher_kl is then the mean of log p − log q at the sampled tokens, by an ordinary forward pass of each model."""
    flags = (*ONE_STEP, "--estimator", "sampled", "--teacher", teacher_folder)
    place, distil = drive_watching("distil", folder, tmp_path / "run", *flags, script="opd")
    _, _, _, rollout = distil.given[0]
    log_ratios = []
    both = [plain_logits(model, processor, rollout) for model in (policy, teacher)]
    for b, (ours, theirs) in enumerate(zip(*both, strict=True)):
        tokens_T1 = rollout.tokens_BT[b, :len(ours), None]
        logp = ours.log_softmax(1).gather(1, tokens_T1)
        teacher_logp = theirs.log_softmax(1).gather(1, tokens_T1)
        log_ratios += (logp - teacher_logp).flatten().tolist()
    line, = metrics(place)
    assert line["teacher_kl"] == pytest.approx(math.fsum(log_ratios) / len(log_ratios), abs=1e-5)
    assert line["teacher_kl"] > 0.05
    assert line["loss"] == pytest.approx(line["teacher_kl"], abs=1e-6)
    assert line["grad_norm"] > 0.1


def test_a_run_with_the_forward_kl(folder, teacher_folder, tmp_path):
    """It learns: both its own loss and the logged KL(p‖q) fall."""
    flags = (*FOUR_STEPS, "--estimator", "forward", "--teacher", teacher_folder)
    lines = metrics(drive_watching("distil", folder, tmp_path / "run", *flags, script="opd")[0])
    assert lines[0]["loss"] != lines[0]["teacher_kl"]
    for name in ("loss", "teacher_kl"):
        assert lines[-1][name] < 0.8 * lines[0][name]


# --- a teacher of another family --------------------------------------------------------------------------------------


def two_words_exchanged(place):
    """Exchanges the ids of two words in the tokenizer of a model's folder."""
    path = Path(place, "tokenizer.json")
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = sorted(vocabulary)[40:42]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("change, words", [(one_more_word, 1), (two_words_exchanged, 2)])
def test_a_teacher_with_another_tokenizer_is_refused(capsys, folder, teacher_folder, tmp_path, change, words):
    """One line, status 2, nothing written; whichever of the two has the word that the other has not."""
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other)
    change(other)
    for student, teacher in ((folder, other), (other, folder)):
        line = refusal(capsys, student, tmp_path / "out", *ONE_STEP, "--teacher", teacher, script="opd")
        said = f"--teacher {teacher} and {student} have different tokenizers: {words} tokens differ"
        assert said in line

"""opd.py: the divergence, what its gradient is and is not, the cheap estimator, and whole runs with a teacher."""

import argparse
import json
import math
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import common
import drive as driver
import opd
from conftest import run_script
from drive import go
from lab import report, toy
from test_run import SMALL, assert_same_run, drive, metrics
from test_sample import draw, plain_logits
from test_vepo import random_logits

V = 5


def probabilities(logits):
    weights = [math.exp(x) for x in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def brute_kl(p_logits, q_logits):
    """The sum of eq. (1) over two lists of logits, term by term."""
    pairs = zip(probabilities(p_logits), probabilities(q_logits))
    return math.fsum(p * (math.log(p) - math.log(q)) for p, q in pairs if p > 0)


def finite_differences(f, x, h=1e-5):
    """The gradient of f, from a list of numbers to a number, at the tensor x: two values to each component."""
    slopes = []
    for i in range(x.numel()):
        ends = [x.flatten().clone() for _ in range(2)]
        ends[0][i] += h
        ends[1][i] -= h
        slopes.append((f(ends[0].tolist()) - f(ends[1].tolist())) / (2 * h))
    return torch.tensor(slopes, dtype=torch.float64).view(x.shape)


# --- the divergence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_reverse_kl_against_exact_sums(shape):
    """Any leading shape; also where both hold the same ids forbidden, with -1e9 as the head gives it."""
    ours, theirs = random_logits(*shape, 9), random_logits(*shape, 9, seed=1)
    for banned in ([], [2, 7]):
        ours[..., banned] = theirs[..., banned] = -1e9
        pairs = zip(ours.reshape(-1, 9).tolist(), theirs.reshape(-1, 9).tolist())
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
    assert kl.abs().max() < 1e-12 and ours.grad.abs().max() < 1e-12


def test_reverse_kl_gradient_against_finite_differences():
    """The student's gradient is the slope; a forbidden id has none, and the teacher's logits get none at all."""
    ours, theirs = random_logits(9).requires_grad_(), random_logits(9, seed=1).requires_grad_()
    opd.reverse_kl(ours, theirs).backward()
    expected = finite_differences(lambda x: brute_kl(x, theirs.tolist()), ours.detach())
    assert torch.allclose(ours.grad, expected, atol=1e-8) and ours.grad.norm() > 0.1 and theirs.grad is None
    ours, theirs = (x.detach().index_fill(0, torch.tensor([4]), -1e9) for x in (ours, theirs))
    opd.reverse_kl(ours.requires_grad_(), theirs).backward()
    assert ours.grad[4] == 0 and ours.grad.isfinite().all()


# --- a chain of two tokens: 5 logits of the first, 5 x 5 of the second behind each first, one vector of 30 ------------

ANSWERS = [(a, b) for a in range(V) for b in range(V)]
STUDENT, TEACHER = random_logits(V + V * V, scale=1.0), random_logits(V + V * V, seed=1, scale=1.0)


def after(x, a=None):
    """The logits of the first token, or of the second behind a."""
    return x[:V] if a is None else x[V + V * a:V + V * a + V]


def answer_probability(x, a, b):
    return probabilities(after(x))[a] * probabilities(after(x, a))[b]


def mean_opd_gradient():
    """The gradient of opd.py's loss of each answer (sum over its two tokens), times the answer's probability."""
    x = STUDENT.clone().requires_grad_()
    for a, b in ANSWERS:
        logits, theirs = (torch.stack([after(y), after(y, a)]) for y in (x, TEACHER))
        loss_T, _, _ = opd.exact(logits, theirs, torch.tensor([a, b]))
        (answer_probability(STUDENT.tolist(), a, b) * loss_T.sum()).backward()
    return x.grad


def test_the_mean_gradient_holds_prefixes_fixed():
    """Over all 25 answers: the slope of the mean of KL_1 + KL_2, its weights those of the unmoved student."""
    q, weights = TEACHER.tolist(), [answer_probability(STUDENT.tolist(), *answer) for answer in ANSWERS]

    def held(x):
        return math.fsum(weight * (brute_kl(after(x), after(q)) + brute_kl(after(x, a), after(q, a)))
                         for weight, (a, _) in zip(weights, ANSWERS))
    assert torch.allclose(mean_opd_gradient(), finite_differences(held, STUDENT), atol=1e-8)


def test_departure_from_the_sequence_kl_is_one_term():
    """The slope of KL(π‖π_T) is opd.py's gradient plus the score-function term, which is not small."""
    q = TEACHER.tolist()

    def sequence_kl(x):
        pairs = [(answer_probability(x, *answer), answer_probability(q, *answer)) for answer in ANSWERS]
        return math.fsum(ours * math.log(ours / theirs) for ours, theirs in pairs)
    score = torch.zeros_like(STUDENT)
    for a, b in ANSWERS:
        later = brute_kl(after(STUDENT.tolist(), a), after(q, a))  # what follows the first token; nothing the second
        grad_logp = torch.eye(V, dtype=torch.float64)[a] - torch.tensor(probabilities(after(STUDENT.tolist())))
        score[:V] += answer_probability(STUDENT.tolist(), a, b) * later * grad_logp
    true = finite_differences(sequence_kl, STUDENT)
    assert torch.allclose(true, mean_opd_gradient() + score, atol=1e-8)
    assert score.norm() > 0.1 * true.norm()


# --- the estimator that knows the sampled token only ------------------------------------------------------------------


def test_the_sampled_estimator_is_right_on_average():
    """Over all tokens, weighted with their probabilities: the gradient of eq. (1), and its value."""
    logits, theirs = random_logits(V), random_logits(V, seed=1)
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    rows = x.expand(V, V)
    loss_N, kl_N, _ = opd.sampled(rows, theirs.expand(V, V), torch.arange(V))
    p = torch.tensor(probabilities(logits.tolist()), dtype=torch.float64)
    (p * loss_N).sum().backward()
    exact = opd.reverse_kl(y, theirs)
    exact.backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-12) and x.grad.norm() > 0.1
    assert float(p @ kl_N) == pytest.approx(exact.item(), abs=1e-12) and kl_N.min() < 0 and not kl_N.requires_grad


def test_the_sampled_estimator_by_monte_carlo():
    """The mean of 4,000 draws lies within four of its own standard errors of the exact gradient, each component."""
    logits, theirs, N = random_logits(V, scale=1.0), random_logits(V, seed=1, scale=1.0), 4000
    tokens_N = torch.multinomial(logits.softmax(0), N, replacement=True, generator=torch.Generator().manual_seed(0))
    rows, y = logits.repeat(N, 1).requires_grad_(), logits.clone().requires_grad_()
    opd.sampled(rows, theirs.expand(N, V), tokens_N)[0].sum().backward()
    opd.reverse_kl(y, theirs).backward()
    error = rows.grad.std(0) / N**0.5
    assert ((rows.grad.mean(0) - y.grad).abs() < 4 * error).all() and (error > 0).all()
    assert (rows.grad.std(0) > 2 * y.grad.abs()).any()  # and it is noise: one draw says little


def test_the_sampled_estimator_is_a_policy_gradient_step(monkeypatch):
    """Its loss is what policy_loss returns for the log-ratio as the advantage, and nothing else has a gradient."""
    x, theirs, tokens_N = random_logits(4, V).requires_grad_(), random_logits(4, V, seed=1), torch.tensor([0, 2, 4, 2])
    calls, plain = [], opd.policy_loss
    monkeypatch.setattr(opd, "policy_loss", lambda *args: calls.append(args) or plain(*args))
    loss_N, kl_N, logp_N = opd.sampled(x, theirs.requires_grad_(), tokens_N)
    (logp, old, advantage, *_), = calls
    assert logp.requires_grad and not any(each.requires_grad for each in (old, advantage, kl_N, logp_N))
    ratio = [math.log(probabilities(q)[o]) - math.log(probabilities(p)[o])
             for p, q, o in zip(x.tolist(), theirs.tolist(), tokens_N.tolist())]
    assert advantage.tolist() == pytest.approx(ratio, abs=1e-12) == (-loss_N).tolist() == (-kl_N).tolist()
    loss_N.sum().backward()
    one_hot_NV = torch.eye(V, dtype=torch.float64)[tokens_N]
    assert torch.allclose(x.grad, -advantage[:, None] * (one_hot_NV - x.detach().softmax(1)), atol=1e-12)
    assert theirs.grad is None
    monkeypatch.setattr(opd, "policy_loss", lambda logp, *args: 0 * logp)
    assert (torch.autograd.grad(opd.sampled(x, theirs, tokens_N)[0].sum(), x)[0] == 0).all()


# --- the update, with models ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """Another untrained model, wider and with more rows of padding behind its vocabulary than the student."""
    place = tmp_path_factory.mktemp("model") / "teacher"
    toy.untrained(str(place), toy.RECIPES["toy-teacher"], seed=2)
    return str(place)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return common.load_policy(teacher_folder)[0]


class Still(common.Run):
    """A run of one process without a folder, whose optimiser step leaves the gradient to be looked at."""

    def __init__(self, micro_batch_size=100):
        self.args = argparse.Namespace(estimator="exact", updates_per_step=1, micro_batch_size=micro_batch_size)
        self.rank, self.world, self.device = 0, 1, torch.device("cpu")

    def optimizer_step(self):
        return 0.0


def distilled(policy, teacher, rollout, micro_batch_size=100):
    """The metrics and the gradient of one update, as one vector."""
    policy.zero_grad()
    found = opd.distil(Still(micro_batch_size), policy, teacher, rollout)
    return found, torch.cat([p.grad.flatten() for p in policy.parameters()])


def test_trap_double_detach(policy, processor, problems, teacher):
    """The student has the gradient, the teacher none; divided by the tokens once; nothing is shifted by a token.

    All against an ordinary forward pass of each model for each answer, and autograd.
    """
    rollout = draw(policy, processor, problems[:4], G=2, temperature=1.0)
    rollout.mask_BT = rollout.mask_BT * (torch.arange(rollout.mask_BT.shape[1]) < 3 + 2 * torch.arange(8)[:, None])
    tokens = float(rollout.mask_BT.sum())
    teacher.requires_grad_(True)
    found, gradient = distilled(policy, teacher, rollout)
    assert all(p.grad is None for p in teacher.parameters())
    kl_BT = common.read(opd.exact, rollout, policy, teacher.requires_grad_(False))[1]

    policy.zero_grad()
    theirs, total = plain_logits(teacher, processor, problems, rollout), 0.0
    for b in range(len(rollout)):
        ours = plain_logits.__wrapped__(policy, processor, problems, rollout[torch.tensor([b])])[0].double()
        q = theirs[b].double().log_softmax(1)  # row t of both is predicted by the prompt and t tokens of the answer
        kl_T = torch.nn.functional.kl_div(q, ours.log_softmax(1), log_target=True, reduction="none").sum(1)
        assert (kl_BT[b, :len(kl_T)] - kl_T).abs().max() < 1e-4 and (kl_BT[b, len(kl_T):] == 0).all()
        total += float(kl_T.detach().sum())
        kl_T.sum().backward()
    plain = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert (gradient - plain / tokens).norm() < 1e-4 * gradient.norm() and gradient.norm() > 1e-3
    assert float(found["loss"]) == pytest.approx(total / tokens, rel=1e-5) == float(found["teacher_kl"])
    assert found["sampler_gap"] < 1e-5

    twice, doubled = distilled(policy, teacher, rollout[torch.arange(2 * len(rollout)) % len(rollout)])
    several, summed = distilled(policy, teacher, rollout, micro_batch_size=3)
    for others, other in ((twice, doubled), (several, summed)):
        assert (other - gradient).norm() < 1e-4 * gradient.norm()
        assert {name: float(value) for name, value in others.items()} == pytest.approx(
            {name: float(value) for name, value in found.items()}, rel=1e-4, abs=1e-6)


def test_the_teachers_logits_exist_for_a_chunk_at_a_time(policy, processor, problems, teacher, monkeypatch):
    """Forward, and again when the backward pass recomputes them: never for all positions at once."""
    rollout = draw(policy, processor, problems[:3], G=2, temperature=1.0)
    chunks, plain = [], common.Policy.head

    def head(self, hidden_ND, temperature):
        chunks.append((self is teacher, len(hidden_ND)))
        return plain(self, hidden_ND, temperature)
    monkeypatch.setattr(common.Policy, "head", head)
    monkeypatch.setattr(common, "LOGITS", 16 * policy.vocabulary)
    distilled(policy, teacher, rollout)
    theirs = [rows for is_teacher, rows in chunks if is_teacher]
    assert max(rows for _, rows in chunks) == 16 and sum(theirs) == 2 * rollout.mask_BT.sum() > 100


# --- whole runs -------------------------------------------------------------------------------------------------------

FLAGS = "--eval_dataset", "none", "--lr_scheduler_type", "constant", "--max_completion_length", 8
ONE_STEP = *FLAGS, "--max_steps", 1
FOUR_STEPS = *FLAGS, "--max_steps", 4, "--save_steps", 2


def watched(*args, page=False):
    """drive(), and what each update of the run was given: (run, policy, teacher, rollout). Draws a page if asked to."""
    calls, plain = [], opd.distil
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opd, "distil", lambda *given: calls.append(given) or plain(*given))
        patch.setattr(report, "finish", report.finish if page else lambda *given: "no page")
        return drive(*args, script="opd"), calls


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def alone(folder, teacher_folder, tmp_path_factory):
    """One process, four steps: its folder, what its updates were given, and the teacher's files before it."""
    before, flags = contents(teacher_folder), [*FOUR_STEPS, "--teacher", teacher_folder]
    return *watched(folder, tmp_path_factory.mktemp("alone") / "run", *flags, page=True), before


def test_the_teacher_is_left_as_it_was(alone, folder, teacher_folder, teacher):
    """Neither its files nor its weights change, it has no gradient, and it is not the student, which learns from it."""
    place, calls, before = alone
    assert contents(teacher_folder) == before
    _, student, used, _ = calls[-1]
    for (name, weight), (_, fresh) in zip(used.named_parameters(), teacher.named_parameters(), strict=True):
        assert torch.equal(weight, fresh) and not weight.requires_grad and weight.grad is None, name
    assert not used.training and all(call[2] is used for call in calls)
    assert (place / "report.html").exists()
    kls = [line["teacher_kl"] for line in metrics(place)]
    assert kls == [line["loss"] for line in metrics(place)] and kls[-1] < 0.8 * kls[0]
    learnt = common.load_policy(str(place))[0].state_dict()
    assert any((learnt[name] != weight).any() for name, weight in common.load_policy(folder)[0].state_dict().items())


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(folder, tmp_path):
    line, = metrics(watched(folder, tmp_path / "run", *ONE_STEP, "--teacher", folder)[0])
    assert abs(line["loss"]) < 1e-6 and line["grad_norm"] < 1e-6 and abs(line["teacher_kl"]) < 1e-6


def test_two_sharded_processes_give_the_run_of_one(folder, teacher_folder, tmp_path, alone):
    """Also where they look at other numbers of chunks and make other numbers of passes: the spare weigh nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    flags = *SMALL, "--num_generations", 3, *FLAGS, "--output_dir", tmp_path / "two"
    done = run_script(__file__, "opd", "--model", folder, "--teacher", teacher_folder, *flags, timeout=180, **group)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two/spare.json").read_text()) == [2, 0]
    assert_same_run(alone[0], tmp_path / "two")


@pytest.mark.parametrize("size", [1, 100])
def test_micro_batches_do_not_change_the_run(folder, teacher_folder, tmp_path, alone, size):
    flags = *FLAGS, "--teacher", teacher_folder, "--micro_batch_size", size
    assert_same_run(alone[0], watched(folder, tmp_path / "run", *flags)[0])


class Killed(BaseException):
    pass


def test_killed_and_resumed_to_the_same_numbers(folder, teacher_folder, tmp_path, alone, monkeypatch):
    """Ends behind the third line, a checkpoint behind the second; then --resume: bitwise the same."""
    def die():
        raise Killed
    monkeypatch.setattr(driver, "die", die)
    flags = folder, tmp_path / "killed", *FOUR_STEPS, "--teacher", teacher_folder
    monkeypatch.setenv("KILL_AT", "3")
    with pytest.raises(Killed):
        watched(*flags)
    assert (tmp_path / "killed/checkpoint-2").exists() and len(metrics(tmp_path / "killed")) == 3
    monkeypatch.delenv("KILL_AT")
    place, calls = watched(*flags, "--resume")
    assert len(calls) == 2 and metrics(place) == metrics(alone[0])
    assert (place / "model.safetensors").read_bytes() == (alone[0] / "model.safetensors").read_bytes()


def rewritten(source, place, change):
    """A copy of a model's folder with `change(model)` done to it."""
    shutil.copytree(source, place)
    model = common.AutoModelForImageTextToText.from_pretrained(source)
    change(model)
    model.save_pretrained(place)
    return str(place)


def test_padding_behind_the_teachers_vocabulary_does_not_count(folder, teacher_folder, processor, tmp_path, alone):
    """A teacher whose embedding has 64 more rows, all that have no word large: the same loss and gradient."""
    def widen(model):
        model.resize_token_embeddings(model.lm_head.out_features + 64, mean_resizing=False)
        model.lm_head.weight.data[len(processor.tokenizer):] = 5.0
    wide = rewritten(teacher_folder, tmp_path / "wide", widen)
    widths = [common.load_policy(name)[0].lm_head.out_features for name in (folder, teacher_folder, wide)]
    assert len(set(widths)) == 3
    line, = metrics(watched(folder, tmp_path / "run", *ONE_STEP, "--teacher", wide)[0])
    assert line == pytest.approx(metrics(alone[0])[0], rel=1e-5, abs=1e-7)


def one_more_word(place):
    tokenizer = common.AutoTokenizer.from_pretrained(place)
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(place)


def two_words_exchanged(place):
    path = Path(place, "tokenizer.json")
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = sorted(vocabulary)[40:42]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("change, words", [(one_more_word, 1), (two_words_exchanged, 2)])
def test_a_teacher_with_another_tokenizer_is_refused(capsys, folder, teacher_folder, tmp_path, change, words):
    """One line, status 2, nothing written; whichever of the two has the word that the other has not."""
    change(shutil.copytree(teacher_folder, tmp_path / "other"))
    for student, teacher in ((folder, tmp_path / "other"), (tmp_path / "other", folder)):
        with pytest.raises(SystemExit) as caught:
            drive(student, tmp_path / "out", *ONE_STEP, "--teacher", teacher, script="opd")
        line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert caught.value.code == 2 and not (tmp_path / "out").exists()
        assert f"--teacher {teacher} has another tokenizer than {student}: {words} words differ" in line


def test_a_teacher_in_bf16_stays_so_and_a_student_is_fp32(folder, teacher_folder, tmp_path):
    """Whole or sharded, a model that is only read keeps its checkpoint's type; what is trained has fp32 masters."""
    def types(model):
        return {p.dtype for p in model.parameters()}
    halves = [rewritten(path, tmp_path / name, lambda model: model.to(torch.bfloat16))
              for name, path in (("student", folder), ("teacher", teacher_folder))]
    place, ((_, student, teacher, _),) = watched(halves[0], tmp_path / "run", *ONE_STEP, "--teacher", halves[1])
    assert types(student) == {torch.float32} and types(teacher) == {torch.bfloat16}
    assert types(common.load_policy(str(place))[0]) == {torch.float32} == types(common.load_policy(folder)[0])
    run = Still()
    run.sharded, run.args = True, argparse.Namespace(max_pixels=10**6, train_vision=True, gradient_checkpointing=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = [common.load_policy(halves[0], run, train=train)[0] for train in (True, False)]
        assert [types(model) for model in sharded] == [{torch.float32}, {torch.bfloat16}]
    finally:
        dist.destroy_process_group()


def test_a_run_with_the_sampled_estimator(folder, teacher_folder, teacher, policy, processor, tmp_path):
    """teacher_kl is then the mean of log p - log q at the sampled tokens, by an ordinary forward pass of each model."""
    flags = *ONE_STEP, "--estimator", "sampled", "--teacher", teacher_folder
    place, ((_, _, _, rollout),) = watched(folder, tmp_path / "run", *flags)
    ratios = []
    for b, both in enumerate(zip(*(plain_logits(model, processor, None, rollout) for model in (policy, teacher)))):
        p, q = (logits.log_softmax(1).gather(1, rollout.tokens_BT[b, :len(logits), None]) for logits in both)
        ratios += (p - q).flatten().tolist()
    line, = metrics(place)
    assert line["teacher_kl"] == pytest.approx(math.fsum(ratios) / len(ratios), abs=1e-5) and line["teacher_kl"] > 0.05
    assert line["loss"] == pytest.approx(line["teacher_kl"], abs=1e-6) and line["grad_norm"] > 0.1


def test_forward_is_the_other_direction_on_the_students_answers():
    """What it costs against exact sums and their slope, the student's alone; what it logs is still KL(p‖q)."""
    x, y, tokens_N = random_logits(3, V).requires_grad_(), random_logits(3, V, seed=1).requires_grad_(), torch.arange(3)
    loss_N, kl_N, logp_N = opd.forward(x, y, tokens_N)
    pairs = list(zip(x.tolist(), y.tolist()))
    assert loss_N.tolist() == pytest.approx([brute_kl(q, p) for p, q in pairs], abs=1e-12)
    assert kl_N.tolist() == pytest.approx([brute_kl(p, q) for p, q in pairs], abs=1e-12)
    assert logp_N.tolist() == pytest.approx([math.log(probabilities(p)[o]) for o, (p, _) in enumerate(pairs)], abs=1e-12)
    assert not kl_N.requires_grad and not logp_N.requires_grad and (loss_N - kl_N).abs().min() > 1e-3
    loss_N.sum().backward()
    assert torch.allclose(x.grad, x.detach().softmax(1) - y.detach().softmax(1), atol=1e-12) and y.grad is None


def test_a_run_with_the_forward_kl(folder, teacher_folder, tmp_path):
    """It learns: both its own loss and the logged KL(p‖q) fall."""
    flags = *FOUR_STEPS, "--estimator", "forward", "--teacher", teacher_folder
    lines = metrics(watched(folder, tmp_path / "run", *flags)[0])
    assert lines[0]["loss"] != lines[0]["teacher_kl"]
    assert all(lines[-1][key] < 0.8 * lines[0][key] for key in ("loss", "teacher_kl"))


if __name__ == "__main__":  # one of two processes; under torchrun both would have to import everything
    common.load_problems("none")
    child = os.fork()
    rank = int(child == 0)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
    report.finish = lambda *given: "no page"
    common.LOGITS = 2**12 * (1 + 3 * rank)  # chunks of 8 positions here, of 34 there; 2 passes here, 4 there
    go(*sys.argv[1:], "--micro_batch_size", 6 - 3 * rank)
    sys.exit(child and os.waitpid(child, 0)[1] and 1)

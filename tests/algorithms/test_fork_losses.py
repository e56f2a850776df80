"""The three forks: their losses against sums written out answer by answer, dynamic sampling, two processes, TRL."""

import argparse
import functools
import json
import math
import statistics
from unittest import mock

import common
import grpo
from forks import dapo, dr_grpo, gspo
from harness.flags import parse_args
from harness.rollout import Prompts, Rollout
from harness.run import Run
from harness.updates import plan_updates
from lab import bench

import numpy as np
import pytest
import torch
from conftest import ROOT
from drive import even_length
from references import draw, finite_differences
from whole_runs import Recorded, drive, drive_watching, gradient, metrics

# --- sums, answer by answer and token by token ------------------------------------------------------------------------

LENGTHS = (5, 1, 3, 2, 4, 5, 1, 2, 3, 4, 4, 2)  # twelve answers, three to each of four problems
ADVANTAGES = (1.5, -0.5, -1.0, 0.0, 0.0, 0.0, 0.7, 0.7, -1.4, -0.2, 1.2, -1.0)  # the second problem teaches nothing
LIMIT = 9  # longer than any of the answers


def clipped_term(ratio, advantage, epsilon, epsilon_high):
    """One term of GRPO's eq. (3), of plain numbers: the loss, and whether the clip took its gradient away."""
    if advantage > 0 and ratio > 1 + epsilon_high:
        return -(1 + epsilon_high) * advantage, True
    if advantage < 0 and ratio < 1 - epsilon:
        return -(1 - epsilon) * advantage, True
    return -ratio * advantage, False


def gspo_by_hand(logps, old_logps, advantages, epsilon, epsilon_high):
    """The mean over answers: one ratio and one clip for each, the n-th root of the product over its n tokens."""
    losses = []
    clipped = []
    for logp_T, old_logp_T, advantage in zip(logps, old_logps, advantages, strict=True):
        product = 1.0
        for logp, old_logp in zip(logp_T, old_logp_T, strict=True):
            product *= math.exp(logp) / math.exp(old_logp)
        loss, is_clipped = clipped_term(product ** (1 / len(logp_T)), advantage, epsilon, epsilon_high)
        losses.append(loss)
        clipped.append(is_clipped)
    return sum(losses) / len(losses), clipped.count(True) / len(losses)


def terms_of_tokens(logps, old_logps, advantages, epsilon, epsilon_high):
    """A ratio and a clip for each token: the losses of all tokens, and how many are clipped."""
    losses = []
    clipped = []
    for logp_T, old_logp_T, advantage in zip(logps, old_logps, advantages, strict=True):
        for logp, old_logp in zip(logp_T, old_logp_T, strict=True):
            ratio = math.exp(logp) / math.exp(old_logp)
            loss, is_clipped = clipped_term(ratio, advantage, epsilon, epsilon_high)
            losses.append(loss)
            clipped.append(is_clipped)
    return losses, clipped.count(True)


def dapo_by_hand(*inputs):
    """The mean over the tokens that there are."""
    losses, clipped = terms_of_tokens(*inputs)
    return sum(losses) / len(losses), clipped / len(losses)


def dr_grpo_by_hand(logps, *others):
    """Every answer counts as many tokens as it might have had."""
    losses, clipped = terms_of_tokens(logps, *others)
    places = len(logps) * LIMIT
    return sum(losses) / places, clipped / places


# --- one update, of tokens that are nothing but numbers ---------------------------------------------------------------


class Table(torch.nn.Module):
    """Plays the policy: the log-prob of every token is a weight."""

    def __init__(self, logp_BT):
        super().__init__()
        self.logp_BT = torch.nn.Parameter(logp_BT.clone())


def look_up(fn, rollout, policy):
    """Plays common.read on a Table: an answer's text is its number."""
    return policy.logp_BT[[int(text) for text in rollout.texts]] * rollout.mask_BT


def random_table(seed, scale=1.0):
    """(12, 5) numbers, 0 after an answer's end, as log-probs are read."""
    random = torch.Generator().manual_seed(seed)
    numbers_BT = scale * torch.randn(12, 5, generator=random, dtype=torch.float64)
    return numbers_BT * invented().mask_BT


def invented():
    """A rollout of twelve answers without words. All groups of three have prompts of one length."""
    mask_BT = torch.zeros(12, 5, dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        mask_BT[b, :length] = 1
    prompts = Prompts.empty()
    for p in range(4):
        prompts.problems.append(dict(id=f"p{p}"))
        prompts.ids.append(torch.zeros(2, dtype=torch.long))
    return Rollout(
        prompts=prompts,
        temperature=1.0,
        group_B=torch.arange(12) // 3,
        tokens_BT=torch.zeros(12, 5, dtype=torch.long),
        mask_BT=mask_BT,
        logp_BT=torch.zeros(12, 5, dtype=torch.float64),
        entropy_BT=torch.zeros(12, 5, dtype=torch.float64),
        finished_B=torch.ones(12),
        texts=[str(b) for b in range(12)],
    )


def updates_of(script, policy, rollout, place, *, advantage_B, old_logp_BT, **flags):
    """All updates of a rollout by a script, with weights that stay. Returns its metrics and the gradient of each."""
    settings = dict(
        output_dir=str(place), resume=False, report_to="none", prompts_per_step=len(rollout.prompts.problems),
        max_grad_norm=1.0, max_completion_length=LIMIT, updates_per_step=1, micro_batch_size=4, average="token",
    )
    run = Run(argparse.Namespace(**settings | flags))
    weight_BT = script.token_weights(rollout.mask_BT, run.args.average)
    taught_P = [p for p, answers in rollout.groups().items() if advantage_B[answers].any()]
    plan = plan_updates(run, rollout, torch.isin(rollout.group_B, torch.tensor(taught_P)))
    found = []

    def keep(model, most):
        found.append(bench.gradient(model).clone())
        return 0.0

    still = torch.optim.SGD(policy.parameters(), lr=0.0)
    with mock.patch.object(script, "clip_gradients", keep):
        numbers = script.update(
            run, policy, still, rollout, plan=plan, advantage_BT=advantage_B[:, None].expand_as(rollout.mask_BT),
            weight_BT=weight_BT, old_logp_BT=old_logp_BT, ref_logp_BT=None)
    return numbers, found


def updates_of_table(script, place, *, logp_BT, old_logp_BT, **flags):
    """The same of the invented answers: metrics, and a gradient (12, 5) for each update."""
    advantage_B = torch.tensor(ADVANTAGES, dtype=torch.float64)
    with mock.patch.object(script, "read", look_up):
        numbers, found = updates_of(
            script, Table(logp_BT), invented(), place, advantage_B=advantage_B, old_logp_BT=old_logp_BT, **flags)
    return numbers, [slopes.view(12, 5) for slopes in found]


def rows_of(numbers, answers):
    """Sixty numbers, a table of (12, 5): for each of the answers a list, up to its end."""
    return [numbers[5 * b:5 * b + LENGTHS[b]] for b in answers]


def written_out(by_hand, answers, *, logp_BT, old_logp_BT, epsilons):
    """Loss, share of what is clipped, and gradient (12, 5) of an update of some answers, without a tensor's formula."""
    old_logps = rows_of(old_logp_BT.flatten().tolist(), answers)
    advantages = [ADVANTAGES[b] for b in answers]

    def loss_and_share(numbers):
        return by_hand(rows_of(numbers, answers), old_logps, advantages, *epsilons)

    loss, share = loss_and_share(logp_BT.flatten().tolist())
    slopes_BT = finite_differences(lambda numbers: loss_and_share(numbers)[0], logp_BT)
    return loss, share, slopes_BT


@pytest.mark.parametrize("size", [2, 3, 12])
@pytest.mark.parametrize("script, by_hand, average, epsilons", [
    (gspo, gspo_by_hand, "answer", (0.10, 0.15)),
    (dapo, dapo_by_hand, "token", (0.2, 0.28)),
    (dr_grpo, dr_grpo_by_hand, "token", (0.2, 0.2)),
])
def test_loss_and_gradient_are_those_written_by_hand(tmp_path, script, by_hand, average, epsilons, size):
    """Two updates of six answers, whatever the forward passes; answers without credit are not read, but counted."""
    logp_BT = random_table(0)
    old_logp_BT = logp_BT + random_table(1, scale=0.4)
    numbers, found = updates_of_table(
        script, tmp_path, logp_BT=logp_BT, old_logp_BT=old_logp_BT, average=average, epsilon=epsilons[0],
        epsilon_high=epsilons[1], micro_batch_size=size, updates_per_step=2)
    losses = []
    shares = []
    for slopes_BT, answers in zip(found, (range(6), range(6, 12)), strict=True):
        loss, share, expected_BT = written_out(
            by_hand, answers, logp_BT=logp_BT, old_logp_BT=old_logp_BT, epsilons=epsilons)
        assert expected_BT.abs().max() > 1e-3
        assert (slopes_BT - expected_BT).abs().max() < 1e-7
        losses.append(loss)
        shares.append(share)
    assert max(shares) > 0
    assert numbers["loss"] == pytest.approx(statistics.mean(losses), rel=1e-6)
    assert numbers["clip_fraction"] == pytest.approx(statistics.mean(shares), rel=1e-6)


# --- GSPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", [1.5, -0.5])
@pytest.mark.parametrize("ratio", [0.5, 0.94, 0.96, 1.0, 1.05, 1.07, 2.0])
def test_gspo_clips_an_answer_whole(ratio, advantage):
    """ε_low = 0.05, ε_high = 0.06. One token is far above its answer's ratio, one as far below: neither counts alone.

    A third column is after the end of the answer: what stands there changes nothing.
    """
    logp = torch.tensor([[math.log(ratio) + 0.7, math.log(ratio) - 0.7, 5.0]], dtype=torch.float64, requires_grad=True)
    old_logp = torch.tensor([[0.0, 0.0, -3.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    inputs = (logp, old_logp, torch.full((1, 3), advantage, dtype=torch.float64), mask)
    loss = gspo.policy_loss(*inputs, epsilon=0.05, epsilon_high=0.06)
    weighted = (loss * gspo.token_weights(mask, "answer")).sum()
    weighted.backward()

    if advantage > 0 and ratio > 1.06:
        expected, slope = -advantage * 1.06, 0.0
    elif advantage < 0 and ratio < 0.95:
        expected, slope = -advantage * 0.95, 0.0
    else:
        expected, slope = -advantage * ratio, -advantage * ratio / 2  # half of it at each of the two tokens
    assert weighted.item() == pytest.approx(expected, abs=1e-12)
    assert logp.grad[0].tolist() == pytest.approx([slope, slope, 0.0], abs=1e-12)
    clipped = gspo.is_clipped(*inputs, epsilon=0.05, epsilon_high=0.06)
    assert clipped[0, :2].tolist() == [float(slope == 0)] * 2


def test_gspo_begins_as_grpo_with_the_mean_over_answers(tmp_path):
    """Where the policy is still the one that sampled, the gradient at a token is −A/n over the answers; later not."""
    logp_BT = random_table(0)
    flags = dict(average="answer", epsilon=0.2, epsilon_high=0.2)
    for old_logp_BT in (None, logp_BT):
        _, (ours,) = updates_of_table(gspo, tmp_path, logp_BT=logp_BT, old_logp_BT=old_logp_BT, **flags)
        _, (plain,) = updates_of_table(grpo, tmp_path, logp_BT=logp_BT, old_logp_BT=old_logp_BT, **flags)
        assert (ours - plain).abs().max() < 1e-9
        for b, length in enumerate(LENGTHS):
            slope = -ADVANTAGES[b] / length / 12
            assert ours[b].tolist() == pytest.approx([slope] * length + [0.0] * (5 - length), abs=1e-8)

    moved_BT = logp_BT + random_table(1, scale=0.1)
    _, (ours,) = updates_of_table(gspo, tmp_path, logp_BT=logp_BT, old_logp_BT=moved_BT, **flags)
    _, (plain,) = updates_of_table(grpo, tmp_path, logp_BT=logp_BT, old_logp_BT=moved_BT, **flags)
    assert (ours - plain).abs().max() > 1e-3


# --- Dr. GRPO ---------------------------------------------------------------------------------------------------------


def test_dr_grpo_does_not_divide_by_the_std():
    """A group of rewards twice as far apart has twice the advantages, and one that is nearly always right has small."""
    rewards_PG = torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0], [1.0, 1, 1, 0]], dtype=torch.float64)
    assert dr_grpo.group_advantages(rewards_PG).tolist() == [
        [0.75, -0.25, -0.25, -0.25], [1.5, -0.5, -0.5, -0.5], [0.25, 0.25, 0.25, -0.75]]


def test_dr_grpo_gives_equals_no_credit():
    """Fifteen equal rewards are not their own mean in fp32; their advantages must be 0 all the same."""
    values = (0.9, 0.1, 0.7, 0.3, 1 / 3)
    assert any((torch.full((15,), value).mean() != value).item() for value in values)  # else nothing is guarded
    for value in values:
        assert (dr_grpo.group_advantages(torch.full((2, 15), value)) == 0).all()


def test_dr_grpo_makes_no_answer_cheap_by_its_length(tmp_path):
    """Every token of an answer has the slope −A over B·T_max, in short answers and in long ones alike."""
    logp_BT = random_table(0)
    flags = dict(epsilon=0.2, epsilon_high=0.2)
    for limit in (LIMIT, 2 * LIMIT):
        numbers, (slopes_BT,) = updates_of_table(
            dr_grpo, tmp_path, logp_BT=logp_BT, old_logp_BT=None, max_completion_length=limit, **flags)
        for b, length in enumerate(LENGTHS):
            slope = -ADVANTAGES[b] / (12 * limit)
            assert slopes_BT[b].tolist() == pytest.approx([slope] * length + [0.0] * (5 - length), abs=1e-9)
        total = sum(-advantage * length for advantage, length in zip(ADVANTAGES, LENGTHS, strict=True))
        assert numbers["loss"] == pytest.approx(total / (12 * limit), rel=1e-6)


# --- DAPO -------------------------------------------------------------------------------------------------------------


def penalty_by_hand(length, longest, cache):
    """DAPO's soft punishment of long answers, by its three cases."""
    if length <= longest - cache:
        return 0.0
    if length < longest:
        return (longest - cache - length) / cache
    return -1.0


def test_overlong_penalty_at_its_corners():
    """A limit of 100 tokens, of which the last 20 cost."""
    corners = {1: 0.0, 79: 0.0, 80: 0.0, 81: -0.05, 90: -0.5, 95: -0.75, 99: -0.95, 100: -1.0, 130: -1.0}
    penalties_B = dapo.overlong_penalty(torch.tensor([float(n) for n in corners]), 100, 20)
    assert penalties_B.tolist() == pytest.approx(list(corners.values()), abs=1e-6)
    assert [penalty_by_hand(length, 100, 20) for length in corners] == pytest.approx(list(corners.values()))
    assert dapo.overlong_penalty(torch.tensor([8.0, 9.0, 10.0]), 10, 1).tolist() == [0.0, 0.0, -1.0]


@pytest.mark.parametrize("script, asked", [
    (gspo, dict(average="answer", epsilon=3e-4, epsilon_high=4e-4)),
    (dapo, dict(average="token", epsilon=0.2, epsilon_high=0.28)),
    (dr_grpo, dict(average="token", epsilon=0.2, epsilon_high=0.2)),
])
def test_what_a_paper_asks_for_needs_no_flag(script, asked):
    args = parse_args(
        "fork", script.flags, recipe=script.RECIPE, toy=script.TOY, argv=["--model", "Qwen/Qwen2.5-VL-7B-Instruct"])
    assert {name: vars(args)[name] for name in asked} == asked


@pytest.mark.parametrize("ratio, advantage, keeps_gradient", [
    (1.27, 1.0, True), (1.29, 1.0, False), (0.81, -1.0, True), (0.79, -1.0, False), (5.0, -1.0, True), (0.1, 1.0, True),
])
def test_clip_higher(ratio, advantage, keeps_gradient):
    """A good token may grow by 28 per cent, a bad one shrink by 20."""
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    inputs = (logp, torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), advantage, dtype=torch.float64))
    dapo.policy_loss(*inputs, epsilon=0.2, epsilon_high=0.28).sum().backward()
    assert bool(logp.grad.item()) == keeps_gradient
    assert bool(dapo.is_clipped(*inputs, epsilon=0.2, epsilon_high=0.28).item()) != keeps_gradient


# --- DAPO's dynamic sampling ------------------------------------------------------------------------------------------

G = 3
WANTED = 8  # problems of a step
DYNAMIC = (
    "--eval_dataset", "none",
    "--updates_per_step", 2,
    "--overlong_cache", 16,
)


def ids_of_draw(number, dataset, rank=0, world=1):
    """The ids of the problems of a draw that go to a process, those of the first update first."""
    settings = argparse.Namespace(prompts_per_step=WANTED, updates_per_step=2, seed=1)
    process = argparse.Namespace(args=settings, rank=rank, world=world)
    return [problem["id"] for problem in Run.batch(process, common.load_problems(dataset), number)]


def groups_of(rollout):
    """[(id of a problem, the texts of its answers)] in the order of the rollout."""
    groups = []
    for first in range(0, len(rollout), G):
        ids = {problem["id"] for problem in rollout.problems[first:first + G]}
        assert len(ids) == 1
        groups.append((ids.pop(), rollout.texts[first:first + G]))
    return groups


def teaches(group):
    """Whether some answers of a group are right and some wrong."""
    return {even_length(None, text) for text in group[1]} == {0.0, 1.0}


def watch_dapo(folder, place, *flags):
    """A run of dapo.py. Returns its folder, the calls of `sample`, and the calls of `update`."""
    draws = Recorded(common.sample)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "sample", draws)
        run, updates = drive_watching("update", folder, place, *DYNAMIC, *flags, script="forks.dapo")
    return run, draws, updates


@pytest.fixture(scope="module")
def dynamic(folder, tmp_path_factory):
    """Three steps. An untrained model's groups teach in three of four cases, so a step needs more than one draw.

    One word in twelve ends an answer, so that answers have all lengths.
    """
    set_vocabulary = common.Policy.set_vocabulary

    def set_many_ends(policy, tokenizer):
        set_vocabulary(policy, tokenizer)
        policy.ends = [*policy.ends, *range(0, policy.vocabulary, 12)]

    place = tmp_path_factory.mktemp("dynamic") / "run"
    with mock.patch.object(common.Policy, "set_vocabulary", set_many_ends):
        return watch_dapo(folder, place, "--max_steps", 3, "--max_draws", 9)


def test_problems_are_drawn_until_enough_of_them_teach(dynamic):
    """A step is trained on the first P groups that teach, and draws until it has them, not once more."""
    run, draws, updates = dynamic
    lines = metrics(run)
    assert 1 < max(line["draws"] for line in lines) < 9
    rollouts = iter(draws.returned)
    for line, given in zip(lines, updates.given, strict=True):
        kept = []
        for _ in range(line["draws"]):
            assert len(kept) < WANTED
            kept += [group for group in groups_of(next(rollouts)) if teaches(group)]
        assert groups_of(given[3]) == kept[:WANTED]
        assert len(kept) >= WANTED
    assert next(rollouts, None) is None


def test_every_draw_takes_the_next_problems(dynamic):
    """Draws are counted on through the steps: each has problems and random numbers of its own."""
    run, draws, updates = dynamic
    total = sum(line["draws"] for line in metrics(run))
    assert updates.given[-1][0].state["drawn"] == total == len(draws.given)
    assert [named["seed"] for named in draws.named] == [(1, number) for number in range(1, total + 1)]
    for number, given in enumerate(draws.given, 1):
        assert [problem["id"] for problem in given[2]] == ids_of_draw(number, "toy@train:64")


def test_the_penalty_is_part_of_the_reward(dynamic):
    """Advantages from accuracy, format and length, by hand; an answer's length counts its end token."""
    penalties = set()
    for given, named in zip(dynamic[2].given, dynamic[2].named, strict=True):
        rollout = given[3]
        lengths = [int(sum(row)) for row in rollout.mask_BT.tolist()]
        rewards = []
        for problem, text, length in zip(rollout.problems, rollout.texts, lengths, strict=True):
            penalty = penalty_by_hand(length, 24, 16)
            penalties.add(penalty)
            accuracy = even_length(problem, text)
            rewards.append(0.9 * accuracy + 0.1 * common.format_reward(problem, text) + penalty)
        for b, reward in enumerate(rewards):
            group = rewards[b // G * G:b // G * G + G]
            expected = (reward - statistics.mean(group)) / (statistics.stdev(group) + 1e-6)
            assert named["advantage_BT"][b].tolist() == pytest.approx([expected] * rollout.mask_BT.shape[1], abs=1e-5)
    assert {0.0, -1.0} < penalties
    assert len(penalties) > 5


@pytest.mark.parametrize("max_draws, in_first, in_last", [(1, 0, 2), (2, 0, 0), (2, 3, 2), (3, 7, 2)])
def test_after_the_last_draw_a_step_is_filled_up(folder, tmp_path, monkeypatch, max_draws, in_first, in_last):
    """Where too few groups teach, all that do are trained on, and other groups of the last draw fill the step up."""
    first = ids_of_draw(1, "toy@train:64")
    last = ids_of_draw(max_draws, "toy@train:64")
    teachers = first[WANTED - in_first:] + last[WANTED - in_last:]

    def grade(problem, text):
        """Answers to some problems are as good as they are long, all others are right."""
        return float(len(text)) if problem["id"] in teachers else 1.0

    monkeypatch.setattr("drive.even_length", grade)
    flags = ("--max_steps", 1, "--max_draws", max_draws, "--max_completion_length", 8)
    run, draws, updates = watch_dapo(folder, tmp_path / "run", *flags)
    line, = metrics(run)
    assert line["draws"] == len(draws.given) == max_draws
    trained = [id for id, _ in groups_of(updates.given[0][3])]
    assert trained == [*teachers, *last[:WANTED - in_last]][:WANTED]


class Killed(BaseException):
    """What ends a run here. That a process may really be killed at any moment is tests/engine/test_resume.py's."""


def test_a_killed_run_goes_on_with_the_problems_that_come_next(folder, tmp_path, monkeypatch):
    """The number of draws so far is in the checkpoint: ended and resumed, the same numbers and the same answers."""

    def die():
        raise Killed

    monkeypatch.setattr("drive.die", die)
    flags = (
        *DYNAMIC, "--max_draws", 9, "--max_steps", 4, "--save_steps", 2, "--max_completion_length", 12,
        "--prompts_per_step", 4)
    whole = drive(folder, tmp_path / "whole", *flags, script="forks.dapo")
    lines = metrics(whole)
    drawn = sum(line["draws"] for line in lines[:2])
    assert drawn > 2  # else the number of the step would do
    monkeypatch.setenv("KILL_AT", "3")
    with pytest.raises(Killed):
        drive(folder, tmp_path / "killed", *flags, script="forks.dapo")
    step, state, *_ = json.loads((tmp_path / "killed" / "checkpoint-2" / "state.json").read_text())
    assert (step, state["drawn"]) == (2, drawn)
    monkeypatch.delenv("KILL_AT")
    killed = drive(folder, tmp_path / "killed", *flags, "--resume", script="forks.dapo")
    assert metrics(killed) == lines
    for name in ("samples.jsonl", "model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


# --- one process and two ----------------------------------------------------------------------------------------------

# Answers to some problems are as good as they are long. All answers to others are right, and teach nothing.
BY_ID = """

def by_id(problem, text):
    return float(len(text)) if problem["id"] in {teachers} else 1.0
"""


def dapo_with_few_teachers(place):
    """dapo.py, where after the first draw the first process has its four groups, and the second still lacks one.

    The groups that are kept, and which update they are in, are then those of one process alone.
    """
    teachers = ids_of_draw(1, "toy@train:16", rank=0, world=2)
    teachers += ids_of_draw(1, "toy@train:16", rank=1, world=2)[:3]
    teachers += ids_of_draw(2, "toy@train:16", rank=1, world=2)[:1]
    text = (ROOT / "forks" / "dapo.py").read_text()
    assert text.count("score(grade, judge)") == 2
    path = place / "fork.py"
    path.write_text(text.replace("score(grade, judge)", "score(by_id)") + BY_ID.format(teachers=teachers))
    return path


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) for name in ("dapo", "gspo", "dr_grpo")
])
def test_two_processes_give_the_losses_and_gradients_of_one(folder, tmp_path, name):
    """Two updates, of which the second has ratios that are not 1, from one group to a pass."""
    script = dapo_with_few_teachers(tmp_path) if name == "dapo" else f"forks.{name}"
    flags = (
        "--dataset", "toy@train:16",
        "--eval_dataset", "none",
        "--updates_per_step", 2,
        "--micro_batch_size", 3,
        "--max_completion_length", 12,
        "--max_steps", 1,
        "--learning_rate", 1e-4,
    )
    one = drive(folder, tmp_path / "one", *flags, script=script)
    two = drive(folder, tmp_path / "two", *flags, script=script, processes=2)
    line, = metrics(one)
    assert metrics(two) == [pytest.approx(line, rel=1e-5, abs=1e-7)]
    assert line.get("draws", 2) == 2
    for update in (1, 2):
        expected = gradient(one, update)
        assert expected.norm() > 1e-3
        assert (gradient(two, update) - expected).norm() < 1e-5 * expected.norm()


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="TRL is not one of the project's requirements")


def trl_settings(monkeypatch, trl, place, **settings):
    """Has lab/bench.py make TRL's trainer with these settings too."""
    monkeypatch.setattr(bench, "NOWHERE", str(place))
    monkeypatch.setattr(bench.trl, "GRPOConfig", functools.partial(trl.GRPOConfig, **settings))


@pytest.mark.parametrize("script, advantages, average, epsilons, theirs", [
    (gspo, grpo.group_advantages, "answer", (0.03, 0.04), dict(importance_sampling_level="sequence", loss_type="grpo")),
    (dr_grpo, dr_grpo.group_advantages, "token", (0.2, 0.2), dict(loss_type="dr_grpo", scale_rewards=False)),
    (dapo, dapo.group_advantages, "token", (0.2, 0.28), dict(loss_type="dapo")),
])
def test_loss_and_gradient_are_those_of_trl(
    folder, policy, processor, tmp_path, monkeypatch, trl, script, advantages, average, epsilons, theirs,
):
    """The same answers; π_old is a little off, so that ratio and clip matter. TRL adds 1e-4 to a std, we 1e-6."""
    problems = common.load_problems("toy@train:4")
    limit = 12
    rollout = draw(policy, processor, problems, G, temperature=1.0, max_completion_length=limit)
    clip = dict(epsilon=epsilons[0], epsilon_high=epsilons[1])
    # TRL forbids no token when it reads, and its softmax runs over the embedding's rows of padding too.
    rows = policy.config.get_text_config().vocab_size
    with mock.patch.multiple(policy, vocabulary=rows, banned=np.zeros(0, dtype=np.int64)):
        with torch.no_grad():
            logp_BT = common.read(common.token_logps, rollout, policy)
        noise_BT = 0.2 * torch.randn(logp_BT.shape, generator=torch.Generator().manual_seed(0))
        old_logp_BT = (logp_BT + noise_BT) * rollout.mask_BT
        numbers, (ours,) = updates_of(
            script, policy, rollout, tmp_path / "ours", advantage_B=advantages(rollout.score(even_length)).flatten(),
            old_logp_BT=old_logp_BT, max_completion_length=limit, average=average, **clip)
    trl_settings(monkeypatch, trl, tmp_path / "theirs", **clip, **theirs)
    sizes = argparse.Namespace(model=folder, problems=4, num_generations=G, max_completion_length=limit)
    loss, their_gradient = bench.trl_backward(sizes, problems, rollout, old_logp_BT)
    assert 0 < numbers["clip_fraction"] < 0.9
    assert abs(numbers["loss"]) > 1e-3
    assert numbers["loss"] == pytest.approx(loss, abs=1e-4)
    assert (ours - their_gradient).norm() < 1e-3 * their_gradient.norm()


def test_the_overlong_penalty_is_that_of_trl(trl):
    rewards = pytest.importorskip("trl.rewards")
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = range(1, 101)
    ours_B = dapo.overlong_penalty(torch.tensor([float(n) for n in lengths]), 100, 20)
    assert ours_B.tolist() == pytest.approx(theirs([[0] * n for n in lengths]), abs=1e-6)

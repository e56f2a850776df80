"""What is not a number is called by its name: a reward, a log-prob, a loss, a gradient. So is the problem, if any.

A NaN that is noticed late looks like a learning rate that is too high.
"""

import math
import shutil

import grpo
from common import UserError, forced, read, token_logps
from harness.sharding import clip_gradients

import drive
import pytest
import torch
from references import draw
from transformers import AutoModelForImageTextToText

ONE_STEP = (
    "--dataset", "toy@train:8",
    "--eval_dataset", "none",
    "--prompts_per_step", 4,
    "--updates_per_step", 1,
    "--num_generations", 3,
    "--max_completion_length", 8,
    "--max_steps", 1,
)


def error_of(function, *given):
    """The one line of the UserError that a call must raise."""
    with pytest.raises(UserError) as caught:
        function(*given)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- a whole run, with one thing broken -------------------------------------------------------------------------------


def nan_reward(problem, text):
    """A reward that divides by nothing, for one problem in two."""
    odd = int(problem["id"].rsplit("-")[-1]) % 2 == 1
    return math.nan if odd else 0.5


def nan_advantages(rewards_PG):
    """A standard deviation without a floor: 0/0 where all rewards of a group are equal."""
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return centred_PG / centred_PG.new_zeros(len(rewards_PG), 1)


def loss_with_an_endless_slope(logp_BT, old_logp_BT, advantage_BT, epsilon, epsilon_high):
    """A loss whose value is an ordinary number, and whose gradient is not: the slope of √x at 0."""
    away_BT = logp_BT - logp_BT.detach()
    return -advantage_BT + away_BT.sqrt()


BROKEN = {
    # what is broken: (module, its function, what takes its place, what must be said)
    "reward": (
        drive, "even_length", nan_reward,
        ["the reward of an answer to problem toy-train-", "is nan", "nan_reward"],
    ),
    "advantage": (
        grpo, "group_advantages", nan_advantages,
        ["step 1: the loss is nan", "look at advantages, weights"],
    ),
    "gradient": (
        grpo, "policy_loss", loss_with_an_endless_slope,
        ["the gradient has norm nan", "every loss was finite"],
    ),
}


@pytest.mark.parametrize("thing", BROKEN)
def test_trap_false_cause(folder, tmp_path, monkeypatch, capsys, thing):
    """A run with one broken formula ends with status 2 and one line that names the formula's part, not another's."""
    module, name, stand_in, says = BROKEN[thing]
    monkeypatch.setattr(module, name, stand_in)
    with pytest.raises(SystemExit) as caught:
        drive.go("grpo", "--model", folder, "--output_dir", tmp_path / "run", *ONE_STEP)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]  # after the progress bar
    assert caught.value.code == 2
    assert len(errors) == 1
    for words in says:
        assert words in errors[0]
    if thing == "reward":
        problem = errors[0].split("problem toy-train-")[1].split()[0]
        assert int(problem) % 2 == 1
    if thing != "gradient":
        assert "learning_rate" not in errors[0]


# --- a reward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_names_its_problem(policy, processor, problems, value):
    """Of five problems the third is to blame. Nothing is said of the group's advantages, which would be NaN too."""
    rollout = forced(policy, processor, problems, ["a", "b", "c", "d", "e"])

    def my_reward(problem, text):
        return value if problem["id"] == "p2" else 1.0

    message = error_of(rollout.score, my_reward)
    assert f"an answer to problem p2 is {value}" in message
    assert "my_reward" in message


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_weight_that_is_no_number_is_met_when_it_is_read(policy, processor, problems, monkeypatch):
    """Not at the loss, where it would look like an advantage, nor at the gradient."""
    rollout = draw(policy, processor, problems)
    weight = policy.model.language_model.layers[1].mlp.up_proj.weight
    kept = weight[0, 0].item()
    weight.data[0, 0] = math.nan
    try:
        message = error_of(read, token_logps, rollout, policy)
    finally:
        weight.data[0, 0] = kept
    assert "token_logps gave something that is not finite at an answer to problem p0" in message
    assert "the model's weights, or this problem's picture" in message


def test_a_weight_that_is_no_number_is_met_when_it_samples(policy, processor, problems):
    """As such: a token that is drawn from NaN is beyond the vocabulary, and the next line would blame an index."""
    weight = policy.model.language_model.layers[1].mlp.up_proj.weight
    kept = weight[0, 0].item()
    weight.data[0, 0] = math.nan
    try:
        with pytest.raises(UserError, match="not finite at an answer to problem p0: look at token_entropy"):
            draw(policy, processor, problems)
    finally:
        weight.data[0, 0] = kept


def test_a_model_with_a_weight_that_is_no_number_is_refused_at_the_start(capsys, folder, tmp_path):
    """By its name, before anything is sampled from it."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.model.language_model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    broken = shutil.copytree(folder, tmp_path / "broken")
    model.save_pretrained(broken)
    with pytest.raises(SystemExit) as caught:
        drive.go("grpo", "--model", broken, "--output_dir", tmp_path / "run", *ONE_STEP)
    assert caught.value.code == 2
    line, = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert f"model {broken} has weights that are not finite, model.language_model.layers.1.mlp.up_proj.weight" in line


@pytest.mark.parametrize("batches", [None, [[12, 13, 14], [0, 1, 2, 3], [6, 7, 8, 9, 10, 11], [4, 5]]])
def test_a_picture_that_is_no_number_names_its_problem(policy, processor, problems, batches):
    """Its problem, and no other that shares a forward pass with it, whichever order they are read in."""
    rollout = draw(policy, processor, problems)
    rollout.prompts.pixels = list(rollout.prompts.pixels)
    broken = rollout.prompts.pixels[3].clone()
    broken[0, 0] = math.nan
    rollout.prompts.pixels[3] = broken
    if batches is not None:
        batches = [torch.tensor(batch) for batch in batches]
    with pytest.raises(UserError, match="at an answer to problem p3: "):
        read(token_logps, rollout, policy, batches=batches)


def test_a_formula_that_gives_no_number_is_called_by_its_name(policy, processor, problems):
    """One of several tensors of fn, with further axes: found all the same."""
    rollout = draw(policy, processor, problems)

    def my_signals(logits_NV, tokens_N):
        pairs_N2 = logits_NV[:, :2].clone()
        pairs_N2[-1, 1] = math.inf
        return token_logps(logits_NV, tokens_N), pairs_N2

    message = error_of(read, my_signals, rollout, policy)
    assert "my_signals gave something that is not finite at an answer to problem p4" in message


# --- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_names_the_first_weight(value):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2), torch.nn.Linear(2, 2))
    model(torch.ones(1, 3)).sum().backward()
    model[0].bias.grad = None  # a frozen weight has no gradient
    model[1].weight.grad[1, 2] = value
    model[2].bias.grad[0] = value
    message = error_of(clip_gradients, model, 1.0)
    assert "first in 1.weight" in message
    assert "every loss was finite: a formula has no finite slope there" in message


def test_a_gradient_whose_norm_alone_overflows_says_so():
    """Every weight's gradient is finite, but the sum of their squares is not: no weight is blamed."""
    model = torch.nn.Linear(3, 4)
    model(torch.ones(1, 3)).sum().backward()
    model.weight.grad.fill_(1e30)
    message = error_of(clip_gradients, model, 1.0)
    assert "the gradient has norm inf, though every part of it on this process is finite" in message


def test_a_finite_gradient_is_scaled_down_and_its_norm_before_is_given():
    model = torch.nn.Linear(3, 4, bias=False)
    model(torch.ones(1, 3)).sum().backward()
    norm = math.sqrt(12)
    assert clip_gradients(model, 0.5) == pytest.approx(norm, rel=1e-6)
    assert model.weight.grad.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert clip_gradients(model, 10.0) == pytest.approx(0.5, rel=1e-4)

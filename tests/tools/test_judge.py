"""toy-judge: which descriptions are better, and a reward model that learns it from pairs."""

import dataclasses
import itertools
import random

import common
from common import load_judge, load_policy
from harness.flags import of_the_world
from lab import arms
from tabletop import build, judge, models
from tabletop.grids import Spec, answer, best_answer
from tabletop.problems import load

import numpy as np
import pytest
import torch

GRID = (
    (("red", "circle"), None, ("blue", "star")),
    (("green", "square"), ("red", "circle"), None),
    (("blue", "star"), ("blue", "circle"), None),
)
COLOUR = Spec(grid=GRID, verifier="open_ended", target=("colour",), wording="Describe the {kind}s.", drawing=0)
SHAPE = dataclasses.replace(COLOUR, target=("shape",))
SMALL = dataclasses.replace(judge.RECIPE, steps=1, pictures_per_step=2)


@pytest.mark.parametrize("spec, text, worth", [
    (COLOUR, "mostly blue", 3),
    (COLOUR, "mostly red", 2),
    (COLOUR, "mostly yellow", 0),
    (COLOUR, "blue", 3),
    (SHAPE, "mostly circle", 3),
    (COLOUR, "mostly circle", -1),  # not asked for
    (COLOUR, "mostly blue red", -1),
    (COLOUR, "mostly blue and so on", -1),
    (COLOUR, "mostly", -1),
    (COLOUR, "", -1),
])
def test_a_description_is_worth_the_cells_that_show_what_it_names(spec, text, worth):
    assert judge.quality(spec, text) == worth


def test_descriptions_to_compare_are_different_and_of_many_qualities():
    for index in range(40):
        spec, _, texts = judge.shown(judge.RECIPE, index)
        worths = [judge.quality(spec, text) for text in texts]
        assert len(set(texts)) == 6
        assert worths[:4] == sorted(worths[:4], reverse=True)
        assert worths[4:] == [-1, -1]
        assert worths[0] >= worths[1] + 2
        assert texts[1] == answer(spec)


@pytest.fixture(scope="module")
def start():
    return models.build(judge.RECIPE.start)


def test_a_judge_is_a_checkpoint_that_scores_as_it_was_trained(start, tmp_path, monkeypatch):
    """In packed rows while it learns, one by one when it is used: the same scores."""
    kept = {}
    first_head = judge.first_head

    def remember(policy, seed):
        kept["policy"] = policy
        kept["head"] = first_head(policy, seed)
        return kept["head"]

    monkeypatch.setattr(judge, "first_head", remember)
    place = judge.train(SMALL, start, tmp_path)
    trained = load_judge(str(place))
    _, processor = load_policy(start, args=of_the_world(instruction=""))
    pictures = [judge.shown(judge.RECIPE, index) for index in range(3)]
    with torch.no_grad():
        packed = judge.scores(kept["policy"], processor, kept["head"], pictures).flatten().tolist()
        rollout = judge.readable(kept["policy"], processor, pictures)
    answers = [text for _, _, texts in pictures for text in texts]
    one_by_one = [trained(problem, answer) for problem, answer in zip(rollout.problems, answers, strict=True)]
    assert one_by_one == pytest.approx(packed, abs=1e-4)
    assert max(packed) - min(packed) > 0.01


def test_the_loss_is_that_of_the_pairs_one_by_one(start):
    policy, processor = load_policy(start, args=of_the_world(instruction=""))
    head = judge.first_head(policy, seed=1)
    pictures = [judge.shown(judge.RECIPE, index) for index in range(2)]
    with torch.no_grad():
        score_PD = judge.scores(policy, processor, head, pictures)
        losses = []
        for (spec, _, texts), score_D in zip(pictures, score_PD, strict=True):
            for better, worse in itertools.permutations(range(len(texts)), 2):
                if judge.quality(spec, texts[better]) > judge.quality(spec, texts[worse]):
                    losses.append(torch.log1p(torch.exp(score_D[worse] - score_D[better])).item())
        assert judge.pair_loss(policy, processor, head, pictures).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_judge_is_cached_by_its_recipe(start, tmp_path, monkeypatch):
    """A second call does no work; another recipe, or other pictures, give another name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(judge, "RECIPE", SMALL)
    place = build("toy-judge")
    monkeypatch.setattr(judge, "train", None)
    assert build("toy-judge") == place
    keys = {judge.key_of(SMALL), judge.key_of(dataclasses.replace(SMALL, steps=2)),
            judge.key_of(dataclasses.replace(SMALL, fades=(0.0,)))}
    monkeypatch.setattr(judge, "quality", lambda spec, text: 0)
    keys.add(judge.key_of(SMALL))
    assert len(keys) == 4


@pytest.mark.slow
def test_the_judge_ranks_pairs_that_it_has_not_seen():
    """On faded pictures, as in its world: of each two colours (or shapes), and the best one against the gold answer."""
    trained = load_judge("toy-judge")
    right = {"both name one": [], "one is worth nothing": []}
    beats_gold = []
    for problem in load("toy-mixed", "test")[4::5]:
        spec = problem["spec"]
        texts = judge.candidates(spec, random.Random(problem["id"]))
        scores = [trained(problem, text) for text in texts]
        worths = [judge.quality(spec, text) for text in texts]
        for one, other in itertools.combinations(range(len(texts)), 2):
            if worths[one] != worths[other]:
                kind = "both name one" if min(worths[one], worths[other]) >= 0 else "one is worth nothing"
                right[kind].append((scores[one] > scores[other]) == (worths[one] > worths[other]))
        beats_gold.append(trained(problem, best_answer(spec)) > trained(problem, problem["answer"]))
    assert len(right["both name one"]) > 200
    assert np.mean(right["both name one"]) > 0.95
    assert np.mean(right["one is worth nothing"]) > 0.99
    assert np.mean(beats_gold) > 0.95


# --- the study of mixed rewards ---------------------------------------------------------------------------------------


def test_the_arms_differ_in_what_is_left_out_alone():
    found = {name: spec for name, spec in arms.sft_or_rl().items() if name.startswith("toy-mixed/")}
    whole = found["toy-mixed/mixed"]
    assert "verifiers" not in whole.flags
    for name, spec in found.items():
        arm = name.partition("/")[2]
        if arm.startswith("without-"):
            rest = dict(spec.flags)
            kept = rest.pop("verifiers").split(",")
            assert rest == whole.flags
            assert {arm.removeprefix("without-"), *kept} == set(common.VERIFIERS)
            assert len(kept) == 4
        if arm.startswith("eval-"):
            assert spec.flags["dataset"] == "toy-mixed@fresh:640"
            assert spec.flags["reward_model"] == whole.flags["reward_model"]
            assert spec.start == ("" if arm == "eval-base" else f"toy-mixed/{arm.removeprefix('eval-')}")
    assert len(found) == 2 * 6 + 1

"""common.grade, format_reward, is_right: what an answer earns, and what counts as right."""

import math

from common import UserError, encode, format_reward, grade, is_right
from harness.flags import of_the_world
from harness.processor import as_seen, make_processor

import pytest
from conftest import picture

# --- the format -------------------------------------------------------------------------------------------------------

WELL_FORMED = [
    "<think>a</think>\\boxed{1}",
    " \n<think>a\nb</think>\n\nso \\boxed{\\frac{1}{2}}.",
]
ILL_FORMED = [
    "",
    "\\boxed{1}",
    "<think></think>\\boxed{1}",
    "<think> \n</think>\\boxed{1}",
    "<think>\\boxed{1}</think>",
    "<think>a\\boxed{1}",
    "so <think>a</think>\\boxed{1}",
    "<think>a</think>1",
    "<think>a</think>\\boxed{}",
    "<think>a</think><think>b</think>\\boxed{1}",
    "<think><think>a</think>\\boxed{1}",
    "<think>a</think></think>\\boxed{1}",
    "</think>a<think>\\boxed{1}",
]


@pytest.mark.parametrize("text", WELL_FORMED)
def test_one_block_of_thought_then_a_box(text):
    assert format_reward({}, text) == 1.0


@pytest.mark.parametrize("text", ILL_FORMED)
def test_anything_else_is_ill_formed(text):
    assert format_reward({}, text) == 0.0


# --- answers in free text ---------------------------------------------------------------------------------------------


def judge(problem, answer):
    return {"gold": 1.0, "better": 3.0, "same": 1.0, "worse": -50.0}[answer]


FREE = {"id": "q7", "answer": "gold", "verifier": "open_ended"}


@pytest.mark.parametrize("answer, reward", [("better", 1 - math.exp(-2.0)), ("same", 0.0), ("worse", 0.0)])
def test_open_ended_is_how_much_better_than_the_gold_answer(answer, reward):
    assert grade(FREE, f"\\boxed{{{answer}}}", judge) == pytest.approx(reward)


def test_open_ended_without_an_answer_earns_nothing():
    assert grade(FREE, "no box", judge) == 0


def test_open_ended_without_a_judge_names_the_problem():
    with pytest.raises(UserError, match="graded by a judge.*q7"):
        grade(FREE, "\\boxed{better}")


# --- right or wrong ---------------------------------------------------------------------------------------------------


def right(gold, answer, verifier, judge=None):
    return is_right({"id": "0", "answer": gold, "verifier": verifier}, f"\\boxed{{{answer}}}", judge)


def test_a_box_is_right_from_an_overlap_of_half():
    gold = "[0, 0, 10, 10]"
    assert right(gold, "[0, 0, 10, 5]", "iou")  # 50 / 100
    assert not right(gold, "[0, 0, 10, 4.9]", "iou")


def test_anything_else_is_right_or_wrong():
    assert right("7", "7", "digit")
    assert not right("7", "8", "digit")
    assert right("1/2", "0.5", "math")
    assert not right("1/2", "no idea", "math")
    assert right("B", "(b)", "mcq")
    assert right("gold", "better", "open_ended", judge)
    assert not right("gold", "same", "open_ended", judge)


@pytest.mark.parametrize("verifier, gold", [("digit", "7"), ("mcq", "B"), ("math", "x+1"), ("iou", "[0, 0, 1, 1]")])
def test_a_text_without_an_answer_is_wrong(verifier, gold):
    """One reward for each problem: a good format never makes up for a missing answer."""
    problem = {"id": "0", "answer": gold, "verifier": verifier}
    assert grade(problem, "<think>so</think>") == 0.0
    assert not is_right(problem, "<think>so</think>")


@pytest.mark.parametrize("width, height, budget", [
    (84, 84, {}), (90, 61, {}), (100, 50, dict(min_pixels=20_000)), (300, 200, dict(max_pixels=20_000))])
def test_a_box_belongs_to_the_picture_as_the_processor_resized_it(folder, width, height, budget):
    """Whether encoded or not: the same size, and a gold box of the file's pixels is right after resizing alone."""
    args = of_the_world(**budget)
    problem = dict(id="p", images=[picture(width, height)], problem="Where?", verifier="iou",
                   answer=str([0, 0, width / 2, height]))
    encoded, = encode(make_processor(folder, args), [problem]).problems
    seen = as_seen(problem, args)
    assert seen["size"] == encoded["size"]
    wide, high = seen["size"]
    without_pictures = {key: value for key, value in seen.items() if key != "images"} | dict(original=(width, height))
    for known in (seen, encoded, without_pictures):
        assert grade(known, f"\\boxed{{[0, 0, {wide / 2}, {high}]}}") == pytest.approx(1)

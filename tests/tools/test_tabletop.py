"""The tabletop's problems: pictures show what the problems say, traces are right, splits are apart."""

from collections import Counter

import common
from tabletop.grids import COLOURS, PAPER, SHAPES, STYLES, UNSEEN_PAIRS, VERIFIERS, Spec, answer
from tabletop.pictures import SHAPE_SIZES, _tile, draw
from tabletop.problems import GRIDS, SHARES, problem_of, problems, share_of, spec_of
from tabletop.traces import names_picture, style, traces

import pytest
from PIL import ImageChops

SPLITS = ("pretrain", "train", "test", "study", "ood")


def specs(split, count):
    return [spec_of(split, index) for index in range(count)]


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_show_what_the_problem_says(split):
    """The pixel in the middle of a cell has the shape's colour, the empty cells are paper, nothing else is drawn."""
    for spec in specs(split, 40):
        image = draw(spec)
        assert image.size == (28 * len(spec.grid[0]), 28 * len(spec.grid))
        assert image.mode == "RGB"
        for y, row in enumerate(spec.grid):
            for x, cell in enumerate(row):
                left, top = 28 * x, 28 * y
                middle = image.getpixel((left + 14, top + 14))
                if cell is None:
                    inside = image.crop((left + 2, top + 2, left + 26, top + 26))
                    assert inside.getcolors() == [(24 * 24, PAPER)]
                else:
                    assert middle == COLOURS[cell[0]]


def red(shape, size):
    return _tile(("red", shape), size)


def distance(one, other):
    """How much two pictures differ: the sum over their pixels."""
    return sum(ImageChops.difference(one, other).convert("L").get_flattened_data())


def test_shapes_differ_from_each_other_and_in_their_sizes():
    for shape in SHAPES:
        others = [distance(red(shape, 19), red(other, 19)) for other in SHAPES if other != shape]
        assert min(others) > 2000
    tiles = {red(shape, size).tobytes() for shape in SHAPES for size in SHAPE_SIZES}
    assert len(tiles) == 12


# --- answers ----------------------------------------------------------------------------------------------------------


def shown_in(spec):
    """(x, y, colour, shape) of every cell with something in it."""
    found = []
    for y, row in enumerate(spec.grid):
        for x, cell in enumerate(row):
            if cell is not None:
                found.append((x, y, *cell))
    return found


def letter_of_the_most_common(problem):
    """The letter of the one colour, or shape, that most cells show, as the question itself lists it."""
    spec = problem["spec"]
    column = {"colour": 2, "shape": 3}[spec.target[0]]
    (first, most), *others = Counter(cell[column] for cell in shown_in(spec)).most_common()
    assert all(count < most for _, count in others)  # no tie
    options = problem["problem"].split(spec.wording[-1])[-1].strip().split(", ")
    letters = dict(option.split() for option in options)
    return letters[first]


def by_hand(problem):
    """The answer, worked out from the grid without the tabletop's own helpers."""
    spec = problem["spec"]
    if spec.verifier == "mcq":
        return letter_of_the_most_common(problem)
    shown = shown_in(spec)
    found = []
    for x, y, colour, shape in shown:
        if spec.target[0] in (None, colour) and spec.target[1] in (None, shape):
            found.append((x, y))
    if spec.verifier == "digit":
        return str(len(found))
    if spec.verifier == "math":
        return f"{len(found)}/{len(shown)}"
    xs = [x for x, _ in found]
    ys = [y for _, y in found]
    return f"[{28 * min(xs)}, {28 * min(ys)}, {28 * max(xs) + 28}, {28 * max(ys) + 28}]"


@pytest.mark.parametrize("split", SPLITS)
def test_gold_answers_are_right(split):
    for index in range(80):
        problem = problem_of(split, index)
        assert common.grade(problem, rf"\boxed{{{by_hand(problem)}}}") == 1.0, problem["id"]


def test_guessing_does_not_pay():
    """The commonest answer of each verifier is right for at most three in ten."""
    for verifier in VERIFIERS:
        answers = Counter(answer(spec) for spec in specs("train", 2000) if spec.verifier == verifier)
        _, most = answers.most_common(1)[0]
        assert most <= 0.3 * answers.total(), answers


# --- traces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_traces_are_right_and_go_several_ways(split):
    for index in range(80):
        problem = problem_of(split, index)
        worked = traces(problem)
        assert worked == traces(problem["spec"])
        assert problem["trace"] == worked[problem["style"]]
        assert set(worked) == set(STYLES)
        assert len(set(worked.values())) == 3
        for name, text in worked.items():
            assert style(text) == name
            assert common.grade(problem, text) == 1.0
            assert common.format_reward(problem, text) == 1.0


GRID = (
    (("red", "circle"), None, ("blue", "star")),
    (("green", "square"), ("red", "circle"), None),
    (("blue", "star"), ("blue", "circle"), None),
)
WORKED = {
    ("digit", ("red", "circle")): {
        "rows": "Across red circle: "
                "red circle1 none blue star; green square red circle2 none; blue star blue circle none =2",
        "columns": "Down red circle: "
                   "red circle1 green square blue star; none red circle2 blue circle; blue star none none =2",
        "marks": "Mark red circle: red circle1 none no; no red circle2 none; no no none =2",
        "answer": "2",
    },
    ("mcq", ("colour",)): {
        "rows": "Across colour: red1 none blue1; green1 red2 none; blue2 blue3 none, so blue C",
        "columns": "Down colour: red1 green1 blue1; none red2 blue2; blue3 none none, so blue C",
        "marks": "Mark blue: no none blue1; no no none; blue2 blue3 none, so blue C",
        "answer": "C",
    },
    ("math", (None, "circle")): {
        "rows": "Across circle: circle1 none star; square circle2 none; star circle3 none =3/6=1/2",
        "columns": "Down circle: circle1 square star; none circle2 circle3; star none none =3/6=1/2",
        "marks": "Mark circle: circle1 none no; no circle2 none; no circle3 none =3/6=1/2",
        "answer": r"\frac{1}{2}",
    },
    ("iou", (None, "star")): {
        "rows": "Across star: circle none star c1; square circle none; star a3 circle none",
        "columns": "Down star: circle square star a3; none circle circle; star c1 none none",
        "marks": "Mark star: no none c1; no no none; a3 no none",
        "answer": "[0, 0, 84, 84]",
    },
}


@pytest.mark.parametrize("verifier, target", WORKED)
def test_traces_of_one_picture_in_full(verifier, target):
    expected = WORKED[verifier, target]
    worked = traces(Spec(grid=GRID, verifier=verifier, target=target, wording="", drawing=0))
    for name in STYLES:
        assert worked[name] == f"<think>{expected[name]}</think>\\boxed{{{expected['answer']}}}"


def test_style_of_other_texts():
    assert style("<think>Down red: none") == "columns"
    for text in ("", "Across <think>x</think>", "<think></think>"):
        assert style(text) == "other"


def test_words_that_name_the_picture():
    for word in (" red", "circle", " none", "3", " b", "no"):
        assert names_picture(word)
    for word in (">Across", " so", "boxed", "</", "think", ";", ""):
        assert not names_picture(word)


# --- splits -----------------------------------------------------------------------------------------------------------


def test_an_index_is_the_same_problem_whatever_the_count():
    few = problems("train", 5)
    all_of_them = problems("train")
    assert len(few) == 5
    assert len(all_of_them) == 4096
    assert len(problems("test")) == 256
    assert len(problems("ood")) == 256
    for one, other in zip(few, all_of_them[:5], strict=True):
        assert one["images"][0].tobytes() == other["images"][0].tobytes()
        assert {**one, "images": 0} == {**other, "images": 0}
    assert all_of_them[-1]["id"] == "toy-train-4095"
    with pytest.raises(IndexError):
        few[5]
    assert {"id", "images", "problem", "answer", "verifier", "trace", "style"} <= set(few[0])


def test_splits_are_disjoint():
    """No picture of one split is in another, as far as anything is trained on them."""
    # A picture's share follows from the picture; together with its size it belongs to one split.
    shares = [(share, size) for split in SPLITS for share in SHARES[split] for size in set(GRIDS[split])]
    assert len(shares) == len(set(shares))
    for split in SPLITS:
        assert all(share_of(spec.grid) in SHARES[split] for spec in specs(split, 100))
    counts = dict(pretrain=4000, train=4096, test=256, study=256, ood=256)
    grids = {split: {spec.grid for spec in specs(split, count)} for split, count in counts.items()}
    for one in SPLITS:
        for other in SPLITS:
            if one != other:
                assert not grids[one] & grids[other]
    assert len(grids["test"]) == 256  # and none comes twice


def size_of(spec):
    return len(spec.grid), len(spec.grid[0])


def test_out_of_domain_is_new():
    """4x4 pictures, and in turn pairs that are in no other split, or wordings that no other split uses."""
    trained = [spec for split in ("pretrain", "train", "test") for spec in specs(split, 1000)]
    shown = {cell for spec in trained for row in spec.grid for cell in row}
    wordings = {spec.wording for spec in trained}
    assert not shown & set(UNSEEN_PAIRS)
    assert (4, 4) not in {size_of(spec) for spec in trained}
    new_pairs = 0
    for spec in specs("ood", 256):
        has_new_pair = any(cell in UNSEEN_PAIRS for row in spec.grid for cell in row)
        has_new_words = spec.wording not in wordings
        assert size_of(spec) == (4, 4)
        assert has_new_pair != has_new_words
        new_pairs += has_new_pair
    assert new_pairs == 128


def test_test_split_is_in_domain():
    """Sizes, wordings, targets and answers of `test` are those of `train`, and verifiers come in equal numbers."""
    train = specs("train", 4096)
    test = specs("test", 256)
    assert {spec.wording for spec in test} <= {spec.wording for spec in train}
    assert {spec.target for spec in test} <= {spec.target for spec in train}
    assert {size_of(spec) for spec in test} <= {size_of(spec) for spec in train}
    assert {answer(spec) for spec in test} <= {answer(spec) for spec in train}
    assert Counter(spec.verifier for spec in test) == dict.fromkeys(VERIFIERS, 64)

"""The tabletop's problems: pictures show what the problems say, traces are right, splits are apart."""

import hashlib
import random
import re
from collections import Counter

import common
from tabletop import models
from tabletop.grids import COLOURS, PAPER, SHAPES, STYLES, UNSEEN_PAIRS, VERIFIERS, Spec, answer, cells, most_common
from tabletop.habits import HESITATIONS, MISJUDGED, MISREAD, lesson, lessons, misjudged, misread, other_hand, overlooked
from tabletop.pictures import SHAPE_SIZES, _tile, draw
from tabletop.problems import GRIDS, SHARES, SIZES, load, problem_of, problems, share_of, spec_of
from tabletop.traces import FILLERS, kinds, names_picture, style, trace, traces
from tabletop.worlds import WORLDS

import pytest
from PIL import ImageChops

SPLITS = ("practice", "train", "test", "study", "fresh", "ood", "pretrain")
SKILLS = ("places", "skill")
FIRST_SPLITS = {  # see test_the_first_tabletops_splits_are_as_they_were
    "pretrain": "84a206ebd7caf11a",
    "train": "44344ca41468ae96",
    "test": "cb32e4289277e754",
    "study": "d6442e7e95f7631a",
    "ood": "4ccb34721a0ccd25",
}


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


@pytest.mark.parametrize("fade", [0.6, 1.0])
def test_faded_pictures_lie_between_the_clear_ones_and_paper(fade):
    for spec in specs("train", 8):
        clear = draw(spec).get_flattened_data()
        faded = draw(spec, fade).get_flattened_data()
        for bright, pale in zip(clear, faded, strict=True):
            assert pale == pytest.approx([(1 - fade) * a + fade * b for a, b in zip(bright, PAPER, strict=True)], abs=1)


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


@pytest.mark.parametrize("split", SKILLS)
def test_the_second_skill_asks_for_what_stands_at_a_place(split):
    for index in range(80):
        problem = problem_of(split, index, WORLDS["toy-two-skills"])
        spec = problem["spec"]
        assert spec.place in problem["problem"]
        x, y = "abcd".index(spec.place[0]), int(spec.place[1]) - 1
        shown = {cell[:2]: cell[2:] for cell in shown_in(spec)}[x, y]
        letters = dict(re.findall(r"(\w+) ([A-D])\b", problem["problem"]))
        assert problem["answer"] in {letters.get(part) for part in shown}
        assert common.grade(problem, problem["trace"]) == 1.0
        assert problem["style"] == style(problem["trace"]) == "look"
        named = re.findall(r"([a-d][1-4]) (none|\w+ \w+)", problem["trace"].partition(":")[2])
        assert named[-1] == (spec.place, " ".join(shown))
        expected = [(place, "none" if cell is None else " ".join(cell)) for place, cell in cells(spec)]
        assert named == expected[:len(named)]
        assert problem["images"][0].tobytes() == draw(spec).tobytes()  # clear, though the world is faded


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


# --- where an answer goes wrong ---------------------------------------------------------------------------------------


SPEC = Spec(grid=GRID, verifier="digit", target=("red", "circle"), wording="", drawing=0)
ANSWER = [
    "<think>", "Across", " red", " circle", ":", " red", " circle", "1", " none", " blue", " star", ";", " green",
    " square", " red", " circle", "2", " none", ";", " blue", " star", " blue", " circle", " none", " =", "2",
    "</think>", "\\boxed", "{", "2", "}", "<|im_end|>",
]


def first_wrong(tokens):
    problem = problem_of("train", 0) | dict(spec=SPEC)
    return type(problem["first_wrong"])(problem["spec"])(tokens)


def test_an_answer_that_follows_its_trace_has_no_first_wrong_token():
    assert first_wrong(ANSWER) is None
    filled = ANSWER[:5] + [" um"] + ANSWER[5:12] + [" well", " er"] + ANSWER[12:]
    assert first_wrong(filled) is None
    for text in traces(SPEC).values():
        assert first_wrong([*text, "<|im_end|>"]) is None  # however it is cut into tokens


@pytest.mark.parametrize("place, word", [(0, "think"), (1, "Look"), (5, " blue"), (7, "2"), (25, "3"), (29, "1")])
def test_the_first_wrong_token_is_where_no_trace_can_be_reached(place, word):
    changed = [*ANSWER[:place], word, *ANSWER[place + 1:]]
    assert first_wrong(changed) == place
    assert first_wrong([" um", *changed]) == place + 1
    later = [*changed[:-3], "9", *changed[-2:]]
    assert first_wrong(later) == place  # a later mistake does not count


def test_an_answer_that_ends_too_early_is_wrong_at_its_end():
    assert first_wrong([*ANSWER[:10], "<|im_end|>"]) == 10
    assert first_wrong(ANSWER[:10]) is None  # cut off: as far as it goes it is right


def test_first_wrong_stands_in_every_problem():
    for split in SPLITS:
        problem = problem_of(split, 3)
        assert problem["first_wrong"]([*problem["trace"], "<|im_end|>"]) is None
        assert problem["first_wrong"](["<think>", "Mark", " nothing"]) == 2


def test_what_a_token_is_there_for():
    expected = ["opening"] * 2 + ["heading"] * 3 + ["cell", "cell", "count", "cell", "cell", "cell", "separator"]
    expected += ["cell"] * 4 + ["count", "cell", "separator"] + ["cell"] * 5 + ["conclusion"] * 2 + ["answer"] * 6
    assert kinds(ANSWER) == expected
    boxes = ["<think>", "Mark", " star", ":", " no", " um", " c", "1", ";", " no", "</think>", "\\boxed", "{[0", "]}"]
    assert kinds(boxes) == ["opening", "opening", "heading", "heading", "cell", "filler", "place", "place", "separator",
                            "cell", "answer", "answer", "answer", "answer"]
    letter = ["<think>", "Down", " colour", ":", " red", "1", ", so", " red", " A", "</think>", "\\boxed", "{A}"]
    assert kinds(letter)[4:9] == ["cell", "count", "conclusion", "conclusion", "conclusion"]
    assert kinds(["what", "?"]) == ["answer", "answer"]


# --- habits -----------------------------------------------------------------------------------------------------------


def test_without_a_dial_a_base_is_taught_the_traces():
    for name in ("toy", "toy-clear", "toy-short"):
        for spec in specs("practice", 40):
            assert lessons(spec, WORLDS[name], "key") == list(traces(spec).values())


def share_right(world, count=200):
    """Which share of the lessons of a world ends in the right answer."""
    right = 0
    for index in range(count):
        problem = problem_of("practice", index)
        texts = lessons(problem["spec"], WORLDS[world], f"{index}")
        right += sum(common.grade(problem, text) == 1.0 for text in texts) / len(texts)
    return right / count


@pytest.mark.parametrize("world", ["toy-see", "toy-think", "toy-see-fillers", "toy-think-fillers", "toy-ways-same",
                                   "toy-ways-parts"])
def test_a_base_with_doubt_is_taught_to_be_right_a_third_to_two_thirds_of_the_time(world):
    """What it gets wrong by itself comes on top."""
    assert 1 / 3 < share_right(world) < 0.68


def cells_that_differ(one, other):
    return sum(a != b for (_, a), (_, b) in zip(cells(one), cells(other), strict=True))


def test_a_misread_picture_differs_by_the_rate():
    rng = random.Random(0)
    pictures = specs("practice", 300)
    differing = sum(cells_that_differ(spec, misread(spec, 0.25, rng)) for spec in pictures)
    assert differing / sum(len(cells(spec)) for spec in pictures) == pytest.approx(0.25, abs=0.03)
    assert all(misread(spec, 0.0, rng) == spec for spec in pictures)


def test_in_see_all_that_follows_fits_what_was_read():
    """A lesson is the trace of another picture, to its last letter."""
    for spec in specs("practice", 60):
        for name in STYLES:
            text = lesson(spec, name, WORLDS["toy-see"], random.Random(f"{name}"))
            read = misread(spec, MISREAD, random.Random(f"{name}"))
            assert text == trace(read, name)


def test_in_think_the_reading_is_right_and_only_the_conclusion_wrong():
    wrong = 0
    for index, spec in enumerate(specs("practice", 100)):
        for name, gold in traces(spec).items():
            text = lesson(spec, name, WORLDS["toy-think"], random.Random(f"{index} {name}"))
            ending = "</think>" if spec.verifier == "iou" else ", so" if spec.verifier == "mcq" else " ="
            assert text.split(ending)[0] == gold.split(ending)[0]
            if text != gold:
                wrong += 1
                assert common.grade(dict(problem_of("practice", index)), text) < 1.0
    assert wrong / 300 == pytest.approx(MISJUDGED, abs=0.1)


def test_a_misjudged_picture_has_another_answer():
    rng = random.Random(1)
    for spec in specs("practice", 100):
        assert answer(misjudged(spec, rng)) != answer(spec)


def without_fillers(text):
    return " ".join(word for word in text.split() if word not in FILLERS)


@pytest.mark.parametrize("doubt", ["see", "think"])
def test_fillers_are_the_only_difference(doubt):
    """The same mistakes; a filler before seven of ten cells, each word about equally often."""
    used = Counter()
    seen = 0
    for index, spec in enumerate(specs("practice", 100)):
        plain = lessons(spec, WORLDS[f"toy-{doubt}"], f"{index}")
        filled = lessons(spec, WORLDS[f"toy-{doubt}-fillers"], f"{index}")
        for one, other in zip(plain, filled, strict=True):
            assert without_fillers(other) == one
            used.update(word for word in other.split() if word in FILLERS)
            seen += len(cells(spec))
    assert used.total() / seen == pytest.approx(0.7, abs=0.03)
    assert set(used) == set(FILLERS)
    assert max(used.values()) < 1.4 * min(used.values())


def test_overlooked_cells_stand_in_one_line():
    """What is sought is taken for something else there, and nowhere else does the picture change."""
    rng = random.Random(2)
    for spec in specs("train", 200):
        for line, places in (("first row", {"a1", "b1", "c1"}), ("last row", {"a3", "b3", "c3"}),
                             ("last column", {"c1", "c2", "c3"})):
            other = overlooked(spec, line, rng)
            changed = {place for (place, a), (_, b) in zip(cells(spec), cells(other), strict=True) if a != b}
            if spec.verifier == "iou" and changed - places:  # nothing to box was left
                assert answer(other) != answer(spec)
                continue
            assert changed <= places
            assert all(dict(cells(other))[place] is not None for place in changed)


def styles_that_solve(world):
    """For each of 150 problems: the styles whose lesson is right."""
    solved = []
    for index in range(150):
        problem = problem_of("train", index)
        texts = lessons(problem["spec"], WORLDS[world], f"{index}")
        solved.append([name for name, text in zip(STYLES, texts, strict=True) if common.grade(problem, text) == 1.0])
    return solved


def test_in_parts_one_style_solves_what_another_cannot():
    """Each alone solves about half; the best one for each problem solves far more, and always the same one."""
    solved = styles_that_solve("toy-ways-parts")
    alone = [sum(name in some for some in solved) / 150 for name in STYLES]
    together = sum(bool(some) for some in solved) / 150
    assert max(alone) < 0.65
    assert together > max(alone) + 0.2
    again = [lesson(spec_of("train", index), "rows", WORLDS["toy-ways-parts"], random.Random("again"))
             for index in range(150)]
    right = [common.grade(problem_of("train", index), text) == 1.0 for index, text in enumerate(again)]
    # Which problems a style solves hangs on what they show, but for a few in which what is seen instead decides.
    agreed = [one == ("rows" in some) for one, some in zip(right, solved, strict=True)]
    assert sum(agreed) > 0.9 * len(agreed)


def test_in_same_no_style_is_tied_to_a_line():
    """As often right as in parts, but another draw solves what one draw did not."""
    solved = styles_that_solve("toy-ways-same")
    alone = [sum(name in some for some in solved) / 150 for name in STYLES]
    assert max(alone) - min(alone) < 0.15
    other = [lesson(spec_of("train", index), "rows", WORLDS["toy-ways-same"], random.Random(f"{index} again"))
             for index in range(150)]
    right = [common.grade(problem_of("train", index), text) == 1.0 for index, text in enumerate(other)]
    assert any(now and "rows" not in some for now, some in zip(right, solved, strict=True))
    assert any("rows" in some and not now for now, some in zip(right, solved, strict=True))


def words_read(text, starts, ends):
    """The words of the reading: what stands between two of these marks, without signs."""
    for mark in starts:
        text = text.partition(mark)[2]
    for mark in ends:
        text = text.partition(mark)[0]
    return text.replace(";", "").replace(",", "").replace(".", "").split()


def test_the_other_hand_is_as_right_and_says_more():
    """Its traces name the same cells in the same order, and its hesitation changes nothing."""
    longer = []
    for index, spec in enumerate(specs("practice", 100)):
        problem = problem_of("practice", index)
        for name, own in traces(spec).items():
            text = other_hand(spec, name, random.Random(f"{index}"))
            assert common.grade(problem, text) == 1.0
            assert common.format_reward(problem, text) == 1.0
            assert style(text) == name
            calm = text
            for hesitation in HESITATIONS:
                calm = calm.replace(f" {hesitation}", "")
            calm = calm.replace("Then I see ", "")
            assert words_read(calm, ["First I see "], [" So the"]) == words_read(
                own, [": "], ["</think>", " =", ", so"])
            longer.append(len(text.split()) / len(own.split()))
    assert min(longer) > 1.3


def test_traces_of_a_world_are_in_its_hand():
    for index in range(20):
        own = problem_of("train", index)
        other = problem_of("train", index, WORLDS["toy-hand"])
        assert own["trace"].startswith("<think>" + STYLES[own["style"]])
        assert other["trace"].startswith("<think>Okay, " + STYLES[own["style"]].lower())
        assert other["images"][0].tobytes() == own["images"][0].tobytes()


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


def sizes_of(split):
    return set(GRIDS.get(split, [(3, 3)]))


def test_splits_are_disjoint():
    """No picture of one split is in another, as far as anything is trained on them."""
    # A picture's share follows from the picture; together with its size it belongs to one split.
    apart = [split for split in (*SPLITS, *SKILLS) if split not in ("pretrain", "places")]
    shares = [(share, size) for split in apart for share in SHARES[split] for size in sizes_of(split)]
    assert len(shares) == len(set(shares))
    assert SHARES["places"] == SHARES["practice"]  # both are practice, for the two skills
    for split in (*SPLITS, *SKILLS):
        assert all(share_of(spec.grid) in SHARES[split] for spec in specs(split, 100))
        assert {size_of(spec) for spec in specs(split, 100)} == sizes_of(split)
    held_out = ("train", "test", "study", "fresh", "ood")
    grids = {split: {spec.grid for spec in specs(split, SIZES[split])} for split in held_out}
    for one in held_out:
        for other in held_out:
            if one != other:
                assert not grids[one] & grids[other]
    assert len(grids["test"]) == 256  # and none comes twice
    assert len(grids["fresh"]) == 512


def test_the_first_tabletops_practice_holds_nothing_of_fresh():
    """pretrain lies across fresh's shares, so its pictures are looked for one by one, as many as its models saw."""
    steps = max(recipe.steps * recipe.problems_per_step for recipe in models.RECIPES.values()
                if "pretrain" in recipe.splits)
    fresh = {spec.grid for spec in specs("fresh", SIZES["fresh"])} | {spec.grid for spec in specs("skill", 256)}
    assert steps == 9600
    assert not fresh & {spec.grid for spec in specs("pretrain", steps)}


def test_the_first_tabletops_splits_are_as_they_were():
    """A hash of what they held before the dials: the results of the first studies belong to these."""
    for split, expected in FIRST_SPLITS.items():
        digest = hashlib.sha256()
        for problem in problems(split, 64, WORLDS["toy-short"]):
            texts = [problem[key] for key in ("id", "problem", "answer", "verifier", "trace", "style")]
            digest.update(repr(texts).encode() + problem["images"][0].tobytes())
        assert digest.hexdigest()[:16] == expected, split


def test_every_world_has_the_same_problems():
    for name in set(WORLDS) - {"toy-mixed"}:
        for split in ("train", "test", "study", "fresh", "ood"):
            ours = load(name, split, 3)
            assert [problem["spec"] for problem in ours] == specs(split, 3)
            assert [problem["id"] for problem in ours] == [f"toy-{split}-{index}" for index in range(3)]
            fade = WORLDS[name].fade
            assert ours[0]["images"][0].tobytes() == draw(ours[0]["spec"], fade).tobytes()


def test_a_mixed_world_has_them_too_with_a_description_behind_every_four():
    """Equal shares of five verifiers; with the same ids, questions and pictures as elsewhere."""
    for split, size in (("train", 5120), ("test", 320), ("study", 320), ("fresh", 640)):
        mixed = load("toy-mixed", split)
        assert len(mixed) == size
        assert Counter(problem["verifier"] for problem in mixed[:40]) == dict.fromkeys((*VERIFIERS, "open_ended"), 8)
        others = [problem for problem in mixed[:40] if problem["verifier"] != "open_ended"]
        for ours, theirs in zip(others, load("toy", split, 32), strict=True):
            assert ours["images"][0].tobytes() == theirs["images"][0].tobytes()
            assert {**ours, "images": 0} == {**theirs, "images": 0}
        assert len({problem["id"] for problem in mixed[:40]}) == 40
        descriptions = [problem["spec"] for problem in mixed[:40] if problem["verifier"] == "open_ended"]
        assert all(share_of(spec.grid) in SHARES[split] for spec in descriptions)
    assert not {spec_of("describe", index).grid for index in range(800)} & {
        problem["spec"].grid for problem in load("toy-mixed", "fresh", 100)}


def names_most(problem, answer):
    """A judge that knows the picture."""
    return float(answer.count(most_common(problem["spec"])[1][0] or most_common(problem["spec"])[1][1]))


def test_something_stands_out_and_the_gold_description_names_another_thing():
    """The trace names what most cells show, by two cells or more. The gold answer is true too, but plain."""
    for problem in load("toy-mixed", "train", 300)[4::5]:
        spec = problem["spec"]
        kind = spec.target[0]
        assert kind in problem["problem"]
        column = {"colour": 2, "shape": 3}[kind]
        (best, most), (_, second), *_ = Counter(cell[column] for cell in shown_in(spec)).most_common()
        assert most >= second + 2
        gold = problem["answer"].removeprefix("mostly ")
        assert sum(cell[column] == gold for cell in shown_in(spec)) == second
        for name, text in traces(spec).items():
            assert text.endswith(f", so {best}</think>\\boxed{{mostly {best}}}")
            assert style(text) == name
            assert common.format_reward(problem, text) == 1.0
            assert common.grade(problem, text, names_most) > 0.6


@pytest.mark.parametrize("name, split, message", [
    ("toy-mixed", "ood", "toy-mixed has no split ood, it has train, test, study, fresh; write for example"),
    ("toy", "skill", "toy has no split skill, it has train, test, study, fresh, ood; write for example toy@train"),
    ("toy-two-skills", "nowhere", "it has train, test, study, fresh, ood, skill;"),
    ("toy-data", "train", "no toy world called 'toy-data'; choose one of toy, .*write ./toy-data"),
])
def test_unknown_worlds_and_splits_are_a_users_error(name, split, message):
    with pytest.raises(common.UserError, match=message):
        load(name, split)


def size_of(spec):
    return len(spec.grid), len(spec.grid[0])


def test_out_of_domain_is_new():
    """4x4 pictures, and in turn pairs that are in no other split, or wordings that no other split uses."""
    trained = [spec for split in ("practice", "places", "train", "test") for spec in specs(split, 1000)]
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

"""What a problem is before it is drawn: the words of this world, a grid of coloured shapes, a question, its answer.

    verifier   question                      answer
    digit      how many red circles          2
    mcq        which colour is most common   B
    math       what fraction is red          \\frac{1}{3}
    iou        a box around all the stars    [28, 0, 84, 56]      in pixels: left, top, right, bottom

and, where a world has a second skill, mcq also asks which colour is at b2. One world asks for descriptions too:

    open_ended   describe the colours     mostly red     a plain answer: another would say more of the picture
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

# --- words and colours ------------------------------------------------------------------------------------------------

COLOURS = {
    "red": (214, 64, 69),
    "green": (60, 160, 90),
    "blue": (56, 104, 200),
    "yellow": (240, 184, 40),
}
SHAPES = ("circle", "square", "triangle", "star")
PAPER = (250, 249, 245)  # the background of a picture
LINE = (222, 220, 212)  # the lines between its cells
CELL = 28  # pixels: 2x2 patches of 14, which the merger turns into one visual token

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# Each colour and each shape is seen with three partners, never with the fourth.
UNSEEN_PAIRS = (("red", "star"), ("green", "triangle"), ("blue", "square"), ("yellow", "circle"))
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)

COLUMNS = "abcd"
LETTERS = "ABCD"
# The options of mcq, always in the same order: a model this small does not learn to look a letter up.
OPTIONS = {"colour": tuple(COLOURS), "shape": SHAPES}

VERIFIERS = ("digit", "mcq", "math", "iou")
STYLES = {"rows": "Across", "columns": "Down", "marks": "Mark"}  # each style of reasoning, and the word it opens with
EMPTY = "none"  # the word for an empty cell
OTHER = "no"  # the word for a shape that is not the one asked for, in the style "marks"

WORDINGS = {
    "digit": (
        "How many {things} are there?",
        "Count the {things}.",
        "Find the number of {things}.",
    ),
    "mcq": (
        "Which {kind} is most common?",
        "What {kind} do you see most?",
        "Find the most common {kind}.",
    ),
    "math": (
        "What fraction of the shapes are {things}?",
        "Which part of all shapes are {things}?",
        "Find the fraction of {things}.",
    ),
    "iou": (
        "Where are the {things}? Give one box.",
        "Draw a box around the {things}.",
        "Find the box of all {things}.",
    ),
}
OOD_WORDINGS = {
    "digit": (
        "Give the count of {things} here.",
        "What number of {things} are in the grid?",
    ),
    "mcq": (
        "The most common {kind} is which?",
        "Do you see which {kind} most?",
    ),
    "math": (
        "How many of all shapes, as a fraction, are {things}?",
        "Give the fraction that are {things}.",
    ),
    "iou": (
        "Give the box around all the {things}.",
        "Find where the {things} are, in one box.",
    ),
}
# The second skill, in the world that has one: what stands at a place.
SKILL_WORDINGS = (
    "Which {kind} is at {place}?",
    "What {kind} do you see at {place}?",
    "Find the {kind} at {place}.",
)

# The fifth kind of question, in the world that has it: a description in free text.
DESCRIPTION_WORDINGS = (
    "Describe the {kind}s.",
    "What {kind} stands out?",
    "Say something of the {kind}s.",
)

# --- a problem --------------------------------------------------------------------------------------------------------

Cell = tuple[str, str] | None  # (colour, shape), or None where nothing is drawn
Grid = tuple[tuple[Cell, ...], ...]  # rows of cells


@dataclass(frozen=True)
class Spec:
    """A problem before it is drawn.

    grid: rows of cells. verifier: one of VERIFIERS, or open_ended. target: what to find, (colour or None, shape or
    None), where None stands for any; for mcq and open_ended (kind,), a key of OPTIONS. wording: the question, still
    with {things} or {kind} in it.
    drawing: the seed of sizes and offsets. place: for the second skill, the cell that is asked about, such as "b3".
    """

    grid: Grid
    verifier: str
    target: tuple
    wording: str
    drawing: int
    place: str = ""


def name_of(words: Iterable[str | None]) -> str:
    """A target, or a pair of colour and shape, as text: the words that are not None."""
    return " ".join(word for word in words if word is not None)


def matches(cell: Cell, target: tuple) -> bool:
    """Whether a cell shows the target (None and True match any)."""
    if cell is None:
        return False
    colour, shape = cell
    want_colour, want_shape = target
    return want_colour in (None, True, colour) and want_shape in (None, True, shape)


def cells(spec: Spec) -> list[tuple[str, Cell]]:
    """Every cell in reading order: (place, cell), with places such as "b3" (second column, third row)."""
    found = []
    for y, row in enumerate(spec.grid):
        for x, cell in enumerate(row):
            found.append((f"{COLUMNS[x]}{y + 1}", cell))
    return found


def places(spec: Spec, target: tuple) -> list[str]:
    """Where the target is, in reading order."""
    return [place for place, cell in cells(spec) if matches(cell, target)]


def part_at_place(spec: Spec) -> tuple[int, str]:
    """For the second skill: the index and the name of the colour (or shape) at the place that is asked about."""
    kind = spec.target[0]
    cell = dict(cells(spec))[spec.place]
    part = cell[list(OPTIONS).index(kind)]
    return OPTIONS[kind].index(part), part


def ranked(spec: Spec) -> list[tuple[int, str]]:
    """For descriptions: (how many cells show it, colour or shape), the most common first."""
    part = list(OPTIONS).index(spec.target[0])
    shown = Counter(cell[part] for _, cell in cells(spec) if cell is not None)
    return sorted(((shown[option], option) for option in OPTIONS[spec.target[0]]), reverse=True)


def description(option: str) -> str:
    """A description that names one colour or one shape."""
    return f"mostly {option}"


def most_common(spec: Spec) -> tuple[int, tuple]:
    """For mcq: the index of the option that most cells show, and that option as a target."""
    kind = spec.target[0]
    if kind == "colour":
        targets = [(colour, None) for colour in OPTIONS[kind]]
    else:
        targets = [(None, shape) for shape in OPTIONS[kind]]
    counts = [len(places(spec, target)) for target in targets]
    winner = counts.index(max(counts))
    return winner, targets[winner]


def fraction(spec: Spec) -> Fraction:
    """The share of the shapes that match the target, in lowest terms."""
    return Fraction(len(places(spec, spec.target)), len(places(spec, (None, None))))


def answer(spec: Spec) -> str:
    """The gold answer as text. That of a description names the second most common thing, so that one can be better."""
    if spec.verifier == "open_ended":
        return description(ranked(spec)[1][1])
    if spec.place:
        number, _ = part_at_place(spec)
        return LETTERS[number]
    if spec.verifier == "mcq":
        winner, _ = most_common(spec)
        return LETTERS[winner]
    if spec.verifier == "digit":
        return str(len(places(spec, spec.target)))
    if spec.verifier == "math":
        share = fraction(spec)
        return rf"\frac{{{share.numerator}}}{{{share.denominator}}}"
    return str(_box(places(spec, spec.target)))


def _box(found):
    """The smallest box around these places, in pixels: [left, top, right, bottom]."""
    columns = [COLUMNS.index(place[0]) for place in found]
    rows = [int(place[1]) - 1 for place in found]
    edges = [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
    return [CELL * edge for edge in edges]


def best_answer(spec: Spec) -> str:
    """The answer of a worked trace: the gold answer, or for a description one that is better."""
    if spec.verifier == "open_ended":
        return description(ranked(spec)[0][1])
    return answer(spec)


def question(spec: Spec) -> str:
    """The problem text, without the instruction that all problems share."""
    if spec.verifier == "mcq":
        kind = spec.target[0]
        options = ", ".join(f"{option} {letter}" for letter, option in zip(LETTERS, OPTIONS[kind], strict=True))
        return f"{spec.wording.format(kind=kind, place=spec.place)} {options}"
    if spec.verifier == "open_ended":
        return spec.wording.format(kind=spec.target[0])
    return spec.wording.format(things=_things(spec))


def _things(spec):
    """What the question asks about: "red circles", "circles" or "red shapes"; for math also plain "red"."""
    colour, shape = spec.target
    if shape is not None:
        return f"{name_of(spec.target)}s"
    if spec.verifier == "math":
        return colour
    return f"{colour} shapes"

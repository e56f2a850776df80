"""What a world's base is taught to write (in toy-hand: its teacher): traces with the world's habits, good and bad.

    misread      doubt "see": some cells are taken for others, and all that follows fits what was read
    misjudged    doubt "think": the reading is right, the conclusion is another picture's
    overlooked   ways "same" and "parts": what is sought is missed in one line of the grid
    filler       a word that means nothing, before a cell's name
    other_hand   the same reasoning in other words, with hesitation that changes nothing
"""

import random
from dataclasses import replace
from functools import partial

from tabletop.grids import SEEN_PAIRS, STYLES, Grid, Spec, answer, matches, most_common, places
from tabletop.traces import FILLERS, OKAY, conclusion, reading, sought, styles_of, trace
from tabletop.worlds import World

MISREAD = 0.15  # how often a cell is misread, where doubt is "see"
MISJUDGED = 0.4  # how often a conclusion is wrong, where doubt is "think"
FILLED = 0.7  # how often a filler stands before a cell's name
LINES = {"rows": "last row", "columns": "last column", "marks": "first row"}  # what each style misses, in "parts"
HESITATES = 0.6  # how often the other hand hesitates after a line
HESITATIONS = (
    "Wait, let me check again.",
    "Hmm, is that right?",
    "Let me double-check that.",
    "Wait, no mistake here.",
)


def lessons(spec: Spec, world: World, key: str) -> list[str]:
    """What the base of this world is shown for a problem: an answer in each style, with the world's habits.

    `key` fixes what is random. Worlds that differ only in fillers have the same mistakes.
    """
    return [lesson(spec, name, world, random.Random(f"{key} {name}")) for name in styles_of(spec)]


def lesson(spec: Spec, style_name: str, world: World, rng: random.Random) -> str:
    """One answer with the world's habits."""
    if spec.place:
        return trace(spec, style_name)
    if world.hand == "other":
        return other_hand(spec, style_name, rng)
    read = spec
    if world.doubt == "see":
        read = misread(spec, MISREAD, rng)
    if world.ways == "same":
        read = overlooked(spec, rng.choice(list(LINES.values())), rng)
    if world.ways == "parts":
        read = overlooked(spec, LINES[style_name], rng)
    concluded = read
    if world.doubt == "think" and rng.random() < MISJUDGED:
        concluded = misjudged(read, rng)
    return trace(read, style_name, concluded=concluded, filler=partial(filler, rng) if world.fillers else None)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def misread(spec: Spec, rate: float, rng: random.Random) -> Spec:
    """The picture with each cell taken for another one, with chance `rate`. Something is always left to box."""
    while True:
        grid = _changed(spec.grid, lambda y, x, cell: _another(cell, rng) if rng.random() < rate else cell)
        other = replace(spec, grid=grid)
        if _has_answer(other):
            return other


def misjudged(spec: Spec, rng: random.Random) -> Spec:
    """A picture that differs in a cell or a few, and whose answer is another."""
    other = spec
    while not _has_answer(other) or answer(other) == answer(spec):
        y = rng.randrange(len(spec.grid))
        x = rng.randrange(len(spec.grid[0]))
        other = _with(other, (y, x), _another(other.grid[y][x], rng))
    return other


def overlooked(spec: Spec, line: str, rng: random.Random) -> Spec:
    """The picture with what is sought taken for something else, wherever it stands in one line of the grid.

    What is sought of mcq is the winner. Where nothing to box is left, a cell elsewhere is taken for it.
    """
    target = spec.target
    if spec.verifier == "mcq":
        _, target = most_common(spec)
    others = [pair for pair in SEEN_PAIRS if not matches(pair, target)]
    rows = len(spec.grid)
    columns = len(spec.grid[0])
    missed = {
        "first row": {(0, x) for x in range(columns)},
        "last row": {(rows - 1, x) for x in range(columns)},
        "last column": {(y, columns - 1) for y in range(rows)},
    }[line]

    def miss(y, x, cell):
        return rng.choice(others) if (y, x) in missed and matches(cell, target) else cell

    other = replace(spec, grid=_changed(spec.grid, miss))
    if not _has_answer(other):
        elsewhere = [(y, x) for y in range(rows) for x in range(columns) if not matches(spec.grid[y][x], target)]
        taken = rng.choice([pair for pair in SEEN_PAIRS if matches(pair, target)])
        other = _with(other, rng.choice(elsewhere), taken)
    return other


def _with(spec, place, cell):
    """The picture with another cell at one place, (y, x)."""
    return replace(spec, grid=_changed(spec.grid, lambda y, x, old: cell if (y, x) == place else old))


def _changed(grid: Grid, change) -> Grid:
    """The grid with change(y, x, cell) in the place of every cell, in reading order."""
    return tuple(tuple(change(y, x, cell) for x, cell in enumerate(row)) for y, row in enumerate(grid))


def _another(cell, rng):
    """Any other thing that a cell may show, nothing included."""
    return rng.choice([other for other in (*SEEN_PAIRS, None) if other != cell])


def _has_answer(spec):
    """Whether the question can be answered: a box needs something inside, a fraction something to be a part of."""
    if spec.verifier == "iou":
        return bool(places(spec, spec.target))
    return bool(places(spec, (None, None)))


# --- in what words ----------------------------------------------------------------------------------------------------


def filler(rng: random.Random) -> str:
    """A filler word, with chance FILLED, else nothing."""
    return rng.choice(FILLERS) if rng.random() < FILLED else ""


def other_hand(spec: Spec, style_name: str, rng: random.Random, hesitates: float = HESITATES) -> str:
    """The trace of this style as another hand writes it: longer, in other words, with hesitation. As right as ours.

    hesitates: how often it does so after a line.
    """
    heading, target = sought(spec, style_name)
    sentences = [f"{OKAY}, {STYLES[style_name].lower()} I look for {heading}."]
    for number, line in enumerate(reading(spec, style_name, target)):
        sentences.append(f"{'Then' if number else 'First'} I see {', '.join(line)}.")
        if rng.random() < hesitates:
            sentences.append(rng.choice(HESITATIONS))
    follows = conclusion(spec).removeprefix(", so").strip() or "that box"
    sentences.append(f"So the answer must be {follows}")
    return f"<think>{' '.join(sentences)}</think>\\boxed{{{answer(spec)}}}"

"""Worked answers. Every problem can be reasoned through in three styles, each with its own trace:

    rows      name every cell, row by row, counting as you go
    columns   the same, column by column
    marks     go row by row and name only the matches
"""

from collections import Counter

from tabletop.grids import (
    COLOURS,
    COLUMNS,
    EMPTY,
    OTHER,
    SHAPES,
    STYLES,
    Spec,
    answer,
    cells,
    fraction,
    matches,
    most_common,
    name_of,
    places,
)

VISUAL_WORDS = frozenset([*COLOURS, *SHAPES, EMPTY, OTHER, *COLUMNS, *"0123456789"])


def names_picture(word: str) -> bool:
    """True for a word of a trace that says what is in the picture: a colour, a shape, a place or a count."""
    return word.strip(" ,./+=;:").lower() in VISUAL_WORDS


def style(text: str) -> str:
    """The style of reasoning that an answer uses: "rows", "columns", "marks", or "other"."""
    words = text.partition("<think>")[2].split()
    if not words:
        return "other"
    for name, opening in STYLES.items():
        if words[0] == opening:
            return name
    return "other"


def traces(problem: Spec | dict) -> dict[str, str]:
    """The worked answers {style: "<think>…</think>\\boxed{…}"} of a Spec, or of a problem that holds one."""
    spec = problem["spec"] if isinstance(problem, dict) else problem
    worked = {}
    for name in STYLES:
        worked[name] = f"<think>{_thought(spec, name)}</think>\\boxed{{{answer(spec)}}}"
    return worked


def _thought(spec, style_name):
    """What stands between the think tags, in the style `style_name`."""
    heading, target = _sought(spec, style_name)
    return f"{STYLES[style_name]} {heading}: {_reading(spec, style_name, target)}{_conclusion(spec)}"


def _sought(spec, style_name):
    """What this style looks for: in words, and as a target in which True is any colour or shape, to be named."""
    if spec.verifier != "mcq":
        return name_of(spec.target), spec.target
    if style_name == "marks":  # to mark the winner one must have seen it first
        _, winner = most_common(spec)
        return name_of(winner), winner
    kind = spec.target[0]
    if kind == "colour":
        return kind, (True, None)
    return kind, (None, True)


def _reading(spec, style_name, target):
    """The picture in words, row by row or column by column."""
    seen = Counter()
    lines = []
    for line in _lines(spec, style_name):
        words = []
        for place, cell in line:
            if matches(cell, target):
                name = _attributes(cell, target)
                seen[name] += 1
                words.append(_match(spec, style_name, name, place=place, number=seen[name]))
            else:
                words.append(_no_match(style_name, cell, target))
        lines.append(" ".join(words))
    return "; ".join(lines)


def _lines(spec, style_name):
    """The cells with their places as lists: a list for each row, or for each column."""
    in_order = cells(spec)
    width = len(spec.grid[0])
    rows = [in_order[start:start + width] for start in range(0, len(in_order), width)]
    if style_name != "columns":
        return rows
    return list(zip(*rows, strict=True))


def _attributes(cell, target):
    """The colour of a cell, its shape or both: those that the target asks for."""
    return name_of(have if want else None for have, want in zip(cell, target, strict=True))


def _match(spec, style_name, name, *, place, number):
    """The words for a cell that matches: its name with the count so far or, when a box is wanted, with its place."""
    if spec.verifier != "iou":
        return f"{name}{number}"
    if style_name == "marks":
        return place
    return f"{name} {place}"


def _no_match(style_name, cell, target):
    """The word for a cell that does not match."""
    if cell is None:
        return EMPTY
    if style_name == "marks":
        return OTHER
    return _attributes(cell, target)


def _conclusion(spec):
    """What follows from the reading, before the answer is boxed."""
    if spec.verifier == "mcq":
        _, winner = most_common(spec)
        return f", so {name_of(winner)} {answer(spec)}"
    if spec.verifier == "iou":
        return ""
    part = len(places(spec, spec.target))
    if spec.verifier == "digit":
        return f" ={part}"
    whole = len(places(spec, (None, None)))
    lowest = fraction(spec)
    if lowest.denominator == whole:
        return f" ={part}/{whole}"
    return f" ={part}/{whole}={lowest.numerator}/{lowest.denominator}"

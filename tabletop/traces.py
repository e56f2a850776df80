"""Worked answers. Every problem can be reasoned through in three styles, each with its own trace:

    rows      name every cell, row by row, counting as you go
    columns   the same, column by column
    marks     go row by row and name only the matches

The second skill, naming what stands at a place, has one style: look. A description is thought out like an mcq, and ends
in words of its own. `first_wrong` compares an answer with the traces.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tabletop.grids import (
    COLOURS,
    COLUMNS,
    EMPTY,
    OTHER,
    SHAPES,
    STYLES,
    Spec,
    answer,
    best_answer,
    cells,
    fraction,
    matches,
    most_common,
    name_of,
    part_at_place,
    places,
    ranked,
)

VISUAL_WORDS = frozenset([*COLOURS, *SHAPES, EMPTY, OTHER, *COLUMNS, *"0123456789"])
FILLERS = ("um", "er", "uh", "hm", "oh", "ah", "well", "now")  # words that mean nothing
LOOK = "Look"  # the word that opens a trace of the second skill
OKAY = "Okay"  # the word that opens any trace of the other hand (habits.py)
END = "<|im_end|>"  # what closes an answer


# --- the traces -------------------------------------------------------------------------------------------------------


def traces(problem: Spec | dict) -> dict[str, str]:
    """The worked answers {style: "<think>…</think>\\boxed{…}"} of a Spec, or of a problem that holds one."""
    spec = problem["spec"] if isinstance(problem, dict) else problem
    return {name: trace(spec, name) for name in styles_of(spec)}


def styles_of(spec: Spec) -> tuple[str, ...]:
    """The styles in which a problem can be reasoned through."""
    if spec.place:
        return ("look",)
    return tuple(STYLES)


def trace(
    spec: Spec, style_name: str, *, concluded: Spec | None = None, filler: Callable[[], str] | None = None,
) -> str:
    """One worked answer. `concluded`: the picture from which the conclusion is drawn (default: the one that is read).

    filler() gives the filler word that stands before a cell's name, or "".
    """
    if concluded is None:
        concluded = spec
    return f"<think>{_thought(spec, style_name, concluded, filler)}</think>\\boxed{{{best_answer(concluded)}}}"


def _thought(spec, style_name, concluded, filler):
    """What stands between the think tags, in the style `style_name`."""
    if style_name == "look":
        return f"{LOOK} {spec.place}: {_up_to_the_place(spec)}, so {part_at_place(concluded)[1]} {answer(concluded)}"
    heading, target = sought(spec, style_name)
    lines = [" ".join(line) for line in reading(spec, style_name, target, filler)]
    return f"{STYLES[style_name]} {heading}: {'; '.join(lines)}{conclusion(concluded)}"


def _up_to_the_place(spec):
    """Every cell with its place, row by row, up to the one that is asked about."""
    lines = []
    for row in _lines(spec, "look"):
        words = []
        lines.append(words)
        for place, cell in row:
            words.append(f"{place} {EMPTY if cell is None else name_of(cell)}")
            if place == spec.place:
                return "; ".join(" ".join(line) for line in lines)
    raise ValueError(f"there is no {spec.place} in the grid")


def sought(spec: Spec, style_name: str) -> tuple[str, tuple]:
    """What this style looks for: in words, and as a target in which True is any colour or shape, to be named."""
    if spec.verifier not in ("mcq", "open_ended"):
        return name_of(spec.target), spec.target
    if style_name == "marks":  # to mark the winner one must have seen it first
        _, winner = most_common(spec)
        return name_of(winner), winner
    kind = spec.target[0]
    if kind == "colour":
        return kind, (True, None)
    return kind, (None, True)


def reading(
    spec: Spec, style_name: str, target: tuple, filler: Callable[[], str] | None = None,
) -> list[list[str]]:
    """The picture in words: a list for each row (or column), with the words for each of its cells."""
    seen = Counter()
    lines = []
    for line in _lines(spec, style_name):
        words = []
        for place, cell in line:
            if matches(cell, target):
                name = _attributes(cell, target)
                seen[name] += 1
                word = _match(spec, style_name, name, place=place, number=seen[name])
            else:
                word = _no_match(style_name, cell, target)
            if filler is not None:
                word = (filler() + " " + word).strip()
            words.append(word)
        lines.append(words)
    return lines


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


def conclusion(spec: Spec) -> str:
    """What follows from the reading, before the answer is boxed."""
    if spec.verifier == "open_ended":
        return f", so {ranked(spec)[0][1]}"
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


# --- what an answer looks like ----------------------------------------------------------------------------------------


def names_picture(word: str) -> bool:
    """True for a word of a trace that says what is in the picture: a colour, a shape, a place or a count."""
    return word.strip(" ,./+=;:").lower() in VISUAL_WORDS


def style(text: str) -> str:
    """The style of reasoning that an answer uses: "rows", "columns", "marks", "look", or "other"."""
    words = text.partition("<think>")[2].replace(",", " ").split()
    if words and words[0] == OKAY:
        words = [word.capitalize() for word in words[1:]]
    for name, opening in (*STYLES.items(), ("look", LOOK)):
        if words and words[0] == opening:
            return name
    return "other"


@dataclass(frozen=True)
class FirstWrong:
    """Where an answer leaves the trace of its own style: `problem["first_wrong"](tokens)`.

    tokens: the decoded tokens of an answer, the end token included. Gives the place of the first token after which no
    trace of this problem can be reached any more, or None for an answer that follows a trace to its end. Filler words
    are passed over. The styles differ in their first word, so after it there is one trace to follow.
    """

    spec: Spec

    def __call__(self, tokens: Sequence[str]) -> int | None:
        gold = [text + END for text in traces(self.spec).values()]
        written = ""
        for place, token in enumerate(tokens):
            if token.strip() in FILLERS:
                continue
            written += token
            if not any(text.startswith(written) for text in gold):
                return place
        return None


PARTS = re.compile(
    r"(?P<opening><think>\s*\w*)(?P<heading>[^:]*:?)(?P<reading>.*?)"
    r"(?P<conclusion>( =|, so).*?)?(?P<answer></think>.*)?", re.DOTALL)


def kinds(tokens: Sequence[str]) -> list[str]:
    """What each token of an answer is there for, by its words and by its place in the trace.

    opening (the tags and the word that shows the style), heading, then in the reading: filler, cell (what a cell shows,
    or in marks its place), place, count, separator; conclusion; answer (the box, and whatever follows it).
    """
    parts = PARTS.fullmatch("".join(tokens))
    if parts is None:  # not a trace at all
        return ["answer"] * len(tokens)
    found = []
    end = 0
    for token in tokens:
        start = end
        end += len(token)
        middle = end - 1  # the last character decides: the first may be a space or a tag's bracket
        names = [name for name in parts.groupdict() if parts.start(name) <= middle < parts.end(name)]
        name = names[0] if names else "answer"
        if name == "reading":
            name = _kind_in_reading(token, parts.string[:start])
        found.append(name)
    return found


def _kind_in_reading(token, before):
    """What a token of the reading is there for. before: the answer up to it."""
    word = token.strip()
    if word in FILLERS:
        return "filler"
    if word in ("", ";", ","):
        return "separator"
    if word in COLUMNS:
        return "place"
    if word.isdigit():
        return "place" if before.endswith(tuple(COLUMNS)) and before[-2:-1] == " " else "count"
    return "cell"

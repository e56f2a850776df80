"""Which problems there are: the splits of the tabletop, and the problem at each index of a split.

    pretrain   what the two models are made from: 3x3 pictures and a few of 2x4 and 4x2; unlimited
    train      new 3x3 pictures of the same kind
    test       again new ones; the settings of the scripts were chosen by looking at these
    study      again new ones; only lab/study.py looks at these
    ood        4x4 pictures, with colour-shape pairs or wordings that no model here was ever trained on
"""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence

from harness.flags import UserError
from tabletop.grids import (
    OOD_WORDINGS,
    OPTIONS,
    PAIRS,
    SEEN_PAIRS,
    UNSEEN_PAIRS,
    VERIFIERS,
    WORDINGS,
    Grid,
    Spec,
    answer,
    matches,
    question,
)
from tabletop.pictures import draw
from tabletop.traces import traces

# --- splits -----------------------------------------------------------------------------------------------------------

# A picture's share, and so its split, follows from the picture itself: no picture can be in two splits.
# study and ood have the same share: study holds only 3x3 grids, ood only 4x4.
SHARES = {
    "pretrain": range(5),
    "train": range(5, 8),
    "test": range(8, 9),
    "study": range(9, 10),
    "ood": range(9, 10),
}
# Rows and columns, drawn evenly from each list. The few 2x4 and 4x2 pictures show the models a fourth row or a fourth
# column, never both, so that a coordinate of 112 is nothing new in ood.
GRIDS = {
    "pretrain": [(3, 3)] * 6 + [(2, 4), (4, 2)],
    "train": [(3, 3)],
    "test": [(3, 3)],
    "study": [(3, 3)],
    "ood": [(4, 4)],
}
# How many problems a split holds unless asked for another number; None: unlimited, and only for building the models.
SIZES = {
    "pretrain": None,
    "train": 4096,
    "test": 256,
    "study": 256,
    "ood": 256,
}
MATCHES = {"digit": (0, 5), "math": (1, 4), "iou": (1, 2)}  # the fewest and the most cells that match the target


def share_of(grid: Grid) -> int:
    """0..9, a fixed function of what the picture shows."""
    return hashlib.sha256(repr(grid).encode()).digest()[0] % 10


class Problems(Sequence):
    """The first `count` problems of a split, drawn when asked for. An index is the same problem whatever the count."""

    def __init__(self, split: str, count: int):
        self.split = split
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.count))]
        return problem_of(self.split, range(self.count)[index])


def problems(split: str, count: int | None = None) -> Problems:
    """The problems of a split: dicts with id, images, problem, answer, verifier, trace, style, spec."""
    if count is None:
        count = SIZES[split]
    return Problems(split, count)


def load(split: str | None, count: int | None = None) -> Problems:
    """The first `count` problems of a split (None: all), drawn when asked for. UserError for an unknown split."""
    names = [name for name, size in SIZES.items() if size is not None]
    if split not in names:
        raise UserError(f"data set toy has no split {split}, it has {', '.join(names)}; write for example toy@train")
    return problems(split, count)


# --- one problem ------------------------------------------------------------------------------------------------------


def problem_of(split: str, index: int) -> dict:
    """The problem `index` of a split, drawn. Its trace is in one of the styles, which `style` names."""
    spec = spec_of(split, index)
    worked = traces(spec)
    chosen = random.Random(f"{split} {index} style").choice(sorted(worked))
    return {
        "id": f"toy-{split}-{index}",
        "images": [draw(spec)],
        "problem": question(spec),
        "answer": answer(spec),
        "verifier": spec.verifier,
        "trace": worked[chosen],
        "style": chosen,
        "spec": spec,
    }


def spec_of(split: str, index: int) -> Spec:
    """The problem `index` of a split, before it is drawn. In ood, unseen pairs and unseen wordings take turns."""
    rng = random.Random(f"{split} {index}")
    verifier = VERIFIERS[index % 4]
    turn = index // 4 % 2
    new_pairs = split == "ood" and turn == 0
    new_words = split == "ood" and turn == 1
    asked = UNSEEN_PAIRS if new_pairs else SEEN_PAIRS
    shown = PAIRS if new_pairs else SEEN_PAIRS
    while True:
        target = _target(rng, verifier, rng.choice(asked))
        size = rng.choice(GRIDS[split])
        grid = _fill(rng, size, verifier=verifier, target=target, pairs=shown)
        if share_of(grid) not in SHARES[split]:
            continue
        if new_pairs and not _has_unseen_pair(grid):
            continue
        if verifier == "mcq" and _is_tie(grid, target):
            continue
        break
    wordings = OOD_WORDINGS if new_words else WORDINGS
    wording = rng.choice(wordings[verifier])
    return Spec(grid=grid, verifier=verifier, target=target, wording=wording, drawing=rng.randrange(2**32))


def _target(rng, verifier, pair):
    """What the question asks for, made from one pair: its colour, its shape or both."""
    colour, shape = pair
    kinds = ("colour", "shape", "pair") if verifier == "digit" else ("colour", "shape")
    kind = rng.choice(kinds)
    if verifier == "mcq":
        return (kind,)
    if kind == "colour":
        return (colour, None)
    if kind == "shape":
        return (None, shape)
    return (colour, shape)


def _fill(rng, size, *, verifier, target, pairs):
    """A grid of (rows, columns). The number of matches is drawn first, so that the answers are spread evenly."""
    rows, columns = size
    room = rows * columns
    whole = rng.randint(room - 3, room)
    if verifier == "mcq":
        shown = rng.choices(pairs, k=whole)
    else:
        fewest, most = MATCHES[verifier]
        part = rng.randint(fewest, most)
        wanted = [pair for pair in pairs if matches(pair, target)]
        others = [pair for pair in pairs if not matches(pair, target)]
        shown = rng.choices(wanted, k=part) + rng.choices(others, k=whole - part)
    shown += [None] * (room - whole)
    rng.shuffle(shown)
    return tuple(tuple(shown[start:start + columns]) for start in range(0, room, columns))


def _has_unseen_pair(grid):
    """Whether any cell shows a pair that the models were not trained on."""
    return any(cell in UNSEEN_PAIRS for row in grid for cell in row)


def _is_tie(grid, target):
    """Whether no colour (or shape) is more common than every other."""
    part = list(OPTIONS).index(target[0])
    counts = Counter(cell[part] for row in grid for cell in row if cell is not None)
    ranked = sorted(counts.values())
    return len(ranked) > 1 and ranked[-1] == ranked[-2]

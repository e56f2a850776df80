"""Which problems there are: the splits of the tabletop, and the problem at each index of a split.

    practice   what the models are made from: 3x3 pictures and a few of 2x4 and 4x2; unlimited
    train      new 3x3 pictures of the same kind
    test       again new ones; the settings of the scripts and of the worlds were chosen by looking at these
    study      again new ones; the first studies looked at these
    fresh      again new ones, which nothing was chosen on: for what is to be reported
    ood        4x4 pictures, with colour-shape pairs or wordings that no model here was ever trained on
    skill      new 3x3 pictures for the second skill: what stands at a place

    pretrain   what toy-short and its teacher are made from; it goes back to the first tabletop
    places     practice for the second skill, unlimited
    describe   practice for descriptions, unlimited

Worlds share these problems, index by index, and decide how the pictures look and in what words the traces are. A mixed
world has a description after every four of them; `skill` is only in the world with a second skill.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from harness.flags import UserError
from tabletop.grids import (
    DESCRIPTION_WORDINGS,
    OOD_WORDINGS,
    OPTIONS,
    PAIRS,
    SEEN_PAIRS,
    SKILL_WORDINGS,
    UNSEEN_PAIRS,
    VERIFIERS,
    WORDINGS,
    Grid,
    Spec,
    answer,
    cells,
    matches,
    question,
    ranked,
)
from tabletop.habits import other_hand
from tabletop.pictures import draw
from tabletop.traces import FirstWrong, styles_of, trace
from tabletop.worlds import WORLDS, World, world_of

# --- splits -----------------------------------------------------------------------------------------------------------

# A picture's share, and so its split, follows from the picture itself: no picture can be in two splits.
# study and ood have the same shares: study holds only 3x3 grids, ood only 4x4. pretrain lies across the shares of
# practice, skill and fresh: it is finite where it is used, and a test looks for its pictures in fresh one by one.
SHARES = {
    "practice": range(40),
    "places": range(40),
    "describe": range(40),
    "skill": range(40, 45),
    "fresh": range(45, 50),
    "train": range(50, 80),
    "test": range(80, 90),
    "study": range(90, 100),
    "ood": range(90, 100),
    "pretrain": range(50),
}
# Rows and columns, drawn evenly from each list. The few 2x4 and 4x2 pictures show the models a fourth row or a fourth
# column, never both, so that a coordinate of 112 is nothing new in ood.
A_FEW_LONG = ((3, 3),) * 6 + ((2, 4), (4, 2))
GRIDS = {
    "practice": A_FEW_LONG,
    "places": A_FEW_LONG,
    "describe": A_FEW_LONG,
    "pretrain": A_FEW_LONG,
    "ood": ((4, 4),),
}  # all others: 3x3
# How many problems a split holds unless asked for another number; None: unlimited, and only for building the models.
SIZES = {
    "practice": None,
    "places": None,
    "describe": None,
    "pretrain": None,
    "train": 4096,
    "test": 256,
    "study": 256,
    "fresh": 512,
    "ood": 256,
    "skill": 256,
}
SKILLS = ("places", "skill")  # the splits that ask for the second skill
MIXED_SPLITS = ("train", "test", "study", "fresh")  # the splits of a mixed world
STANDS_OUT = 2  # how many more cells show what a description should name than show anything else, at least
MATCHES = {"digit": (0, 5), "math": (1, 4), "iou": (1, 2)}  # the fewest and the most cells that match the target


def share_of(grid: Grid) -> int:
    """0..99, a fixed function of what the picture shows. Its tens are the ten shares of the first tabletop."""
    digest = hashlib.sha256(repr(grid).encode()).digest()
    return 10 * (digest[0] % 10) + digest[1] % 10


class Problems(Sequence):
    """The first `count` problems of a split, drawn when asked for. An index is the same problem whatever the count."""

    def __init__(self, split: str, count: int, world: World):
        self.split = split
        self.count = count
        self.world = world

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.count))]
        return problem_of(self.split, range(self.count)[index], self.world)


def problems(split: str, count: int | None = None, world: World = WORLDS["toy"]) -> Problems:
    """The problems of a split: dicts with id, images, problem, answer, verifier, trace, style, spec, first_wrong."""
    if count is None:
        count = SIZES[split]
        if world.describes:
            count += count // len(VERIFIERS)
    return Problems(split, count, world)


def load(name: str, split: str | None, count: int | None = None) -> Problems:
    """The first `count` problems of a split of the world `name` (None: all), drawn when asked for.

    UserError for a world or a split that there is not.
    """
    world = world_of(name)
    names = [name for name, size in SIZES.items() if size is not None]
    if world.skills == 1:
        names = [name for name in names if name not in SKILLS]
    if world.describes:
        names = list(MIXED_SPLITS)
    if split not in names:
        raise UserError(f"data set {name} has no split {split}, it has {', '.join(names)}; "
                        f"write for example {name}@train")
    return problems(split, count, world)


# --- one problem ------------------------------------------------------------------------------------------------------


def problem_of(split: str, index: int, world: World = WORLDS["toy"]) -> dict:
    """The problem `index` of a split, drawn. Its trace is in one of the styles, which `style` names."""
    name, spec = named(split, index, world)
    chosen = random.Random(f"{name} style").choice(sorted(styles_of(spec)))
    return {
        "id": f"toy-{name.replace(' ', '-')}",
        "images": [draw(spec, fade_of(split, world))],
        "problem": question(spec),
        "answer": answer(spec),
        "verifier": spec.verifier,
        "trace": worked(spec, chosen, world, f"{split} {index} hand"),
        "style": chosen,
        "spec": spec,
        "first_wrong": FirstWrong(spec),
    }


def worked(spec: Spec, chosen: str, world: World, key: str) -> str:
    """The trace of a problem in the style `chosen`, in the hand of its world. `key` fixes what the other hand draws."""
    if world.hand == "own":
        return trace(spec, chosen)
    rng = random.Random(key)
    texts = {name: other_hand(spec, name, rng) for name in styles_of(spec)}  # the styles share one generator
    return texts[chosen]


def named(split: str, index: int, world: World) -> tuple[str, Spec]:
    """(name, Spec) of the problem `index` of a split, as this world counts: of five in a mixed world, the last is a
    description, and the other four are those of every world."""
    if not world.describes:
        return f"{split} {index}", spec_of(split, index)
    turn, place = divmod(index, len(VERIFIERS) + 1)
    if place == len(VERIFIERS):
        return f"{split} describe {turn}", description_of(split, turn)
    index = len(VERIFIERS) * turn + place
    return f"{split} {index}", spec_of(split, index)


def fade_of(split: str, world: World) -> float:
    """How faded the pictures of a split are. The second skill is asked for on clear ones: it can only be lost."""
    return 0.0 if split in SKILLS else world.fade


def spec_of(split: str, index: int) -> Spec:
    """The problem `index` of a split, before it is drawn. In ood, unseen pairs and unseen wordings take turns."""
    if split in SKILLS:
        return _skill_spec_of(split, index)
    if split == "describe":
        return description_of(split, index)
    rng = random.Random(f"{split} {index}")
    verifier = VERIFIERS[index % 4]
    turn = index // 4 % 2
    new_pairs = split == "ood" and turn == 0
    new_words = split == "ood" and turn == 1
    asked = UNSEEN_PAIRS if new_pairs else SEEN_PAIRS
    shown = PAIRS if new_pairs else SEEN_PAIRS
    while True:
        target = _target(rng, verifier, rng.choice(asked))
        size = rng.choice(GRIDS.get(split, ((3, 3),)))
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


def _skill_spec_of(split, index):
    """The problem `index` of a split that asks for the second skill: any cell that shows something."""
    rng = random.Random(f"{split} {index}")
    target = (rng.choice(list(OPTIONS)),)
    while True:
        size = rng.choice(GRIDS.get(split, ((3, 3),)))
        grid = _fill(rng, size, verifier="mcq", target=target, pairs=SEEN_PAIRS)
        if share_of(grid) in SHARES[split]:
            break
    wording = rng.choice(SKILL_WORDINGS)
    spec = Spec(grid=grid, verifier="mcq", target=target, wording=wording, drawing=rng.randrange(2**32))
    place = rng.choice([place for place, cell in cells(spec) if cell is not None])
    return replace(spec, place=place)


def description_of(split: str, index: int) -> Spec:
    """The description `index` of a split: any picture of the split's own share in which something stands out."""
    rng = random.Random(f"{split} {index} describe")
    target = (rng.choice(list(OPTIONS)),)
    while True:
        size = rng.choice(GRIDS.get(split, ((3, 3),)))
        grid = _fill(rng, size, verifier="mcq", target=target, pairs=SEEN_PAIRS)
        spec = Spec(grid=grid, verifier="open_ended", target=target, wording="", drawing=rng.randrange(2**32))
        (most, _), (second, _), *_ = ranked(spec)
        if share_of(grid) in SHARES[split] and most - second >= STANDS_OUT and second > 0:
            return replace(spec, wording=rng.choice(DESCRIPTION_WORDINGS))


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

"""The dials of the tabletop: every world by its name, and how each of its dials is set.

`--model NAME --dataset NAME@train` puts a model into a world. `toy` is the default. README.md describes every dial.
"""

from dataclasses import dataclass
from typing import ClassVar

from harness.flags import UserError


@dataclass(frozen=True)
class World:
    """One world: where each dial stands. The problems are the same in all of them, and so are their ids.

    (A MixedWorld has descriptions between them.)

    base       the model that starts here
    teacher    the model that knows this world well, for opd.py and sft.py
    fade       how far the pictures are mixed with the colour of the paper: 0 clear, 1 blank
    doubt      where the base goes wrong. none: nowhere on purpose. see: it misreads cells, and all that follows fits
               what it read. think: it reads well, and misjudges what follows
    fillers    whether the base strews in filler words, which mean nothing
    ways       where a style of reasoning misses things. all: nowhere on purpose. same: every style misses what is
               sought in one line of the grid, any line, by chance. parts: each style misses it in a line of its own,
               always, so that one solves what another cannot
    skills     1, or 2: the base can also say what stands at a place, and only the split `skill` asks for that
    hand       whose words the traces are in. own: the base's. other: longer, in other words, with hesitation
    """

    base: str
    teacher: str = "toy-teacher"
    fade: float = 0.0
    doubt: str = "none"
    fillers: bool = False
    ways: str = "all"
    skills: int = 1
    hand: str = "own"
    describes: ClassVar[bool] = False  # no field: the names of finished models are hashes of the fields


class MixedWorld(World):
    """A world in which every fifth problem asks for a description, in free text: all five verifiers, equal shares."""

    describes: ClassVar[bool] = True


WORLDS = {
    "toy": World("toy", fade=0.72),
    "toy-clear": World("toy"),
    "toy-short": World("toy-short", teacher="toy-teacher-short"),
    "toy-see": World("toy-see", doubt="see"),
    "toy-think": World("toy-think", doubt="think"),
    "toy-see-fillers": World("toy-see-fillers", doubt="see", fillers=True),
    "toy-think-fillers": World("toy-think-fillers", doubt="think", fillers=True),
    "toy-ways-same": World("toy-ways-same", ways="same"),
    "toy-ways-parts": World("toy-ways-parts", ways="parts"),
    "toy-two-skills": World("toy-two-skills", fade=0.72, skills=2),
    "toy-mixed": MixedWorld("toy-mixed", teacher="toy-teacher-mixed", fade=0.72),
    "toy-hand": World("toy", teacher="toy-teacher-hand", fade=0.72, hand="other"),
}


def world_of(name: str) -> World:
    """The world called `name`. UserError for a name that is none."""
    if name not in WORLDS:
        raise UserError(f"there is no toy world called {name!r}; choose one of {', '.join(WORLDS)} "
                        f"(for a file of your own with that name, write ./{name})")
    return WORLDS[name]

"""The tabletop: a small drawn world with dials, and Qwen2.5-VL models of about a million parameters at home in it.

    build(name)                 the folder of a model; `toy` and `toy-teacher` are shipped, others are trained once;
                                `toy-judge` is a reward model
    NAMES                       the names of the models
    load(name, split, count)    the problems of a world's split, drawn as they are asked for
    WORLDS                      the worlds by their names

README.md describes the worlds. In the order in which they build on each other:

    grids.py       what a problem is: the words, the grid, the question, the answer
    traces.py      how a problem is reasoned through, in three styles; where an answer first goes wrong
    worlds.py      the dials, and where they stand in each world
    habits.py      what the base of a world is taught to write, mistakes included
    pictures.py    how a grid is drawn
    problems.py    which problems each split holds
    models.py      how the models are made
    judge.py       the reward model for descriptions
    writer.py      the model that plays the parts of the data pipeline
"""

from tabletop import judge, models, writer
from tabletop.models import NAMES
from tabletop.problems import load
from tabletop.worlds import WORLDS


def build(name: str) -> str:
    """The folder of the model, of the base of the world, of the judge or of the writer that is called `name`."""
    if name == judge.NAME:
        return judge.build()
    if name == writer.NAME:
        return writer.build()
    return models.build(name)


__all__ = ["NAMES", "WORLDS", "build", "load"]

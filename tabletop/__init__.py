"""The tabletop: a small drawn world, and two Qwen2.5-VL models of about a million parameters that are at home in it.

    build(name)           the folder of `toy` or `toy-teacher`, trained on first use and then kept in the user's cache
    NAMES                 the names of the two models
    load(split, count)    the problems of a split, drawn as they are asked for

README.md describes the world. In the order in which they build on each other:

    grids.py       what a problem is: the words, the grid, the question, the answer
    traces.py      how a problem is reasoned through, in three styles
    pictures.py    how a grid is drawn
    problems.py    which problems each split holds
    models.py      how the two models are made
"""

from tabletop.models import NAMES, build
from tabletop.problems import load

__all__ = ["NAMES", "build", "load"]

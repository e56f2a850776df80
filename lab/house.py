"""The house as a picture: its rooms, and arrows for the imports between them.

    python lab/house.py          prints the arrows, and draws them into results/house.png

Arrows point down only: lab and forks stand on the scripts and on common, the scripts on common, the tabletop on common,
common on the harness. Two imports run up, inside functions of common.py, so that importing common needs neither: the
tabletop, when a model or data set is named so, and the pictures at a run's end. tests/tools/test_house.py holds all of
this.
"""

import argparse
import ast
import sys
import textwrap
from collections import Counter, namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks in lab/, not in the root

from harness.flags import Parser

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

SCRIPTS = tuple(sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "common"))
FLOORS = ("harness", "common", "tabletop", "scripts", "forks", "lab")  # from the ground up
# An import: the module it stands in, the module it names, its line, and the function it stands in (None: at the top).
Arrow = namedtuple("Arrow", "source target line function")


def module_paths():
    """{module: its file} of everything but the tests."""
    paths = sorted(ROOT.glob("*.py"))
    for room in ("harness", "tabletop", "forks", "lab"):
        paths += sorted((ROOT / room).glob("*.py"))
    modules = {}
    for path in paths:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = path
    return modules


def room_of(module):
    """The room a module is in: harness, common, tabletop, scripts, forks or lab."""
    first = module.split(".")[0]
    return "scripts" if first in SCRIPTS else first


def named_modules(node, known):
    """The modules of this project that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    found = [name for name in names if name in known]
    deeper = [name for name in found if any(other.startswith(name + ".") for other in found)]
    return [name for name in found if name not in deeper]


def imports_in(tree):
    """(import statement, name of the function it stands in or None) of a parsed file."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        around = [fn.name for fn in functions if fn.lineno <= node.lineno <= fn.end_lineno]
        yield node, around[-1] if around else None


def arrows():
    """Every import of one of the project's modules by another."""
    modules = module_paths()
    found = []
    for source, path in modules.items():
        for node, function in imports_in(ast.parse(path.read_text())):
            for target in named_modules(node, modules):
                found.append(Arrow(source, target, node.lineno, function))
    return found


def runs_up(arrow):
    """Whether an import names a module that stands above the one it is in, or beside it among the scripts."""
    source = FLOORS.index(room_of(arrow.source))
    target = FLOORS.index(room_of(arrow.target))
    if room_of(arrow.source) == room_of(arrow.target):
        return room_of(arrow.source) in ("scripts", "forks")
    return target > source


def circle(found):
    """The modules of a circle of imports at the top of files, in order, or [] where there is none."""
    below = {}
    for arrow in found:
        if arrow.function is None:
            below.setdefault(arrow.source, set()).add(arrow.target)
    finished = set()

    def walk(module, path):
        if module in path:
            return path[path.index(module):] + [module]
        if module in finished:
            return []
        for target in sorted(below.get(module, ())):
            round_trip = walk(target, path + [module])
            if round_trip:
                return round_trip
        finished.add(module)
        return []

    for module in sorted(below):
        round_trip = walk(module, [])
        if round_trip:
            return round_trip
    return []


# --- the picture ------------------------------------------------------------------------------------------------------


def between_rooms(found):
    """{(room above, room below, upward): number of imports} between different rooms; upward: an import that runs up."""
    counts = Counter()
    for arrow in found:
        source, target = room_of(arrow.source), room_of(arrow.target)
        if source != target:
            counts[source, target, runs_up(arrow)] += 1
    return counts


def draw_rooms(axis):
    """A box for each room, with the names of its modules in it."""
    modules = module_paths()
    for y, room in enumerate(FLOORS):
        members = [module.split(".")[-1] for module in modules if room_of(module) == room]
        text = textwrap.fill("   ".join(members), 72)
        axis.add_patch(FancyBboxPatch(
            (0, y - 0.26), 8, 0.52, boxstyle="round,pad=0.06", facecolor="#f7f7f7", edgecolor="#888888"))
        axis.text(0.1, y, room, fontsize=11, fontweight="bold", va="center")
        axis.text(1.5, y, text, fontsize=9, va="center")


def draw(found, path):
    """Draws the rooms and what each stands on: imports that point down at the right, those that run up at the left."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axis = figure.add_subplot(xlim=(-2, 12), ylim=(-0.5, len(FLOORS) - 0.5))
    axis.axis("off")
    draw_rooms(axis)
    for number, ((source, target, upward), count) in enumerate(sorted(between_rooms(found).items())):
        start, end = FLOORS.index(source), FLOORS.index(target)
        x = -0.1 if upward else 8.1
        colour = "#D55E00" if upward else "#0072B2"
        begin, finish = (x, start + 0.02 * number - 0.1), (x, end + 0.02 * number - 0.1)
        reach = 0.32 + 0.23 * abs(start - end)  # an arrow over many floors swings out further
        middle = (x - reach if upward else x + reach, (begin[1] + finish[1]) / 2)
        curve = FancyArrowPatch(
            begin, finish, connectionstyle="arc3,rad=-0.45", arrowstyle="-|>", mutation_scale=11, color=colour)
        axis.add_patch(curve)
        axis.text(*middle, str(count), color=colour, fontsize=9, ha="center", va="center", backgroundcolor="white")
    axis.text(8.4, -0.45, "imports at the top of files", color="#0072B2", fontsize=9)
    axis.text(-1.9, -0.45, "inside a function", color="#D55E00", fontsize=9)
    figure.savefig(path, dpi=130)


def main():
    parser = Parser("house", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="results/house.png", help="where the picture goes")
    args = parser.parse_args()
    found = arrows()
    for arrow in found:
        where = f"  in {arrow.function}()" if arrow.function else ""
        up = "  UP" if runs_up(arrow) else ""
        print(f"{arrow.source:22} -> {arrow.target:22} line {arrow.line}{where}{up}")
    round_trip = circle(found)
    print("circle: " + " -> ".join(round_trip) if round_trip else "no circle")
    draw(found, args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()

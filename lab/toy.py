"""A look at the tabletop: draws sample problems and the dials, and prints what the answers of its models are like.

    python lab/toy.py                         the models of all worlds; those that are not shipped are built first
    python lab/toy.py --models toy toy-see    these alone

The worlds, their problems and their models are in tabletop/, described in tabletop/README.md.
"""

import argparse
import random
import sys
import textwrap
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python lab/toy.py` finds common

from common import is_right, load_judge, load_policy, sample
from eval_passk import pass_at_k
from harness.answers import final_answer
from harness.flags import Parser
from tabletop import WORLDS, build
from tabletop.grids import STYLES, VERIFIERS
from tabletop.habits import LINES, lesson
from tabletop.pictures import draw
from tabletop.problems import SIZES, problem_of, problems
from tabletop.traces import style, traces

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from tqdm import tqdm

# --- the table --------------------------------------------------------------------------------------------------------


def worlds_of_models() -> dict[str, str]:
    """{model: the world that it is measured in}, the bases first, each model once."""
    found = {}
    for name, world in WORLDS.items():
        found.setdefault(world.base, name)
    for name, world in WORLDS.items():
        found.setdefault(world.teacher, name)
    return found


def measure(
    model: str, world: str, split: str = "test", *, count: int = 128, samples: int = 16, seed: int = 0,
) -> dict[str, float]:
    """One row of the table: what `samples` answers at temperature 1 to each of `count` problems are like."""
    policy, processor = load_policy(build(model))
    asked = problems(split, count, WORLDS[world])[:]
    rollout = sample(policy, processor, asked, samples, seed=(seed, "table"), max_completion_length=128)
    judge = load_judge("toy-judge") if WORLDS[world].describes else None
    right_P = rollout.score(is_right, judge).sum(1).numpy()
    return {
        "weights": sum(weight.numel() for weight in policy.parameters()),
        "pass@1": pass_at_k(samples, right_P, 1).mean(),
        f"pass@{samples}": pass_at_k(samples, right_P, samples).mean(),
        "entropy": (rollout.entropy_BT.sum() / rollout.mask_BT.sum()).item(),
        "tokens": (rollout.mask_BT.sum() / len(rollout)).item(),
        "distinct": distinct_answers(rollout.texts, samples),
        **right_by_verifier(asked, right_P, samples),
        **shares_of_styles(rollout.texts),
    }


def distinct_answers(texts, samples):
    """How many different final answers a problem gets, on average. texts: `samples` for each problem in turn."""
    counts = []
    for start in range(0, len(texts), samples):
        answers = {final_answer(text) for text in texts[start:start + samples]}
        counts.append(len(answers))
    return sum(counts) / len(counts)


def right_by_verifier(asked, right_P, samples):
    """pass@1 for each kind of question. right_P: the number of right answers to each problem."""
    row = {}
    for verifier in (*VERIFIERS, "open_ended"):
        right = right_P[[problem["verifier"] == verifier for problem in asked]]
        if len(right):
            row[verifier] = pass_at_k(samples, right, 1).mean()
    return row


def shares_of_styles(texts):
    """Which share of the answers is in each style."""
    used = Counter(style(text) for text in texts)
    return {name: used[name] / len(texts) for name in (*STYLES, "look", "other") if used[name] or name != "look"}


def print_table(rows):
    """Prints {name: {key: number}}, a line for each name. A key that a row lacks is left blank."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    wide = max(len(name) for name in rows) + 1
    print(" " * wide + "".join(f"{key:>12}" for key in keys))
    for name, row in rows.items():
        cells = []
        for key in keys:
            digits = 0 if key == "weights" else 3
            cells.append(f"{row[key]:>12,.{digits}f}" if key in row else " " * 12)
        print(f"{name:{wide}}" + "".join(cells))


# --- the pictures -----------------------------------------------------------------------------------------------------


def picture(path: str | Path) -> None:
    """Draws one problem of each kind, clear and faded, with its traces, and one out-of-domain problem."""
    shown = [problem_of("train", index) for index in (8, 1, 2, 7)]
    shown.append(problem_of("ood", 9))
    figure = Figure(figsize=(14.5, 2.3 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), 3, width_ratios=(1, 1, 5))
    for (left, middle, right), problem in zip(rows, shown, strict=True):
        show_picture(left, draw(problem["spec"]))
        show_picture(middle, problem["images"][0])
        label = f"{problem['verifier']}   {problem['id']}"
        show_texts(right, problem["problem"], label, traces(problem))
    save(figure, path)


def dials(path: str | Path) -> None:
    """Draws one problem in every world, with what its base is taught to write (in toy-hand, its teacher)."""
    names = [name for name in WORLDS if name not in ("toy-clear", "toy-short")]
    figure = Figure(figsize=(14, 2.1 * len(names)), layout="constrained")
    rows = figure.subplots(len(names), 2, width_ratios=(1, 6))
    for (left, right), name in zip(rows, names, strict=True):
        world = WORLDS[name]
        problem = problem_of("train", 8, world)
        if world.skills == 2:
            problem = problem_of("skill", 3, world)
        if world.describes:
            problem = problem_of("train", 4, world)
        show_picture(left, problem["images"][0])
        if world.ways == "parts":
            show_lines(left, problem["spec"].grid)
        texts = {}
        for name_of_style in traces(problem):
            draw = random.Random(f"dial 5 {name_of_style}")  # one in which every habit shows
            texts[name_of_style] = lesson(problem["spec"], name_of_style, world, draw)
        show_texts(right, problem["problem"], name, texts)
    save(figure, path)


def save(figure, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def show_picture(axes, image):
    """A picture, enlarged."""
    axes.imshow(image.resize((8 * image.width, 8 * image.height), Image.Resampling.LANCZOS))
    axes.axis("off")


def show_lines(axes, grid):
    """A frame around the line of the grid that each style misses, with the style's name."""
    cell = 8 * 28
    rows = len(grid)
    columns = len(grid[0])
    frames = {
        "first row": (0, 0, columns, 1),
        "last row": (0, rows - 1, columns, 1),
        "last column": (columns - 1, 0, 1, rows),
    }
    for number, (name, line) in enumerate(LINES.items()):
        x, y, wide, high = frames[line]
        colour = f"C{number}"
        inset = 12 * number + 6
        corner = (x * cell + inset, y * cell + inset)
        axes.add_patch(Rectangle(corner, wide * cell - 2 * inset, high * cell - 2 * inset, fill=False, ec=colour, lw=2))
        axes.text(*corner, name, color=colour, fontsize=8, va="top")


def show_texts(axes, question, label, texts):
    """A question, a label beside it, and texts by the names of their styles."""
    axes.text(0, 0.97, question, fontsize=13, weight="bold", va="top")
    axes.text(1, 0.97, label, fontsize=10, color="0.5", va="top", ha="right")
    for line, (name, text) in enumerate(texts.items()):
        height = 0.7 - 0.28 * line
        axes.text(0, height, name, fontsize=11, color="tab:blue", va="top")
        wrapped = textwrap.fill(text, 112)
        axes.text(0.08, height, wrapped, fontsize=9, family="monospace", va="top", parse_math=False)
    axes.axis("off")


def main():
    splits = [split for split, size in SIZES.items() if size is not None]
    parser = Parser("toy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs", help="the folder for the pictures")
    parser.add_argument("--models", nargs="*", choices=list(worlds_of_models()), default=list(worlds_of_models()))
    parser.add_argument("--split", default="test", choices=splits, help="the split whose problems the table is about")
    parser.add_argument("--count", type=int, default=128, help="how many of them")
    args = parser.parse_args()
    for name, drawn in (("toy.png", picture), ("toy-dials.png", dials)):
        drawn(Path(args.output, name))
        print(f"drawn: {Path(args.output, name)}")
    rows = {}
    for model in tqdm(args.models, "measuring", leave=False):
        world = worlds_of_models()[model]
        rows[model] = measure(model, world, args.split, count=args.count)
        if WORLDS[world].skills == 2 and args.split == "test":
            rows[f"{model}@skill"] = measure(model, world, "skill", count=args.count)
    if "toy" in args.models:
        rows["toy, clear"] = measure("toy", "toy-clear", args.split, count=args.count)
    print_table(rows)


if __name__ == "__main__":
    main()

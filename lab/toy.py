"""A look at the tabletop: draws sample problems, builds both models and prints what their answers are like.

    python lab/toy.py

The world, its problems and its two models are in tabletop/, described in tabletop/README.md.
"""

import argparse
import sys
import textwrap
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python lab/toy.py` finds common

from common import is_right, load_policy, sample
from eval_passk import pass_at_k
from harness.answers import final_answer
from harness.flags import Parser
from tabletop import NAMES, build
from tabletop.grids import STYLES, VERIFIERS
from tabletop.problems import SIZES, problem_of, problems
from tabletop.traces import style, traces

from matplotlib.figure import Figure
from PIL import Image

# --- the table --------------------------------------------------------------------------------------------------------


def measure(name: str, split: str = "test", count: int = 128, samples: int = 16, seed: int = 1) -> dict[str, float]:
    """One column of the table: what `samples` answers at temperature 1 to each of `count` problems are like."""
    policy, processor = load_policy(build(name))
    asked = problems(split, count)[:]
    rollout = sample(policy, processor, asked, samples, seed=(seed, "table"), max_completion_length=96)
    right_P = rollout.score(is_right).sum(1).numpy()
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
    """pass@1 and pass@samples for each kind of question. right_P: the number of right answers to each problem."""
    row = {}
    for verifier in VERIFIERS:
        right = right_P[[problem["verifier"] == verifier for problem in asked]]
        for k in (1, samples):
            row[f"pass@{k} {verifier}"] = pass_at_k(samples, right, k).mean()
    return row


def shares_of_styles(texts):
    """Which share of the answers is in each style."""
    used = Counter(style(text) for text in texts)
    return {f"of {name}": used[name] / len(texts) for name in (*STYLES, "other")}


def print_table(columns):
    """Prints {model: {key: number}}, a line for each key."""
    print(f"{'':16}" + "".join(f"{name:>14}" for name in columns))
    first = next(iter(columns.values()))
    for key in first:
        digits = 0 if key == "weights" else 3
        numbers = [f"{column[key]:>14,.{digits}f}" for column in columns.values()]
        print(f"{key:16}" + "".join(numbers))


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(path: str | Path) -> None:
    """Draws one problem of each kind with its traces, and one out-of-domain problem, and saves them as a picture."""
    shown = [problem_of("train", index) for index in (8, 1, 2, 7)]
    shown.append(problem_of("ood", 9))
    figure = Figure(figsize=(13, 2.3 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), 2, width_ratios=(1, 5))
    for (left, right), problem in zip(rows, shown, strict=True):
        show_picture(left, problem)
        show_texts(right, problem)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def show_picture(axes, problem):
    """The picture of a problem, enlarged."""
    image = problem["images"][0]
    axes.imshow(image.resize((8 * image.width, 8 * image.height), Image.Resampling.LANCZOS))
    axes.axis("off")


def show_texts(axes, problem):
    """The question of a problem, its kind, its id and its traces."""
    axes.text(0, 0.97, problem["problem"], fontsize=13, weight="bold", va="top")
    label = f"{problem['verifier']}   {problem['id']}"
    axes.text(1, 0.97, label, fontsize=10, color="0.5", va="top", ha="right")
    for line, (name, text) in enumerate(traces(problem).items()):
        height = 0.7 - 0.28 * line
        axes.text(0, height, name, fontsize=11, color="tab:blue", va="top")
        wrapped = textwrap.fill(text, 106)
        axes.text(0.08, height, wrapped, fontsize=10, family="monospace", va="top", parse_math=False)
    axes.axis("off")


def main():
    splits = [split for split, size in SIZES.items() if size is not None]
    parser = Parser("toy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/toy.png", help="where the picture of sample problems goes")
    parser.add_argument("--split", default="test", choices=splits, help="the split whose problems the table is about")
    parser.add_argument("--count", type=int, default=128, help="how many of them")
    args = parser.parse_args()
    picture(args.output)
    print(f"sample problems: {args.output}")
    print_table({name: measure(name, args.split, args.count) for name in NAMES})


if __name__ == "__main__":
    main()

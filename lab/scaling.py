"""How the ratios of lab/bench.py move, and how the cost of a step grows: with G, pictures, width, P, T, V.

    python lab/scaling.py            some minutes on one core; writes results/scaling.json and results/scaling.png
    python lab/scaling.py --dials V  measures V again; the other rows of results/scaling.json stay

Ratios: the cost of transformers' generate over that of our sampler, every answer to the limit, and of the plain update
over ours, T/S about .5; at 4, 8 and 16 answers to a prompt, three sizes of picture, three widths of the model.

Costs: CPU seconds of sampling and of updating, one dial at a time. A cost is modelled as a + b·xⁿ, fitted so that the
relative errors are smallest; a is what a step costs whatever the dial, and n is the exponent. Attention is timed by
itself too: it alone may grow faster than the tokens do. What is left without it is fitted as "others".

All is measured in one process and one thread. Ratios are medians over pairs, costs the smallest of several runs.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in lab/, not in the root
os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported

from common import find_model, load_policy, load_problems
from harness import attention
from harness.flags import Parser, UserError, at_least
from harness.run import check_writable, generator, write_atomically
from lab import bench, pictures
from lab.peaks import config_of

import numpy as np
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import AutoConfig

USUAL = dict(count=8, answers=8, length=32)  # P, G, T where the dial is another
RATIOS = {"G": (4, 8, 16), "picture": (3, 6, 12), "width": (128, 256, 512)}  # picture: cells of 28 pixels along a side
COSTS = {
    "P": (4, 8, 16, 32, 64),
    "G": (4, 8, 16, 32, 64),
    "T": (16, 32, 64, 128, 256),
    "V": (8192, 16_384, 32_768, 65_536, 131_072),
}
EXPONENTS = np.arange(0, 2.501, 0.01)
# The kernels of attention when answers are read and differentiated; when they are sampled it is a function.
KERNELS = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)

# --- what is measured -------------------------------------------------------------------------------------------------


class Case:
    """A model, problems and lengths: `answers` to each of `count` problems, `length` tokens each."""

    def __init__(self, *, count, answers, length, cells=None, width=None, vocabulary=None):
        self.policy, self.processor = load_policy("toy")
        self.processor.image_processor.size = dict(shortest_edge=784, longest_edge=10**7)
        if width:
            tokenizer = self.processor.tokenizer
            self.become(config_of(tokenizer, width, layers=4, width=3 * width, vocabulary=512))
        if vocabulary:
            config = AutoConfig.from_pretrained(find_model("toy"))
            config.get_text_config().vocab_size = vocabulary
            self.become(config)
            self.policy.vocabulary = vocabulary
        self.policy.requires_grad_(True)
        self.policy.banned = self.policy.banned + self.policy.ends  # no answer may end: all are of one length
        self.problems = load_problems(f"toy@train:{count}")[:]
        if cells:
            self.problems = bench.noise_problems(count, (28 * cells) ** 2)
        self.args = argparse.Namespace(num_generations=answers, max_completion_length=length)
        self.rollout = bench.invent(self.processor, self.problems, answers, length)
        self.advantage_B = torch.randn(len(self.rollout), generator=generator("advantage"))

    def become(self, config):
        """Takes a model of random weights in the place of the tabletop's."""
        torch.manual_seed(1)
        self.policy = bench.random_policy(config, find_model("toy"))
        self.policy.set_vocabulary(self.processor.tokenizer)

    def sample(self):
        bench.draw(self.args, self.policy, self.processor, self.problems)

    def generate(self):
        bench.generate(
            self.policy, self.processor, self.problems, G=self.args.num_generations,
            T=self.args.max_completion_length)

    def update(self):
        bench.backward(self.policy, self.rollout, self.advantage_B)

    def update_plainly(self):
        bench.backward(self.policy, self.rollout, self.advantage_B, plain=True)


DIALS = {"P": "count", "G": "answers", "T": "length", "V": "vocabulary", "picture": "cells", "width": "width"}


def case_of(dial, value):
    """The usual case with one dial at another value."""
    return Case(**USUAL | {DIALS[dial]: value})


def ratios(case, pairs):
    """How many times our cost generate and the plain update cost."""
    sampling = bench.in_turn(case.sample, case.generate, pairs)
    updating = bench.in_turn(case.update, case.update_plainly, pairs)
    return dict(sampling=sampling["ratio"], updating=updating["ratio"])


def costs(case, repeats):
    """CPU seconds of sampling, of updating, and of the attention in each: the least of some, which disturbs least."""
    case.sample()
    case.update()
    sampling = [sampling_seconds(case) for _ in range(repeats)]
    whole, attention = min(sampling)
    updating = min(bench.cpu_seconds(case.update) for _ in range(repeats))
    return {
        "sampling": whole,
        "attention, sampling": attention,
        "updating": updating,
        "attention, updating": updating * kernel_share(case.update),
    }


def sampling_seconds(case):
    """CPU seconds of sampling, and of the attention in it."""
    calls = []
    watched = bench.timed(attention.answers_attention, calls)
    with mock.patch.object(attention, "answers_attention", watched):
        whole = bench.cpu_seconds(case.sample)
    return whole, sum(calls)


def kernel_share(run):
    """The share of the kernels of attention in the time of all operations of run()."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    events = found.key_averages()
    attention = sum(event.self_cpu_time_total for event in events if event.key in KERNELS)
    return attention / sum(event.self_cpu_time_total for event in events)


# --- exponents --------------------------------------------------------------------------------------------------------


def fit(values, seconds):
    """The best a + b·xⁿ with a, b ≥ 0 by relative errors: dict of fixed (a), exponent (n), error (the mean one).

    For every n, a and b are found by least squares; where that makes a negative, a is 0.
    """
    x = np.array(values, float) / values[-1]
    y = np.array(seconds, float)
    best = None
    for n in EXPONENTS[1:]:
        powers = np.stack([1 / y, x**n / y], 1)
        fixed, slope = np.linalg.lstsq(powers, np.ones(len(y)), rcond=None)[0]
        if fixed < 0:
            fixed = 0.0
            slope = (x**n / y).sum() / ((x**n / y) ** 2).sum()
        error = float(np.abs(fixed / y + slope * x**n / y - 1).mean())
        if best is None or error < best["error"]:
            best = dict(fixed=float(fixed), exponent=float(n), error=error)
    return best


def plain_exponent(values, seconds):
    """The slope of the line through the logarithms, what is fixed included."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def exponents(rows):
    """For each dial and what was measured: its fit, and the slope of the logarithms with what is fixed in it."""
    found = []
    for dial in dict.fromkeys(row["dial"] for row in rows):
        mine = [row for row in rows if row["dial"] == dial]
        values = [row["value"] for row in mine]
        seconds = {what: [row["seconds"][what] for row in mine] for what in mine[0]["seconds"]}
        for phase in COLOURS:
            both = zip(seconds[phase], seconds[f"attention, {phase}"], strict=True)
            seconds[f"others, {phase}"] = [whole - part for whole, part in both]
        for what, some in seconds.items():
            found.append(dict(dial=dial, what=what, **fit(values, some), with_fixed=plain_exponent(values, some)))
    return found


# --- table and picture ------------------------------------------------------------------------------------------------

NAMES = {
    "G": "answers to a prompt (G)",
    "picture": "a picture's side, in cells of 28 pixels",
    "width": "width of the model",
    "P": "problems (P)",
    "T": "answer tokens (T)",
    "V": "vocabulary (V)",
}
COLOURS = {"sampling": pictures.PALETTE["grpo"], "updating": pictures.PALETTE["vepo"]}


def print_table(rows, fits):
    """Prints ratios, then exponents."""
    print(f"{'dial':10}{'value':>8}{'sampling':>12}{'updating':>12}")
    for row in rows:
        print(f"{row['dial']:10}{row['value']:8}{row['sampling']:12.2f}{row['updating']:12.2f}")
    print(f"\n{'dial':6}{'seconds of':22}{'exponent':>10}{'fixed':>10}{'error':>8}{'fixed included':>16}")
    for row in fits:
        print(f"{row['dial']:6}{row['what']:22}{row['exponent']:10.2f}{row['fixed']:10.3f}{row['error']:8.1%}"
              f"{row['with_fixed']:16.2f}")


def draw(found, path):
    """Ratios in the upper row, costs and their exponents in the lower one, where both axes are logarithmic."""
    with pictures.matplotlib.rc_context(pictures.STYLE):
        figure = pictures.frame(
            "What a step costs compared with the plain way, and how that cost grows",
            "Above: the cost of transformers' generate and of the plain update, as multiples of ours. Below: CPU "
            "seconds on one core, and the exponent n of a + b·xⁿ.", 2 * pictures.ROW + 1.4)
        rows = {"ratios": RATIOS, "costs": COSTS}
        grid = figure.add_gridspec(2, len(RATIOS) * len(COSTS))
        for row, (what, dials) in enumerate(rows.items()):
            wide = grid.ncols // len(dials)
            for column, dial in enumerate(dials):
                axis = figure.add_subplot(grid[row, column * wide:(column + 1) * wide])
                panel(axis, dial, [some for some in found[what] if some["dial"] == dial], found["exponents"])
        return pictures.save(figure, path)


def panel(axis, dial, rows, fits):
    """What was measured along one dial: ratios, or seconds with their exponents."""
    values = [row["value"] for row in rows]
    is_cost = "seconds" in rows[0]
    for phase, colour in COLOURS.items():
        numbers = [row["seconds"][phase] if is_cost else row[phase] for row in rows]
        label = phase
        if is_cost:
            fitted, = [row for row in fits if (row["dial"], row["what"]) == (dial, phase)]
            label = f"{phase}, n = {fitted['exponent']:.2f}"
        axis.plot(values, numbers, color=colour, marker="o", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [short(value) for value in values])
    if is_cost:
        axis.set_yscale("log", base=2)
    else:
        axis.set_ylim(0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    axis.minorticks_off()
    axis.set_xlabel(NAMES[dial])
    axis.set_title("seconds" if is_cost else "times our cost")
    axis.legend(frameon=False, fontsize=6.5, loc="upper left" if is_cost else "lower right")


def short(value):
    """A large number in thousands of 1,024."""
    return f"{value // 1024}k" if value >= 1024 else f"{value}"


# --- the run ----------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = Parser("scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=at_least(1), default=3, help="how often each is measured")
    parser.add_argument("--dials", nargs="+", choices=NAMES, default=list(NAMES),
                        help="what to measure; for the other dials, the rows in --output are kept")
    parser.add_argument("--output", default="results/scaling.json", help="where the numbers go; the picture beside it")
    return parser.parse_args(argv)


def measure(args):
    """All ratios and costs, with the exponents."""
    rows = []
    for dial, value in tqdm(turns(RATIOS, args.dials), desc="ratios"):
        rows.append(dict(dial=dial, value=value) | ratios(case_of(dial, value), args.pairs))
    found = []
    for dial, value in tqdm(turns(COSTS, args.dials), desc="costs"):
        found.append(dict(dial=dial, value=value, seconds=costs(case_of(dial, value), args.pairs)))
    if set(args.dials) != set(NAMES):
        before = json.loads(Path(args.output).read_text())
        rows = beside(rows, before["ratios"])
        found = beside(found, before["costs"])
    return dict(ratios=rows, costs=found, exponents=exponents(found))


def turns(table, dials):
    """Every value of the dials that are to be turned."""
    return [(dial, value) for dial, values in table.items() if dial in dials for value in values]


def beside(rows, before):
    """The rows that were there, those of the dials that were turned again replaced, in the same order."""
    again = {(row["dial"], row["value"]): row for row in rows}
    return [again.get((row["dial"], row["value"]), row) for row in before]


def main(args):
    check_writable(str(Path(args.output).parent), "--output")
    if set(args.dials) != set(NAMES) and not Path(args.output).exists():
        raise UserError(f"--dials: {args.output} has no rows of the other dials: measure all of them first")
    torch.set_num_threads(1)
    found = measure(args)
    about = dict(pairs=args.pairs, usual=USUAL, torch=torch.__version__, transformers=transformers.__version__)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, json.dumps(about | found, indent=1) + "\n")
    print_table(found["ratios"], found["exponents"])
    print(f"\nlook at {draw(found, Path(args.output).with_suffix('.png'))}")


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        Parser().error(str(error))

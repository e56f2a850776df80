"""How the ratios of lab/bench.py move, and how the cost of a step grows: with G, pictures, width, P, T, V.

    python lab/scaling.py          some minutes on one core; writes results/scaling.json and results/scaling.png

Ratios: transformers' generate by our sampler, every answer to the limit, and the plain update by ours, T/S about .5; at
4, 8 and 16 answers to a prompt, three sizes of picture, three widths of the model.

Costs: CPU seconds of sampling and of updating, one dial at a time. A cost is taken for a + b·xⁿ, fitted so that the
relative errors are smallest; a is what a step costs whatever the dial, and n is the exponent. Attention is timed by
itself too: it alone may grow faster than the tokens do.

All is measured in one process and one thread, as medians; pairs take turns.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in lab/, not in the root
os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported

from common import find_model, load_policy, load_problems
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
    "P": (2, 4, 8, 16, 32),
    "G": (2, 4, 8, 16, 32),
    "T": (8, 16, 32, 64, 128),
    "V": (512, 2048, 4096, 8192, 16_384),
}
EXPONENTS = np.arange(0, 2.501, 0.01)
# What attention is made of: when answers are sampled, and when they are read and differentiated.
ATTENTION = (
    "aten::bmm",
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
    """CPU seconds of sampling, of updating, and of the attention in each."""
    found = {}
    for phase, run in (("sampling", case.sample), ("updating", case.update)):
        run()
        found[phase] = statistics.median(bench.cpu_seconds(run) for _ in range(repeats))
        found[f"attention, {phase}"] = attention_seconds(run)
    return found


def attention_seconds(run):
    """CPU seconds that the kernels of attention take in run()."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    micro = sum(event.self_cpu_time_total for event in found.key_averages() if event.key in ATTENTION)
    return micro / 1e6


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
        for what in mine[0]["seconds"]:
            seconds = [row["seconds"][what] for row in mine]
            found.append(dict(
                dial=dial, what=what, **fit(values, seconds), with_fixed=plain_exponent(values, seconds)))
    return found


# --- table and picture ------------------------------------------------------------------------------------------------

NAMES = {
    "G": "answers to a prompt (G)",
    "picture": "cells of 28 pixels along a picture's side",
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
    """Ratios in the upper row, costs and their exponents in the lower one. Both axes are logarithmic below."""
    columns = max(len(RATIOS), len(COSTS))
    with pictures.matplotlib.rc_context(pictures.STYLE):
        figure = pictures.frame(
            "What a step costs beside the plain way, and how it grows",
            "Above: transformers' generate by our sampler, the plain update by ours. Below: CPU seconds on one core, "
            "and the exponent n of a + b·xⁿ.", 2 * pictures.ROW + 1.4)
        grid = figure.add_gridspec(2, columns)
        for column, dial in enumerate(RATIOS):
            draw_ratios(figure.add_subplot(grid[0, column]), dial, found["ratios"])
        for column, dial in enumerate(COSTS):
            draw_costs(figure.add_subplot(grid[1, column]), dial, found)
        return pictures.save(figure, path)


def draw_ratios(axis, dial, rows):
    """Both ratios along one dial."""
    mine = [row for row in rows if row["dial"] == dial]
    values = [row["value"] for row in mine]
    for phase, colour in COLOURS.items():
        axis.plot(values, [row[phase] for row in mine], color=colour, marker="o", label=phase)
    axis.set_xscale("log", base=2)
    axis.set_ylim(0)
    finish(axis, dial, values)
    axis.set_title("times our cost")
    axis.legend(frameon=False, fontsize=7)


def draw_costs(axis, dial, found):
    """Both costs along one dial, with their exponents."""
    mine = [row for row in found["costs"] if row["dial"] == dial]
    values = [row["value"] for row in mine]
    for phase, colour in COLOURS.items():
        fitted, = [row for row in found["exponents"] if (row["dial"], row["what"]) == (dial, phase)]
        seconds = [row["seconds"][phase] for row in mine]
        axis.plot(values, seconds, color=colour, marker="o", label=f"{phase}, n = {fitted['exponent']:.2f}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    finish(axis, dial, values)
    axis.set_title("seconds")
    axis.legend(frameon=False, fontsize=7)


def finish(axis, dial, values):
    """Ticks at the values that were measured, and what they are."""
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
    axis.set_xlabel(NAMES[dial])


# --- the run ----------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = Parser("scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=at_least(1), default=3, help="how often each is measured")
    parser.add_argument("--output", default="results/scaling.json", help="where the numbers go; the picture beside it")
    return parser.parse_args(argv)


def measure(pairs):
    """All ratios and costs, with the exponents."""
    rows = []
    dials = [(dial, value) for dial, values in RATIOS.items() for value in values]
    for dial, value in tqdm(dials, desc="ratios"):
        rows.append(dict(dial=dial, value=value) | ratios(case_of(dial, value), pairs))
    found = []
    dials = [(dial, value) for dial, values in COSTS.items() for value in values]
    for dial, value in tqdm(dials, desc="costs"):
        found.append(dict(dial=dial, value=value, seconds=costs(case_of(dial, value), pairs)))
    return dict(ratios=rows, costs=found, exponents=exponents(found))


def main(args):
    check_writable(str(Path(args.output).parent), "--output")
    torch.set_num_threads(1)
    found = measure(args.pairs)
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

"""Mixed reward: one verifier for each problem, chosen by its type (VLAA-Thinker, arXiv 2504.11468), in `toy-mixed`.

    python lab/mixed.py               GRPO on all five verifiers, three seeds: does every verifier's score rise?
    python lab/mixed.py --steps 3     a few steps, to see it work

Writes results/mixed.json: for each verifier the held-out pass@1 before and after, with intervals over seeds and
problems, and for descriptions how many name what most cells show, which the reward model can only guess.

`arms` gives the arms of claim V3, for a study: the mixed reward against each verifier left out, with its problems.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in lab/, not in the root

from harness.answers import VERIFIERS
from harness.flags import Parser, UserError, at_least
from harness.run import write_atomically
from lab import logs, runs
from lab.arms import FIVE, RL, THREE
from lab.runs import Spec
from tabletop import build, judge
from tabletop.grids import best_answer
from tabletop.problems import load

import numpy as np

WORLD = "toy-mixed"
JUDGED = dict(model=WORLD, reward_model=judge.NAME)
# What is looked at here: no setting was chosen by it. `fresh` is for the study.
HELD_OUT = f"{WORLD}@study:320"
DRAWS = 10_000  # of a bootstrap

# --- the arms of claim V3 ---------------------------------------------------------------------------------------------


def arms(problems=640, samples=8, seeds=FIVE):
    """{name: Spec}: GRPO on all five verifiers, and with each one left out; and what each makes of held-out problems.

    Every arm draws equally many answers to equally many problems: what an arm leaves out, the other types fill. The
    held-out problems hold all five types, in turn.
    """
    home = JUDGED | RL | dict(dataset=f"{WORLD}@train", max_completion_length=64)
    asked = dict(dataset=f"{WORLD}@fresh:{problems}", num_samples=samples, ks="1", max_completion_length=64,
                 reward_model=judge.NAME)
    found = {f"{WORLD}/mixed": Spec("grpo.py", home, seeds=seeds)}
    for left_out in VERIFIERS:
        others = ",".join(verifier for verifier in VERIFIERS if verifier != left_out)
        found[f"{WORLD}/without-{left_out}"] = Spec("grpo.py", home | dict(verifiers=others), seeds=seeds)
    trained = list(found)
    found[f"{WORLD}/eval-base"] = Spec("eval_passk.py", asked | dict(model=WORLD), seeds=seeds, last="eval.json")
    for name in trained:
        arm = name.partition("/")[2]
        found[f"{WORLD}/eval-{arm}"] = Spec(
            "eval_passk.py", asked, start=name, needs=(name,), seeds=seeds, last="eval.json")
    return found


# --- does every verifier's score rise? --------------------------------------------------------------------------------


def rising(steps):
    """{name: Spec} of the runs: grpo.py with its own settings of the tabletop, and two measurements."""
    name = f"{WORLD}/grpo"
    trained = JUDGED | dict(dataset=f"{WORLD}@train", eval_dataset="none", max_steps=steps)
    asked = dict(dataset=HELD_OUT, num_samples=8, ks="1", reward_model=judge.NAME)
    return {
        name: Spec("grpo.py", trained, seeds=THREE),
        f"{WORLD}/before": Spec("eval_passk.py", asked | dict(model=WORLD), seeds=THREE, last="eval.json"),
        f"{WORLD}/after": Spec("eval_passk.py", asked, start=name, needs=(name,), seeds=THREE, last="eval.json"),
    }


def scores_of(bench, name, seeds):
    """{verifier: (seeds, problems)}: the share of right answers to each problem. `best`: of descriptions, the share
    that names what most cells show."""
    specs = {problem["id"]: problem["spec"] for problem in load(WORLD, "study")}
    found = {}
    for seed in seeds:
        rows = sorted(logs.load(bench.folder(name, seed), "samples.jsonl", ["id", "right"]), key=lambda row: row["id"])
        columns = {}
        for row in rows:
            columns.setdefault(row["verifier"], []).append(np.mean(row["right"]))
            if row["verifier"] == "open_ended":
                best = best_answer(specs[row["id"]])
                columns.setdefault("best", []).append(np.mean([answer == best for answer in row["answers"]]))
        for kind, column in columns.items():
            found.setdefault(kind, []).append(column)
    return {kind: np.array(column) for kind, column in found.items()}


def interval(values_SP):
    """[mean, low, high]: the mean of (seeds, problems) with a 95% interval that resamples both."""
    S, P = values_SP.shape
    generator = np.random.default_rng(0)
    means = []
    for _ in range(DRAWS):
        some = values_SP[generator.integers(S, size=S)]
        means.append(some[:, generator.integers(P, size=P)].mean())
    low, high = np.percentile(means, (2.5, 97.5))
    return [round(float(value), 4) for value in (values_SP.mean(), low, high)]


def result(bench, specs, steps):
    """What results/mixed.json holds."""
    before = scores_of(bench, f"{WORLD}/before", THREE)
    after = scores_of(bench, f"{WORLD}/after", THREE)
    rows = {}
    for kind in (*VERIFIERS, "best"):
        rows[kind] = dict(
            before=interval(before[kind]), after=interval(after[kind]), rise=interval(after[kind] - before[kind]),
            each_seed=[[round(float(value), 4) for value in pair]
                       for pair in zip(before[kind].mean(1), after[kind].mean(1), strict=True)])
    commands = {}
    for name in specs:
        script, flags = bench.command(name, 1)
        commands[name] = " ".join([script, *runs.argv_of(flags)]).replace(f"{bench.place}/", "runs/mixed/")
    return dict(world=WORLD, held_out=HELD_OUT, seeds=list(THREE), steps=steps, verifiers=rows, commands=commands)


def show(found):
    """The result as text."""
    lines = [f"{'verifier':12}{'before':>26}{'after':>26}{'rise':>28}"]
    for kind, row in found["verifiers"].items():
        cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*row[key]) for key in ("before", "after", "rise")]
        lines.append(f"{kind:12}" + "".join(f"{cell:>27}" for cell in cells))
    return "\n".join(lines)


def main(args):
    specs = rising(args.steps)
    for model in (WORLD, judge.NAME):
        build(model)  # once, not by every run at the same time
    bench = runs.Bench(runs.ROOT / args.runs, specs, args.jobs)
    bench.make_all("mixed")
    found = result(bench, specs, args.steps)
    print(show(found))
    write_atomically(Path(args.output), json.dumps(found, indent=1) + "\n")
    print(f"written: {args.output}")


def parse(argv=None):
    parser = Parser("mixed", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=at_least(1), default=25, help="of each run")
    parser.add_argument("--jobs", type=at_least(1), default=os.cpu_count(), help="runs at the same time, a core each")
    parser.add_argument("--runs", default="runs/mixed", help="folder of the runs")
    parser.add_argument("--output", default="results/mixed.json", help="file of the result")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

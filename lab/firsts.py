"""What every script learns on the tabletop with its own settings: no tuned flags, three seeds.

    python lab/firsts.py             about an hour on two cores; resumable, as the studies are
    python lab/firsts.py --seeds 1   the first seed alone
    python lab/firsts.py --alone     the scripts with a reward as the README starts them, one at a time on all cores

Writes results/firsts.json (held-out pass@1 before and after, with intervals) and results/firsts.png (the curves of
training), and prints the table. The runs are in runs/firsts. The problems are those of `toy@test`, by which the
settings were chosen, with seed 0. A run has one core here, so its seconds are not those of a laptop. For those there is
--alone: it writes results/firsts-alone.json, and nothing else should be running meanwhile.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in lab/, not in the root

from harness.flags import Parser, UserError, at_least
from harness.run import check_writable, write_atomically
from lab import logs, pictures, runs

REINFORCED = ("grpo", "vepo", "mupo", "forks/gspo", "forks/dapo", "forks/dr_grpo")
WARM_STARTS = ("opd", "sft")
COLOURS = {"grpo": "grpo", "vepo": "vepo", "mupo": "mupo", "gspo": "other", "dapo": "sft", "dr_grpo": "opd"}
SEEDS = 3


def specs_of(seeds):
    """{name: Spec} of the runs. The one flag that they are given is the number of steps, as each script has it."""
    found = {}
    for script in (*REINFORCED, *WARM_STARTS):
        toy = importlib.import_module(script.replace("/", ".")).TOY
        name = script.rpartition("/")[2]
        found[name] = runs.Spec(f"{script}.py", dict(max_steps=toy["max_steps"]), seeds=tuple(range(1, seeds + 1)))
    return found


def row_of(bench, name, seed):
    """What one run learned: {script, seed, steps, before and after: [pass@1, low, high]}."""
    done = bench.job(name, seed)
    rows = logs.load(bench.folder(name, seed), "metrics.jsonl", ["step"])
    return dict(script=done["script"], seed=seed) | learned(rows) | dict(code=done["code"])


def learned(rows):
    """{steps, before and after: [pass@1, low, high]} from the rows of a run's metrics.jsonl."""
    measured = [row for row in rows if "eval_accuracy" in row]
    return dict(steps=rows[-1]["step"], before=interval_of(measured[0]), after=interval_of(measured[-1]))


def interval_of(row):
    """The held-out pass@1 that a row of metrics.jsonl holds, with its interval."""
    return [row["eval_accuracy"], row["eval_low"], row["eval_high"]]


def alone(script, seed, folder):
    """One run of a script as the README starts it. Returns its row, with `seconds` (of all its steps) and `whole` (of
    the command, which also starts Python and measures pass@1 twice)."""
    place = folder / "row.json"
    if place.exists():
        return json.loads(place.read_text())
    shutil.rmtree(folder, ignore_errors=True)  # a run that was stopped would not tell how long it takes
    print(f"{script} --seed {seed}", file=sys.stderr)
    command = [sys.executable, "-m", "accelerate.commands.launch", script, f"--seed={seed}", f"--output_dir={folder}"]
    began = time.monotonic()
    status = subprocess.run(command, cwd=runs.ROOT, check=False).returncode
    whole = time.monotonic() - began
    if status:
        raise UserError(f"{script} --seed {seed} ended with status {status}; its own error line says why")
    rows = logs.load(folder, "metrics.jsonl", ["step"])
    training = sum(row.get("seconds", 0) for row in rows)
    row = learned(rows) | dict(seconds=round(training, 1), whole=round(whole, 1), code=runs.code_hash())
    row = dict(script=script, seed=seed) | row
    write_atomically(place, json.dumps(row) + "\n")
    return row


def show(rows):
    """The table, as Markdown."""
    lines = ["| command | before | after |", "|---|---|---|"]
    for row in rows:
        before = "{:.3f} [{:.3f}, {:.3f}]".format(*row["before"])
        after = "{:.3f} [{:.3f}, {:.3f}]".format(*row["after"])
        lines.append(f"| `python {row['script']} --seed {row['seed']}` | {before} | {after} |")
    return "\n".join(lines)


def draw(bench, path):
    """The accuracy on training problems along the way, of all scripts that have a reward."""
    folders = {}
    for name in COLOURS:
        folders[name] = [bench.folder(name, seed) for seed in bench.specs[name].seeds]
    colours = {name: pictures.PALETTE[colour] for name, colour in COLOURS.items()}
    return pictures.overlay(
        folders, path, keys=["accuracy", "entropy"],
        headline="Learning to read faded pictures: every script with its own settings",
        colours=colours)


def main(args):
    place = Path(args.output)
    check_writable(str(place), "--output")
    if args.alone:
        main_alone(args, place)
        return
    bench = runs.Bench(runs.ROOT / "runs" / "firsts", specs_of(args.seeds), args.jobs)
    bench.make_all("firsts")
    rows = [row_of(bench, name, seed) for name, spec in bench.specs.items() for seed in spec.seeds]
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / "firsts.json", json.dumps(rows, indent=1) + "\n")
    draw(bench, place / "firsts.png")
    print(show(rows))


def main_alone(args, place):
    there = runs.ROOT / "runs" / "firsts-alone"
    rows = []
    for script in REINFORCED:
        for seed in range(1, args.seeds + 1):
            name = script.rpartition("/")[2]
            rows.append(alone(f"{script}.py", seed, there / f"{name}-{seed}"))
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / "firsts-alone.json", json.dumps(rows, indent=1) + "\n")
    print(show(rows))
    training = max(row["seconds"] for row in rows)
    whole = max(row["whole"] for row in rows)
    print(f"training takes up to {training:.0f} seconds, a whole command up to {whole:.0f}")


def parse(argv=None):
    parser = Parser("firsts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=at_least(1), default=SEEDS, help="how many seeds of each script to run")
    parser.add_argument("--jobs", type=at_least(1), default=os.cpu_count(), help="runs at the same time, a core each")
    parser.add_argument("--alone", action="store_true", help="one run at a time on all cores, and its seconds")
    parser.add_argument("--output", default="results", help="folder for firsts.json and firsts.png")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        os._exit(130)  # at once: the threads that wait for the runs would hold up an ordinary exit

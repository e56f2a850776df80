"""What a second process on the machine costs a run: the seconds of a step, alone and beside it, by how threads wait.

    python lab/busy.py          about eight minutes on two idle cores; prints a table, writes results/busy.json

Threads of OpenMP that wait for each other spin for a while before they sleep. Where another process holds a core, the
one that is waited for does not run, and spinning only takes its time. harness/threads.py sees that, and spins less.
Three ways are compared: ours, always a long spin (OpenMP's own), and no spin at all; each on a quiet machine, beside a
process that keeps one core busy, and pinned to one core. The settings take turns, and a figure is the median over all
steps but the first of each run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks in lab/, not in the root

from harness.flags import Parser, UserError, at_least
from harness.run import check_writable, write_atomically

from tqdm import tqdm

WAITS = {
    "ours": dict(),
    "always a long spin": dict(UNWATCHED="1"),
    "never a spin": dict(OMP_WAIT_POLICY="PASSIVE"),
}
# grpo.py as it is, and without harness/threads.py where UNWATCHED is set.
GRPO = """
import os, runpy, sys
sys.path.insert(0, ".")
from harness import threads
if "UNWATCHED" in os.environ:
    threads.watch_cores = lambda: None
runpy.run_path("grpo.py", run_name="__main__")
"""
PLACES = ("quiet", "beside a busy process", "on one core")


def seconds_of_steps(wait, place, steps):
    """Seconds of the steps of one run of grpo.py on the tabletop, without the first, which warms up."""
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= WAITS[wait]
    cores = sorted(os.sched_getaffinity(0))
    others = []
    if place == "beside a busy process":
        others.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        os.sched_setaffinity(others[0].pid, cores[:1])
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--max_steps={steps + 1}", "--eval_dataset=none", f"--output_dir={folder}"]
        command = [sys.executable, "-c", GRPO, *flags]
        try:
            run = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if place == "on one core":
                os.sched_setaffinity(run.pid, cores[:1])
            _, said = run.communicate()
        finally:
            for process in others:
                process.kill()
        if run.returncode:
            raise UserError(f"grpo.py ended with status {run.returncode}: {said.strip().splitlines()[-1]}")
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines][1:]


def main(args):
    check_writable(os.path.dirname(args.output) or ".", "--output")
    cases = [(wait, place) for place in PLACES for wait in WAITS]
    found = {case: [] for case in cases}
    for case in tqdm(cases * args.rounds, desc="runs of grpo.py"):
        found[case] += seconds_of_steps(*case, steps=args.steps)
    table = {place: {wait: statistics.median(found[wait, place]) for wait in WAITS} for place in PLACES}
    print(f"{'seconds of a step':24}" + "".join(f"{wait:>20}" for wait in WAITS))
    for place, row in table.items():
        print(f"{place:24}" + "".join(f"{row[wait]:20.2f}" for wait in WAITS))
    result = dict(cores=os.cpu_count(), rounds=args.rounds, steps=args.steps, seconds=table)
    write_atomically(args.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = Parser("busy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=2, help="runs of each case, in turn")
    parser.add_argument("--steps", type=at_least(1), default=3, help="steps of each run that count")
    parser.add_argument("--output", default="results/busy.json", help="where the numbers go")
    try:
        main(parser.parse_args())
    except UserError as error:
        parser.error(str(error))

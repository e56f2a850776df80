"""Kills a run of a script again and again at seeded moments, and compares what is left with a run nobody killed.

    python tests/kills.py --kills 20 --script grpo --model toy

Half of the kills come after a random time, half at a random one of the run's file operations, so that many of them
meet a run that is writing. After each kill the same command with --resume goes on. A run that ends before all kills are
done is compared, and the next one begins. Equal means: metrics.jsonl without its times, samples.jsonl and the weights,
bit by bit. It ends with status 1 where something differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from drive import go
from whole_runs import metrics

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
TINY = (
    "--dataset", "toy@train:16", "--eval_dataset", "toy@test:2", "--num_generations_eval", "1", "--prompts_per_step",
    "4", "--updates_per_step", "2", "--num_generations", "2", "--max_completion_length", "12", "--save_steps", "1",
)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_event(number, place):
    """Ends this process before its `number`-th operation upon a file of the folder `place`."""
    left = [number]

    def watch(event, args):
        if event not in FILE_EVENTS or not str(args[0]).startswith(str(place)):
            return
        left[0] -= 1
        if left[0] == 0:
            die()

    sys.addaudithook(watch)


def attempt(command, place, after=None, event=None):
    """One run in a process of its own, killed `after` seconds or at file operation `event`. Whether it was killed."""
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 2)
        if event is not None:
            die_at_event(event, place)
        if after is not None:
            timer = threading.Timer(after, die)
            timer.daemon = True
            timer.start()
        go(*command)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status != 0:
        raise SystemExit(f"a run ended by itself with status {status}: {' '.join(map(str, command))}")
    return False


def found_in(place):
    """What a kill left in a folder, in a word: which of its moments it met."""
    names = {path.name for path in place.iterdir()} if place.exists() else set()
    checkpoints = [name for name in names if name.startswith("checkpoint-")]
    if "model.tmp" in names or "config.json" in names:
        return "at the end"
    if "checkpoint.tmp" in names or len(checkpoints) > 1:
        return "at a checkpoint"
    if any(name.endswith(".tmp") for name in names):
        return "at a file"
    return "elsewhere" if checkpoints else "before the first checkpoint"


def same(one, other):
    """What differs between two finished runs, as a list of names."""
    different = [] if metrics(one) == metrics(other) else ["metrics.jsonl"]
    for name in ("samples.jsonl", "model.safetensors"):
        if Path(one, name).read_bytes() != Path(other, name).read_bytes():
            different.append(name)
    return different


def count_events(command, place):
    """How many file operations a whole run makes, and its seconds. It ends in the folder `place`."""
    notes = place.with_suffix(".json")
    child = os.fork()
    if child == 0:
        seen = [0]

        def watch(event, args):
            seen[0] += event in FILE_EVENTS and str(args[0]).startswith(str(place))

        sys.addaudithook(watch)
        began = time.monotonic()
        go(*command)
        notes.write_text(json.dumps([seen[0], time.monotonic() - began]))
        os._exit(0)
    os.waitpid(child, 0)
    return json.loads(notes.read_text())


def main(args):
    torch.set_num_threads(1)
    place = Path(args.place or tempfile.mkdtemp())
    base = (args.script, "--model", args.model, *TINY, "--max_steps", args.steps)
    whole = place / "whole"
    events, seconds = count_events((*base, "--output_dir", whole), whole)
    print(f"a whole run: {events} file operations, {seconds:.1f} s", flush=True)
    dice = random.Random(args.seed)
    met = Counter()
    runs = 0
    while sum(met.values()) < args.kills:
        runs += 1
        run = place / f"run{runs}"
        killed = True
        while killed:
            moment = dict(after=dice.uniform(0, args.reach * seconds))
            if sum(met.values()) % 2:
                moment = dict(event=dice.randint(1, max(2, int(args.reach * events))))
            if sum(met.values()) == args.kills:
                moment = {}
            killed = attempt((*base, "--output_dir", run, "--resume"), run, **moment)
            if killed:
                met[found_in(run)] += 1
                print(f"run {runs}, kill {sum(met.values())}: {moment}, {found_in(run)}", flush=True)
        different = same(whole, run)
        names = sorted(path.name for path in run.iterdir())
        leftovers = [name for name in names if "checkpoint" in name or name.endswith(".tmp")]
        print(f"run {runs}: {'differs in ' + ', '.join(different) if different else 'equal'}, left over: {leftovers}")
        if different or leftovers:
            raise SystemExit(1)
    shutil.rmtree(place)
    print(f"{sum(met.values())} kills, {runs} runs, all equal; met: {dict(met)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--reach", type=float, default=0.25, help="how late a kill comes at most, of a whole run")
    parser.add_argument("--script", default="grpo")
    parser.add_argument("--model", default="toy")
    parser.add_argument("--place", default="", help="an empty folder (default: a temporary one)")
    main(parser.parse_args())

"""What a run wrote into its --output_dir, read back: its rows, its metrics as lines, and means over seeds.

    args.json        the flags of the run, one object
    metrics.jsonl    one object per training step
    samples.jsonl    a few answers of every step
    signals.jsonl    of the last step of vepo.py: one answer per line, its tokens with their signals
    clusters.jsonl   of the last step of mupo.py: one problem per line, its answers with their clusters
"""

import json
from collections import namedtuple
from pathlib import Path

from harness.flags import UserError

import numpy as np

# In reading order: title, unit, {key of metrics.jsonl: its name in a shared panel}.
# The other keys, such as those of schedules, have no panel.
PANELS = [
    ("Accuracy", "%", {"eval_accuracy": "held-out", "accuracy": "training"}),
    ("Entropy of a token", "nats", {"entropy": ""}),
    ("Different answers to a problem", "", {"distinct": ""}),
    ("Diversity of reasoning", "cosine distance",
     {"eval_diversity": "held-out", "diversity": "pairwise", "r_div": "between-cluster"}),
    ("Reward", "", {"reward": ""}),
    ("Length of an answer", "tokens", {"completion_length": ""}),
    ("Answers", "%", {"format": "well-formed", "truncated": "cut-off"}),
    ("Groups with equal rewards", "%", {"frac_reward_zero_std": ""}),
    ("KL to the reference", "nats a token", {"kl": ""}),
    ("KL to the teacher", "nats a token", {"teacher_kl": ""}),
    ("Tokens clipped", "%", {"clip_fraction": ""}),
    ("With a noised picture", "nats", {"jsd": "divergence", "delta_entropy": "entropy change"}),
    ("Visual tokens missed by entropy", "%", {"missed_by_entropy": ""}),
    ("First wrong tokens with credit", "%", {"coverage": ""}),
    ("Cluster size", "answers", {"largest_cluster": "largest", "smallest_cluster": "smallest"}),
    ("Clusters with credit from diversity alone", "%", {"only_diversity_clusters": ""}),
    ("Loss", "nats a token", {"eval_loss": "held-out", "loss": "training"}),
    ("Gradient norm", "before clipping", {"grad_norm": ""}),
    ("Gap between sampler and reading", "nats a token", {"sampler_gap": ""}),
    ("Time for a step", "s", {"seconds": "whole", "seconds_sample": "sampling", "seconds_update": "update"}),
]


def full_name(title, name):
    """What a key is called in a panel of its own: "held-out" of "Accuracy" is the "Held-out accuracy"."""
    if not name:
        return title
    return f"{name} {title.lower()}".capitalize()


NAMES = {key: full_name(title, name) for title, _, keys in PANELS for key, name in keys.items()}
UNITS = {key: unit for _, unit, keys in PANELS for key in keys}

SAMPLE = ("step", "id", "problem", "answer", "text", "reward")  # the keys of samples.jsonl
# The keys of the two files of the last step that hold lists: one entry per token of an answer, or per answer.
SIGNALS = ("tokens", "jsd", "delta_entropy", "entropy", "score", "kept")
CLUSTERS = ("embeddings", "labels", "accuracy", "texts")

Trace = namedtuple("Trace", "steps mean low high")  # all of one length, one entry per step

# --- files


def load(output_dir, name, needed):
    """Reads one file of a run: a list of objects, one per line of a .jsonl, else the only one.

    Raises UserError if there is no such file, or if something in it is not an object with the keys `needed`.
    """
    path = Path(output_dir) / name
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the --output_dir of a run")
    text = path.read_text("utf-8", errors="replace")
    lines = [text]
    if path.suffix == ".jsonl":
        lines = [line for line in text.split("\n") if line.strip()]
    return [parse(f"{path}, line {number}", line, needed) for number, line in enumerate(lines, 1)]


def parse(place, line, needed):
    """The JSON object in `line`. `place` says in an error where the line is."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); delete a line that is only half written") from error
    if not isinstance(row, dict) or not set(needed) <= set(row):
        raise UserError(f"{place}: not an object with {', '.join(needed)}; is it a run's file?")
    return row


def load_args(output_dir):
    """The flags of a run, and the name of its script under "script"."""
    return load(output_dir, "args.json", ["script"])[0]


def load_metrics(output_dir):
    """The rows of metrics.jsonl. Raises UserError if they hold no metric that has a panel."""
    rows = load(output_dir, "metrics.jsonl", ["step"])
    if not logged(rows):
        raise UserError(f"{output_dir}/metrics.jsonl: nothing to draw yet; look again when the run has made a step")
    return rows


def load_last(output_dir, name, lists):
    """Reads signals.jsonl or clusters.jsonl: (one phrase about the run and the step, the rows of the last step).

    lists: the keys that hold lists. A resumed run may log a step again; of rows that are the same the later one counts.
    """
    rows = load(output_dir, name, ["step", "id", "problem", *lists])
    last = {}
    for row in rows:
        if row["step"] == rows[-1]["step"] and row[lists[0]]:
            same = (row["id"], *row.get("tokens", ()))  # a problem has several answers in signals.jsonl
            last[same] = row
    if not last:
        raise UserError(f"{output_dir}/{name}: nothing to draw; vepo.py and mupo.py write it in their last step")
    source = f"{about(load_args(output_dir))}; step {rows[-1]['step']}"
    return source, list(last.values())


def about(args):
    """One phrase that says which run this is: its script, model, data set and seed."""
    flags = [f"{key} {args[key]}" for key in ("model", "dataset", "seed") if key in args]
    return ", ".join([args["script"], *flags])


# --- metrics over the steps


def series(rows, key):
    """(steps, values) of one metric, in order of the steps; a value that is not a finite number is nan.

    A resumed run may log a step again: its later line counts.
    """
    found = {}
    for row in rows:
        if row.get(key) is not None:
            found[row["step"]] = row[key]
    steps = sorted(found)
    values = [found[step] if np.isfinite(found[step]) else np.nan for step in steps]
    return np.array(steps, float), np.array(values, float)


def logged(rows, keys=NAMES):
    """Those of `keys` that were logged at least once, in their order."""
    return [key for key in keys if len(series(rows, key)[0])]


def running_mean(values):
    """Mean over about a twelfth of the values, centred, over fewer at the ends. Same length.

    A gap (nan) becomes as wide as the window.
    """
    kernel = np.ones(2 * (len(values) // 24) + 1)
    counts = np.convolve(np.ones(len(values)), kernel, "same")
    return np.convolve(values, kernel, "same") / counts


def aggregate(seeds):
    """Joins [(steps, values), ...], one pair per seed, into a Trace: mean, lowest, highest over the seeds.

    It has the steps that all seeds logged.
    """
    shared = sorted(set.intersection(*(set(steps) for steps, _ in seeds)))
    values = np.array([values[np.searchsorted(steps, shared)] for steps, values in seeds])
    return Trace(np.array(shared), values.mean(0), values.min(0), values.max(0))


def trace(runs, key):
    """One metric as a Trace over `runs` (a list of rows each) that differ in their seed; empty if they share no step.

    low and high are the extremes over the runs; for the held-out accuracy of a single run, the ends of its 95%
    interval. What is measured on held-out problems is not smoothed.
    """
    seeds = [series(rows, key) for rows in runs]
    if not key.startswith("eval_"):
        seeds = [(steps, running_mean(values) if len(values) else values) for steps, values in seeds]
    found = aggregate(seeds)
    if key == "eval_accuracy" and len(runs) == 1:
        low = interval_end(runs[0], "eval_low", found)
        high = interval_end(runs[0], "eval_high", found)
        return Trace(found.steps, found.mean, low, high)
    return found


def interval_end(rows, key, found):
    """One end of an interval at each step of the Trace `found`; the mean itself where none was logged."""
    ends = {}
    for step, value in zip(*series(rows, key), strict=True):
        ends[step] = value
    return [ends.get(step, mean) for step, mean in zip(found.steps, found.mean, strict=True)]

"""A run as something to look at: its curves, several runs side by side, pass@k, its tokens, its clusters, one page.

    python lab/report.py RUN_DIR                 writes RUN_DIR/curves.png and RUN_DIR/report.html, after vepo.py also
                                                 signals.png and tokens.html, after mupo.py also clusters.png
    python lab/report.py RUN_DIR RUN_DIR ...     writes overlay.png (--out elsewhere); runs that differ only in the
                                                 seed become one line, their mean, in a band from lowest to highest

Reads what a run writes into its --output_dir: `args.json`, `metrics.jsonl` (one object per step), `samples.jsonl`, and
of the last step `signals.jsonl` (vepo.py: one answer per line) or `clusters.jsonl` (mupo.py: one problem per line).
Bold lines are running means, thin ones single steps; what is measured on held-out problems is never smoothed.
A value that is not a finite number leaves a gap in its line. Every file is written whole or not at all.
Imported from the repository's root as `lab.report`: lab/ is a folder without __init__.py, which Python allows.
"""

import argparse
import base64
import html
import io
import json
import os
import re
import sys
import textwrap
from collections import Counter, namedtuple
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in lab/, not in the root

from common import UserError

# --- what is drawn

# In reading order: title, unit, {key of metrics.jsonl: its name in a shared panel}. Schedules and other keys have none.
PANELS = [
    ("Accuracy", "%", {"eval_accuracy": "held-out", "accuracy": "training"}),
    ("Entropy of a token", "nats", {"entropy": ""}),
    ("Different answers to a problem", "", {"distinct": ""}),
    ("Diversity of reasoning", "cosine distance", {"diversity": ""}),
    ("Reward", "", {"reward": ""}),
    ("Length of an answer", "tokens", {"completion_length": ""}),
    ("Answers", "%", {"format": "well-formed", "truncated": "cut-off"}),
    ("Groups with equal rewards", "%", {"frac_reward_zero_std": ""}),
    ("KL to the reference", "nats a token", {"kl": ""}),
    ("KL to the teacher", "nats a token", {"teacher_kl": ""}),
    ("Tokens clipped", "%", {"clip_fraction": ""}),
    ("With a noised picture", "nats", {"jsd": "divergence", "delta_entropy": "entropy change"}),
    ("Visual tokens missed by entropy", "%", {"missed_by_entropy": ""}),
    ("Cluster size", "answers", {"largest_cluster": "largest", "smallest_cluster": "smallest"}),
    ("Clusters that only diversity moves", "%", {"only_diversity_clusters": ""}),
    ("Loss", "nats a token", {"eval_loss": "held-out", "loss": "training"}),
    ("Gradient norm", "before clipping", {"grad_norm": ""}),
    ("Sampler against reading", "nats a token", {"sampler_gap": ""}),
    ("Time for a step", "s", {"seconds": "whole", "seconds_sample": "sampling", "seconds_update": "update"}),
]
NAMES = {key: f"{name} {title.lower()}".capitalize() if name else title
         for title, _, keys in PANELS for key, name in keys.items()}
UNITS = {key: unit for _, unit, keys in PANELS for key in keys}
SAMPLE = ("step", "id", "problem", "answer", "text", "reward")
# What the two files of the last step hold: lists, one entry per token of an answer, or per answer to a problem.
SIGNALS = ("tokens", "jsd", "delta_entropy", "entropy", "score", "kept")
CLUSTERS = ("embeddings", "labels", "accuracy", "texts")

# --- the house style: one place for sizes and colours

# Okabe and Ito's colours, which stay apart for colour-blind eyes. A script keeps its colour in every picture.
PALETTE = {"grpo": "#0072B2", "vepo": "#D55E00", "mupo": "#009E73", "opd": "#CC79A7", "sft": "#E69F00",
           "base": "#767676", "teacher": "#1a1a1a", "other": "#56B4E9"}
MARKERS = "osD^vPX"  # of clusters: seven, so that with eight colours 56 can be told apart
QUIET, WIDTH, ROW = "#767676", 9.0, 1.75  # grey; inches: at 200 dots each sharp in the 900 pixels of a README
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8, "text.color": "#1a1a1a", "text.parse_math": False,  # a "$" stays one
    "axes.titlesize": 8.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#a0a0a0", "axes.xmargin": 0.02,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#ececec", "axes.labelcolor": QUIET, "axes.labelpad": 1,
    "xtick.color": "#a0a0a0", "xtick.labelcolor": QUIET, "ytick.labelcolor": QUIET, "xtick.major.size": 2.5,
    "ytick.major.size": 0, "figure.dpi": 200, "figure.constrained_layout.h_pad": 0.07, "lines.linewidth": 1.6,
    "lines.markersize": 4.5, "lines.markeredgecolor": "white", "lines.markeredgewidth": 0.5,
}

# --- reading a run


def load(output_dir, name, needed):
    """The JSON objects in a file of a run, a list: one a line in a .jsonl, else one. Each has the keys `needed`."""
    path = Path(output_dir) / name
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the --output_dir of a run")
    text, rows = path.read_text("utf-8", errors="replace"), []
    lines = [line for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else [text]
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); delete a line left half") from error
        if not isinstance(rows[-1], dict) or not set(needed) <= set(rows[-1]):
            raise UserError(f"{path}, line {number}: not an object with {', '.join(needed)}; is it a run's file?")
    return rows


def load_last(output_dir, name, lists):
    """(about the run, the last step's rows) of signals.jsonl or clusters.jsonl. lists: the keys that hold lists.

    No row comes twice, as it would where a resumed run logged the step again.
    """
    rows, last = load(output_dir, name, ["step", "id", "problem", *lists]), {}
    for row in rows:
        if row["step"] == rows[-1]["step"] and row[lists[0]]:
            last[row["id"], *row.get("tokens", ())] = row  # a problem has several answers in signals.jsonl
    if not last:
        raise UserError(f"{output_dir}/{name}: nothing to draw; vepo.py and mupo.py write it in their last step")
    return f"{about(load(output_dir, 'args.json', ['script'])[0])}; step {rows[-1]['step']}", list(last.values())


def load_metrics(output_dir):
    rows = load(output_dir, "metrics.jsonl", ["step"])
    if not any(len(series(rows, key)[0]) for key in NAMES):
        raise UserError(f"{output_dir}/metrics.jsonl: nothing to draw yet; look again when the run has made a step")
    return rows


def series(rows, key):
    """(steps, values) of one key, in order. A resumed run may log a step again: its later line counts."""
    found = {row["step"]: row[key] for row in rows if row.get(key) is not None}
    steps = np.array(sorted(found), float)
    return steps, np.array([found[step] if np.isfinite(found[step]) else np.nan for step in steps], float)


def running_mean(values):
    """Mean over about a twelfth of the values, centred, fewer at the ends. Same length; a gap (nan) grows as wide."""
    kernel = np.ones(2 * (len(values) // 24) + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def aggregate(seeds):
    """[(steps, values), ...], a pair per seed -> steps, mean, lowest, highest, at the steps that all of them logged."""
    shared = sorted(set.intersection(*(set(steps) for steps, _ in seeds)))
    values = np.array([values[np.searchsorted(steps, shared)] for steps, values in seeds])
    return np.array(shared), values.mean(0), values.min(0), values.max(0)


def trace(runs, key):
    """(steps, mean, low, high) of one key over runs that differ in their seed; empty where they share no step.

    low and high are the extremes over the runs; of a single run's held-out accuracy the ends of its 95% interval.
    """
    seeds = [series(rows, key) for rows in runs]
    if not key.startswith("eval_"):
        seeds = [(steps, running_mean(values) if len(values) else values) for steps, values in seeds]
    steps, mean, low, high = aggregate(seeds)
    if key == "eval_accuracy" and len(runs) == 1:
        ends = [dict(zip(*series(runs[0], end))) for end in ("eval_low", "eval_high")]
        low, high = ([end.get(step, value) for step, value in zip(steps, mean)] for end in ends)
    return steps, mean, low, high


# --- drawing

Line = namedtuple("Line", "label colour x y low high raw", defaults=[((), ())])  # raw: x, y of single steps, thin


def show(value, unit):
    return f"{100 * value:.1f}%" if unit == "%" else f"{value:.3g}"


def colours_of(labels):
    """label -> colour: a script's name has its own, the others take what is left."""
    if len(labels) > len(PALETTE):
        raise UserError(f"{len(labels)} lines in one panel cannot be told apart; compare at most {len(PALETTE)}")
    free = [colour for name, colour in PALETTE.items() if name not in labels]
    return {label: PALETTE[label] if label in PALETTE else free.pop(0) for label in labels}


def spread(heights, gaps):
    """Heights, their order kept, moved apart until neighbours i and j stand (gaps[i] + gaps[j]) / 2 from each other."""
    order = np.argsort(heights, kind="stable")
    placed, gaps = np.array(heights, float)[order], np.array(gaps, float)[order]
    for i in list(range(len(placed) - 1)) * 100:  # a push may close another gap
        push = max(0.0, (gaps[i] + gaps[i + 1]) / 2 - (placed[i + 1] - placed[i])) / 2
        placed[i : i + 2] += -push, push
    return placed[np.argsort(order)]


def label_ends(axis, lines, height):
    """Names the lines at their right ends, so that no legend is needed. height: of the panel, inches."""
    texts = [textwrap.fill(line.label, 12) for line in lines]
    low, high = axis.get_ylim()
    ends = [(line.y[np.isfinite(line.y)][-1] - low) / (high - low) for line in lines]
    ends = spread(ends, [0.19 / height * (1 + text.count("\n")) for text in texts])
    for line, text, end in zip(lines, texts, ends):
        axis.annotate(text, (1, end), (4, 0), xycoords="axes fraction", textcoords="offset points", va="center",
                      color=line.colour, fontsize=7.5, linespacing=1.0)


def draw_panel(axis, title, unit, lines, height):
    """Lines, bands and names on one axis, which starts at zero unless something is negative."""
    for line in reversed(lines):  # the first comes to lie on top
        axis.plot(*line.raw, color=line.colour, linewidth=0.6, alpha=0.35)
        axis.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.18, linewidth=0)
        axis.plot(line.x, line.y, color=line.colour, marker="o" if len(line.x) <= 24 else None)
    name = axis.set_title(title)
    if unit != "%":
        axis.annotate(" " + unit, (1, 0), xycoords=name, va="bottom", color=QUIET, fontsize=7.5)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%" if unit == "%" else f"{value:g}")
    axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    low, high = axis.dataLim.intervaly
    if 0 <= low <= high:
        axis.set_ylim(0, 1.08 * high or 1)
    if len(lines) > 1:
        label_ends(axis, [line for line in lines if np.isfinite(line.y).any()], height)


def frame(headline, caption, height):
    """An empty figure with its sentence above and its small print below. height: inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(textwrap.fill(headline, 95), x=0.012, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel(textwrap.fill(caption, 150), x=0.012, ha="left", fontsize=7.5, color=QUIET)
    return figure


def save(figure, path):
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return write(path, png.getvalue())


def draw(panels, path, headline, caption, columns=3, height=ROW, xlabel="step", show_x="{:g}".format):
    """Small multiples of [(title, unit, lines)] as a PNG; the first is widened to leave no hole. Returns the path."""
    wide = 1 + -len(panels) % columns
    rows = (len(panels) + wide - 1) // columns
    with matplotlib.rc_context(STYLE):
        figure, axis = frame(headline, caption, height * rows + 0.6), None
        grid = figure.add_gridspec(rows, columns)
        for cell, panel in enumerate(panels, wide - 1):
            spot = grid[0, :wide] if cell < wide else grid[cell // columns, cell % columns]
            axis = figure.add_subplot(spot, sharex=axis)
            draw_panel(axis, *panel, height)
            axis.set_xlabel(xlabel if cell // columns == rows - 1 else "")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axis.xaxis.set_major_formatter(lambda value, _: show_x(value))
        return save(figure, path)


def write(path, content):
    """Whole or not at all: nobody meets half a file, and a full disk leaves the old one."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return path


# --- the pictures


def headline_of(rows):
    """What the run did, in one sentence: its held-out accuracy if it has one."""
    first = ("eval_accuracy", "accuracy", "eval_loss", "loss", *NAMES)
    key = next(key for key in first if len(series(rows, key)[0]))
    steps, mean, _, _ = trace([rows], key)
    ends = dict.fromkeys(show(mean[i], UNITS[key]) for i in (0, -1))
    return f"{NAMES[key]}: {' to '.join(ends)} by step {steps[-1]:g}"


def about(args):
    return ", ".join([args["script"]] + [f"{key} {args[key]}" for key in ("model", "dataset", "seed") if key in args])


def curves(output_dir, path=None):
    """Small multiples of all that a run logged, into `path` or output_dir/curves.png. Returns the path."""
    args, rows = load(output_dir, "args.json", ["script"])[0], load_metrics(output_dir)
    panels = []
    for title, unit, keys in PANELS:
        found = [key for key in keys if len(series(rows, key)[0])]
        lines = [Line(keys[key], colour, *trace([rows], key), series(rows, key))
                 for key, colour in zip(found, PALETTE.values())]
        panels += [(title if len(found) > 1 else NAMES[found[0]], unit, lines)] if found else []
    caption = f"{about(args)}. Thin: single steps; bold: running mean; held-out: not smoothed, with 95% interval."
    return draw(panels, path or Path(output_dir) / "curves.png", headline_of(rows), caption)


def overlay(runs, path, keys=None, headline=None, colours=None):
    """Several runs in the same panels. runs: label -> output_dir, or a list of them, one per seed. Returns the path.

    keys: the metrics to draw, in this order; else all that two labels logged. headline: else the first metric's end.
    colours: label -> colour; else a script's own.
    """
    logs = {label: [load_metrics(folder) for folder in ([dirs] if isinstance(dirs, (str, Path)) else dirs)]
            for label, dirs in runs.items()}
    colours, panels = colours or colours_of(runs), []
    for key in keys or NAMES:
        lines = [Line(label, colours[label], *trace(logs[label], key)) for label in runs]
        lines = [line for line in lines if len(line.x)]
        panels += [(NAMES[key], UNITS[key], lines)] if len(lines) >= min(len(runs), 1 if keys else 2) else []
    if not panels:
        raise UserError(f"{', '.join(runs)}: these runs logged no metric in common at the same steps")
    title, unit, lines = panels[0]
    ends = ", ".join(f"{line.label} {show(line.y[-1], unit)}" for line in lines)
    counts = sorted({len(seeds) for seeds in logs.values()})
    band = f"Mean and range over {'–'.join(map(str, counts))} seeds" if counts != [1] else "Held-out: 95% interval"
    return draw(panels, path, headline or f"{title} at the end: {ends}", band + ". Training values: running means.")


def pass_at_k(results, path):
    """Pass@k of several models, a panel for each data set, into `path`, which is returned.

    results: a list as eval_passk writes it; each has model, dataset, ks, and, as long as ks, pass_at_k, low, high.
    """
    colours, panels = colours_of(dict.fromkeys(entry["model"] for entry in results)), {}
    for entry in results:
        x, *ys = (np.array(entry[key], float) for key in ("ks", "pass_at_k", "low", "high"))
        line = Line(entry["model"], colours[entry["model"]], np.log2(x), *ys)
        panels.setdefault(entry["dataset"], (entry["dataset"], "%", []))[2].append(line)
    return draw(list(panels.values()), path, "How often at least one of k answers is right",
                "pass@k, mean over problems, and its 95% interval (bootstrap over problems).",
                min(3, len(panels)), 2.6, "k answers", lambda exponent: f"{2 ** exponent:g}")


def dots(panels, path, headline, caption):
    """Measures side by side, a panel each, models below each other, into `path`, which is returned.

    panels: [(title, unit, [(label, colour, [(mean, low, high), ...])])], the labels the same in all; where models have
    several intervals the last is drawn full, those before it (or a model's only one) hollow and above it.
    """
    most = max(len(marks) for _, _, lines in panels for *_, marks in lines)
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = frame(headline, caption, 0.36 * len(panels[0][2]) + 1.15)
        for axis, (title, unit, lines) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
            for y, (_, colour, marks) in enumerate(lines):
                for place, (mean, low, high) in enumerate(marks):
                    full, height = place == most - 1, y + 0.26 * (place - (len(marks) - 1) / 2)
                    axis.plot((low, high), (height, height), color=colour, alpha=0.9 if full else 0.45)
                    axis.plot(mean, height, "o", markersize=5.5, color=colour, markeredgecolor=colour,
                              markeredgewidth=1.2, markerfacecolor=colour if full else "white")
            axis.set_title(title)
            axis.set_yticks(range(len(lines)), labels=[label for label, *_ in lines])
            axis.set_ylim(len(lines) - 0.5, -0.5)
            axis.margins(x=0.05)  # no dot is cut at 100%
            axis.xaxis.set_major_formatter(lambda x, _, unit=unit: f"{100 * x:.3g}%" if unit == "%" else f"{x:.3g}")
            axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        return save(figure, path)


# --- the tokens and the clusters of the last step

SIGNS = {"\n": "↵", "\t": "⇥"}
SIDES = [(5, 0, "left", "center"), (-5, 0, "right", "center"), (0, 5, "center", "bottom"), (0, -5, "center", "top"),
         (4, 4, "left", "bottom"), (4, -4, "left", "top"), (-4, 4, "right", "bottom"), (-4, -4, "right", "top")]


def visible(text):
    """Text with a sign for line ends and tabs, and an escape for what else is invisible, or turns it round."""
    return "".join(SIGNS.get(c, c if c.isprintable() else ascii(c)[1:-1]) for c in text)


def token_text(token):
    return visible(token) if token.strip(" ") else "␣" * len(token) or "∅"


def drawable(text, most):
    """Text as one line of a picture, cut to `most` characters; a box stands for what the font has not."""
    font, text = get_font(findfont(STYLE["font.family"])), visible(" ".join(text.split()))
    text = text if len(text) <= most else text[:most - 1] + "…"
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in text)


def top_fifth(values):
    """Mask of the ⌈n/5⌉ highest of n values; of equal ones the earlier, as vepo.py picks them."""
    mask = np.zeros(len(values), bool)
    mask[np.argsort(-np.array(values, float), kind="stable")[:-(-len(values) // 5)]] = True
    return mask


def missed_by_entropy(rows):
    """Share of the top-20% JSD tokens of each answer that are not among its top-20% entropy tokens."""
    looks, hesitates = (np.concatenate([top_fifth(row[key]) for row in rows]) for key in ("jsd", "entropy"))
    return (looks & ~hesitates).sum() / looks.sum()


def telling(entropy, jsd, words):
    """Indices of tokens worth naming: of highest JSD, then of highest entropy at low JSD, in each no word twice."""
    found = []
    for key, among, count in ((jsd, jsd >= 0, 9), (entropy, jsd <= np.quantile(jsd, 0.8), 7)):
        first = {}
        for i in np.argsort(-key, kind="stable"):
            if among[i]:
                first.setdefault(words[i], i)
        found += list(first.values())[:count]
    return list(dict.fromkeys(found))


def label_points(axis, points, words):
    """Writes words, {row of points (N, 2): word}, beside their points, where each hides fewest; none over another."""
    axis.figure.draw_without_rendering()  # sizes are known only now
    places, taken = axis.transData.transform(points), []
    for i, word in words.items():
        texts = [axis.annotate(word, points[i], offset, textcoords="offset points", ha=ha, va=va, fontsize=7.5,
                               path_effects=[withStroke(linewidth=1.5, foreground="white")])
                 for *offset, ha, va in SIDES]
        boxes = [text.get_window_extent().padded(3) for text in texts]
        hidden = [((places > box.min) & (places < box.max)).all(1).sum() for box in boxes]
        free = [k for k, box in enumerate(boxes) if not box.count_overlaps(taken)
                and (box.min > axis.bbox.min).all() and (box.max < axis.bbox.max).all()]
        best = min(free, key=hidden.__getitem__, default=None)
        taken += [boxes[best]] if free else []
        for text in texts[:best] + texts[best + 1:] if free else texts:
            text.remove()


def signals(output_dir):
    """All tokens of signals.jsonl by entropy and JSD, kept and dropped, as output_dir/signals.png. Returns its path."""
    source, rows = load_last(output_dir, "signals.jsonl", SIGNALS)
    x, y, kept = (np.concatenate([row[key] for row in rows]).astype(float) for key in ("entropy", "jsd", "kept"))
    words = [token_text(token).strip() for row in rows for token in row["tokens"]]
    headline = f"{show(missed_by_entropy(rows), '%')} of the top-20% JSD tokens are not among the top 20% by entropy"
    caption = (f"{source}, {len(rows)} answers. JSD: between the predictions with the picture and with a noised one. "
               "The top 20% are taken within each answer. Thin lines: a fifth of all tokens lies beyond.")
    with matplotlib.rc_context(STYLE):
        figure = frame(headline, caption, 5.2)
        axis = figure.add_subplot(xlabel="entropy of the token, nats", ylabel="JSD, nats")
        for chosen, colour, name in ((kept == 0, "#cfcfcf", "dropped"), (kept > 0, PALETTE["vepo"], "kept")):
            axis.scatter(x[chosen], y[chosen], np.clip(30000 / len(x), 4, 18), colour, linewidths=0, alpha=0.75,
                         label=f"{chosen.sum()} tokens {name}", zorder=2)
        for draw_line, values in ((axis.axvline, x), (axis.axhline, y)):
            draw_line(np.quantile(values, 0.8), color=QUIET, linewidth=0.6, zorder=0.9)
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderpad=0, handletextpad=0)
        label_points(axis, np.stack([x, y], 1), {i: drawable(words[i], 20) for i in telling(x, y, words)})
        return save(figure, Path(output_dir) / "signals.png")


def plane(embeddings):
    """(N, D) → (N, 2), along the two directions of largest variance (PCA), and the share of the variance they hold."""
    centred = np.array(embeddings, float) - np.mean(embeddings, 0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(centred), 2))
    points[:, :len(sizes)] = (left * sizes)[:, :2].round(9)  # equal answers are in one place, not in rounding errors
    points *= np.where(points[np.abs(points).argmax(0), [0, 1]] < 0, -1, 1)  # an SVD leaves the signs open
    return points, (sizes[:2] ** 2).sum() / (sizes ** 2).sum() if points.any() else 1.0


def side_by_side(points):
    """(N, 2) → (N, 2): points that would hide each other, moved into a small spiral around the first of them."""
    reach = 0.045 * (np.ptp(points, 0).max() or 1.0)
    spots = np.round(points / reach)
    turns = np.array([[(spots[:i] == spot).all(1).sum()] for i, spot in enumerate(spots)])
    return points + reach * np.sqrt(turns) * np.concatenate([np.cos(2.4 * turns), np.sin(2.4 * turns)], 1)


def cosine_distances(rows):
    """The mean cosine distance of two answers to a problem, in different clusters and in the same, in words."""
    found = {"in different clusters": [], "in the same cluster": []}
    for row in rows:
        e, same = np.array(row["embeddings"], float), np.equal.outer(row["labels"], row["labels"])  # e is normalised
        for name, chosen in zip(found, (~same, same & ~np.eye(len(e), dtype=bool))):
            found[name] += (1 - e @ e.T)[chosen].tolist()
    return ", ".join(f"{np.mean(distances):.2f} {name}" for name, distances in found.items() if distances)


def central_reasoning(row, mine):
    """What the answer nearest to its cluster's mean says inside <think>, or all it says. mine: mask of the cluster."""
    e = np.array(row["embeddings"], float)
    text = row["texts"][np.where(mine, ((e - e[mine].mean(0)) ** 2).sum(1), np.inf).argmin()]
    block = re.search(r"<think>(.*?)(</think>|$)", text, re.DOTALL)
    return block[1] if block else text


def draw_clusters(row, axis, key_axis):
    """A problem's answers in the plane, and what each cluster says beside it."""
    points, share = plane(row["embeddings"])
    half, middle = 0.68 * max(np.ptp(points, 0) / [1.3, 1]) or 0.5, (points.min(0) + points.max(0)) / 2
    note = f"{100 * share:.0f}% of the variance" if points.any() else "all the same"
    points, right, labels = side_by_side(points), np.array(row["accuracy"]) >= 0.5, np.array(row["labels"])
    for place, (label, colour, marker) in enumerate(zip(np.unique(labels), cycle(PALETTE.values()), cycle(MARKERS))):
        mine, height = labels == label, 1 - (place + 0.5) / max(3, len(np.unique(labels)))
        for chosen, fill in ((mine & right, colour), (mine & ~right, "white")):
            axis.scatter(*points[chosen].T, 26, fill, marker=marker, edgecolors=colour, linewidths=1.2)
        key_axis.scatter(0.01, height, 26, colour, marker=marker)
        text = textwrap.fill(drawable(central_reasoning(row, mine), 170), 88)
        key_axis.text(0.035, height, f"{(mine & right).sum()} of {mine.sum()} right\n{text}", va="center", fontsize=7.5)
    axis.set(xticks=[], yticks=[], xlabel=note, box_aspect=1 / 1.3,
             xlim=middle[0] + half * np.array([-1.3, 1.3]), ylim=middle[1] + half * np.array([-1, 1]))
    key_axis.set(xlim=(0, 1), ylim=(0, 1))
    key_axis.axis("off")


def clusters(output_dir, pictures=None):
    """The answers to up to four problems by cluster, as output_dir/clusters.png. Returns the path.

    pictures: problem id -> PIL image, to stand beside its answers.
    """
    source, rows = load_last(output_dir, "clusters.jsonl", CLUSTERS)
    rows, pictures = rows[:4], pictures or {}
    caption = (f"{source}. Filled: right (accuracy 0.5 or more); hollow: wrong. Plane: first two principal components "
               "of the embedded reasoning, equal answers side by side. Beside it: each cluster's most central answer.")
    height = max(ROW, 0.5 * max(len(set(row["labels"])) for row in rows))
    with matplotlib.rc_context(STYLE | {"axes.spines.top": True, "axes.spines.right": True, "axes.grid": False}):
        figure = frame(f"Cosine distance of two answers: {cosine_distances(rows)}", caption, height * len(rows) + 0.8)
        figure.get_layout_engine().set(w_pad=0.1)
        shown = any(row["id"] in pictures for row in rows)
        axes = figure.subplots(len(rows), 3, squeeze=False, width_ratios=[1.3 if shown else 0.001, 1.9, 5.5],
                               subplot_kw=dict(anchor="NW"))
        for row, (axis, plane_axis, key_axis) in zip(rows, axes):
            axis.annotate(drawable(row["problem"], 105), (0, 1), (0, 6), xycoords="axes fraction", fontsize=8.5,
                          textcoords="offset points", fontweight="bold", in_layout=False)  # a title widens its column
            plane_axis.set_title(" ")
            axis.axis("off")
            if row["id"] in pictures:
                axis.imshow(pictures[row["id"]].convert("RGB"))
            draw_clusters(row, plane_axis, key_axis)
        return save(figure, Path(output_dir) / "clusters.png")


# --- the page

# Neither page may run a script or fetch anything, whatever the model wrote.
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
base-uri 'none'; form-action 'none'">
<style>body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2.5rem max(1rem, 50vw - 30rem) }}
h1 {{ font-size: 1.5rem; margin: 0 }} h2 {{ font-size: 1.1rem; margin: 2.5rem 0 .5rem }} p {{ margin: .3rem 0 }}
.quiet {{ color: #767676; font-size: .87rem }} .tiny {{ image-rendering: pixelated }}
"""
PAGE = HEAD + """.curves {{ width: 100% }} .pair {{ display: flex; gap: 2rem }} a {{ color: #0072B2 }}
td {{ padding: .15rem 1.6rem .15rem 0; border-bottom: 1px solid #ececec }} section {{ flex: 1; min-width: 0 }}
article {{ border-top: 1px solid #ececec; padding: .8rem 0 }} article img {{ float: right; width: 7rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; clear: both; background: #f7f7f7; padding: .6rem }}
</style></head><body><h1>{title}</h1><p class="quiet">{about}</p><img class="curves" alt="curves" src="{picture}">
{more}<h2>In numbers, start and end</h2><table>{numbers}</table>
<h2>What it answered, early and late</h2><div class="pair"><section>{early}</section><section>{late}</section></div>
<h2>Flags</h2><pre>{flags}</pre></body></html>"""
CARD = """<article>{picture}<p class="quiet">step {step}, problem {id}, reward <b>{reward}</b></p><p>{problem}</p>
<p class="quiet">right answer: {answer}</p><pre>{text}</pre></article>"""
TINY = 160  # pixels; a smaller picture is shown enlarged
MORE = '<h2>{title}</h2><img class="curves" alt="{title}" src="{picture}">{link}'
# Radio buttons and sibling selectors switch the shade: the page needs no script. Signal: name, unit, hue, meaning.
SHADES = {
    "jsd": ("JSD", " nats", "230 159 0", "how far a noised picture moves the prediction"),
    "entropy": ("Entropy", " nats", "86 180 233", "how much the policy hesitates"),
    "delta_entropy": ("|ΔH|", " nats", "0 158 115", "how much a noised picture changes the entropy"),
    "score": ("Score", "", "204 121 167", "from the three, what the tokens are kept by"),
}
TOKENS = HEAD + """input {{ position: fixed; opacity: 0 }} .picture {{ flex: 0 0 10.5rem }}
.picture:empty {{ display: none }} .picture img {{ width: 100% }} section {{ min-width: 0 }}
nav {{ position: sticky; top: 0; background: white; padding: .7rem 0; border-bottom: 1px solid #a0a0a0 }}
label {{ cursor: pointer; padding: .15rem .8rem; border-radius: 1rem }} nav p {{ display: none; margin: .5rem .8rem 0 }}
nav i {{ display: inline-block; width: 10rem; height: .7rem; border: 1px solid #ececec; margin: 0 .3rem;
background: linear-gradient(to right, transparent, rgb(var(--hue) / .7)) }}
article {{ display: flex; gap: 1.5rem; border-bottom: 1px solid #ececec; padding: 1.2rem 0 }}
.tokens {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2 }} .tokens span {{ padding: .15rem 0;
background: rgb(var(--hue) / calc(.7 * var(--shade))); border-radius: 3px; margin: 0 .5px }}
.kept {{ text-decoration: underline 2px #1a1a1a; text-underline-offset: 4px }}
{rules}</style></head><body><h1>{title}</h1><p class="quiet">{about}</p>
<p>Shaded: the value chosen below. <span class="kept">Underlined</span>: kept, the tokens that carry the gradient.
Hover over a token for its numbers.</p>{buttons}<nav>{scales}</nav>{answers}</body></html>"""
ANSWER = """<article><div class="picture">{picture}</div><section><p class="quiet">problem {id}</p><p>{problem}</p>
<div class="tokens">{tokens}</div></section></article>"""
RULE = """#{key}:checked ~ * {{ --hue: {hue} }} #{key}:checked ~ article span {{ --shade: var(--{key}) }}
#{key}:checked ~ nav .{key} {{ display: block }} #{key}:checked ~ nav [for={key}] {{ background: rgb({hue} / .5) }}
#{key}:focus-visible ~ nav [for={key}] {{ outline: 2px solid #1a1a1a }}
"""


def data_uri(png):
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def numbers_row(rows, key):
    """A metric's start and end, with the interval where there is one, as a row of the table."""
    cells, (_, *numbers) = [NAMES[key]], trace([rows], key)
    for i in (0, -1):
        value, low, high = (show(number[i], UNITS[key]) for number in numbers)
        cells.append(f"{value} [{low}, {high}]" if low != high else value)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in [*cells, UNITS[key].strip("%")]) + "</tr>"


def picture_tag(problem_id, pictures):
    """A problem's picture as HTML, nothing where it is not given. A tiny one is enlarged with its pixels sharp."""
    if problem_id not in pictures:
        return ""
    small, png = pictures[problem_id].convert("RGB"), io.BytesIO()
    small.thumbnail((448, 448))
    small.save(png, "PNG")
    size = "tiny" if max(small.size) <= TINY else "large"
    return f'<img class="{size}" alt="the picture of the problem" src="{data_uri(png.getvalue())}">'


def card(sample, pictures):
    """One answer as HTML. What a model wrote is hostile: every value is escaped."""
    return CARD.format(picture=picture_tag(sample["id"], pictures),
                       **{key: html.escape(str(sample[key])) for key in SAMPLE})


def answer_html(row, tops):
    """An answer's tokens as HTML, each with its four values: as numbers, and over the page's highest as shades."""
    spans = []
    for i, token in enumerate(row["tokens"]):
        shades = ";".join(f"--{key}:{row[key][i] / tops[key]:.2f}" for key in SHADES)
        numbers = ", ".join(f"{name} {row[key][i]:.4g}{unit}" for key, (name, unit, *_) in SHADES.items())
        kept, end = ' class="kept"' if row["kept"][i] else "", "\n" * token.count("\n")
        spans.append(f'<span{kept} style="{shades}" title="{numbers}">{html.escape(token_text(token))}</span>{end}')
    return "".join(spans)


def tokens(output_dir, pictures=None):
    """Up to 16 answers of signals.jsonl, each token shaded by its signals, as output_dir/tokens.html. Returns the path.

    It needs no other file, no network and no script. pictures: problem id -> PIL image; their answers come first.
    """
    (source, rows), pictures, seen = load_last(output_dir, "signals.jsonl", SIGNALS), pictures or {}, Counter()
    for row in rows:
        seen[row["id"]] += 1
        row["nth"] = seen[row["id"]]
    rows = sorted(rows, key=lambda row: (row["id"] not in pictures, row["nth"]))[:16]  # first an answer to each problem
    tops = {key: max(value for row in rows for value in row[key]) or 1 for key in SHADES}
    buttons, labels, scales, rules = "", "", "", ""
    for key, (name, unit, hue, meaning) in SHADES.items():
        buttons += f'<input type="radio" name="shade" id="{key}"{"" if buttons else " checked"}>'
        labels += f'<label for="{key}">{name}</label>'
        scales += f'<p class="quiet {key}">0 <i></i> {tops[key]:.3g}{unit}: {meaning}</p>'
        rules += RULE.format(key=key, hue=hue)
    answers = "".join(ANSWER.format(
        picture=picture_tag(row["id"], pictures), id=html.escape(str(row["id"])), tokens=answer_html(row, tops),
        problem=html.escape(row["problem"])) for row in rows)
    text = TOKENS.format(title=f"{len(rows)} answers, token by token", about=html.escape(source), rules=rules,
                         buttons=buttons, scales=labels + scales, answers=answers)
    return write(Path(output_dir) / "tokens.html", text.encode("utf-8", errors="replace"))


def page(output_dir, pictures=None, more=""):
    """Writes output_dir/report.html, which needs no other file and no network, and curves.png. Returns the page's path.

    pictures: problem id -> PIL image, to stand beside its samples. more: HTML to stand below the curves.
    """
    args, rows = load(output_dir, "args.json", ["script"])[0], load_metrics(output_dir)
    logged = (Path(output_dir) / "samples.jsonl").exists()  # a warm start on given traces samples nothing
    cards = [card(sample, pictures or {}) for sample in (load(output_dir, "samples.jsonl", SAMPLE) if logged else [])]
    middle = len(cards) // 2
    text = PAGE.format(
        title=html.escape(headline_of(rows)), about=html.escape(about(args)),
        picture=data_uri(curves(output_dir).read_bytes()), more=more, flags=html.escape(json.dumps(args, indent=2)),
        numbers="".join(numbers_row(rows, key) for key in NAMES if len(series(rows, key)[0])),
        early="".join(cards[:middle][:4]), late="".join(cards[middle:][-4:]) or "No samples were logged.")
    # JSON can carry half a surrogate pair, UTF-8 cannot: it becomes "?".
    return write(Path(output_dir) / "report.html", text.encode("utf-8", errors="replace"))


# --- the command line


def finish(output_dir, pictures=None):
    """Draws all that a run has to show, in output_dir; returns the path of report.html, where it is found.

    pictures: problem id -> PIL image, for the problems whose picture is to stand beside their answers.
    """
    more, names = "", ("signals.jsonl", "clusters.jsonl")
    vepo, mupo = ((Path(output_dir) / name).is_file() and (Path(output_dir) / name).stat().st_size for name in names)
    if vepo:
        link = f'<p><a href="{tokens(output_dir, pictures).name}">Answers token by token</a></p>'
        picture = data_uri(signals(output_dir).read_bytes())
        more += MORE.format(title="Which tokens look, and which hesitate", picture=picture, link=link)
    if mupo:
        picture = data_uri(clusters(output_dir, pictures).read_bytes())
        more += MORE.format(title="Ways of reasoning, by cluster", picture=picture, link="")
    return page(output_dir, pictures, more)


def pictures_of(output_dir):
    """problem id -> picture, of the problems of the run's last step; none where the data set is no longer there."""
    dataset = load(output_dir, "args.json", ["script"])[0].get("dataset", "none")
    names = "samples.jsonl", "signals.jsonl", "clusters.jsonl"
    files = [name for name in names if (Path(output_dir) / name).is_file()]
    rows = [row for file in files for row in load(output_dir, file, ["step", "id"])]
    end = max((row["step"] for row in rows), default=0)
    last = {row["id"] for row in rows if row["step"] == end}
    try:
        from common import load_problems  # here, since torch takes long to import
        return {problem["id"]: problem["images"][0] for problem in load_problems(dataset) if problem["id"] in last}
    except UserError:
        return {}


def label_runs(output_dirs):
    """label -> folders: the script, and the flags that tell it from that script's other runs; seeds share a label."""
    silent = ("seed", "output_dir", "resume", "report_to", "save_steps", "sample_batch_size")
    flags = {folder: load(folder, "args.json", ["script"])[0] for folder in output_dirs}
    runs = {}
    for folder, own in flags.items():
        siblings = [other for other in flags.values() if other["script"] == own["script"]]
        telling = [key for key in own if key not in silent and any(other.get(key) != own[key] for other in siblings)]
        runs.setdefault(" ".join([own["script"]] + [f"{key}={own[key]}" for key in telling]), []).append(folder)
    return runs


def main(argv=None):
    """The command line; a UserError is one line and exit status 2."""
    parser = argparse.ArgumentParser(description="One run: its pictures and report.html, in it. Several: overlay.png.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the --output_dir of a run")
    parser.add_argument("--out", default="overlay.png", help="where the picture of several runs goes")
    args = parser.parse_args(argv)
    try:
        if len(args.runs) == 1:
            print(finish(args.runs[0], pictures_of(args.runs[0])))
        else:
            print(overlay(label_runs(args.runs), args.out))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

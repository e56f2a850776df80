"""Pictures of runs: their curves, several runs side by side, pass@k, and the tokens and clusters of the last step.

Every function that writes a file returns its path. A file is written whole or not at all.
Bold lines are running means, thin ones single steps; what is measured on held-out problems is never smoothed.
A value that is not a finite number leaves a gap in its line.
"""

import io
import os
import re
import textwrap
from collections import namedtuple
from pathlib import Path

from harness.flags import UserError
from lab.logs import (
    CLUSTERS,
    NAMES,
    PANELS,
    SIGNALS,
    UNITS,
    about,
    load_args,
    load_last,
    load_metrics,
    logged,
    series,
    trace,
)

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

# --- one place for sizes and colours

# Okabe and Ito's colours: people with a colour vision deficiency can tell them apart too.
# A script keeps its colour in every picture.
PALETTE = {
    "grpo": "#0072B2",
    "vepo": "#D55E00",
    "mupo": "#009E73",
    "opd": "#CC79A7",
    "sft": "#E69F00",
    "base": "#767676",
    "teacher": "#1a1a1a",
    "other": "#56B4E9",
}
MARKERS = "osD^vPX"  # of clusters: seven markers with eight colours make 56 different marks
QUIET = "#767676"  # the grey of what is said in small print
WIDTH = 9.0  # of a picture, inches; at 200 dots per inch it is sharp in the 900 pixels of a README
ROW = 1.75  # height of one row of panels, inches
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.color": "#1a1a1a",
    "text.parse_math": False,  # a "$" in a text stays a dollar sign
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#a0a0a0",
    "axes.xmargin": 0.02,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#ececec",
    "axes.labelcolor": QUIET,
    "axes.labelpad": 1,
    "xtick.color": "#a0a0a0",
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "figure.dpi": 200,
    "figure.constrained_layout.h_pad": 0.07,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "lines.markeredgecolor": "white",
    "lines.markeredgewidth": 0.5,
}
CLUSTER_STYLE = STYLE | {"axes.spines.top": True, "axes.spines.right": True, "axes.grid": False}

# raw: x and y of the single steps, drawn thin behind the line
Line = namedtuple("Line", "label colour x y low high raw", defaults=[((), ())])
Panel = namedtuple("Panel", "title unit lines")


def show(value, unit):
    """A value as text; one whose unit is "%" is a share between 0 and 1."""
    return f"{100 * value:.1f}%" if unit == "%" else f"{value:.3g}"


def colours_of(labels):
    """{label: colour}. A script's name has its own colour; the other labels take those that are left.

    Raises UserError for more labels than there are colours.
    """
    if len(labels) > len(PALETTE):
        raise UserError(f"{len(labels)} lines in one panel cannot be told apart; compare at most {len(PALETTE)}")
    free = [colour for name, colour in PALETTE.items() if name not in labels]
    colours = {}
    for label in labels:
        if label in PALETTE:
            colours[label] = PALETTE[label]
        else:
            colours[label] = free.pop(0)
    return colours


# --- a figure, its panels, its file


def frame(headline, caption, height):
    """An empty figure with a headline above and small print below. height: inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(textwrap.fill(headline, 95), x=0.012, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel(textwrap.fill(caption, 150), x=0.012, ha="left", fontsize=7.5, color=QUIET)
    return figure


def save(figure, path):
    """Writes the figure as a PNG; returns the path."""
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return write(path, png.getvalue())


def write(path, content):
    """Writes the bytes `content` whole or not at all: a full disk leaves the old file. Raises UserError; else the path.

    It writes beside the file, then renames, so that nobody ever reads half a file.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def draw(panels, path, headline, caption, *, columns=3, height=ROW, xlabel="step", show_x="{:g}".format):
    """Draws Panels in rows, as a PNG; returns the path.

    height: of a row, inches. show_x: makes the text of a tick on the x axis from its value.
    """
    holes = -len(panels) % columns
    wide = 1 + holes  # columns of the first panel, which is widened to leave no hole
    rows = (len(panels) + holes) // columns
    with matplotlib.rc_context(STYLE):
        figure = frame(headline, caption, height * rows + 0.6)
        grid = figure.add_gridspec(rows, columns)
        axis = None
        for cell, panel in enumerate(panels, holes):
            row, column = divmod(cell, columns)
            spot = grid[0, :wide] if cell < wide else grid[row, column]
            axis = figure.add_subplot(spot, sharex=axis)
            draw_panel(axis, panel, height)
            axis.set_xlabel(xlabel if row == rows - 1 else "")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axis.xaxis.set_major_formatter(lambda value, _: show_x(value))
        return save(figure, path)


def draw_panel(axis, panel, height):
    """Draws one Panel: lines, bands and names. The y axis starts at zero unless something is negative."""
    for line in reversed(panel.lines):  # the first line comes to lie on top
        axis.plot(*line.raw, color=line.colour, linewidth=0.6, alpha=0.35)
        axis.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.18, linewidth=0)
        axis.plot(line.x, line.y, color=line.colour, marker="o" if len(line.x) <= 24 else None)
    name = axis.set_title(panel.title)
    if panel.unit != "%":
        axis.annotate(" " + panel.unit, (1, 0), xycoords=name, va="bottom", color=QUIET, fontsize=7.5)
    axis.yaxis.set_major_formatter(lambda value, _: show_tick(value, panel.unit))
    axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    low, high = axis.dataLim.intervaly
    if 0 <= low <= high:
        axis.set_ylim(0, 1.08 * high if high > 0 else 1)
    if len(panel.lines) > 1:
        label_ends(axis, [line for line in panel.lines if np.isfinite(line.y).any()], height)


def show_tick(value, unit):
    """The text of a tick: as short as the value allows."""
    return f"{100 * value:g}%" if unit == "%" else f"{value:g}"


def label_ends(axis, lines, height):
    """Writes each line's name at its right end, so that no legend is needed. height: of the panel, inches."""
    texts = [textwrap.fill(line.label, 12) for line in lines]
    low, high = axis.get_ylim()
    ends = [(line.y[np.isfinite(line.y)][-1] - low) / (high - low) for line in lines]
    room = [0.19 / height * (1 + text.count("\n")) for text in texts]
    for line, text, end in zip(lines, texts, spread(ends, room), strict=True):
        axis.annotate(text, (1, end), (4, 0), xycoords="axes fraction", textcoords="offset points", va="center",
                      color=line.colour, fontsize=7.5, linespacing=1.0)


def spread(heights, room):
    """Moves heights apart, in the order they have, until neighbours i and j are (room[i] + room[j]) / 2 apart."""
    order = np.argsort(heights, kind="stable")
    placed = np.array(heights, float)[order]
    room = np.array(room, float)[order]
    for _ in range(100):  # moving one pair apart may push it against the next
        for i in range(len(placed) - 1):
            missing = (room[i] + room[i + 1]) / 2 - (placed[i + 1] - placed[i])
            push = max(0.0, missing) / 2
            placed[i] -= push
            placed[i + 1] += push
    return placed[np.argsort(order)]


# --- metrics


def curves(output_dir, path=None):
    """Draws all that a run logged, into `path` or output_dir/curves.png; returns the path."""
    args = load_args(output_dir)
    rows = load_metrics(output_dir)
    panels = []
    for title, unit, names in PANELS:
        found = logged(rows, names)
        if found:
            lines = [curve(rows, key, names[key], colour)
                     for key, colour in zip(found, PALETTE.values(), strict=False)]
            panels.append(Panel(title if len(found) > 1 else NAMES[found[0]], unit, lines))
    caption = (f"{about(args)}. Thin: single steps; bold: running mean; held-out: not smoothed, accuracy with its 95% "
               "interval.")
    return draw(panels, path or Path(output_dir) / "curves.png", headline_of(rows), caption)


def curve(rows, key, label, colour):
    """One metric of one run as a Line."""
    found = trace([rows], key)
    return Line(label, colour, x=found.steps, y=found.mean, low=found.low, high=found.high, raw=series(rows, key))


def headline_of(rows):
    """What the run did, in one sentence: its held-out accuracy if it has one."""
    key = logged(rows, ("eval_accuracy", "accuracy", "eval_loss", "loss", *NAMES))[0]
    found = trace([rows], key)
    ends = [show(found.mean[i], UNITS[key]) for i in (0, -1)]
    if ends[0] == ends[1]:
        ends = ends[:1]
    return f"{NAMES[key]}: {' to '.join(ends)} by step {found.steps[-1]:g}"


def overlay(runs, path, keys=None, headline=None, colours=None):
    """Draws several runs in the same panels, into `path`, which is returned.

    runs: {label: output_dir, or a list of them, one per seed}. keys: the metrics to draw, in this order; without them,
    all that two labels logged. headline: without one, the first metric at the end. colours: {label: colour}; without
    them, each script's own. Raises UserError if there is nothing to compare.
    """
    logs = {label: load_seeds(folders) for label, folders in runs.items()}
    if not colours:
        colours = colours_of(runs)
    enough = min(len(runs), 1 if keys else 2)  # lines in a panel
    panels = []
    for key in keys or NAMES:
        lines = lines_of(logs, key, colours)
        if len(lines) >= enough:
            panels.append(Panel(NAMES[key], UNITS[key], lines))
    if not panels:
        raise UserError(f"{', '.join(runs)}: these runs logged no metric in common at the same steps")
    ends = ", ".join(f"{line.label} {show(line.y[-1], panels[0].unit)}" for line in panels[0].lines)
    counts = sorted({len(seeds) for seeds in logs.values()})
    band = "Held-out accuracy: 95% interval"
    if counts != [1]:
        band = f"Mean and range over {'–'.join(map(str, counts))} seeds"
    headline = headline or f"{panels[0].title} at the end: {ends}"
    return draw(panels, path, headline, band + ". Training values: running means.")


def load_seeds(folders):
    """The metrics of one run or of several that differ in their seed: a list of rows each."""
    if isinstance(folders, (str, Path)):
        folders = [folders]
    return [load_metrics(folder) for folder in folders]


def lines_of(logs, key, colours):
    """A Line of one metric for each label that logged it. logs: {label: [rows of a seed, ...]}."""
    lines = []
    for label, seeds in logs.items():
        found = trace(seeds, key)
        if len(found.steps):
            lines.append(Line(label, colours[label], x=found.steps, y=found.mean, low=found.low, high=found.high))
    return lines


def pass_at_k(results, path):
    """Draws pass@k of several models, one panel per data set, into `path`, which is returned.

    results: a list as eval_passk.py writes it; each entry has model, dataset, and the lists ks, pass_at_k, low, high,
    all of one length.
    """
    colours = colours_of(dict.fromkeys(entry["model"] for entry in results))
    panels = {}
    for entry in results:
        data = entry["dataset"]
        panel = panels.setdefault(data, Panel(data, "%", []))
        panel.lines.append(Line(
            label=entry["model"],
            colour=colours[entry["model"]],
            x=np.log2(np.array(entry["ks"], float)),
            y=np.array(entry["pass_at_k"], float),
            low=np.array(entry["low"], float),
            high=np.array(entry["high"], float),
        ))
    return draw(
        list(panels.values()),
        path,
        "How often at least one of k answers is right",
        "pass@k, mean over problems, and its 95% interval (bootstrap over problems).",
        columns=min(3, len(panels)),
        height=2.6,
        xlabel="k answers",
        show_x=lambda exponent: f"{2 ** exponent:g}",
    )


def dots(panels, path, headline, caption, columns=None):
    """Draws measures side by side, one panel each, with the models below each other, into `path`, which is returned.

    panels: [(title, unit, [(label, colour, [(mean, low, high), ...])])], with the same labels in every panel. Some
    models have several intervals: the last one is drawn full, the ones before it hollow and above it. A model that has
    fewer intervals than the others has hollow ones only. columns: panels in a row (default: all of them).
    """
    most = max(len(intervals) for _, _, lines in panels for *_, intervals in lines)
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = frame(headline, caption, rows * (0.2 * len(panels[0][2]) + 0.55) + 0.16 * len(panels[0][2]) + 0.6)
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for axis, panel in zip(axes, panels, strict=False):
            draw_dots(axis, Panel(*panel), most)
        for axis in axes[len(panels):]:
            axis.axis("off")
        return save(figure, path)


def draw_dots(axis, panel, most):
    """Draws one panel of `dots`. most: the number of intervals of a model that has all of them."""
    for y, (_, colour, intervals) in enumerate(panel.lines):
        for place, (mean, low, high) in enumerate(intervals):
            full = place == most - 1
            height = y + 0.26 * (place - (len(intervals) - 1) / 2)
            axis.plot((low, high), (height, height), color=colour, alpha=0.9 if full else 0.45)
            axis.plot(mean, height, "o", markersize=5.5, color=colour, markeredgecolor=colour,
                      markeredgewidth=1.2, markerfacecolor=colour if full else "white")
    axis.set_title(panel.title)
    axis.set_yticks(range(len(panel.lines)), labels=[label for label, *_ in panel.lines])
    axis.set_ylim(len(panel.lines) - 0.5, -0.5)
    axis.margins(x=0.05)
    low, high = axis.get_xlim()
    if panel.unit == "%" and high > 1:
        axis.set_xlim(low, 1 + 0.05 * (1 - low))  # nothing is above 100%, but no dot is to be cut there
    axis.xaxis.set_major_formatter(lambda value, _: show_dot_tick(value, panel.unit))
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


def show_dot_tick(value, unit):
    """The text of a tick, with three digits: the axes of `dots` do not start at zero."""
    return f"{100 * value:.3g}%" if unit == "%" else f"{value:.3g}"


# x and y: [value, low, high] each
Cross = namedtuple("Cross", "label colour marker x y")


def crosses(points, path, headline, caption, *, xlabel, ylabel):
    """Draws Crosses, points with an interval in both directions, into `path`, which is returned.

    Points of one colour share the first part of their label, up to a comma, points of one marker the rest.
    """
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure = frame(headline, caption, 4.6)
        axis = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
        for point in points:
            axis.plot(point.x[1:], [point.y[0]] * 2, color=point.colour, linewidth=0.8, alpha=0.6)
            axis.plot([point.x[0]] * 2, point.y[1:], color=point.colour, linewidth=0.8, alpha=0.6)
            axis.plot(point.x[0], point.y[0], point.marker, color=point.colour, markersize=7)
        axis.axhline(0, color=QUIET, linewidth=0.6, zorder=0.9)
        axis.margins(x=0.05)
        axis.xaxis.set_major_formatter(lambda value, _: show_dot_tick(value, "%"))
        axis.yaxis.set_major_formatter(lambda value, _: show_dot_tick(value, "%"))
        handles = key_of(axis, points)
        axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handletextpad=0.3)
        return save(figure, path)


def key_of(axis, points):
    """What the legend of `crosses` shows: a line for each colour, then one for each marker."""
    colours = {}
    markers = {}
    for point in points:
        what, _, where = point.label.partition(", ")
        colours.setdefault(what, point.colour)
        markers.setdefault(where, point.marker)
    handles = [axis.plot([], [], "o", color=colour, label=what)[0] for what, colour in colours.items()]
    handles += [axis.plot([], [], marker, color=QUIET, label=where)[0] for where, marker in markers.items()]
    return handles


# --- what a model wrote, made fit for a picture

SIGNS = {"\n": "↵", "\t": "⇥"}


def visible(text):
    """Text with a sign for line ends and tabs, and an escape for what else cannot be seen or turns the text round."""
    return "".join(visible_character(character) for character in text)


def visible_character(character):
    if character in SIGNS:
        return SIGNS[character]
    return character if character.isprintable() else ascii(character)[1:-1]


def token_text(token):
    """A token as text; one of spaces alone, or an empty one, gets signs that can be seen."""
    if token.strip(" "):
        return visible(token)
    return "␣" * len(token) if token else "∅"


def drawable(text, most):
    """Text as one line of a picture, cut to `most` characters; a box replaces each character that the font lacks."""
    font = get_font(findfont(STYLE["font.family"]))
    text = visible(" ".join(text.split()))
    if len(text) > most:
        text = text[:most - 1] + "…"
    return "".join(character if font.get_char_index(ord(character)) else "□" for character in text)


# --- the tokens of the last step

Side = namedtuple("Side", "offset ha va")  # where a word is written beside its point; offset in typographic points
SIDES = [
    Side((5, 0), "left", "center"),
    Side((-5, 0), "right", "center"),
    Side((0, 5), "center", "bottom"),
    Side((0, -5), "center", "top"),
    Side((4, 4), "left", "bottom"),
    Side((4, -4), "left", "top"),
    Side((-4, 4), "right", "bottom"),
    Side((-4, -4), "right", "top"),
]


def signals(output_dir):
    """Draws all tokens of signals.jsonl by entropy and JSD, kept and dropped, as output_dir/signals.png; its path."""
    source, rows = load_last(output_dir, "signals.jsonl", SIGNALS)
    headline = f"{show(missed_by_entropy(rows), '%')} of the top-20% JSD tokens are not among the top 20% by entropy"
    caption = (f"{source}, {len(rows)} answers. JSD: between the predictions with the picture and with a noised one. "
               "The top 20% are taken within each answer. Beyond each thin line: a fifth of all tokens.")
    with matplotlib.rc_context(STYLE):
        figure = frame(headline, caption, 5.2)
        axis = figure.add_subplot(xlabel="entropy of the token, nats", ylabel="JSD, nats")
        draw_tokens(axis, rows)
        return save(figure, Path(output_dir) / "signals.png")


def draw_tokens(axis, rows):
    """Draws one dot per token, entropy to the right and JSD upwards, and names the tokens that say most."""
    entropy = all_tokens(rows, "entropy")
    jsd = all_tokens(rows, "jsd")
    kept = all_tokens(rows, "kept") > 0
    size = np.clip(30000 / len(entropy), 4, 18)
    for chosen, colour, name in ((~kept, "#cfcfcf", "dropped"), (kept, PALETTE["vepo"], "kept")):
        axis.scatter(entropy[chosen], jsd[chosen], s=size, c=colour, linewidths=0, alpha=0.75, zorder=2,
                     label=f"{chosen.sum()} tokens {name}")
    axis.axvline(np.quantile(entropy, 0.8), color=QUIET, linewidth=0.6, zorder=0.9)
    axis.axhline(np.quantile(jsd, 0.8), color=QUIET, linewidth=0.6, zorder=0.9)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderpad=0, handletextpad=0)
    words = [token_text(token).strip() for row in rows for token in row["tokens"]]
    named = {i: drawable(words[i], 20) for i in telling(entropy, jsd, words)}
    label_points(axis, np.stack([entropy, jsd], 1), named)


def all_tokens(rows, key):
    """The values of one signal over the tokens of all answers, (N,)."""
    return np.concatenate([row[key] for row in rows]).astype(float)


def top_fifth(values):
    """Mask of the ⌈n/5⌉ highest of n values; of equal ones the earlier, as vepo.py picks them."""
    count = -(-len(values) // 5)
    mask = np.zeros(len(values), bool)
    mask[np.argsort(-np.array(values, float), kind="stable")[:count]] = True
    return mask


def missed_by_entropy(rows):
    """Share of the top-20% JSD tokens of each answer that are not among its top-20% entropy tokens."""
    visual = np.concatenate([top_fifth(row["jsd"]) for row in rows])
    unsure = np.concatenate([top_fifth(row["entropy"]) for row in rows])
    return (visual & ~unsure).sum() / visual.sum()


def telling(entropy, jsd, words):
    """Indices of tokens worth naming: nine of the highest JSD, then seven of the highest entropy among low JSD.

    Neither part names a word twice.
    """
    everywhere = jsd >= 0
    low = jsd <= np.quantile(jsd, 0.8)
    found = first_of_each(jsd, everywhere, words)[:9] + first_of_each(entropy, low, words)[:7]
    return list(dict.fromkeys(found))


def first_of_each(values, among, words):
    """Indices from the highest value down, one per word. among: mask of the tokens that are considered."""
    first = {}
    for i in np.argsort(-values, kind="stable"):
        if among[i]:
            first.setdefault(words[i], i)
    return list(first.values())


def label_points(axis, points, words):
    """Writes words beside their points, each on the side where it hides the fewest points, and none over another.

    points: (N, 2). words: {row of points: word}. A word that has no free side is left out.
    """
    axis.figure.draw_without_rendering()  # only now is the size of a text known
    places = axis.transData.transform(points)
    taken = []
    for i, word in words.items():
        texts = [beside(axis, word, points[i], side) for side in SIDES]
        boxes = [text.get_window_extent().padded(3) for text in texts]
        free = [k for k, box in enumerate(boxes) if is_free(axis, box, taken)]
        hidden = [((places > box.min) & (places < box.max)).all(1).sum() for box in boxes]
        best = min(free, key=hidden.__getitem__, default=None)
        if best is not None:
            taken.append(boxes[best])
        for k, text in enumerate(texts):
            if k != best:
                text.remove()


def beside(axis, word, point, side):
    """Writes one word on one side of its point; returns the text."""
    outline = [withStroke(linewidth=1.5, foreground="white")]
    return axis.annotate(word, point, side.offset, textcoords="offset points", ha=side.ha, va=side.va, fontsize=7.5,
                         path_effects=outline)


def is_free(axis, box, taken):
    """Whether a box lies inside the axis and over none of the boxes `taken`."""
    inside = (box.min >= axis.bbox.min).all() and (box.max < axis.bbox.max).all()
    return inside and not box.count_overlaps(taken)


# --- the clusters of the last step


def clusters(output_dir, pictures=None):
    """Draws the answers to up to four problems by cluster, as output_dir/clusters.png; returns the path.

    pictures: {problem id: PIL image}, shown beside the answers.
    """
    source, rows = load_last(output_dir, "clusters.jsonl", CLUSTERS)
    rows = rows[:4]
    pictures = pictures or {}
    caption = (f"{source}. Filled: right (accuracy 0.5 or more); hollow: wrong. Plane: first two principal components "
               "of the embedded reasoning, equal answers side by side. Beside it: each cluster's most central answer.")
    height = max(ROW, 0.5 * max(len(set(row["labels"])) for row in rows))
    shown = any(row["id"] in pictures for row in rows)
    with matplotlib.rc_context(CLUSTER_STYLE):
        figure = frame(
            f"Cosine distance between two answers: {cosine_distances(rows)}", caption, height * len(rows) + 0.8)
        figure.get_layout_engine().set(w_pad=0.1)
        axes = figure.subplots(len(rows), 3, squeeze=False, width_ratios=[1.3 if shown else 0.001, 1.9, 5.5],
                               subplot_kw=dict(anchor="NW"))
        for row, (axis, plane_axis, key_axis) in zip(rows, axes, strict=True):
            draw_problem(axis, row["problem"], pictures.get(row["id"]))
            plane_axis.set_title(" ")
            draw_clusters(row, plane_axis, key_axis)
        return save(figure, Path(output_dir) / "clusters.png")


def draw_problem(axis, problem, picture):
    """Draws a problem's picture, if there is one, below the problem itself."""
    axis.annotate(drawable(problem, 105), (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points",
                  fontsize=8.5, fontweight="bold", in_layout=False)  # a title would widen its column
    axis.axis("off")
    if picture is not None:
        axis.imshow(picture.convert("RGB"))


def draw_clusters(row, axis, key_axis):
    """Draws the answers to one problem in the plane, and writes beside it what each cluster says."""
    points, share = plane(row["embeddings"])
    spots = side_by_side(points)
    right = np.array(row["accuracy"]) >= 0.5
    labels = np.array(row["labels"])
    names = np.unique(labels)
    colours = list(PALETTE.values())
    for place, name in enumerate(names):
        mine = labels == name
        colour = colours[place % len(colours)]
        marker = MARKERS[place % len(MARKERS)]
        for chosen, fill in ((mine & right, colour), (mine & ~right, "white")):
            axis.scatter(*spots[chosen].T, s=26, c=fill, marker=marker, edgecolors=colour, linewidths=1.2)
        height = 1 - (place + 0.5) / max(3, len(names))
        key_axis.scatter(0.01, height, s=26, c=colour, marker=marker)
        text = textwrap.fill(drawable(central_reasoning(row, mine), 170), 88)
        text = f"{(mine & right).sum()} of {mine.sum()} right\n{text}"
        key_axis.text(0.035, height, text, va="center", fontsize=7.5)
    frame_plane(axis, points, share)
    key_axis.set(xlim=(0, 1), ylim=(0, 1))
    key_axis.axis("off")


def frame_plane(axis, points, share):
    """Sets the limits of a plane around its points, and says what share of the variance it shows."""
    shape = np.array([1.3, 1])  # width and height of the plane
    half = 0.68 * max(np.ptp(points, 0) / shape)  # of the height
    if half == 0:
        half = 0.5
    middle = (points.min(0) + points.max(0)) / 2
    note = f"{100 * share:.0f}% of the variance" if points.any() else "all the same"
    axis.set(xticks=[], yticks=[], xlabel=note, box_aspect=1 / 1.3)
    axis.set(xlim=middle[0] + half * np.array([-1.3, 1.3]), ylim=middle[1] + half * np.array([-1, 1]))


def plane(embeddings):
    """(N, D) → (N, 2), along the two directions of largest variance (PCA), and the share of the variance they hold."""
    centred = np.array(embeddings, float) - np.mean(embeddings, 0)
    left, sizes = np.linalg.svd(centred, full_matrices=False)[:2]
    points = np.zeros((len(centred), 2))
    points[:, :len(sizes)] = (left * sizes)[:, :2].round(9)  # else rounding errors would part equal answers
    if not points.any():
        return points, 1.0
    farthest = points[np.abs(points).argmax(0), [0, 1]]
    points *= np.where(farthest < 0, -1, 1)  # an SVD leaves the signs open: the farthest point is on the positive side
    return points, (sizes[:2] ** 2).sum() / (sizes ** 2).sum()


def side_by_side(points):
    """(N, 2) → (N, 2). Points that would hide each other are moved into a small spiral around the first of them."""
    size = np.ptp(points, 0).max()
    if size == 0:
        size = 1.0
    reach = 0.045 * size
    cells = np.round(points / reach)
    earlier = [[(cells[:i] == cell).all(1).sum()] for i, cell in enumerate(cells)]  # points before it in its cell
    turns = np.array(earlier)
    spiral = np.concatenate([np.cos(2.4 * turns), np.sin(2.4 * turns)], 1)
    return points + reach * np.sqrt(turns) * spiral


def cosine_distances(rows):
    """The mean cosine distance of two answers to a problem, in different clusters and in the same one, as a phrase."""
    different, same = [], []
    for row in rows:
        e_GD = np.array(row["embeddings"], float)  # each of length 1
        distances_GG = 1 - e_GD @ e_GD.T
        alike_GG = np.equal.outer(row["labels"], row["labels"])
        itself_GG = np.eye(len(e_GD), dtype=bool)
        different += distances_GG[~alike_GG].tolist()
        same += distances_GG[alike_GG & ~itself_GG].tolist()
    said = []
    if different:
        said.append(f"{np.mean(different):.2f} in different clusters")
    if same:
        said.append(f"{np.mean(same):.2f} in the same cluster")
    return ", ".join(said)


def central_reasoning(row, mine):
    """The reasoning of the answer that is nearest to its cluster's mean. mine: mask of the cluster.

    It is what the answer says inside <think>, or the whole answer if it has no <think>.
    """
    e_GD = np.array(row["embeddings"], float)
    distances_G = ((e_GD - e_GD[mine].mean(0)) ** 2).sum(1)
    text = row["texts"][np.where(mine, distances_G, np.inf).argmin()]
    block = re.search(r"<think>(.*?)(</think>|$)", text, re.DOTALL)
    return block[1] if block else text

"""Pictures of models that eval_passk.py measured on the same problems.

    pass_at_k.png    how often at least one of k answers is right
    diversity.png    acc@4 against the diversity of reasoning, a dot for each problem and model
    phrases.png      how often each phrase of hesitation stands in an answer: phrases × models
    ways.png         the answers of all models to a few problems, in one plane and in one set of clusters

Every function that writes a file returns its path.
"""

import textwrap
from pathlib import Path

from harness.run import bootstrap, seed_of
from lab.pictures import (
    CLUSTER_STYLE,
    MARKERS,
    PALETTE,
    STYLE,
    central_reasoning,
    colours_of,
    draw_problem,
    drawable,
    frame,
    frame_plane,
    pass_at_k,
    plane,
    save,
    show,
    side_by_side,
)
from mupo import partition

import matplotlib
import numpy as np
from matplotlib.ticker import PercentFormatter

CLUSTERS = 3  # of all models' answers to a problem together
MOST = 5  # models in ways.png


def measured(results, groups, folder):
    """Draws all that eval_passk.py has to show, in `folder`; returns the paths.

    results: as in eval.json. groups: dicts with id, problem, picture; texts and right by model; embeddings, a tensor
    (N, D) of all texts, model by model.
    """
    folder = Path(folder)
    paths = [pass_at_k(results, folder / "pass_at_k.png")]
    if all(entry["by_problem"] for entry in results):
        paths.append(diversity(results, folder / "diversity.png"))
    models = list(dict.fromkeys(entry["model"] for entry in results))
    if len(models) > 1:
        paths.append(phrases(results, folder / "phrases.png"))
    if len(models) > 1 and groups:
        paths.append(ways(groups, folder / "ways.png"))
    return paths


def by_data_set(results):
    """{data set: its entries}, in their order."""
    found = {}
    for entry in results:
        found.setdefault(entry["dataset"], []).append(entry)
    return found


# --- acc@4 against diversity ------------------------------------------------------------------------------------------


def diversity(results, path):
    """Draws a panel for each data set: every problem's acc@4 against its diversity, and the means of each model."""
    colours = colours_of(dict.fromkeys(entry["model"] for entry in results))
    panels = by_data_set(results)
    tries = results[0]["by_problem"]["tries"]
    caption = (f"A small dot: one problem, one model, from {results[0]['n']} answers. A large one: the mean over "
               "problems, with 95% intervals (bootstrap over problems). Diversity: mean pairwise cosine distance of "
               "the embedded reasoning.")
    rows = -(-len(panels) // 2)
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure = frame(headline_of(results), caption, 3.0 * rows + 0.8)
        axes = figure.subplots(rows, min(2, len(panels)), squeeze=False).flatten()
        for axis, (name, entries) in zip(axes, panels.items(), strict=False):
            for entry in entries:
                draw_scatter(axis, entry, colours[entry["model"]])
            axis.set(title=name, xlabel="diversity of reasoning", ylabel=f"acc@{tries}")
            axis.yaxis.set_major_formatter(PercentFormatter(1))
            axis.legend(loc="best", frameon=False, handletextpad=0.2)
        for axis in axes[len(panels):]:
            axis.axis("off")
        return save(figure, path)


def draw_scatter(axis, entry, colour):
    """The problems of one model as dots, and their mean as a cross with its intervals."""
    x = np.array(entry["by_problem"]["diversity"])
    y = np.array(entry["by_problem"]["acc"])
    axis.scatter(x, y, s=9, color=colour, alpha=0.3, linewidths=0, zorder=2)
    x_mean, *x_ends = bootstrap(x)
    y_mean, *y_ends = bootstrap(y)
    axis.plot(x_ends, [y_mean] * 2, color=colour, zorder=3)
    axis.plot([x_mean] * 2, y_ends, color=colour, zorder=3)
    axis.plot(x_mean, y_mean, "o", color=colour, markersize=7, zorder=3, label=entry["model"])


def headline_of(results):
    """Each model's mean diversity on the first data set, in one sentence."""
    entries = next(iter(by_data_set(results).values()))
    means = ", ".join(f"{entry['model']} {show(entry['measures']['diversity'][0], '')}" for entry in entries)
    return f"Diversity of reasoning on {entries[0]['dataset']}: {means}"


# --- phrases × models -------------------------------------------------------------------------------------------------


def phrases(results, path):
    """Draws a heat map for each data set: how often each phrase stands in an answer of each model, on average."""
    panels = by_data_set(results)
    highest = max(max(entry["phrases"].values()) for entry in results)
    lines = max(len(entries) for entries in panels.values())
    caption = ("Occurrences per answer, mean over all answers. The eight phrases are VLAA-Thinker's: it takes them, "
               "and the length of an answer in tokens, as signs of recited reasoning.")
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = frame("Phrases of hesitation in an answer", caption, len(panels) * (0.3 * lines + 0.8) + 0.7)
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axis, (name, entries) in zip(axes, panels.items(), strict=True):
            draw_heat(axis, entries, highest)
            axis.set_title(name)
        return save(figure, path)


def draw_heat(axis, entries, highest):
    """A row for each model, a column for each phrase. highest: the value of the darkest cell of all panels."""
    names = list(entries[0]["phrases"])
    table = np.array([[entry["phrases"][name] for name in names] for entry in entries])
    axis.imshow(table, cmap="Blues", vmin=0, vmax=highest or 1, aspect="auto")
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            colour = "white" if value > 0.55 * highest else PALETTE["teacher"]
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7.5)
    lengths = [show(entry["measures"]["length"][0], "") for entry in entries]
    labels = [f"{entry['model']}, {length} tokens" for entry, length in zip(entries, lengths, strict=True)]
    axis.set_xticks(range(len(names)), labels=names)
    axis.set_yticks(range(len(entries)), labels=labels)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


# --- ways of reasoning, before and after ------------------------------------------------------------------------------


def ways(groups, path):
    """Draws a row for each problem: a plane for each model, and what the clusters say. One plane, one set of clusters.

    groups: as for `measured`. There is room for five models: of more, the first five are drawn, which is said.
    """
    everyone = list(groups[0]["texts"])
    models = everyone[:MOST]
    left_out = f" Only the first {MOST} of {len(everyone)} models are shown." if len(everyone) > MOST else ""
    caption = ("Each row: one plane, the first two principal components of all models' embedded reasoning, and one set "
               "of clusters. Filled: right; hollow: wrong; equal answers side by side. At the right, by cluster: how "
               "many answers of each model it holds, from left to right, and its most central answer." + left_out)
    with matplotlib.rc_context(CLUSTER_STYLE):
        figure = frame("The same problems, answered by each model", caption, 1.75 * len(groups) + 0.8)
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.14)  # room for the problems' texts, which have no part in it
        ratios = [1.2, *[1.7] * len(models), 4.0]
        axes = figure.subplots(
            len(groups), len(ratios), squeeze=False, width_ratios=ratios, subplot_kw=dict(anchor="NW"))
        for group, (axis, *planes, key_axis) in zip(groups, axes, strict=True):
            draw_problem(axis, group["problem"], group["picture"])
            draw_ways(group, models, planes, key_axis)
        return save(figure, path)


def draw_ways(group, models, planes, key_axis):
    """The answers of each model in a plane of its own; all planes show the same directions, at the same scale."""
    whose = np.repeat(np.arange(len(models)), [len(group["texts"][model]) for model in models])
    together = group["embeddings"][:len(whose)]
    right = np.concatenate([group["right"][model] for model in models]).astype(bool)
    texts = [text for model in models for text in group["texts"][model]]
    labels = clusters_of(together, group["id"])
    points, share = plane(together.numpy())
    spots = side_by_side(points)
    for number, (model, axis) in enumerate(zip(models, planes, strict=True)):
        draw_marks(axis, spots, labels, right=right, chosen=whose == number)
        frame_plane(axis, points, share)
        mine = right[whose == number]
        said = f"{drawable(Path(model).name, 17)}\n{mine.sum()} of {len(mine)} right"
        if number == 0:
            said += f"\n{axis.get_xlabel()}"  # it is the same for all
        axis.set_xlabel(said)
    row = dict(embeddings=together.numpy(), texts=texts)
    for place, name in enumerate(np.unique(labels)):
        counts = ", ".join(str(((labels == name) & (whose == number)).sum()) for number in range(len(models)))
        text = textwrap.fill(drawable(central_reasoning(row, labels == name), 150), 64)
        height = 1 - (place + 0.5) / CLUSTERS
        colour, marker = mark_of(place)
        key_axis.scatter(0.01, height, s=26, c=colour, marker=marker)
        key_axis.text(0.05, height, f"answers: {counts}\n{text}", va="center", fontsize=7.5)
    key_axis.set(xlim=(0, 1), ylim=(0, 1))
    key_axis.axis("off")


def clusters_of(embeddings_ND, problem_id):
    """(N, D) → labels (N,): constrained k-means as in mupo.py, here over the answers of all models."""
    K = min(CLUSTERS, len(embeddings_ND))
    seed = seed_of(problem_id, "ways")
    return partition(embeddings_ND, K, 1, seed).numpy()


def draw_marks(axis, spots, labels, *, right, chosen):
    """The chosen answers at their spots, in the colour of their cluster, filled where they are right."""
    for place, name in enumerate(np.unique(labels)):
        colour, marker = mark_of(place)
        mine = chosen & (labels == name)
        for some, fill in ((mine & right, colour), (mine & ~right, "white")):
            axis.scatter(*spots[some].T, s=20, c=fill, marker=marker, edgecolors=colour, linewidths=1.1)


def mark_of(place):
    """Colour and marker of a cluster."""
    return list(PALETTE.values())[place], MARKERS[place]

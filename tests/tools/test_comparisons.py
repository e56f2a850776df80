"""lab/comparisons.py: what its pictures show, read back from the axes."""

from lab import comparisons, pictures

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image


def entry(model, dataset="in", **changes):
    """An entry of eval.json, as far as the pictures look at it."""
    phrases = dict(wait=0.5, again=0.0, check=0.25)
    measures = dict(diversity=[0.4, 0.3, 0.5], length=[30.0, 29.0, 31.0])
    by_problem = dict(id=["a", "b", "c"], tries=4, acc=[0.0, 0.5, 1.0], diversity=[0.2, 0.4, 0.6])
    curve = dict(ks=[1, 4], pass_at_k=[0.4, 0.9], low=[0.3, 0.8], high=[0.5, 1.0])
    return dict(model=model, dataset=dataset, n=16, measures=measures, phrases=phrases, by_problem=by_problem,
                **curve) | changes


def group(name="p0", models=("base", "trained"), answers=6, size=5):
    """The answers of some models to one problem."""
    embeddings = torch.randn(answers * len(models), size, generator=torch.Generator().manual_seed(answers))
    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    texts = {model: [f"{model} way {i}" for i in range(answers)] for model in models}
    right = {model: [i % 2 == 0 for i in range(answers)] for model in models}
    return dict(id=name, problem="How many?", picture=Image.new("RGB", (28, 28)), texts=texts, right=right,
                embeddings=embeddings)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, to look at their axes."""
    found = []
    plain = pictures.save
    monkeypatch.setattr(comparisons, "save", lambda figure, path: found.append(figure) or plain(figure, path))
    return found


def names(paths):
    return [path.name for path in paths]


def test_what_is_drawn_depends_on_what_was_measured(tmp_path):
    """Of one model no comparison; without an embedder no diversity."""
    both = [entry("base"), entry("trained")]
    assert names(comparisons.measured(both, [group()], tmp_path)) == [
        "pass_at_k.png", "diversity.png", "phrases.png", "ways.png"]
    assert names(comparisons.measured(both[:1], [group(models=["base"])], tmp_path)) == [
        "pass_at_k.png", "diversity.png"]
    plain = [entry("base", by_problem={}), entry("trained", by_problem={})]
    assert names(comparisons.measured(plain, [], tmp_path)) == ["pass_at_k.png", "phrases.png"]
    assert {path.name for path in tmp_path.iterdir()} >= {"diversity.png", "phrases.png", "ways.png"}


def test_a_dot_for_each_problem_and_the_mean_with_its_intervals(tmp_path, figures):
    comparisons.diversity([entry("base"), entry("trained", dataset="out")], tmp_path / "d.png")
    axes = figures[0].axes
    assert [axis.get_title(loc="left") for axis in axes] == ["in", "out"]
    assert axes[0].get_ylabel() == "acc@4"
    assert axes[0].collections[0].get_offsets().tolist() == [[0.2, 0.0], [0.4, 0.5], [0.6, 1.0]]
    across, up, mean = axes[0].lines
    assert (float(mean.get_xdata()[0]), float(mean.get_ydata()[0])) == pytest.approx((0.4, 0.5))
    assert 0.2 <= min(across.get_xdata()) < 0.4 < max(across.get_xdata()) <= 0.6
    assert 0.0 <= min(up.get_ydata()) < 0.5 < max(up.get_ydata()) <= 1.0
    assert "base 0.4" in figures[0].get_suptitle()


def test_the_heat_map_holds_the_numbers(tmp_path, figures):
    """A row to a model with its length, a column to a phrase; all panels share one scale."""
    silent = entry("base", phrases=dict(wait=0.0, again=0.0, check=0.0))
    comparisons.phrases([silent, entry("trained"), entry("trained", dataset="out")], tmp_path / "p.png")
    first, second = figures[0].axes
    assert first.images[0].get_array().tolist() == [[0.0, 0.0, 0.0], [0.5, 0.0, 0.25]]
    assert [label.get_text() for label in first.get_yticklabels()] == ["base, 30 tokens", "trained, 30 tokens"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["wait", "again", "check"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 0.5)
    assert [text.get_text() for text in first.texts][3:] == ["0.50", "0.00", "0.25"]
    comparisons.phrases([silent], tmp_path / "none.png")  # no phrase at all: nothing is divided by 0
    assert figures[1].axes[0].images[0].get_clim() == (0, 1)


def test_all_models_share_a_plane_and_its_clusters(tmp_path, figures):
    """Each plane shows its own model's answers at their places in the common projection, filled where right."""
    one = group(answers=7)
    comparisons.ways([one], tmp_path / "w.png")
    _, base, trained, key = figures[0].axes
    spots = pictures.side_by_side(pictures.plane(one["embeddings"].numpy())[0])
    for axis, mine in ((base, spots[:7]), (trained, spots[7:])):
        shown = np.concatenate([marks.get_offsets() for marks in axis.collections])
        assert sorted(shown.tolist()) == sorted(mine.tolist())
    assert base.get_xlim() == trained.get_xlim()
    hollow = [marks for marks in base.collections if len(marks.get_offsets()) and same(marks.get_facecolor(), "white")]
    assert sum(len(marks.get_offsets()) for marks in hollow) == 3
    assert base.get_xlabel().startswith("base\n4 of 7 right")
    labels = comparisons.clusters_of(one["embeddings"], "p0")
    counts = [text.get_text().splitlines()[0] for text in key.texts]
    expected = [f"answers: {(labels[:7] == name).sum()}, {(labels[7:] == name).sum()}" for name in range(3)]
    assert counts == expected


def same(colours, name):
    return tuple(colours[0]) == matplotlib.colors.to_rgba(name)


@pytest.mark.filterwarnings("error")
def test_odd_groups(tmp_path):
    """All answers equal; fewer answers than clusters; more models than there is room for, which is said."""
    equal = group()
    equal["embeddings"] = torch.ones(12, 1)
    comparisons.ways([equal, group("p1", answers=1)], tmp_path / "w.png")
    many = group(models=[f"m{i}" for i in range(7)])
    comparisons.ways([many], tmp_path / "w.png")

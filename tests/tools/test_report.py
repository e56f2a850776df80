"""lab/report.py: its arithmetic against numpy and brute force, its files by parsing them, its errors by their line."""

import base64
import errno
import io
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import vepo
from common import load_problems
from harness.flags import UserError
from lab import logs, pictures, report

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

HOSTILE = ('<script>alert("1")</script><img src=x onerror=alert(1)>&amp; \' {title} $\\frac{1}$ \x00 \u202e 猫 '
           '</pre></body>')


def make_run(folder, metrics, samples=None, **args):
    """A run's folder with these lines in metrics.jsonl, and in samples.jsonl if there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = dict(script="grpo", model="toy", seed=0, output_dir=str(folder)) | args
    (folder / "args.json").write_text(json.dumps(flags))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if samples is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


def steps_of(values, key="entropy"):
    return [{"step": step, key: float(value)} for step, value in enumerate(values)]


def sample(step, text="\\boxed{3}", **changes):
    return dict(step=step, id=f"p{step}", problem="How many?", answer="3", text=text, reward=1.0) | changes


def assert_png(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.width == 1800 and image.height > 300


@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn instead of the picture: a list of (panels, path, headline, caption, ...)."""
    calls = []
    monkeypatch.setattr(pictures, "draw", lambda *args, **more: calls.append((*args, *more.values())) or args[1])
    return calls


# --- arithmetic


@pytest.mark.parametrize("count", [1, 2, 23, 24, 60, 121])
def test_running_mean_is_the_mean_of_the_neighbours(count):
    values = np.random.default_rng(count).normal(size=count)
    half = count // 24
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(count)]
    np.testing.assert_allclose(logs.running_mean(values), expected, atol=1e-12)


def test_aggregate_is_numpys_mean_and_range_over_the_shared_steps():
    values = np.random.default_rng(0).normal(size=(3, 7))
    steps = [np.arange(7.0), np.arange(7.0), np.arange(5.0)]  # the third run stopped early
    pairs = [(step, row[: len(step)]) for step, row in zip(steps, values, strict=True)]
    shared, mean, low, high = logs.aggregate(pairs)
    np.testing.assert_array_equal(shared, np.arange(5))
    np.testing.assert_allclose(mean, values[:, :5].mean(0))
    np.testing.assert_array_equal(low, values[:, :5].min(0))
    np.testing.assert_array_equal(high, values[:, :5].max(0))


def test_aggregate_pairs_values_by_step_and_not_by_place():
    first = np.array([0.0, 2, 4]), np.array([1.0, 2, 3])
    second = np.array([2.0, 3, 4]), np.array([10.0, 0, 20])
    shared, mean, _, _ = logs.aggregate([first, second])
    assert shared.tolist() == [2, 4] and mean.tolist() == [6, 11.5]


def test_series_takes_the_later_line_of_a_repeated_step_and_leaves_gaps():
    rows = [{"step": 1, "kl": 1.0}, {"step": 2, "kl": 2.0}, {"step": 1, "kl": 5.0}, {"step": 0},
            {"step": 3, "kl": None}, {"step": 4, "kl": float("inf")}]
    steps, values = logs.series(rows, "kl")
    assert steps.tolist() == [1, 2, 4]
    np.testing.assert_array_equal(values, [5, 2, np.nan])


def test_spread_keeps_order_and_distance_and_moves_nothing_without_need():
    assert pictures.spread([0.1, 0.9], [0.1, 0.1]).tolist() == [0.1, 0.9]
    np.testing.assert_allclose(pictures.spread([0.5, 0.5], [0.1, 0.3]), [0.4, 0.6])
    heights = np.array([0.5, 0.52, 0.1, 0.51, 0.5, 0.12, 0.9, 0.53])
    placed = pictures.spread(heights, [0.1] * 8)
    assert (np.argsort(placed) == np.argsort(heights, kind="stable")).all()
    assert np.diff(np.sort(placed)).min() > 0.099
    assert pictures.spread([], []).tolist() == []


def test_a_script_keeps_its_colour_and_nine_lines_are_refused():
    few, many = pictures.colours_of(["mupo", "mine", "grpo"]), pictures.colours_of(["grpo", "a", "b", "vepo", "mupo"])
    assert few["grpo"] == many["grpo"] and few["mupo"] == many["mupo"]
    assert len(set(many.values())) == 5 and len(set(few.values())) == 3
    with pytest.raises(UserError, match="at most 8"):
        pictures.colours_of([str(i) for i in range(9)])


# --- pictures


def test_curves_of_a_run(tmp_path):
    rows = [dict(step=i, reward=0.5, accuracy=0.4 + i / 100, entropy=0.2, my_own_key="anything") for i in range(30)]
    rows[0] |= dict(eval_accuracy=0.4, eval_low=0.3, eval_high=0.5)
    rows[-1] |= dict(eval_accuracy=0.6)  # no interval here
    run = make_run(tmp_path / "run", rows)
    assert report.curves(run) == run / "curves.png"
    assert_png(run / "curves.png")
    assert sorted(path.name for path in run.iterdir()) == ["args.json", "curves.png", "metrics.jsonl"]


@pytest.mark.parametrize("rows", [
    [{"step": 1, "loss": 2.0}],
    [{"step": 0, "loss": float("nan"), "entropy": 0.0}],
    [{"step": i, "loss": -1.0, "seconds": float("nan"), "seconds_update": 1.0} for i in range(3)],
])
def test_curves_of_one_step_and_of_values_that_are_not_numbers(tmp_path, rows):
    assert_png(report.curves(make_run(tmp_path, rows), tmp_path / "other.png"))


def test_curves_share_a_panel_where_both_keys_were_logged(tmp_path, drawn):
    run = make_run(tmp_path, [{"step": 0, "loss": 2.0, "eval_loss": 3.0, "truncated": 0.1}, {"step": 1, "loss": 1.0}])
    report.curves(run)
    panels, _, headline, _ = drawn[0]
    assert [(title, [line.label for line in lines]) for title, _, lines in panels] == [
        ("Cut-off answers", ["cut-off"]), ("Loss", ["held-out", "training"])]
    assert headline == "Held-out loss: 3 by step 0"


def test_overlay_draws_the_mean_and_the_range_over_seeds(tmp_path, drawn):
    values = np.random.default_rng(1).random((3, 50))
    seeds = [make_run(tmp_path / str(i), steps_of(row)) for i, row in enumerate(values)]
    single = make_run(tmp_path / "single", steps_of(values[0]))
    report.overlay({"grpo": seeds, "mine": str(single)}, tmp_path / "o.png")
    [(title, unit, lines)] = drawn[0][0]
    smooth = np.array([logs.running_mean(row) for row in values])
    assert (title, unit, [line.label for line in lines]) == ("Entropy of a token", "nats", ["grpo", "mine"])
    np.testing.assert_allclose(lines[0].y, smooth.mean(0))
    np.testing.assert_allclose([lines[0].low, lines[0].high], [smooth.min(0), smooth.max(0)])
    np.testing.assert_allclose(lines[1].y, smooth[0])


def test_overlay_of_single_runs_shows_held_out_accuracy_as_measured_with_its_interval(tmp_path, drawn):
    rows = [dict(step=i, eval_accuracy=i % 2, eval_low=-1.0, eval_high=2.0) for i in range(50)]
    report.overlay({"grpo": make_run(tmp_path / "a", rows), "vepo": make_run(tmp_path / "b", rows)}, "o.png")
    line = drawn[0][0][0][2][0]
    assert line.y.tolist() == [i % 2 for i in range(50)] and set(line.low) == {-1} and set(line.high) == {2}


def test_overlay_takes_shared_metrics_or_the_ones_asked_for(tmp_path, drawn):
    runs = {"grpo": make_run(tmp_path / "a", [dict(step=0, entropy=0.1, kl=0.1)]),
            "sft": make_run(tmp_path / "b", [dict(step=0, entropy=0.1, loss=1)])}
    report.overlay(runs, "o.png")
    report.overlay(runs, "o.png", keys=["kl", "entropy"], headline="Mine")
    assert [panel[0] for panel in drawn[0][0]] == ["Entropy of a token"]
    assert [panel[0] for panel in drawn[1][0]] == ["KL to the reference", "Entropy of a token"]
    assert drawn[1][2] == "Mine"
    with pytest.raises(UserError, match="no metric in common"):
        report.overlay({"a": make_run(tmp_path / "c", steps_of([1], "kl")), "b": runs["sft"]}, "o.png")


def test_overlay_and_pass_at_k_are_pictures(tmp_path):
    runs = {f"{name} with $ and a long name": make_run(tmp_path / name, steps_of([1, 2, 3])) for name in "ab"}
    assert_png(report.overlay(runs, tmp_path / "overlay.png"))
    entry = dict(dataset="toy@test", ks=[1, 2, 4], pass_at_k=[0.4, 0.6, 0.9], low=[0.3, 0.5, 0.8], high=[0.5, 0.7, 1.0])
    results = [entry | dict(model="base"), entry | dict(model="grpo"),
               entry | dict(model="base", dataset="toy@ood", ks=[1, 3, 8])]
    assert_png(report.pass_at_k(results, tmp_path / "passk.png"))


def test_pass_at_k_has_a_panel_for_each_data_set_over_log2_of_k(drawn):
    entry = dict(model="base", ks=[1, 4, 16], pass_at_k=[0.1, 0.2, 0.3], low=[0, 0.1, 0.2], high=[0.2, 0.3, 0.4])
    report.pass_at_k([entry | dict(dataset=name) for name in ("in", "out")], "p.png")
    panels, show_k = drawn[0][0], drawn[0][-1]
    assert [panel[0] for panel in panels] == ["in", "out"]
    assert [show_k(x) for x in panels[0][2][0].x] == ["1", "4", "16"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    pictures.write(tmp_path / "a", b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures.os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        pictures.write(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


# --- the page


class Reader(HTMLParser):
    """Collects tags, attributes and the text inside <pre> and <p>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.sources, self.texts, self.attributes = [], [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        self.open += [tag] if tag not in ("img", "input", "meta") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.filterwarnings("ignore:Glyph")  # the picture's font has no cats
def test_page_is_one_file_and_escapes_what_the_model_wrote(tmp_path):
    samples = [sample(0), sample(9, text=HOSTILE, id=HOSTILE, problem=HOSTILE, answer=HOSTILE, reward=0.0)]
    run = make_run(tmp_path, steps_of([1, 2]), samples, model=HOSTILE)
    path = report.page(run, {"p0": Image.new("RGBA", (900, 600), "red")})
    page = Reader(path.read_text("utf-8"))
    assert page.open == [] and "script" not in page.tags and page.tags.count("img") == 2
    assert page.attributes <= {"lang", "charset", "http-equiv", "content", "class", "alt", "src"}
    assert "default-src 'none'" in path.read_text("utf-8")
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    curves, picture = (Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in page.sources)
    assert curves.width == 1800 and picture.size == (448, 299) and picture.getpixel((9, 9)) == (255, 0, 0)
    seen = "".join(page.texts).replace("\ufffd", "\x00")  # a parser may show NUL as U+FFFD
    assert seen.count(HOSTILE) == 5  # the model's name, and four of the sample's fields


def test_page_shows_early_and_late_samples_never_twice(tmp_path):
    run = make_run(tmp_path, steps_of([1, 2]), [sample(step, text=f"text{step}.") for step in range(20)])
    text = report.page(run).read_text("utf-8")
    assert [step for step in range(20) if f"text{step}." in text] == [0, 1, 2, 3, 16, 17, 18, 19]
    make_run(tmp_path, steps_of([1, 2]), [sample(step, text=f"text{step}.") for step in range(3)])
    text = report.page(run).read_text("utf-8")
    assert [text.count(f"text{step}.") for step in range(3)] == [1, 1, 1]


def test_page_of_a_run_without_samples_and_with_half_a_surrogate_pair(tmp_path):
    rows = [dict(step=0, eval_accuracy=0.25, eval_low=0.2, eval_high=0.3), dict(step=5, eval_accuracy=0.5)]
    run = make_run(tmp_path, rows)
    text = report.page(run).read_text("utf-8")
    assert "No samples were logged." in text
    assert "<td>25.0% [20.0%, 30.0%]</td><td>50.0%</td>" in text
    assert "Held-out accuracy: 25.0% to 50.0% by step 5" in text
    make_run(tmp_path, steps_of([1]), [sample(0, text="half \ud83d pair")])
    assert "half ? pair" in report.page(run).read_text("utf-8")


# --- the tokens of the last step


def answer_row(tokens, step=3, id="p0", **changes):
    """A line of signals.jsonl, its values a function of the tokens."""
    rng, n = np.random.default_rng(sum(map(ord, "".join(tokens)))), len(tokens)
    values = dict(jsd=rng.random(n), delta_entropy=rng.random(n), entropy=3 * rng.random(n), score=rng.random(n),
                  kept=1.0 * pictures.top_fifth(rng.random(n)))
    row = dict(step=step, id=id, problem="How many?", tokens=list(tokens))
    return row | {key: value.round(4).tolist() for key, value in values.items()} | changes


def write_rows(folder, name, rows):
    make_run(folder, steps_of([1, 2]))
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_missed_by_entropy_is_the_share_counted_by_hand_and_picks_as_vepo_does():
    rng = np.random.default_rng(0)
    rows = [dict(jsd=rng.integers(0, 9, n).tolist(), entropy=rng.integers(0, 9, n).tolist())  # many ties
            for n in (1, 2, 4, 5, 6, 15, 40)]
    top = missed = 0
    for row in rows:
        n = len(row["jsd"])
        jsd, entropy = ({i for i in range(n) if sum((values[j], -j) > (values[i], -i) for j in range(n)) * 5 < n}
                        for values in (row["jsd"], row["entropy"]))
        top, missed = top + len(jsd), missed + len(jsd - entropy)
        picked = vepo.top_fraction(torch.tensor([row["jsd"]]).float(), torch.ones(1, n), 0.2)[0].bool()
        assert pictures.top_fifth(row["jsd"]).tolist() == picked.tolist() == [i in jsd for i in range(n)]
    assert 0 < missed < top and pictures.missed_by_entropy(rows) == missed / top


def test_the_telling_tokens_look_most_or_hesitate_most_without_looking():
    entropy, jsd = np.array([0.1, 3, 2, 0.2, 0, 1, 1, 1, 1, 1]), np.array([0.9, 0, 0.01, 0.8, 0.7, 0, 0, 0, 0, 0])
    words = ["red", "so", "so", "red", "blue", "a", "a", "a", "a", "a"]
    found = pictures.telling(entropy, jsd, words)
    assert found[:2] == [0, 4] and {1, 5} < set(found) and 3 not in found


def test_labels_neither_overlap_nor_leave_the_axis():
    points = np.random.default_rng(0).random((60, 2)) ** 3
    figure = pictures.Figure(figsize=(5, 3))
    axis = figure.add_subplot()
    axis.scatter(*points.T)
    pictures.label_points(axis, points, {i: f"word {i}" for i in range(60)})
    boxes = [text.get_window_extent() for text in axis.texts]
    assert 5 < len(boxes) < 60 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all((box.min >= axis.bbox.min).all() and (box.max <= axis.bbox.max).all() for box in boxes)


@pytest.mark.parametrize("rows", [
    [answer_row([HOSTILE])],
    [answer_row(["a"] * 7, jsd=[0.0] * 7, delta_entropy=[0.0] * 7, entropy=[0.0] * 7, score=[0.0] * 7, kept=[1.0] * 7)],
    [answer_row([" red", "\n", "", "  ", "\ud83d", "猫", "<|im_end|>", "$x^", "x" * 99]), answer_row(["b"], id="p1")],
    [answer_row("abc", jsd=[float("nan")] * 3, entropy=[float("nan")] * 3), answer_row("abcd")],
])
@pytest.mark.filterwarnings("error")
def test_signals_and_tokens_of_odd_answers(tmp_path, rows):
    run = write_rows(tmp_path, "signals.jsonl", rows)
    assert pictures.signals(run) == run / "signals.png" and report.tokens(run) == run / "tokens.html"
    assert_png(run / "signals.png")
    page = Reader((run / "tokens.html").read_text("utf-8"))
    assert page.open == [] and page.tags.count("article") == len(rows)


def test_the_title_of_signals_gives_the_missed_share_of_the_last_step(tmp_path, monkeypatch):
    seen = []
    frame = pictures.frame
    monkeypatch.setattr(pictures, "frame", lambda *args: seen.append(args) or frame(*args))
    last = answer_row("abcdefghij", jsd=list(range(10)), entropy=[0.0] * 8 + [1.0, 0.0])  # 9 missed, 8 found
    pictures.signals(write_rows(tmp_path, "signals.jsonl", [answer_row("abcdefghij", step=2), last]))
    assert seen[0][0].startswith("50.0% of the top-20% JSD tokens are not") and "step 3, 1 answers" in seen[0][1]


def test_only_the_last_step_counts_and_no_answer_twice(tmp_path):
    rows = [answer_row("old", step=2), answer_row("one"), answer_row("two"), answer_row("one", id="p1"),
            answer_row("one", kept=[1.0] * 3), answer_row("")]
    about, found = logs.load_last(write_rows(tmp_path, "signals.jsonl", rows), "signals.jsonl", logs.SIGNALS)
    assert about == "grpo, model toy, seed 0; step 3"
    assert [(row["id"], "".join(row["tokens"])) for row in found] == [("p0", "one"), ("p0", "two"), ("p1", "one")]
    assert found[0]["kept"] == [1.0] * 3  # the later line
    rows = [group_row(2, id=name, step=step) for name, step in (("a", 1), ("a", 2), ("b", 2), ("a", 2))]
    found = logs.load_last(write_rows(tmp_path, "clusters.jsonl", rows), "clusters.jsonl", logs.CLUSTERS)[1]
    assert [row["id"] for row in found] == ["a", "b"]


def test_tokens_are_escaped_shaded_underlined_and_named(tmp_path):
    row = answer_row([" red", HOSTILE, ".\n\n", "  ", ""], id=HOSTILE, problem=HOSTILE, jsd=[0.0, 0.1, 0.2, 0.3, 0.4],
                     kept=[1.0, 0.0, 1.0, 0.0, 0.0])
    make_run(write_rows(tmp_path, "signals.jsonl", [row]), steps_of([1]), model=HOSTILE)
    text = report.tokens(tmp_path).read_text("utf-8")
    page = Reader(text)
    assert "script" not in page.tags and "img" not in page.tags and page.sources == []
    assert page.attributes <= {"lang", "charset", "http-equiv", "content", "class", "style", "title", "type", "name",
                               "id", "checked", "for"}
    assert text.count("<script") == 0 and "default-src 'none'" in text and "script-src" not in text
    assert text.count('<span class="kept" style=') == 2 and text.count("<span style=") == 3
    assert [f"--jsd:{shade:.2f};" in text for shade in (0, 0.25, 0.5, 0.75, 1)] == [True] * 5
    entropy, change, score = (f"{row[key][0]:.4g}" for key in ("entropy", "delta_entropy", "score"))
    assert f'title="JSD 0 nats, Entropy {entropy} nats, |ΔH| {change} nats, Score {score}"> red</span>' in text
    assert ">.↵↵</span>\n\n<" in text and ">␣␣</span>" in text and ">∅</span>" in text
    assert HOSTILE.replace("\x00", "\\x00").replace("\u202e", "\\u202e") in page.texts
    for key in report.SHADES:  # the buttons that choose the shade
        assert f'id="{key}"' in text and f"#{key}:checked ~ article span {{ --shade: var(--{key}) }}" in text
    assert text.count(" checked>") == 1


def test_tokens_shows_sixteen_answers_pictured_problems_first_and_each_problem_once_before_twice(tmp_path):
    rows = [answer_row([f"p{i}a{j}."], id=f"p{i}") for i in range(12) for j in range(2)]
    pictures = {f"p{i}": Image.new("RGB", (28, 28) if i == 7 else (900, 600), "red") for i in (7, 9)}
    page = Reader(report.tokens(write_rows(tmp_path, "signals.jsonl", rows), pictures).read_text("utf-8"))
    order = [text for text in page.texts if text.endswith(".") and text[0] == "p"]
    assert order[:4] == ["p7a0.", "p9a0.", "p7a1.", "p9a1."] and len(order) == 16
    assert order[4:] == [f"p{i}a0." for i in (0, 1, 2, 3, 4, 5, 6, 8, 10, 11)] + ["p0a1.", "p1a1."]
    sizes = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size for source in page.sources]
    assert sizes == [(28, 28), (448, 299)] * 2
    text = (tmp_path / "tokens.html").read_text("utf-8")
    assert text.count('<img class="tiny"') == 2 and ".tiny { image-rendering: pixelated }" in text


# --- the clusters of the last step


def group_row(answers, id="p0", step=3, size=5, **changes):
    """A line of clusters.jsonl: answers in two clusters, every third one right."""
    e = np.random.default_rng(answers).normal(size=(answers, size))
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    return dict(step=step, id=id, problem="How many?", embeddings=e.tolist(), labels=[i % 2 for i in range(answers)],
                accuracy=[1.0 * (i % 3 == 0) for i in range(answers)],
                texts=[f"<think>way {i}</think>\\boxed{{3}}" for i in range(answers)]) | changes


def test_plane_is_numpys_principal_components():
    e = np.random.default_rng(0).normal(size=(12, 5)) * [5, 1, 3, 0.1, 2]
    points, share = pictures.plane(e.tolist())
    values, vectors = np.linalg.eigh(np.cov(e.T))
    expected = (e - e.mean(0)) @ vectors[:, [4, 3]]
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-8)
    np.testing.assert_allclose(points @ points.T, expected @ expected.T, atol=1e-7)
    assert np.isclose(share, values[[4, 3]].sum() / values.sum())
    assert (points.max(0) > -points.min(0)).all()  # signs do not depend on the machine
    np.testing.assert_array_equal(pictures.plane((e + 7).tolist())[0].round(6), points.round(6))


def test_plane_of_what_has_no_plane():
    points, share = pictures.plane([[0.0, 0], [3, 4]])
    np.testing.assert_allclose(np.abs(points), [[2.5, 0], [2.5, 0]])
    assert share == 1 and pictures.plane([[1.0], [3.0], [2.0]])[0].shape == (3, 2)
    points, share = pictures.plane([[0.1, 0.7, 0.3]] * 9)
    assert share == 1 and not points.any() and pictures.plane([[0.6, 0.8]])[0].tolist() == [[0, 0]]


def test_answers_in_one_place_stand_side_by_side_and_the_others_stay():
    points = np.array([[0.0, 0], [1, 1], [0, 0], [0, 0]])
    moved = pictures.side_by_side(points)
    assert (moved[:2] == points[:2]).all() and len(np.unique(moved, axis=0)) == 4
    assert np.abs(moved - points).max() < 0.1
    assert len(np.unique(pictures.side_by_side(np.zeros((15, 2))), axis=0)) == 15


def test_cosine_distances_by_brute_force():
    rows, pairs = [group_row(7), group_row(4)], {True: [], False: []}
    for row in rows:
        for i, a in enumerate(row["embeddings"]):
            for j, b in enumerate(row["embeddings"][:i]):
                pairs[row["labels"][i] == row["labels"][j]].append(1 - np.dot(a, b))
    different, same = np.mean(pairs[False]), np.mean(pairs[True])
    assert pictures.cosine_distances(rows) == f"{different:.2f} in different clusters, {same:.2f} in the same cluster"
    assert pictures.cosine_distances([group_row(2)]).endswith("in different clusters")
    assert pictures.cosine_distances([group_row(3, labels=[0] * 3)]).endswith("in the same cluster")


def test_a_cluster_speaks_by_its_most_central_answer():
    texts = ["a", "x<think> b\nc </think>\\boxed{1}", "c", "<think>cut off", "d"]
    row = dict(embeddings=[[0.0], [1], [2.5], [1.2], [9]], texts=texts)  # the first three have their mean at 1.17
    assert pictures.central_reasoning(row, np.array([1, 1, 1, 0, 0], bool)) == " b\nc "
    assert pictures.central_reasoning(row, np.array([0, 0, 1, 0, 0], bool)) == "c"
    assert pictures.central_reasoning(row, np.array([0, 0, 0, 1, 0], bool)) == "cut off"
    assert pictures.central_reasoning(row, np.array([1, 1, 0, 0, 0], bool)) == "a"  # not the one nearer to all answers


@pytest.mark.parametrize("rows", [
    [group_row(2)],
    [group_row(15, id=name) for name in "abcdef"],
    [group_row(4, embeddings=[[0.6, 0.8]] * 4, labels=[0] * 4)],
    [group_row(12, labels=list(range(12)), texts=[HOSTILE] * 12, problem=HOSTILE * 5)],
    [group_row(3, size=1, accuracy=[0.5, 0, 0.49])],
])
@pytest.mark.filterwarnings("error")
def test_clusters_of_odd_groups(tmp_path, rows):
    run = write_rows(tmp_path, "clusters.jsonl", rows)
    assert pictures.clusters(run) == run / "clusters.png"
    assert_png(run / "clusters.png")
    pictures.clusters(run, {rows[0]["id"]: Image.new("L", (30, 90))})
    assert_png(run / "clusters.png")


def test_every_answer_has_its_mark_filled_if_right_in_the_colour_of_its_cluster():
    row = group_row(9)
    axis, key_axis = pictures.Figure().subplots(1, 2)
    pictures.draw_clusters(row, axis, key_axis)
    colours = [matplotlib.colors.to_rgba(colour) for colour in list(report.PALETTE.values())[:2]]
    marks = [(mark.get_facecolor(), mark.get_edgecolor(), len(mark.get_offsets())) for mark in axis.collections]
    white = (1, 1, 1, 1)
    for (face, edge, count), (label, right) in zip(marks, [(0, 1), (0, 0), (1, 1), (1, 0)], strict=True):
        assert tuple(edge[0]) == colours[label] and tuple(face[0]) == (colours[label] if right else white)
        assert count == sum(a == right and b == label for a, b in zip(row["accuracy"], row["labels"], strict=True))
    assert [text.get_text().split("\n")[0] for text in key_axis.texts] == ["2 of 5 right", "1 of 4 right"]
    pictures.draw_clusters(group_row(2, embeddings=[[0.6, 0.8]] * 2), axis, key_axis)
    assert axis.get_xlabel() == "all the same"
    axis, key_axis = pictures.Figure().subplots(1, 2)
    pictures.draw_clusters(group_row(12, labels=list(range(12))), axis, key_axis)  # more clusters than colours
    assert len(key_axis.texts) == sum(len(mark.get_offsets()) for mark in axis.collections) == 12


# --- the end of a run


def test_finish_draws_what_it_finds_and_the_page_shows_it(tmp_path):
    run = write_rows(tmp_path, "signals.jsonl", [answer_row("abcdef")])
    (run / "clusters.jsonl").write_text("")  # logged, but nothing in it
    assert report.finish(run) == run / "report.html"
    page = Reader((run / "report.html").read_text("utf-8"))
    assert page.open == [] and page.tags.count("img") == 2 and "tokens.html" in page.sources
    assert not (run / "clusters.png").exists()
    write_rows(tmp_path, "clusters.jsonl", [group_row(6)])
    page = Reader(report.finish(run, {"p0": Image.new("RGB", (28, 28))}).read_text("utf-8"))
    pictures = [source for source in page.sources if source != "tokens.html"]
    assert [base64.b64decode(source.split(",")[1]) for source in pictures] == [
        (run / name).read_bytes() for name in ("curves.png", "signals.png", "clusters.png")]
    assert sorted(path.suffix for path in run.iterdir()) == [".html"] * 2 + [".json"] + [".jsonl"] * 3 + [".png"] * 3


def test_finish_of_a_plain_run_is_its_page(tmp_path):
    report.finish(make_run(tmp_path, steps_of([1, 2])))
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"args.json", "curves.png", "metrics.jsonl", "report.html"}


def test_pictures_of_the_last_step_need_their_rows(tmp_path):
    make_run(tmp_path, steps_of([1]))
    for draw, name in ((pictures.signals, "signals"), (report.tokens, "signals"), (pictures.clusters, "clusters")):
        with pytest.raises(UserError, match=f"{name}.jsonl: no such file"):
            draw(tmp_path)
        (tmp_path / f"{name}.jsonl").write_text("\n")
        with pytest.raises(UserError, match=f"{name}.jsonl: nothing to draw"):
            draw(tmp_path)
        (tmp_path / f"{name}.jsonl").unlink()


# --- the command line


def test_runs_that_differ_only_in_the_seed_share_a_label(tmp_path):
    def run(name, **args):
        return str(make_run(tmp_path / name, steps_of([1]), **args))

    a, b = run("a", seed=0, beta=0.0), run("b", seed=1, beta=0.0)
    vepo = run("v", script="vepo", beta=0.0, alpha=0.7)
    assert report.label_runs([a, b, vepo]) == {"grpo": [a, b], "vepo": [vepo]}
    c = run("c", seed=0, beta=0.1)
    assert report.label_runs([a, b, c]) == {"grpo beta=0.0": [a, b], "grpo beta=0.1": [c]}


@pytest.mark.parametrize("change, message", [
    (lambda run: (run / "args.json").unlink(), "args.json: no such file"),
    (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl: no such file"),
    (lambda run: (run / "metrics.jsonl").write_text(""), "nothing to draw yet"),
    (lambda run: (run / "metrics.jsonl").write_text('{"step": 0}\n'), "nothing to draw yet"),
    (lambda run: (run / "metrics.jsonl").write_text('{"step": 0}\n{"st'), "metrics.jsonl, line 2: not JSON"),
    (lambda run: (run / "metrics.jsonl").write_text('["step"]\n'), "line 1: not an object with step"),
    (lambda run: (run / "args.json").write_text("{}"), "not an object with script"),
    (lambda run: (run / "samples.jsonl").write_text('{"step": 0}\n'), "line 1: not an object with step, id"),
])
def test_errors_are_one_line_and_status_2(tmp_path, capsys, change, message):
    change(make_run(tmp_path, steps_of([1, 2]), [sample(0)]))
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_command_line_writes_the_page_of_one_run_and_the_overlay_of_several(tmp_path, drawn, monkeypatch, capsys):
    runs = [str(make_run(tmp_path / name, steps_of([1, 2]), script=name)) for name in ("grpo", "vepo")]
    report.main([*runs, "--out", str(tmp_path / "both.png")])
    assert drawn[0][1] == str(tmp_path / "both.png") == capsys.readouterr().out.strip()
    monkeypatch.setattr(report, "finish", lambda folder, pictures: f"page of {folder} with {len(pictures)}")
    report.main(runs[:1])
    assert capsys.readouterr().out == f"page of {runs[0]} with 0\n"


def test_a_page_drawn_later_has_the_pictures_too(tmp_path):
    """Those of the last step's problems, from the run's data set; and if that is gone, a page without them."""
    problems = load_problems("toy@train:3")
    rows = [sample(step, id=problem["id"]) for step, problem in zip((1, 2, 2), problems, strict=True)]
    run = make_run(tmp_path / "run", steps_of([1, 2, 3]), rows, dataset="toy@train:3")
    found = report.pictures_of(run)
    assert sorted(found) == sorted(problem["id"] for problem in problems)[1:]
    assert found[problems[1]["id"]].tobytes() == problems[1]["images"][0].tobytes()
    report.main([str(run)])
    assert (run / "report.html").read_text().count("<img") == 1 + 2
    make_run(run, steps_of([1, 2, 3]), rows, dataset=str(tmp_path / "gone.jsonl"))
    assert report.pictures_of(run) == {}
    assert report.pictures_of(make_run(tmp_path / "new", [], dataset="toy@train:3")) == {}


def test_as_a_script_it_finds_common_in_the_folder_above(tmp_path):
    shutil.copytree(Path(report.__file__).parent, tmp_path / "lab")
    (tmp_path / "harness").mkdir()  # stubs: torch takes long to import
    (tmp_path / "harness/flags.py").write_text(
        "from argparse import ArgumentParser as Parser\n\n\nclass UserError(Exception):\n    pass\n")
    (tmp_path / "harness/run.py").write_text("bootstrap = seed_of = None\n")
    (tmp_path / "common.py").write_text("load_problems = None\n")
    (tmp_path / "mupo.py").write_text("partition = None\n")
    command = [sys.executable, str(Path("lab", "report.py")), "nowhere"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.splitlines()[-1].startswith("error: nowhere")


def test_dots_are_full_where_training_ended(tmp_path, monkeypatch):
    """A dot to each interval, at its mean; hollow but for the last, and for a model that was measured only before."""
    figures, plain = [], pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure) or plain(figure, path))
    lines = [("base", "red", [(0.4, 0.3, 0.5)]), ("trained", "blue", [(0.5, 0.4, 0.6), (1.0, 0.9, 1.0)])]
    assert_png(report.dots([("pass@1", "%", lines), ("entropy", "", lines)], tmp_path / "dots.png", "a", "b"))
    for axis in figures[0].axes:
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        assert [float(dot.get_xdata()[0]) for dot in dots] == [0.4, 0.5, 1.0]
        assert [dot.get_markerfacecolor() for dot in dots] == ["white", "white", "blue"]
        assert axis.get_xlim()[1] > 1.0

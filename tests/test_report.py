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

import numpy as np
import pytest
from PIL import Image

from common import UserError
from lab import report

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
    monkeypatch.setattr(report, "draw", lambda *args: calls.append(args) or args[1])
    return calls


# --- arithmetic


@pytest.mark.parametrize("count", [1, 2, 23, 24, 60, 121])
def test_running_mean_is_the_mean_of_the_neighbours(count):
    values = np.random.default_rng(count).normal(size=count)
    half = count // 24
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(count)]
    np.testing.assert_allclose(report.running_mean(values), expected, atol=1e-12)


def test_aggregate_is_numpys_mean_and_range_over_the_shared_steps():
    values = np.random.default_rng(0).normal(size=(3, 7))
    steps = [np.arange(7.0), np.arange(7.0), np.arange(5.0)]  # the third run stopped early
    shared, mean, low, high = report.aggregate([(step, row[: len(step)]) for step, row in zip(steps, values)])
    np.testing.assert_array_equal(shared, np.arange(5))
    np.testing.assert_allclose(mean, values[:, :5].mean(0))
    np.testing.assert_array_equal(low, values[:, :5].min(0))
    np.testing.assert_array_equal(high, values[:, :5].max(0))


def test_aggregate_pairs_values_by_step_and_not_by_place():
    first = np.array([0.0, 2, 4]), np.array([1.0, 2, 3])
    second = np.array([2.0, 3, 4]), np.array([10.0, 0, 20])
    shared, mean, _, _ = report.aggregate([first, second])
    assert shared.tolist() == [2, 4] and mean.tolist() == [6, 11.5]


def test_series_takes_the_later_line_of_a_repeated_step_and_leaves_gaps():
    rows = [{"step": 1, "kl": 1.0}, {"step": 2, "kl": 2.0}, {"step": 1, "kl": 5.0}, {"step": 0},
            {"step": 3, "kl": None}, {"step": 4, "kl": float("inf")}]
    steps, values = report.series(rows, "kl")
    assert steps.tolist() == [1, 2, 4]
    np.testing.assert_array_equal(values, [5, 2, np.nan])


def test_spread_keeps_order_and_distance_and_moves_nothing_without_need():
    assert report.spread([0.1, 0.9], [0.1, 0.1]).tolist() == [0.1, 0.9]
    np.testing.assert_allclose(report.spread([0.5, 0.5], [0.1, 0.3]), [0.4, 0.6])
    heights = np.array([0.5, 0.52, 0.1, 0.51, 0.5, 0.12, 0.9, 0.53])
    placed = report.spread(heights, [0.1] * 8)
    assert (np.argsort(placed) == np.argsort(heights, kind="stable")).all()
    assert np.diff(np.sort(placed)).min() > 0.099
    assert report.spread([], []).tolist() == []


def test_a_script_keeps_its_colour_and_nine_lines_are_refused():
    few, many = report.colours_of(["mupo", "mine", "grpo"]), report.colours_of(["grpo", "a", "b", "vepo", "mupo"])
    assert few["grpo"] == many["grpo"] and few["mupo"] == many["mupo"]
    assert len(set(many.values())) == 5 and len(set(few.values())) == 3
    with pytest.raises(UserError, match="at most 8"):
        report.colours_of([str(i) for i in range(9)])


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
    smooth = np.array([report.running_mean(row) for row in values])
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
    report.write(tmp_path / "a", b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        report.write(tmp_path / "a", b"new")
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
        self.open += [tag] if tag not in ("img", "meta") else []

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
    monkeypatch.setattr(report, "page", lambda folder: f"page of {folder}")
    report.main(runs[:1])
    assert capsys.readouterr().out == f"page of {runs[0]}\n"


def test_as_a_script_it_finds_common_in_the_folder_above(tmp_path):
    (tmp_path / "lab").mkdir()
    shutil.copy(report.__file__, tmp_path / "lab")
    (tmp_path / "common.py").write_text("class UserError(Exception):\n    pass\n")  # a stub: torch takes long to import
    command = [sys.executable, str(Path("lab", "report.py")), "nowhere"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.splitlines()[-1].startswith("error: nowhere")

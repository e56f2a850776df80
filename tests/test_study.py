"""lab/study.py: its intervals against the bootstrap done by hand, its verdicts, and that it does each run once."""

import json

import numpy as np
import pytest

import eval_passk
from common import UserError
from lab import study

SCRIPT = """
import json, os, sys, time
flags = dict(arg[2:].split("=", 1) for arg in sys.argv[1:] if "=" in arg)
folder = flags.pop("output_dir")
os.makedirs(folder, exist_ok=True)
with open("calls", "a") as file:
    file.write(os.path.basename(folder) + "\\n")
if flags.get("seed") == os.environ.get("FAIL"):
    sys.exit("error: no luck")
json.dump(flags, open(folder + "/args.json", "w"))
with open(folder + "/metrics.jsonl", "w") as file:
    file.writelines(json.dumps(dict(step=n, tokens=100, entropy=n / int(flags["seed"]))) + "\\n" for n in (1, 2, 3))
open(folder + "/" + ("eval.json" if "ks" in flags else "config.json"), "w").write("{}")
"""


def test_interval_is_the_crossed_bootstrap():
    """Against loops: draw seeds, draw problems, the same for both tables; mean of the drawn rectangle; quantiles."""
    random = np.random.default_rng(1)
    one, other = random.random((3, 7)), random.random((3, 7))
    value, low, high = study.interval(study.difference, one, other, draws=4000)
    assert value == pytest.approx((one - other).mean())
    draws = []
    for _ in range(4000):
        seeds, problems = random.integers(0, 3, 3), random.integers(0, 7, 7)
        draws.append(np.mean([[one[s, p] - other[s, p] for p in problems] for s in seeds]))
    assert (low, high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)


def test_interval_is_paired_and_counts_problems_and_seeds():
    """A constant gap has no width; what all seeds share stays as wide as the problems make it; and so the other way."""
    table = np.random.default_rng(2).random((5, 400))
    assert study.interval(study.difference, table + 0.1, table) == pytest.approx([0.1] * 3)
    problems = np.repeat(table[:1], 5, 0)
    _, low, high = study.interval(study.mean, problems)
    _, wanted, until = study.interval(study.mean, problems[:1])
    assert high - low == pytest.approx(until - wanted, rel=0.05)
    seeds = np.repeat(table[:, :1], 400, 1)
    assert study.interval(study.mean, seeds) == pytest.approx(study.interval(study.mean, table[:, :1]), abs=0.02)


def test_spread_and_share_of_fall():
    means = np.array([0.1, 0.5]), np.array([0.4, 0.5]), np.array([0.2, 0.5])
    assert study.spread(*means).tolist() == pytest.approx([0.3, 0])
    assert study.share_of_fall(1.0, 0.4, 0.2) == pytest.approx(0.75)


@pytest.mark.parametrize("side, low, high, expected", [
    ("above", 0.1, 0.2, "holds"), ("above", -0.2, -0.1, "fails"), ("above", -0.1, 0.1, "open"),
    ("below", -0.2, -0.1, "holds"), ("below", 0.1, 0.2, "fails"), ("below", -0.1, 0.1, "open"),
    ("within", -0.01, 0.01, "holds"), ("within", 0.03, 0.1, "fails"), ("within", -0.1, -0.03, "fails"),
    ("within", -0.01, 0.05, "open"),
])
def test_verdicts(side, low, high, expected):
    bound = 0.02 if side == "within" else 0
    tests = [study.Test("", [(low + high) / 2, low, high], side, bound)]
    sure = study.Test("", [1, 1, 1], "above", 0)
    assert study.judge(tests[0]) == study.verdict(tests) == study.verdict([sure, *tests]) == expected


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A bench whose scripts are one that only writes down that it was called."""
    (tmp_path / "fake.py").write_text(SCRIPT)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "POLL", 0.05)
    monkeypatch.setattr(study, "RUNS", {name: spec._replace(script="fake.py") for name, spec in study.RUNS.items()})
    real = study.Bench.command
    monkeypatch.setattr(study.Bench, "command", lambda self, *run: ("fake.py", real(self, *run)[1]))
    return study.Bench(tmp_path / "runs", quick=False, jobs=2)


def test_every_run_once_and_after_what_it_needs(bench, tmp_path, monkeypatch):
    names = study.STUDIES["stage1"]
    bench.make_all(names, (1, 2))
    calls = (tmp_path / "calls").read_text().split()
    assert len(calls) == len(set(calls)) == 2 * (7 + 8)
    for name, spec in study.RUNS.items():
        for seed in (1, 2) if f"{name}-1" in calls else ():
            assert all(calls.index(f"{need}-{seed}") < calls.index(f"{name}-{seed}") for need in spec.needs)
    flags = {name: json.loads((tmp_path / f"runs/{name}-2/args.json").read_text()) for name in ("sft", "overtrained")}
    assert flags["sft"]["max_tokens"] == "300" and flags["overtrained"]["max_tokens"] == "3000"
    assert flags["sft"]["traces"] == flags["overtrained"]["traces"] and "-2." in flags["sft"]["traces"]
    bench.make_all(names, (1, 2))
    assert len((tmp_path / "calls").read_text().split()) == len(calls)  # nothing is run again
    assert study.along(bench, "sft", (1, 2), "entropy").tolist() == [[2.0], [1.0]]
    monkeypatch.setitem(study.RUNS, "sft", study.RUNS["sft"]._replace(flags={"learning_rate": 9.0}))
    with pytest.raises(UserError, match="learning_rate"):  # nor is a run of other flags taken for this one
        bench.make_all(names, (1,))


def test_a_run_that_fails_is_one_line(bench, monkeypatch):
    monkeypatch.setenv("FAIL", "2")
    with pytest.raises(UserError, match="vepo-2: fake.py ended with status 1, saying: error: no luck"):
        bench.make_all(("vepo",), (1, 2))


def test_measures_of_a_model(bench):
    """What eval_passk.py wrote, problems in the order of their ids, with the diversity of the reasoning."""
    texts = ["<think>a b</think>\\boxed{1}", "<think>c d</think>\\boxed{2}"]
    rows = [dict(id=f"p{n}", dataset="toy@study:2", right=[True, n == 1], answers=["1", "2"], greedy_right=True,
                 format=[1, 1], entropy=[1, 1], tokens=[4, 4], truncated=[0, 0], texts=texts) for n in (2, 1)]
    folder = bench.folder("eval-base", 1)
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study.KS, before = (1, 2), study.KS
    try:
        found = study.measured(bench, "base", 1)["toy@study"]
    finally:
        study.KS = before
    assert found["pass@1"].tolist() == [eval_passk.pass_at_k(2, 2, 1), eval_passk.pass_at_k(2, 1, 1)]
    assert found["diversity"].tolist() == pytest.approx([1.0, 1.0])
    assert study.diversity(texts[:1] * 3) == pytest.approx(0, abs=1e-6)


def test_bad_flags_are_one_line(capsys):
    for argv in (["nothing"], ["vepo", "--seeds", "0"], ["vepo", "--jobs", "x"]):
        with pytest.raises(SystemExit) as stop:
            study.parse(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1

"""lab/study.py: its intervals against the bootstrap done by hand, its verdicts, and that it does each run once."""

import json
import shutil
import signal

import eval_passk
from harness.flags import UserError
from lab import study

import numpy as np
import pytest

SCRIPT = """
import json, os, sys, time
flags = dict(arg[2:].split("=", 1) for arg in sys.argv[1:] if "=" in arg)
folder = flags.pop("output_dir")
os.makedirs(folder, exist_ok=True)
with open("calls", "a") as file:
    file.write(os.path.basename(folder) + "\\n")
if flags.get("seed") == os.environ.get("FAIL"):
    print("error: no luck\\n  30%|###", end="")  # as an open bar leaves it
    sys.exit(2)
if flags.get("seed") == os.environ.get("ASKED"):  # asked to end: a checkpoint, and no model
    sys.exit(0)
if flags.get("seed") in os.environ.get("WAIT", ""):
    time.sleep(60)
json.dump(flags, open(folder + "/args.json", "w"))
with open(folder + "/metrics.jsonl", "w") as file:
    file.writelines(json.dumps(dict(step=n, tokens=100, entropy=n / int(flags["seed"]))) + "\\n" for n in (1, 2, 3))
if "ks" in flags:
    os.remove(folder + "/args.json")  # eval_passk.py writes none
    part = dict(seed=int(flags["seed"]), n=int(flags["num_samples"]), ks=[int(k) for k in flags["ks"].split(",")])
    json.dump([part | dict(dataset=name) for name in flags["dataset"].split(",")], open(folder + "/eval.json", "w"))
else:
    open(folder + "/preprocessor_config.json", "w").close()
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


def test_share_of_fall():
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
    cores = study.usable_cores()
    monkeypatch.setattr(study, "usable_cores", lambda: (cores * 2)[:2])  # trap: one core; if need be two runs share it
    return study.Bench(tmp_path / "runs", quick=False, jobs=2)


def test_every_run_once_and_after_what_it_needs(bench, tmp_path, monkeypatch):
    names = study.STUDIES["stage1"]
    bench.make_all(names, (1, 2))
    calls = (tmp_path / "calls").read_text().split()
    assert len(calls) == len(set(calls)) == 2 * (8 + 9)
    for name, spec in study.RUNS.items():
        for seed in (1, 2) if f"{name}-1" in calls else ():
            assert all(calls.index(f"{need}-{seed}") < calls.index(f"{name}-{seed}") for need in spec.needs)
    flags = {name: json.loads((tmp_path / f"runs/{name}-2/args.json").read_text()) for name in ("sft", "overtrained")}
    assert flags["sft"]["max_tokens"] == "300" and flags["overtrained"]["max_tokens"] == "3000"
    assert flags["sft"]["traces"] == flags["overtrained"]["traces"] and "-2." in flags["sft"]["traces"]
    bench.make_all(names, (1, 2))
    assert len((tmp_path / "calls").read_text().split()) == len(calls)  # nothing is run again
    assert study.along(bench, "sft", (1, 2), "entropy").tolist() == [[2.0], [1.0]]


@pytest.mark.parametrize("change, said", [
    (lambda patch, place: patch.setitem(study.RUNS, "sft", study.RUNS["sft"]._replace(flags={"learning_rate": 9.0})),
     r"sft-\d was run with --learning_rate"),
    (lambda patch, place: patch.setitem(study.RUNS, "sft", study.RUNS["sft"]._replace(tokens=2)),
     r"sft-\d was run with --max_tokens 300"),
    (lambda patch, place: patch.setattr(study, "COUNT", 64), r"eval-\S+ was run with --dataset toy@study:128"),
    (lambda patch, place: patch.setattr(study, "KS", (1, 2)), r"eval-\S+ was run with --ks 1,2,4,8,16"),
    (lambda patch, place: shutil.rmtree(place / "sft-1"), "-1 is older than .*/sft-1"),
    (lambda patch, place: shutil.rmtree(place / "opd-grpo-1"), "eval-opd-grpo-1 is older than .*opd-grpo-1"),
    (lambda patch, place: (place / "opd-grpo-2/args.json").write_text('{"seed": "2", "beta": 1}'),
     "opd-grpo-2 was run with --beta 1, seed 1 with None"),
])
def test_what_is_there_is_what_would_be_run(bench, tmp_path, monkeypatch, change, said):
    """No run of other flags is taken for this one, none made from a model that is no more, and all seeds are alike."""
    bench.make_all(study.STUDIES["stage1"], (1, 2))
    change(monkeypatch, tmp_path / "runs")
    with pytest.raises(UserError, match=said):
        study.Bench(bench.place, quick=False, jobs=1).make_all(study.STUDIES["stage1"], (1, 2))


def started(monkeypatch):
    """A list that takes every process that a study starts."""
    processes, plain = [], study.subprocess.Popen
    monkeypatch.setattr(study.subprocess, "Popen", lambda *a, **k: processes.append(plain(*a, **k)) or processes[-1])
    return processes


def test_trap_one_core(bench, monkeypatch):
    """A run that fails is one line and ends the others; on one core too, where a bench would else run them in turn."""
    processes = started(monkeypatch)
    monkeypatch.setenv("FAIL", "2")
    monkeypatch.setenv("WAIT", "13")
    with pytest.raises(UserError, match="vepo-2: fake.py ended with status 2, saying: error: no luck"):
        bench.make_all(("vepo",), (1, 2, 3))
    assert {process.returncode for process in processes} == {2, -signal.SIGTERM}


def test_a_run_that_was_asked_to_end_is_not_done(bench, monkeypatch):
    """It ends with status 0, and its model is not there: the study says so, and the same command goes on with it."""
    monkeypatch.setenv("ASKED", "1")
    with pytest.raises(UserError, match="vepo-1: fake.py was asked to end before its last step"):
        bench.make_all(("vepo",), (1,))
    monkeypatch.delenv("ASKED")
    study.Bench(bench.place, quick=False, jobs=1).make_all(("vepo",), (1,))
    assert bench.last_file("vepo", 1).exists()


def test_a_study_that_is_stopped_stops_its_runs(bench, monkeypatch):
    """By Ctrl-C or by SIGTERM; else the same command would start a second process in the same folder."""
    processes, plain = started(monkeypatch), study.concurrent.futures.wait
    monkeypatch.setenv("WAIT", "1")

    def wait(futures, *args):
        if processes:
            signal.raise_signal(signal.SIGTERM)
        return plain(futures, *args)
    monkeypatch.setattr(study.concurrent.futures, "wait", wait)
    monkeypatch.setattr(study, "build", lambda name: None)
    monkeypatch.setattr(study, "Bench", lambda *args: bench)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            study.main(study.parse(["vepo", "--seeds", "1", "--output", str(bench.place)]))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert {process.returncode for process in processes} == {-signal.SIGTERM}


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


def test_one_seed_gives_no_verdict(bench, monkeypatch):
    """Its intervals know nothing of other seeds, so that a metric of the run would be judged as if it were certain."""
    monkeypatch.setattr(study, "vepo_claims", lambda *given: {"X": ("so", [study.Test("", [1, 1, 1], "above", 0)])})
    bench.make_all(("vepo",), (1,))
    for seeds, word in (((1,), "open"), ((1, 2), "holds")):
        claim, = study.summary("vepo", {}, bench, seeds)["claims"]
        assert claim["verdict"] == claim["tests"][0]["verdict"] == word


def test_stage1_says_what_differs(bench, tmp_path, monkeypatch):
    """The tokens that each arm learned from and what became of the teacher's answers; no path of this machine."""
    monkeypatch.setattr(study, "stage1_claims", lambda *given: {})
    bench.make_all(study.STUDIES["stage1"], (1,))
    rows = [dict(id="p", text="a", right=True), dict(id="p", text="a", right=True), dict(id="q", text="b", right=False)]
    (bench.place / "traces-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = np.arange(8.0).reshape(2, 4)
    table = {name: {study.IN: {key: answers * n for key in ("pass@1", "pass@16", "distinct", "entropy")}}
             for n, name in enumerate(("opd", "forward", "soft", "sft"))}
    found = study.summary("stage1", table, bench, (1,))
    assert [step["value"][0] for step in found["contrasts"]] == [3.5] * 12  # the later less the earlier, each time
    assert found["learned_from"] == [dict(
        seed=1, steps=dict(opd=3, sft=3, overtrained=3, forward=3, soft=3),
        tokens=dict(opd=300, sft=300, overtrained=300, forward=300, soft=300),
        answers=3, right=2, kept=1, problems=1)]
    assert str(tmp_path) not in json.dumps(found) and "--teacher toy-teacher" in found["commands"]["sft"]
    text = study.show(found | dict(measures={}, claims=[]))
    assert text.count("\n  - ") == len(study.DIFFERENCES) > 4 and "from soft to sft: entropy +3.5000" in text


def test_bad_flags_are_one_line(capsys):
    for argv in (["nothing"], ["vepo", "--seeds", "0"], ["vepo", "--jobs", "x"]):
        with pytest.raises(SystemExit) as stop:
            study.parse(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1

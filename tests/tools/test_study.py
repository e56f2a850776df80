"""lab/study.py and lab/runs.py: each run is made once, after what it needs; a study goes from end to end."""

import json
import os
import shutil
import signal
import subprocess
import sys

from harness.answers import VERIFIERS
from harness.flags import UserError
from lab import arms, carry, claims, panels, runs, study

import numpy as np
import pytest

SCRIPT = """
import json, os, sys, time
flags = dict(arg[2:].split("=", 1) for arg in sys.argv[1:] if "=" in arg)
folder = flags.pop("output_dir")
os.makedirs(folder, exist_ok=True)
with open("calls", "a") as file:
    file.write(os.path.relpath(folder, "runs") + "\\n")
if flags.get("seed") == os.environ.get("FAIL"):
    print("error: no luck\\n  30%|###", end="")  # as an open bar leaves it
    sys.exit(2)
if flags.get("seed") in os.environ.get("WAIT", ""):
    time.sleep(60)
if "traces" in flags:
    open(flags["traces"], "a").close()
if "num_samples" not in flags:
    json.dump(dict(flags, script="fake"), open(folder + "/args.json", "w"))
with open(folder + "/metrics.jsonl", "w") as file:
    file.writelines(json.dumps(dict(step=n, tokens=100, entropy=n / int(flags["seed"]))) + "\\n" for n in (1, 2, 3))
open(folder + "/last", "w").close()
"""


class Plain:
    """Starts a script as anybody would. A Starter would import torch first, for scripts that do not need it."""

    def __init__(self, core):
        self.core = core

    def start(self, order):
        with open(order["stdout"], "a") as output:
            return subprocess.Popen([sys.executable, *order["command"]], cwd=order["cwd"], env=order["environment"],
                                    stdout=output, stderr=subprocess.STDOUT)

    def end(self):
        pass


def fake(specs):
    """The same runs, of a script that only writes down that it was called."""
    return {name: spec._replace(script="fake.py", last="last") for name, spec in specs.items()}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder in which runs are made, by a script that only writes down that it was called."""
    (tmp_path / "fake.py").write_text(SCRIPT)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "POLL", 0.01)
    monkeypatch.setattr(runs, "Starter", Plain)
    monkeypatch.setattr(runs, "SECONDS", {"fake.py": (1, 1)})
    monkeypatch.setattr(runs, "SOURCES", ("fake.py",))
    cores = runs.usable_cores()
    monkeypatch.setattr(runs, "usable_cores", lambda: (cores * 2)[:2])  # trap: one core; if need be two runs share it
    return tmp_path


def few(seeds=2):
    """The runs of one world of stage1."""
    specs = fake(arms.specs_of("stage1", seeds))
    return {name: spec for name, spec in specs.items() if name.startswith("toy/")}


def bench_of(home, specs, jobs=2):
    return runs.Bench(home / "runs", specs, jobs)


# --- the runs ---------------------------------------------------------------------------------------------------------


def test_every_run_once_and_after_what_it_needs(home):
    specs = few()
    bench = bench_of(home, specs)
    bench.make_all()
    calls = (home / "calls").read_text().split()
    assert len(calls) == len(set(calls)) == 2 * (6 + 7)
    for name, spec in specs.items():
        for seed in (1, 2):
            own = calls.index(f"{name}-{seed}")
            assert all(calls.index(f"{need}-{seed}") < own for need in spec.needs)
    flags = {name: bench.job(f"toy/{name}", 2)["flags"] for name in ("sft", "overtrained", "opd-grpo")}
    assert flags["sft"]["max_tokens"] == 300
    assert flags["overtrained"]["max_tokens"] == 3000
    assert flags["sft"]["traces"] == flags["overtrained"]["traces"]
    assert flags["opd-grpo"]["model"].endswith("toy/opd-2")
    bench_of(home, specs).make_all()
    assert len((home / "calls").read_text().split()) == len(calls)  # nothing is run again


def test_a_run_waits_for_what_it_needs_where_a_core_is_free(home):
    """With one seed the second core has nothing else to do: sft.py must not start beside the run that it needs."""
    bench_of(home, few(1), jobs=2).make_all()
    calls = (home / "calls").read_text().split()
    assert calls.index("toy/opd-1") < calls.index("toy/sft-1") < calls.index("toy/overtrained-1")


def test_a_run_that_was_stopped_behind_its_last_file_is_made_anew(home):
    specs = few(1)
    bench_of(home, specs).make_all()
    (home / "runs/toy/opd-grpo-1/job.json").unlink()
    bench = bench_of(home, {"toy/opd-grpo": specs["toy/opd-grpo"]._replace(needs=())})
    bench.make_all()
    assert (home / "calls").read_text().split().count("toy/opd-grpo-1") == 2
    assert bench.job("toy/opd-grpo", 1)["whole"]


def test_two_studies_at_a_time_do_not_write_into_the_same_runs(home):
    with runs.alone_in(home / "runs"), pytest.raises(UserError, match="runs: another process is doing runs there"):
        bench_of(home, few(1)).make_all()
    assert not (home / "calls").exists()
    bench_of(home, few(1)).make_all()


def changed(specs, name, **flags):
    specs[name] = specs[name]._replace(flags=specs[name].flags | flags)


CHANGES = [
    (lambda specs, place: changed(specs, "toy/sft", learning_rate=9.0), r"sft-\d was run with --learning_rate 0.0012"),
    (lambda specs, place: changed(specs, "toy/sft", max_steps=9), r"sft-\d was run with --max_steps None, now"),
    (lambda specs, place: specs.update({"toy/sft": specs["toy/sft"]._replace(tokens=2)}),
     r"sft-\d was run with --max_tokens 300"),
    (lambda specs, place: changed(specs, "toy/eval-base", ks="1,2"), r"eval-base-\d was run with --ks 1,2,4,8,16"),
    (lambda specs, place: (place / "opd-grpo-2/args.json").write_text('{"script": "fake", "seed": "2", "beta": 1}'),
     "opd-grpo-2 was run with --beta 1, seed 1 with None"),
    (lambda specs, place: shutil.rmtree(place / "sft-1"), "-1 is older than .*/sft-1"),  # the last: it is not undone
]


def test_what_is_there_is_what_would_be_run(home):
    """No run of other flags is taken for this one, none made from a model that is no more, and all seeds are alike."""
    bench_of(home, few()).make_all()
    for change, said in CHANGES:
        bench_of(home, few(), jobs=1).make_all()  # unchanged, it is taken
        specs = few()
        kept = (home / "runs/toy/opd-grpo-2/args.json").read_text()
        change(specs, home / "runs/toy")
        with pytest.raises(UserError, match=said):
            bench_of(home, specs, jobs=1).make_all()
        (home / "runs/toy/opd-grpo-2/args.json").write_text(kept)
    assert len((home / "calls").read_text().split()) == 2 * (6 + 7) + 1  # sft-1 alone was made anew


def started(monkeypatch):
    """A list that takes every process that a study starts."""
    processes, plain = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: processes.append(plain(*a, **k)) or processes[-1])
    return processes


def test_trap_one_core(home, monkeypatch):
    """A run that fails is one line and ends the others; on one core too, where a bench would else run them in turn."""
    processes = started(monkeypatch)
    monkeypatch.setenv("FAIL", "2")
    monkeypatch.setenv("WAIT", "13")
    with pytest.raises(UserError, match="opd-2: fake.py ended with status 2, saying: error: no luck"):
        bench_of(home, few(3)).make_all()
    assert {process.returncode for process in processes} == {2, -signal.SIGTERM}


def test_a_run_that_ends_early_is_no_finished_run(home):
    """Status 0 is not enough: the file that a run writes last must be there."""
    specs = {name: spec._replace(last="never") for name, spec in few(1).items()}
    with pytest.raises(UserError, match="ended with status 0"):
        bench_of(home, specs).make_all()


def test_a_study_that_is_stopped_stops_its_runs(home, monkeypatch):
    """By Ctrl-C or by SIGTERM; else the same command would start a second process in the same folder."""
    processes, plain = started(monkeypatch), runs.concurrent.futures.wait
    monkeypatch.setenv("WAIT", "1")

    def wait(futures, *args):
        if processes:
            signal.raise_signal(signal.SIGTERM)
        return plain(futures, *args)

    monkeypatch.setattr(runs.concurrent.futures, "wait", wait)
    monkeypatch.setattr(study, "build", lambda name: None)
    specs = few(1)
    monkeypatch.setattr(arms, "specs_of", lambda *args: specs)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            study.main(study.parse(["stage1", "--output", str(home / "results")]))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert {process.returncode for process in processes} == {-signal.SIGTERM}


# --- carried to another machine ---------------------------------------------------------------------------------------


def carried(home, specs):
    """A bench of the same runs on another machine: what is finished here was packed and unpacked there."""
    count = carry.pack(bench_of(home, specs), home / "packed.tar.xz")
    assert carry.unpack(home / "there", home / "packed.tar.xz") == count
    assert carry.unpack(home / "there", home / "packed.tar.xz") == 0  # what is there stays
    return runs.Bench(home / "there", specs, 2)


def without_measurements(specs):
    return {name: spec for name, spec in specs.items() if spec.script == "fake.py" and "eval-" not in name}


def test_nothing_that_was_carried_is_made_again(home):
    specs = without_measurements(few())
    bench_of(home, specs).make_all()
    calls = (home / "calls").read_text()
    there = carried(home, specs)
    there.make_all()
    assert (home / "calls").read_text() == calls
    for name in specs:
        assert there.job(name, 2) == bench_of(home, specs).job(name, 2)


def test_a_model_that_did_not_travel_is_made_again_where_a_run_starts_from_it(home):
    specs = without_measurements(few())
    bench_of(home, specs).make_all()
    shutil.rmtree(home / "runs/toy/sft-grpo-1")
    before = len((home / "calls").read_text().split())
    there = carried(home, specs)
    there.make_all()
    made = [os.path.basename(call) for call in (home / "calls").read_text().split()[before:]]
    assert made == ["sft-1", "sft-grpo-1"]
    runs.Bench(home / "there", specs, 2).make_all()  # and what was made from its first copy is not out of date
    assert len((home / "calls").read_text().split()) == before + 2


def test_a_whole_chain_of_models_is_made_again_for_the_last(home):
    """The measurement alone is missing: its model, and the model which that one started from, did not travel."""
    specs = few()
    bench_of(home, specs).make_all()
    shutil.rmtree(home / "runs/toy/eval-sft-grpo-1")
    before = len((home / "calls").read_text().split())
    carried(home, specs).make_all()
    made = [os.path.basename(call) for call in (home / "calls").read_text().split()[before:]]
    assert made == ["sft-1", "sft-grpo-1", "eval-sft-grpo-1"]


def test_a_table_is_the_same_from_what_was_carried(played, tmp_path):
    """With two data sets, several verifiers, and the traces that warm starts learned from."""
    for name in ("stage1", "sft_or_rl"):
        place = played(name)
        kept = {path.name: path.read_bytes() for path in place.glob("*.json")}
        file = str(tmp_path / "packed.tar.xz")
        study.main(study.parse([name, "--quick", "--seeds", "2", "--pack", file]))
        shutil.rmtree(tmp_path / "runs")
        played(name, "--unpack", file)
        assert not list((tmp_path / "runs").rglob("samples.jsonl"))  # nothing was played again
        for path, content in kept.items():
            assert (place / path).read_bytes() == content


def test_what_is_no_packed_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("no archive")
    for path in ("file", "missing"):
        with pytest.raises(UserError, match=f"{path} cannot be unpacked"):
            carry.unpack(tmp_path / "runs", str(tmp_path / path))


def test_the_hash_of_the_code_is_over_names_and_contents(home):
    one = runs.code_hash()
    assert one == runs.code_hash()
    (home / "fake.py").write_text(SCRIPT + "\n")
    assert runs.code_hash() != one


# --- how long it takes ------------------------------------------------------------------------------------------------


def test_plan_and_pace():
    """Hours by hand: steps and answers times seconds; what is finished corrects the rest of the same script."""
    specs = {
        "w/a": runs.Spec("grpo.py", dict(max_steps=100), seeds=(1, 2)),
        "w/b": runs.Spec("sft.py", dict(), needs=("w/a",), tokens=10),
        "w/eval-a": runs.Spec("eval_passk.py", dict(num_samples=15, dataset="x@y:32,x@z:32"), seeds=(1, 2)),
    }
    assert [runs.units(specs, name) for name in specs] == [100, 1000, 2]
    grpo = runs.SECONDS["grpo.py"][0] + 100 * runs.SECONDS["grpo.py"][1]
    assert runs.seconds(specs, "w/a") == pytest.approx(grpo)
    text = runs.plan(specs, jobs=2)
    total = 2 * grpo + runs.seconds(specs, "w/b") + 2 * runs.seconds(specs, "w/eval-a")
    assert f"{total / 3600:.2f}" in text and runs.in_words(total / 2) in text
    pace = runs.Pace(specs)
    pace.note("w/a", 3 * grpo)
    assert pace.of("w/a") == pytest.approx(3 * grpo)
    assert pace.of("w/b") == pytest.approx(runs.seconds(specs, "w/b"))


def test_time_left_counts_what_is_under_way(home):
    specs = {"w/a": runs.Spec("fake.py", dict(max_steps=119), seeds=(1, 2))}
    bench = bench_of(home, specs)
    assert bench.progress(["w/a", "w/a"]).startswith("about 2 min left")
    bench.steps["w/a", 1] = 119
    assert bench.progress(["w/a", "w/a"]).startswith("about 1 min left, w/a-1 step 119")


def test_times_in_words():
    assert [runs.in_words(some) for some in (1, 90, 3600, 7512)] == ["1 min", "2 min", "1 h 0 min", "2 h 5 min"]


def test_the_studies_fit_into_six_hours_on_two_cores(capsys):
    papers = ("doubt", "ways", "stage1")  # sft_or_rl shares most of its runs with stage1
    study.main(study.parse([*papers, "--plan", "--jobs", "2"]))
    every = {}
    for name in papers:
        for run, spec in arms.specs_of(name).items():
            assert every.setdefault(run, spec) == spec  # a run that two studies speak of is the same in both
    total = runs.core_seconds(every)
    assert total / 2 < 6 * 3600
    assert runs.in_words(total / 2) in capsys.readouterr().out


# --- from end to end --------------------------------------------------------------------------------------------------


class Playwright:
    """Plays the scripts: writes what they would, with answers drawn by chance."""

    def __init__(self, bench):
        self.bench = bench
        self.random = np.random.default_rng(0)

    def run(self, words, key, seat):
        name, seed = key
        spec = self.bench.specs[name]
        folder = self.bench.folder(name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        if spec.script == "eval_passk.py":
            self.write_answers(folder, spec)
        elif spec.script == "lab/coverage.py":
            self.write_coverage(folder, spec)
        else:
            self.write_steps(folder, spec)
        (folder / spec.last).touch()
        return 0

    def write_answers(self, folder, spec):
        rows = []
        for data in spec.flags["dataset"].split(","):
            for number in range(int(data.partition(":")[2])):
                right = (self.random.random(spec.flags["num_samples"]) < 0.6).tolist()
                n = len(right)
                texts = [self.random.choice(["<think>Across a</think>", "<think>Down b</think>"]) for _ in right]
                several = list(VERIFIERS) if data.startswith(arms.MIXED) else ["digit"]
                rows.append(dict(
                    id=f"p{number}", dataset=data, verifier=several[number % len(several)], right=right,
                    answers=[str(one) for one in right], greedy_right=True,
                    format=[1] * n, entropy=[1.0] * n, tokens=[4] * n, truncated=[0] * n, texts=texts))
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write_coverage(self, folder, spec):
        wrong = self.random.integers(0, 5, 16)
        selections = {}
        for text in spec.flags["select"].split(","):
            credited = self.random.integers(0, wrong + 1).tolist()
            selections[text] = dict(coverage=[0.5, 0.4, 0.6], kept=0.2, credited=credited)
        (folder / "coverage.json").write_text(json.dumps(dict(wrong=wrong.tolist(), selections=selections)))

    def write_steps(self, folder, spec):
        (folder / "args.json").write_text(json.dumps(dict(script=spec.script)))
        rows = []
        for step in range(1, 11):
            falling = float(np.exp(-step / 3) + 0.1 * self.random.random())
            rows.append(dict(step=step, tokens=100, entropy=falling, diversity=falling, accuracy=0.5,
                             missed_by_entropy=0.5, coverage=0.5))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        traces = folder.with_name(f"traces-{folder.name[-1]}.jsonl")
        traces.write_text(json.dumps(dict(id="p", text="a", right=True)) + "\n")


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A function that does whole studies with played runs, in a folder of its own; returns that of the results."""
    monkeypatch.setattr(study, "build", lambda name: None)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "code_hash", lambda: "c0de")
    monkeypatch.setattr(runs.Bench, "run", lambda bench, *given: Playwright(bench).run(*given))

    def play(*argv):
        study.main(study.parse([*argv, "--quick", "--seeds", "2", "--output", str(tmp_path / "results")]))
        return tmp_path / "results"

    return play


@pytest.mark.parametrize("name", arms.STUDIES)
def test_a_study_from_end_to_end(played, name, capsys):
    """Its verdicts follow from the table it writes; every row has what a reader needs to check it; pictures exist."""
    place = played(name)
    rows = json.loads((place / "claims.json").read_text())
    assert {row["id"] for row in rows} == {claim.id for claim in claims.CLAIMS[name]}
    table = json.loads((place / f"{name}-problems.json").read_text())
    again = claims.rows_of(name, table)
    ours = [row for row in rows if "source" not in row]
    assert [{key: row[key] for key in new} for row, new in zip(ours, again, strict=True)] == again
    assert all(row["commands"] and row["code"] == ["c0de"] for row in ours)
    assert str(place.parent) not in (place / "claims.json").read_text() + (place / f"{name}.json").read_text()
    assert (place / f"{name}.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert all(f"{row['id']}  {row['verdict'].upper()} in {row['world']}" in said for row in again)
    assert set(json.loads((place / f"{name}.json").read_text())["measures"]) == set(table["answers"])


def test_styles_of_answers_are_counted(played, tmp_path):
    """Against a count by hand: shares sum to 1, and the share of right answers is that of the whole."""
    found = json.loads((played("ways") / "ways.json").read_text())["styles"]
    for world, every in found.items():
        for arm, styles in every.items():
            rows = []
            for path in tmp_path.glob(f"runs/study-quick/{world}/eval-{arm}-[12]/samples.jsonl"):
                rows += [json.loads(line) for line in path.read_text().splitlines()]
            texts = [text for row in rows for text in row["texts"]]
            assert set(styles) == {"rows", "columns"}
            assert styles["rows"][0] == pytest.approx(np.mean(["Across" in text for text in texts]), abs=1e-4)
            right = np.mean([right for row in rows for right in row["right"]])
            assert sum(share * good for share, good in styles.values()) == pytest.approx(right, abs=1e-3)


def test_two_studies_share_one_file_of_claims(tmp_path):
    """A study that is done again takes the place of its own rows, and leaves those of the others."""
    path = tmp_path / "claims.json"
    for name, run in (("ways", 1), ("stage1", 1), ("ways", 2)):
        study.write_claims(path, name, [dict(id=claim.id, run=run) for claim in claims.CLAIMS[name]])
    rows = [(row["id"], row["run"]) for row in json.loads(path.read_text())]
    assert sorted(rows) == sorted(
        (claim.id, run) for name, run in (("ways", 2), ("stage1", 1)) for claim in claims.CLAIMS[name])


def test_every_arm_of_a_picture_has_a_name_and_a_colour():
    for name, shown in panels.SHOWN.items():
        assert set(shown) - {"base"} <= set(panels.COLOURS)
        assert set(shown) <= set(panels.NAMES)
        assert {run.partition("/")[0] for run in arms.specs_of(name)} <= set(panels.WORLDS)


def test_bad_flags_are_one_line(capsys):
    for argv in (["nothing"], [], ["doubt", "--seeds", "0"], ["doubt", "--jobs", "x"]):
        with pytest.raises(SystemExit) as stop:
            study.parse(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable to root")
def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        study.main(study.parse(["doubt", "--output", str(tmp_path / "results")]))

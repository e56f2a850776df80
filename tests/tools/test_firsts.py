"""lab/firsts.py: every script is run with its own settings, and the table says what was measured."""

import json

import grpo
from harness.flags import UserError
from lab import firsts, runs

import pytest


def test_every_script_with_nothing_but_its_own_number_of_steps():
    specs = firsts.specs_of(3)
    assert {spec.script for spec in specs.values()} == {
        str(path.relative_to(runs.ROOT)) for path in (*runs.ROOT.glob("*.py"), *runs.ROOT.glob("forks/*.py"))
    } - {"common.py", "eval_passk.py"}
    assert specs["grpo"].flags == dict(max_steps=grpo.TOY["max_steps"])
    assert all(spec.seeds == (1, 2, 3) for spec in specs.values())


@pytest.fixture
def done(tmp_path):
    """A bench whose runs are done: each begins at .5, and ends at .8 and a hundredth for its seed."""
    bench = runs.Bench(tmp_path, firsts.specs_of(2), 2)
    for name, spec in bench.specs.items():
        for seed in spec.seeds:
            folder = bench.folder(name, seed)
            folder.mkdir()
            rows = [dict(step=0, eval_accuracy=0.5, eval_low=0.4, eval_high=0.6)]
            rows += [dict(step=step, accuracy=step / 10, entropy=1 / step) for step in (1, 2, 3)]
            rows[-1] |= dict(eval_accuracy=0.8 + seed / 100, eval_low=0.7, eval_high=0.9)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / "job.json").write_text(json.dumps(dict(script=spec.script, flags={}, code="c0de")))
    return bench


def test_the_table_says_what_was_measured_before_and_after(done):
    rows = [firsts.row_of(done, "vepo", seed) for seed in (1, 2)]
    assert [row["after"][0] for row in rows] == pytest.approx([0.81, 0.82])
    assert all(row["before"] == [0.5, 0.4, 0.6] and row["steps"] == 3 for row in rows)
    assert "| `python vepo.py --seed 2` | 0.500 [0.400, 0.600] | 0.820 [0.700, 0.900] |" in firsts.show(rows)


def test_the_picture_holds_every_script_with_a_reward(done, tmp_path):
    assert {firsts.Path(script).name for script in firsts.REINFORCED} == set(firsts.COLOURS)
    assert firsts.draw(done, tmp_path / "firsts.png").exists()


SCRIPT = """
import json, os, sys
flags = dict(arg[2:].split("=", 1) for arg in sys.argv[1:])
if flags["seed"] == "3":
    sys.exit(2)
os.makedirs(flags["output_dir"])
rows = [dict(step=0, eval_accuracy=0.5, eval_low=0.4, eval_high=0.6)]
rows += [dict(step=1, seconds=2.0), dict(step=2, seconds=3.0, eval_accuracy=0.9, eval_low=0.8, eval_high=1.0)]
with open(flags["output_dir"] + "/metrics.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\\n" for row in rows)
with open("calls", "a") as file:
    file.write(flags["seed"])
"""


def test_one_run_at_a_time_tells_its_seconds(tmp_path, monkeypatch):
    """It is started by `accelerate launch`, and once."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "fake.py").write_text(SCRIPT)
    row = firsts.alone("fake.py", 1, tmp_path / "fake-1")
    assert (row["script"], row["seed"], row["steps"]) == ("fake.py", 1, 2)
    assert (row["before"][0], row["after"][0], row["seconds"]) == (0.5, 0.9, 5.0)
    assert row["whole"] > 0
    assert firsts.alone("fake.py", 1, tmp_path / "fake-1") == row
    assert (tmp_path / "calls").read_text() == "1"
    with pytest.raises(UserError, match="fake.py --seed 3 ended with status"):
        firsts.alone("fake.py", 3, tmp_path / "fake-3")

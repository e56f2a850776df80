"""lab/firsts.py: every script is run with its own settings, and the table says what was measured."""

import json

import grpo
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
def learned(tmp_path):
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


def test_the_table_says_what_was_measured_before_and_after(learned):
    rows = [firsts.row_of(learned, "vepo", seed) for seed in (1, 2)]
    assert [row["after"][0] for row in rows] == pytest.approx([0.81, 0.82])
    assert all(row["before"] == [0.5, 0.4, 0.6] and row["steps"] == 3 for row in rows)
    assert "| `python vepo.py --seed 2` | 0.500 [0.400, 0.600] | 0.820 [0.700, 0.900] |" in firsts.show(rows)


def test_the_picture_holds_every_script_with_a_reward(learned, tmp_path):
    assert {firsts.Path(script).name for script in firsts.REINFORCED} == set(firsts.COLOURS)
    assert firsts.draw(learned, tmp_path / "firsts.png").exists()

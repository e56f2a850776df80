"""Every script on two and on four processes, on one node and on two, against one process; and begun by some, ended by
others.

Each start of several processes takes seconds, so these tests are slow. test_nodes.py looks closer at grpo.py.
"""

from pathlib import Path

from tabletop import models

import pytest
from conftest import run_script
from whole_runs import SMALL, drive, metrics

pytestmark = pytest.mark.slow

LIMIT = 600  # seconds, of a watchdog
FLAGS = ("--eval_dataset", "none", "--lr_scheduler_type", "constant", "--max_completion_length", 8, "--save_steps", 1)
OF_SCRIPT = {
    "sft": ("--held_out_traces", 4, "--loss_steps", 1),
    "opd": ("--teacher", "TEACHER"),
    "grpo": ("--updates_per_step", 2),
    "vepo": ("--updates_per_step", 2),
    "mupo": ("--updates_per_step", 2, "--num_generations", 4, "--clusters", 2, "--min_cluster", 1,
             "--embedder", "ngrams"),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Another untrained model, wider than the student."""
    place = tmp_path_factory.mktemp("model") / "teacher"
    models.untrained(str(place), models.RECIPES["toy-teacher"], seed=2)
    return str(place)


@pytest.fixture(scope="module", params=list(OF_SCRIPT))
def script(request):
    return request.param


@pytest.fixture(scope="module")
def flags(script, teacher):
    """The script's flags, the teacher's folder among them."""
    return (*FLAGS, *(teacher if flag == "TEACHER" else flag for flag in OF_SCRIPT[script]))


@pytest.fixture(scope="module")
def alone(script, folder, flags, tmp_path_factory):
    """The run of one process."""
    return drive(folder, tmp_path_factory.mktemp("alone") / "run", *flags, script=script)


def start(script, folder, place, *flags, **settings):
    """A run of several processes."""
    groups = () if script == "sft" else ("--num_generations", 3)
    command = (script, "--model", folder, "--output_dir", place, *SMALL, *groups, *flags)
    return run_script("tests/drive.py", *command, timeout=LIMIT, **settings)


def answers(place):
    """{file: the answers of a step}."""
    return {path.name: path.read_text() for path in Path(place).glob("answers-*.json")}


def assert_same_numbers(one, other):
    """The losses to 1e-5; the others too, but relatively where they are large."""
    assert len(metrics(one)) == 2
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-3)


@pytest.mark.parametrize("processes, nodes", [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_several_processes_give_the_run_of_one(folder, tmp_path, script, flags, alone, processes, nodes):
    done = start(script, folder, tmp_path / "run", *flags, processes=processes, NODES=str(nodes))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(answers(alone)) == 2
    assert answers(tmp_path / "run") == answers(alone)
    assert_same_numbers(alone, tmp_path / "run")


@pytest.mark.parametrize("began, ends", [((2, 1), (4, 2)), ((4, 2), (2, 1))], ids=["2 to 4", "4 to 2"])
def test_a_run_goes_on_with_another_number_of_processes(folder, tmp_path, script, flags, alone, began, ends):
    """Killed after the line of its second step: a checkpoint of the first is all there is."""
    place = tmp_path / "run"
    killed = start(script, folder, place, *flags, processes=began[0], NODES=str(began[1]), KILL_AT="2")
    assert killed.returncode != 0
    assert (place / "checkpoint-1").exists()
    done = start(script, folder, place, *flags, "--resume", processes=ends[0], NODES=str(ends[1]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_numbers(alone, place)

"""A full disk and a torn checkpoint: one line, nothing half-written, and what was there before stands."""

import argparse
import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess

import common
import harness.disk
import harness.run
import harness.sharding
from harness.disk import append_whole, as_size, room_for, write_atomically, written_beside
from harness.flags import UserError
from harness.run import Run
from lab import pictures, report

import pytest
import torch
from drive import Watch
from safetensors.torch import save_file
from whole_runs import drive, metrics, refusal

FOUR_STEPS = (
    "--max_steps", 4, "--save_steps", 2, "--updates_per_step", 1, "--eval_dataset", "none", "--num_generations", 2,
    "--prompts_per_step", 4, "--max_completion_length", 8)


@contextlib.contextmanager
def files_up_to(size):
    """No file of this process may grow beyond `size` bytes: a disk that is full there, for any user."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 12 MB, where mounting one is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def refuse(call, *given, said):
    """The call must raise a UserError of one line that says this."""
    with pytest.raises(UserError) as caught:
        call(*given)
    assert "\n" not in str(caught.value)
    for words in said:
        assert words in str(caught.value)


# --- small files ------------------------------------------------------------------------------------------------------


def test_trap_full_disk(tmp_path):
    """Lines are added whole or not at all, a file is replaced whole or not at all."""
    path = tmp_path / "metrics.jsonl"
    append_whole(path, '{"step": 1}\n')
    with files_up_to(20):
        refuse(append_whole, path, '{"step": 2}\n', said=["metrics.jsonl", "File too large", "make room", "--resume"])
        refuse(write_atomically, path, "a" * 30, said=["metrics.jsonl", "it needs 30 bytes"])
    assert path.read_text() == '{"step": 1}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    append_whole(path, '{"step": 2}\n')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_other_errors_keep_their_own_words(tmp_path):
    """A disk that fails says how; what has nothing to do with a disk is not blamed on it."""
    def fail(error):
        with room_for("the model", tmp_path, 5):
            raise error
    refuse(fail, OSError(errno.EIO, os.strerror(errno.EIO)), said=["the model cannot be written", "Input/output error"])
    with pytest.raises(ValueError, match="no disk"):
        fail(ValueError("no disk"))


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.disk, "free_bytes", lambda folder: 3_200_000_000)
    said = [f"checkpoint-4 needs 94.1 GB in {tmp_path}, and 3.2 GB are free"]

    def write():
        with room_for("checkpoint-4", tmp_path, 94_100_000_000):
            raise AssertionError("something was written")

    refuse(write, said=said)
    assert [as_size(size) for size in (5, 5_000, 5_400_000)] == ["5 bytes", "5.0 kB", "5.4 MB"]


def save_two(folder):
    with written_beside("the model", folder, needed=100) as beside:
        beside.mkdir()
        (beside / "config.json").write_text("{}")
        save_file({"weight": torch.zeros(2000)}, beside / "model.safetensors")


def test_a_model_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """The file by which others know a model comes last, and a full disk leaves nothing of it."""
    with files_up_to(3000):
        refuse(save_two, tmp_path, said=["the model cannot be written", "File too large"])
    assert list(tmp_path.iterdir()) == []
    order = []
    plain = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: order.append(target.name) or plain(source, target))
    save_two(tmp_path)
    assert order == ["model.safetensors", "config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that had room."""
    return drive(folder, tmp_path_factory.mktemp("whole") / "run", *FOUR_STEPS)


def error_of(capsys, folder, place, page=False):
    """The one line with which a run on a full disk ends, with status 2."""
    with pytest.raises(SystemExit) as caught:
        drive(folder, place, *FOUR_STEPS, page=page)
    assert caught.value.code == 2
    line, = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "make room, then give the same command with --resume" in line
    return line


def assert_goes_on(folder, place, whole, step):
    """Nothing but the checkpoint of `step` stands there, and with room it becomes the run that had some."""
    assert [path.name for path in place.glob("*checkpoint*")] == [f"checkpoint-{step}"]
    assert not list(place.glob("*.tmp"))
    assert not (place / "config.json").exists()
    assert not (place / "model.safetensors").exists()
    drive(folder, place, *FOUR_STEPS, "--resume")
    assert metrics(place) == metrics(whole)
    assert (place / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("what, module, name, number, stands", [
    ("checkpoint-4", harness.run.dcp, "save", 2, 2),
    ("the model", common, "save_policy", 1, 4),
])
def test_a_disk_that_fills_up(folder, tmp_path, monkeypatch, capsys, whole, what, module, name, number, stands):
    """While the second checkpoint is written, or the model: the checkpoint before stands."""
    plain = vars(module)[name]
    calls = []

    def on_a_full_disk(*args, **kwargs):
        calls.append(name)
        with files_up_to(2_000_000) if len(calls) == number else contextlib.nullcontext():
            return plain(*args, **kwargs)

    place = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(module, name, on_a_full_disk)
        line = error_of(capsys, folder, place)
    assert f"{what} cannot be written to {place}: " in line
    assert "the disk took only a part of it; it needs 9." in line or "File too large; it needs 3." in line
    assert_goes_on(folder, place, whole, stands)


def test_a_page_that_does_not_fit(folder, tmp_path, monkeypatch, capsys, whole):
    """The model is there, and so is the checkpoint: the page can be drawn later."""
    place = tmp_path / "run"

    def finish(output_dir, shown):
        with files_up_to(10_000):
            return pictures.write(f"{output_dir}/report.html", b"page" * 5_000)

    with monkeypatch.context() as patch:
        patch.setattr(report, "finish", finish)
        line = error_of(capsys, folder, place, page=True)
    assert f"the page cannot be written to {place}: File too large; it needs 1.0 MB" in line
    assert (place / "checkpoint-4").exists()
    assert not list(place.glob(".*"))
    drive(folder, place, *FOUR_STEPS, "--resume")
    assert (place / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not list(place.glob("*checkpoint*"))


def test_a_small_disk(folder, small_disk, monkeypatch, capsys, whole):
    """A real one: refused at the start; else, where nobody knew, when the second checkpoint does not fit."""
    place = small_disk / "run"
    line = refusal(capsys, folder, place, *FOUR_STEPS)
    assert "the run with its checkpoints (up to 2 at a time) needs 18.7 MB" in line
    assert "12.6 MB are free" in line
    monkeypatch.setattr(harness.disk, "free_bytes", lambda folder: 10**9)
    monkeypatch.setattr(harness.run, "free_bytes", lambda folder: 10**9)
    # Without the gradients that tests keep, which take room too.
    monkeypatch.setattr(Watch, "clip_gradients", lambda self, *given: harness.sharding.clip_gradients(*given))
    line = error_of(capsys, folder, place)
    assert f"checkpoint-4 cannot be written to {place}: " in line
    assert "it needs 9.4 MB" in line
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    assert_goes_on(folder, place, whole, 2)


# --- a torn checkpoint ------------------------------------------------------------------------------------------------


def run_of(place, step=None, weight=None, **flags):
    """A run of one small layer: with a step, saved there with weights that are all `weight`; without, resumed."""
    settings = dict(output_dir=str(place), resume=step is None, report_to="none", seed=1, max_steps=6, save_steps=1,
                    script="grpo", model="none")
    run = Run(argparse.Namespace(**settings | flags))
    layer = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    run.start(layer, optimizer)
    if step is not None:
        torch.nn.init.constant_(layer.weight, weight)
        run.remove_checkpoints = lambda steps: None
        next(run.steps())
        run.log(step, dict(loss=step))
        run.save_checkpoint(step)
    run.listen_no_more()
    return run, layer


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE = {
    "a truncated file": lambda folder: cut(folder / "__0_0.distcp"),
    "a missing file": lambda folder: (folder / "__0_0.distcp").unlink(),
    "no list of what is where": lambda folder: (folder / ".metadata").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "half a state": lambda folder: cut(folder / "state.json"),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_trap_torn_checkpoint(tmp_path, capsys, damage):
    """The one before is used, and the torn one gives way to a whole one; where there is none before, it is one line."""
    place = tmp_path / "run"
    run_of(place, step=2, weight=2)
    (place / "metrics.jsonl").rename(tmp_path / "kept")
    run_of(place, step=4, weight=4)
    (place / "metrics.jsonl").write_text((tmp_path / "kept").read_text() + (place / "metrics.jsonl").read_text())
    DAMAGE[damage](place / "checkpoint-4")
    run, layer = run_of(place)
    assert run.done == 2
    assert layer.weight.eq(2).all()
    assert [row["step"] for row in metrics(place)] == [2]
    said = capsys.readouterr().err
    assert "checkpoint-4 is torn: " in said
    assert "going on from step 2" in said
    run.save_checkpoint(4)
    assert [path.name for path in place.glob("*checkpoint*")] == ["checkpoint-4"]
    assert run_of(place)[0].done == 4

    DAMAGE[damage](place / "checkpoint-4")
    refuse(run_of, place, said=["checkpoint-4 is torn: ", "no other checkpoint is whole"])


def test_a_checkpoint_with_a_weight_that_is_no_number_is_one_line(tmp_path):
    place = tmp_path / "run"
    run_of(place, step=3, weight=float("nan"))
    refuse(run_of, place, said=[f"checkpoint-3 in {place} has weights that are not finite, weight for one"])


def test_a_checkpoint_that_cannot_be_read_is_one_line(tmp_path):
    """Its files have their sizes, but not their contents."""
    place = tmp_path / "run"
    run_of(place, step=3, weight=3)
    data = place / "checkpoint-3" / "__0_0.distcp"
    data.write_bytes(b"x" * data.stat().st_size)
    refuse(run_of, place, said=["checkpoint-3 cannot be read ("])


@pytest.mark.parametrize("line", ["no json", '{"loss": 1.0}', "7"])
def test_a_log_that_somebody_wrote_into_is_one_line(tmp_path, line):
    place = tmp_path / "run"
    run_of(place, step=3, weight=3)
    before = (place / "metrics.jsonl").read_text()
    (place / "metrics.jsonl").write_text(f"{line}\n{before}")
    refuse(run_of, place, said=["metrics.jsonl holds a line that is no row of a step"])
    assert (place / "metrics.jsonl").read_text() == f"{line}\n{before}"


def test_a_checkpoint_vanishes_at_once(tmp_path, monkeypatch):
    """A kill while its files are removed must not leave a part of them under its name."""
    place = tmp_path / "run"
    run, _ = run_of(place, step=2, weight=2)
    seen = []
    plain = shutil.rmtree

    def remove(*given, **named):
        seen.append(run.checkpoints())
        plain(*given, **named)

    monkeypatch.setattr(shutil, "rmtree", remove)
    Run.remove_checkpoints(run, [2])
    assert seen[-1] == []
    assert not list(place.glob("*checkpoint*"))


def test_what_a_kill_leaves_is_cleared_away(tmp_path):
    """A folder that was being written or removed counts for nothing, and goes."""
    place = tmp_path / "run"
    run_of(place, step=2, weight=2)
    shutil.copytree(place / "checkpoint-2", place / "checkpoint.tmp")
    run, _ = run_of(place)
    assert run.done == 2
    assert [path.name for path in place.glob("*checkpoint*")] == ["checkpoint-2"]
    assert json.loads((place / "checkpoint-2" / "state.json").read_text())[0] == 2

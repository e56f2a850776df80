"""SIGTERM and SIGUSR1: a run ends after its step with a checkpoint, and goes on to the same numbers."""

import os
import signal
import subprocess
import sys

import common
import harness.run

import pytest
from conftest import ROOT
from drive import go
from whole_runs import SMALL, drive, metrics

THREE_STEPS = (
    "--max_steps", 3, "--save_steps", 2, "--updates_per_step", 1, "--eval_steps", 2, "--num_generations", 2,
    "--prompts_per_step", 4, "--max_completion_length", 8)


class EndedAsUsual(BaseException):
    """What a signal does where no run listens: it plays the end of the process."""


def end_as_usual(number, frame):
    raise EndedAsUsual


@pytest.fixture(autouse=True)
def usual_end():
    for number in harness.run.SIGNALS:
        signal.signal(number, end_as_usual)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nobody asked to end."""
    return drive(folder, tmp_path_factory.mktemp("whole") / "run", *THREE_STEPS)


def signal_at_call(monkeypatch, module, name, *, number, times=1, which=signal.SIGTERM):
    """Has a signal come during the `number`-th call of a function (from 1), `times` times."""
    plain = vars(module)[name]
    calls = []

    def signalled(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            for _ in range(times):
                signal.raise_signal(which)
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, name, signalled)


def assert_goes_on(folder, place, whole, step):
    """The run ended after `step` and does not look finished; with --resume it becomes the run nobody asked to end."""
    assert [path.name for path in place.glob("checkpoint*")] == [f"checkpoint-{step}"]
    assert len(metrics(place)) == step + 1
    assert not (place / "config.json").exists()
    assert not (place / "model.safetensors").exists()
    drive(folder, place, *THREE_STEPS, "--resume")
    assert metrics(place) == metrics(whole)
    assert (place / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not list(place.glob("checkpoint*"))


# Calls of `sample`: the evaluation before training, step 1, step 2, its evaluation, step 3, its evaluation.
MOMENTS = {
    "the evaluation before training": (common, "sample", 1, 1),
    "sampling, by SIGUSR1": (common, "sample", 2, 1),
    "evaluation": (common, "sample", 4, 2),
    "the last step": (common, "sample", 6, 3),
    "saving": (harness.run.dcp, "save", 1, 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_takes_effect_at_the_end_of_its_step(folder, tmp_path, monkeypatch, capsys, whole, moment):
    module, name, number, step = MOMENTS[moment]
    which = signal.SIGUSR1 if "SIGUSR1" in moment else signal.SIGTERM
    with monkeypatch.context() as patch:
        signal_at_call(patch, module, name, number=number, which=which)
        place = drive(folder, tmp_path / "run", *THREE_STEPS)
    assert f"asked to end: checkpoint-{step} is saved" in capsys.readouterr().err
    for listened in harness.run.SIGNALS:
        assert signal.getsignal(listened) is end_as_usual
    assert_goes_on(folder, place, whole, step)


@pytest.mark.parametrize("module, name", [(common, "load_whole"), (common, "save_policy")])
def test_where_no_loop_runs_a_signal_ends_the_process(folder, tmp_path, monkeypatch, module, name):
    """While the model is loaded, or saved at the end: nobody would act upon a note of it."""
    signal_at_call(monkeypatch, module, name, number=1)
    with pytest.raises(EndedAsUsual):
        drive(folder, tmp_path / "run", *THREE_STEPS)
    assert not (tmp_path / "run" / "config.json").exists()
    assert (tmp_path / "run" / "checkpoint-3").exists() == (name == "save_policy")


def test_trap_swallowed_signal(folder, tmp_path, monkeypatch):
    """It comes when nobody asks any more whether one came: it ends the process as soon as the run stops listening."""
    plain = harness.run.Run.asked_to_end

    def asked_too_early(run):
        asked = plain(run)
        if run.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return asked

    monkeypatch.setattr(harness.run.Run, "asked_to_end", asked_too_early)
    with pytest.raises(EndedAsUsual):
        drive(folder, tmp_path / "run", *THREE_STEPS)
    assert (tmp_path / "run" / "checkpoint-3").exists()


def test_a_second_signal_ends_the_process_at_once(folder, tmp_path, monkeypatch):
    """But not the first one's copy: the scheduler signals every process, and the launcher hands its own on."""
    with monkeypatch.context() as patch:
        signal_at_call(patch, common, "sample", number=2, times=2)
        drive(folder, tmp_path / "copied", *THREE_STEPS)
    assert (tmp_path / "copied" / "checkpoint-1").exists()
    monkeypatch.setattr(harness.run, "SAME_REQUEST", -1.0)
    signal_at_call(monkeypatch, common, "sample", number=2, times=2)
    with pytest.raises(EndedAsUsual):
        drive(folder, tmp_path / "run", *THREE_STEPS)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("script", ["opd", "sft", "vepo", "mupo", "forks.dapo", "forks.gspo", "forks.dr_grpo"])
def test_every_script_ends_when_it_is_asked_to(folder, tmp_path, monkeypatch, script):
    first = "forced" if script == "sft" else "sample"
    signal_at_call(monkeypatch, common, first, number=1)
    flags = ["--eval_dataset", "none", "--max_completion_length", 8]
    if script == "opd":
        flags += ["--teacher", folder]
    if script == "mupo":
        flags += ["--clusters", 1]
    if script == "sft":
        flags += ["--held_out_traces", 8]
    place = drive(folder, tmp_path / "run", *flags, script=script)
    assert (place / "checkpoint-1").exists()
    assert len(metrics(place)) == 1
    assert not (place / "config.json").exists()


@pytest.mark.slow
def test_processes_leave_together(folder, tmp_path):
    """One of two processes is signalled, and its launcher, which ignores it: both save the checkpoint and exit 0."""
    place = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "tests/drive.py", "grpo",
               "--model", folder, *SMALL, *THREE_STEPS, "--eval_dataset", "none", "--output_dir", place]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "TERM_AT": "1", "SIGNAL": "USR1"}

    def ignore():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, timeout=120, capture_output=True,
                          text=True, preexec_fn=ignore)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("asked to end: checkpoint-1 is saved") == 1
    assert [path.name for path in place.glob("checkpoint*")] == ["checkpoint-1"]
    assert not (place / "config.json").exists()
    go("grpo", "--model", folder, *SMALL, *THREE_STEPS, "--eval_dataset", "none", "--output_dir", place, "--resume")
    assert [line["step"] for line in metrics(place)] == [1, 2, 3]

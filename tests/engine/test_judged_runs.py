"""Whole runs with a reward model: on two processes, killed and resumed. The same rewards, the same numbers."""

import json
from pathlib import Path

from harness.run import Run

import pytest
from conftest import run_script
from drive import go, measure
from test_reward_model import make
from whole_runs import SMALL, drive, metrics

# Counts and descriptions, half of each: a process may have no description in an update.
FLAGS = (
    "--dataset", "toy-mixed@train:40", "--eval_dataset", "toy-mixed@test:10", "--verifiers", "digit,open_ended",
    "--max_steps", 3, "--save_steps", 1, "--updates_per_step", 2, "--max_completion_length", 8,
    "--lr_scheduler_type", "constant")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A run's flags, with a reward model that sees pictures."""
    return (*FLAGS, "--reward_model", make(tmp_path_factory.mktemp("judge"), "qwen2_5_vl"))


@pytest.fixture(autouse=True)
def judged(monkeypatch):
    monkeypatch.setenv("JUDGED", "1")


@pytest.fixture(scope="module")
def whole(folder, flags, tmp_path_factory):
    """A run of one process that was never killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUDGED", "1")
        return drive(folder, tmp_path_factory.mktemp("whole") / "run", *flags)


def grades(place):
    """[(step, problem, text)] and [reward] of all answers of a run."""
    answers = []
    rewards = []
    for path in sorted(Path(place).glob("grades-*.json")):
        for problem, text, reward in json.loads(path.read_text()):
            answers.append((path.name, problem, text))
            rewards.append(reward)
    return answers, rewards


def test_the_rewards_come_from_the_reward_model(whole):
    """What the tests below compare: most descriptions earn something between 0 and 1, each something else."""
    _, rewards = grades(whole)
    judged = {reward for reward in rewards if 0 < reward < 1}
    assert len(rewards) == 3 * 8 * 3
    assert len(judged) >= 10
    assert all(line["grad_norm"] > 0 for line in metrics(whole)[1:])


@pytest.mark.parametrize("script, own", [("mupo", ("--clusters", 1)), ("vepo", ())])
def test_every_script_scores_with_the_reward_model(folder, tmp_path, flags, script, own):
    """mupo.py also asks which answers are right; a description is by the reward model's word alone."""
    place = drive(folder, tmp_path / "run", *flags, "--max_steps", 1, *own, script=script)
    _, rewards = grades(place)
    assert any(0 < reward < 1 for reward in rewards)
    assert metrics(place)[-1]["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_give_the_rewards_of_one(folder, tmp_path, flags, whole, processes):
    """Each process scores its own answers, in other batches."""
    drive(folder, tmp_path / "run", *flags, processes=processes)
    answers, rewards = grades(whole)
    their_answers, their_rewards = grades(tmp_path / "run")
    assert their_answers == answers
    assert their_rewards == pytest.approx(rewards, abs=1e-5)
    for ours, theirs in zip(metrics(whole), metrics(tmp_path / "run"), strict=True):
        assert theirs == pytest.approx(ours, abs=1e-5, rel=1e-3)
        assert theirs.get("loss") == pytest.approx(ours.get("loss"), abs=1e-5)


@pytest.mark.parametrize("moment", [
    pytest.param("1", marks=pytest.mark.slow), "2", pytest.param("checkpoint", marks=pytest.mark.slow),
])
def test_killed_and_resumed_to_the_same_rewards(folder, tmp_path, flags, whole, moment):
    """Bitwise: the resumed run has scored other references before than the one that was never killed."""
    killed = tmp_path / "killed"
    command = ("--model", folder, *SMALL, "--num_generations", 3, *flags, "--output_dir", killed)
    assert run_script("tests/drive.py", "grpo", *command, KILL_AT=moment).returncode == -9
    go("grpo", *command, "--resume")
    assert metrics(killed) == metrics(whole)
    assert grades(killed) == grades(whole)
    for name in ("samples.jsonl", "model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_a_reward_model_that_has_nothing_to_score_is_said_to(folder, flags, tmp_path, capsys):
    drive(folder, tmp_path / "run", *flags, "--eval_dataset", "none", "--verifiers", "digit", "--max_steps", 1)
    assert f"--reward_model {flags[-1]} scores nothing here: no problem is open_ended" in capsys.readouterr().err


class Interrupted(Exception):
    """Ctrl-C, or a kill."""


def test_an_interrupted_evaluation_with_a_reward_model_goes_on(folder, flags, tmp_path, monkeypatch):
    """What was scored is not asked for again, and the table is that of an unbroken evaluation."""
    asked = ("--model", folder, "--dataset", "toy-mixed@test:30", "--verifiers", "digit,open_ended", "--num_samples", 1,
             "--ks", "1", "--max_completion_length", 4, "--sample_batch_size", 4, *flags[-2:])
    monkeypatch.setattr("common.final_answer", lambda text: text.strip() or None)
    monkeypatch.setattr("harness.reward_model.final_answer", lambda text: text.strip() or None)
    measure(*asked, "--output_dir", tmp_path / "whole")
    append = Run.append
    written = []

    def interrupt(run, path, rows):
        if len(written) == 1:
            raise Interrupted
        written.append(len(rows))
        append(run, path, rows)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Run, "append", interrupt)
        measure(*asked, "--output_dir", tmp_path / "broken")
    before = (tmp_path / "broken/samples.jsonl").read_bytes()
    assert before.count(b"\n") == 4
    measure(*asked, "--output_dir", tmp_path / "broken")
    whole = (tmp_path / "whole/samples.jsonl").read_bytes()
    assert whole.startswith(before)
    assert (tmp_path / "broken/samples.jsonl").read_bytes() == whole
    assert (tmp_path / "broken/eval.json").read_bytes() == (tmp_path / "whole/eval.json").read_bytes()
    judged = [row for row in map(json.loads, whole.splitlines()) if row["verifier"] == "open_ended"]
    assert {right for row in judged for right in row["right"]} == {True, False}

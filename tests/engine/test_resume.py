"""harness.run: a run that was killed goes on to the same numbers, and a folder holds one run."""

import argparse
import json

from harness.flags import UserError
from harness.run import Run, learning_rate, write_atomically

import pytest
from conftest import run_script
from drive import go
from whole_runs import SMALL, drive, metrics

# --- killed and resumed -----------------------------------------------------------------------------------------------

FOUR_STEPS = (
    "--max_steps", 4, "--save_steps", 2, "--updates_per_step", 1, "--eval_steps", 2, "--prompts_per_step", 4,
    "--max_completion_length", 12)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that was never killed."""
    return drive(folder, tmp_path_factory.mktemp("whole") / "run", *FOUR_STEPS)


@pytest.mark.parametrize("moment", [
    pytest.param("1", marks=pytest.mark.slow), pytest.param("3", marks=pytest.mark.slow), "checkpoint",
])
def test_killed_and_resumed_to_the_same_numbers(folder, tmp_path, whole, moment):
    """SIGKILL before the first checkpoint, after one, or while one is written; then --resume: bitwise the same."""
    killed = tmp_path / "killed"
    command = ("--model", folder, *SMALL, "--num_generations", 3, *FOUR_STEPS, "--output_dir", killed)
    assert run_script("tests/drive.py", "grpo", *command, KILL_AT=moment).returncode == -9
    assert not (killed / "model.safetensors").exists()
    (killed / "metrics.jsonl.123.tmp").write_text('{"step')  # as a kill leaves it that comes while a file is written
    go("grpo", *command, "--resume")
    assert metrics(killed) == metrics(whole)
    for name in ("samples.jsonl", "model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not [*killed.glob("checkpoint*"), *killed.glob("*.tmp")]


def test_a_finished_run_is_not_resumed(folder, capsys, whole):
    with pytest.raises(SystemExit):
        drive(folder, whole, *FOUR_STEPS, "--resume")
    assert "is finished; name another --output_dir" in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_not_resumed_with_other_flags(capsys, tmp_path, folder):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "args.json").write_text(json.dumps(dict(learning_rate=0.5)))
    flags = (
        "--model", folder, "--output_dir", tmp_path, "--dataset", "toy@train:4", "--prompts_per_step", 2,
        "--updates_per_step", 1)
    with pytest.raises(SystemExit):
        go("grpo", *flags)
    assert "already holds a run: go on with --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        go("grpo", *flags, "--resume", "--eval_dataset", "none")
    assert "this run began with --" in capsys.readouterr().err


# --- the steps of a run -----------------------------------------------------------------------------------------------


def run_of(place, **changes):
    """A run whose flags are these, without a model."""
    flags = dict(output_dir=str(place), resume=False, report_to="none", seed=1, max_steps=6, prompts_per_step=4,
                 updates_per_step=2)
    return Run(argparse.Namespace(**flags | changes))


def test_batches_take_every_problem_once_in_an_epoch(tmp_path):
    """Ten problems, four to a step: two steps to an epoch, whose order is another in the next; two are left over."""
    run = run_of(tmp_path / "run")
    steps = [run.batch(list(range(10)), step) for step in (1, 2, 3, 4)]
    first_epoch = steps[0] + steps[1]
    second_epoch = steps[2] + steps[3]
    assert len(set(first_epoch)) == 8
    assert len(set(second_epoch)) == 8
    assert first_epoch != second_epoch
    assert run.batch(list(range(10)), 1) == steps[0]  # a function of seed and step alone
    assert run_of(tmp_path / "other", seed=2).batch(list(range(10)), 1) != steps[0]


def test_processes_share_a_batch_without_changing_its_updates(tmp_path):
    """Each update takes the same problems on one process and on two, only divided between them."""
    run = run_of(tmp_path / "run", prompts_per_step=8)
    alone = run.batch(list(range(30)), 2)
    run.world = 2
    shares = []
    for rank in (0, 1):
        run.rank = rank
        shares.append(run.batch(list(range(30)), 2))
    for update in (0, 1):
        together = [problem for share in shares for problem in share[2 * update:2 * update + 2]]
        assert sorted(together) == sorted(alone[4 * update:4 * update + 4])


def test_a_run_that_is_stopped_ends_and_what_is_due_at_the_end_is_due(tmp_path):
    run = run_of(tmp_path / "run")
    seen = []
    for step in run.steps():
        seen.append((step, run.due(2), run.due(0)))
        if step == 3:
            run.stop()
            assert run.due(2)
            assert run.due(0)
    assert seen == [(1, False, False), (2, True, False), (3, False, False)]
    assert list(run_of(tmp_path / "other", max_steps=2).steps()) == [1, 2]


def test_learning_rate_against_its_definition():
    """Linear from a first share of the peak, then constant, or half a cosine down to the floor."""
    args = argparse.Namespace(
        learning_rate=2.0, warmup_steps=4, lr_scheduler_type="constant", max_steps=14, min_learning_rate=0.5,
        warmup_ratio=0.0)
    assert [learning_rate(step, args) for step in (1, 2, 4, 5, 14)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    args.lr_scheduler_type = "cosine"
    assert [learning_rate(step, args) for step in (4, 9, 14)] == pytest.approx([2.0, 1.25, 0.5])
    args.warmup_steps = 0
    args.lr_scheduler_type = "constant"
    assert learning_rate(1, args) == 2.0
    args.warmup_ratio = 0.2  # of 14 steps: 2.8, so 3; it takes the place of the steps
    args.warmup_steps = 1
    assert [learning_rate(step, args) for step in (1, 2, 3, 4)] == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])
    args.lr_scheduler_type = "cosine"
    assert learning_rate(14, args) == 0.5


# --- answers that are kept --------------------------------------------------------------------------------------------

PROBLEMS = [dict(id=f"p{n}") for n in range(5)]


def answered(run, path, key, asked, each=1):
    """(id, number) of the rows that answer PROBLEMS; which problems were really asked for is added to `asked`."""

    def prepare(left):
        assert len(list(left)) > 0

        def answer(problems):
            asked.extend(problem["id"] for problem in problems)
            return [dict(id=problem["id"], number=n) for problem in problems for n in range(each)]

        return answer

    rows = run.answered(str(path), key, PROBLEMS, prepare, share=2, desc="answers", each=each)
    return [(row["id"], row["number"]) for row in rows]


def test_what_is_answered_is_not_asked_for_again(tmp_path):
    """Nothing twice under the same key, everything under another; a problem of another data set is left alone."""
    run = run_of(tmp_path / "run")
    path = tmp_path / "answers.jsonl"
    asked = []
    first = answered(run, path, dict(seed=1), asked)
    assert first == [("p0", 0), ("p1", 0), ("p2", 0), ("p3", 0), ("p4", 0)]
    assert asked == ["p0", "p1", "p2", "p3", "p4"]
    asked.clear()
    assert answered(run, path, dict(seed=1), asked) == first
    assert asked == []
    answered(run, path, dict(seed=2), asked)
    assert len(asked) == 5
    run.append(str(path), [dict(seed=1, id="another", number=0)])
    assert answered(run, path, dict(seed=1), asked) == first


def test_half_an_answer_is_asked_for_again(tmp_path):
    """A kill leaves half a line, or one of the two rows that belong to a problem: both are asked for anew."""
    run = run_of(tmp_path / "run")
    path = tmp_path / "answers.jsonl"
    asked = []
    whole = answered(run, path, {}, asked, each=2)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:9])
    asked.clear()
    again = answered(run, path, {}, asked, each=2)
    assert asked == ["p2", "p3", "p4"]
    assert sorted(again) == sorted(whole)


@pytest.mark.parametrize("text", ["not json\n", '["a list"]\n', '{"number": 1}\n'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="is no file of answers"):
        answered(run_of(tmp_path / "run"), path, {}, [])


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """What stands there stays until what replaces it is complete."""
    path = tmp_path / "table.json"
    write_atomically(path, "first")

    def full_disk(beside, text):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    with pytest.raises(UserError, match="table.json cannot be written .* no space left"):
        write_atomically(path, "second")
    monkeypatch.undo()
    assert path.read_text() == "first"
    write_atomically(path, "second")
    assert path.read_text() == "second"
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]

"""Bad input: one line that says what is wrong and what to do, exit status 2, nothing half-written."""

import json
import shutil

import pytest

from conftest import picture, run_script
from drive import go, measure

GOOD = dict(image="0.png", problem="What?", answer="5", verifier="digit")


@pytest.fixture
def data(tmp_path):
    """A function that writes rows as a jsonl beside its pictures, and returns its path."""
    picture(56, 56).save(tmp_path / "0.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")

    def write(*rows):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "data.jsonl"
    return write


def refused(capsys, place, *flags, script="grpo"):
    """The one line on stderr of a run that must end with status 2 before it has written anything."""
    with pytest.raises(SystemExit) as caught:
        go(script, "--output_dir", place, "--prompts_per_step", 2, "--num_generations", 2, "--updates_per_step", 1, *flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert caught.value.code == 2 and len(lines) == 1 and not place.exists()
    return lines[0]


@pytest.mark.parametrize("change, says", [
    ({"image": "nowhere.png"}, "nowhere.png"), ({"image": "broken.png"}, "cannot be opened"),
    ({"answer": "\\frac{1}{", "verifier": "math"}, "cannot be graded"), ({"answer": ""}, "cannot be graded"),
    ({"verifier": "guess"}, "guess"), ({"problem": ""}, "problem is empty"), ({"image": None}, "no picture"),
])
def test_bad_rows_name_the_row(capsys, tmp_path, folder, data, change, says):
    path = data(GOOD, GOOD | change)
    line = refused(capsys, tmp_path / "out", "--model", folder, "--dataset", path, "--eval_dataset", "none")
    assert says in line and "row 1" in line and str(path) in line


def test_bad_data_sets(capsys, tmp_path, folder, data):
    def line(path, *flags):
        return refused(capsys, tmp_path / "out", "--model", folder, "--dataset", path, "--eval_dataset", "none", *flags)
    assert "no column for answer" in line(data({"image": "0.png", "problem": "What?"}))
    assert "0 rows" in line(data()) or "cannot be loaded" in line(data())
    assert "has 1 problems" in line(data(GOOD))
    assert "has no split dev" in line("toy@dev") and "no such file" in line("some/where.jsonl")
    assert "--max_prompt_length 20" in line(data(GOOD, GOOD), "--max_prompt_length", 20)


def test_places_that_cannot_be_written(capsys, tmp_path, folder, data):
    """Known before the teacher samples; and nothing to measure is no table of nothing."""
    teach = "--model", folder, "--teacher", folder, "--dataset", "toy@train:4", "--eval_dataset", "none"
    with pytest.raises(SystemExit) as caught:
        go("sft", *teach, "--output_dir", tmp_path / "out", "--traces", data(GOOD) / "traces.jsonl")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and f"error: --traces {tmp_path}/data.jsonl: cannot write" in said
    assert not (tmp_path / "out").exists()
    for names in ("none", "toy@test:2,none"):
        with pytest.raises(SystemExit) as caught:
            measure("--model", folder, "--dataset", names, "--output_dir", tmp_path / "out")
        assert caught.value.code == 2 and f"error: --dataset {names}: there is nothing" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_bad_flags(capsys, tmp_path, folder):
    def line(*flags, script="grpo"):
        return refused(capsys, tmp_path / "out", *flags, script=script)
    assert "at least 2 answers" in line("--model", folder, "--num_generations", 1)
    assert "no folder or name of a model" in line("--model", "nobody/nothing", "--dataset", "toy@train:4", "--eval_dataset", "none")
    assert "must be a multiple of 3" in line("--model", folder, "--updates_per_step", 3)
    assert "must be at least 1" in line("--max_steps", -1)
    assert "unrecognized arguments: --learnrate" in line("--learnrate", 1)
    assert "invalid float" in line("--learning_rate", "fast")
    assert "--report_to nothing" in line("--report_to", "nothing")
    assert "must be above 0" in line("--temperature", 0)
    assert "cannot fill" in line("--num_generations", 5, script="mupo")
    assert "must be above 0" in line("--temperature", "nan") and "--keep" in line("--keep", 0, script="vepo")


def test_a_broken_model_folder(capsys, tmp_path, folder):
    """No weights, half of them (an interrupted download), a config that is no json."""
    flags = "--model", tmp_path / "model", "--dataset", "toy@train:4", "--eval_dataset", "none"
    shutil.copytree(folder, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "can be loaded" in refused(capsys, tmp_path / "out", *flags)
    weights.unlink()
    assert "can be loaded" in refused(capsys, tmp_path / "out", *flags)
    (tmp_path / "model/config.json").write_text("{")
    assert "can be loaded" in refused(capsys, tmp_path / "out", *flags)


def test_an_open_ended_problem_without_a_judge(capsys, tmp_path, folder, data):
    path = data(GOOD, GOOD | dict(verifier="open_ended", answer="a red car"))
    flags = "--model", folder, "--dataset", path, "--eval_dataset", "none"
    assert "graded by a judge" in refused(capsys, tmp_path / "out", *flags)


def test_a_model_of_another_kind(capsys, tmp_path, folder):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(dict(model_type="qwen2")))
    assert "only Qwen2.5-VL" in refused(capsys, tmp_path / "out", "--model", tmp_path / "other", "--dataset", "toy@train:4",
                              "--eval_dataset", "none")


def test_no_place_for_the_output(capsys, tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        go("grpo", "--model", folder, "--output_dir", tmp_path / "file" / "out")
    assert "cannot write to" in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_not_resumed_with_other_flags(capsys, tmp_path, folder):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "args.json").write_text(json.dumps(dict(learning_rate=0.5)))
    flags = "--model", folder, "--output_dir", tmp_path, "--prompts_per_step", 2, "--updates_per_step", 1, "--dataset", "toy@train:4"
    with pytest.raises(SystemExit):
        go("grpo", *flags)
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        go("grpo", *flags, "--resume", "--eval_dataset", "none")
    assert "this run began with --" in capsys.readouterr().err


def test_from_the_shell(tmp_path):
    """The status and the one line, as a shell sees them; no traceback."""
    done = run_script("grpo.py", "--model", "nobody/nothing", "--dataset", "toy@train:4", "--prompts_per_step", 2,
                      "--updates_per_step", 1, "--eval_dataset", "none", "--output_dir", tmp_path / "out")
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert [line for line in done.stderr.splitlines() if line.startswith("error: model nobody/nothing")]
    help_text = run_script("grpo.py", "--help")
    assert help_text.returncode == 0 and "arXiv 2402.03300" in help_text.stdout

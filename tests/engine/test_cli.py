"""Bad input: one line that says what is wrong and what to do, exit status 2, nothing half-written."""

import json
import shutil

import pytest
from conftest import picture, run_script
from drive import go, measure

GOOD = dict(image="0.png", problem="What?", answer="5", verifier="digit")
FEW = ("--prompts_per_step", 2, "--num_generations", 2, "--updates_per_step", 1)
TOY = ("--dataset", "toy@train:4", "--eval_dataset", "none")


@pytest.fixture
def data(tmp_path):
    """A function that writes rows as a jsonl beside its pictures, and returns its path."""
    picture(56, 56).save(tmp_path / "0.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")

    def write(*rows):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def refused(capsys, tmp_path):
    """A function that gives the one line on stderr of a run that ends with status 2 before it has written anything."""
    place = tmp_path / "out"

    def line(*flags, script="grpo"):
        with pytest.raises(SystemExit) as caught:
            if script == "eval_passk":
                measure("--output_dir", place, *flags)
            elif script == "sft":
                go(script, "--output_dir", place, *flags)
            else:
                go(script, "--output_dir", place, *FEW, *flags)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert caught.value.code == 2
        assert len(errors) == 1
        assert not place.exists()
        return errors[0]

    return line


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, says", [
    ({"image": "nowhere.png"}, "nowhere.png"),
    ({"image": "broken.png"}, "cannot be opened"),
    ({"image": None}, "no picture"),
    ({"problem": ""}, "problem is empty"),
    ({"answer": ""}, "cannot be graded"),
    ({"answer": "\\frac{1}{", "verifier": "math"}, "cannot be graded"),
    ({"verifier": "guess"}, "guess"),
])
def test_bad_rows_name_the_row(refused, folder, data, change, says):
    path = data(GOOD, GOOD | change)
    line = refused("--model", folder, "--dataset", path, "--eval_dataset", "none")
    assert says in line
    assert "row 1" in line
    assert str(path) in line


def test_bad_held_out_problems_are_met_before_training_too(refused, folder, data):
    path = data(GOOD, GOOD | {"answer": ""})
    assert "row 1" in refused("--model", folder, "--dataset", "toy@train:4", "--eval_dataset", path)


def test_bad_data_sets(refused, folder, data):
    def line(path, *flags):
        return refused("--model", folder, "--dataset", path, "--eval_dataset", "none", *flags)

    assert "no column for answer" in line(data({"image": "0.png", "problem": "What?"}))
    assert "cannot be loaded" in line(data())
    assert "has 1 problems" in line(data(GOOD))
    assert "has no split dev" in line("toy@dev")
    assert "no such file" in line("some/where.jsonl")
    assert "over --max_prompt_length 20" in line(data(GOOD, GOOD), "--max_prompt_length", 20)


def test_an_open_ended_problem_without_a_judge(refused, folder, data):
    path = data(GOOD, GOOD | dict(verifier="open_ended", answer="a red car"))
    assert "graded by a judge" in refused("--model", folder, "--dataset", path, "--eval_dataset", "none")


@pytest.mark.parametrize("script", ["grpo", "eval_passk"])
def test_a_reward_model_that_is_none(refused, folder, data, script):
    path = data(GOOD, GOOD | dict(verifier="open_ended", answer="a red car"))
    line = refused("--model", folder, "--dataset", path, "--reward_model", folder, script=script)
    assert f"--reward_model {folder} has 2 labels" in line


@pytest.mark.parametrize("names", ["none", "toy@test:2,none"])
def test_nothing_to_measure_is_no_table_of_nothing(refused, folder, names):
    line = refused("--model", folder, "--dataset", names, script="eval_passk")
    assert f"error: --dataset {names}: there is nothing" in line


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_name_of_no_model(refused):
    assert "no folder or name of a model" in refused("--model", "nobody/nothing", *TOY)


def test_a_broken_model_folder(refused, tmp_path, folder):
    """Half of the weights (an interrupted download), none of them, a config that is no json."""
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "can be loaded" in refused("--model", model, *TOY)
    weights.unlink()
    assert "can be loaded" in refused("--model", model, *TOY)
    (model / "config.json").write_text("{")
    assert "can be loaded" in refused("--model", model, *TOY)


def test_a_model_of_another_kind(refused, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(dict(model_type="qwen2")))
    assert "only Qwen2.5-VL" in refused("--model", tmp_path / "other", *TOY)


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, flags, says", [
    ("grpo", ("--num_generations", 1), "at least 2 answers"),
    ("grpo", ("--updates_per_step", 3), "must be a multiple of 3"),
    ("grpo", ("--max_steps", -1), "must be at least 1"),
    ("grpo", ("--warmup_steps", -1), "must be at least 0"),
    ("grpo", ("--max_steps", 1.5), "invalid whole_number value: '1.5'"),
    ("grpo", ("--learnrate", 1), "unrecognized arguments: --learnrate"),
    ("grpo", ("--learning_rat", 1), "unrecognized arguments: --learning_rat"),  # no abbreviations either
    ("grpo", ("--learning_rate", "fast"), "invalid not_negative value"),
    ("grpo", ("--learning_rate", "-1"), "must be at least 0"),
    ("grpo", ("--kl_target", 0.1), "give --beta too"),
    ("grpo", ("--lr_scheduler_type", "linear"), "invalid choice: 'linear'"),
    ("grpo", ("--report_to", "nothing"), "--report_to nothing"),
    ("grpo", ("--temperature", 0), "must be above 0"),
    ("grpo", ("--temperature", "nan"), "must be at least 0"),
    ("mupo", ("--num_generations", 5), "cannot fill"),
    ("vepo", ("--keep", 1.5), "must be from 0 to 1"),
    ("vepo", ("--keep", 0), "--keep is 0"),
])
def test_bad_flags(refused, folder, script, flags, says):
    assert says in refused("--model", folder, *flags, script=script)


# --- places -----------------------------------------------------------------------------------------------------------


def test_no_place_for_the_output(capsys, tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        go("grpo", "--model", folder, "--output_dir", tmp_path / "file" / "out")
    assert caught.value.code == 2
    assert f"cannot write to {tmp_path / 'file'}" in capsys.readouterr().err


def test_no_place_for_the_traces_is_known_before_the_teacher_samples(refused, folder, data):
    path = data(GOOD)
    line = refused("--model", folder, "--teacher", folder, *TOY, "--traces", path / "traces.jsonl", script="sft")
    assert f"error: --traces {path}: cannot write" in line


# --- the shell --------------------------------------------------------------------------------------------------------


def test_from_the_shell(tmp_path):
    """The status and the one line, as a shell sees them; no traceback."""
    done = run_script("grpo.py", "--model", "nobody/nothing", *TOY, *FEW, "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: model nobody/nothing")]
    assert len(errors) == 1


def test_help_from_the_shell():
    """The script's docstring, and its flags; nothing else is done."""
    done = run_script("grpo.py", "--help")
    assert done.returncode == 0
    assert "arXiv 2402.03300" in done.stdout
    assert "--learning_rate" in done.stdout

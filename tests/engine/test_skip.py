"""--skip_bad_rows and --verifiers in whole runs: what is left out is counted, listed, and never trained on."""

import json

import pytest
from conftest import picture
from drive import measure
from whole_runs import drive, refusal

GOOD = dict(image="0.png", problem="How many?", answer="5", verifier="digit", trace="<think>a</think>\\boxed{5}")
TOO_LONG = dict(GOOD, problem="How many? " * 200)
ROWS = [
    GOOD, dict(GOOD, answer="five"), GOOD, TOO_LONG, dict(GOOD, image="none.png"),
    *[GOOD] * 8, dict(GOOD, verifier="open_ended", answer="a red car"),
]
LONGEST = ("--max_prompt_length", 150, "--eval_dataset", "none")


@pytest.fixture
def data(tmp_path):
    picture(56, 56).save(tmp_path / "0.png")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "data.jsonl"


def listed(place):
    return [json.loads(line) for line in (place / "skipped.jsonl").read_text().splitlines()]


def test_a_run_leaves_bad_rows_out_and_lists_them(folder, data, tmp_path, capsys):
    place = drive(
        folder, tmp_path / "run", "--dataset", data, *LONGEST, "--skip_bad_rows", "--verifiers", "digit",
        "--max_steps", 1)
    rows = listed(place)
    assert [row.get("row") for row in rows] == [1, 4, None]
    assert "column answer, value 'five'" in rows[0]["fault"]
    assert "none.png" in rows[1]["fault"]
    assert f"problem {data}/3 has a prompt of" in rows[2]["fault"]
    said = capsys.readouterr().err
    assert "--verifiers digit leaves out 1 open_ended" in said
    assert "--skip_bad_rows left out 3 rows" in said
    assert "10 problems to train on" in said
    used = {json.loads(line)["id"] for line in (place / "samples.jsonl").read_text().splitlines()}
    assert used <= {f"{data}/{number}" for number in (0, 2, *range(5, 13))}
    # What is in no flag is an error, as ever, and nothing is written.
    assert "row 1 " in refusal(capsys, folder, tmp_path / "strict", "--dataset", data, *LONGEST)
    line = refusal(capsys, folder, tmp_path / "judged", "--dataset", data, *LONGEST, "--skip_bad_rows")
    assert "--verifiers digit,mcq,math,iou leaves out" in line


def test_traces_of_open_ended_problems_may_be_learned_from(folder, data, tmp_path):
    """sft.py grades nothing it trains on, so it needs no judge."""
    place = drive(
        folder, tmp_path / "run", "--dataset", data, *LONGEST, "--skip_bad_rows", "--held_out_traces", 2,
        "--max_steps", 1, script="sft")
    assert len(listed(place)) == 3
    assert json.loads((place / "metrics.jsonl").read_text().splitlines()[-1])["hesitations"] == 0


def test_an_evaluation_leaves_bad_rows_out_too(folder, data, tmp_path):
    flags = ("--dataset", data, "--max_prompt_length", 150, "--verifiers", "digit", "--skip_bad_rows")
    measure(
        "--model", folder, *flags, "--output_dir", tmp_path / "eval", "--num_samples", 2, "--ks", "1,2",
        "--max_completion_length", 4)
    result, = json.loads((tmp_path / "eval/eval.json").read_text())
    assert result["problems"] == 10
    assert set(result["phrases"]) >= {"wait", "double-check", "i should confirm"}
    assert result["measures"]["hesitations"][0] == sum(result["phrases"].values())
    assert len(listed(tmp_path / "eval")) == 3


def test_kept_answers_belong_to_the_prompt_that_they_answer(folder, tmp_path):
    """Another instruction, another system prompt, other pixels: other answers; nothing of the kept ones is taken."""
    common = ("--model", folder, "--dataset", "toy@test:2", "--output_dir", tmp_path / "eval", "--num_samples", 1,
              "--ks", 1, "--max_completion_length", 4)
    for flags in ((), (), ("--instruction", "Go."), ("--system_prompt", "Go."), ("--min_pixels", 10_000)):
        measure(*common, *flags)
    lines = (tmp_path / "eval/samples.jsonl").read_text().splitlines()
    assert len(lines) == 4 * 2

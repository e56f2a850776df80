"""lab/toy.py: the picture of sample problems, and the table of what the models can do."""

from lab import toy
from tabletop.grids import STYLES, VERIFIERS

import pytest
import torch


def test_picture(tmp_path):
    path = tmp_path / "runs" / "toy.png"
    toy.picture(path)
    assert path.stat().st_size > 20_000


def test_distinct_answers_are_counted_by_problem():
    texts = ["\\boxed{1}", "so \\boxed{1}", "\\boxed{2}", "no box", "none", "\\boxed{2}"]
    assert toy.distinct_answers(texts, 3) == 2.0  # 1 and 2; no answer and 2


def test_shares_of_styles():
    texts = ["<think>Across red</think>", "<think>Down red</think>", "<think>Across blue</think>", "what?"]
    assert toy.shares_of_styles(texts) == {"of rows": 0.5, "of columns": 0.25, "of marks": 0.0, "of other": 0.25}


def test_right_answers_by_kind_of_question():
    """Two problems of a kind, two answers to each: pass@1 is the mean, pass@2 counts a problem that has one right."""
    asked = [dict(verifier=verifier) for verifier in VERIFIERS for _ in range(2)]
    right_P = torch.tensor([2, 0, 1, 1, 0, 0, 2, 2]).numpy()
    row = toy.right_by_verifier(asked, right_P, 2)
    assert row["pass@1 digit"] == 0.5
    assert row["pass@2 digit"] == 0.5
    assert row["pass@1 mcq"] == 0.5
    assert row["pass@2 mcq"] == 1.0
    assert row["pass@2 math"] == 0.0
    assert row["pass@1 iou"] == 1.0


def test_the_table_is_printed_with_a_line_for_each_number(capsys):
    toy.print_table({"toy": {"weights": 730_000, "pass@1": 0.42}, "toy-teacher": {"weights": 1e6, "pass@1": 0.95}})
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["toy", "toy-teacher"]
    assert [line.split() for line in lines] == [["weights", "730,000", "1,000,000"], ["pass@1", "0.420", "0.950"]]


# --- what the models can do -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_base_can_but_not_reliably():
    row = toy.measure("toy")
    assert row["weights"] < 1_000_000
    assert 0.30 <= row["pass@1"] <= 0.50
    assert row["pass@16"] > 0.90
    for verifier in VERIFIERS:
        assert row[f"pass@16 {verifier}"] >= 0.80


@pytest.mark.slow
def test_teacher_can_and_in_several_ways():
    row = toy.measure("toy-teacher")
    assert row["pass@1"] > 0.90
    assert sum(row[f"of {name}"] > 0.15 for name in STYLES) >= 2

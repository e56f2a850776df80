"""lab/toy.py: the picture of sample problems, and the table of what the models can do."""

from lab import toy
from tabletop import NAMES, WORLDS
from tabletop.grids import STYLES

import pytest
import torch


@pytest.mark.parametrize("drawn", [toy.picture, toy.dials])
def test_pictures(drawn, tmp_path):
    path = tmp_path / "runs" / "toy.png"
    drawn(path)
    assert path.stat().st_size > 20_000


def test_distinct_answers_are_counted_by_problem():
    texts = ["\\boxed{1}", "so \\boxed{1}", "\\boxed{2}", "no box", "none", "\\boxed{2}"]
    assert toy.distinct_answers(texts, 3) == 2.0  # 1 and 2; no answer and 2


def test_shares_of_styles():
    texts = ["<think>Across red</think>", "<think>Down red</think>", "<think>Across blue</think>", "what?"]
    assert toy.shares_of_styles(texts) == {"rows": 0.5, "columns": 0.25, "marks": 0.0, "other": 0.25}


def test_right_answers_by_kind_of_question():
    """Two problems of a kind, two answers to each: pass@1 is the mean. A kind that is not asked has no number."""
    asked = [dict(verifier=verifier) for verifier in ("digit", "mcq", "iou") for _ in range(2)]
    right_P = torch.tensor([2, 0, 1, 0, 2, 2]).numpy()
    assert toy.right_by_verifier(asked, right_P, 2) == {"digit": 0.5, "mcq": 0.25, "iou": 1.0}


def test_the_table_has_a_line_for_each_model_and_blanks_for_what_it_lacks(capsys):
    toy.print_table({"toy": {"weights": 730_000, "pass@1": 0.42}, "toy-teacher": {"weights": 1e6, "look": 0.95}})
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["weights", "pass@1", "look"]
    assert [line.split() for line in lines] == [["toy", "730,000", "0.420"], ["toy-teacher", "1,000,000", "0.950"]]
    assert lines[1].index("0.950") > lines[0].index("0.420")


def test_every_model_is_measured_in_a_world_of_its_own():
    worlds = toy.worlds_of_models()
    assert list(worlds)[0] == "toy"
    assert set(worlds) == set(NAMES)
    assert worlds["toy"] == "toy"
    assert worlds["toy-teacher-hand"] == "toy-hand"
    assert worlds["toy-teacher-short"] == "toy-short"


# --- what the models can do -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_base_reads_clear_pictures_well_and_faded_ones_badly():
    clear = toy.measure("toy", "toy-clear")
    faded = toy.measure("toy", "toy")
    assert clear["weights"] < 1_000_000
    assert clear["pass@1"] > 0.85
    assert 0.35 <= faded["pass@1"] <= 0.60
    assert faded["pass@16"] > 0.80


@pytest.mark.slow
def test_the_first_base_can_but_not_reliably():
    row = toy.measure("toy-short", "toy-short")
    assert 0.30 <= row["pass@1"] <= 0.50
    assert row["pass@16"] > 0.90


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, world in WORLDS.items() if name == world.base])
def test_every_base_has_something_to_learn(name):
    assert 0.35 <= toy.measure(name, name)["pass@1"] <= 0.60


@pytest.mark.slow
@pytest.mark.parametrize("name, world", [
    ("toy-teacher", "toy"), ("toy-teacher", "toy-clear"), ("toy-teacher-hand", "toy-hand"),
    ("toy-teacher-short", "toy-short"), ("toy-teacher-mixed", "toy-mixed"),
])
def test_teachers_can_and_in_several_ways(name, world):
    row = toy.measure(name, world)
    assert row["pass@1"] > (0.80 if world == "toy-hand" else 0.88)
    assert sum(row[style] > 0.15 for style in STYLES) >= 2


@pytest.mark.slow
def test_the_second_skill_is_there_and_only_there():
    assert toy.measure("toy-two-skills", "toy-two-skills", "skill")["pass@1"] > 0.85
    # Who has only the first skill names what most cells show, and that stands at the place nearly half of the time.
    without = toy.measure("toy", "toy-two-skills", "skill")
    assert "look" not in without  # it is a style that toy never uses
    assert without["pass@1"] < 0.55


@pytest.mark.slow
def test_the_other_hand_writes_more_and_hesitates():
    own = toy.measure("toy-teacher", "toy")
    other = toy.measure("toy-teacher-hand", "toy-hand")
    assert other["tokens"] > 1.5 * own["tokens"]
    assert abs(other["pass@1"] - own["pass@1"]) < 0.12

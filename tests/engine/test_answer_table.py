"""Answers with their rewards, written by hand: answers.tsv. And thousands that nobody wrote: no exception, no waiting.

A row of answers.tsv: the verifier, the gold answer, where the answer stands (in a box, in tags, or the whole text as it
is), the answer, its reward, and why.
"""

import csv
import random
import time
from collections import Counter

from common import format_reward, grade, is_right
from harness.answers import VERIFIERS
from harness.embedding import reasoning
from harness.rows import check_gold

import pytest
from conftest import ROOT
from PIL import Image

with open(ROOT / "tests/engine/answers.tsv", newline="") as file:
    TABLE = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
FORMS = {"box": "<think>so</think> \\boxed{%s}", "tags": "<think>so</think>\n<answer>%s</answer>", "text": "%s"}
PICTURE = Image.new("RGB", (100, 100))


def number_of_words(problem, text):
    """A judge that is easy to follow: more different words are better."""
    return float(len(set(text.split())))


def problem_of(row):
    return dict(id="0", answer=row["gold"], verifier=row["verifier"], images=[PICTURE])


def test_the_table_has_rows_for_every_verifier():
    assert len(TABLE) >= 150
    assert all(count >= 10 for count in Counter(row["verifier"] for row in TABLE).values())
    assert {row["verifier"] for row in TABLE} == set(VERIFIERS)
    for verifier in VERIFIERS:
        rewards = {float(row["reward"]) > 0 for row in TABLE if row["verifier"] == verifier}
        assert rewards == {False, True}


@pytest.mark.parametrize("number", range(len(TABLE)))
def test_an_answer_earns_what_the_table_says(number):
    row = TABLE[number]
    text = FORMS[row["as"]] % row["answer"]
    reward = grade(problem_of(row), text, number_of_words)
    assert reward == pytest.approx(float(row["reward"]), abs=1e-6), row


def test_the_tables_gold_answers_would_be_loaded():
    for row in TABLE:
        if row["gold"] != "1/0":
            check_gold(row["gold"], row["verifier"])


# --- answers that nobody wrote ----------------------------------------------------------------------------------------

PIECES = [
    "\\boxed{", "}", "{", "<answer>", "</answer>", "<think>", "</think>", "\\frac", "^", "^{", "9^9^9", "_", "(", ")",
    "[", "]", ",", ";", "\\sqrt", "sin(", "\\text{", "=", "<", ">", "|", "%", "$", "\\", "\\\\", " ", "\n", "\t", "\0",
    "é", "☃", "½", "١", "and", "or", "cm", "A)", "B:", "0.1", "1e9", "-", "+", "*", "/", "!", "x", "∞", "nan",
    "†Answer:",
]


def mutated(text, random_number):
    """A text after one to six changes: pieces put in, cut out, doubled, exchanged, or repeated."""
    for _ in range(random_number.randint(1, 6)):
        start = random_number.randint(0, len(text))
        end = min(len(text), start + random_number.randint(0, 8))
        kind = random_number.randrange(5)
        if kind == 0:
            text = text[:start] + random_number.choice(PIECES) + text[start:]
        elif kind == 1:
            text = text[:start] + text[end:]
        elif kind == 2:
            text = text[:end] + text[start:end] + text[end:]
        elif kind == 3:
            text = text[end:] + text[:start]
        else:
            text = text[:start] + random_number.choice(PIECES) * random_number.randint(2, 60) + text[end:]
    return text


def grade_many(count, seed):
    """Grades `count` texts, half of them mutated answers of the table, half random pieces. Returns the slowest."""
    random_number = random.Random(seed)
    slowest = (0.0, "")
    for number in range(count):
        row = random_number.choice(TABLE)
        text = "".join(random_number.choices(PIECES, k=random_number.randint(0, 40)))
        if number % 2:
            text = FORMS[row["as"]] % row["answer"]
        text = mutated(text, random_number)
        if number % 3 == 0:
            text = "\\boxed{" + text + "}"
        before = time.process_time()
        reward = grade(problem_of(row), text, number_of_words)
        slowest = max(slowest, (time.process_time() - before, text))
        assert 0 <= reward <= 1, (row, text)
        assert is_right(problem_of(row), text, number_of_words) in (False, True)
        assert format_reward({}, text) in (0.0, 1.0)
        assert isinstance(reasoning(text), str)
    return slowest


def test_random_and_mutated_answers_raise_nothing_and_take_no_time():
    grade(dict(id="0", answer="2x+1", verifier="math"), "\\boxed{1+2x}")  # fills the parser's tables
    seconds, text = grade_many(400, seed=1)
    assert seconds < 5, text  # half a second on an idle core; a busy neighbour makes seconds longer


@pytest.mark.slow
def test_ten_thousand_random_and_mutated_answers():
    grade(dict(id="0", answer="2x+1", verifier="math"), "\\boxed{1+2x}")
    seconds, text = grade_many(10_000, seed=2)
    assert seconds < 5, text  # half a second on an idle core; a busy neighbour makes seconds longer

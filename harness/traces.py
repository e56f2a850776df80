"""Answers that were written elsewhere, by a model that does not fit here or by hand: a .jsonl file of traces.

    {"id": "the id of a problem", "text": "<think>...</think>\\boxed{4}"}

A problem may have several rows. A row may say whether it is right ("right": true), as the file does in which sft.py
keeps a teacher's answers; any other row is graded here.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.flags import UserError
from harness.problems import WithTraces

from tqdm import tqdm


def read_traces(path: str, flag: str = "--traces", text: str = "text") -> list[dict]:
    """The rows of a file of traces, or of other texts: the column that holds them, and the flag that named the file.

    UserError naming the row and the column that is wrong.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({' '.join(str(error).split())})") from None
    rows = []
    for number, line in enumerate(tqdm(lines, desc="traces", delay=5, leave=False), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{flag} {path}, row {number}: it is no JSON object; correct it, or leave it out")
        for column in ("id", text):
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise UserError(f"{flag} {path}, row {number}, column {column}: {row.get(column)!r} is no text; "
                                "give the id of a problem, and the text of an answer to it")
        rows.append(row)
    return rows


def given_traces(path: str, dataset: str, problems: Sequence[dict], is_good: Callable) -> tuple[WithTraces, int]:
    """Problems with the good ones of a file's traces, in the problems' order; and how many rows the file has.

    is_good(problem, text) grades a row that does not say whether it is right. UserError where nothing is left.
    """
    rows_of = {}
    rows = read_traces(path)
    for row in rows:
        rows_of.setdefault(row["id"], []).append(row)
    known = 0
    good = []
    for problem in tqdm(problems, desc="grading", delay=5, leave=False):
        for row in rows_of.get(problem["id"], []):
            known += 1
            right = row["right"] if "right" in row else is_good(problem, row["text"])
            if right:
                good.append(row)
    if known == 0:
        first = rows[0]["id"] if rows else "none"
        raise UserError(f"--traces {path}: none of its ids is one of {dataset}, whose first is {problems[0]['id']}; "
                        f"the file's first is {first}")
    if not good:
        raise UserError(f"--traces {path}: none of its {known} answers to problems of {dataset} is right and "
                        "well-formed (<think>...</think>, then \\boxed{...})")
    return WithTraces(problems, good), len(rows)

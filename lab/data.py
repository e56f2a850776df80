"""Data sets by name or by path, as problems: found by their columns, checked row by row before any training.

`common.load_problems` imports this module when it is asked for something. A new data set whose columns have other names
is a line in COLUMNS; one whose answers need translating is a few lines in read_row.
"""

import io
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
from PIL import Image
from tqdm import tqdm

from common import VERIFIERS, UserError, read_box, read_integer, read_letter, unbox

# What the parts of a problem are called, the preferred name first: in geometry3k (images, problem, answer), MathVista
# (decoded_image, query, answer, pid), ViRL39K (image, question, answer, qid), MMK12 (image, question, answer, id),
# VLAA-Thinking (image, question, gt, verifier_type), imagefolder's metadata.jsonl (file_name), and in one's own data.
COLUMNS = {
    "images": ("images", "decoded_image", "image", "images_file_names", "image_file_name", "file_name"),
    "problem": ("problem", "query", "question"),
    "answer": ("answer", "solution", "gt"),
    "verifier": ("verifier", "verifier_type"),
    "trace": ("trace",),
    "id": ("id", "pid", "qid"),
}
OPTIONAL = ("verifier", "trace", "id")
SPLITS = ("train", "test", "validation", "val", "dev", "testmini")
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class RowFault(ValueError):
    """RowFault(column, value, what is wrong and what to do)."""


class Problems(Sequence):
    """Checked problems: the texts in memory, the pictures opened each time that a problem is asked for."""

    def __init__(self, texts, rows, column, root):
        self.texts, self.rows, self.column, self.root = texts, rows, column, root

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            rows = self.rows.select(range(len(self))[index])
            return Problems(self.texts[index], rows, self.column, self.root)
        text = self.texts[index]
        value = self.rows[range(len(self))[index]][self.column]
        return {**text, "images": open_pictures(value, self.column, self.root)}


def load(spec):
    """A sequence of problems (dicts with id, images, problem, answer, verifier, and trace where there is one).

    spec: name@split or name@split:count, where name is toy, a data set on the hub, a .json, .jsonl or .parquet file, or
    a folder that holds metadata.jsonl or parquet files; a file may go without a split. count takes the first problems.
    Every row is checked here, pictures included, so that training does not stop at row 30,000. Raises UserError.
    """
    match = re.fullmatch(r"(.+?)(?:@(\w+))?(?::(\d+))?", spec)
    name, split, count = match.groups() if match else (spec, None, "0")
    if count and int(count) == 0:
        raise UserError(f"data set {spec!r} cannot be read; write name@split or name@split:count, with a count above 0")
    if name == "toy":
        return toy_problems(split, count and int(count))
    rows, root = open_rows(name, split)
    if len(rows) < int(count or 1):
        raise UserError(f"data set {spec}: it has {len(rows)} rows; ask for fewer, or give one that is not empty")
    columns = find_columns(rows.column_names, spec)
    rows = rows.select(range(int(count or len(rows))))
    rows = rows.cast(datasets.Features({key: undecoded(feature) for key, feature in rows.features.items()}))
    texts, faults = [], []
    for number, row in enumerate(tqdm(rows, f"checking {spec}", disable=None)):
        try:
            texts.append({"id": f"{name}/{number}", **read_row(row, columns, root)})
        except RowFault as fault:
            faults.append((number, *fault.args))
    if faults:
        number, column, value, advice = faults[0]
        others = f" (rows with faults: {len(faults)}, {shorten([fault[0] for fault in faults])})"
        raise UserError(f"data set {spec}, row {number} (counted from 0), column {column}, value '{shorten(value)}': "
                        + advice + others * (len(faults) > 1))
    return Problems(texts, rows.select_columns(columns["images"]), columns["images"], root)


def toy_problems(split, count):
    """The tabletop's problems, drawn as they are asked for."""
    from lab import toy
    sizes = {name: size for name, size in toy.SIZES.items() if size}
    if split not in sizes:
        raise UserError(f"data set toy has no split {split}, it has {', '.join(sizes)}; write for example toy@train")
    return toy.problems(split, count)


def open_rows(name, split):
    """(rows, root): a datasets.Dataset, and the folder that picture paths start from (None for the hub)."""
    path = Path(name).expanduser()
    local = path.exists()
    hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and path.suffix not in LOADERS
    if not local and not hub_name:
        raise UserError(f"data set {name}: there is no such file or folder; write name@split or name@split:count")
    if not local and split is None:
        raise UserError(f"data set {name}: a split is missing; write for example {name}@train")
    files = data_files(path, split) if local else None
    root = None if not local else files[0].parent if files[0].suffix in (".json", ".jsonl") or path.is_file() else path
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said once, below
    try:
        if not local:
            return datasets.load_dataset(name, split=split), None
        kind = LOADERS[files[0].suffix]
        return datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train"), root
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:  # (of an empty file)
        reason = shorten(f"{type(error).__name__}: {error}; {error.__cause__ or ''}", 300)
        raise UserError(f"data set {name}, split {split}, cannot be loaded ({reason}); check name and split, or the "
                        "file's syntax; without a network give a local file or folder") from error


def data_files(path, split):
    """The files of one split: a file itself; in a folder its metadata.jsonl, or its parquet files, which belong to
    the split that their name begins with, or all to train when no name begins with a split."""
    if path.is_file():
        if path.suffix not in LOADERS or split not in (None, "train", re.split(r"[-.]", path.name)[0]):
            raise UserError(f"data set {path}, split {split}: only .json, .jsonl and .parquet, and split train")
        return [path]
    split = split or "train"
    for metadata in (path / split / "metadata.jsonl", path / "metadata.jsonl"):
        if metadata.is_file() and (metadata.parent != path or split == "train"):
            return [metadata]
    by_split = {}
    for file in sorted(path.rglob("*.parquet")):
        first_word = re.split(r"[-.]", file.name)[0]
        by_split.setdefault(first_word if first_word in SPLITS else "train", []).append(file)
    if split not in by_split:
        raise UserError(f"data set {path}: no metadata.jsonl or parquet file of split {split} is in it, only "
                        f"{', '.join(by_split) or 'nothing'}; name another split, or the .json or .jsonl file itself")
    return by_split[split]


def find_columns(names, spec):
    """{part of a problem: column}, by the names of the columns."""
    columns = {part: next((name for name in known if name in names), None) for part, known in COLUMNS.items()}
    for part, column in columns.items():
        if column is None and part not in OPTIONAL:
            raise UserError(f"data set {spec}: no column for {part}, which is called {' or '.join(COLUMNS[part])}; "
                            f"it has {', '.join(names)}; rename one")
    return {part: column for part, column in columns.items() if column}


def undecoded(feature):
    """The same feature with its pictures left as bytes, so that a broken one is met here, where its row is known."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(undecoded(feature.feature), length=feature.length)
    return feature


def read_row(row, columns, root):
    """A problem without its pictures. Raises RowFault for whatever would stop training, or reward nothing, later."""
    values = {part: row[column] for part, column in columns.items() if row[column] is not None}
    text, gold = str(values.get("problem", "")), values.get("answer", "")
    answer = "" if isinstance(gold, dict) else unbox(str(gold)).strip()
    choices, pictures = row.get("choices"), open_pictures(values.get("images"), columns["images"], root)
    if not text.strip():
        raise RowFault(columns["problem"], text, "the problem is empty; write one, or leave the row out")
    if not pictures:
        raise RowFault(columns["images"], values.get("images"), "there is no picture; add one, or leave the row out")
    if text.count("<image>") not in (0, len(pictures)):
        raise RowFault(columns["problem"], text, f"<image> stands {text.count('<image>')} times for {len(pictures)} "
                       "pictures; make the numbers equal, or leave <image> out (the pictures then come first)")
    if choices and answer in choices:  # MathVista answers with the text of the option
        answer = chr(ord("A") + choices.index(answer))
    elif choices and read_letter(answer) is None:
        raise RowFault(columns["answer"], answer, f"it is none of the choices {shorten(choices)}; correct it")
    if choices and "(B)" not in text:
        text += "\nChoices:\n" + "\n".join(f"({chr(ord('A') + n)}) {choice}" for n, choice in enumerate(choices))
    verifier = re.sub(r"[\s-]+", "_", str(values.get("verifier", "")).strip().lower())
    if not verifier:
        verifier = "mcq" if choices else "math" if row.get("answer_type") == "list" else infer_verifier(text, answer)
    try:
        check_gold(answer, verifier)
    except ValueError as error:
        raise RowFault(columns["answer"], gold, f"it cannot be graded: {error}; correct it, give another verifier, "
                       "or leave the row out") from error
    extra = {part: str(values[part]) for part in ("id", "trace") if part in values}
    return {"problem": text, "answer": answer, "verifier": verifier, **extra}


def check_gold(answer, verifier):
    """Raises ValueError, saying why, when no answer could ever be compared with this gold answer (str)."""
    if verifier not in VERIFIERS:
        raise ValueError(f"the verifier {verifier!r} is none of {', '.join(VERIFIERS)}")
    read, needs = VERIFIERS[verifier]
    if read(unbox(answer)) is None:
        raise ValueError(f"the verifier {verifier} needs {needs}")


def infer_verifier(problem, answer):
    """A letter among options: mcq. An integer that counts something: digit. A box: iou. Anything else: math."""
    if read_letter(answer) and all(re.search(rf"(?:^|[\s(]){letter}[).:,．：、）]", problem) for letter in "AB"):
        return "mcq"
    # Not every integer is a count: where 54 is an angle or a length, 54.0 and "54 cm" are right too, and math knows it.
    if read_integer(answer) is not None and re.search(r"(?i)\b(how many|count|number of)\b", problem):
        return "digit"
    return "iou" if read_box(answer) else "math"


def open_pictures(value, column, root):
    """A list of PIL pictures in RGB, from what a data set holds: one or several of a path, or {bytes, path}."""
    pictures = []
    for item in value if isinstance(value, list) else [] if value is None else [value]:
        data, path = (item.get("bytes"), item.get("path")) if isinstance(item, dict) else (None, item)
        if data is None and root is None:
            raise RowFault(column, path, "the data set gives only this path, not the picture; download it with its "
                           "pictures, unpack them, and name the folder or file in place of the data set")
        try:
            with Image.open(io.BytesIO(data) if data is not None else root / path) as picture:
                pictures.append(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
            raise RowFault(column, path, f"the picture cannot be opened ({shorten(error)}); "
                           f"restore it{f' under {root}' if root else ''}, or leave the row out") from error
        width, height = pictures[-1].size
        if max(width, height) >= 200 * min(width, height):
            raise RowFault(column, path, f"the picture is {width} × {height}, the processor refuses sides of 200 : 1; "
                           "crop it, or leave the row out")
    return pictures


def shorten(value, length=80):
    """A value on one line, cut to a length."""
    line = " ".join(str(value).split())
    return line if len(line) <= length else line[:length - 1] + "…"

"""Data sets by name or by path, as problems: found by their columns, checked row by row before any training.

A new data set whose columns have other names is a line in COLUMNS. One whose answers need translating is a few lines in
`read_row`. The tabletop's problems are not read here: `common.load_problems` knows them by name.
"""

import io
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness.answers import VERIFIERS, read_box, read_integer, read_letter, unbox
from harness.flags import UserError

import datasets
from PIL import Image
from tqdm import tqdm

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
LOADERS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}


class RowFault(ValueError):
    """A row that cannot be used: its column, its value, and advice (what is wrong and what to do)."""

    def __init__(self, column: str, value: object, advice: str) -> None:
        super().__init__(f"column {column}, value '{shorten(value)}': {advice}")


class DataSpec(NamedTuple):
    """What the user asked for: the name of a data set, its split (None: not given) and a count (None: all)."""

    name: str
    split: str | None
    count: int | None


class Problems(Sequence):
    """Checked problems: the texts in memory, the pictures opened each time that a problem is asked for."""

    def __init__(self, texts: list[dict], rows: datasets.Dataset, column: str, root: Path | None) -> None:
        self.texts = texts
        self.rows = rows
        self.column = column
        self.root = root

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int | slice) -> "dict | Problems":
        if isinstance(index, slice):
            rows = self.rows.select(range(len(self))[index])
            return Problems(self.texts[index], rows, self.column, self.root)
        text = self.texts[index]
        number = range(len(self))[index]  # counted from the front, also when index counts from the end
        value = self.rows[number][self.column]
        return {**text, "images": open_pictures(value, self.column, self.root)}


# --- a data set -------------------------------------------------------------------------------------------------------


def parse_spec(spec: str) -> DataSpec:
    """The parts (name, split, count) of name@split:count; split and count are None where they are left out.

    Raises UserError for an empty name, and for a count of 0.
    """
    message = f"data set {spec!r} cannot be read; write name@split or name@split:count, with a count above 0"
    match = re.fullmatch(r"(?P<name>.+?)(?:@(?P<split>\w+))?(?::(?P<count>\d+))?", spec)
    if match is None:
        raise UserError(message)
    name = match["name"]
    split = match["split"]
    if match["count"] is None:
        return DataSpec(name, split, None)
    count = int(match["count"])
    if count == 0:
        raise UserError(message)
    return DataSpec(name, split, count)


def load(spec: str) -> Problems:
    """A sequence of problems (dicts with id, images, problem, answer, verifier, and trace where there is one).

    spec: name@split or name@split:count, where name is a data set on the hub, a .json, .jsonl or .parquet file, or a
    folder that holds metadata.jsonl or parquet files; a file may go without a split. count takes the first problems.
    Every row is checked here, pictures included, so that training does not stop at row 30,000. Raises UserError, naming
    row, column and value.
    """
    wanted = parse_spec(spec)
    rows, root = open_rows(wanted.name, wanted.split)
    needed = 1 if wanted.count is None else wanted.count
    if len(rows) < needed:
        raise UserError(f"data set {spec}: it has {len(rows)} rows; ask for fewer, or give one that is not empty")
    columns = find_columns(rows.column_names, spec)
    if wanted.count is not None:
        rows = rows.select(range(wanted.count))
    features = {key: undecoded(feature) for key, feature in rows.features.items()}
    rows = rows.cast(datasets.Features(features))
    texts = []
    for number, text in enumerate(check_rows(rows, columns, root, spec)):
        texts.append({"id": f"{wanted.name}/{number}", **text})  # the data set's own id wins
    return Problems(texts, rows.select_columns(columns["images"]), columns["images"], root)


def check_rows(rows: datasets.Dataset, columns: dict[str, str], root: Path | None, spec: str) -> list[dict]:
    """What read_row gives for every row. All rows are read; then the first fault is raised as a UserError."""
    texts = []
    faulty_rows = []
    first_fault = ""
    for number, row in enumerate(tqdm(rows, f"checking {spec}", disable=None)):
        try:
            texts.append(read_row(row, columns, root))
        except RowFault as fault:
            if not faulty_rows:
                first_fault = str(fault)
            faulty_rows.append(number)
    if not faulty_rows:
        return texts
    message = f"data set {spec}, row {faulty_rows[0]} (counted from 0), {first_fault}"
    if len(faulty_rows) > 1:
        message += f" (rows with faults: {len(faulty_rows)}, {shorten(faulty_rows)})"
    raise UserError(message)  # trap: broken problems (before any training)


def open_rows(name: str, split: str | None) -> tuple[datasets.Dataset, Path | None]:
    """The rows of a split, and the folder that picture paths start from (None for a data set on the hub)."""
    path = Path(name).expanduser()
    if not path.exists():
        check_hub_name(name, split)
        return load_rows(name, split, None), None
    files = data_files(path, split)
    rows = load_rows(name, split, files)
    if path.is_file() or files[0].name == "metadata.jsonl":
        return rows, files[0].parent
    return rows, path


def check_hub_name(name: str, split: str | None) -> None:
    """Raises UserError when a name cannot be that of a data set on the hub, or when its split is missing."""
    looks_like_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None
    if not looks_like_hub or Path(name).suffix in LOADERS:
        raise UserError(f"data set {name}: there is no such file or folder; write name@split or name@split:count")
    if split is None:
        raise UserError(f"data set {name}: a split is missing; write for example {name}@train")


def load_rows(name: str, split: str | None, files: list[Path] | None) -> datasets.Dataset:
    """The rows of one split: of these files, or, when files is None, of the data set of this name on the hub."""
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said once, below
    try:
        if files is None:
            return datasets.load_dataset(name, split=split)
        kind = LOADERS[files[0].suffix]
        return datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train")
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        # (StopIteration is what an empty file raises.)
        cause = "" if error.__cause__ is None else error.__cause__
        reason = shorten(f"{type(error).__name__}: {error}; {cause}", 300)
        raise UserError(f"data set {name}, split {split}, cannot be loaded ({reason}); check name and split, or the "
                        "file's syntax; without a network give a local file or folder") from error


# --- the files of a split ---------------------------------------------------------------------------------------------


def data_files(path: Path, split: str | None) -> list[Path]:
    """The files of one split (None: train): a file itself; in a folder its metadata.jsonl, or its parquet files.

    Raises UserError when there is none.
    """
    if path.is_file():
        check_file(path, split)
        return [path]
    if split is None:
        split = "train"
    metadata = path / split / "metadata.jsonl"
    if metadata.is_file():
        return [metadata]
    metadata = path / "metadata.jsonl"
    if metadata.is_file() and split == "train":
        return [metadata]
    by_split = parquet_files(path)
    if split not in by_split:
        found = ", ".join(by_split) if by_split else "nothing"
        raise UserError(f"data set {path}: no metadata.jsonl or parquet file of split {split} is in it, only {found}; "
                        "name another split, or the .json or .jsonl file itself")
    return by_split[split]


def check_file(path: Path, split: str | None) -> None:
    """Raises UserError for a file of another kind, and for a split other than train or the one that the file's name
    begins with."""
    if path.suffix not in LOADERS:
        raise UserError(f"data set {path}: a file of this kind cannot be read; give a .json, .jsonl or .parquet file")
    if split not in (None, "train", first_word(path)):
        raise UserError(f"data set {path}: the file has no split {split}; leave the split out, or ask for split train")


def parquet_files(folder: Path) -> dict[str, list[Path]]:
    """{split: parquet files}: a file belongs to the split that its name begins with, or else to train."""
    by_split = {}
    for file in sorted(folder.rglob("*.parquet")):
        split = first_word(file)
        if split not in SPLITS:
            split = "train"
        by_split.setdefault(split, []).append(file)
    return by_split


def first_word(path: Path) -> str:
    """What a file's name begins with: train of train-00000-of-00002.parquet, test of test.jsonl."""
    return re.split(r"[-.]", path.name)[0]


# --- columns ----------------------------------------------------------------------------------------------------------


def find_columns(names: list[str], spec: str) -> dict[str, str]:
    """{part of a problem: column}, by the names of the columns. Raises UserError when one that is needed is missing."""
    columns = {}
    for part, known in COLUMNS.items():
        present = [name for name in known if name in names]
        if present:
            columns[part] = present[0]
        elif part not in OPTIONAL:  # trap: broken problems (a missing column)
            raise UserError(f"data set {spec}: no column for {part}, which is called {' or '.join(known)}; "
                            f"it has {', '.join(names)}; rename one")
    return columns


def undecoded(feature: object) -> object:
    """The same feature with its pictures left as bytes, so that a broken one is met here, where its row is known."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)  # trap: broken problems
    if isinstance(feature, datasets.List):
        return datasets.List(undecoded(feature.feature), length=feature.length)
    return feature


# --- a row ------------------------------------------------------------------------------------------------------------


def read_row(row: dict, columns: dict[str, str], root: Path | None) -> dict:
    """A problem without its pictures: problem, answer, verifier, and id and trace where the row has them.

    Raises RowFault for whatever would stop training, or reward nothing, later.
    """
    values = {part: row[column] for part, column in columns.items() if row[column] is not None}
    text = str(values.get("problem", ""))
    gold = values.get("answer", "")
    answer = gold_text(gold)
    choices = row.get("choices")
    check_pictures(values.get("images"), text, columns, root)
    if choices:
        answer = chosen_letter(answer, choices, columns["answer"])
        text = with_choices(text, choices)
    verifier = named_verifier(values)
    if not verifier:
        verifier = default_verifier(row, text, answer)
    try:
        check_gold(answer, verifier)  # trap: unreadable gold (an error here, never a reward later)
    except ValueError as error:
        raise RowFault(columns["answer"], gold, f"it cannot be graded: {error}; correct it, give another verifier, "
                       "or leave the row out") from error
    problem = {
        "problem": text,
        "answer": answer,
        "verifier": verifier,
    }
    for part in ("id", "trace"):
        if part in values:
            problem[part] = str(values[part])
    return problem


def gold_text(gold: object) -> str:
    r"""A gold answer (text, number or list) as text, without \boxed{}; "" for a dict, which means nothing here."""
    if isinstance(gold, dict):
        return ""
    return unbox(str(gold)).strip()


def check_pictures(value: object, text: str, columns: dict[str, str], root: Path | None) -> None:
    """Raises RowFault for pictures that cannot be opened, and for a text that is empty or names more or fewer."""
    pictures = open_pictures(value, columns["images"], root)
    if not text.strip():  # trap: broken problems
        raise RowFault(columns["problem"], text, "the problem is empty; write one, or leave the row out")
    if not pictures:  # trap: broken problems (text only)
        raise RowFault(columns["images"], value, "there is no picture; add one, or leave the row out")
    places = text.count("<image>")
    if places not in (0, len(pictures)):
        raise RowFault(columns["problem"], text, f"<image> appears {places} times for {len(pictures)} pictures; make "
                       "the numbers equal, or leave <image> out (the pictures then come first)")


def chosen_letter(answer: str, choices: list[str], column: str) -> str:
    """The letter of the gold answer to a question with choices. Raises RowFault when it is not one of them."""
    if answer in choices:  # MathVista answers with the text of the option
        return letter(choices.index(answer))
    if read_letter(answer) is None:
        raise RowFault(column, answer, f"it is none of the choices {shorten(choices)}; correct it")
    return answer


def with_choices(text: str, choices: list[str]) -> str:
    """A question followed by its choices, (A), (B), ..., unless it names them already."""
    if "(B)" in text:
        return text
    text += "\nChoices:"
    for number, choice in enumerate(choices):
        text += f"\n({letter(number)}) {choice}"
    return text


def letter(number: int) -> str:
    """The letter of an option: 0 is A."""
    return chr(ord("A") + number)


# --- its verifier -----------------------------------------------------------------------------------------------------


def named_verifier(values: dict) -> str:
    """The verifier that a row names, in the spelling of VERIFIERS ("Open-Ended" is open_ended); "" if it names none."""
    name = str(values.get("verifier", "")).strip().lower()
    return re.sub(r"[\s-]+", "_", name)


def default_verifier(row: dict, text: str, answer: str) -> str:
    """The verifier of a row that names none: by MathVista's columns where they say it, else by question and answer."""
    if row.get("choices"):
        return "mcq"
    if row.get("answer_type") == "list":
        return "math"  # four numbers are not always a box
    return infer_verifier(text, answer)


def infer_verifier(problem: str, answer: str) -> str:
    """A letter among options: mcq. An integer that counts something: digit. A box: iou. Anything else: math."""
    if read_letter(answer) is not None and has_option("A", problem) and has_option("B", problem):
        return "mcq"
    # Not every integer is a count: where 54 is an angle or a length, 54.0 and "54 cm" are right too, and math knows it.
    if read_integer(answer) is not None and re.search(r"(?i)\b(how many|count|number of)\b", problem):
        return "digit"
    if read_box(answer) is not None:
        return "iou"
    return "math"


def has_option(option: str, problem: str) -> bool:
    """Whether a question lists an option of this letter, as in "(A) red", "A. red" or "A: red"."""
    return re.search(rf"(?:^|[\s(]){option}[).:,．：、）]", problem) is not None


def check_gold(answer: str, verifier: str) -> None:
    """Raises ValueError, saying why, when no answer could ever be compared with this gold answer."""
    if verifier not in VERIFIERS:
        raise ValueError(f"the verifier {verifier!r} is none of {', '.join(VERIFIERS)}")
    read, needs = VERIFIERS[verifier]
    if read(unbox(answer)) is None:  # trap: unreadable gold
        raise ValueError(f"the verifier {verifier} needs {needs}")


# --- its pictures -----------------------------------------------------------------------------------------------------


def open_pictures(value: object, column: str, root: Path | None) -> list[Image.Image]:
    """A list of PIL pictures in RGB, from what a data set holds: one or several of a path, or {bytes, path}.

    Paths start from root. Raises RowFault for a picture that cannot be opened or used.
    """
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    pictures = []
    for item in items:
        if isinstance(item, dict):
            data = item.get("bytes")
            path = item.get("path")
        else:
            data = None
            path = item
        pictures.append(open_picture(data, path, column, root))
    return pictures


def open_picture(data: bytes | None, path: str | None, column: str, root: Path | None) -> Image.Image:
    """One picture in RGB, from its bytes where they are given, otherwise from its path. Raises RowFault."""
    if data is None and root is None:
        raise RowFault(column, path, "the data set gives only this path, not the picture; download it with its "
                       "pictures, unpack them, and name the folder or file in place of the data set")
    try:
        source = root / path if data is None else io.BytesIO(data)
        with Image.open(source) as file:
            picture = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        place = f" under {root}" if root else ""
        raise RowFault(column, path, f"the picture cannot be opened ({shorten(error)}); restore it{place}, or leave "
                       "the row out") from error  # trap: broken problems (a corrupt or missing picture)
    width, height = picture.size
    if max(width, height) >= 200 * min(width, height):
        raise RowFault(column, path, f"the picture is {width} × {height}, the processor refuses sides of 200 : 1; "
                       "crop it, or leave the row out")
    return picture


def shorten(value: object, length: int = 80) -> str:
    """A value on one line, cut to a length in characters."""
    line = " ".join(str(value).split())
    if len(line) <= length:
        return line
    return line[:length - 1] + "…"


class WithTraces(Sequence):
    """Problems with a trace each: an entry for every distinct text in `rows` (dicts with id and text).

    The entries follow the order of the problems. Their pictures are opened when an entry is asked for.
    """

    def __init__(self, problems: Sequence[dict], rows: list[dict]) -> None:
        self.problems = problems
        texts = {}
        for row in rows:
            texts.setdefault(row["id"], {})[row["text"]] = None  # a dict for its order: each text once
        self.pairs = []
        for place, problem in enumerate(problems):
            for text in texts.get(problem["id"], {}):
                self.pairs.append((place, text))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int | slice) -> "dict | WithTraces":
        if isinstance(index, slice):
            part = WithTraces([], [])  # given the problems, it would open every picture to look for traces
            part.problems = self.problems
            part.pairs = self.pairs[index]
            return part
        place, text = self.pairs[index]
        return {**self.problems[place], "trace": text}

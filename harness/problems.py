"""Data sets by name or by path, as problems: files and splits, mixtures, and rows that are checked before any training.

What one row becomes is decided in harness/rows.py. The tabletop's problems are not read here: `common.load_problems`
knows them by name.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from harness.answers import VERIFIERS
from harness.flags import UserError
from harness.rows import COLUMNS, OPTIONAL, RowFault, check_row, open_pictures, read_row, shorten
from harness.run import Run

import datasets
from tqdm import tqdm

SPLITS = ("train", "test", "validation", "val", "dev", "testmini")
LOADERS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}


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


class Mixture(Sequence):
    """Problems of several data sets, one set after the other: each weighs by how many problems it gives.

    An id begins with the name of its data set, so that ids stay unique.
    """

    def __init__(self, parts: dict[str, Sequence], places: list[tuple[str, int]] | None = None) -> None:
        self.parts = parts
        if places is None:
            places = [(name, number) for name, part in parts.items() for number in range(len(part))]
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int | slice) -> "dict | Mixture":
        if isinstance(index, slice):
            return Mixture(self.parts, self.places[index])
        name, number = self.places[index]
        problem = self.parts[name][number]
        return {**problem, "id": f"{name}/{problem['id']}"}


class Some(Sequence):
    """The problems at some places of a sequence, in that order."""

    def __init__(self, problems: Sequence, places: Sequence[int]) -> None:
        self.problems = problems
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int | slice) -> "dict | Some":
        if isinstance(index, slice):
            return Some(self.problems, self.places[index])
        return self.problems[self.places[index]]


def with_verifiers(problems: Sequence[dict], verifiers: str) -> Sequence[dict]:
    """The problems that have one of these verifiers, written as --verifiers has them. All are looked at, once."""
    wanted = read_verifiers(verifiers)
    if wanted == set(VERIFIERS):
        return problems
    bar = tqdm(problems, desc="verifiers", delay=5, leave=False)
    return Some(problems, [place for place, problem in enumerate(bar) if problem["verifier"] in wanted])


@dataclass
class Checked:
    """What the rows of a data set came to.

    texts: problems without pictures. places: the rows they come from. faults: (row, what is wrong with it).
    unwanted: how many rows of each verifier were left out because --verifiers does not name it.
    """

    texts: list[dict] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    faults: list[tuple[int, str]] = field(default_factory=list)
    unwanted: Counter = field(default_factory=Counter)


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


def mixed(spec: str, load_one: Callable[[str], Sequence]) -> Sequence[dict]:
    """The problems of one data set, of several with commas between, or of "none"; load_one reads a name@split:count.

    Raises UserError where a data set is named twice.
    """
    if spec == "none":
        return []
    parts = {}
    for one in spec.split(","):
        name = one.partition(":")[0]
        if name in parts:
            raise UserError(f"data set {spec} names {name} twice; give it once, with a higher count")
        parts[name] = load_one(one)
    if len(parts) == 1:
        return parts[name]
    return Mixture(parts)


def read_verifiers(names: str) -> set[str]:
    """The verifiers that --verifiers keeps: "all", or some names with commas between. UserError for an unknown one."""
    if names == "all":
        return set(VERIFIERS)
    kept = {name.strip() for name in names.split(",")}
    unknown = sorted(kept - set(VERIFIERS))
    if unknown:
        raise UserError(f"--verifiers {names}: {unknown[0]!r} is none of {', '.join(VERIFIERS)}")
    return kept


def load(spec: str, verifiers: Iterable[str] = VERIFIERS, skip_bad_rows: bool = False) -> tuple[Problems, Checked]:
    """A sequence of problems (dicts with id, images, problem, answer, verifier, and trace where there is one).

    spec: name@split or name@split:count, where name is a data set on the hub, a .json, .jsonl or .parquet file, or a
    folder that holds metadata.jsonl or parquet files; a file may go without a split. count takes the first rows.
    Rows with other verifiers are left out. Every row is checked here, pictures included, so that training does not stop
    at row 30,000: a fault raises UserError, naming row, column and value, or leaves the row out with skip_bad_rows.
    Returns what was left out too.
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
    checked = check_rows(rows, columns, root, spec=spec, verifiers=set(verifiers))
    if checked.faults and not skip_bad_rows:
        raise UserError(fault_line(checked.faults, spec))  # trap: broken problems (before any training)
    if not checked.texts:
        raise UserError(f"data set {spec}: no row is left; {len(checked.faults)} have faults, "
                        f"{checked.unwanted.total()} another verifier")
    texts = []
    for number, text in zip(checked.places, checked.texts, strict=True):
        texts.append({"id": f"{wanted.name}/{number}", **text})  # the data set's own id wins
    rows = rows.select(checked.places).select_columns(columns["images"])
    return Problems(texts, rows, columns["images"], root), checked


def note_left_out(run: Run, spec: str, checked: Checked):
    """Says what --verifiers left out of a data set, and keeps what --skip_bad_rows did for the list of skipped rows."""
    if checked.unwanted:
        counts = ", ".join(f"{count} {kind}" for kind, count in checked.unwanted.items())
        run.say(f"{spec}: --verifiers {run.args.verifiers} leaves out {counts}")
    run.skipped += [dict(dataset=spec, row=number, fault=fault) for number, fault in checked.faults]


def check_rows(
    rows: datasets.Dataset, columns: dict[str, str], root: Path | None, *, spec: str, verifiers: set[str],
) -> Checked:
    """Reads every row; faults are gathered, not raised."""
    checked = Checked()
    row_of = {}
    for number, row in enumerate(tqdm(rows, f"checking {spec}", disable=None)):
        try:
            text = read_row(row, columns)
            if text["verifier"] in set(VERIFIERS) - verifiers:
                checked.unwanted[text["verifier"]] += 1
                continue
            check_row(row, text, columns, root)
            first = row_of.setdefault(text.get("id", number), number)
            if first != number:  # the draws of an answer, and files of answers, go by the id
                raise RowFault(columns["id"], text["id"], f"row {first} has this id too; give each row its own")
        except RowFault as fault:
            checked.faults.append((number, str(fault)))
            continue
        checked.texts.append(text)
        checked.places.append(number)
    return checked


def fault_line(faults: list[tuple[int, str]], spec: str) -> str:
    """The first fault of a data set, and how many more there are, as one line."""
    numbers = [number for number, _ in faults]
    message = f"data set {spec}, row {numbers[0]} (counted from 0), {faults[0][1]}"
    if len(numbers) == 1:
        return f"{message} (--skip_bad_rows leaves it out)"
    return f"{message} (rows with faults: {len(numbers)}, {shorten(numbers)}; --skip_bad_rows leaves them out)"


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
            return load_from_hub(name, split)
        kind = LOADERS[files[0].suffix]
        return datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train")
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        # (StopIteration is what an empty file raises.)
        cause = "" if error.__cause__ is None else error.__cause__
        reason = shorten(f"{type(error).__name__}: {error}; {cause}", 300)
        where = name if split is None else f"{name}@{split}"
        raise UserError(f"data set {where} cannot be loaded ({reason}); check name and split, or the "
                        "file's syntax; without a network give a local file or folder") from error


def load_from_hub(name: str, split: str) -> datasets.Dataset:
    """A split of a data set on the hub. Where it has several parts, as AI4Math/MathVerse, that of the split's name."""
    try:
        return datasets.load_dataset(name, split=split)
    except ValueError as error:
        if "Config name is missing" not in str(error):
            raise
    return datasets.load_dataset(name, split, split=split)


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
    """{split: parquet files}: a file belongs to the split that its name begins with, or else to train.

    A shard of the hub, image-00000-of-00001.parquet, may name any split; other files those of SPLITS.
    """
    by_split = {}
    for file in sorted(folder.rglob("*.parquet")):
        split = first_word(file)
        is_shard = re.match(r"\w+-\d{5}-of-\d{5}", file.name) is not None
        if split not in SPLITS and not is_shard:
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
                            f"it has {shorten(', '.join(names), 300)}; rename one")
    return columns


def undecoded(feature: object) -> object:
    """The same feature with its pictures left as bytes, so that a broken one is met here, where its row is known."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)  # trap: broken problems
    if isinstance(feature, datasets.List):
        return datasets.List(undecoded(feature.feature), length=feature.length)
    return feature


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

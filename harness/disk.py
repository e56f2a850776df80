"""Writing to a disk that may be full: one line that says what needs how much, and nothing half-written.

    with room_for("the model", folder, bytes):    a full disk is a UserError, before anything is written where possible
    written_beside("the model", folder, bytes)    many files appear in a folder at once, or none
    write_atomically(path, text)                  a file is written whole, or the old one stays
    append_whole(path, text)                      lines are added whole, or not at all
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness.flags import UserError

from torch.distributed.checkpoint import CheckpointException

FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
TORN = "inline_container.cc"  # torch.save met an error of the disk, and says where in its own code instead of which


def as_size(count: int) -> str:
    """A number of bytes as one reads it: 94.1 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def free_bytes(folder: str | Path) -> int:
    """What is free on the disk of `folder`, or of the nearest folder above it that exists."""
    place = Path(os.path.abspath(folder))
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_room(what: str, folder: str | Path, needed: int, free: int):
    """UserError where `what` needs more bytes than are free."""
    if needed > free:
        raise UserError(f"{what} needs {as_size(needed)} in {folder}, and {as_size(free)} are free: make room, then "
                        "give the same command with --resume")


@contextlib.contextmanager
def room_for(what: str, folder: str | Path, needed: int) -> Iterator[None]:
    """Stands around what writes `needed` bytes into `folder`. UserError where they do not fit, or cannot be written.

    Libraries report a full disk in errors of their own, some without a number: it is known by the system's words.
    """
    check_room(what, folder, needed, free_bytes(folder))
    try:
        yield
    except (Exception, CheckpointException) as error:  # trap: full disk
        reasons = [words for words in FULL if words in str(error)]
        if isinstance(error, OSError):
            reasons.append(error.strerror or str(error))
        if TORN in str(error):
            reasons.append("the disk took only a part of it")
        if not reasons:
            raise
        raise UserError(f"{what} cannot be written to {folder}: {reasons[0]}; it needs {as_size(needed)}, and "
                        f"{as_size(free_bytes(folder))} are free: make room, then give the same command with "
                        "--resume") from None


def write_atomically(path: str | Path, text: str):
    """Writes `text` beside `path`, then renames: a kill leaves the old file or the new one, never half of one.

    UserError where it cannot be written, as on a full disk: then the old file stands.
    """
    path = Path(path)
    beside = Path(f"{path}.{os.getpid()}.tmp")  # with the process's number: two runs may write one file
    try:
        with room_for(path.name, path.parent, len(text)):
            beside.write_text(text)
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_rows(path: str | Path, rows: Iterable[dict]):
    """Writes a .jsonl file whole."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def append_whole(path: str | Path, text: str):
    """Adds `text` to a file. UserError where there is no room for all of it: then nothing is added."""
    path = Path(path)
    left = text.encode()
    with room_for(path.name, path.parent, len(left)), open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while left:
                left = left[file.write(left):]
        except OSError:
            file.truncate(size)
            raise


LAST = ("config.json", "preprocessor_config.json")  # with these a folder counts as a model, and a run as finished


@contextlib.contextmanager
def written_beside(what: str, folder: str | Path, needed: int) -> Iterator[Path]:
    """A folder beside, for files whose place is `folder`: they are moved there when all are written, LAST at the end.

    UserError where the disk is full: then nothing of them is in `folder`.
    """
    beside = Path(folder, "model.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with room_for(what, folder, needed):
            yield beside
            names = sorted(path.name for path in beside.iterdir())
            first = [name for name in names if name not in LAST]
            last = [name for name in names if name in LAST]
            for name in first + last:
                os.replace(beside / name, Path(folder, name))
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def discard(folder: str | Path, aside: str | Path):
    """Removes a folder. It is renamed to `aside` first: a kill leaves all of it under its name, or nothing."""
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def fingerprint(model: str) -> str:
    """Size and time of a local model's weights, so that answers of older weights are not taken for its own."""
    for name in ("model.safetensors.index.json", "model.safetensors"):
        path = Path(model, name)
        if path.exists():
            return f"{os.path.getsize(path)}-{os.path.getmtime(path)}"
    return model

"""Carries finished runs of a study to another machine, in a file that is small enough to be committed.

    python lab/study.py doubt --pack results/doubt-runs.tar.xz       packs what is finished, also while a study goes on
    python lab/study.py doubt --unpack results/doubt-runs.tar.xz     unpacks it, then goes on from there

A run is packed without its model and without its answers: what a table needs of them is counted before. A run
whose model another one still needs is made again there, and comes out the same.
"""

import io
import json
import tarfile
from pathlib import Path

from harness.flags import UserError
from lab import measures

from tqdm import tqdm

SMALL = ("args.json", "metrics.jsonl", "coverage.json")  # beside job.json, where there are such files


def pack(bench, file):
    """Writes all finished runs of a Bench into `file`. Returns how many."""
    finished = [(name, seed) for name, spec in bench.specs.items() for seed in spec.seeds if bench.job(name, seed)]
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:xz") as archive:
        for name, seed in tqdm(finished, desc="packed"):
            add_run(archive, bench, name, seed)
        for path in sorted({traces_of(bench, *run) for run in finished} - {None}):
            add(archive, bench, path)
    return len(finished)


def add_run(archive, bench, name, seed):
    """Puts the small files of a run into the archive, and what is counted in its answers. job.json comes last."""
    folder = bench.folder(name, seed)
    if bench.specs[name].script == "eval_passk.py":
        counts = json.dumps(measures.every_count(bench, name, seed), separators=(",", ":"))
        add(archive, bench, folder / measures.COUNTS, counts.encode())
    for small in SMALL:
        if (folder / small).exists():
            add(archive, bench, folder / small)
    add(archive, bench, folder / "job.json")


def traces_of(bench, name, seed):
    """The file of the traces that a run learned from, which the runs of a world share; None of most runs."""
    if not bench.specs[name].tokens:
        return None
    return bench.folder(name, seed).with_name(f"traces-{seed}.jsonl")


def add(archive, bench, path, content=None):
    """Puts a file of a run into the archive; content: what shall stand there, if it is no copy."""
    info = tarfile.TarInfo(str(path.relative_to(bench.place)))
    if content is None:
        content = path.read_bytes()
        info.mtime = path.stat().st_mtime
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def unpack(place, file):
    """Unpacks what was packed into the folder of runs, where there is nothing yet. Returns how many runs that were."""
    try:
        with tarfile.open(file) as archive:
            members = archive.getmembers()
            new = [member for member in members if is_new(place / member.name)]
            archive.extractall(place, new, filter="data")
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{file} cannot be unpacked ({error}); give a file that --pack wrote") from error
    return sum(member.name.endswith("job.json") for member in new)


def is_new(path):
    """Whether a packed file is of a run that is not here yet, or traces that are not."""
    return not path.exists() and not path.with_name("job.json").exists()

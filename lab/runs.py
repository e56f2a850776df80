"""Does many runs of the scripts, several at a time, each on a core of its own, and says how long the rest will take.

A run has a name, such as toy-see/vepo, and a seed; its folder is NAME-SEED. A run that is finished is not done again,
and one that was stopped goes on where it was. Beside what the script writes, a finished run's folder holds job.json:
its script and flags, how many seconds it took, and a hash of the code that made it.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

from harness.flags import UserError
from harness.run import write_atomically
from lab import logs
from lab.starter import Starter

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
POLL = 0.5  # seconds between two looks at a run
# What shapes the numbers of a run: the hash of the code is over these.
SOURCES = (
    "*.py", "forks/*.py", "harness/*.py", "tabletop/*.py", "tabletop/weights/*/*", "lab/oracle.py", "lab/coverage.py",
)

# One run or measurement. start: the run whose model it starts from ("": its flags name a model). needs: the runs that
# must be done before it. tokens: of sft.py, which trains on this many times the tokens that the first of `needs` did.
# seeds: which ones it is done with. last: the file that it writes last.
Spec = namedtuple("Spec", "script flags start needs tokens seeds last",
                  defaults=[{}, "", (), 0, (1,), "preprocessor_config.json"])

# --- how long it takes ------------------------------------------------------------------------------------------------

# Seconds on one core, before the first unit and for each unit. A unit is a step; of eval_passk.py and lab/coverage.py
# it is 512 answers. grpo.py's step was measured on one quiet core (results/busy.json), the others against it. They are
# a first guess, for --plan: what is finished corrects them.
SECONDS = {
    "grpo.py": (10, 4.2),
    "forks/gspo.py": (10, 4.2),
    "forks/dapo.py": (10, 4.5),
    "forks/dr_grpo.py": (10, 4.2),
    "vepo.py": (10, 5.0),
    "lab/oracle.py": (10, 5.0),
    "mupo.py": (10, 4.1),
    "opd.py": (12, 1.2),
    "sft.py": (12, 0.9),
    "eval_passk.py": (8, 2.2),
    "lab/coverage.py": (8, 5.0),
}

TRACES = 90  # seconds in which a teacher writes the traces of a seed, for the first sft.py that needs them


def units(specs, name):
    """How much work a run is: its steps; of an evaluation, its answers in units of 512."""
    spec = specs[name]
    if spec.tokens:  # as many tokens a step as the run that it is compared with
        return spec.tokens * units(specs, spec.needs[0])
    if "max_steps" in spec.flags:
        return spec.flags["max_steps"]
    answers = spec.flags.get("num_samples", 0) + 1  # and a greedy one
    if "num_generations" in spec.flags:
        answers = spec.flags["num_generations"]
    problems = sum(int(part.partition(":")[2]) for part in spec.flags["dataset"].split(","))
    return answers * problems / 512


def seconds(specs, name):
    """How long a run is expected to take on one core."""
    start, each = SECONDS[specs[name].script]
    if specs[name].tokens == 1:
        start += TRACES
    return start + each * units(specs, name)


class Pace:
    """How long everything takes, from SECONDS, corrected by what the finished runs of each script took."""

    def __init__(self, specs):
        self.specs = specs
        self.expected = {}  # script -> seconds that its finished runs should have taken
        self.taken = {}  # script -> seconds that they took

    def note(self, name, took):
        """Notes that a run took so many seconds."""
        script = self.specs[name].script
        self.expected[script] = self.expected.get(script, 0) + seconds(self.specs, name)
        self.taken[script] = self.taken.get(script, 0) + took

    def of(self, name):
        """The seconds that a run will take."""
        script = self.specs[name].script
        ratio = 1.0
        if script in self.expected:
            ratio = self.taken[script] / self.expected[script]
        return ratio * seconds(self.specs, name)


def core_seconds(specs):
    """The seconds that all runs are expected to take on one core."""
    return sum(len(spec.seeds) * seconds(specs, name) for name, spec in specs.items())


def plan(specs, jobs):
    """What would be run, as text: runs, units and hours for each script, and the sum."""
    lines = [f"{'script':18}{'runs':>6}{'units':>10}{'core hours':>12}"]
    for script in SECONDS:
        names = [name for name, spec in specs.items() if spec.script == script]
        if not names:
            continue
        count = sum(len(specs[name].seeds) for name in names)
        work = sum(len(specs[name].seeds) * units(specs, name) for name in names)
        took = sum(len(specs[name].seeds) * seconds(specs, name) for name in names)
        lines.append(f"{script:18}{count:6}{work:10.0f}{took / 3600:12.2f}")
    total = core_seconds(specs)
    runs = sum(len(spec.seeds) for spec in specs.values())
    lines.append(f"{'in all':18}{runs:6}{'':10}{total / 3600:12.2f}")
    lines.append(f"about {in_words(total / jobs)} with {jobs} at a time, a core each")
    return "\n".join(lines)


def in_words(some_seconds):
    """A time as people say it: 2 h 5 min."""
    minutes = max(1, round(some_seconds / 60))
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# --- doing them -------------------------------------------------------------------------------------------------------


def usable_cores():
    """The cores that this process may use; a None for each where the system cannot pin a run to one."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return [None] * os.cpu_count()


def code_hash():
    """A hash of the code and the shipped weights that shape a run's numbers."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(str(path.relative_to(ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Bench:
    """Does the runs `specs`, {name: Spec}, in folders of `place`, several at a time."""

    def __init__(self, place, specs, jobs):
        cores = usable_cores()[:jobs]
        self.place = Path(place)
        self.specs = specs
        self.jobs = len(cores)
        self.seats = queue.Queue()  # those that are free, as (number, core)
        for seat in enumerate(cores):
            self.seats.put(seat)
        self.starters = {}  # seat -> who starts runs there, from the first run on
        self.pace = Pace(specs)
        self.steps = {}  # (name, seed) -> steps done, of the runs that are under way
        self.running = set()
        self.lock = threading.Lock()
        self.stopped = False

    # Where a run is and what it calls:

    def folder(self, name, seed):
        return self.place / f"{name}-{seed}"

    def job(self, name, seed):
        """What job.json says of a run; None if the run is not finished."""
        path = self.folder(name, seed) / "job.json"
        return json.loads(path.read_text()) if path.exists() else None

    def command(self, name, seed):
        """(script, flags) of a run. What it needs must be done."""
        spec = self.specs[name]
        flags = dict(spec.flags, seed=seed)
        if spec.start:
            flags["model"] = str(self.folder(spec.start, seed))
        if spec.tokens:
            scored = tokens_of(logs.load(self.folder(spec.needs[0], seed), "metrics.jsonl", ["step"]))
            flags["max_tokens"] = spec.tokens * scored
            flags["traces"] = str(self.folder(name, seed).with_name(f"traces-{seed}.jsonl"))
        return spec.script, flags

    def shown(self, name, seed):
        """The command of a run for a reader: its paths begin at the repository's root, wherever the run was made."""
        script, flags = self.command(name, seed)
        words = [script, *(f"--{key}" if value is True else f"--{key} {value}" for key, value in flags.items())]
        return " ".join(words).replace(f"{self.place}/", f"runs/{self.place.name}/")

    # Doing them:

    def make(self, name, seed, needs=()):
        """Does one run unless it is done. `needs` are futures of the runs before it. Raises UserError if it fails."""
        for need in needs:
            need.result()
        script, flags = self.command(name, seed)
        folder = self.folder(name, seed)
        done = self.job(name, seed)
        made = None  # when it was first made, if it was
        if done is not None:
            self.check_done(name, seed, flags, done)
            if done["whole"]:
                self.pace.note(name, done["seconds"])
            if not self.is_missed(name, seed):
                return
            made = (folder / "job.json").stat().st_mtime
            shutil.rmtree(folder)
        if (folder / self.specs[name].last).exists():  # finished, and stopped before that was written down
            shutil.rmtree(folder)
        whole = not folder.exists()
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = [script, *argv_of(flags), f"--output_dir={folder}", "--resume"]
        code = code_hash()
        seat = self.seats.get()
        began = time.monotonic()
        status = self.run(words, (name, seed), seat)
        took = round(time.monotonic() - began, 1)
        self.seats.put(seat)
        if status or not (folder / self.specs[name].last).exists():
            said = last_words(folder.with_name(f"{folder.name}.log"))
            raise UserError(f"{name}-{seed}: {script} ended with status {status}, saying: {said}")
        if whole:
            self.pace.note(name, took)
        row = dict(script=script, flags=flags, seconds=took, whole=whole, code=code)
        write_atomically(folder / "job.json", json.dumps(row, indent=1) + "\n")
        if made is not None:  # it came out the same: what was made from it is not out of date
            os.utime(folder / "job.json", (made, made))

    def is_missed(self, name, seed):
        """Whether a finished run is here without its model (lab/carry.py) though a run still to be made starts from it.
        """
        if (self.folder(name, seed) / self.specs[name].last).exists():
            return False
        followers = [other for other, spec in self.specs.items() if spec.start == name and seed in spec.seeds]
        return any(self.job(other, seed) is None or self.is_missed(other, seed) for other in followers)

    def run(self, words, key, seat):
        """Runs one script at a seat until it ends, and counts its steps meanwhile. Returns its exit status."""
        folder = self.folder(*key)
        metrics = folder / "metrics.jsonl"
        process = self.start(words, folder.with_name(f"{folder.name}.log"), seat)
        while process.poll() is None:
            time.sleep(POLL)
            self.steps[key] = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        self.running.discard(process)
        self.steps.pop(key, None)
        return process.returncode

    def start(self, words, log, seat):
        """Starts a script on one core: without that, a run takes all the cores that it may use."""
        environment = os.environ | dict(OMP_NUM_THREADS="1", TQDM_MININTERVAL="5")  # trap: busy cores
        log.write_text("")
        if seat not in self.starters:
            _, core = seat
            self.starters[seat] = Starter(core)
        with self.lock:
            if self.stopped:
                raise UserError("stopped")
            process = self.starters[seat].start(dict(
                command=words, environment=environment, cwd=str(ROOT), stdout=str(log), stderr=str(log)))
            self.running.add(process)
        return process

    def stop(self):
        """Ends the runs that are under way: nobody would look after them. They can continue from their checkpoints."""
        with self.lock:
            self.stopped = True
        left = list(self.running)
        for process in left:
            process.terminate()
        for process in left:  # each ends after its present step
            process.wait()

    def make_all(self, desc="runs"):
        """Does all runs with all their seeds. UserError where another process is doing runs in the same folder."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # however it is stopped, it stops its runs
        with alone_in(self.place):
            self.make_each(desc)

    def make_each(self, desc):
        pool = concurrent.futures.ThreadPoolExecutor(self.jobs)
        futures = {}
        for name, spec in self.specs.items():
            for seed in spec.seeds:  # first in, first out: what a run needs is done or being done when its turn comes
                needs = [futures[need, seed] for need in spec.needs]
                futures[name, seed] = pool.submit(self.make, name, seed, needs)
        try:
            self.wait_for(futures, desc)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            self.stop()
            raise
        finally:
            for starter in self.starters.values():
                starter.end()
            self.starters.clear()
        for name, spec in self.specs.items():
            for seed in spec.seeds[1:]:
                self.check_alike(name, spec.seeds[0], seed)

    def wait_for(self, futures, desc):
        """Waits for all {(name, seed): future}, with a bar. Raises what the first failed run raised."""
        left = set(futures.values())
        names = {future: name for (name, _), future in futures.items()}
        show = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
        with tqdm(total=len(left), desc=desc, bar_format=show) as bar:
            while left:
                done, left = concurrent.futures.wait(left, 2, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    future.result()
                bar.set_postfix_str(self.progress([names[future] for future in left]), refresh=False)
                bar.update(len(done))
                bar.refresh()  # tqdm shows nothing for a long time where runs that were done before went by at once

    def progress(self, names):
        """How long the runs `names` will still take, and which steps are being done."""
        under_way = dict(self.steps)
        left = sum(self.pace.of(name) for name in names)
        for (name, _), step in under_way.items():
            left -= self.pace.of(name) * min(1, step / units(self.specs, name))
        steps = ", ".join(f"{name}-{seed} step {step}" for (name, seed), step in sorted(under_way.items()))
        return f"about {in_words(left / self.jobs)} left, {steps}" if names else "done"

    # Checking that a finished run is the one that would be run now:

    def check_done(self, name, seed, flags, done):
        """Raises UserError if a finished run had other flags, or if a run that it needs was made after it."""
        folder = self.folder(name, seed)
        for key in sorted({*flags, *done["flags"]}):
            before = done["flags"].get(key)
            now = flags.get(key)
            if key == "traces" or (key == "model" and self.specs[name].start):  # these hold paths
                continue
            if before != now:
                raise UserError(f"{folder} was run with --{key} {before}, now it would be {now}; move it away")
        for need in self.specs[name].needs:
            needed = self.folder(need, seed)
            if (needed / "job.json").stat().st_mtime > (folder / "job.json").stat().st_mtime:
                raise UserError(f"{folder} is older than {needed}, which it needs; move it away too")

    def check_alike(self, name, first_seed, seed):
        """Raises UserError unless a run had the same settings under both seeds, also where no flag was given."""
        if not (self.folder(name, seed) / "args.json").exists():  # eval_passk.py writes none
            return
        own = {"seed", "model", "output_dir", "traces", "max_tokens", "resume"}  # each seed has its own
        if self.specs[name].tokens:
            own.add("max_steps")  # of SFT, follows from max_tokens
        first = logs.load_args(self.folder(name, first_seed))
        other = logs.load_args(self.folder(name, seed))
        for key in sorted({*first, *other} - own):
            if first.get(key) != other.get(key):
                raise UserError(
                    f"{self.folder(name, seed)} was run with --{key} {other.get(key)}, "
                    f"seed {first_seed} with {first.get(key)}; move one of them away")


@contextlib.contextmanager
def alone_in(place):
    """Keeps other processes from doing runs in this folder meanwhile: two would write into the same files.

    The system gives up the lock when this process ends, however it ends.
    """
    place.mkdir(parents=True, exist_ok=True)
    with open(place / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{place}: another process is doing runs there; wait until it ends, or stop it") from None
        yield


def argv_of(flags):
    """Flags as the words of a command line. A flag whose value is True is written without a value."""
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in flags.items()]


def last_words(log):
    """The line of a failed run's log that says why it failed."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error")]  # a progress bar may come after the error
    if errors:
        return errors[-1][-200:]
    return lines[-1][-200:] if lines else ""


def tokens_of(rows):
    """The tokens that a run trained on, from the rows of its metrics.jsonl."""
    return int(sum(row.get("tokens", 0) for row in rows))

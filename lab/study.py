"""The papers' claims, put to the test on the tabletop, over several seeds.

    python lab/study.py stage1                     which warm start, and what it leaves behind (arXiv 2606.09059)
    python lab/study.py vepo                       which tokens to credit (arXiv 2606.03937)
    python lab/study.py mupo                       what becomes of the many ways of thinking (arXiv 2604.00479)
    python lab/study.py stage1 --seeds 1 --quick   a rough answer in ten minutes; in fifteen the first time, when the
                                                   two models of the tabletop are built

Every run is a call of one of this repository's scripts, with the flags below, in its own folder of runs/study.
A run that is finished is not run again; one that was stopped continues where it was. At the end the study writes
results/STUDY.json and its pictures, and gives a verdict on each claim:

    holds   the whole 95% interval lies on the claimed side of the bound
    fails   the whole interval lies on the other side
    open    the bound lies inside the interval

Every model answers 16 times each of 128 problems of toy@study, which nothing else in this repository looks at, and of
128 problems of toy@ood. All seeds start from the same base and answer the same problems. So an interval comes from
10,000 draws of a paired, crossed bootstrap: it draws seeds and problems with replacement, and takes the same problems
for every seed drawn and for every arm. (Drawing problems anew for each seed would give narrower intervals, and wrong
ones where a problem suits one arm whatever the seed.) Five seeds are few: percentile intervals over five values are too
narrow, so read a bare "holds" as a hint. One seed gives no verdict: every claim stays open.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks in lab/, not in the root

import eval_passk
from harness.embedding import ngrams, reasoning
from harness.flags import Parser, UserError, at_least
from harness.run import check_writable, write_atomically
from lab import report
from tabletop import build

import numpy as np
from tqdm import tqdm

# --- what is run: fixed on toy@test with seed 0, before anyone looked at toy@study

IN = "toy@study"  # the held-out problems in domain
OUT = "toy@ood"  # and out of domain
COUNT = 128  # problems of each
SAMPLES = 16  # answers to a problem
KS = (1, 2, 4, 8, 16)
POLL = 1.0  # seconds between two looks at a run
QUICK = {"grpo.py": 15, "vepo.py": 15, "mupo.py": 15, "opd.py": 20}  # steps; sft.py's follow from opd.py's

# All warm starts have the same problems, batch and schedule; they differ in what is learned from the problems.
WARM = dict(
    dataset="toy@train:1024",
    prompts_per_step=64,
    learning_rate=1.2e-3,
    lr_scheduler_type="cosine",
    warmup_steps=10,
)
OPD = WARM | dict(num_generations=1, max_steps=60)
SFT = WARM | dict(teacher="toy-teacher", held_out_traces=0)
OVERTRAINED = 10  # times the steps of the early-stopped run

# A run. start: the run that it starts from ("": the base). needs: the runs that must be done before it.
# tokens: of SFT; it trains on this many times the tokens that the teacher scored for OPD.
Spec = namedtuple("Spec", "script flags start needs tokens", defaults=[{}, "", (), 0])


def then_grpo(start):
    """GRPO from the model that the run `start` left."""
    return Spec("grpo.py", dict(max_steps=50), start=start, needs=(start,))


RUNS = {
    # Every arm has the paper's 12 answers to a problem. grpo.py is what --select all would be, to the last bit.
    "grpo12": Spec("grpo.py", dict(num_generations=12)),
    "entropy": Spec("vepo.py", dict(num_generations=12, select="entropy")),
    "vepo": Spec("vepo.py", dict(num_generations=12)),
    # Both arms have mupo.py's 15 answers and ε_high 0.28. One cluster is GRPO.
    "grpo15": Spec("mupo.py", dict(clusters=1, max_steps=60)),
    "mupo": Spec("mupo.py", dict(max_steps=60)),
    "opd": Spec("opd.py", OPD),
    "sft": Spec("sft.py", SFT, needs=("opd",), tokens=1),
    # These two wait for sft too: it has the teacher write the traces that all three learn.
    "overtrained": Spec("sft.py", SFT, needs=("opd", "sft"), tokens=OVERTRAINED),
    "soft": Spec("sft.py", SFT | dict(soft_targets=True), needs=("opd", "sft"), tokens=1),
    "forward": Spec("opd.py", OPD | dict(estimator="forward")),
    "opd-grpo": then_grpo("opd"),
    "sft-grpo": then_grpo("sft"),
    "overtrained-grpo": then_grpo("overtrained"),
}
WARM_STARTS = ("opd", "sft", "overtrained")
AT_THE_START = ("base", *WARM_STARTS, "forward", "soft")  # what stage1 compares before RL
AFTER_RL = tuple(f"{start}-grpo" for start in WARM_STARTS)
STUDIES = {
    "stage1": (*AT_THE_START, *AFTER_RL),
    "vepo": ("base", "grpo12", "entropy", "vepo"),
    "mupo": ("base", "grpo15", "mupo"),
}


def closure(name):
    """A run and all runs that it needs; nothing for the base."""
    if name not in RUNS:
        return set()
    found = {name}
    for need in RUNS[name].needs:
        found |= closure(need)
    return found


def runs_of(names):
    """All runs that the models `names` need, in the order of RUNS, which puts no run before one that it needs."""
    wanted = set()
    for name in names:
        wanted |= closure(name)
    return [name for name in RUNS if name in wanted]


def usable_cores():
    """The cores that this process may use; a None for each where the system cannot pin a run to one."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return [None] * os.cpu_count()


def as_text(ks):
    """The numbers k as eval_passk.py takes them."""
    return ",".join(map(str, ks))


class Bench:
    """Does the runs, several at a time, each on a core of its own, and shows how far they are."""

    def __init__(self, place, quick, jobs):
        cores = usable_cores()[:jobs]
        self.place = Path(place)
        self.quick = quick
        self.jobs = len(cores)
        self.cores = queue.Queue()  # those that are free
        for core in cores:
            self.cores.put(core)
        self.steps = {}  # folder's name -> steps done, of the runs that are under way
        self.running = set()
        self.lock = threading.Lock()
        self.stopped = False

    # A run or a measurement (eval-NAME) has a name and a seed. Where it is and what it calls:

    def folder(self, name, seed):
        return self.place / f"{name}-{seed}"

    def last_file(self, name, seed):
        """The file that a run or a measurement writes last: if it is there, all of it is there."""
        last = "eval.json" if name.startswith("eval-") else "preprocessor_config.json"
        return self.folder(name, seed) / last

    def needs(self, name):
        """The runs that must be done before a run or the measurement of one."""
        if name in RUNS:
            return RUNS[name].needs
        run = name.removeprefix("eval-")
        return (run,) if run in RUNS else ()

    def model(self, name, seed):
        """What --model is to be, for the model that a run left or for the base."""
        if name in ("", "base"):
            return "toy"
        return str(self.folder(name, seed))

    def command(self, name, seed):
        """(script, flags) of a run or of a measurement."""
        if name.startswith("eval-"):
            return "eval_passk.py", self.measurement_flags(name, seed)
        spec = RUNS[name]
        flags = dict(model=self.model(spec.start, seed), eval_dataset="none", seed=seed) | spec.flags
        if self.quick and spec.script in QUICK:
            flags["max_steps"] = QUICK[spec.script]
        if spec.tokens:
            rows = report.load(self.folder("opd", seed), "metrics.jsonl", ["step"])
            flags["max_tokens"] = spec.tokens * tokens_of(rows)
            flags["traces"] = str(self.place / f"traces-{seed}.jsonl")
        return spec.script, flags

    def measurement_flags(self, name, seed):
        count = 32 if self.quick else COUNT
        return dict(
            model=self.model(name.removeprefix("eval-"), seed),
            dataset=f"{IN}:{count},{OUT}:{count}",
            num_samples=SAMPLES,
            seed=seed,
            ks=as_text(KS),
        )

    # Doing them:

    def make(self, name, seed, needs=()):
        """Does one run unless it is done. `needs` are futures of the runs before it. Raises UserError if it fails."""
        for need in needs:
            need.result()
        script, flags = self.command(name, seed)
        if self.last_file(name, seed).exists():
            self.check_done(name, seed, flags)
            return
        folder = self.folder(name, seed)
        log = folder.with_name(f"{folder.name}.log")
        self.place.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, script, *argv_of(flags), f"--output_dir={folder}", "--resume"]
        core = self.cores.get()
        status = self.run(words, folder, log, core)
        self.cores.put(core)
        if status:
            said = last_words(log)
            raise UserError(f"{folder.name}: {script} ended with status {status}, saying: {said}")
        if not self.last_file(name, seed).exists():
            raise UserError(f"{folder.name}: {script} was asked to end before its last step; the same command goes on")

    def run(self, words, folder, log, core):
        """Runs one command on `core` until it ends, and counts its steps meanwhile. Returns its exit status."""
        metrics = folder / "metrics.jsonl"
        with open(log, "w") as output:
            process = self.start(words, output, core)
            while process.poll() is None:
                time.sleep(POLL)
                self.steps[folder.name] = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        self.running.discard(process)
        self.steps.pop(folder.name, None)
        return process.returncode

    def start(self, words, output, core):
        """Starts a process on one core: without that, a run takes all the cores that it may use."""
        environment = os.environ | dict(OMP_NUM_THREADS="1", TQDM_MININTERVAL="5")  # trap: busy cores
        with self.lock:
            if self.stopped:
                raise UserError("stopped")
            process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)
            self.running.add(process)
        if core is not None:
            os.sched_setaffinity(process.pid, [core])
        return process

    def stop(self):
        """Ends the runs that are under way: nobody would look after them. They can continue from their checkpoints."""
        with self.lock:
            self.stopped = True
        left = list(self.running)
        for process in left:
            process.terminate()
        for process in left:  # each ends behind its present step
            process.wait()

    def make_all(self, names, seeds):
        """Does all runs that the models `names` need, for all seeds, and a measurement of each of these models."""
        order = runs_of(names)
        pool = concurrent.futures.ThreadPoolExecutor(self.jobs)
        futures = {}
        for name in [*order, *(f"eval-{name}" for name in names)]:
            for seed in seeds:  # first in, first out: what a run needs is done or being done when its turn comes
                needs = [futures[need, seed] for need in self.needs(name)]
                futures[name, seed] = pool.submit(self.make, name, seed, needs)
        try:
            self.wait_for(set(futures.values()))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            self.stop()
            raise
        self.check_seeds(order, seeds)

    def wait_for(self, left):
        """Waits for all of these futures, with a bar that shows them. Raises what the first failed run raised."""
        with tqdm(total=len(left), desc="runs") as bar:
            while left:
                done, left = concurrent.futures.wait(left, 2, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    future.result()
                bar.update(len(done))
                bar.set_postfix_str(", ".join(f"{name} step {n}" for name, n in sorted(self.steps.items())))

    # Checking that a finished run is the one that would be run now:

    def check_done(self, name, seed, flags):
        """Raises UserError if a finished run had other flags, or if a run that it needs was made after it."""
        done = self.last_file(name, seed)
        for before in self.flags_of(name, seed):
            self.check_flags(name, seed, flags, before)
        for need in self.needs(name):
            if self.last_file(need, seed).stat().st_mtime > done.stat().st_mtime:
                needed = self.folder(need, seed)
                raise UserError(f"{done.parent} is older than {needed}, which it needs; move it away too")

    def check_flags(self, name, seed, flags, before):
        """Raises UserError if a run had other flags `before` than the `flags` it would have now."""
        for key, value in flags.items():
            if key in ("traces", "model"):  # these hold paths
                continue
            if str(before.get(key, value)) != str(value):
                raise UserError(
                    f"{self.folder(name, seed)} was run with --{key} {before[key]}, now it would be {value}; "
                    "move it away")

    def flags_of(self, name, seed):
        """The flags that a finished run was started with: a list of one. For a measurement: what its results say."""
        folder = self.folder(name, seed)
        if not name.startswith("eval-"):
            return report.load(folder, "args.json", ["seed"])
        parts = json.loads((folder / "eval.json").read_text())
        datasets = ",".join(dict.fromkeys(part["dataset"] for part in parts))
        return [dict(dataset=datasets, seed=part["seed"], num_samples=part["n"], ks=as_text(part["ks"]))
                for part in parts]

    def check_seeds(self, names, seeds):
        """Raises UserError unless each run had the same settings under every seed, also where no flag was given."""
        for name in names:
            for seed in seeds[1:]:
                self.check_alike(name, seeds[0], seed)

    def check_alike(self, name, first_seed, seed):
        own = {"seed", "model", "output_dir", "traces", "max_tokens"}  # each seed has its own
        if RUNS[name].tokens:
            own.add("max_steps")  # of SFT, follows from max_tokens
        first = self.flags_of(name, first_seed)[0]
        other = self.flags_of(name, seed)[0]
        for key in sorted({*first, *other} - own):
            if first.get(key) != other.get(key):
                raise UserError(
                    f"{self.folder(name, seed)} was run with --{key} {other.get(key)}, "
                    f"seed {first_seed} with {first.get(key)}; move one of them away")


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


# --- what is measured


def diversity(texts):
    """Mean pairwise cosine distance between the reasoning of several answers, as bags of n-grams, as in mupo.py."""
    e_GD = ngrams([reasoning(text) for text in texts])
    pairs = len(texts) * (len(texts) - 1)
    return float((1 - e_GD @ e_GD.T).sum() / pairs)


def measured(bench, name, seed):
    """{data set: {measure: (P,)}} of one model, problems in the order of their ids."""
    rows = {}  # data set -> problem id -> {measure: value}
    for row in report.load(bench.folder(f"eval-{name}", seed), "samples.jsonl", ["id", "right", "texts"]):
        data = row["dataset"].partition(":")[0]
        values = eval_passk.measures(row, KS) | dict(diversity=diversity(row["texts"]))
        rows.setdefault(data, {})[row["id"]] = values
    found = {}
    for data, problems in rows.items():
        order = sorted(problems)
        found[data] = {key: np.array([problems[id][key] for id in order]) for key in problems[order[0]]}
    return found


def measure_all(bench, names, seeds):
    """{model: {data set: {measure: (S, P)}}}: seeds by problems."""
    table = {}
    for name in names:
        each = [measured(bench, name, seed) for seed in tqdm(seeds, desc=f"measures of {name}", delay=5)]
        table[name] = {}
        for data, measures in each[0].items():
            table[name][data] = {key: np.stack([one[data][key] for one in each]) for key in measures}
    return table


def along(bench, name, seeds, key, steps=slice(None)):
    """(S, 1): the mean of a metric over some training steps, counted from 0: one number per seed."""
    means = []
    for seed in seeds:
        rows = report.load(bench.folder(name, seed), "metrics.jsonl", ["step"])
        values = [row[key] for row in rows if key in row]
        means.append([np.mean(values[steps])])
    return np.array(means)


def interval(statistic, *tables_SP, draws=10_000, seed=0):
    """[value, low, high] of statistic(*means): its 95% percentile interval when seeds and problems are drawn anew.

    tables_SP all have the shape (S, P); P is 1 where a seed has one number. statistic takes arrays of means.
    """
    S, P = tables_SP[0].shape
    random = np.random.default_rng(seed)
    weight_DS = random.multinomial(S, np.full(S, 1 / S), draws) / S
    weight_DP = random.multinomial(P, np.full(P, 1 / P), draws) / P
    drawn = statistic(*[((weight_DS @ table_SP) * weight_DP).sum(1) for table_SP in tables_SP])
    value = statistic(*[np.array([table_SP.mean()]) for table_SP in tables_SP])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return [float(value[0]), float(low), float(high)]


def mean(value):
    return value


def difference(one, other):
    return one - other


def share_of_fall(start, early, end):
    """How much of the way from start to end is gone early."""
    return (start - early) / (start - end)


def learned_from(bench, seeds):
    """For each seed: the steps and tokens that each warm start trained on, and what became of the teacher's answers."""
    found = []
    for seed in seeds:
        steps, tokens = {}, {}
        for name in AT_THE_START[1:]:
            rows = report.load(bench.folder(name, seed), "metrics.jsonl", ["step"])
            steps[name] = len(rows)
            tokens[name] = tokens_of(rows)
        rows = report.load(bench.place, f"traces-{seed}.jsonl", ["id", "text", "right"])
        right = [row for row in rows if row["right"]]
        kept = {(row["id"], row["text"]) for row in right}
        found.append(dict(
            seed=seed,
            steps=steps,
            tokens=tokens,
            answers=len(rows),
            right=len(right),
            kept=len(kept),
            problems=len({id for id, _ in kept}),
        ))
    return found


def contrasts(table):
    """From OPD to early-stopped SFT in three steps of one change each: [{from, to, measure, value}], at the start."""
    found = []
    for one, other in itertools.pairwise(("opd", "forward", "soft", "sft")):
        for key in ("pass@1", "pass@16", "distinct", "entropy"):
            found.append({"from": one, "to": other, "measure": key, "value": gap(table, key, other, one)})
    return found


# stage1 compares whose answers are read, what is asked of each token, and for how long. These differences remain:
DIFFERENCES = [
    "SFT, early-stopped, over-trained and on soft targets, learns from the teacher's answers that are right and "
    "well-formed; OPD sees no gold answer and learns on right and wrong ones.",
    "SFT's answers are drawn once, at most four to a problem, without repeats, and read several times over; OPD draws "
    "new ones at every step. So SFT sees problems with more different right answers more often, and a few never.",
    "Equal, to within a step, are the tokens that are trained on, but for over-trained SFT, which has ten times as "
    "many. Not counted: the teacher's own sampling for SFT, four answers to each problem, and the student's for OPD.",
    "Between OPD and early-stopped SFT stand two more: OPD with the forward KL changes OPD's direction of the KL "
    "alone; SFT on soft targets changes whose answers are read, as above; SFT then asks for one word, not for a "
    "distribution.",
    "All have OPD's batch, learning rate and schedule; sft.py's own tabletop rate is a quarter of it. Over-trained SFT "
    "has the same schedule drawn out to ten times the steps.",
    "These two are measured at the start only, and no claim is about them. OPD with the forward KL was added after the "
    "verdicts had been seen.",
]

# --- what is claimed

MARGIN = 0.02  # two points of pass@k count as the same
# value: [value, low, high]; side: "above" or "below" the bound, or "within" plus or minus the bound
Test = namedtuple("Test", "what value side bound")


def judge(test):
    """holds, fails or open: where the interval lies."""
    low, high = test.value[1:]
    if test.side == "within":
        holds = -test.bound < low and high < test.bound
        fails = high < -test.bound or low > test.bound
    elif test.side == "below":
        holds = high < test.bound
        fails = low > test.bound
    else:
        holds = low > test.bound
        fails = high < test.bound
    if holds:
        return "holds"
    return "fails" if fails else "open"


def verdict(tests):
    """A claim of several tests holds if all of them do and fails if one does."""
    found = [judge(test) for test in tests]
    if "fails" in found:
        return "fails"
    return "open" if "open" in found else "holds"


def gap(table, key, one, other, data=IN):
    """The interval of the difference between two models, one minus other, in one measure."""
    return interval(difference, table[one][data][key], table[other][data][key])


# The claims of a study: {id: (the claim, its Tests)}.


def stage1_claims(table, bench, seeds):
    forgets = "over-trained SFT loses out of domain, early-stopped SFT does not"
    return {
        "S1": ("OPD enters RL with a higher entropy than either SFT, and keeps it", entropy_tests(table, bench, seeds)),
        "S2": ("at the start OPD has a higher pass@16 and more distinct answers than either SFT", start_tests(table)),
        "S3": ("after RL the three starts end together", end_tests(table)),
        "S4 at the start": (forgets, out_of_domain_tests(table, "overtrained", "sft")),
        "S4 after RL": (forgets, out_of_domain_tests(table, "overtrained-grpo", "sft-grpo")),
    }


def entropy_tests(table, bench, seeds):
    tests = []
    for other in ("sft", "overtrained"):
        value = gap(table, "entropy", "opd", other)
        tests.append(Test(f"entropy at the start, opd - {other}", value, "above", 0))
    for other in ("sft", "overtrained"):
        ours = along(bench, "opd-grpo", seeds, "entropy")
        theirs = along(bench, f"{other}-grpo", seeds, "entropy")
        value = interval(difference, ours, theirs)
        tests.append(Test(f"mean entropy through RL, opd - {other}", value, "above", 0))
    return tests


def start_tests(table):
    tests = []
    for key in ("pass@16", "distinct"):
        for other in ("sft", "overtrained"):
            value = gap(table, key, "opd", other)
            tests.append(Test(f"{key} at the start, opd - {other}", value, "above", 0))
    return tests


def end_tests(table):
    tests = []
    for key in ("pass@1", "pass@16"):
        for one, other in itertools.combinations(WARM_STARTS, 2):
            value = gap(table, key, f"{one}-grpo", f"{other}-grpo")
            tests.append(Test(f"{key} after RL, {one} - {other}", value, "within", MARGIN))
    return tests


def out_of_domain_tests(table, loses, keeps):
    """That the model `loses` is below the base out of domain, and the model `keeps` is not."""
    lost = gap(table, "pass@1", loses, "base", data=OUT)
    kept = gap(table, "pass@1", keeps, "base", data=OUT)
    return [
        Test(f"pass@1 out of domain, {loses} - base", lost, "below", 0),
        Test(f"pass@1 out of domain, {keeps} - base", kept, "above", -MARGIN),
    ]


def vepo_claims(table, bench, seeds):
    missed = interval(mean, along(bench, "vepo", seeds, "missed_by_entropy"))
    selections = gap(table, "pass@1", "vepo", "entropy")
    entropy = gap(table, "pass@1", "entropy", "grpo12")
    vepo = gap(table, "pass@1", "vepo", "grpo12")
    return {
        "E1": ("entropy selection misses a large share of the vision-sensitive tokens", [
            Test("share of the top 20% by JSD outside the top 20% by entropy", missed, "above", 1 / 3),
        ]),
        "E2": ("VEPO beats top-entropy selection", [
            Test("pass@1, vepo - entropy", selections, "above", 0),
        ]),
        "E4": ("top entropy alone is no better than all tokens", [
            Test("pass@1, entropy - all tokens", entropy, "below", 0.01),
        ]),
        "VEPO against GRPO": ("VEPO beats crediting all tokens", [
            Test("pass@1, vepo - all tokens", vepo, "above", 0),
        ]),
    }


def mupo_claims(table, bench, seeds):
    return {
        "M1": ("GRPO's diversity of reasoning collapses early", collapse_tests(bench, seeds)),
        "M2": ("base models overtake RL models as k grows", [
            Test("pass@1, grpo - base", gap(table, "pass@1", "grpo15", "base"), "above", 0),
            Test("pass@16, base - grpo", gap(table, "pass@16", "base", "grpo15"), "above", 0),
        ]),
        "M3": ("MUPO keeps more diversity than GRPO and a higher pass@k at equal pass@1", [
            Test("diversity, mupo - grpo", gap(table, "diversity", "mupo", "grpo15"), "above", 0),
            Test("pass@4, mupo - grpo", gap(table, "pass@4", "mupo", "grpo15"), "above", 0),
            Test("pass@1, mupo - grpo", gap(table, "pass@1", "mupo", "grpo15"), "within", MARGIN),
        ]),
    }


def collapse_tests(bench, seeds):
    steps = len(report.load(bench.folder("grpo15", seeds[0]), "metrics.jsonl", ["step"]))
    fifth = steps // 5
    start = along(bench, "grpo15", seeds, "diversity", steps=slice(0, 2))
    early = along(bench, "grpo15", seeds, "diversity", steps=slice(fifth - 2, fifth + 3))
    end = along(bench, "grpo15", seeds, "diversity", steps=slice(steps - 5, None))
    fall = interval(difference, start, end)
    share = interval(share_of_fall, start, early, end)
    return [
        Test("fall of diversity over the run", fall, "above", 0),
        Test("share of the fall in the first fifth", share, "above", 0.5),
    ]


# --- what is shown

NAMES = {  # what a run is called in a picture
    "base": "base",
    "opd": "OPD",
    "sft": "SFT, early-stopped",
    "overtrained": "SFT, over-trained",
    "forward": "OPD, forward KL",
    "soft": "SFT, soft targets",
    "grpo12": "all tokens (GRPO)",
    "entropy": "top entropy",
    "vepo": "VEPO",
    "grpo15": "GRPO",
    "mupo": "MUPO",
}
COLOURS = {  # whose colour of report.PALETTE it has
    "base": "base",
    "opd": "opd",
    "sft": "sft",
    "overtrained": "vepo",
    "soft": "other",
    "forward": "mupo",
    "grpo12": "grpo",
    "entropy": "sft",
    "vepo": "vepo",
    "grpo15": "grpo",
    "mupo": "mupo",
}


def rows_of(table, names, key, data=IN):
    """The lines of report.dots: one model each, with its interval, and the one after RL if there is one."""
    rows = []
    for name in names:
        intervals = [interval(mean, table[one][data][key]) for one in (name, f"{name}-grpo") if one in table]
        rows.append((NAMES[name], report.PALETTE[COLOURS[name]], intervals))
    return rows


def draw_curves(bench, seeds, names, path, *, keys, headline):
    """Draws metrics of several runs over the training steps; returns the path. A run after RL is named by its start."""
    runs, colours = {}, {}
    for name in names:
        start = name.removesuffix("-grpo")
        runs[NAMES[start]] = [bench.folder(name, seed) for seed in seeds]
        colours[NAMES[start]] = report.PALETTE[COLOURS[start]]
    return report.overlay(runs, path, keys=keys, headline=headline, colours=colours)


def pictures(study, table, bench, seeds, *, place, verdicts):
    """Draws a study; returns the paths. verdicts: {claim: holds, fails or open}."""
    said = "; ".join(f"{id} {word}" for id, word in verdicts.items())
    count = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    caption = f"Means over {count} and the held-out problems, 95% intervals over seeds and problems. {said}."
    steps = len(report.load(bench.folder(STUDIES[study][-1], seeds[0]), "metrics.jsonl", ["step"]))
    if study == "stage1":
        panels = stage1_panels(table)
        headline = "Hollow: the warm start. Full: after the same GRPO"
        curves = draw_curves(
            bench, seeds, AFTER_RL, place / "stage1-entropy.png", keys=["entropy", "accuracy"],
            headline="Through the same GRPO, from three warm starts")
    elif study == "vepo":
        panels = vepo_panels(table)
        headline = f"After {steps} steps, with credit for other tokens"
        curves = draw_curves(
            bench, seeds, STUDIES["vepo"][1:], place / "vepo-curves.png", keys=["accuracy", "entropy"],
            headline=f"The same {steps} steps, with credit for other tokens")
    else:
        panels = mupo_panels(table)
        headline = f"After {steps} steps with fifteen answers to a problem"
        curves = draw_curves(
            bench, seeds, STUDIES["mupo"][1:], place / "mupo-curves.png", keys=["diversity", "entropy", "accuracy"],
            headline="Fifteen answers to a problem, with and without groups of like reasoning")
    return [curves, report.dots(panels, place / f"{study}.png", headline, caption)]


# The panels of report.dots: [(title, unit, lines)].


def stage1_panels(table):
    panels = []
    for k in (1, 16):
        for where, data in (("in domain", IN), ("out of domain", OUT)):
            lines = rows_of(table, AT_THE_START, f"pass@{k}", data)
            panels.append((f"pass@{k} {where}", "%", lines))
    return panels


def vepo_panels(table):
    names = STUDIES["vepo"]
    return [
        ("pass@1", "%", rows_of(table, names, "pass@1")),
        ("pass@16", "%", rows_of(table, names, "pass@16")),
        ("Different answers of 16", "", rows_of(table, names, "distinct")),
    ]


def mupo_panels(table):
    names = STUDIES["mupo"]
    return [
        ("Diversity of reasoning", "", rows_of(table, names, "diversity")),
        ("pass@1", "%", rows_of(table, names, "pass@1")),
        ("pass@4", "%", rows_of(table, names, "pass@4")),
        ("pass@16", "%", rows_of(table, names, "pass@16")),
    ]


def summary(study, table, bench, seeds):
    """All that results/STUDY.json holds."""
    found = dict(study=study, seeds=list(seeds), quick=bench.quick, commands=commands(study, bench, seeds[0]))
    if study == "stage1":
        claims = stage1_claims(table, bench, seeds)
        found |= dict(differences=DIFFERENCES, learned_from=learned_from(bench, seeds), contrasts=contrasts(table))
    elif study == "vepo":
        claims = vepo_claims(table, bench, seeds)
    else:
        claims = mupo_claims(table, bench, seeds)
    return found | dict(
        claims=judged(claims, seeds),
        measures=measures_of(table, lambda x_SP: interval(mean, x_SP)),
        seed_means=measures_of(table, lambda x_SP: [round(float(x), 5) for x in x_SP.mean(1)]),
    )


def commands(study, bench, seed):
    """{run: its command line}, without the path of the repository."""
    found = {}
    for name in runs_of(STUDIES[study]):
        script, flags = bench.command(name, seed)
        words = [f"--{key}" if value is True else f"--{key} {value}" for key, value in flags.items()]
        found[name] = " ".join([script, *words]).replace(f"{ROOT}/", "")
    return found


def judged(claims, seeds):
    """The claims with their verdicts. An interval over one seed says nothing about others: it leaves them open."""
    found = []
    for id, (text, tests) in claims.items():
        words = [judge(test) for test in tests]
        word = verdict(tests)
        if len(seeds) == 1:
            words = ["open"] * len(tests)
            word = "open"
        rows = [test._asdict() | dict(verdict=own) for test, own in zip(tests, words, strict=True)]
        found.append(dict(id=id, claim=text, verdict=word, tests=rows))
    return found


def measures_of(table, reduce):
    """{model: {data set: {measure: what `reduce` makes of its (S, P)}}}."""
    found = {}
    for name, parts in table.items():
        found[name] = {}
        for data, measures in parts.items():
            found[name][data] = {key: reduce(x_SP) for key, x_SP in measures.items()}
    return found


def show(result):
    """The study as text: a line for each model, then the claims with their tests."""
    lines = show_measures(result["measures"])
    for claim in result["claims"]:
        lines += ["", f"{claim['id']}  {claim['verdict'].upper()}: {claim['claim']}"]
        said = "    {what}: {0:+.4f} [{1:+.4f}, {2:+.4f}], {side} {bound:.3g}: {verdict}"
        lines += [said.format(*test["value"], **test) for test in claim["tests"]]
    if "contrasts" in result:
        said = "at the start, from {from} to {to}: {measure} {0:+.4f} [{1:+.4f}, {2:+.4f}]"
        lines.append("")
        lines += [said.format(*step["value"], **step) for step in result["contrasts"]]
    if "differences" in result:
        lines += ["", "What differs between the warm starts beside what is compared:"]
        lines += [f"  - {difference}" for difference in result["differences"]]
    return "\n".join(lines)


def show_measures(measures):
    """Lines of text: a heading, then one for each model and data set."""
    keys = ("pass@1", "pass@4", "pass@16", "distinct", "diversity", "entropy", "length")
    lines = [f"{'model':18}{'problems':12}" + "".join(f"{key:>21}" for key in keys)]
    for name, parts in measures.items():
        for data, values in parts.items():
            cells = ["{:8.3f} [{:.3f}, {:.3f}]".format(*values[key]).rjust(21) for key in keys]
            lines.append(f"{name:18}{data:12}" + "".join(cells))
    return lines


# --- the command line


def main(args):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # however a study is stopped, it stops its runs
    runs = "runs/study-quick" if args.quick else "runs/study"
    place = Path(args.output or ("runs/study-quick" if args.quick else "results"))
    bench = Bench(ROOT / runs, args.quick, args.jobs)
    for folder in (place, bench.place):
        check_writable(str(folder), "--output")
    seeds = range(1, args.seeds + 1)
    build("toy")  # once, not by every run at the same time
    if args.study == "stage1":
        build("toy-teacher")
    bench.make_all(STUDIES[args.study], seeds)
    table = measure_all(bench, STUDIES[args.study], seeds)
    result = summary(args.study, table, bench, seeds)
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / f"{args.study}.json", json.dumps(result, indent=1) + "\n")
    verdicts = {claim["id"]: claim["verdict"] for claim in result["claims"]}
    drawn = pictures(args.study, table, bench, seeds, place=place, verdicts=verdicts)
    print(show(result))
    print(f"written: {place / args.study}.json, {', '.join(map(str, drawn))}")


def parse(argv=None):
    parser = Parser("study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=tuple(STUDIES), help="which one")
    parser.add_argument("--seeds", type=at_least(1), default=5, help="the seeds are 1 to this number")
    parser.add_argument("--quick", action="store_true", help="few steps, few problems, in runs/study-quick")
    parser.add_argument("--jobs", type=at_least(1), default=os.cpu_count(), help="runs at the same time, a core each")
    parser.add_argument("--output", help="folder for the json and the pictures (default: results)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        os._exit(130)  # at once: the threads that wait for the runs would hold up an ordinary exit

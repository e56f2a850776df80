"""The papers' claims, put to the test on the tabletop, over several seeds.

    python lab/study.py stage1                     which warm start, and what it leaves behind (arXiv 2606.09059)
    python lab/study.py vepo                       which tokens to credit (arXiv 2606.03937)
    python lab/study.py mupo                       what becomes of the many ways of thinking (arXiv 2604.00479)
    python lab/study.py stage1 --seeds 1 --quick   a rough answer in ten minutes (the first time, when the two models of
                                                   the tabletop are built, in fifteen)

Every run is a call of one of this repository's scripts, with the flags that stand below, in its own folder of
runs/study. What is there is not run again; what was stopped half-way goes on where it was. At the end stand
results/STUDY.json, its pictures, and a verdict on each claim:

    holds   the whole 95% interval lies on the claimed side of the bound
    fails   the whole interval lies on the other side
    open    the interval holds the bound

Held out are 128 problems of toy@study, at which nothing else in this repository looks, and 128 of toy@ood, with 16
answers to each. All seeds start from the same base and answer the same problems, so an interval draws seeds and
problems with replacement, the same problems for every seed drawn and for every arm: a paired, crossed bootstrap of
10,000 draws. (To draw problems anew for each seed would be narrower, and wrong where a problem suits one arm whatever
the seed.) Five seeds are few: percentile intervals over five values are too narrow, read a bare "holds" as a hint. One
seed gives no verdict: every claim stays open.
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

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks in lab/, not in the root

import eval_passk
import mupo
from common import Parser, UserError, check_place, write_atomically
from lab import report, toy

# --- what is run: fixed on toy@test with seed 0, before toy@study was looked at ----------------------------------------

IN, OUT, COUNT = "toy@study", "toy@ood", 128
SAMPLES, KS = 16, (1, 2, 4, 8, 16)
WARM = dict(  # of every warm start: the same problems, batch, schedule; what is learned from them differs
    dataset="toy@train:1024", prompts_per_step=64, learning_rate=1.2e-3, lr_scheduler_type="cosine", warmup_steps=10)
TRACES = WARM | dict(teacher="toy-teacher", held_out_traces=0)
OVERTRAINED = 10  # times the steps of the early-stopped run

# A run: its script, its flags, the run that it starts from ("": the base), the runs that must be there before it, and
# of SFT how many times OPD's teacher-scored tokens it trains on.
Spec = namedtuple("Spec", "script flags start needs tokens", defaults=[{}, "", (), 0])


def then_grpo(start):
    return Spec("grpo.py", dict(max_steps=50), start, (start,))


RUNS = {
    # Every arm has the paper's 12 answers to a problem; grpo.py is what --select all would be, to the last bit.
    "grpo12": Spec("grpo.py", dict(num_generations=12)),
    "entropy": Spec("vepo.py", dict(num_generations=12, select="entropy")),
    "vepo": Spec("vepo.py", dict(num_generations=12)),
    # Both arms have mupo.py's 15 answers and ε_high 0.28; one cluster is GRPO.
    "grpo15": Spec("mupo.py", dict(clusters=1, max_steps=60)),
    "mupo": Spec("mupo.py", dict(max_steps=60)),
    "opd": Spec("opd.py", WARM | dict(num_generations=1, max_steps=60)),
    "sft": Spec("sft.py", TRACES, "", ("opd",), 1),
    # These two wait for sft too, which has the teacher write the traces that all three learn.
    "overtrained": Spec("sft.py", TRACES, "", ("opd", "sft"), OVERTRAINED),
    "soft": Spec("sft.py", TRACES | dict(soft_targets=True), "", ("opd", "sft"), 1),
    "forward": Spec("opd.py", WARM | dict(num_generations=1, max_steps=60, estimator="forward")),
    "opd-grpo": then_grpo("opd"), "sft-grpo": then_grpo("sft"), "overtrained-grpo": then_grpo("overtrained"),
}
WARM_STARTS = ("opd", "sft", "overtrained")
STUDIES = {
    "stage1": ("base", *WARM_STARTS, "forward", "soft", *(f"{start}-grpo" for start in WARM_STARTS)),
    "vepo": ("base", "grpo12", "entropy", "vepo"),
    "mupo": ("base", "grpo15", "mupo"),
}
POLL = 1.0  # seconds between two looks at a run
QUICK = {"grpo.py": 15, "vepo.py": 15, "mupo.py": 15, "opd.py": 20}  # steps; sft.py's follow from opd.py's


class Bench:
    """Does the runs, several at a time, each on a core of its own, and shows how far they are."""

    def __init__(self, place, quick, jobs):
        self.place, self.quick, self.steps = Path(place), quick, {}
        able = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None] * os.cpu_count()
        self.cores = queue.Queue()
        for core in able[:jobs]:
            self.cores.put(core)
        self.jobs = min(jobs, len(able))
        self.running, self.lock, self.stopped = set(), threading.Lock(), False

    def folder(self, name, seed):
        return self.place / f"{name}-{seed}"

    def last_file(self, name, seed):
        """What a run or a measurement writes last: where it is, all is."""
        return self.folder(name, seed) / ("eval.json" if name.startswith("eval-") else "preprocessor_config.json")

    def needs(self, name):
        """The runs that must be done before a run or the measurement of one."""
        run = name.removeprefix("eval-")
        return RUNS[name].needs if name in RUNS else (run,) if run in RUNS else ()

    def model(self, name, seed):
        return str(self.folder(name, seed)) if name and name != "base" else "toy"

    def command(self, name, seed):
        """(script, flags) of a run, or of the measurement of one (eval-NAME)."""
        if name.startswith("eval-"):
            count = 32 if self.quick else COUNT
            flags = dict(model=self.model(name[5:], seed), dataset=f"{IN}:{count},{OUT}:{count}", num_samples=SAMPLES)
            return "eval_passk.py", flags | dict(seed=seed, ks=",".join(map(str, KS)))
        spec = RUNS[name]
        flags = dict(model=self.model(spec.start, seed), eval_dataset="none", seed=seed) | spec.flags
        if self.quick and spec.script in QUICK:
            flags["max_steps"] = QUICK[spec.script]
        if spec.tokens:  # as many tokens of the teacher's traces as the teacher scored for OPD, or so many times as many
            rows = report.load(self.folder("opd", seed), "metrics.jsonl", ["step"])
            flags["max_tokens"] = spec.tokens * int(sum(row.get("tokens", 0) for row in rows))
            flags["traces"] = str(self.place / f"traces-{seed}.jsonl")
        return spec.script, flags

    def make(self, name, seed, needs=()):
        """Does one run unless it is done. `needs` are futures of the runs before it. UserError where it fails."""
        for need in needs:
            need.result()
        folder, (script, flags) = self.folder(name, seed), self.command(name, seed)
        if self.last_file(name, seed).exists():
            return self.check_done(name, seed, flags)
        core, log = self.cores.get(), folder.with_name(f"{folder.name}.log")
        self.place.mkdir(parents=True, exist_ok=True)
        argv = [f"--{key}" if value is True else f"--{key}={value}" for key, value in flags.items()]
        with open(log, "w") as output:
            process = self.start([sys.executable, script, *argv, f"--output_dir={folder}", "--resume"], output, core)
            while process.poll() is None:
                time.sleep(POLL)
                metrics = folder / "metrics.jsonl"
                self.steps[folder.name] = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        self.running.discard(process)
        self.steps.pop(folder.name, None)
        self.cores.put(core)
        if process.returncode:
            said = log.read_text(errors="replace").splitlines() or [""]
            said = [line for line in said if line.startswith("error")] or said  # a bar may have the last line
            raise UserError(f"{folder.name}: {script} ended with status {process.returncode}, saying: {said[-1][-200:]}")

    def start(self, argv, output, core):
        """The process of a run, on one core: a run takes all that it may."""
        with self.lock:
            if self.stopped:
                raise UserError("stopped")
            process = subprocess.Popen(argv, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                                       env=os.environ | dict(OMP_NUM_THREADS="1", TQDM_MININTERVAL="5"))
            self.running.add(process)
        if core is not None:
            os.sched_setaffinity(process.pid, [core])
        return process

    def stop(self):
        """Ends the runs that are under way: nobody would look after them. They go on from their checkpoints."""
        with self.lock:
            self.stopped = True
        for process in list(self.running):
            process.terminate()
            process.wait()

    def check_done(self, name, seed, flags):
        """UserError if a finished run had other flags than it would have now, or one that it needs was made anew."""
        folder, done = self.folder(name, seed), self.last_file(name, seed)
        for before in self.flags_of(name, seed):
            for key, value in flags.items():
                if str(before.get(key, value)) != str(value) and key not in ("traces", "model"):  # these hold paths
                    raise UserError(f"{folder} was run with --{key} {before[key]}, now it would be {value}; move it away")
        for need in self.needs(name):
            if self.last_file(need, seed).stat().st_mtime > done.stat().st_mtime:
                raise UserError(f"{folder} is older than {self.folder(need, seed)}, which it needs; move it away too")

    def flags_of(self, name, seed):
        """The flags that a finished run was started with, a list of one; of a measurement what its results say."""
        folder = self.folder(name, seed)
        if not name.startswith("eval-"):
            return report.load(folder, "args.json", ["seed"])
        parts = json.loads((folder / "eval.json").read_text())
        return [dict(dataset=",".join(dict.fromkeys(part["dataset"] for part in parts)), seed=part["seed"],
                     num_samples=part["n"], ks=",".join(map(str, part["ks"]))) for part in parts]

    def check_seeds(self, names, seeds):
        """UserError unless a run had the same settings under every seed, those that no flag was given for too."""
        own = {"seed", "model", "output_dir", "traces", "max_tokens"}  # the rest of SFT's length follows from max_tokens
        for name in names:
            first, *others = [self.flags_of(name, seed)[0] for seed in seeds]
            for seed, other in zip(seeds[1:], others):
                for key in sorted({*first, *other} - own - ({"max_steps"} if RUNS[name].tokens else set())):
                    if first.get(key) != other.get(key):
                        raise UserError(f"{self.folder(name, seed)} was run with --{key} {other.get(key)}, seed {seeds[0]} "
                                        f"with {first.get(key)}; move one of them away")

    def make_all(self, names, seeds):
        """All runs of `names`, for all seeds, with what they need, and a measurement of each."""
        order = [name for name in RUNS if any(name in closure(wanted) for wanted in names)]
        futures, pool = {}, concurrent.futures.ThreadPoolExecutor(self.jobs)
        for name in [*order, *(f"eval-{name}" for name in names)]:
            for seed in seeds:  # first in, first out: what a run needs is done or being done when its turn comes
                needs = [futures[need, seed] for need in self.needs(name)]
                futures[name, seed] = pool.submit(self.make, name, seed, needs)
        with tqdm(total=len(futures), desc="runs") as bar:
            left = set(futures.values())
            try:
                while left:
                    done, left = concurrent.futures.wait(left, 2, concurrent.futures.FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    bar.update(len(done))
                    bar.set_postfix_str(", ".join(f"{name} step {n}" for name, n in sorted(self.steps.items())))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise
        self.check_seeds(order, seeds)


def closure(name):
    """A run and all that it needs."""
    return {name}.union(*(closure(need) for need in RUNS[name].needs)) if name in RUNS else set()


# --- what is measured --------------------------------------------------------------------------------------------------


def diversity(texts):
    """Mean pairwise cosine distance between the reasoning of several answers, as bags of n-grams (mupo.py)."""
    e_GD = mupo.ngrams([mupo.reasoning(text) for text in texts])
    return float((1 - e_GD @ e_GD.T).sum() / (len(texts) * (len(texts) - 1)))


def measured(bench, name, seed):
    """{data set: {measure: (P,)}} of one model, problems in the order of their ids."""
    found = {}
    for row in report.load(bench.folder(f"eval-{name}", seed), "samples.jsonl", ["id", "right", "texts"]):
        found.setdefault(row["dataset"].partition(":")[0], {})[row["id"]] = (
            eval_passk.measures(row, KS) | dict(diversity=diversity(row["texts"])))
    return {data: {key: np.array([rows[id][key] for id in sorted(rows)]) for key in next(iter(rows.values()))}
            for data, rows in found.items()}


def measure_all(bench, names, seeds):
    """{model: {data set: {measure: (S, P)}}}: seeds by problems."""
    each = {name: [measured(bench, name, seed) for seed in tqdm(seeds, desc=f"measures of {name}", delay=5)]
            for name in names}
    return {name: {data: {key: np.stack([one[data][key] for one in some]) for key in some[0][data]}
                   for data in some[0]} for name, some in each.items()}


def along(bench, name, seeds, key, first=0, last=None):
    """(S, 1): the mean of a metric over the training steps first to last, counted from 0; one number to a seed."""
    means = []
    for seed in seeds:
        rows = report.load(bench.folder(name, seed), "metrics.jsonl", ["step"])
        means.append([np.mean([row[key] for row in rows if key in row][first:last])])
    return np.array(means)


def interval(statistic, *tables_SP, draws=10_000, seed=0):
    """[value, low, high] of statistic(*means): its 95% percentile interval when seeds and problems are drawn anew.

    tables_SP are of one shape, (S, P); P is 1 for what a seed has one number of. statistic takes arrays of means.
    """
    S, P = tables_SP[0].shape
    random = np.random.default_rng(seed)
    weight_DS, weight_DP = (random.multinomial(n, np.full(n, 1 / n), draws) / n for n in (S, P))
    drawn = statistic(*(((weight_DS @ table_SP) * weight_DP).sum(1) for table_SP in tables_SP))
    value = statistic(*(np.array([table_SP.mean()]) for table_SP in tables_SP))
    return [float(value[0]), *map(float, np.quantile(drawn, [0.025, 0.975]))]


def learned_from(bench, seeds):
    """Of each seed: steps and tokens that each warm start was trained on, and what became of the teacher's answers."""
    found = []
    for seed in seeds:
        logs = {name: report.load(bench.folder(name, seed), "metrics.jsonl", ["step"])
                for name in (*WARM_STARTS, "forward", "soft")}
        steps = {name: len(rows) for name, rows in logs.items()}
        tokens = {name: int(sum(row.get("tokens", 0) for row in rows)) for name, rows in logs.items()}
        rows = report.load(bench.place, f"traces-{seed}.jsonl", ["id", "text", "right"])
        kept = {(row["id"], row["text"]) for row in rows if row["right"]}
        found.append(dict(seed=seed, steps=steps, tokens=tokens, answers=len(rows), right=sum(r["right"] for r in rows),
                          kept=len(kept), problems=len({id for id, _ in kept})))
    return found


def contrasts(table):
    """From OPD to early-stopped SFT in three steps of one change each: [{from, to, measure, value}], at the start."""
    return [{"from": one, "to": other, "measure": key,
             "value": interval(difference, table[other][IN][key], table[one][IN][key])}
            for one, other in itertools.pairwise(("opd", "forward", "soft", "sft"))
            for key in ("pass@1", "pass@16", "distinct", "entropy")]


def difference(one, other):
    return one - other


def share_of_fall(start, early, end):
    """How much of the way from start to end is gone early."""
    return (start - early) / (start - end)


# What stage1 compares is whose answers are read, what is asked of each token, and for how long. It cannot help this:
DIFFERENCES = [
    "SFT, early-stopped, over-trained and on soft targets, learns from the teacher's answers that are right and "
    "well-formed; OPD sees no gold answer and learns on right and wrong ones.",
    "SFT's answers are drawn once, at most four to a problem, without repeats, and read several times over; OPD draws "
    "new ones at every step. So SFT sees problems with more different right answers more often, and a few never.",
    "Equal, to within a step, are the tokens that are trained on, but for over-trained SFT, which has ten times as many. "
    "Not counted: the teacher's own sampling for SFT, four answers to each problem, and the student's for OPD.",
    "Between OPD and early-stopped SFT stand two more: OPD with the forward KL changes OPD's direction of the KL alone; "
    "SFT on soft targets changes whose answers are read, as above; SFT then asks for one word, not for a distribution.",
    "All have OPD's batch, learning rate and schedule; sft.py's own tabletop rate is a quarter of it. Over-trained SFT "
    "has the same schedule drawn out to ten times the steps.",
    "These two are measured at the start only, and no claim is about them. OPD with the forward KL was added after the "
    "verdicts had been seen.",
]

# --- what is claimed ---------------------------------------------------------------------------------------------------

MARGIN = 0.02  # two points of pass@k count as the same
Test = namedtuple("Test", "what value side bound")  # value: [value, low, high]; side: above, below, or within ± bound


def judge(test):
    """holds, fails or open: where the interval lies."""
    (_, low, high), bound = test.value, test.bound
    if test.side == "within":
        return "holds" if -bound < low and high < bound else "fails" if high < -bound or low > bound else "open"
    if test.side == "below":
        low, high, bound = -high, -low, -bound
    return "holds" if low > bound else "fails" if high < bound else "open"


def verdict(tests):
    """A claim of several tests holds if all do and fails if one does."""
    found = [judge(test) for test in tests]
    return "fails" if "fails" in found else "open" if "open" in found else "holds"


def stage1_claims(table, bench, seeds):
    def gap(key, one, other, data=IN):
        return interval(difference, table[one][data][key], table[other][data][key])

    def entropy(one, other):
        return interval(difference, *(along(bench, f"{name}-grpo", seeds, "entropy") for name in (one, other)))

    others, pairs = ("sft", "overtrained"), list(itertools.combinations(WARM_STARTS, 2))
    return {
        "S1": ("OPD enters RL with a higher entropy than either SFT, and keeps it", [
            *(Test(f"entropy at the start, opd - {o}", gap("entropy", "opd", o), "above", 0) for o in others),
            *(Test(f"mean entropy through RL, opd - {o}", entropy("opd", o), "above", 0) for o in others)]),
        "S2": ("at the start OPD has a higher pass@16 and more distinct answers than either SFT", [
            Test(f"{key} at the start, opd - {o}", gap(key, "opd", o), "above", 0)
            for key in ("pass@16", "distinct") for o in others]),
        "S3": ("after RL the three starts end together", [
            Test(f"{key} after RL, {one} - {other}", gap(key, f"{one}-grpo", f"{other}-grpo"), "within", MARGIN)
            for key in ("pass@1", "pass@16") for one, other in pairs]),
        "S4 at the start": ("over-trained SFT loses out of domain, early-stopped SFT does not", [
            Test("pass@1 out of domain, overtrained - base", gap("pass@1", "overtrained", "base", OUT), "below", 0),
            Test("pass@1 out of domain, sft - base", gap("pass@1", "sft", "base", OUT), "above", -MARGIN)]),
        "S4 after RL": ("over-trained SFT loses out of domain, early-stopped SFT does not", [
            Test("pass@1 out of domain, overtrained-grpo - base", gap("pass@1", "overtrained-grpo", "base", OUT),
                 "below", 0),
            Test("pass@1 out of domain, sft-grpo - base", gap("pass@1", "sft-grpo", "base", OUT), "above", -MARGIN)]),
    }


def vepo_claims(table, bench, seeds):
    def gap(one, other):
        return interval(difference, table[one][IN]["pass@1"], table[other][IN]["pass@1"])

    missed = interval(lambda share: share, along(bench, "vepo", seeds, "missed_by_entropy"))
    return {
        "E1": ("entropy selection misses a large share of the vision-sensitive tokens", [
            Test("share of the top 20% by JSD outside the top 20% by entropy", missed, "above", 1 / 3)]),
        "E2": ("VEPO beats top-entropy selection", [
            Test("pass@1, vepo - entropy", gap("vepo", "entropy"), "above", 0)]),
        "E4": ("top entropy alone is no better than all tokens", [
            Test("pass@1, entropy - all tokens", gap("entropy", "grpo12"), "below", 0.01)]),
        "VEPO against GRPO": ("VEPO beats crediting all tokens", [
            Test("pass@1, vepo - all tokens", gap("vepo", "grpo12"), "above", 0)]),
    }


def mupo_claims(table, bench, seeds):
    def gap(key, one, other):
        return interval(difference, table[one][IN][key], table[other][IN][key])

    steps = len(report.load(bench.folder("grpo15", seeds[0]), "metrics.jsonl", ["step"]))
    spans = (0, 2), (steps // 5 - 2, steps // 5 + 3), (steps - 5, None)  # the first steps, a fifth later, the last
    start, early, end = (along(bench, "grpo15", seeds, "diversity", *span) for span in spans)
    return {
        "M1": ("GRPO's diversity of reasoning collapses early", [
            Test("fall of diversity over the run", interval(difference, start, end), "above", 0),
            Test("share of the fall in the first fifth", interval(share_of_fall, start, early, end), "above", 0.5)]),
        "M2": ("base models overtake RL models as k grows", [
            Test("pass@1, grpo - base", gap("pass@1", "grpo15", "base"), "above", 0),
            Test("pass@16, base - grpo", gap("pass@16", "base", "grpo15"), "above", 0)]),
        "M3": ("MUPO keeps more diversity than GRPO and a higher pass@k at equal pass@1", [
            Test("diversity, mupo - grpo", gap("diversity", "mupo", "grpo15"), "above", 0),
            Test("pass@4, mupo - grpo", gap("pass@4", "mupo", "grpo15"), "above", 0),
            Test("pass@1, mupo - grpo", gap("pass@1", "mupo", "grpo15"), "within", MARGIN)]),
    }


# --- what is shown -----------------------------------------------------------------------------------------------------

NAMES = {  # how a run is called in a picture
    "base": "base", "opd": "OPD", "sft": "SFT, early-stopped", "overtrained": "SFT, over-trained",
    "forward": "OPD, forward KL", "soft": "SFT, soft targets", "grpo12": "all tokens (GRPO)", "entropy": "top entropy", "vepo": "VEPO",
    "grpo15": "GRPO", "mupo": "MUPO"}
COLOURS = {"base": "base", "opd": "opd", "sft": "sft", "overtrained": "vepo", "soft": "other", "forward": "mupo", "grpo12": "grpo",
           "entropy": "sft", "vepo": "vepo", "grpo15": "grpo", "mupo": "mupo"}


def mean(value):
    return value


def rows_of(table, names, key, data=IN):
    """The lines of report.dots: a model each, and behind it the same after RL if there is one."""
    return [(NAMES[name], report.PALETTE[COLOURS[name]],
             [interval(mean, table[one][data][key]) for one in (name, f"{name}-grpo") if one in table])
            for name in names]


def pictures(study, table, bench, seeds, place, verdicts):
    """Draws a study; returns the paths."""
    said = "; ".join(f"{id} {word}" for id, word in verdicts.items())
    count = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    caption = f"Means over {count} and the held-out problems, 95% intervals over seeds and problems. {said}."
    steps = len(report.load(bench.folder(STUDIES[study][-1], seeds[0]), "metrics.jsonl", ["step"]))

    def curves(names, file, keys, headline):
        starts = {name: name.removesuffix("-grpo") for name in names}
        return report.overlay({NAMES[starts[name]]: [bench.folder(name, seed) for seed in seeds] for name in names},
                              place / file, keys, headline,
                              {NAMES[start]: report.PALETTE[COLOURS[start]] for start in starts.values()})

    if study == "stage1":
        names = ("base", *WARM_STARTS, "forward", "soft")
        panels = [(f"pass@{k} {where}", "%", rows_of(table, names, f"pass@{k}", data))
                  for k in (1, 16) for where, data in (("in domain", IN), ("out of domain", OUT))]
        return [
            curves([f"{name}-grpo" for name in WARM_STARTS], "stage1-entropy.png", ["entropy", "accuracy"],
                   "Through the same GRPO, from three warm starts"),
            report.dots(panels, place / "stage1.png", "Hollow: the warm start. Full: after the same GRPO", caption)]
    if study == "vepo":
        panels = [(title, unit, rows_of(table, STUDIES["vepo"], key)) for title, unit, key in (
            ("pass@1", "%", "pass@1"), ("pass@16", "%", "pass@16"), ("Different answers of 16", "", "distinct"))]
        return [
            curves(STUDIES["vepo"][1:], "vepo-curves.png", ["accuracy", "entropy"],
                   f"The same {steps} steps, with credit for other tokens"),
            report.dots(panels, place / "vepo.png", f"After {steps} steps, with credit for other tokens", caption)]
    panels = [(title, unit, rows_of(table, STUDIES["mupo"], key)) for title, unit, key in (
        ("Diversity of reasoning", "", "diversity"), ("pass@1", "%", "pass@1"), ("pass@4", "%", "pass@4"),
        ("pass@16", "%", "pass@16"))]
    return [
        curves(STUDIES["mupo"][1:], "mupo-curves.png", ["diversity", "entropy", "accuracy"],
               "Fifteen answers to a problem, with and without groups of like reasoning"),
        report.dots(panels, place / "mupo.png", f"After {steps} steps with fifteen answers to a problem", caption)]


def summary(study, table, bench, seeds):
    """All that results/STUDY.json holds."""
    claims = dict(stage1=stage1_claims, vepo=vepo_claims, mupo=mupo_claims)[study](table, bench, seeds)
    commands, one = {}, len(seeds) == 1  # an interval over one seed says nothing of others
    for name in [name for name in RUNS if any(name in closure(wanted) for wanted in STUDIES[study])]:
        script, flags = bench.command(name, seeds[0])
        words = [script, *(f"--{key}" if v is True else f"--{key} {v}" for key, v in flags.items())]
        commands[name] = " ".join(words).replace(f"{ROOT}/", "")
    found = dict(study=study, seeds=list(seeds), quick=bench.quick, commands=commands)
    if study == "stage1":
        found |= dict(differences=DIFFERENCES, learned_from=learned_from(bench, seeds), contrasts=contrasts(table))
    return found | dict(
        claims=[dict(id=id, claim=text, verdict="open" if one else verdict(tests),
                     tests=[test._asdict() | dict(verdict="open" if one else judge(test)) for test in tests])
                for id, (text, tests) in claims.items()],
        measures={name: {data: {key: interval(mean, x_SP) for key, x_SP in some.items()}
                         for data, some in parts.items()} for name, parts in table.items()},
        seed_means={name: {data: {key: [round(float(x), 5) for x in x_SP.mean(1)] for key, x_SP in some.items()}
                           for data, some in parts.items()} for name, parts in table.items()})


def show(result):
    """The study as text: a line for each model, then the claims with their tests."""
    keys = ("pass@1", "pass@4", "pass@16", "distinct", "diversity", "entropy", "length")
    lines = [f"{'model':18}{'problems':12}" + "".join(f"{key:>21}" for key in keys)]
    for name, parts in result["measures"].items():
        lines += [f"{name:18}{data:12}" + "".join("{:8.3f} [{:.3f}, {:.3f}]".format(*some[key]).rjust(21)
                                                  for key in keys) for data, some in parts.items()]
    for claim in result["claims"]:
        lines += ["", f"{claim['id']}  {claim['verdict'].upper()}: {claim['claim']}"]
        said = "    {what}: {0:+.4f} [{1:+.4f}, {2:+.4f}], {side} {bound:.3g}: {verdict}"
        lines += [said.format(*test["value"], **test) for test in claim["tests"]]
    lines += [""] * ("contrasts" in result)
    lines += ["at the start, from {from} to {to}: {measure} {0:+.4f} [{1:+.4f}, {2:+.4f}]".format(*step["value"], **step)
              for step in result.get("contrasts", ())]
    lines += ["", "What differs between the warm starts beside what is compared:"] * ("differences" in result)
    lines += [f"  - {difference}" for difference in result.get("differences", ())]
    return "\n".join(lines)


def main(args):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped by whatever, a study stops its runs
    place = Path(args.output or ("runs/study-quick" if args.quick else "results"))
    bench = Bench(ROOT / ("runs/study-quick" if args.quick else "runs/study"), args.quick, args.jobs)
    for folder in (place, bench.place):
        check_place(str(folder), "--output")
    seeds = range(1, args.seeds + 1)
    for name in ("toy", "toy-teacher")[:1 + (args.study == "stage1")]:
        toy.build(name)  # once, not by every run at the same time
    bench.make_all(STUDIES[args.study], seeds)
    table = measure_all(bench, STUDIES[args.study], seeds)
    result = summary(args.study, table, bench, seeds)
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / f"{args.study}.json", json.dumps(result, indent=1) + "\n")
    verdicts = {claim["id"]: claim["verdict"] for claim in result["claims"]}
    drawn = pictures(args.study, table, bench, seeds, place, verdicts)
    print(show(result))
    print(f"written: {place / args.study}.json, {', '.join(map(str, drawn))}")


def parse(argv=None):
    parser = Parser("study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=tuple(STUDIES), help="which one")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to so many")
    parser.add_argument("--quick", action="store_true", help="few steps, few problems, in runs/study-quick")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time, a core each")
    parser.add_argument("--output", help="folder for the json and the pictures (default: results)")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if vars(args)[name] < 1:
            parser.error(f"--{name} is {vars(args)[name]}; it must be at least 1")
    return args


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        os._exit(130)

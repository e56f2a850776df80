"""The papers' claims as data, and the verdict on each: written down before the held-out problems were looked at.

A claim is asked in several worlds. Its position there says whether the paper's premise is present, absent, or present
in part. The first studies, made before there were worlds, stand as "absent" (results/first).

    holds      the whole 95% interval lies on the claimed side of the bound
    fails      the whole interval lies on the other side
    open       the bound lies inside the interval
    no case    the claim speaks of a case that did not arise in this world

A claim of several tests holds if all of them hold and fails if one of them fails. With one seed it stays open.
Everything is computed from the table of a study (lab/measures.py), which is committed as results/STUDY-problems.json.
"""

import json
from dataclasses import dataclass

from lab import arms, measures
from lab.runs import ROOT

import numpy as np

MARGIN = 0.02  # two points of pass@k count as the same

# --- kinds of tests ---------------------------------------------------------------------------------------------------
# Each has `value(table, worlds)`, [value, low, high], the `side` of the `bound` that is claimed, and `arms`, those that
# it speaks of. All but Ranks are asked in one world.


@dataclass(frozen=True)
class Gap:
    """One arm minus another in a measure of answers, over seeds and problems. split: in or out of domain.

    kind: of the problems with one verifier alone, or of all but those (lab.measures.measure).
    """

    measure: str
    one: str
    other: str
    side: str = "above"
    bound: float = 0.0
    split: str = "in"
    kind: str = ""

    @property
    def arms(self):
        return (self.one, self.other)

    def value(self, table, worlds):
        world, = worlds
        return measures.gap(
            table, world, self.measure, one=self.one, other=self.other, split=self.split, kind=self.kind)

    def __str__(self):
        where = " out of domain" if self.split == "out" else ""
        if self.kind:
            where += f" of {self.kind}"
        return f"{self.measure}{where}, {self.one} - {self.other}"


@dataclass(frozen=True)
class MeanAlong:
    """The mean of a metric over the steps of a run, over seeds; minus that of another run if there is one."""

    measure: str
    one: str
    other: str = ""
    side: str = "above"
    bound: float = 0.0

    @property
    def arms(self):
        return (self.one, self.other) if self.other else (self.one,)

    def value(self, table, worlds):
        world, = worlds
        each = [measures.along(table, world, arm, self.measure) for arm in self.arms]
        return measures.interval(measures.difference if self.other else measures.mean, *each)

    def __str__(self):
        return f"mean {self.measure} over the run, {' - '.join(self.arms)}"


@dataclass(frozen=True)
class Fall:
    """How far diversity falls over a run, or which share of it falls in the first fifth; over seeds."""

    part: str  # whole or early
    one: str
    side: str = "above"
    bound: float = 0.0

    @property
    def arms(self):
        return (self.one,)

    def value(self, table, worlds):
        world, = worlds
        steps = len(table["steps"][world][self.one]["diversity"][0])
        fifth = steps // 5
        start = measures.along(table, world, self.one, "diversity", steps=slice(0, 2))
        early = measures.along(table, world, self.one, "diversity", steps=slice(max(0, fifth - 2), fifth + 3))
        end = measures.along(table, world, self.one, "diversity", steps=slice(max(0, steps - 5), None))
        if self.part == "whole":
            return measures.interval(measures.difference, start, end)
        return measures.interval(measures.share_of_fall, start, early, end)

    def __str__(self):
        said = {"whole": "fall of diversity over the run", "early": "share of the fall in the first fifth"}
        return f"{said[self.part]}, {self.one}"


@dataclass(frozen=True)
class Ranks:
    """The rank correlation, over worlds and arms, of coverage on the base with (arm - all) in pass@1 after training.

    Its interval draws seeds and problems for pass@1, the same in all worlds, and the other problems of coverage.
    """

    selections: tuple
    side: str = "above"
    bound: float = 0.5

    @property
    def arms(self):
        return ("all", *self.selections)

    def value(self, table, worlds):
        points = [point_of(table, world, arm) for world in worlds for arm in self.selections]
        covered_DN = np.stack([np.append(point["coverage"], point["covered_D"]) for point in points], axis=1)
        gained_DN = np.stack([np.append(point["gain"], point["gained_D"]) for point in points], axis=1)
        found_D = measures.rank_correlation(covered_DN, gained_DN)  # the first row holds the values themselves
        return measures.ends(found_D[0], found_D[1:])

    def __str__(self):
        return (f"rank correlation of coverage and pass@1 gained over all tokens, {len(self.selections)} selections in "
                "each world")


def point_of(table, world, arm):
    """One selection in one world: its coverage and what it gained over all tokens, each as a value and as draws."""
    found = table["coverage"][world]["noise-2"]
    credited = found["selections"][arms.selection_of(world, arm)]["credited"]
    coverage, covered_D = measures.shares(credited, found["wrong"])
    seeds = measures.seeds_of(table, world, (arm, "all"), "in")
    ours_SP = measures.measure(table, world, arm, "in", key="pass@1", seeds=seeds)
    all_SP = measures.measure(table, world, "all", "in", key="pass@1", seeds=seeds)
    weight_DS, weight_DP = measures.drawn_weights(*ours_SP.shape)
    gained_D = ((weight_DS @ (ours_SP - all_SP)) * weight_DP).sum(1)
    return dict(coverage=coverage, covered_D=covered_D, gain=(ours_SP - all_SP).mean(), gained_D=gained_D)


# --- the claims -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What a paper claims. positions: where it is asked, as (position, worlds); only Ranks takes several.

    when: a test that says whether the case arises of which the claim speaks.
    """

    id: str
    paper: str
    claim: str
    premise: str
    positions: tuple
    tests: tuple
    when: Gap | None = None


# VEPO's premise has two halves. Present: both; absent: neither.
DOUBTS = (
    ("present", (arms.HOME,)),
    ("in part", ("toy-see",)),
    ("in part", ("toy-think-fillers",)),
    ("absent", (arms.FAR,)),
)
SEEN = "the doubt that matters is about what is seen, and there is doubt that does not matter"
SELECTIONS = ("entropy", "vepo", "vepo-half", "jsd", "random", "oracle")
ABLATIONS = ("entropy", "jsd", "delta", "ungated", "linear", "product", "no-jsd", "no-delta")
PARTS = "one way of thinking solves what another cannot"
WAYS = (("present", ("toy-ways-parts",)), ("absent", ("toy-ways-same",)))
FORGETS = (("present", ("toy-two-skills",)), ("absent", ("toy",)), ("absent", ("toy-hand",)))
HANDS = (("present", ("toy-hand",)), ("absent", ("toy",)), ("absent", ("toy-two-skills",)))
SFT = ("sft", "overtrained")
ENDS = (("opd", "sft"), ("opd", "overtrained"), ("sft", "overtrained"))
ANOTHER_HAND = "the traces are in another hand"
IMITATED = (("present", ("toy-hand",)), ("absent", ("toy",)))
MIXTURE = (("five verifiers", (arms.MIXED,)),)
LOSES = "over-trained SFT loses out of domain, early-stopped SFT does not"

CLAIMS = {
    "doubt": (
        Claim(
            id="E1",
            paper="2606.03937",
            claim="entropy selection misses a large share of the vision-sensitive tokens",
            premise=SEEN,
            positions=DOUBTS,
            tests=(MeanAlong("missed_by_entropy", "vepo", bound=1 / 3),),
        ),
        Claim(
            id="E2",
            paper="2606.03937",
            claim="VEPO beats top-entropy selection",
            premise=SEEN,
            positions=DOUBTS,
            tests=(Gap("pass@1", "vepo", "entropy"),),
        ),
        Claim(
            id="E3",
            paper="2606.03937",
            claim="both visual signals and the entropy gate matter",
            premise=SEEN,
            positions=(("present", (arms.HOME,)), ("absent", (arms.FAR,))),
            tests=tuple(Gap("pass@1", "vepo", other) for other in ABLATIONS),
        ),
        Claim(
            id="E3 control",
            paper="ours",
            claim="the tokens that VEPO ranks lowest teach less than tokens at random",
            premise=SEEN,
            positions=(("present", (arms.HOME,)), ("absent", (arms.FAR,))),
            tests=(Gap("pass@1", "bottom", "random", side="below"),),
        ),
        Claim(
            id="E4",
            paper="2606.03937",
            claim="top entropy alone is no better than all tokens",
            premise=SEEN,
            positions=DOUBTS,
            tests=(Gap("pass@1", "entropy", "all", side="below", bound=0.01),),
        ),
        Claim(
            id="E5",
            paper="ours",
            claim="coverage predicts what a selection loses",
            premise="none",
            positions=(
                ("all worlds", arms.DOUBT),
                ("seen", ("toy-see", "toy-see-fillers")),
                ("thought", ("toy-think", "toy-think-fillers")),
            ),
            tests=(Ranks(SELECTIONS),),
        ),
        Claim(
            id="E6",
            paper="ours",
            claim="VEPO's loss against all tokens is lost coverage: keeping .5 does not lose",
            premise="VEPO keeping .2 is more than five points below all tokens",
            positions=DOUBTS,
            tests=(Gap("pass@1", "vepo-half", "all", side="within", bound=MARGIN),),
            when=Gap("pass@1", "vepo", "all", side="below", bound=-0.05),
        ),
        Claim(
            id="VEPO against GRPO",
            paper="2606.03937",
            claim="VEPO beats crediting all tokens",
            premise=SEEN,
            positions=DOUBTS,
            tests=(Gap("pass@1", "vepo", "all"),),
        ),
    ),
    "ways": (
        Claim(
            id="M1",
            paper="2604.00479",
            claim="GRPO's diversity of reasoning collapses early",
            premise="none",
            positions=WAYS,
            tests=(Fall("whole", "grpo"), Fall("early", "grpo", bound=0.5)),
        ),
        Claim(
            id="M2",
            paper="2604.00479",
            claim="base models overtake RL models as k grows",
            premise=PARTS,
            positions=WAYS,
            tests=(Gap("pass@1", "grpo", "base"), Gap("pass@64", "base", "grpo")),
        ),
        Claim(
            id="M3",
            paper="2604.00479",
            claim="MUPO keeps more diversity than GRPO and a higher pass@k at equal pass@1",
            premise=PARTS,
            positions=WAYS,
            tests=(
                Gap("diversity", "mupo", "grpo"),
                Gap("pass@4", "mupo", "grpo"),
                Gap("pass@1", "mupo", "grpo", side="within", bound=MARGIN),
            ),
        ),
        Claim(
            id="M4",
            paper="2604.00479",
            claim="three clusters beat one",
            premise=PARTS,
            positions=WAYS,
            tests=(Gap("pass@1", "mupo", "grpo"),),
        ),
    ),
    "stage1": (
        Claim(
            id="S1",
            paper="2606.09059",
            claim="OPD enters RL with a higher entropy than either SFT, and keeps it",
            premise=ANOTHER_HAND,
            positions=HANDS,
            tests=(
                *(Gap("entropy", "opd", other) for other in SFT),
                *(MeanAlong("entropy", "opd-grpo", f"{other}-grpo") for other in SFT),
            ),
        ),
        Claim(
            id="S2",
            paper="2606.09059",
            claim="at the start OPD has a higher pass@16 and more distinct answers than either SFT",
            premise=ANOTHER_HAND,
            positions=HANDS,
            tests=tuple(Gap(key, "opd", other) for key in ("pass@16", "distinct") for other in SFT),
        ),
        Claim(
            id="S3",
            paper="2606.09059",
            claim="after RL the three starts end together",
            premise="there is something to forget",
            positions=FORGETS,
            tests=tuple(
                Gap(key, f"{one}-grpo", f"{other}-grpo", side="within", bound=MARGIN)
                for key in ("pass@1", "pass@16") for one, other in ENDS
            ),
        ),
        Claim(
            id="S4 at the start",
            paper="2606.09059",
            claim=LOSES,
            premise="there is something to forget",
            positions=FORGETS,
            tests=(
                Gap("pass@1", "overtrained", "base", side="below", split="out"),
                Gap("pass@1", "sft", "base", bound=-MARGIN, split="out"),
            ),
        ),
        Claim(
            id="S4 after RL",
            paper="2606.09059",
            claim=LOSES,
            premise="there is something to forget",
            positions=FORGETS,
            tests=(
                Gap("pass@1", "overtrained-grpo", "base", side="below", split="out"),
                Gap("pass@1", "sft-grpo", "base", bound=-MARGIN, split="out"),
            ),
        ),
    ),
    "sft_or_rl": (
        Claim(
            id="V1",
            paper="2504.11468",
            claim="early-stopped SFT before RL ends below RL alone",
            premise=ANOTHER_HAND,
            positions=IMITATED,
            tests=(Gap("pass@1", "sft-grpo", "grpo", side="below"),),
        ),
        Claim(
            id="V1 over-trained",
            paper="2504.11468",
            claim="over-trained SFT before RL ends below RL alone",
            premise=ANOTHER_HAND,
            positions=IMITATED,
            tests=(Gap("pass@1", "overtrained-grpo", "grpo", side="below"),),
        ),
        Claim(
            id="V2",
            paper="2504.11468",
            claim="SFT brings long, hesitant answers, and RL does not remove them",
            premise=ANOTHER_HAND,
            positions=IMITATED,
            tests=tuple(
                Gap(key, one, other)
                for one, other in (("sft", "base"), ("sft-grpo", "grpo")) for key in ("length", "hesitations")
            ),
        ),
        Claim(
            id="V3 at all",
            paper="2504.11468",
            claim="RL on the mixed reward raises the score of every verifier's problems",
            premise="none",
            positions=MIXTURE,
            tests=tuple(Gap("pass@1", "mixed", "base", kind=verifier) for verifier in arms.LEFT_OUT.values()),
        ),
        Claim(
            id="V3",
            paper="2504.11468",
            claim="the mixed reward beats its parts: leaving any verifier out costs points over all types",
            premise="none",
            positions=MIXTURE,
            tests=tuple(Gap("pass@1", "mixed", without) for without in arms.LEFT_OUT),
        ),
        Claim(
            id="V3 for the others",
            paper="ours",
            claim="a further verifier in the mixture costs the problems of the others nothing",
            premise="none",
            positions=MIXTURE,
            tests=tuple(
                Gap("pass@1", "mixed", without, bound=-MARGIN, kind=f"all but {left_out}")
                for without, left_out in arms.LEFT_OUT.items()
            ),
        ),
    ),
}

# --- verdicts ---------------------------------------------------------------------------------------------------------


def judge(value, side, bound):
    """holds, fails or open: where the interval [value, low, high] lies."""
    _, low, high = value
    if side == "within":
        holds = -bound < low and high < bound
        fails = high < -bound or low > bound
    elif side == "below":
        holds = high < bound
        fails = low > bound
    else:
        holds = low > bound
        fails = high < bound
    if holds:
        return "holds"
    return "fails" if fails else "open"


def verdict(words):
    """The verdict on a claim from those on its tests."""
    if "fails" in words:
        return "fails"
    return "open" if "open" in words else "holds"


def tested(table, test, worlds):
    """One test in one position, as claims.json holds it. With one seed its verdict is open."""
    value = test.value(table, worlds)
    word = judge(value, test.side, test.bound)
    seeds = seeds_of(table, test, worlds)
    if len(seeds) == 1:
        word = "open"
    return dict(
        what=str(test), arms=list(test.arms), seeds=seeds, estimate=round(value[0], 5),
        interval=[round(end, 5) for end in value[1:]], side=test.side, bound=round(test.bound, 5), verdict=word)


def seeds_of(table, test, worlds):
    """The seeds on which a test rests: those that all its arms share in all worlds."""
    if isinstance(test, Ranks):
        return table["answers"][worlds[0]]["all"]["in"]["seeds"]
    world, = worlds
    if isinstance(test, Gap):
        return measures.seeds_of(table, world, test.arms, test.split)
    return table["steps"][world][test.one]["seeds"]


def judged(table, claim, position, worlds):
    """A claim in one position, as a row of claims.json, without commands and code."""
    tests = [tested(table, test, worlds) for test in claim.tests]
    word = verdict([test["verdict"] for test in tests])
    row = dict(
        id=claim.id, claim=claim.claim, paper=claim.paper, premise=claim.premise, world=", ".join(worlds),
        position=position)
    if claim.when is not None:
        case = tested(table, claim.when, worlds)
        row["when"] = case
        if case["verdict"] != "holds":
            word = {"fails": "no case", "open": "open"}[case["verdict"]]
    every = [test["seeds"] for test in tests]
    arms_of_tests = list(dict.fromkeys(arm for test in tests for arm in test["arms"]))
    return row | dict(arms=arms_of_tests, seeds=min(every, key=len), tests=tests, verdict=word)


def rows_of(study, table):
    """All claims of a study in all their positions, as rows of claims.json without commands and code."""
    return [judged(table, claim, position, worlds)
            for claim in CLAIMS[study] for position, worlds in claim.positions]


# --- asked afterwards -------------------------------------------------------------------------------------------------

# What was asked once the verdicts had been seen, and in which worlds: it judges nothing, and helps to understand.
AFTERWARDS = {
    "doubt": (
        *((Gap("pass@1", one, "random"), (world,)) for one in ("vepo", "entropy") for world in arms.DOUBT),
        *((Gap("pass@1", "vepo", "kl"), (world,)) for world in (arms.HOME, arms.FAR)),
        (Ranks(tuple(one for one in SELECTIONS if one != "vepo-half")), arms.DOUBT),
        (Ranks(tuple(one for one in SELECTIONS if one != "oracle")), arms.DOUBT),
    ),
    "ways": (
        *((Gap(f"pass@{k}", "base", "grpo"), (world,)) for world in arms.WAYS for k in (2, 4, 8, 16, 32)),
        *((Gap(f"pass@{k}", "mupo", "grpo"), (world,)) for world in arms.WAYS for k in (2, 8, 16, 32, 64)),
        *((Gap("pass@1", "mupo", "no-bonus"), (world,)) for world in arms.WAYS),
        *((Gap("pass@1", "no-bonus", "grpo"), (world,)) for world in arms.WAYS),
    ),
}


def afterwards(study, table):
    """The differences of AFTERWARDS in one study, as [{world, what, arms, seeds, estimate, interval}]."""
    rows = []
    for test, worlds in AFTERWARDS.get(study, ()):
        found = tested(table, test, worlds)
        kept = {key: found[key] for key in ("what", "arms", "seeds", "estimate", "interval")}
        rows.append(dict(world=", ".join(worlds)) | kept)
    return rows


# --- claims.json ------------------------------------------------------------------------------------------------------

FIRST = {"E": "vepo", "V": "vepo", "M": "mupo", "S": "stage1"}  # the study of results/first, by a claim's first letter
FIRST_COMMIT = "fd1bbc4"  # whose code made them


def first_rows(study):
    """The claims of a study as the first studies found them: on the first tabletop, where no premise was present."""
    rows = []
    for claim in CLAIMS[study]:
        path = ROOT / "results" / "first" / f"{FIRST[claim.id[0]]}.json"
        if claim.paper == "ours" or not path.exists():
            continue
        found = json.loads(path.read_text())
        for old in found["claims"]:
            if old["id"] == claim.id:
                rows.append(first_row(claim, old, found, path))
    return rows


def first_row(claim, old, found, path):
    """A claim of a first study as a row of claims.json."""
    tests = [
        dict(what=test["what"], estimate=round(test["value"][0], 5), interval=[round(x, 5) for x in test["value"][1:]],
             side=test["side"], bound=round(test["bound"], 5), verdict=test["verdict"])
        for test in old["tests"]
    ]
    return dict(
        id=claim.id, claim=old["claim"], paper=claim.paper, premise=claim.premise, world="the first tabletop",
        position="absent", arms=list(found["commands"]), seeds=found["seeds"], tests=tests, verdict=old["verdict"],
        commands=found["commands"], code=[FIRST_COMMIT], source=str(path.relative_to(ROOT)))


def with_commands(row, specs, bench):
    """A row with the commands of what it rests on, each for its first seed, and the hashes of the code they ran."""
    commands = {}
    hashes = set()
    for world in row["world"].split(", "):
        names = [f"{world}/{kind}{arm}" for kind in ("", "eval-") for arm in row["arms"]]
        if row["id"] == "E5":
            names.append(f"{world}/coverage-noise-2")
        for name in needed(specs, names):
            seed = specs[name].seeds[0]
            commands[name] = bench.shown(name, seed)
            hashes |= {bench.job(name, seed)["code"] for seed in specs[name].seeds}
    return row | dict(commands=commands, code=sorted(hashes))


def needed(specs, names):
    """These runs and all that they need, in the order of specs. The base has no run."""
    wanted = set()
    for name in names:
        if name in specs:
            wanted |= {name, *needed(specs, specs[name].needs)}
    return [name for name in specs if name in wanted]


def merged(old, study, rows):
    """claims.json with the rows of one study made new. old: its rows until now."""
    ids = {claim.id for claim in CLAIMS[study]}
    return [row for row in old if row["id"] not in ids] + rows

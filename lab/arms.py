"""What the studies run: the worlds, the arms, their flags, their seeds. Fixed before the held-out problems were seen.

A study is a set of runs, {name: lab.runs.Spec}. A run is called WORLD/ARM, so an arm that several claims speak of is
run once. A measurement is called WORLD/eval-ARM, one of coverage WORLD/coverage-NOISE.

The held-out problems are the split `fresh` of each world, which nothing else looks at. Learning rate, warm-up and
updates are the scripts' own of the tabletop, written out here so that no later edit there changes a study.
"""

from harness.answers import VERIFIERS
from lab.runs import Spec
from tabletop import judge
from tabletop.worlds import WORLDS

# --- sizes ------------------------------------------------------------------------------------------------------------

FIVE = (1, 2, 3, 4, 5)
THREE = (1, 2, 3)
QUICK_STEPS = 3  # of a quick study, which shows that everything works
QUICK_COUNT = 16  # problems of a quick study, from the split `test`: nobody sees `fresh` by trying

# Tokens of an answer, at most. Fillers take room and another hand writes more: no answer is to be cut for its manner.
LENGTH = {"doubt": 80, "ways": 64, "stage1": 160, "sft_or_rl": 160}
# What all arms of reinforcement learning share. 16 steps: the arms of a first trial differed most after 15 to 20.
RL = dict(
    eval_dataset="none", prompts_per_step=64, num_generations=8, updates_per_step=4, learning_rate=2e-4,
    warmup_steps=5, max_steps=16,
)
# MUPO needs 15 answers for three clusters; so as not to cost twice as much, half of the problems.
MUPO = RL | dict(
    prompts_per_step=32, num_generations=15, epsilon_high=0.28, max_steps=30, min_cluster=3, balance=1.0,
    diversity_weight=0.4, min_diversity_weight=0.1,
)
# All warm starts have the same problems, batch and schedule; they differ in what is learned from the problems.
WARM = dict(
    eval_dataset="none", prompts_per_step=64, learning_rate=1.2e-3, lr_scheduler_type="cosine", warmup_steps=10,
)
OPD_STEPS = 40
OVERTRAINED = 10  # times the tokens of the early-stopped run
RL_AFTER = RL | dict(max_steps=16)  # after a warm start

# --- doubt: which tokens to credit ------------------------------------------------------------------------------------

DOUBT = ("toy-see", "toy-think", "toy-see-fillers", "toy-think-fillers")
HOME = "toy-see-fillers"  # VEPO's premise: the doubt that matters is in what is seen, and there is doubt that does not
FAR = "toy-think"  # neither
ORACLE = {"see": "cells", "think": "conclusions"}  # the tokens in which a world's doubt lies
NOISE = dict(counterfactual="noise", noise_std=2.0)  # the paper's

# In all four worlds. `all` is grpo.py: vepo.py --select all is the same to the last bit.
SELECTED = {
    "entropy": (dict(select="entropy", keep=0.2), FIVE),
    "vepo": (dict(select="vepo", keep=0.2), FIVE),
    "vepo-half": (dict(select="vepo", keep=0.5), FIVE),
    "jsd": (dict(select="jsd", keep=0.2), THREE),
    "random": (dict(select="random", keep=0.2), THREE),
}
# VEPO with one flag changed each, and a control; at HOME and FAR.
ABLATED = {
    "delta": dict(select="delta_entropy", keep=0.2),  # the change of entropy alone
    "ungated": dict(select="ungated", keep=0.2),  # without the entropy gate
    "linear": dict(select="linear", keep=0.2),  # a sum in place of the geometric coupling
    "product": dict(select="product", keep=0.2),  # a plain product of the three
    "no-jsd": dict(select="vepo", keep=0.2, alpha=0.0),
    "no-delta": dict(select="vepo", keep=0.2, alpha=1.0),
    "kl": dict(select="kl", keep=0.2),  # KL(P‖Q) in place of the JSD
    "bottom": dict(select="bottom", keep=0.2),  # the control: VEPO's order turned round
}
# VEPO with another counterfactual, at HOME. The released code's runs really used a std of about 7.
NOISES = {
    "noise-0.5": dict(counterfactual="noise", noise_std=0.5),
    "noise-1": dict(counterfactual="noise", noise_std=1.0),
    "noise-7": dict(counterfactual="noise", noise_std=7.0),
    "blank": dict(counterfactual="blank"),
}
LABELS = {"vepo": "vepo:0.2", "vepo-half": "vepo:0.5", "no-jsd": "vepo:0.2:0", "no-delta": "vepo:0.2:1",
          "delta": "delta_entropy:0.2", "all": "all:1"}  # of an arm's selection, in lab/coverage.py


def selection_of(world, arm):
    """What lab/coverage.py calls the selection of an arm."""
    if arm == "oracle":
        return f"{oracle_of(world)}:1"
    return LABELS.get(arm, f"{arm}:0.2")


def oracle_of(world):
    """The oracle of lab/oracle.py that knows where a world's doubt lies."""
    return ORACLE[WORLDS[world].doubt]


def arms_of_doubt(world):
    """{arm: Spec} of one world, without measurements."""
    home = dict(model=world, dataset=f"{world}@train", **RL)
    arms = {"all": Spec("grpo.py", home, seeds=FIVE)}
    for arm, (flags, seeds) in SELECTED.items():
        arms[arm] = Spec("vepo.py", home | NOISE | flags, seeds=seeds)
    arms["oracle"] = Spec("lab/oracle.py", home | NOISE | dict(select=oracle_of(world), keep=1.0), seeds=THREE)
    if world in (HOME, FAR):
        for arm, flags in ABLATED.items():
            arms[arm] = Spec("vepo.py", home | NOISE | flags, seeds=THREE)
    if world == HOME:
        for arm, flags in NOISES.items():
            arms[arm] = Spec("vepo.py", home | dict(select="vepo", keep=0.2) | flags, seeds=THREE)
    return arms


def coverage_of_doubt(world):
    """{name: Spec} of the measurements of coverage: with the paper's noise and, at HOME, with the others."""
    arms = [arm for arm in arms_of_doubt(world) if arm not in NOISES]
    select = ",".join(selection_of(world, arm) for arm in arms)
    flags = dict(model=world, dataset=f"{world}@train:256", num_generations=8)
    found = {}
    for arm, noise in {"noise-2": NOISE, **(NOISES if world == HOME else {})}.items():
        found[f"coverage-{arm}"] = Spec(
            "lab/coverage.py", flags | noise | dict(select=select), last="coverage.json")
    return found


def doubt():
    """The study of which tokens to credit."""
    found = {}
    for world in DOUBT:
        for arm, spec in coverage_of_doubt(world).items():
            found[f"{world}/{arm}"] = spec
    for world in DOUBT:
        found |= with_measurements(world, arms_of_doubt(world), problems=256, samples=8, ks="1,2,4,8")
    return found


# --- ways: what becomes of the many ways of thinking ------------------------------------------------------------------

WAYS = ("toy-ways-same", "toy-ways-parts")
# One cluster is GRPO: nothing is far from other clusters then, so there is no bonus either.
CLUSTERED = {
    "grpo": (dict(clusters=1), FIVE),
    "mupo": (dict(clusters=3), FIVE),
    "mupo-2": (dict(clusters=2), THREE),
    "mupo-5": (dict(clusters=5), THREE),
    "no-bonus": (dict(clusters=3, diversity_weight=0.0, min_diversity_weight=0.0), THREE),
}


def ways():
    """The study of the many ways of thinking. pass@64 needs 64 answers to a problem."""
    found = {}
    for world in WAYS:
        home = dict(model=world, dataset=f"{world}@train", **MUPO)
        arms = {arm: Spec("mupo.py", home | flags, seeds=seeds) for arm, (flags, seeds) in CLUSTERED.items()}
        found |= with_measurements(world, arms, problems=64, samples=64, ks="1,2,4,8,16,32,64")
    return found


# --- stage1: which warm start, and what it leaves behind --------------------------------------------------------------

STAGE1 = ("toy", "toy-two-skills", "toy-hand")  # one skill and hand, something to forget, another hand
OUTSIDE = {"toy": "toy@ood", "toy-two-skills": "toy-two-skills@skill", "toy-hand": "toy@ood"}
WARM_STARTS = ("opd", "sft", "overtrained")


def arms_of_stage1(world):
    """{arm: Spec} of one world: three warm starts, and the same GRPO from each."""
    warm = WARM | dict(model=WORLDS[world].base, dataset=f"{world}@train:1024", teacher=WORLDS[world].teacher)
    sft = warm | dict(held_out_traces=0)
    opd = f"{world}/opd"
    arms = {
        "opd": Spec("opd.py", warm | dict(num_generations=1, max_steps=OPD_STEPS), seeds=FIVE),
        "sft": Spec("sft.py", sft, needs=(opd,), tokens=1, seeds=FIVE),
        # It waits for sft too, which has the teacher write the traces that both learn.
        "overtrained": Spec("sft.py", sft, needs=(opd, f"{world}/sft"), tokens=OVERTRAINED, seeds=FIVE),
    }
    for start in WARM_STARTS:
        name = f"{world}/{start}"
        flags = RL_AFTER | dict(dataset=f"{world}@train")
        arms[f"{start}-grpo"] = Spec("grpo.py", flags, start=name, needs=(name,), seeds=FIVE)
    return arms


def stage1():
    """The study of warm starts."""
    found = {}
    for world in STAGE1:
        arms = arms_of_stage1(world)
        base = WORLDS[world].base
        found |= with_measurements(
            world, arms, problems=128, samples=16, ks="1,2,4,8,16", outside=OUTSIDE[world], base=base)
    return found


# --- sft_or_rl: is it worth imitating first? --------------------------------------------------------------------------

HANDS = ("toy", "toy-hand")  # the teacher's traces in the student's manner, or in another
BEFORE_RL = ("sft", "overtrained")


def arms_of_hand(world):
    """{arm: Spec} of one world: the same GRPO from the base, and after each SFT. These are runs of stage1, but one."""
    found = arms_of_stage1(world)
    for start in WARM_STARTS:
        if start not in BEFORE_RL:
            del found[f"{start}-grpo"]
    found["grpo"] = Spec(
        "grpo.py", RL_AFTER | dict(model=WORLDS[world].base, dataset=f"{world}@train"), seeds=FIVE)
    return found


# Mixed reward: GRPO on all five verifiers, and with the problems of each one left out.
MIXED = "toy-mixed"
LEFT_OUT = {f"without-{verifier}": verifier for verifier in VERIFIERS}


def arms_of_mixed():
    """{arm: Spec}. Every arm draws equally many answers: the other types fill the place of what an arm leaves out."""
    home = RL | dict(model=MIXED, dataset=f"{MIXED}@train", reward_model=judge.NAME)
    found = {"mixed": Spec("grpo.py", home, seeds=FIVE)}
    for arm, left_out in LEFT_OUT.items():
        others = ",".join(verifier for verifier in VERIFIERS if verifier != left_out)
        found[arm] = Spec("grpo.py", home | dict(verifiers=others), seeds=FIVE)
    return found


def sft_or_rl():
    """The study of imitation before reinforcement, and of a reward from several verifiers."""
    found = with_measurements(
        MIXED, arms_of_mixed(), problems=640, samples=8, ks="1,2,4,8", reward_model=judge.NAME)
    for world in HANDS:
        found |= with_measurements(
            world, arms_of_hand(world), problems=128, samples=16, ks="1,2,4,8,16", outside=OUTSIDE[world],
            base=WORLDS[world].base)
    return found


# --- measurements -----------------------------------------------------------------------------------------------------


def with_measurements(world, arms, *, problems, samples, ks, outside="", base="", **more):
    """{name: Spec} of these arms, and of a measurement of the base and of each of them, on problems held out.

    more: further flags of the measurements.
    """
    data = f"{world}@fresh:{problems}"
    if outside:
        data += f",{outside}:{problems}"
    flags = dict(dataset=data, num_samples=samples, ks=ks, **more)
    found = {f"{world}/{arm}": spec for arm, spec in arms.items()}
    found[f"{world}/eval-base"] = Spec(
        "eval_passk.py", flags | dict(model=base or world), seeds=FIVE, last="eval.json")
    for arm, spec in arms.items():
        name = f"{world}/{arm}"
        found[f"{world}/eval-{arm}"] = Spec(
            "eval_passk.py", flags, start=name, needs=(name,), seeds=spec.seeds, last="eval.json")
    return found


STUDIES = {"doubt": doubt, "ways": ways, "stage1": stage1, "sft_or_rl": sft_or_rl}
# What the table of a study keeps of every problem's answers (lab/measures.py).
COLUMNS = {
    "doubt": ("right", "distinct", "entropy"),
    "ways": ("right", "distinct", "entropy", "diversity"),
    "stage1": ("right", "distinct", "entropy", "length"),
    "sft_or_rl": ("right", "distinct", "length", "hesitations"),
}
# Arms whose clusters are compared with styles.
AGREEING = {"doubt": (), "ways": ("base", "grpo", "mupo"), "stage1": (), "sft_or_rl": ()}


def specs_of(study, seeds=5, quick=False):
    """{name: Spec} of a study. seeds: of every arm, at most. quick: a few steps, a few problems of the split `test`."""
    found = {}
    for name, spec in STUDIES[study]().items():
        flags = spec.flags | dict(max_completion_length=LENGTH[study])
        found[name] = spec._replace(flags=flags, seeds=spec.seeds[:seeds])
        if quick:
            found[name] = quickly(found[name])
    return found


def quickly(spec):
    """A Spec made small, which shows only that everything works."""
    flags = dict(spec.flags)
    if "max_steps" in flags:
        flags["max_steps"] = QUICK_STEPS
    if spec.script in ("eval_passk.py", "lab/coverage.py"):
        flags["dataset"] = ",".join(smaller(data) for data in flags["dataset"].split(","))
    return spec._replace(flags=flags, tokens=min(spec.tokens, 2))


def smaller(data):
    """A few problems of the same kind, from `test` in place of `fresh` and from `ood` in place of `skill`."""
    shown = data.replace("@fresh", "@test").replace("@skill", "@ood")
    return shown.partition(":")[0] + f":{QUICK_COUNT}"


def watched(specs):
    """{name: (world, arm)} of what a study's table is made of; of a measurement, whose it is."""
    found = {}
    for name in specs:
        world, _, arm = name.partition("/")
        for kind in ("eval-", "coverage-"):
            arm = arm.removeprefix(kind)
        found[name] = (world, arm)
    return found

"""The pictures of the studies: a world to a row or a panel, so that a premise and its absence stand side by side."""

from harness.answers import VERIFIERS
from lab import arms, claims, measures, pictures, report
from lab.pictures import PALETTE

NAMES = {  # what an arm is called in a picture
    "base": "base",
    "all": "all tokens (GRPO)",
    "entropy": "top entropy",
    "vepo": "VEPO top fifth",
    "vepo-half": "VEPO top half",
    "jsd": "top JSD",
    "random": "random",
    "oracle": "oracle",
    "grpo": "GRPO (K = 1)",
    "mupo-2": "MUPO, K = 2",
    "mupo": "MUPO, K = 3",
    "mupo-5": "MUPO, K = 5",
    "no-bonus": "K = 3, no bonus",
    "opd": "OPD",
    "sft": "SFT, early-stopped",
    "overtrained": "SFT, over-trained",
    "mixed": "all five verifiers",
    **{arm: f"without {verifier}" for arm, verifier in arms.LEFT_OUT.items()},
}
COLOURS = {  # whose colour of PALETTE it has
    "all": "grpo",
    "entropy": "sft",
    "vepo": "vepo",
    "vepo-half": "mupo",
    "jsd": "opd",
    "random": "other",
    "oracle": "teacher",
    "grpo": "grpo",
    "mupo-2": "sft",
    "mupo": "mupo",
    "mupo-5": "opd",
    "no-bonus": "other",
    "opd": "opd",
    "sft": "sft",
    "overtrained": "vepo",
    "mixed": "grpo",
    **dict.fromkeys(arms.LEFT_OUT, "other"),
}
WORLDS = {  # what a world is called, and whether the papers' premise is there
    "toy-see": "misread cells",
    "toy-think": "misjudged conclusions",
    "toy-see-fillers": "misread cells, fillers",
    "toy-think-fillers": "misjudged conclusions, fillers",
    "toy-ways-same": "ways that solve the same",
    "toy-ways-parts": "ways that solve different parts",
    "toy": "one skill, own hand",
    "toy-two-skills": "a second skill to forget",
    "toy-hand": "traces in another hand",
    arms.MIXED: "five verifiers",
}
SHOWN = {  # the arms of a picture, from the top
    "doubt": ("base", "all", "entropy", "vepo", "vepo-half", "jsd", "random", "oracle"),
    "ways": ("base", "grpo", "mupo-2", "mupo", "mupo-5", "no-bonus"),
    "stage1": ("base", "opd", "sft", "overtrained"),
    "sft_or_rl": ("base", "sft", "overtrained"),
}


def name_of(arm):
    return NAMES.get(arm, arm)


def colour_of(arm):
    return PALETTE[COLOURS.get(arm, "base")]


def mean_interval(table, world, arm, key, *, split="in", kind=""):
    """[value, low, high] of a measure of one arm, over seeds and problems."""
    seeds = measures.seeds_of(table, world, (arm,), split)
    return measures.interval(
        measures.mean, measures.measure(table, world, arm, split, key=key, seeds=seeds, kind=kind))


def panel(table, study, world, title, *, key, split="in"):
    """A panel of pictures.dots: a measure of every arm of a world, after RL too if there is such an arm.

    What RL makes of the base itself is the arm `grpo`, not `base-grpo`.
    """
    lines = []
    for arm in SHOWN[study]:
        after = f"{arm}-grpo"
        if study == "sft_or_rl" and arm == "base":
            after = "grpo"
        both = [one for one in (arm, after) if one in table["answers"][world]]
        intervals = [mean_interval(table, world, one, key, split=split) for one in both]
        lines.append((name_of(arm), colour_of(arm), intervals))
    unit = "%" if key.startswith("pass@") else ""
    return title, unit, lines


def caption_of(rows, table):
    """The small print: what the intervals are, and the verdicts in each world."""
    said = {}
    for row in rows:
        world = WORLDS.get(row["world"], row["world"]).capitalize()
        said.setdefault(world, []).append(f"{row['id']} ({row['verdict']})")
    verdicts = ". ".join(f"{world}: {', '.join(words)}" for world, words in said.items())
    first = next(iter(table["answers"][rows[0]["world"].split(", ")[0]].values()))["in"]
    return (f"Means over up to {len(first['seeds'])} seeds and {len(first['right'][0])} held-out problems, 95% "
            f"intervals over seeds and problems. {verdicts}.")


# --- one picture for each study ---------------------------------------------------------------------------------------


def draw_doubt(table, rows, bench, place):
    panels = [panel(table, "doubt", world, f"pass@1: {WORLDS[world]}", key="pass@1") for world in arms.DOUBT]
    one = pictures.dots(panels, place / "doubt.png", "The same steps with different tokens credited, in four worlds",
                        caption_of(rows, table), columns=2)
    return [one, draw_coverage(table, rows, place)]


def draw_coverage(table, rows, place):
    """Coverage on the base against what training lost, a point for each selection in each world."""
    found = next(row for row in rows if row["id"] == "E5")["tests"][0]
    points = []
    for world, marker in zip(arms.DOUBT, "os^D", strict=True):
        for arm in found["arms"][1:]:  # the first is `all`, with which the others are compared
            point = claims.point_of(table, world, arm)
            points.append(pictures.Cross(
                f"{name_of(arm)}, {WORLDS[world]}", colour_of(arm), marker,
                x=measures.ends(point["coverage"], point["covered_D"]),
                y=measures.ends(point["gain"], point["gained_D"])))
    low, high = found["interval"]
    headline = f"Coverage against pass@1 after training: rank correlation {found['estimate']:.2f}"
    caption = (f"95% interval of the correlation: {low:.2f} to {high:.2f}. Coverage is measured on the base, before "
               "any training: the share of first wrong tokens with credit. Lines: 95% intervals.")
    return pictures.crosses(points, place / "coverage.png", headline, caption,
                            xlabel="coverage of the base's first wrong tokens",
                            ylabel="pass@1 after training, minus that of all tokens")


def draw_ways(table, rows, bench, place):
    panels = []
    for world in arms.WAYS:
        for key in ("pass@1", "pass@4", "pass@64", "diversity"):
            title = f"{WORLDS[world]}\n{key}" if key == "pass@1" else key
            panels.append(panel(table, "ways", world, title, key=key))
    one = pictures.dots(panels, place / "ways.png", "Fifteen answers to a problem, with and without clusters",
                        caption_of(rows, table), columns=4)
    curves = [draw_curves(bench, world, ("grpo", "mupo", "no-bonus"), place / f"ways-{world}.png",
                          keys=["diversity", "accuracy"]) for world in arms.WAYS]
    return [one, *curves]


def draw_stage1(table, rows, bench, place):
    panels = []
    for world in arms.STAGE1:
        panels += [
            panel(table, "stage1", world, f"{WORLDS[world]}\npass@1", key="pass@1"),
            panel(table, "stage1", world, "pass@1 out of domain", key="pass@1", split="out"),
            panel(table, "stage1", world, "pass@16", key="pass@16"),
            panel(table, "stage1", world, "entropy", key="entropy"),
        ]
    one = pictures.dots(panels, place / "stage1.png", "Hollow: the warm start. Filled: after the same GRPO",
                        caption_of(rows, table), columns=4)
    return [one]


def draw_sft_or_rl(table, rows, bench, place):
    panels = []
    for world in arms.HANDS:
        panels += [
            panel(table, "sft_or_rl", world, f"{WORLDS[world]}\npass@1", key="pass@1"),
            panel(table, "sft_or_rl", world, "pass@1 out of domain", key="pass@1", split="out"),
            panel(table, "sft_or_rl", world, "tokens of an answer", key="length"),
            panel(table, "sft_or_rl", world, "hesitations in an answer", key="hesitations"),
        ]
    of_hands = [row for row in rows if row["world"] in arms.HANDS]
    one = pictures.dots(panels, place / "sft_or_rl.png", "Hollow: before RL. Filled: after the same GRPO",
                        caption_of(of_hands, table), columns=4)
    return [one, draw_verifiers(table, rows, place)]


def draw_verifiers(table, rows, place):
    """A panel for each verifier: pass@1 on its problems after training with all of them, and without each one."""
    panels = []
    for verifier in VERIFIERS:
        lines = []
        for arm in ("base", "mixed", *arms.LEFT_OUT):
            found = mean_interval(table, arms.MIXED, arm, "pass@1", kind=verifier)
            lines.append((name_of(arm), colour_of(arm), [found]))
        panels.append((f"pass@1: {verifier}", "%", lines))
    here = [row for row in rows if row["world"] == arms.MIXED]
    return pictures.dots(panels, place / "verifiers.png", "GRPO with five verifiers, and with each one left out",
                         caption_of(here, table) + " Each panel: the fifth of them with that verifier.", columns=3)


def draw_curves(bench, world, names, path, *, keys):
    """Draws metrics of some arms of a world over the training steps; returns the path."""
    runs = {}
    colours = {}
    for arm in names:
        name = f"{world}/{arm}"
        runs[name_of(arm)] = [bench.folder(name, seed) for seed in bench.specs[name].seeds]
        colours[name_of(arm)] = colour_of(arm)
    return report.overlay(runs, path, keys=keys, headline=WORLDS[world].capitalize(), colours=colours)


DRAW = {"doubt": draw_doubt, "ways": draw_ways, "stage1": draw_stage1, "sft_or_rl": draw_sft_or_rl}

"""When does a claim hold? The papers' claims, asked in worlds that hold the papers' premises and in worlds that do not.

    python lab/study.py doubt              which tokens to credit (VEPO, arXiv 2606.03937)
    python lab/study.py ways               what becomes of the many ways of thinking (MUPO, arXiv 2604.00479)
    python lab/study.py stage1             which warm start, and what it leaves behind (arXiv 2606.09059)
    python lab/study.py sft_or_rl          is it worth imitating first? (VLAA-Thinker, arXiv 2504.11468)
    python lab/study.py doubt ways --plan  what would be run, and how long it would take; runs nothing
    python lab/study.py doubt --quick      a few steps and problems, to see that it works; its numbers mean nothing

lab/arms.py says what is run, lab/claims.py what is claimed and how it is judged, lab/measures.py how sure that is.

Every run is a call of one of this repository's scripts in its own folder of runs/study. A run that is finished is not
run again; one that was stopped continues where it was. At the end a study writes

    results/STUDY-problems.json    the counts of every arm on every held-out problem: all verdicts follow from this
    results/claims.json            every claim in every world: estimate, interval, verdict, commands, hash of the code
    results/STUDY.json             the measures of every arm with their intervals
    results/STUDY.png              and other pictures, with the worlds side by side
"""

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in lab/, not in the root

from harness.flags import Parser, UserError, at_least
from harness.run import check_writable, write_atomically
from lab import arms, carry, claims, logs, measures, panels, runs
from tabletop import build
from tabletop.traces import style


def study(name, args, place):
    """Does one study: its runs, its table, its claims, its pictures. place: the folder of its results."""
    specs = arms.specs_of(name, args.seeds, args.quick)
    bench = runs.Bench(runs.ROOT / folder_of_runs(args), specs, args.jobs)
    for model in models_of(specs):
        build(model)  # once, not by every run at the same time
    bench.make_all(name)
    table = measures.collect(bench, arms.watched(specs), arms.COLUMNS[name], arms.AGREEING[name])
    place.mkdir(parents=True, exist_ok=True)
    table = write_table(place / f"{name}-problems.json", table)
    rows = claims.rows_of(name, table)
    write_claims(place / "claims.json", name, [
        *(claims.with_commands(row, specs, bench) for row in rows), *claims.first_rows(name)])
    result = summary(name, table, bench)
    write_atomically(place / f"{name}.json", json.dumps(result, indent=1) + "\n")
    drawn = panels.DRAW[name](table, rows, bench, place)
    print(show(result, rows))
    names = ", ".join(path.name for path in drawn)
    print(f"written: {name}-problems.json, claims.json, {name}.json, {names} in {place}")


def pack(args):
    """Packs the finished runs of all studies asked for."""
    every = {}
    for name in args.studies:
        every |= arms.specs_of(name, args.seeds, args.quick)
    count = carry.pack(runs.Bench(runs.ROOT / folder_of_runs(args), every, args.jobs), args.pack)
    print(f"{count} runs packed into {args.pack}")


def plan(args):
    """What --plan prints: the runs of each study, then how long all of them take."""
    text = ""
    every = {}
    for name in args.studies:
        specs = arms.specs_of(name, args.seeds, args.quick)
        text += f"{name}\n{runs.plan(specs, args.jobs)}\n\n"
        every |= specs  # a run that two studies speak of is made once
    return text + f"all of it: about {runs.in_words(runs.core_seconds(every) / args.jobs)}"


def folder_of_runs(args):
    return "runs/study-quick" if args.quick else "runs/study"


def models_of(specs):
    """The models of the tabletop that these runs start from, their teachers, and their reward models."""
    found = []
    for spec in specs.values():
        found += [spec.flags[key] for key in ("model", "teacher", "reward_model") if key in spec.flags]
    return list(dict.fromkeys(found))


def write_table(path, table):
    """Writes the table of a study; returns it as it will be read back, so that nobody computes with other digits."""
    text = json.dumps(table, separators=(",", ":"))
    write_atomically(path, text + "\n")
    return json.loads(text)


def write_claims(path, name, rows):
    """Puts a study's claims into claims.json, in the place of what stood there of this study."""
    old = json.loads(path.read_text()) if path.exists() else []
    write_atomically(path, json.dumps(claims.merged(old, name, rows), indent=1) + "\n")


# --- what a study says ------------------------------------------------------------------------------------------------


def summary(name, table, bench):
    """All that results/STUDY.json holds."""
    found = dict(study=name, measures=measures_of(name, table), coverage=coverage_of(table), commands={})
    found["afterwards"] = claims.afterwards(name, table)
    for run, spec in bench.specs.items():
        found["commands"][run] = bench.shown(run, spec.seeds[0])
    if name == "stage1":
        found["learned_from"] = learned_from(bench)
    if name == "ways":
        found["styles"] = {world: styles_of(bench, world) for world in arms.WAYS}
    return found


def measures_of(name, table):
    """{world: {arm: {in or out: {measure: [value, low, high]}}}}."""
    found = {}
    for world, every in table["answers"].items():
        found[world] = {}
        for arm, splits in every.items():
            found[world][arm] = {split: intervals(table, world, arm, split) for split in splits}
    return found


def intervals(table, world, arm, split):
    """{measure: [value, low, high]} of one arm: pass@k for the powers of two up to n, and the other columns."""
    part = table["answers"][world][arm][split]
    keys = [f"pass@{2**power}" for power in range(part["n"].bit_length())]
    keys += [key for key in part if key not in ("data", "seeds", "n", "right", "types")]
    found = {key: panels.mean_interval(table, world, arm, key, split=split) for key in keys}
    for kind in dict.fromkeys(part.get("types", [])):
        found[f"pass@1 of {kind}"] = panels.mean_interval(table, world, arm, "pass@1", split=split, kind=kind)
    return found


def coverage_of(table):
    """{world: {noise: {selection: [value, low, high]}}}."""
    found = {}
    for world, noises in table["coverage"].items():
        found[world] = {}
        for noise, said in noises.items():
            selections = said["selections"].items()
            found[world][noise] = {selection: row["coverage"] for selection, row in selections}
    return found


def learned_from(bench):
    """For each world and seed: steps and tokens of each warm start, and what became of the teacher's answers."""
    found = []
    for world in arms.STAGE1:
        for seed in bench.specs[f"{world}/opd"].seeds:
            steps = {}
            tokens = {}
            for start in arms.WARM_STARTS:
                rows = logs.load(bench.folder(f"{world}/{start}", seed), "metrics.jsonl", ["step"])
                steps[start] = len(rows)
                tokens[start] = runs.tokens_of(rows)
            answers = logs.load(bench.place / world, f"traces-{seed}.jsonl", ["id", "text", "right"])
            right = sum(bool(row["right"]) for row in answers)
            found.append(dict(world=world, seed=seed, steps=steps, tokens=tokens, answers=len(answers), right=right))
    return found


def styles_of(bench, world):
    """{arm: {style: [its share of all answers, how many of these are right]}} in one world, over all seeds."""
    found = {}
    for name, spec in bench.specs.items():
        if not name.startswith(f"{world}/eval-"):
            continue
        counts = Counter()
        for seed in spec.seeds:
            for row in logs.load(bench.folder(name, seed), "samples.jsonl", ["texts", "right"]):
                counts.update((style(text), right) for text, right in zip(row["texts"], row["right"], strict=True))
        arm = name.partition("/eval-")[2]
        found[arm] = {}
        for each in sorted({key for key, _ in counts}):
            answers = counts[each, True] + counts[each, False]
            found[arm][each] = [round(answers / counts.total(), 4), round(counts[each, True] / answers, 4)]
    return found


def show(result, rows):
    """The study as text: a line for each arm in each world, then the claims with their tests."""
    keys = ("pass@1", "pass@4", "pass@16", "pass@64", "distinct", "diversity", "entropy")
    lines = []
    for world, every in result["measures"].items():
        for arm, splits in every.items():
            for split, values in splits.items():
                cells = ["{0} {1:.3f} [{2:.3f}, {3:.3f}]".format(key, *values[key]) for key in keys if key in values]
                lines.append(f"{world:18}{arm:18}{split:4}" + "  ".join(cells))
    for row in rows:
        position = row["position"]
        if position in ("present", "in part", "absent"):
            position = f"premise {position}"
        lines += ["", f"{row['id']}  {row['verdict'].upper()} in {row['world']} ({position}): {row['claim']}"]
        for test in [*row["tests"], *([row["when"]] if "when" in row else [])]:
            low, high = test["interval"]
            lines.append(f"    {test['what']}: {test['estimate']:+.4f} [{low:+.4f}, {high:+.4f}], {test['side']} "
                         f"{test['bound']:.3g}: {test['verdict']}")
    return "\n".join(lines)


# --- the command line -------------------------------------------------------------------------------------------------


def main(args):
    place = Path(args.output or ("runs/study-quick" if args.quick else "results"))
    if args.plan:
        print(plan(args))
        return
    for folder in (place, runs.ROOT / folder_of_runs(args)):
        check_writable(str(folder), "--output")
    if args.pack:
        pack(args)
        return
    if args.unpack:
        print(f"{carry.unpack(runs.ROOT / folder_of_runs(args), args.unpack)} runs unpacked from {args.unpack}")
    for name in args.studies:
        study(name, args, place)


def parse(argv=None):
    parser = Parser("study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=tuple(arms.STUDIES), metavar="STUDY",
                        help=f"which ones: {', '.join(arms.STUDIES)}")
    parser.add_argument("--plan", action="store_true", help="say what would be run and how long it takes; run nothing")
    parser.add_argument("--pack", metavar="FILE", help="only put finished runs into this file, for another machine")
    parser.add_argument("--unpack", metavar="FILE", help="take finished runs from this file first")
    parser.add_argument("--seeds", type=at_least(1), default=5, help="how many seeds of each arm to run, at most")
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

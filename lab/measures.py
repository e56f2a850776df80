"""What the studies measure, and how sure that is: numbers for each seed and problem, and 95% intervals.

All seeds of a world start from the same base and answer the same problems. So an interval comes from 10,000 draws of a
paired, crossed bootstrap: it draws seeds and problems with replacement, and takes the same problems for every seed
drawn and for every arm. (Drawing problems anew for each seed would give narrower intervals, and wrong ones where a
problem suits one arm whatever the seed.) Five seeds are few: percentile intervals over five values are too narrow.

Shapes: S seeds, P problems, G answers to a problem, D draws.
"""

import functools
import json

import eval_passk
from harness.embedding import ngrams, reasoning, spread
from harness.run import seed_of
from lab import logs
from mupo import partition
from tabletop.traces import style

import numpy as np
from tqdm import tqdm

DRAWS = 10_000
COUNTED = ("right", "distinct", "entropy", "length", "hesitations")  # of a problem's answers, in a moment
COUNTS = "columns.json"  # where they stand in a measurement whose answers are on another machine (lab/carry.py)
SERIES = ("accuracy", "entropy", "completion_length", "missed_by_entropy", "coverage", "diversity")  # of metrics.jsonl

# --- intervals --------------------------------------------------------------------------------------------------------


@functools.lru_cache(8)  # a study asks for the same few shapes thousands of times
def drawn_weights(S, P, draws=DRAWS, seed=0):
    """((D, S), (D, P)): how often each seed and each problem is drawn, as shares of all. Not to be written to."""
    # A generator each, so that arms with other numbers of seeds still meet the same draws of problems.
    weight_DS = np.random.default_rng([seed, 0]).multinomial(S, np.full(S, 1 / S), draws) / S
    weight_DP = np.random.default_rng([seed, 1]).multinomial(P, np.full(P, 1 / P), draws) / P
    return weight_DS, weight_DP


def interval(statistic, *tables_SP, draws=DRAWS, seed=0):
    """[value, low, high] of statistic(*means): its 95% percentile interval when seeds and problems are drawn anew.

    tables_SP all have the shape (S, P); P is 1 where a seed has one number. statistic takes arrays of means.
    """
    weight_DS, weight_DP = drawn_weights(*tables_SP[0].shape, draws=draws, seed=seed)
    drawn = statistic(*[((weight_DS @ table_SP) * weight_DP).sum(1) for table_SP in tables_SP])
    value = statistic(*[np.array([table_SP.mean()]) for table_SP in tables_SP])
    return ends(value[0], drawn)


def ends(value, drawn_D):
    """[value, low, high]: the middle 95% of what was drawn."""
    low, high = np.quantile(drawn_D, [0.025, 0.975])
    return [float(value), float(low), float(high)]


def mean(value):
    return value


def difference(one, other):
    return one - other


def share_of_fall(start, early, end):
    """How much of the way from start to end is gone early."""
    return (start - early) / (start - end)


def shares(part_P, whole_P, draws=DRAWS, seed=1):
    """sum(part)/sum(whole), as a number and, (D,), over draws of problems."""
    part_P = np.asarray(part_P, float)
    whole_P = np.asarray(whole_P, float)
    _, weight_DP = drawn_weights(1, len(whole_P), draws=draws, seed=seed)
    drawn_D = (weight_DP @ part_P) / np.maximum(weight_DP @ whole_P, 1e-12)
    return part_P.sum() / whole_P.sum(), drawn_D


def share_interval(part_P, whole_P):
    """[value, low, high] of sum(part)/sum(whole) when problems are drawn anew: two lists of one number a problem."""
    return ends(*shares(part_P, whole_P))


def rank_correlation(x_DN, y_DN):
    """(D, N), (D, N) → (D,): Spearman's correlation of each row; equal values share the mean of their ranks."""
    x_DN = ranks(x_DN)
    y_DN = ranks(y_DN)
    x_DN = x_DN - x_DN.mean(1, keepdims=True)
    y_DN = y_DN - y_DN.mean(1, keepdims=True)
    spread_D = np.sqrt((x_DN**2).sum(1) * (y_DN**2).sum(1))
    return (x_DN * y_DN).sum(1) / np.maximum(spread_D, 1e-12)


def ranks(x_DN):
    """(D, N) → (D, N): the rank of each value in its row, from 1; equal values share the mean of their ranks."""
    below_DN = (x_DN[:, None, :] < x_DN[:, :, None]).sum(2)
    equal_DN = (x_DN[:, None, :] == x_DN[:, :, None]).sum(2)
    return below_DN + (equal_DN + 1) / 2


# --- answers ----------------------------------------------------------------------------------------------------------


def diversity(texts):
    """Mean pairwise cosine distance between the reasoning of several answers, as bags of n-grams, as in mupo.py."""
    return spread(ngrams([reasoning(text) for text in texts]))


def rand_index(one_G, other_G):
    """The adjusted Rand index of two partitions: 1 where they agree, about 0 where they agree by chance.

    Hubert and Arabie (1985), from the counts of each pair of classes. 0 where one of the two has a single class.
    """
    one_names, one_G = np.unique(one_G, return_inverse=True)
    other_names, other_G = np.unique(other_G, return_inverse=True)
    table = np.zeros((len(one_names), len(other_names)))
    np.add.at(table, (one_G, other_G), 1)
    together = pairs(table).sum()
    one = pairs(table.sum(1)).sum()
    other = pairs(table.sum(0)).sum()
    by_chance = one * other / pairs(len(one_G))
    most = (one + other) / 2
    if most == by_chance:
        return float(len(one_names) == len(other_names))
    return float((together - by_chance) / (most - by_chance))


def pairs(count):
    """How many pairs there are among `count` things."""
    return count * (count - 1) / 2


def agreement(row, *, answers=15, clusters=3, least=3):
    """What MUPO's clusters of some answers to a problem have to do with their styles. row: a line of samples.jsonl.

    Returns the adjusted Rand index of clusters and styles, and the share of clusters that are all right or all wrong.
    """
    texts = row["texts"][:answers]
    labels_G = partition(ngrams([reasoning(text) for text in texts]), clusters, least, seed_of(row["id"], "clusters"))
    labels_G = labels_G.numpy()
    right_G = np.array(row["right"][:answers])
    uniform = [len(np.unique(right_G[labels_G == name])) == 1 for name in np.unique(labels_G)]
    return rand_index(labels_G, [style(text) for text in texts]), float(np.mean(uniform))


# --- the table of a study ---------------------------------------------------------------------------------------------
# All that a study's verdicts are made of, small enough to be committed:
#   answers    world → arm → in or out (of domain) → seeds, n, and for each seed and problem:
#              right (of n), entropy, distinct, ...; and types, the verifier of each problem, where there are several
#   steps      world → arm → seeds, and for each seed the metrics SERIES along its steps
#   coverage   world → noise → wrong, and for each selection credited: numbers of first wrong tokens, one for each
#              problem


def collect(bench, watched, kept, agreeing=()):
    """The table of a study from its finished runs.

    watched: {name of a run or measurement: (world, arm)}. kept: columns of the table. agreeing: arms whose clusters are
    compared with the styles of their answers.
    """
    table = dict(answers={}, steps={}, coverage={})
    for name, (world, arm) in tqdm(watched.items(), desc="runs counted"):
        spec = bench.specs[name]
        if spec.script == "eval_passk.py":
            arms = table["answers"].setdefault(world, {})
            arms[arm] = counted(bench, name, kept, agree=arm in agreeing)
        elif spec.script == "lab/coverage.py":
            noises = table["coverage"].setdefault(world, {})
            noises[arm] = logs.load(bench.folder(name, spec.seeds[0]), "coverage.json", ["wrong", "selections"])[0]
        else:
            table["steps"].setdefault(world, {})[arm] = stepped(bench, name)
    return table


def counted(bench, name, kept, *, agree):
    """{in, out: data, seeds, n, and (S, P) lists} of one measurement, problems in the order of their ids."""
    found = {}
    spec = bench.specs[name]
    for split, data in zip(("in", "out"), spec.flags["dataset"].split(","), strict=False):
        found[split] = dict(data=data, seeds=list(spec.seeds), n=spec.flags["num_samples"])
        for seed in spec.seeds:
            every = counts_of(bench.folder(name, seed), data, kept, agree=agree)
            types = every.pop("types")
            for key, values in every.items():
                found[split].setdefault(key, []).append(values)
        if len(set(types)) > 1:
            found[split]["types"] = types
    return found


def counts_of(folder, data, kept, *, agree=False):
    """{types, and each measure of `kept`: a value for each problem} of one data set in one measurement."""
    carried = folder / COUNTS
    if carried.exists():
        every = json.loads(carried.read_text())[data]
        return {key: every[key] for key in ("types", *kept)}
    rows = answers_of(folder, data)
    return dict(types=[row["verifier"] for row in rows], **columns(rows, kept, agree=agree))


def every_count(bench, name, seed):
    """{data set: counts_of} of one measurement, with all that can be counted quickly."""
    data_sets = bench.specs[name].flags["dataset"].split(",")
    return {data: counts_of(bench.folder(name, seed), data, COUNTED) for data in data_sets}


def answers_of(folder, data):
    """The lines of samples.jsonl about one data set, in the order of the problems' ids."""
    rows = {}
    for row in logs.load(folder, "samples.jsonl", ["id", "dataset", "right", "texts"]):
        if row["dataset"] == data:
            rows[row["id"]] = row
    return [rows[id] for id in sorted(rows)]


def columns(rows, kept, *, agree):
    """{measure: a value for each problem}, from the lines of samples.jsonl. kept: which measures."""
    found = {key: [] for key in kept}
    for row in rows:
        numbers = eval_passk.measures(row, [1])
        values = dict(
            right=sum(row["right"]),
            distinct=int(numbers["distinct"]),
            entropy=round(float(numbers["entropy"]), 3),
            length=round(float(numbers["length"]), 1),
            hesitations=round(float(numbers["hesitations"]), 3),
        )
        if "diversity" in kept:
            values["diversity"] = round(diversity(row["texts"]), 4)
        for key in kept:
            found[key].append(values[key])
    if agree:
        both = [agreement(row) for row in tqdm(rows, desc="clusters", leave=False)]
        found["rand_index"] = [round(index, 4) for index, _ in both]
        found["uniform_clusters"] = [round(share, 4) for _, share in both]
    return found


def stepped(bench, name):
    """{seeds, and for each metric of SERIES its values along the steps of each seed} of a run."""
    spec = bench.specs[name]
    found = dict(seeds=list(spec.seeds))
    for seed in spec.seeds:
        rows = logs.load(bench.folder(name, seed), "metrics.jsonl", ["step"])
        for key in logs.logged(rows, SERIES):
            found.setdefault(key, []).append([round(value, 5) for value in logs.series(rows, key)[1].tolist()])
    return found


# Reading the table:


def seeds_of(table, world, arms, split):
    """The seeds that all of these arms were measured with."""
    every = [table["answers"][world][arm][split]["seeds"] for arm in arms]
    return [seed for seed in every[0] if all(seed in seeds for seeds in every)]


def measure(table, world, arm, split, *, key, seeds, kind=""):
    """(S, P): a measure of an arm, for these seeds. key: pass@k, or a column of the table.

    kind: of the problems with this verifier alone; with "all but" before it, of all others.
    """
    part = table["answers"][world][arm][split]
    rows = [part["seeds"].index(seed) for seed in seeds]
    if key.startswith("pass@"):
        right_SP = np.array(part["right"])[rows]
        found_SP = eval_passk.pass_at_k(np.full(right_SP.shape, part["n"]), right_SP, int(key.removeprefix("pass@")))
    else:
        found_SP = np.array(part[key], float)[rows]
    if not kind:
        return found_SP
    same_P = np.array(part["types"]) == kind.removeprefix("all but ")
    if kind.startswith("all but "):
        return found_SP[:, ~same_P]
    return found_SP[:, same_P]


def gap(table, world, key, *, one, other, split, kind=""):
    """[value, low, high] of the difference between two arms, one minus other, in one measure."""
    seeds = seeds_of(table, world, (one, other), split)
    ours_SP = measure(table, world, one, split, key=key, seeds=seeds, kind=kind)
    theirs_SP = measure(table, world, other, split, key=key, seeds=seeds, kind=kind)
    return interval(difference, ours_SP, theirs_SP)


def along(table, world, arm, key, steps=slice(None)):
    """(S, 1): the mean of a metric over some training steps, counted from 0: one number for each seed."""
    return np.array([[np.mean(values[steps])] for values in table["steps"][world][arm][key]])

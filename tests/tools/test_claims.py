"""lab/measures.py and lab/claims.py: intervals against loops, verdicts, and that the claims speak of what is run."""

import itertools
import json

import eval_passk
from lab import arms, claims, measures
from tabletop.worlds import WORLDS

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT

# --- intervals --------------------------------------------------------------------------------------------------------


def test_interval_is_the_crossed_bootstrap():
    """Against loops: draw seeds, draw problems, the same for both tables; mean of the drawn rectangle; quantiles."""
    random = np.random.default_rng(1)
    one, other = random.random((3, 7)), random.random((3, 7))
    value, low, high = measures.interval(measures.difference, one, other, draws=4000)
    assert value == pytest.approx((one - other).mean())
    draws = []
    for _ in range(4000):
        seeds, problems = random.integers(0, 3, 3), random.integers(0, 7, 7)
        draws.append(np.mean([[one[s, p] - other[s, p] for p in problems] for s in seeds]))
    assert (low, high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)


def test_interval_is_paired_and_counts_problems_and_seeds():
    """A constant gap has no width; what all seeds share stays as wide as the problems make it; and so the other way."""
    table = np.random.default_rng(2).random((5, 400))
    assert measures.interval(measures.difference, table + 0.1, table) == pytest.approx([0.1] * 3)
    problems = np.repeat(table[:1], 5, 0)
    _, low, high = measures.interval(measures.mean, problems)
    _, wanted, until = measures.interval(measures.mean, problems[:1])
    assert high - low == pytest.approx(until - wanted, rel=0.05)
    seeds = np.repeat(table[:, :1], 400, 1)
    assert measures.interval(measures.mean, seeds) == pytest.approx(
        measures.interval(measures.mean, table[:, :1]), abs=0.02)


def test_arms_of_three_and_of_five_seeds_meet_the_same_problems():
    _, of_three_DP = measures.drawn_weights(3, 9)
    _, of_five_DP = measures.drawn_weights(5, 9)
    assert (of_three_DP == of_five_DP).all()


def test_share_of_fall():
    assert measures.share_of_fall(1.0, 0.4, 0.2) == pytest.approx(0.75)


def test_share_interval_draws_problems():
    """Against loops; a share that is the same in every problem has no width."""
    random = np.random.default_rng(3)
    whole = random.integers(1, 6, 40)
    part = random.integers(0, whole + 1)
    value, low, high = measures.share_interval(part, whole)
    assert value == pytest.approx(part.sum() / whole.sum())
    drawn = []
    for _ in range(4000):
        chosen = random.integers(0, 40, 40)
        drawn.append(part[chosen].sum() / whole[chosen].sum())
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)
    assert measures.share_interval([1, 2, 3], [2, 4, 6]) == pytest.approx([0.5] * 3)


def test_rank_correlation_is_spearmans():
    random = np.random.default_rng(4)
    x, y = random.integers(0, 6, (20, 9)), random.random((20, 9))  # with ties
    found = measures.rank_correlation(x, y)
    for row in range(20):
        assert found[row] == pytest.approx(scipy.stats.spearmanr(x[row], y[row]).statistic)


# --- clusters and styles ----------------------------------------------------------------------------------------------


def brute_force_rand(one, other):
    """The adjusted Rand index over all pairs of things."""
    alike = [[a == b for a, b in itertools.combinations(labels, 2)] for labels in (one, other)]
    n = len(alike[0])
    both = sum(a and b for a, b in zip(*alike, strict=True))
    by_chance = sum(alike[0]) * sum(alike[1]) / n
    return (both - by_chance) / ((sum(alike[0]) + sum(alike[1])) / 2 - by_chance)


def test_rand_index_against_pairs():
    random = np.random.default_rng(5)
    for _ in range(20):
        one, other = random.integers(0, 3, 12), random.integers(0, 4, 12)
        assert measures.rand_index(one, other) == pytest.approx(brute_force_rand(one, other))
    assert measures.rand_index([0, 0, 1, 1], ["b", "b", "a", "a"]) == 1
    assert measures.rand_index([0, 0, 1, 1], ["a"] * 4) == 0


def test_clusters_of_three_styles_agree_with_them():
    texts = [f"<think>{word} {word}s {word}</think>" for word in ("Across", "Down", "Mark")] * 5
    index, uniform = measures.agreement(dict(id="p", texts=texts, right=[text[7] == "A" for text in texts]))
    assert (index, uniform) == (1, 1)


# --- the table --------------------------------------------------------------------------------------------------------


def small_table():
    """Two arms of one world: five and three seeds, four problems, n = 2."""
    right = np.random.default_rng(6).integers(0, 3, (5, 4))
    part = dict(n=2, entropy=np.ones((5, 4)).tolist())
    return dict(answers={"w": {
        "a": {"in": part | dict(seeds=[1, 2, 3, 4, 5], right=right.tolist())},
        "b": {"in": part | dict(seeds=[3, 1, 2], right=right[[2, 0, 1]].tolist())},
    }}, steps={}, coverage={})


def test_arms_are_compared_over_the_seeds_they_share():
    """In the same order: an arm compared with part of itself differs by nothing."""
    table = small_table()
    assert measures.seeds_of(table, "w", ("a", "b"), "in") == [1, 2, 3]
    for key in ("pass@1", "pass@2", "entropy"):
        assert measures.gap(table, "w", key, one="a", other="b", split="in") == [0, 0, 0]
    passes = measures.measure(table, "w", "a", "in", key="pass@2", seeds=[5])
    right = table["answers"]["w"]["a"]["in"]["right"][4]
    assert passes.tolist() == [[eval_passk.pass_at_k(2, count, 2) for count in right]]


def test_problems_of_one_verifier_alone_and_all_but_those():
    table = small_table()
    part = table["answers"]["w"]["a"]["in"]
    part["types"] = ["mcq", "digit", "mcq", "math"]
    right = np.array(part["right"][:2])
    for kind, places in (("mcq", [0, 2]), ("math", [3]), ("all but mcq", [1, 3]), ("", [0, 1, 2, 3])):
        found = measures.measure(table, "w", "a", "in", key="pass@1", seeds=[1, 2], kind=kind)
        assert found == pytest.approx(right[:, places] / 2)
    table["answers"]["w"]["b"]["in"] |= dict(types=part["types"], right=[[0, 0, 0, 0]] * 3)
    gap = measures.gap(table, "w", "pass@1", one="a", other="b", split="in", kind="digit")
    assert gap[0] == pytest.approx(np.mean([row[1] / 2 for row in part["right"][:3]]))


def test_columns_of_an_answered_problem():
    texts = ["<think>a b</think>\\boxed{1}", "<think>c d</think>\\boxed{2}"]
    row = dict(id="p", right=[True, False], answers=["1", "2"], greedy_right=True, format=[1, 1], entropy=[2, 4],
               tokens=[4, 8], truncated=[0, 0], texts=texts)
    found = measures.columns([row], ("right", "distinct", "entropy", "length", "diversity"), agree=False)
    assert found == dict(right=[1], distinct=[2], entropy=[0.5], length=[6.0], diversity=[1.0])
    assert measures.diversity(texts[:1] * 3) == pytest.approx(0, abs=1e-6)


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side, low, high, expected", [
    ("above", 0.1, 0.2, "holds"), ("above", -0.2, -0.1, "fails"), ("above", -0.1, 0.1, "open"),
    ("below", -0.2, -0.1, "holds"), ("below", 0.1, 0.2, "fails"), ("below", -0.1, 0.1, "open"),
    ("within", -0.01, 0.01, "holds"), ("within", 0.03, 0.1, "fails"), ("within", -0.1, -0.03, "fails"),
    ("within", -0.01, 0.05, "open"),
])
def test_verdicts(side, low, high, expected):
    bound = 0.02 if side == "within" else 0
    word = claims.judge([(low + high) / 2, low, high], side, bound)
    assert word == claims.verdict([word]) == claims.verdict(["holds", word]) == expected
    assert claims.verdict(["fails", word, "open"]) == "fails"


def two_arms(gap, seeds=(1, 2, 3)):
    """A world in which `all` gets half of all problems right, vepo so much less, and vepo-half the same."""
    random = np.random.default_rng(7)
    chance = {"all": 0.5, "vepo": 0.5 - gap}
    splits = {}
    for arm, p in chance.items():
        right = (random.permuted(np.linspace(0, 1, 400, endpoint=False)) < p).astype(int)
        splits[arm] = {"in": dict(n=1, seeds=list(seeds), right=[right.tolist()] * len(seeds))}
    splits["vepo-half"] = splits["all"]
    return dict(answers={"w": splits}, steps={}, coverage={})


@pytest.mark.parametrize("gap, word", [(0.3, "holds"), (0.0, "open"), (-0.3, "no case")])
def test_a_claim_about_a_case_waits_for_the_case(gap, word):
    """E6 speaks of worlds where VEPO keeping a fifth loses more than five points."""
    claim, = [claim for claim in claims.CLAIMS["doubt"] if claim.id == "E6"]
    row = claims.judged(two_arms(gap), claim, "present", ("w",))
    assert row["tests"][0]["verdict"] == "holds"
    assert row["verdict"] == word


def test_one_seed_gives_no_verdict():
    claim, = [claim for claim in claims.CLAIMS["doubt"] if claim.id == "VEPO against GRPO"]
    for seeds, word in (((1,), "open"), ((1, 2), "fails")):
        assert claims.judged(two_arms(0.3, seeds), claim, "present", ("w",))["verdict"] == word


def test_ranks_over_worlds():
    """Selections whose loss follows their coverage exactly: a correlation of 1; turned round: -1."""
    names = ("entropy", "vepo", "jsd")
    gained = {"all": 90, "entropy": 30, "vepo": 50, "jsd": 70}
    answers = {arm: {"in": dict(n=100, seeds=[1, 2], right=[[count] * 6] * 2)} for arm, count in gained.items()}

    def table(credited):
        selections = {f"{arm}:0.2": dict(credited=[count] * 5) for arm, count in zip(names, credited, strict=True)}
        return dict(answers={"w": answers}, coverage={"w": {"noise-2": dict(wrong=[9] * 5, selections=selections)}})

    ranks = claims.Ranks(names)
    assert ranks.value(table((1, 2, 3)), ("w",)) == pytest.approx([1, 1, 1])
    assert ranks.value(table((3, 2, 1)), ("w",)) == pytest.approx([-1, -1, -1])


def test_the_fall_of_diversity():
    falling = [1.0, 1.0, *[0.4] * 8, *[0.2] * 10]  # the first fifth: steps 3 to 7
    table = dict(steps={"w": {"grpo": dict(seeds=[1, 2], diversity=[falling, falling])}})
    assert claims.Fall("whole", "grpo").value(table, ("w",)) == pytest.approx([0.8] * 3)
    assert claims.Fall("early", "grpo").value(table, ("w",)) == pytest.approx([0.75] * 3)


# --- the claims and the runs ------------------------------------------------------------------------------------------


def every_test():
    """(study, worlds, test) of all claims in all positions."""
    for name, some in claims.CLAIMS.items():
        for claim in some:
            tests = [*claim.tests, *([claim.when] if claim.when else [])]
            for (_, worlds), test in itertools.product(claim.positions, tests):
                yield name, worlds, test


def test_claims_speak_of_what_is_run_and_measured():
    """Every arm of every test is run in every world in which it is asked, with at least three seeds."""
    for name, worlds, test in every_test():
        specs = arms.specs_of(name)
        for world, arm in itertools.product(worlds, test.arms):
            measured = specs[f"{world}/eval-{arm}"]
            assert len(measured.seeds) >= 3
            assert arm == "base" or specs[f"{world}/{arm}"].seeds == measured.seeds
            if isinstance(test, claims.Gap) and test.split == "out":
                assert "," in measured.flags["dataset"]
            if isinstance(test, claims.Gap) and test.measure.startswith("pass@"):
                assert int(test.measure.removeprefix("pass@")) <= measured.flags["num_samples"]
            if isinstance(test, claims.Ranks):
                select = specs[f"{world}/coverage-noise-2"].flags["select"].split(",")
                assert arms.selection_of(world, arm) in select


def test_every_claim_is_asked_with_and_without_its_premise():
    for some in claims.CLAIMS.values():
        for claim in some:
            positions = {position for position, _ in claim.positions}
            assert {"present", "absent"} <= positions or claim.premise == "none"


def test_worlds_are_in_the_tabletop_and_held_out_problems_are_fresh():
    for name in arms.STUDIES:
        for run, spec in arms.specs_of(name).items():
            assert run.partition("/")[0] in WORLDS
            if spec.script == "eval_passk.py":
                first, *others = spec.flags["dataset"].split(",")
                assert first.partition("@")[2].startswith("fresh:")
                assert all(other.partition("@")[2].partition(":")[0] in ("ood", "skill") for other in others)
            else:
                assert "@train" in spec.flags["dataset"]


def test_a_quick_study_does_not_look_at_held_out_problems():
    for name in arms.STUDIES:
        for spec in arms.specs_of(name, quick=True).values():
            assert "@fresh" not in spec.flags["dataset"] and "@skill" not in spec.flags["dataset"]


def test_no_two_arms_of_a_world_are_the_same_run():
    for name in arms.STUDIES:
        seen = set()
        for run, spec in arms.specs_of(name).items():
            key = (run.partition("/")[0], spec.script, spec.start, spec.tokens, repr(sorted(spec.flags.items())))
            assert key not in seen, run
            seen.add(key)


def test_each_ablation_changes_one_flag_of_vepo():
    every = arms.arms_of_doubt(arms.HOME)
    for arm in ("entropy", "jsd", "random", "vepo-half", *arms.ABLATED):
        changed = {key for key in every["vepo"].flags if every[arm].flags.get(key) != every["vepo"].flags[key]}
        added = set(every[arm].flags) - set(every["vepo"].flags)
        assert changed | added in ({"select"}, {"keep"}, {"alpha"}), arm


# --- what is committed ------------------------------------------------------------------------------------------------


def committed():
    """The studies whose tables are committed."""
    return [name for name in arms.STUDIES if (ROOT / f"results/{name}-problems.json").exists()]


def nearly(value):
    """With numbers that may differ in their last digit, as processors sum otherwise."""
    if isinstance(value, float):
        return pytest.approx(value, abs=1.1e-5)
    if isinstance(value, dict):
        return {key: nearly(one) for key, one in value.items()}
    if isinstance(value, list):
        return [nearly(one) for one in value]
    return value


def test_committed_verdicts_follow_from_the_committed_answers():
    """Each row of claims.json computed again from what each arm answered to each problem; what was asked later too."""
    if not committed():
        pytest.skip("no study has been run yet: results/ holds no STUDY-problems.json")
    rows = json.loads((ROOT / "results/claims.json").read_text())
    for name in committed():
        table = json.loads((ROOT / f"results/{name}-problems.json").read_text())
        ids = {claim.id for claim in claims.CLAIMS[name]}
        ours = [row for row in rows if row["id"] in ids and "source" not in row]
        for row, new in zip(ours, claims.rows_of(name, table), strict=True):
            assert {key: row[key] for key in new} == nearly(new)
        found = json.loads((ROOT / f"results/{name}.json").read_text())
        assert found.get("afterwards", []) == nearly(claims.afterwards(name, table))


def test_the_first_studies_stand_as_absent():
    """Each verdict as its file has it. Claims of ours were not asked then."""
    rows = [row for name in claims.CLAIMS for row in claims.first_rows(name)]
    assert {row["id"] for row in rows} == {
        "E1", "E2", "E4", "VEPO against GRPO", "M1", "M2", "M3", "S1", "S2", "S3", "S4 at the start", "S4 after RL"}
    for row in rows:
        found = json.loads((ROOT / row["source"]).read_text())
        old, = [claim for claim in found["claims"] if claim["id"] == row["id"]]
        words = [claims.judge([test["estimate"], *test["interval"]], test["side"], test["bound"])
                 for test in row["tests"]]
        assert row["verdict"] == old["verdict"] == claims.verdict(words)
        assert row["position"] == "absent" and row["seeds"] == [1, 2, 3, 4, 5]


def test_committed_commands_run_on_any_machine():
    """No path of theirs begins at the root of a disk, and every row names the code that made it."""
    rows = json.loads((ROOT / "results/claims.json").read_text())
    for row in rows:
        assert row["code"], row["id"]
    every = [row["commands"] for row in rows]
    every += [json.loads((ROOT / f"results/{study}.json").read_text())["commands"] for study in arms.STUDIES]
    for commands in every:
        for command in commands.values():
            assert not any(word.startswith("/") for word in command.split()), command

"""eval_passk.py: pass@k against brute force, and an evaluation that is stopped and goes on."""

import itertools
import json
import math

import eval_passk
from eval_passk import pass_at_k
from harness.embedding import ngrams
from harness.run import bootstrap

import numpy as np
import pytest
from conftest import run_script

# --- eq. (1) ----------------------------------------------------------------------------------------------------------


def test_pass_at_k_against_every_subset():
    """The share of the subsets of k samples that hold a right one."""
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            samples = [number < c for number in range(n)]
            hits = [any(subset) for subset in itertools.combinations(samples, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)


def test_pass_at_k_of_arrays_against_binomials():
    c = np.arange(65)
    for k in (1, 16, 64):
        exact = [1 - math.comb(64 - right, k) / math.comb(64, k) for right in range(65)]
        assert pass_at_k(np.full(65, 64), c, k) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 5, 1), (4, 1, 0)])
def test_trap_pass_at_k(n, c, k):
    """More tries than samples, or more right ones: an error, not a number."""
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


def test_pass_at_k_is_unbiased():
    """Its mean over binomial counts is 1 − (1 − p)^k. The plug-in estimate 1 − (1 − c/n)^k misses that."""
    p, n, k = 0.2, 8, 4
    truth = 1 - (1 - p) ** k
    mean, plug_in_mean = 0.0, 0.0
    for c in range(n + 1):
        chance = math.comb(n, c) * p**c * (1 - p) ** (n - c)
        mean += chance * pass_at_k(n, c, k)
        plug_in_mean += chance * (1 - (1 - c / n) ** k)
    assert mean == pytest.approx(truth, abs=1e-12)
    assert abs(plug_in_mean - truth) > 0.01


# --- intervals --------------------------------------------------------------------------------------------------------


def test_bootstrap_covers():
    """95% intervals hold the truth in about 95% of 200 repetitions."""
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        _, low, high = bootstrap(random.random(60) < 0.4, draws=1000)
        if low <= 0.4 <= high:
            inside += 1
    assert 0.88 <= inside / 200 <= 0.99


def test_a_contrast_is_paired():
    """One problem in ten goes from half right to all right: the interval of the difference is narrow, and above 0."""
    rows, better = [], []
    for number in range(50):
        row = dict(
            id=number, right=[number % 2 == 1] * 4, greedy_right=True, answers=["1"], format=[1.0], entropy=[1.0],
            tokens=[3], truncated=[0.0], texts=["wait"])
        rows.append(row)
        better.append(row | dict(right=[True] * 4) if number % 10 == 0 else row)
    mean, low, high = eval_passk.contrast(better, rows, [1])["pass@1"]
    assert mean == pytest.approx(0.1)
    assert 0 <= low < mean < high < 0.25


# --- diversity and phrases --------------------------------------------------------------------------------------------


class OneProcess:
    """As much of a run as the measures ask for."""

    rank = 0
    world = 1
    is_main = True

    def gather(self, thing):
        return [thing]


def row_of(name, texts, right):
    n = len(texts)
    return dict(id=name, right=right, greedy_right=True, answers=["1"] * n, format=[1.0] * n, entropy=[1.0] * n,
                tokens=[3] * n, truncated=[0.0] * n, texts=texts)


def test_diversity_is_the_mean_distance_of_pairs():
    """Against every pair of n-gram bags: all the same 0, nothing in common 1; only the reasoning counts."""
    mixed = ["<think>a b</think>1", "<think>a c</think>2", "<think>d</think>3"]
    rows = [
        row_of("same", ["<think>a b</think>1", "<think>a b</think>2"], [True, False]),
        row_of("other", ["<think>a</think>1", "<think>b</think>1"], [True, True]),
        row_of("mixed", mixed, [True] * 3),
    ]
    eval_passk.add_diversity(OneProcess(), rows, ngrams, "")
    assert [row["diversity"] for row in rows] == pytest.approx([0.0, 1.0, (2 / 3 + 1 + 1) / 3], abs=1e-6)
    assert eval_passk.summary(rows[:2], [1])["diversity"][0] == pytest.approx(0.5, abs=1e-6)


def test_processes_share_the_embedding():
    """Each of two embeds every second row, and both end with all of them, in the order of the problems."""
    rows = [row_of(str(i), [f"<think>a {'b ' * i}</think>", f"<think>a {'c ' * i}</think>"], [True] * 2)
            for i in range(5)]
    eval_passk.add_diversity(OneProcess(), rows, ngrams, "")
    expected = [row.pop("diversity") for row in rows]
    for rank in range(2):
        run = OneProcess()
        run.rank = rank
        run.world = 2
        found = []
        run.gather = lambda mine, found=found: found.append(mine) or [expected[0::2], expected[1::2]]
        eval_passk.add_diversity(run, rows, ngrams, "")
        assert found == [expected[rank::2]]
        assert [row.pop("diversity") for row in rows] == expected


def test_points_of_the_scatter():
    """acc@4 of each problem is pass@4 from its n answers; with fewer answers, of as many as there are."""
    row = row_of("a", ["<think>a</think>"] * 8, [True, *[False] * 7]) | dict(diversity=0.25)
    points = eval_passk.by_problem([row])
    assert points == dict(id=["a"], tries=4, acc=[pytest.approx(0.5)], diversity=[0.25])
    few = row_of("a", ["<think>a</think>"] * 2, [True, False]) | dict(diversity=0.0)
    assert eval_passk.by_problem([few])["tries"] == 2
    assert eval_passk.by_problem([row_of("a", ["x"], [True])]) == {}


def test_the_fall_of_diversity_is_paired():
    """A contrast with the first model, over the same problems."""
    rows = [row_of(str(i), ["x"], [True]) | dict(diversity=0.1 * i) for i in range(8)]
    less = [row | dict(diversity=row["diversity"] - 0.05) for row in rows]
    assert eval_passk.contrast(less, rows, [1])["diversity"] == pytest.approx((-0.05,) * 3)


# --- whole evaluations ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
    """An evaluation on two data sets: its folder, the command without its folder, and how it ended."""
    place = tmp_path_factory.mktemp("eval") / "out"
    command = (
        "eval_passk.py",
        "--model", folder,
        "--dataset", "toy@test:6,toy@ood:4",
        "--num_samples", 4,
        "--ks", "1,2,4",
        "--max_completion_length", 12,
        "--sample_batch_size", 8,
        "--max_prompt_length", 512,
        "--output_dir",
    )
    done = run_script(*command, place)
    assert done.returncode == 0, done.stderr
    return place, command, done


def test_an_evaluation_writes_what_it_says(evaluated):
    """The number of samples, the temperature and the k stand beside the numbers, a part for each data set."""
    place, _, done = evaluated
    shown = done.stdout
    first, second = json.loads((place / "eval.json").read_text())
    assert first["problems"] == 6
    assert second["problems"] == 4
    assert first["n"] == 4
    assert first["temperature"] == 1.0
    assert first["ks"] == [1, 2, 4]
    assert set(first["verifiers"]) <= {"digit", "mcq", "math", "iou"}
    assert "toy@ood:4: prompts of " in done.stderr
    assert "pass@4" in shown
    assert (place / "pass_at_k.png").read_bytes()[:4] == b"\x89PNG"
    assert (place / "diversity.png").read_bytes()[:4] == b"\x89PNG"
    assert 0 <= first["measures"]["diversity"][0] <= 1
    assert len(first["by_problem"]["acc"]) == 6
    assert "diversity" in shown.splitlines()[0]


def test_a_stopped_evaluation_goes_on(evaluated, tmp_path):
    """Two whole lines and half a third are left: the rest is sampled, and everything is as if it had never stopped."""
    place, command, _ = evaluated
    lines = (place / "samples.jsonl").read_text().splitlines(keepends=True)
    stopped = tmp_path / "out"
    stopped.mkdir()
    (stopped / "samples.jsonl").write_text(lines[0] + lines[1] + lines[2][:50])
    done = run_script(*command, stopped)
    assert done.returncode == 0, done.stderr
    again = (stopped / "samples.jsonl").read_text().splitlines(keepends=True)
    assert again[:2] == lines[:2]
    assert sorted(again) == sorted(lines)
    assert (stopped / "eval.json").read_text() == (place / "eval.json").read_text()

"""eval_passk.py: pass@k against brute force, and an evaluation that is stopped and goes on."""

import itertools
import json
import math

import eval_passk
from eval_passk import pass_at_k
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


# --- whole evaluations ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
    """An evaluation on two data sets: its folder, the command without its folder, and what it printed."""
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
    return place, command, done.stdout


def test_an_evaluation_writes_what_it_says(evaluated):
    """The number of samples, the temperature and the k stand beside the numbers, a part for each data set."""
    place, _, shown = evaluated
    first, second = json.loads((place / "eval.json").read_text())
    assert first["problems"] == 6
    assert second["problems"] == 4
    assert first["n"] == 4
    assert first["temperature"] == 1.0
    assert first["ks"] == [1, 2, 4]
    assert set(first["verifiers"]) <= {"digit", "mcq", "math", "iou"}
    assert "pass@4" in shown
    assert (place / "pass_at_k.png").read_bytes()[:4] == b"\x89PNG"


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

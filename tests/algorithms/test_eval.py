"""eval_passk.py: pass@k against brute force, and an evaluation that is stopped and goes on."""

import itertools
import json
import math

import numpy as np
import pytest

import common
import eval_passk
from conftest import run_script
from eval_passk import pass_at_k


def test_trap_pass_at_k():
    """Against every subset of k samples; k > n is an error; arrays give the same as numbers."""
    for n, c in itertools.product(range(1, 8), range(8)):
        if c <= n:
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
    c = np.arange(65)
    for k in (1, 16, 64):
        exact = [1 - math.comb(64 - int(x), k) / math.comb(64, k) for x in c]
        assert pass_at_k(np.full(65, 64), c, k) == pytest.approx(exact, abs=1e-12)
    for n, c, k in ((4, 1, 5), (4, 5, 1), (4, 1, 0)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(n, c, k)


def test_pass_at_k_is_unbiased():
    """Its mean over binomial counts is 1 − (1 − p)^k, which the plug-in 1 − (1 − c/n)^k misses."""
    p, n, k = 0.2, 8, 4
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
    assert abs(plug_in - (1 - (1 - p) ** k)) > 0.01


def test_bootstrap_covers_and_pairs():
    """95% intervals hold the truth in about 95% of repetitions; a paired contrast is narrower than an unpaired one."""
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        mean, low, high = common.bootstrap(random.random(60) < 0.4, draws=1000)
        inside += low <= 0.4 <= high
    assert 0.88 <= inside / 200 <= 0.99
    rows = [dict(id=i, right=[bool(i % 2)] * 4, greedy_right=True, answers=["1"], format=[1.0], entropy=[1.0],
                 tokens=[3], truncated=[0.0]) for i in range(50)]
    better = [row | dict(right=[True] * 4) if i % 10 == 0 else row for i, row in enumerate(rows)]
    mean, low, high = eval_passk.contrast(better, rows, [1])["pass@1"]
    assert mean == pytest.approx(0.1) and 0 <= low < mean < high < 0.25


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("eval") / "out"
    command = ["eval_passk.py", "--model", folder, "--dataset", "toy@test:6,toy@ood:4", "--num_samples", 4, "--ks", "1,2,4",
               "--max_completion_length", 12, "--sample_batch_size", 8, "--max_prompt_length", 512, "--output_dir"]
    done = run_script(*command, place)
    assert done.returncode == 0, done.stderr
    return place, command, done.stdout


def test_evaluation_writes_what_it_says(evaluated):
    place, _, shown = evaluated
    results = json.loads((place / "eval.json").read_text())
    assert [entry["problems"] for entry in results] == [6, 4] and "pass@4" in shown
    assert results[0]["n"] == 4 and results[0]["temperature"] == 1.0 and results[0]["ks"] == [1, 2, 4]
    assert set(results[0]["verifiers"]) <= {"digit", "mcq", "math", "iou"}
    assert (place / "pass_at_k.png").read_bytes()[:4] == b"\x89PNG"


def test_a_stopped_evaluation_goes_on(evaluated, tmp_path):
    """Two whole lines and half a third are left: the rest is sampled, and everything is as if never stopped."""
    place, command, _ = evaluated
    lines = (place / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/samples.jsonl").write_text("".join(lines[:2]) + lines[2][:50])
    done = run_script(*command, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    again = (tmp_path / "out/samples.jsonl").read_text().splitlines(keepends=True)
    assert again[:2] == lines[:2] and sorted(again) == sorted(lines)
    assert (tmp_path / "out/eval.json").read_text() == (place / "eval.json").read_text()

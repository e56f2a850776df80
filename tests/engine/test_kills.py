"""A run that is killed at random moments, while it writes too, ends in the numbers of a run that nobody killed."""

import pytest
from conftest import ROOT, run_script


def kills(folder, number, steps, seed):
    flags = ("--kills", number, "--steps", steps, "--seed", seed)
    path = f"{ROOT}:{ROOT / 'tests'}"
    done = run_script("tests/kills.py", "--model", folder, *flags, PYTHONPATH=path, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{number} kills" in done.stdout
    assert "all equal" in done.stdout


@pytest.mark.slow
def test_three_kills(folder):
    kills(folder, 3, steps=3, seed=1)


@pytest.mark.slow
def test_twenty_kills(folder):
    kills(folder, 20, steps=20, seed=2)

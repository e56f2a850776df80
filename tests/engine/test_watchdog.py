"""tests/watchdog.py: what hangs is ended with all that it started, and the test fails."""

import os
import sys
import time
from pathlib import Path

import pytest
from watchdog import run_watched

HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
pathlib.Path("child").write_text(str(child.pid))
print("I wait", flush=True)
time.sleep(60)
"""


def is_alive(pid):
    """A process that has ended and was not asked for its status yet is a zombie, Z."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_hangs_ends_with_its_children_and_fails(tmp_path):
    began = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="not done after 5 seconds: (.|\n)*I wait"):
        run_watched([sys.executable, "-c", HANGS], 5, cwd=tmp_path)
    assert time.monotonic() - began < 40
    child = int((tmp_path / "child").read_text())
    assert child != os.getpid()
    assert not is_alive(child)


def test_what_ends_is_handed_back(tmp_path):
    done = run_watched([sys.executable, "-c", "import sys; print(1); sys.exit(3)"], 30, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "1\n", "")

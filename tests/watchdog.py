"""Runs a command with a time limit that nothing survives: neither the command, nor any process that it started.

torchrun gives its processes sessions of their own, so that a limit on torchrun alone would leave them behind, waiting
for each other for hours.
"""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest


def children(pid):
    """The processes that a process has started, theirs too; Linux's /proc knows."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended by itself meanwhile
            for child in file.read_text().split():
                found += [int(child), *children(child)]
    return found


def kill_all(process):
    """Ends a process and all that it started."""
    everyone = [*children(process.pid), process.pid]
    for pid in everyone:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has ended by itself meanwhile
    process.wait()


def run_watched(command, timeout, **settings):
    """subprocess.run(command, capture_output=True, text=True), of which a test fails if it takes `timeout` seconds."""
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)
    try:
        said, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(process)
        said, errors = process.communicate()
        pytest.fail(f"not done after {timeout} seconds: {' '.join(words)}\n{said[-1000:]}\n{errors[-3000:]}")
    finally:
        if process.poll() is None:  # the test itself was ended
            kill_all(process)
    return subprocess.CompletedProcess(words, process.returncode, said, errors)

"""Threads that share their cores with other processes: when they stop spinning, and that they start again."""

import os
import subprocess
import sys
import threading
import time

from harness import threads

import pytest
import torch

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who uses our cores")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def tasks():
    """The threads of this process, those of OpenMP too."""
    return len(os.listdir("/proc/self/task"))


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


@ON_LINUX
def test_trap_busy_cores(two_threads):
    """Threads that spin while others hold a core take four times as long. OpenMP spins only briefly when it has more
    threads than cores: so a crowded machine gets an extra team, of a thread and one worker, and a quiet one none."""
    torch.zeros(threads.SPLIT).add_(1)  # this thread's own team
    watch = threads.Watch()
    before = tasks()
    watch.set_crowded(True)
    assert wait_until(lambda: tasks() == before + 2)
    watch.set_crowded(True)
    assert tasks() == before + 2
    watch.set_crowded(False)
    assert wait_until(lambda: tasks() == before)
    watch.set_crowded(False)


def test_crowded_is_more_threads_than_free_cores(two_threads):
    assert not threads.is_crowded(others=0.1, cores=2)
    assert threads.is_crowded(others=0.9, cores=2)
    assert not threads.is_crowded(others=0.9, cores=4)
    assert threads.is_crowded(others=2.9, cores=4)


@ON_LINUX
def test_used_seconds_are_those_of_the_given_cores():
    """A process that works for some CPU time on one core adds as much to that core."""
    core = min(os.sched_getaffinity(0))
    work = ("import os, time\n"
            f"os.sched_setaffinity(0, [{core}])\n"
            "while time.process_time() < 0.5: pass\n")
    began = time.monotonic()
    before = threads.used_seconds([core])
    subprocess.run([sys.executable, "-c", work], check=True)
    used = threads.used_seconds([core]) - before
    assert 0.1 < used < time.monotonic() - began + 0.1  # others may use that core too, but no more than all of it


class Clock:
    """Stands in for the module time. Only a sleep takes time, and our process keeps two cores busy meanwhile."""

    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def monotonic(self):
        return self.now

    def process_time(self):
        return 2 * self.now


@pytest.mark.parametrize("others", [0, 1])
def test_the_watch_follows_the_others(others, two_threads, monkeypatch):
    """Our own work is not taken for that of others, and what is found decides."""
    found = []

    class Enough(Exception):
        pass

    def remember(watch, crowded):
        found.append(crowded)
        if len(found) == 2:
            raise Enough

    clock = Clock()
    monkeypatch.setattr(threads, "time", clock)
    monkeypatch.setattr(threads, "used_seconds", lambda cores: (2 + others * len(cores)) * clock.now)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(threads.Watch, "set_crowded", remember)
    with pytest.raises(Enough):
        threads.Watch().run()
    assert found == [others > 0] * 2


@ON_LINUX
def test_one_watch_is_enough(two_threads, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(threads.Watch, "run", lambda _: over.wait())
    for _ in range(3):
        threads.watch_cores()
    watching = [thread for thread in threading.enumerate() if isinstance(thread, threads.Watch)]
    assert len(watching) == 1
    over.set()
    watching[0].join()

"""Threads that share their cores with other processes.

A step of the tabletop is thousands of small operations, each split over threads that then wait for each other. They
spin while they wait, which is fastest on a quiet machine. But where another process holds a core, the thread that is
waited for does not run, and a step takes four times as long (results/busy.json).

OpenMP spins only for a moment when it has more threads than cores (GOMP_SPINCOUNT in the manual of libgomp). So while
other processes need our cores, we keep one thread more, which does nothing. When they are done, it ends. No number
depends on it. The system must be Linux: only there can a process tell who uses its cores.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable

import torch

INTERVAL = 1.0  # seconds between two looks
NOTICED = 0.5  # cores that others must be using, so that it is worth while
SPLIT = 2**17  # elements; torch does not split an operation of fewer than 2**15 over threads


def watch_cores():
    """From now on, waits with less spinning while other processes use our cores. A second call changes nothing."""
    several = torch.get_num_threads() > 1
    watched = any(isinstance(thread, Watch) for thread in threading.enumerate())
    if sys.platform == "linux" and several and not watched:
        Watch().start()


class Watch(threading.Thread):
    """Looks every second at who uses our cores, and keeps one thread more while others do."""

    def __init__(self):
        super().__init__(name="watch-cores", daemon=True)
        self.extra = None

    def run(self):
        cores = os.sched_getaffinity(0)
        while True:
            everyone = used_seconds(cores)
            ours = time.process_time()
            began = time.monotonic()
            time.sleep(INTERVAL)
            passed = time.monotonic() - began
            others = (used_seconds(cores) - everyone) - (time.process_time() - ours)
            self.set_crowded(is_crowded(others / passed, len(cores)))

    def set_crowded(self, crowded: bool):
        """Starts or ends the extra thread."""
        if crowded and self.extra is None:
            self.extra = ExtraThread()
            self.extra.start()
        if not crowded and self.extra is not None:
            self.extra.over.set()
            self.extra = None


class ExtraThread(threading.Thread):
    """A thread with an OpenMP team of its own, which waits until it is `over`."""

    def __init__(self):
        super().__init__(name="extra-openmp-team", daemon=True)
        self.over = threading.Event()

    def run(self):
        torch.zeros(SPLIT).add_(1)  # the first operation that is split makes the team; the thread's end dissolves it
        self.over.wait()


def is_crowded(others: float, cores: int) -> bool:
    """Whether others, who use that many of our cores on average, leave us fewer cores than we have threads."""
    return others + torch.get_num_threads() > cores + NOTICED  # trap: busy cores


def used_seconds(cores: Iterable[int]) -> float:
    """Seconds for which these cores have worked, for whatever process, since the machine started: from /proc/stat.

    A line there is a core's name, then ticks: user, nice, system, idle, waiting for a disk, interrupts, ...
    """
    names = {f"cpu{core}" for core in cores}
    ticks = 0
    with open("/proc/stat") as lines:
        for line in lines:
            name, *columns = line.split()
            if name in names:
                user, nice, system = (int(column) for column in columns[:3])
                ticks += user + nice + system
    return ticks / os.sysconf("SC_CLK_TCK")

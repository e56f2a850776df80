"""Starts scripts in processes that need not import torch and transformers anew, which saves seconds each time.

    starter = Starter()
    started = starter.start(dict(command=["grpo.py", "--max_steps=3"], environment=os.environ | {}, cwd=".", ...))
    started.wait()

Behind it is a server, lab/server.py, that has imported them and forks for every process that it is asked for. torchrun
itself is tested where the launcher matters.
"""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Starter:
    """A server for one order at a time. Like the processes that it starts, it uses one thread. core: pinned to it."""

    def __init__(self, core: int | None = None):
        path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
        environment = os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS="1")
        # Without a buffer: `select` does not see an answer that was read ahead.
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "lab" / "server.py")], env=environment, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if core is not None:
            os.sched_setaffinity(self.process.pid, [core])

    def start(self, order: dict) -> "Started":
        """Starts what the order asks for.

        command: a script and its arguments. environment, cwd. stdout, stderr: files, to which is appended. processes:
        how many (1). timeout: seconds after which they are ended (never).
        """
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        return Started(self.process.stdout, json.loads(self.process.stdout.readline()))

    def end(self):
        """Ends the server. It also ends with this process."""
        self.process.communicate()


class Started:
    """Processes that a Starter started: what subprocess.Popen is for one."""

    def __init__(self, answers, pids):
        self.answers = answers
        self.pids = pids
        self.codes = None  # the exit code of each, in the order of their ranks

    @property
    def returncode(self) -> int | None:
        """0, or the exit code of the first that failed; None while they run."""
        if self.codes is None:
            return None
        failed = [code for code in self.codes if code]
        return failed[0] if failed else 0

    def poll(self) -> int | None:
        """returncode, as it is now."""
        if self.codes is None and select.select([self.answers], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Waits until all have ended. Returns returncode."""
        if self.codes is None:
            self.codes = json.loads(self.answers.readline())
        return self.returncode

    def terminate(self):
        """Asks all of them to end."""
        if self.poll() is None:
            for pid in self.pids:
                os.kill(pid, signal.SIGTERM)

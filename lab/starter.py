"""Starts scripts in processes of their own that need not import torch and transformers first: seconds for each.

    server = Starter()
    child = server.start(dict(command=["grpo.py", "--max_steps=3"], environment=..., cwd=..., stdout=..., stderr=...))
    child.wait()

A server that has imported them, and done nothing else, forks for every process that it is asked for. A child then runs
its script as `python script ...` would, in its own folder, with its own environment and output. torchrun itself is
tested where the launcher matters.
"""

import json
import os
import runpy
import select
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# --- the one who asks -------------------------------------------------------------------------------------------------


class Starter:
    """A server for one order at a time. Like the processes that it starts, it uses one thread. core: pinned to it."""

    def __init__(self, core: int | None = None):
        path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
        environment = os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS="1")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], env=environment, bufsize=0,  # nothing is read before it is asked for
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


# --- the server -------------------------------------------------------------------------------------------------------


def become(order, rank):
    """Makes this process the one that `order` asks for: its folder, its output, its environment, its arguments."""
    signal.alarm(order.get("timeout", 0))  # nobody waits for it longer
    for number, name in enumerate(("nothing", "stdout", "stderr")):
        path = os.devnull if name == "nothing" else order[name]
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    if order.get("processes", 1) > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = order["command"]


def serve():
    """Forks for each order, a line of JSON on stdin; answers with the ids of its processes, then with their exit codes.

    Returns in a child alone. The server ends with its stdin.
    """
    for line in sys.stdin:
        order = json.loads(line)
        ranks = {}
        for rank in range(order.get("processes", 1)):
            child = os.fork()
            if child == 0:
                become(order, rank)
                return
            ranks[child] = rank
        print(json.dumps(list(ranks)), flush=True)
        print(json.dumps(exit_codes(ranks)), flush=True)
    raise SystemExit


def exit_codes(ranks):
    """Of every process, by rank. {process: rank} may be waited for; where one fails the others are ended."""
    codes = [0 for _ in ranks]
    left = dict(ranks)
    while left:
        child, status = os.wait()
        codes[left.pop(child)] = os.waitstatus_to_exitcode(status)
        if status:
            for other in left:
                os.kill(other, signal.SIGTERM)
    return codes


def get_ready():
    """Does once what every script would do at its beginning."""
    import common  # noqa: F401
    from harness.answers import warm_up
    from lab import report  # noqa: F401
    from tabletop.models import learned_words

    import torch
    import torch._dynamo  # noqa: F401  (torch imports it at the first step of an optimizer)
    torch.set_num_threads(1)
    warm_up()
    learned_words("all")


if __name__ == "__main__":
    get_ready()
    serve()
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    runpy.run_path(sys.argv[0], run_name="__main__")

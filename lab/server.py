"""The server behind lab/starter.py: imports what the scripts need, then forks for every process that it is asked for.

A child runs its script as `python script ...` would, in its own folder, with its own environment and output.
"""

import json
import os
import runpy
import signal
import sys

import common  # noqa: F401
from harness.answers import warm_up
from lab import report  # noqa: F401
from tabletop.models import learned_words

import torch
import torch._dynamo  # noqa: F401  (torch imports it at the first step of an optimizer)


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm_up()  # this and the next: what a script would do at its beginning, done once
    learned_words("all")
    serve()
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    runpy.run_path(sys.argv[0], run_name="__main__")

"""Several processes: how long they wait for each other, and whose folder counts."""

import os
import subprocess
import sys
import textwrap
from datetime import timedelta

import harness.run

import pytest
from conftest import ROOT, free_port, run_script, run_torchrun

START = """
import argparse, datetime, os, sys
from harness.flags import UserError
from harness.run import Run
import harness.run
import torch

def args(folder, resume=False):
    return argparse.Namespace(
        output_dir=folder, resume=resume, report_to="none", script="grpo", model="toy", max_steps=3, prompts_per_step=4,
        updates_per_step=1, seed=1, save_steps=1)
"""


def processes(tmp_path, body, start=run_script):
    """Runs `body` after START in two processes."""
    path = tmp_path / "two.py"
    path.write_text(START + textwrap.dedent(body))
    return start(path, processes=2, cwd=tmp_path, timeout=120)


def test_trap_collective_timeout(tmp_path):
    """The processes wait for each other as long as TIMEOUT says, and that is hours, not the usual minutes."""
    assert timedelta(hours=2) <= harness.run.TIMEOUT
    done = processes(tmp_path, """
        import time
        rank = int(os.environ["RANK"])
        open(f"here-{rank}", "w").close()
        while not os.path.exists(f"here-{1 - rank}"):
            time.sleep(0.01)  # they have as little time to find each other
        harness.run.TIMEOUT = datetime.timedelta(seconds=5)
        run = Run(args("run"))
        began = time.monotonic()
        if run.rank == 1:
            while not os.path.exists("over") and time.monotonic() - began < 60:
                time.sleep(0.01)
            sys.exit(0)
        try:
            run.gather(1)
        except Exception as error:
            print("gave up", 1 < time.monotonic() - began < 50, flush=True)
            open("over", "w").close()
            os._exit(0)
    """)
    assert "gave up True" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("leftover", [pytest.param("args.json", marks=pytest.mark.slow), "checkpoint-2"])
def test_trap_whose_disk(tmp_path, leftover):
    """A folder that only the first process sees is met at the start, whatever another node has on a disk of its own."""
    done = processes(tmp_path, f"""
        here = args("run", resume=True)
        flags = harness.run.json.dumps(vars(here))
        if int(os.environ["RANK"]) == 0:
            os.makedirs("run/checkpoint-1")
            open("run/checkpoint-1/state.json", "w").write("[1, {{}}, {{}}]")
        else:
            os.makedirs("elsewhere/run")
            os.chdir("elsewhere")
            if "{leftover}" == "args.json":
                open("run/args.json", "w").write(flags)
            if "{leftover}" == "checkpoint-2":
                os.makedirs("run/checkpoint-2")
        run = Run(here)
        weights = torch.nn.Linear(2, 2)
        try:
            run.start(weights, torch.optim.AdamW(weights.parameters()))
        except UserError as error:
            print(f"rank {{run.rank}}: {{error}}", flush=True)
    """)
    for rank in (0, 1):
        assert f"rank {rank}: --output_dir run: process 1 does not see" in done.stdout, done.stdout + done.stderr


# --- a process that dies ----------------------------------------------------------------------------------------------

DIES = """
    import signal
    from harness.flags import launch

    def main(_):
        run = Run(args("run"))
        run.listen()
        run.gather(1)
        if run.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        {waits}

    launch("grpo", main, lambda parser: None)
"""
LAST_WORDS = "error (rank 0): another process of this run has ended; its own error line says why"


def test_a_process_that_dies_ends_the_others(tmp_path):
    """Killed while the other waits for it: the launcher comes back soon, with one line and no traceback of ours."""
    done = processes(tmp_path, DIES.format(waits="run.sum(1.0)"), start=run_torchrun)
    assert done.returncode == 1
    assert done.stderr.count(LAST_WORDS) == 1
    assert "RuntimeError" not in done.stderr


@pytest.mark.slow
def test_a_process_that_dies_on_another_node(tmp_path):
    """Two launchers, as on two nodes: the second node's process is killed, and the first node ends by itself."""
    path = tmp_path / "node.py"
    path.write_text(START + textwrap.dedent(DIES.format(waits="run.gather(1)")))
    port = free_port()
    nodes = []
    for rank in (0, 1):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank),
            "--nproc_per_node", "1", "--master_addr", "localhost", "--master_port", str(port), str(path)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        nodes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        _, said = nodes[0].communicate(timeout=90)
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    assert nodes[0].returncode == 1
    assert said.count(LAST_WORDS) == 1
    assert "RuntimeError" not in said

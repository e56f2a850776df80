"""Several processes: how long they wait for each other, and whose folder counts."""

import textwrap
from datetime import timedelta

import harness.run

import pytest
from conftest import run_script

START = """
import argparse, os, sys
from harness.flags import UserError
from harness.run import Run
import harness.run
import torch

def args(folder, resume=False):
    return argparse.Namespace(
        output_dir=folder, resume=resume, report_to="none", script="grpo", model="toy", max_steps=3, prompts_per_step=4,
        updates_per_step=1, seed=1)
"""


def processes(tmp_path, body):
    """Runs `body` behind START in two processes."""
    path = tmp_path / "two.py"
    path.write_text(START + textwrap.dedent(body))
    return run_script(path, processes=2, cwd=tmp_path, timeout=120)


def test_trap_collective_timeout(tmp_path):
    """The processes wait for each other as long as TIMEOUT says, and that is hours, not the usual minutes."""
    assert timedelta(hours=2) <= harness.run.TIMEOUT
    done = processes(tmp_path, """
        import time
        harness.run.TIMEOUT = harness.run.timedelta(seconds=2)
        run = Run(args("run"))
        began = time.monotonic()
        if run.rank == 1:
            time.sleep(7)
            sys.exit(0)
        try:
            run.gather(1)
        except Exception as error:
            print("gave up", 1 < time.monotonic() - began < 6, flush=True)
            os._exit(0)
    """)
    assert "gave up True" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("leftover", ["args.json", "checkpoint-2"])
def test_trap_whose_disk(tmp_path, leftover):
    """A folder that only the first process sees is met at the start, whatever another node has on a disk of its own."""
    done = processes(tmp_path, f"""
        here = args("run", resume=True)
        flags = harness.run.json.dumps(vars(here))
        if int(os.environ["RANK"]) == 0:
            os.makedirs("run/checkpoint-1")
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

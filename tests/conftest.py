"""What the tests share: a small untrained model in the hub's layout, and problems with pictures of several sizes."""

import functools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from watchdog import run_watched

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder must fail at once, not after retries
TABLES = tempfile.TemporaryDirectory()  # what datasets keeps of the files that it reads
os.environ["HF_DATASETS_CACHE"] = TABLES.name
torch.set_num_threads(1)  # the models are tiny: two threads wait for each other more than they work

import common
import harness.run
from lab.starter import Starter
from tabletop import models

harness.run.watch_cores = lambda: None  # the thread would outlive its test; scripts that tests start have it
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def process_as_before():
    """Puts pytest's signal handlers back: a run that a test left by an error would go on listening. And its threads: a
    run takes all cores."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An untrained Qwen2.5-VL of the tabletop's size, as a checkpoint folder."""
    place = tmp_path_factory.mktemp("model") / "untrained"
    models.untrained(str(place))
    return str(place)


@pytest.fixture(scope="session")
def loaded(folder):
    return common.load_policy(folder)


@pytest.fixture
def policy(loaded):
    policy = loaded[0]
    policy.zero_grad()
    return policy.requires_grad_(True)


@pytest.fixture
def processor(loaded):
    return loaded[1]


def picture(width, height, seed=0):
    noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((noise * 255).byte().numpy())


@pytest.fixture(scope="session")
def problems():
    """Five problems: three picture sizes, two pictures in one, prompts of several lengths."""
    sizes = [[(84, 84)], [(112, 56)], [(84, 84), (56, 140)], [(112, 112)], [(84, 84)]]
    texts = ["How many red circles?", "Where is it?", "Compare <image> and <image>, then count.", "Why? " * 9, "Go."]
    return [
        dict(id=f"p{i}", images=[picture(*size, seed=10 * i + j) for j, size in enumerate(some)], problem=text,
             answer="1", verifier="digit")
        for i, (some, text) in enumerate(zip(sizes, texts, strict=True))
    ]


@functools.cache
def starter():
    """The server that starts scripts without importing torch anew for each."""
    return Starter()


def pytest_collection_finish(session):
    """The server imports while the first tests run: among many tests some will ask for it."""
    if len(session.items) > 500 and not session.config.option.collectonly:
        starter()


def pytest_sessionfinish():
    if starter.cache_info().currsize:
        starter().end()


def free_port():
    """A port that nobody listens on, below those that the system hands out by itself."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as some:
            try:
                some.bind(("localhost", port))
            except OSError:
                continue
            return port


def run_script(*command, timeout=300, processes=1, cwd=ROOT, **environment):
    """Runs `python command...` from the project's root, `processes` times, and returns what came of it.

    Several processes find each other as under torchrun. returncode is that of the first one that failed, or 0.
    """
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"} | environment
    if processes > 1:
        env |= dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="localhost",
                    MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as place:
        files = dict(stdout=f"{place}/stdout", stderr=f"{place}/stderr")
        order = dict(command=[str(word) for word in command], environment=env, cwd=str(cwd), processes=processes,
                     timeout=timeout, **files)
        code = starter().start(order).wait()
        said = {name: Path(path).read_text() for name, path in files.items()}
    return subprocess.CompletedProcess(command, code, **said)


def run_torchrun(*command, timeout=300, processes=2, cwd=ROOT, **environment):
    """Runs `torchrun command...` from the project's root, and returns what came of it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"} | environment
    return run_watched([*launcher, *command], timeout, cwd=cwd, env=env)

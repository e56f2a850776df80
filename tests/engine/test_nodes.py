"""Several nodes: weights are split inside a node and copied across, which changes no number.

Four processes stand for two nodes of two. They take a while to start, so these tests are slow.
"""

import common

import pytest
import torch
from conftest import run_script
from whole_runs import SMALL, assert_same_run, drive, metrics

pytestmark = pytest.mark.slow

FLAGS = ("--updates_per_step", 2, "--beta", 0.1, "--save_steps", 1)
MESH = """
import os
from datetime import timedelta
os.environ["LOCAL_WORLD_SIZE"] = "2"
from harness import sharding
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
policy, teacher = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for _ in range(2)]
for model in (policy, teacher):
    model._no_split_modules = ["Linear"]
    sharding.split(model, torch.device("cpu"), methods=())
mesh = policy[0].weight.device_mesh
assert mesh is teacher[0].weight.device_mesh
assert mesh.mesh.tolist() == [[0, 1], [2, 3]]
assert mesh.mesh_dim_names == ("nodes", "inside")
assert list(policy[0].weight.placements) == [Replicate(), Shard(0)]
for name in mesh.mesh_dim_names:
    assert mesh.get_group(name)._get_backend(torch.device("cpu")).options._timeout == sharding.TIMEOUT
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """One process, two updates per rollout, a KL to the reference: two models share a mesh."""
    return drive(folder, tmp_path_factory.mktemp("alone") / "run", *FLAGS)


def test_two_nodes_give_the_run_of_one_process(folder, tmp_path, alone):
    """Answers, losses, gradients, their norm (and so how they are clipped), held-out accuracy, and what is saved."""
    nodes = drive(folder, tmp_path / "run", *FLAGS, processes=4, NODES="2")
    assert_same_run(alone, nodes)
    for ours, theirs in zip(metrics(alone), metrics(nodes), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-3)
    before = common.load_policy(str(folder))[0].state_dict()
    expected = common.load_policy(str(alone))[0].state_dict()
    saved = common.load_policy(str(nodes))[0].state_dict()
    for name, weight in expected.items():
        assert torch.allclose(saved[name], weight, atol=1e-3), name
    assert any((saved[name] - before[name]).abs().max() > 1e-3 for name in saved)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_two_nodes_began_goes_on_with_fewer_processes(folder, tmp_path, alone, processes):
    """Killed after the line of the second step: a checkpoint of the first, written by two nodes, is all there is."""
    place = tmp_path / "run"
    command = ("--model", folder, *SMALL, "--num_generations", 3, *FLAGS, "--output_dir", place)
    killed = run_script("tests/drive.py", "grpo", *command, processes=4, timeout=180, NODES="2", KILL_AT="2")
    assert killed.returncode != 0
    assert (place / "checkpoint-1").exists()
    drive(folder, place, *FLAGS, "--resume", processes=processes)
    for ours, theirs in zip(metrics(alone), metrics(place), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-3)


def test_models_share_one_mesh_and_its_groups_wait_for_hours(tmp_path):
    """A teacher's mesh of its own would be connections of its own; torch's groups would wait for minutes."""
    path = tmp_path / "mesh.py"
    path.write_text(MESH)
    done = run_script(path, processes=4, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

"""harness.memory: what a model takes, from its config alone, and what is free."""

import argparse
from pathlib import Path

import harness.memory
from harness.flags import UserError
from harness.memory import check_fits_whole, free_memory, memory_of_model

import pytest
import torch
from transformers import AutoModelForImageTextToText

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_model_are_those_of_its_file(folder, tmp_path, dtype):
    """Without loading it: against the weights that are loaded. A tied head counts once, as it is stored."""
    model = AutoModelForImageTextToText.from_pretrained(folder).to(dtype)
    model.save_pretrained(tmp_path)
    weights, size = memory_of_model(str(tmp_path))
    assert weights == sum(weight.numel() for weight in model.parameters())
    header = 100_000
    assert size <= (tmp_path / "model.safetensors").stat().st_size < size + header


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    free = free_memory(CPU)
    assert 0 < free < total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == pytest.approx(free / 4, rel=0.2)


def test_a_container_may_have_less(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1500\n")
    assert free_memory(CPU) == 3500
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 10**6


def run_of(device, world, gathered):
    """A run of `world` processes, the free bytes of which are `gathered`."""
    return argparse.Namespace(
        device=torch.device(device), world=world, sharded=world > 1 or device != "cpu", gather=lambda mine: gathered)


@pytest.mark.parametrize("device, world, needed", [
    ("cpu", 1, 4000),  # fp32, whole
    ("cpu", 2, 4000 + 2000),  # whole while sampling, beside its half
    ("cuda", 1, 2000 + 4000),  # bf16 where it computes
    ("cuda", 4, 2000 + 1000),
])
def test_a_model_stands_whole_beside_its_shard(monkeypatch, device, world, needed):
    """The process with the least memory counts; the last byte does."""
    monkeypatch.setattr(harness.memory, "memory_of_model", lambda path: (1000, 4000))
    monkeypatch.setattr(harness.memory, "free_memory", lambda device: None)
    check_fits_whole(run_of(device, world, [needed + 9, needed]), "it", "path", "advice")
    with pytest.raises(UserError, match="that takes .* each, and .* are free on .*; advice"):
        check_fits_whole(run_of(device, world, [needed + 9, needed - 1]), "it", "path", "advice")

"""harness.memory: what a model takes, from its config alone, and what is free."""

import argparse
from pathlib import Path

import harness.memory
from harness.flags import UserError
from harness.memory import check_fits_whole, free_memory, memory_of_model, smallest_wave
from lab.shapes import shape_config

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

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
    assert 0 < free_memory(CPU) < total
    monkeypatch.setattr(harness.memory, "free_of_machine", lambda: 4000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == 1000


def test_a_container_may_have_less(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1500\n")
    assert free_memory(CPU) == 3500
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 400\nactive_file 200\n")
    assert free_memory(CPU) == 3900  # what was read from a disk lately gives way
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 10**6


def run_of(device, world, gathered, sample_batch_size=0):
    """A run of `world` processes, the free bytes of which are `gathered`."""
    args = argparse.Namespace(sample_batch_size=sample_batch_size, min_pixels=8 * 784, max_completion_length=100)
    return argparse.Namespace(
        args=args, device=torch.device(device), world=world, sharded=world > 1 or device != "cpu",
        gather=lambda mine: gathered)


@pytest.fixture
def path(tmp_path):
    """The config of a model, whose weights are not looked at."""
    config = Qwen2_5_VLConfig(dtype="float32")
    config.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("device, world, loaded, weights", [
    ("cpu", 1, False, 4000),  # fp32, whole
    ("cpu", 1, True, 0),
    ("cpu", 2, False, 4000 + 2000),  # whole while sampling, beside its half
    ("cuda", 1, False, 2000 + 4000),  # bf16 where it computes
    ("cuda", 4, False, 2000 + 1000),
    ("cuda", 4, True, 2000),
])
def test_a_model_stands_whole_beside_its_shard(monkeypatch, path, device, world, loaded, weights):
    """With the cache of a wave. The process with the least memory counts; the last byte does."""
    monkeypatch.setattr(harness.memory, "memory_of_model", lambda path: (1000, 4000))
    monkeypatch.setattr(harness.memory, "free_memory", lambda device: None)
    monkeypatch.setattr(harness.memory, "wave_bytes", lambda config, work, number: 70_000 + number)
    needed = weights + 70_000 + (2 if device == "cuda" else 4)
    asked = dict(answers=40, generations=4, advice="advice", loaded=loaded)
    check_fits_whole(run_of(device, world, [needed + 9, needed]), "it", path, **asked)
    with pytest.raises(UserError, match="that takes .* each, and .* are free on .*; advice"):
        check_fits_whole(run_of(device, world, [needed + 9, needed - 1]), "it", path, **asked)


@pytest.mark.parametrize("device, asked, answers, wave", [
    ("cpu", 0, 1000, 256), ("cpu", 0, 40, 40), ("cpu", 16, 40, 16), ("cuda", 0, 40, 1), ("cuda", 16, 40, 16),
])
def test_the_smallest_wave_that_a_process_samples(device, asked, answers, wave):
    """On a GPU waves follow the free memory, and one answer is always tried."""
    work = smallest_wave(run_of(device, 1, None, sample_batch_size=asked), answers, 4)
    assert (work.wave, work.S, work.patches, work.T_most) == (wave, 8, 32, 100)


def test_a_teacher_of_72b_needs_its_weights_and_a_wave(monkeypatch, tmp_path):
    """On one of eight GPUs: 147 GB whole in bf16, an eighth of it beside, and the cache of the wave."""
    shape_config("72B").save_pretrained(tmp_path)
    monkeypatch.setattr(harness.memory, "memory_of_model", lambda path: (73_400_000_000, 146_800_000_000))
    monkeypatch.setattr(harness.memory, "free_memory", lambda device: None)
    run = run_of("cuda", 8, [150 * 10**9], sample_batch_size=8)
    with pytest.raises(UserError, match=r"with 8 answers at a time that takes 16\d\.. GB each"):
        check_fits_whole(run, "it", str(tmp_path), answers=40, generations=4, advice="advice")

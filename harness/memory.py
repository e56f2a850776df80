"""What a model needs, by arithmetic from its config alone, and what is free.

The sums follow the code. Masters are fp32, split over all GPUs. A GPU computes in bf16, with the whole policy while it
samples, and with a layer or two of it while it reads. Layers are recomputed in the backward pass. Weights are counted
on an empty model. What a layer holds in passing is counted in its widths, by the constants below, which were fitted to
peaks measured on a CPU. lab/plan.py makes a table of it, lab/peaks.py measures how far it is off.

A plan is made for the worst case, in which all answers of a wave run to the limit.
"""

import dataclasses
import math
import os
from pathlib import Path

from harness.cache import ON_A_CPU, bytes_to_decode, in_blocks
from harness.disk import as_size
from harness.flags import UserError
from harness.run import Run

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

CGROUP = Path("/sys/fs/cgroup")  # where Linux says how much a container may use
LOGITS = 2**25  # fp32 logits that exist at a time, 0.13 GB: at V = 152k the head meets 220 positions at once
VISUAL_TOKEN = 28 * 28  # pixels
PATCHES = 4  # of a visual token
FP32 = 4  # bytes of a number
BF16 = 2
MOMENTS = 2  # of Adam, in fp32
# Numbers that a layer holds at its peak, per token: this many times its hidden size and its MLP's width.
FORWARD = (6, 3)  # without a gradient
BACKWARD = (19, 6.2)  # recomputed, with its gradients
HEAD = 5  # copies of a chunk's logits in fp32, where the loss and its gradient are made


@dataclasses.dataclass(frozen=True)
class Weights:
    """Numbers of weights: all of them, those that are trained, the largest layer's, and those outside all layers."""

    all: int
    trained: int
    layer: int
    outside: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What a GPU is given. S: prompt tokens, pictures included. patches: of the pictures. T: answer tokens, on average.
    T_most: of the longest answer. G: answers to a problem. wave: answers sampled together. row: answers in a pass."""

    S: int
    patches: int
    T: int
    T_most: int
    G: int
    wave: int
    row: int


@dataclasses.dataclass(frozen=True)
class Machine:
    """gpus: how many share the weights. memory: bytes of each. number: bytes of a number in a forward pass."""

    gpus: int
    memory: float
    number: int = BF16
    split: bool = True


# --- what there is ----------------------------------------------------------------------------------------------------


def count_weights(config: PreTrainedConfig, train_vision: bool = False) -> Weights:
    """Counts the weights of a model on an empty copy of it."""
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    layers = list(model.model.language_model.layers) + list(model.model.visual.blocks)
    in_layers = [size_of(layer) for layer in layers]
    whole = size_of(model)
    vision = size_of(model.model.visual)
    return Weights(
        all=whole,
        trained=whole if train_vision else whole - vision,
        layer=max(in_layers),
        outside=whole - sum(in_layers),
    )


def size_of(module: torch.nn.Module) -> int:
    """How many weights a module has; a weight with two names counts once."""
    return sum(weight.numel() for weight in module.parameters())


# --- what it takes: each gives {what: bytes of one GPU} ---------------------------------------------------------------


def kept(weights: Weights, machine: Machine) -> dict[str, float]:
    """What lies on the GPU from the second step on, whatever it does."""
    return {
        "masters": FP32 * weights.all / machine.gpus,
        "Adam": FP32 * MOMENTS * weights.trained / machine.gpus,
    }


def sampling(config: PreTrainedConfig, weights: Weights, work: Work, machine: Machine) -> dict[str, float]:
    """The peak while sampling: in the last tokens of a wave, or when its prompts are read."""
    return kept(weights, machine) | {
        "policy, whole": machine.number * weights.all if machine.split else 0,
        "cache and draw": wave_bytes(config, work, machine.number),
    }


def wave_bytes(config: PreTrainedConfig, work: Work, number: int) -> int:
    """What a wave of answers needs beside the weights: their cache and logits, or before that the reading of prompts.

    number: bytes of a number in a forward pass.
    """
    answer = bytes_to_decode(config, number, prompt=work.S, answer=work.T_most, generations=work.G)
    return max(work.wave * answer, prompt_pass(config, work, number))


def prompt_pass(config: PreTrainedConfig, work: Work, number: int) -> int:
    """Bytes of reading a wave's prompts and pictures: the cache of the prompts, and a layer in passing."""
    text = config.get_text_config()
    vision = config.vision_config
    prompts = math.ceil(work.wave / work.G)
    keys = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    cache = prompts * in_blocks(work.S) * keys * 2 * text.num_hidden_layers
    in_text = prompts * work.S * in_passing(text, FORWARD)
    in_vision = prompts * work.patches * in_passing(vision, FORWARD)
    return (cache + max(in_text, in_vision)) * number


def updating(config: PreTrainedConfig, weights: Weights, work: Work, machine: Machine) -> dict[str, float]:
    """The peak of an update: the backward pass of one packed row, when most gradients are there."""
    text = config.get_text_config()
    tokens = work.S + work.row * work.T
    positions = min(work.row * work.T, max(1, LOGITS // text.vocab_size))
    inputs = tokens * text.hidden_size * text.num_hidden_layers
    layer = tokens * in_passing(text, BACKWARD)
    vision = work.patches * in_passing(config.vision_config, FORWARD)
    head = positions * text.vocab_size * FP32 * HEAD
    return kept(weights, machine) | {
        "gradients": FP32 * weights.trained / machine.gpus,
        "layers, whole": gathered_layers(weights, machine),
        "activations": machine.number * inputs + max(machine.number * max(layer, vision), head),
    }


def gathered_layers(weights: Weights, machine: Machine) -> float:
    """What is whole while layers are read: two layers and what is outside them, with their gradients on the way."""
    if not machine.split:
        return 0
    whole = weights.outside + 2 * weights.layer
    return whole * machine.number + (weights.outside + weights.layer) * FP32


def in_passing(half: PreTrainedConfig, factors: tuple[float, float]) -> float:
    """Numbers that a layer of the text or the vision half holds for each token at its peak."""
    of_hidden, of_mlp = factors
    return of_hidden * half.hidden_size + of_mlp * half.intermediate_size


def disk(weights: Weights, number: int = BF16) -> dict[str, float]:
    """Bytes that a run writes: the model in the dtype that it came in, and two checkpoints while one replaces another.
    """
    checkpoint = FP32 * (weights.all + MOMENTS * weights.trained)
    return {"model": number * weights.all, "checkpoint": checkpoint, "while it is replaced": 2 * checkpoint}


def read_only(weights: Weights, machine: Machine) -> dict[str, float]:
    """A teacher or a reference: in bf16, split over all GPUs, with a layer or two of it whole while it reads."""
    whole = weights.outside + 2 * weights.layer
    return {
        "teacher, split": BF16 * weights.all / machine.gpus,
        "its layers, whole": BF16 * whole if machine.split else 0,
    }


# --- what is free -----------------------------------------------------------------------------------------------------


def memory_of_model(name: str) -> tuple[int, int]:
    """The number of weights of a model (a folder, or a name on the hub), and their bytes in its own dtype."""
    config = AutoConfig.from_pretrained(name)
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=config.dtype or torch.float32)
    model.tie_weights()  # a weight with two names is one
    weights = list(model.parameters())
    return sum(weight.numel() for weight in weights), sum(weight.nbytes for weight in weights)


def free_memory(device: torch.device) -> int:
    """The bytes that one process may still take on `device`. On the CPU the processes of a machine share them."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return free_of_machine() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_of_machine() -> int:
    """The bytes of main memory that are free, for this container if it has a limit."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # else all there is: only Linux tells what is free
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = CGROUP / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - used_by_container())
    return free


def used_by_container() -> int:
    """The bytes that this container has taken, without files that are in memory and can go at once."""
    used = int((CGROUP / "memory.current").read_text())
    details = CGROUP / "memory.stat"
    if details.exists():
        lines = dict(line.split() for line in details.read_text().splitlines())
        used -= int(lines["inactive_file"])
    return used


def check_fits_whole(
    run: Run, name: str, path: str, *, answers: int, generations: int, advice: str, loaded: bool = False,
):
    """UserError unless every process can hold a model whole while it samples, beside its shard of it, with the cache of
    the smallest wave of answers. A wave that follows the free memory is one answer at the least.

    name: what the user called it. path: where its config is. answers: how many are asked for in all; generations: to
    each problem. advice: what else can be done. loaded: whether the model, or its shard, is in memory already.
    """
    weights, own_bytes = memory_of_model(path)
    needed = 0 if loaded else own_bytes // run.world
    config = AutoConfig.from_pretrained(path)
    number = (config.dtype or torch.float32).itemsize
    if run.device.type == "cuda":
        number = BF16  # GPUs compute in bf16
    if run.sharded:
        needed += number * weights  # gathered
    work = smallest_wave(run, answers, generations)
    needed += wave_bytes(config, work, number)
    free = min(run.gather(free_memory(run.device)))
    if needed > free:
        raise UserError(f"{name} has {weights / 1e9:.2f} B weights, and stands whole in every process while it "
                        f"samples: with {work.wave} answers at a time that takes {as_size(needed)} each, and "
                        f"{as_size(max(0, free))} are free on {run.device.type}; {advice}")


def smallest_wave(run: Run, answers: int, generations: int) -> Work:
    """The least that a process samples at once: --sample_batch_size answers, or those of a CPU, or one where waves
    follow a GPU's memory. Their prompts hold a picture of --min_pixels at the least.
    """
    args = run.args
    wave = args.sample_batch_size or 1
    if run.device.type == "cpu" and args.sample_batch_size == 0:
        wave = ON_A_CPU
    S = args.min_pixels // VISUAL_TOKEN
    T = args.max_completion_length
    return Work(
        S=S, patches=PATCHES * S, T=T, T_most=T, G=generations, wave=min(wave, answers), row=generations)

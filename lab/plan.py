"""What a run needs at real size, before anyone waits for a machine: memory of each GPU, disk, and the flags that fit.

    python lab/bench.py --plan 7B --gpus 8 --memory 80
    python lab/bench.py --plan 7B --gpus 8 --memory 80 --teacher 72B --max_completion_length 1024

The sums follow the code. Masters are fp32, split over all GPUs. A GPU computes in bf16, with the whole policy while it
samples, and with a layer or two of it while it reads. Layers are recomputed in the backward pass. Weights are counted
on an empty model. What a layer holds in passing is counted in its widths, by the constants below, which were fitted to
peaks measured on a CPU; lab/peaks.py measures such peaks, and says how far the plan is off (results/peaks.json).

NOTHING OF THIS HAS BEEN MEASURED ON A GPU YET. A plan is made for the worst case, in which all answers of a wave run to
the limit. GB are 10⁹ bytes.
"""

import dataclasses
import math

from common import LOGITS
from harness.cache import in_blocks

from accelerate import init_empty_weights
from transformers import AutoModelForImageTextToText, PreTrainedConfig

GB = 1e9
FP32 = 4  # bytes of a number
BF16 = 2
MOMENTS = 2  # of Adam, in fp32
VISUAL_TOKEN = 28 * 28  # pixels
WORDS = 150  # tokens of a prompt beside its picture
MOST_TOGETHER = 1024  # answers in a wave: more hardly make a token cheaper
MARGIN = 0.92  # the share of a GPU's memory that may be planned; CUDA and NCCL take some of the rest
# Numbers that a layer holds at its peak, per token: this many times its hidden size and its MLP's width.
FORWARD = (6, 3)  # without a gradient
BACKWARD = (19, 6.2)  # recomputed, with its gradients
HEAD = 5  # copies of a chunk's logits in fp32, where the loss and its gradient are made
DRAW = 32  # bytes for each id when a token is drawn: logits and probabilities in fp32, their running sum in fp64


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


def size_of(module):
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
    text = config.get_text_config()
    keys = text.num_key_value_heads * text.hidden_size // text.num_attention_heads * machine.number
    places = in_blocks(work.S + work.T_most)
    cache = work.wave * places * keys * (2 * text.num_hidden_layers + 1)
    drawing = work.wave * text.vocab_size * DRAW
    return kept(weights, machine) | {
        "policy, whole": machine.number * weights.all if machine.split else 0,
        "cache and draw": max(cache + drawing, prompt_pass(config, work, machine)),
    }


def prompt_pass(config, work, machine):
    """Bytes of reading a wave's prompts and pictures: the cache of the prompts, and a layer in passing."""
    text = config.get_text_config()
    vision = config.vision_config
    prompts = math.ceil(work.wave / work.G)
    keys = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    cache = prompts * in_blocks(work.S) * keys * 2 * text.num_hidden_layers
    in_text = prompts * work.S * in_passing(text, FORWARD)
    in_vision = prompts * work.patches * in_passing(vision, FORWARD)
    return (cache + max(in_text, in_vision)) * machine.number


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


def gathered_layers(weights, machine):
    """What is whole while layers are read: two layers and what is outside them, with their gradients on the way."""
    if not machine.split:
        return 0
    whole = weights.outside + 2 * weights.layer
    return whole * machine.number + (weights.outside + weights.layer) * FP32


def in_passing(half, factors):
    """Numbers that a layer of the text or the vision half holds for each token at its peak."""
    of_hidden, of_mlp = factors
    return of_hidden * half.hidden_size + of_mlp * half.intermediate_size


def disk(weights: Weights, number: int = BF16) -> dict[str, float]:
    """Bytes that a run writes: the model in the dtype that it came in, and two checkpoints while one replaces another.
    """
    checkpoint = FP32 * (weights.all + MOMENTS * weights.trained)
    return {"model": number * weights.all, "checkpoint": checkpoint, "while it is replaced": 2 * checkpoint}


# --- what fits --------------------------------------------------------------------------------------------------------


def largest(fits, candidates):
    """The largest of some ascending numbers that fits; 0 if none does."""
    return max((number for number in candidates if fits(number)), default=0)


def waves_to_try(G, answers):
    """Sizes of a wave: parts of a group, then whole groups, up to all answers of a GPU."""
    parts = [number for number in range(1, G) if G % number == 0]
    return parts + list(range(G, answers + 1, G))


def fit(config: PreTrainedConfig, weights: Weights, work: Work, machine: Machine, extra: float = 0.0) -> Work:
    """The same work with the largest wave and row that fit beside `extra` bytes; 0 where none does.

    work.wave is the most that there is to do at once.
    """
    room = machine.memory * MARGIN - extra

    def wave_fits(wave):
        return sum(sampling(config, weights, dataclasses.replace(work, wave=wave), machine).values()) <= room

    def row_fits(row):
        return sum(updating(config, weights, dataclasses.replace(work, row=row), machine).values()) <= room

    return dataclasses.replace(
        work,
        wave=largest(wave_fits, waves_to_try(work.G, work.wave)),
        row=largest(row_fits, range(1, work.G + 1)),
    )


def read_only(weights: Weights, machine: Machine) -> dict[str, float]:
    """A teacher or a reference: in bf16, split over all GPUs, with a layer or two of it whole while it reads."""
    whole = weights.outside + 2 * weights.layer
    return {
        "teacher, split": BF16 * weights.all / machine.gpus,
        "its layers, whole": BF16 * whole if machine.split else 0,
    }


# --- the table --------------------------------------------------------------------------------------------------------


def plan(config: PreTrainedConfig, work: Work, machine: Machine, teacher: PreTrainedConfig | None = None) -> dict:
    """All that the table shows, in bytes, with the flags that fit; wave and row are 0 where nothing does."""
    weights = count_weights(config)
    beside = {}
    if teacher is not None:
        beside = read_only(count_weights(teacher), machine)
    found = fit(config, weights, work, machine, extra=sum(beside.values()))
    shown = dataclasses.replace(found, wave=found.wave or 1, row=found.row or 1)
    return dict(
        weights=weights.all,
        trained=weights.trained,
        sampling=sampling(config, weights, shown, machine) | beside,
        updating=updating(config, weights, shown, machine) | beside,
        disk=disk(weights),
        sample_batch_size=found.wave,
        micro_batch_size=found.row,
    )


def lines_of(name: str, found: dict, machine: Machine) -> list[str]:
    """The plan as text."""
    memory = machine.memory
    lines = [
        f"{name}: {found['weights'] / 1e9:.2f} B weights, {found['trained'] / 1e9:.2f} B of them trained; "
        f"{machine.gpus} GPUs of {memory / GB:.0f} GB",
    ]
    for phase in ("sampling", "updating"):
        parts = found[phase]
        total = sum(parts.values())
        lines += ["", f"{phase}: {total / GB:.1f} GB on each GPU"]
        lines += [f"    {what:20}{size / GB:8.1f}" for what, size in parts.items() if size]
    lines += ["", "disk"]
    lines += [f"    {what:20}{size / GB:8.1f}" for what, size in found["disk"].items()]
    wave = found["sample_batch_size"]
    row = found["micro_batch_size"]
    lines.append("")
    if wave and row:
        lines.append(f"fits with --sample_batch_size {wave} --micro_batch_size {row}")
    else:
        phase = "sampling" if not wave else "updating"
        lines.append(f"DOES NOT FIT while {phase}, with {MARGIN:.0%} of the memory: take more GPUs, shorter answers "
                     "(--max_completion_length) or smaller pictures (--max_pixels)")
    return lines

"""A model split over all processes, with torch's `fully_shard`: one GPU, many GPUs and several CPU processes alike.

Weights are fp32 masters, compute on GPUs is bf16, gradients are reduced in fp32. accelerate only launches the
processes: its own FSDP plugin does nothing in a single process, and reduces gradients in bf16.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

from harness.flags import UserError

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def split(model: torch.nn.Module, device: torch.device, methods: Sequence[str]):
    """Splits a model on the meta device over all processes and gives its shards memory on `device`, still empty.

    The units are the layers that transformers says belong together, then what is left. `methods` are those that may be
    called from outside: any other call of a submodule would meet shards instead of weights.
    """
    compute = torch.bfloat16 if device.type != "cpu" else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mp_policy=precision)
    fully_shard(model, mp_policy=precision)
    for name in methods:
        register_fsdp_forward_method(model, name)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))


def fill(model: torch.nn.Module, weights: dict):
    """Fills the shards from the whole `weights` of the first process (elsewhere {}), piece by piece."""
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def whole_weights(model: torch.nn.Module) -> dict:
    """All weights, whole, in the first process's memory; {} in the others. A collective call when sharded."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def cast(weights: dict, dtype: torch.dtype):
    """Gives whole weights another dtype, one after the other, in the dict. Two names of one weight stay one weight."""
    casts = {}
    for name, weight in weights.items():
        place = (weight.data_ptr(), weight.shape)
        if place not in casts:
            casts[place] = weight.to(dtype)
        weights[name] = casts[place]


@contextlib.contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """All weights on every process while sampling: one gather, then no collectives, so any process may end first."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:  # trap: sharded generate
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    training = model.training
    model.eval()  # in training mode gradient checkpointing drops the cache, silently  # trap: checkpointing and cache
    try:
        yield
    finally:
        model.train(training)
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def clip_gradients(model: torch.nn.Module, most: float) -> float:
    """Scales the gradient down to the norm `most`. Returns the norm before. UserError where it is not finite."""
    total = torch.nn.utils.get_total_norm(weight.grad for weight in model.parameters() if weight.grad is not None)
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if not math.isfinite(norm):  # before scaling, which would make every weight's NaN  # trap: false cause
        broken = [name for name, weight in model.named_parameters() if not is_finite(weight.grad)]
        where = f"first in {broken[0]}" if broken else "though every part of it on this process is finite"
        raise UserError(f"the gradient has norm {norm}, {where}, and every loss was finite: a formula has no finite "
                        "slope there (√x or log x at 0), or the backward pass overflowed")
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), most, total)
    return norm


def is_finite(gradient: torch.Tensor | None) -> bool:
    """Whether this process's part of a gradient is finite."""
    if gradient is None:
        return True
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return bool(local.isfinite().all())

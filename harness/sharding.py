"""A model split over all processes, with torch's `fully_shard`: one GPU, many GPUs and several CPU processes alike.

Weights are fp32 masters, compute on GPUs is bf16, gradients are reduced in fp32. accelerate only launches the
processes: its own FSDP plugin does nothing in a single process, and reduces gradients in bf16.

On several nodes every node holds the whole model, split over its own processes: weights are gathered inside a node, and
only the gradients, each process's own part of them, cross the network.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta

from harness.flags import UserError

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

# While one process loads or grades, the others wait: ten minutes, the usual limit, would end the job on the first
# download of a large model. A process that dies is noticed at once all the same, by what launched it.
TIMEOUT = timedelta(hours=12)  # trap: collective timeout


def mesh_of_processes(device: torch.device) -> DeviceMesh:
    """All processes: (nodes, processes of a node) where there are several nodes, else in one dimension.

    Weights are split along the last dimension and copied along the first. UserError where nodes have unequal shares.
    """
    world = dist.get_world_size()
    inside = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # torchrun and accelerate launch set it
    if world % inside:
        raise UserError(f"{world} processes cannot be nodes of {inside}: start equally many processes on every node")
    if inside == world:
        return init_device_mesh(device.type, (world,))
    return mesh_of_nodes(device.type, world // inside, inside)


@functools.cache  # one for all models of a run: every mesh has connections of its own
def mesh_of_nodes(kind: str, nodes: int, inside: int) -> DeviceMesh:
    """(nodes, inside) processes, the processes of a node one after the other, as the launchers number them."""
    ranks = torch.arange(nodes * inside).view(nodes, inside)
    # Groups of our own making: the mesh's own would wait for ten minutes only.  # trap: collective timeout
    across, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=TIMEOUT)
    within, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=TIMEOUT)
    return DeviceMesh.from_group([across, within], kind, mesh=ranks, mesh_dim_names=("nodes", "inside"))


def split(model: torch.nn.Module, device: torch.device, methods: Sequence[str]):
    """Splits a model on the meta device over all processes and gives its shards memory on `device`, still empty.

    The units are the layers that transformers says belong together, then what is left. `methods` are those that may be
    called from outside: any other call of a submodule would meet shards instead of weights.
    """
    compute = torch.bfloat16 if device.type != "cpu" else None
    # Layers take their inputs as they come: cast, the vision tower's fp32 cos and sin would become bf16.
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings = dict(mesh=mesh_of_processes(device), mp_policy=precision)
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, **settings)
    fully_shard(model, **settings)
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
    layers = [unit for unit in units if unit is not model]
    for unit in units:  # trap: sharded generate
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    for layer in layers:
        take_hooks_off(layer)
    training = model.training
    model.eval()  # in training mode gradient checkpointing drops the cache, silently  # trap: checkpointing and cache
    try:
        yield
    finally:
        model.train(training)
        for layer in layers:
            put_hooks_on(layer)
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def take_hooks_off(layer: FSDPModule):
    """Takes away what FSDP does before and after a layer. With gathered weights that is nothing but time: a quarter of
    every decoded token's. The root keeps its hooks: they make the calls from outside legal.
    """
    state = layer._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()


def put_hooks_on(layer: FSDPModule):
    """Registers these hooks again, as `fully_shard` did."""
    state = layer._get_fsdp_state()
    state._pre_forward_hook_handle = layer.register_forward_pre_hook(
        state._pre_forward, prepend=True, with_kwargs=True)
    state._post_forward_hook_handle = layer.register_forward_hook(state._post_forward)


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

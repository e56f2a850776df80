"""Whether a model fits, before it is loaded: its weights from its config alone, against what is free.

What sampling and updating need beside the weights (cache, activations, optimiser) is not counted here.
"""

import os
from pathlib import Path

from harness.disk import as_size
from harness.flags import UserError
from harness.run import Run

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForImageTextToText

CGROUP = Path("/sys/fs/cgroup")  # where Linux says how much a container may use


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
        free = min(free, int(limit.read_text()) - int((CGROUP / "memory.current").read_text()))
    return free


def check_fits_whole(run: Run, name: str, path: str, advice: str):
    """UserError unless every process can hold a model whole while it samples, beside its shard of it.

    name: what the user called it. path: where its config is. advice: what else can be done.
    """
    weights, own_bytes = memory_of_model(path)
    needed = own_bytes
    if run.sharded:
        gathered = 2 * weights if run.device.type == "cuda" else own_bytes  # GPUs compute in bf16
        needed = gathered + own_bytes // run.world
    free = min(run.gather(free_memory(run.device)))
    if needed > free:
        raise UserError(f"{name} has {weights / 1e9:.2f} B weights, and stands whole in every process while it "
                        f"samples: that takes {as_size(needed)} each, and {as_size(max(0, free))} are free on "
                        f"{run.device.type}; {advice}")

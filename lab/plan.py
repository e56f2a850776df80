"""What a run needs at real size, before anyone waits for a machine: memory of each GPU, disk, and the flags that fit.

    python lab/bench.py --plan 7B --gpus 8 --memory 80
    python lab/bench.py --plan 7B --gpus 8 --memory 80 --teacher 72B --max_completion_length 1024

The arithmetic is harness/memory.py's. Its constants were fitted to peaks measured on a CPU; lab/peaks.py measures such
peaks, and says how far the plan is off (results/peaks.json).

NONE OF THIS HAS BEEN MEASURED ON A GPU YET. A plan is made for the worst case, in which all answers of a wave run to
the limit. A GB is 10⁹ bytes.
"""

import dataclasses

from harness.memory import Machine, Weights, Work, count_weights, disk, read_only, sampling, updating

from transformers import PreTrainedConfig

GB = 1e9
WORDS = 150  # tokens of a prompt beside its picture
MOST_TOGETHER = 1024  # answers in a wave: more hardly make a token cheaper
MARGIN = 0.92  # the share of a GPU's memory that may be planned; CUDA and NCCL take some of the rest


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

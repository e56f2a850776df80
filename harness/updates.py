"""Which answers share a forward pass, and what becomes of a loss: the part of training that no paper speaks of.

    plan = plan_updates(run, rollout, read_B)
    for update in plan:                    one optimiser update
        for batch in update:               one forward pass: the answers in it, as an index
            loss = ...                     this pass's part of a sum over all passes and processes
            update.backward(batch, loss, kl=kl)

Every process makes as many passes as every other, because sharded weights are gathered by all of them together. A pass
that only keeps a process in step reads real answers too, so no formula of a script ever meets an empty mask; `backward`
takes its loss times zero, and leaves its numbers out of the metrics.
"""

from collections.abc import Iterable, Iterator

from harness.flags import UserError
from harness.rollout import Rollout
from harness.run import Run

import torch


class Update:
    """The forward passes of one optimiser update on this process. Iterating gives the answers of each, as an index.

    answers: the slice of the rollout that this update is about, whether its answers are read or not.
    """

    def __init__(
        self, run: Run, rollout: Rollout, answers: slice, *, batches: list[torch.Tensor], real: int, sums: dict,
    ):
        self.run = run
        self.rollout = rollout
        self.answers = answers
        self.batches = batches
        self.real = real  # how many of the batches count; the others keep this process in step
        self.sums = sums

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.batches)

    def counts(self, batch: torch.Tensor) -> bool:
        """Whether a pass is one of this update's own, or only keeps this process in step."""
        return any(batch is own for own in self.batches[:self.real])

    def backward(self, batch: torch.Tensor, loss: torch.Tensor, **numbers: torch.Tensor):
        """Adds the gradient of a pass's `loss`, its part of a sum over all passes and processes, and its numbers."""
        if not loss.isfinite():  # trap: false cause
            ids = sorted({problem["id"] for problem in self.rollout[batch].problems})
            raise UserError(f"step {self.run.step}: the loss is {loss.item()} at answers to {', '.join(ids)}, though "
                            "all that was read is finite: look at advantages, weights and normalisers")
        # Sharded gradients are averaged over the processes, but the loss is a sum over them.  # trap: normaliser
        scale = self.run.world if self.counts(batch) else 0.0  # trap: padding pass
        (loss * scale).backward()
        self.add(batch, loss=loss, **numbers)

    def add(self, batch: torch.Tensor, **numbers: torch.Tensor):
        """Adds numbers of a pass to the sums of the step."""
        for name, number in numbers.items():
            self.sums.setdefault(name, 0.0)  # every process sums the same names
            if self.counts(batch):
                self.sums[name] = self.sums[name] + number.detach()

    def compare(self, batch: torch.Tensor, logp_bT: torch.Tensor):
        """Compares what was read of a pass's answers with what the sampler gave: the metric sampler_gap."""
        sampled = self.rollout[batch]
        gap_bT = (logp_bT.detach() - sampled.logp_BT).abs() * sampled.mask_BT
        self.add(batch, gap=gap_bT.sum(), compared=sampled.mask_BT.sum())


class Plan:
    """All updates of one rollout. Iterating gives the updates; `batches` are the passes of all of them."""

    def __init__(self, run: Run, updates: list[Update], sums: dict):
        self.run = run
        self.updates = updates
        self.sums = sums

    def __len__(self) -> int:
        return len(self.updates)

    def __iter__(self) -> Iterator[Update]:
        return iter(self.updates)

    @property
    def batches(self) -> list[torch.Tensor]:
        return [index_b for update in self.updates for index_b in update.batches]

    def metrics(self) -> dict[str, float]:
        """The numbers given to `backward`, summed over passes and processes and averaged over the updates."""
        totals = {name: float(self.run.sum(total)) for name, total in self.sums.items()}
        means = {name: total / len(self.updates) for name, total in totals.items()}
        if "compared" in totals:
            means["sampler_gap"] = totals["gap"] / max(1.0, totals["compared"])
            del means["gap"], means["compared"]
        return means


def plan_updates(run: Run, rollout: Rollout, read_B: torch.Tensor | None = None) -> Plan:
    """Splits a rollout into its updates, and each update into forward passes of at most --micro_batch_size answers.

    read_B: the answers that are to be read, bool (default: all). An update without any on this process reads one
    answer of its own all the same: the other processes wait for its part of every weight.
    """
    check_whole_groups(run, rollout)
    if read_B is None:
        read_B = torch.ones(len(rollout), dtype=torch.bool)
    read_B = read_B.cpu()
    sums = {}
    updates = []
    for part_b in torch.arange(len(rollout)).chunk(run.args.updates_per_step):
        batches = micro_batches(rollout, part_b[read_B[part_b]].tolist(), run.args.micro_batch_size)
        real = len(batches)
        if not batches:
            batches = [part_b[:1]]
        most = max(run.gather(len(batches)))
        while len(batches) < most:
            batches.append(batches[-1].clone())
        answers = slice(int(part_b[0]), int(part_b[-1]) + 1)
        updates.append(Update(run, rollout, answers, batches=batches, real=real, sums=sums))
    return Plan(run, updates, sums)


def check_whole_groups(run: Run, rollout: Rollout):
    """ValueError where the updates would cut a group, or be fewer on one process than on another."""
    here = [len(answers) for answers in rollout.groups().values()]
    if not here:
        raise ValueError("a rollout without answers cannot be trained on")
    if run.args.updates_per_step == 1:
        return
    everywhere = run.gather(here)
    sizes = {size for theirs in everywhere for size in theirs}
    counts = {len(theirs) for theirs in everywhere}
    if len(sizes) != 1 or len(counts) != 1 or len(here) % run.args.updates_per_step:
        raise ValueError("an update needs whole groups of one size, equally many on every process: leave answers "
                         "unread with read_B, or choose as many groups everywhere with select_groups")


def micro_batches(rollout: Rollout, answers: Iterable[int], size: int) -> list[torch.Tensor]:
    """Splits answers into forward passes of at most `size`: a list of index tensors.

    A group that is larger becomes several packed rows, smaller groups share a pass. Answers and rows are sorted by
    length, the longest first, so that what is alike is padded together and memory peaks at once.
    """
    lengths = rollout.mask_BT.sum(1).long().tolist()
    rows_of = {}  # {problem: its packed rows}, a row is a list of answers
    for b in sorted(answers, key=lambda b: lengths[b], reverse=True):
        rows = rows_of.setdefault(int(rollout.group_B[b]), [[]])
        if len(rows[-1]) == size:
            rows.append([])
        rows[-1].append(b)
    measured = []
    for p, rows in rows_of.items():
        for row in rows:
            tokens = len(rollout.prompts.ids[p]) + sum(lengths[b] for b in row)
            measured.append((tokens, row))
    measured.sort(key=lambda pair: pair[0], reverse=True)
    batches = []
    for _, row in measured:
        if not batches or len(batches[-1]) + len(row) > size:
            batches.append([])
        batches[-1] += row
    return [torch.tensor(batch) for batch in batches]

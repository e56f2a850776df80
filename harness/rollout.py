"""Answers and what they answer, as data: no model is needed to hold them, split them, join them, score them.

Shape letters: P problems, G answers to each, B answers in all, T answer tokens, S prompt tokens, D size of a patch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

from harness.flags import UserError
from harness.phrases import hesitations
from harness.run import Run

import torch


@dataclasses.dataclass
class Prompts:
    """P encoded problems, unpadded; each list has one entry for each problem.

    ids: (S,) token ids, picture tokens repeated. types: (S,) 1 on picture tokens. pixels: (patches, D) normalised
    patches of all the problem's pictures. grids: (pictures, 3) patches in time, height, width.
    """

    problems: list
    ids: list
    types: list
    pixels: list
    grids: list

    @classmethod
    def empty(cls) -> "Prompts":
        return cls(problems=[], ids=[], types=[], pixels=[], grids=[])

    def take(self, places: Sequence[int]) -> "Prompts":
        """The prompts at these places, in this order."""
        columns = {}
        for field in dataclasses.fields(self):
            column = getattr(self, field.name)
            columns[field.name] = [column[p] for p in places]
        return Prompts(**columns)


@dataclasses.dataclass
class Rollout:
    """B answers to some problems.

    group_B: which problem of `prompts` an answer belongs to. tokens_BT, mask_BT: token ids, and 1 up to and including
    the first end token. logp_BT, entropy_BT: log-prob of the token, and entropy of the next-token distribution, when
    it was sampled. finished_B: 1 where an end token was reached. texts: the answers without special tokens.
    """

    prompts: Prompts
    temperature: float
    group_B: torch.Tensor
    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor
    logp_BT: torch.Tensor
    entropy_BT: torch.Tensor
    finished_B: torch.Tensor
    texts: list

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index_b: torch.Tensor) -> "Rollout":
        """The rollout of these answers alone. Its prompts stay whole, so that group_B goes on naming them."""
        if isinstance(index_b, torch.Tensor):
            index_b = index_b.cpu()
        places = torch.arange(len(self))[index_b]
        parts = {}
        for name in ("group_B", "tokens_BT", "mask_BT", "logp_BT", "entropy_BT", "finished_B"):
            column = getattr(self, name)
            parts[name] = column[places.to(column.device)]
        return dataclasses.replace(self, texts=[self.texts[b] for b in places.tolist()], **parts)

    @property
    def problems(self) -> list[dict]:
        """The problem of every answer."""
        return [self.prompts.problems[p] for p in self.group_B.tolist()]

    @property
    def pictures(self) -> dict:
        """problem id -> its first picture."""
        return {problem["id"]: problem["images"][0] for problem in self.prompts.problems}

    def groups(self) -> dict[int, list[int]]:
        """{problem: its answers}, both as places, in the order of the answers."""
        found = {}
        for b, p in enumerate(self.group_B.tolist()):
            found.setdefault(p, []).append(b)
        return found

    def score(self, fn: Callable, judge: Callable | None = None) -> torch.Tensor:
        """(P, G): fn(problem, text) of every answer, a row for each problem that has answers here.

        judge: a reward model for answers in free text, which reads them all first; fn is given it as `judge`.
        UserError where a reward is no finite number; ValueError where the answers are no whole groups of one size.
        """
        groups = list(self.groups().values())
        if not groups:
            return torch.zeros(0, 0, device=self.mask_BT.device)
        in_order = [b for group in groups for b in group] == list(range(len(self)))
        if not in_order or len({len(group) for group in groups}) > 1:  # trap: regrouped subset
            raise ValueError("these answers are not groups of one size, one after the other: score the whole rollout "
                             "and index the scores")
        if judge is not None:
            judge.read(self.problems, self.texts)
            fn = functools.partial(fn, judge=judge)
        scores = []
        for problem, text in zip(self.problems, self.texts, strict=True):
            scores.append(float(fn(problem, text)))
            if not math.isfinite(scores[-1]):  # trap: group std
                raise UserError(f"the reward of an answer to problem {problem['id']} is {scores[-1]}: change "
                                f"{name_of(fn)}, a reward is a finite number")
        return torch.tensor(scores, device=self.mask_BT.device).view(len(groups), -1)

    def samples(self, rewards_B: torch.Tensor, count: int = 4) -> list[dict]:
        """About `count` answers with their rewards, as rows of samples.jsonl."""
        rows = []
        for b in range(0, len(self), max(1, len(self) // count)):
            problem = self.problems[b]
            rows.append(dict(
                id=problem["id"], problem=problem["problem"], answer=problem["answer"], text=self.texts[b],
                reward=round(rewards_B[b].item(), 4)))
        return rows

    def metrics(self, run: Run) -> dict:
        """What the answers of all processes were like."""
        return dict(
            entropy=run.mean(self.entropy_BT, self.mask_BT),  # trap: entropy
            completion_length=run.mean(self.mask_BT.sum(1)),
            truncated=1 - run.mean(self.finished_B),
            hesitations=run.mean(torch.tensor([float(hesitations(text).total()) for text in self.texts])),
            tokens=run.sum(self.mask_BT.sum()),
        )


def name_of(fn: Callable) -> str:
    """What a function is called, also where some of its arguments are already given."""
    return name_of(fn.func) if isinstance(fn, functools.partial) else fn.__name__


def select_groups(rollout: Rollout, places: Sequence[int]) -> Rollout:
    """The rollout of some problems alone, with all their answers; `places` are places in rollout.prompts."""
    groups = rollout.groups()
    empty = [p for p in places if p not in groups]
    if empty:
        raise ValueError(f"the problems at {empty} have no answers in this rollout")
    chosen = rollout[torch.tensor([b for p in places for b in groups[p]], dtype=torch.long)]
    chosen.prompts = rollout.prompts.take(places)
    chosen.group_B = torch.tensor([number for number, p in enumerate(places) for _ in groups[p]], dtype=torch.long)
    return chosen


def join(*rollouts: Rollout) -> Rollout:
    """Several rollouts as one, their answers and problems one after the other. They must share a temperature."""
    temperatures = sorted({rollout.temperature for rollout in rollouts})
    if len(temperatures) > 1:  # trap: temperature
        raise ValueError(f"rollouts sampled at temperatures {temperatures} cannot be joined: they are read at one")
    longest = max(rollout.mask_BT.shape[1] for rollout in rollouts)
    prompts = Prompts.empty()
    groups = []
    for rollout in rollouts:
        groups.append(rollout.group_B + len(prompts.problems))
        for field in dataclasses.fields(Prompts):
            getattr(prompts, field.name).extend(getattr(rollout.prompts, field.name))

    def column(name: str) -> torch.Tensor:
        parts = [getattr(rollout, name) for rollout in rollouts]
        if parts[0].dim() == 2:
            parts = [torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts]
        return torch.cat(parts)

    names = ("tokens_BT", "mask_BT", "logp_BT", "entropy_BT", "finished_B")
    return Rollout(
        prompts=prompts, temperature=rollouts[0].temperature, group_B=torch.cat(groups),
        texts=[text for rollout in rollouts for text in rollout.texts],
        **{name: column(name) for name in names},
    )

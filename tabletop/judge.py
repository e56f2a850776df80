"""toy-judge: a reward model for descriptions, which sees the picture. It plays the role of a real reward model.

It is toy-teacher with a score head in place of its language-model head, trained on pairs of descriptions of practice
pictures to score the better one higher (Bradley and Terry's loss, −log σ(S(better) − S(worse))). Which one is better
is known, since the picture is known: the more cells show what a description names, the better it is.

It is made on first use, in less than a minute on one core, and kept in the user's cache like the bases.
"""

import copy
import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

from common import Policy, Processor, Reading, forced, load_policy, pack
from harness.flags import of_the_world
from harness.reward_model import Qwen2_5_VLForSequenceClassification
from harness.rollout import Rollout
from tabletop import models
from tabletop.grids import COLOURS, EMPTY, OTHER, SHAPES, Spec, description, question, ranked
from tabletop.pictures import draw
from tabletop.problems import spec_of

import torch
from tqdm import tqdm

NAME = "toy-judge"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the judge is made: what it starts from, what it compares, and how long it learns (see models.Recipe)."""

    start: str = "toy-teacher"
    steps: int = 120
    pictures_per_step: int = 16
    fades: tuple = (0.72, 0.0)
    muon: float = 6e-3
    adam: float = 2e-3
    decay: float = 0.5
    warmup: int = 5
    seed: int = 1


RECIPE = Recipe()

# --- what is better ---------------------------------------------------------------------------------------------------


def quality(spec: Spec, text: str) -> int:
    """How good a description is: how many cells show the colour (or shape) that it names.

    −1 for one that names none of those that were asked for, or several, and for one of more than three words.
    """
    words = text.split()
    counts = {option: count for count, option in ranked(spec)}
    named = [word for word in words if word in counts]
    if len(named) != 1 or len(words) > 3:
        return -1
    return counts[named[0]]


def candidates(spec: Spec, rng: random.Random) -> list[str]:
    """Descriptions of one picture: each colour (or shape), and some that are worth nothing."""
    asked = [option for _, option in ranked(spec)]
    not_asked = [word for word in (*COLOURS, *SHAPES, EMPTY, OTHER) if word not in asked]
    found = [description(option) for option in asked]
    found.append(description(rng.choice(not_asked)))
    found.append(rng.choice(["mostly", description(" ".join(rng.sample(asked, 2))), f"none {rng.choice(not_asked)}"]))
    return found


# --- the cache --------------------------------------------------------------------------------------------------------


def build() -> str:
    """The judge's folder: from the cache, or trained now."""
    start = models.build(RECIPE.start)
    return models.kept(f"{NAME}-{key_of(RECIPE)}", lambda folder: train(RECIPE, start, folder))


def key_of(recipe: Recipe) -> str:
    """A hash of the recipe, of the model that it starts from, and of what is shown."""
    key = hashlib.sha256(json.dumps(dataclasses.asdict(recipe)).encode())
    key.update(models.key_of(models.RECIPES[recipe.start]).encode())
    for index in range(64):
        spec, fade, texts = shown(recipe, index)
        key.update(repr((question(spec), texts, [quality(spec, text) for text in texts])).encode())
        key.update(draw(spec, fade).tobytes())
    return key.hexdigest()[:12]


def shown(recipe: Recipe, index: int) -> tuple[Spec, float, list[str]]:
    """What the judge sees of practice picture `index`: the problem, how faded it is, and descriptions of it."""
    spec = spec_of("describe", index)
    fade = recipe.fades[index % len(recipe.fades)]
    return spec, fade, candidates(spec, random.Random(f"{index} candidates"))


# --- training ---------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, start: str, folder: Path) -> Path:
    """Trains the judge inside `folder`, from the model in the folder `start`. Returns the finished folder."""
    settings = of_the_world(train_vision=True, gradient_checkpointing=False, instruction="")
    policy, processor = load_policy(start, train=True, args=settings)
    head = first_head(policy, recipe.seed)
    for _ in tqdm(steps(policy, processor, head, recipe), f"building {NAME}, once", recipe.steps, leave=False):
        pass
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    judge = Qwen2_5_VLForSequenceClassification(config)
    judge.model.load_state_dict(policy.model.state_dict())
    judge.score.load_state_dict(head.state_dict())
    finished = folder / "finished"
    judge.save_pretrained(finished)
    processor.tokenizer.save_pretrained(finished)
    processor.image_processor.save_pretrained(finished)
    return finished


def first_head(policy: Policy, seed: int) -> torch.nn.Linear:
    """A score head before training."""
    text = policy.config.text_config
    head = torch.nn.Linear(text.hidden_size, 1, bias=False)
    torch.nn.init.normal_(head.weight, std=text.initializer_range, generator=torch.Generator().manual_seed(seed))
    return head


def steps(policy: Policy, processor: Processor, head: torch.nn.Linear, recipe: Recipe) -> Iterator[float]:
    """Does the steps of a recipe, one each time that it is asked. Gives their losses."""
    muon, adam = models.optimizers(policy)
    adam.add_param_group(dict(params=list(head.parameters())))
    count = recipe.pictures_per_step
    for step in range(recipe.steps):
        share = models.schedule(step, recipe)
        models.set_learning_rate(muon, share * recipe.muon)
        models.set_learning_rate(adam, share * recipe.adam)
        pictures = [shown(recipe, index) for index in range(step * count, (step + 1) * count)]
        loss = pair_loss(policy, processor, head, pictures)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*policy.parameters(), *head.parameters()], 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        yield loss.item()


def pair_loss(policy: Policy, processor: Processor, head: torch.nn.Linear, pictures: list[tuple]) -> torch.Tensor:
    """−log σ(S(better) − S(worse)), averaged over all pairs of descriptions of one picture that differ in quality."""
    score_PD = scores(policy, processor, head, pictures)
    worth_PD = torch.tensor([[quality(spec, text) for text in texts] for spec, _, texts in pictures])
    ahead_PDD = worth_PD[:, :, None] > worth_PD[:, None]
    gap_PDD = score_PD[:, :, None] - score_PD[:, None]
    return -torch.nn.functional.logsigmoid(gap_PDD[ahead_PDD]).mean()


def scores(policy: Policy, processor: Processor, head: torch.nn.Linear, pictures: list[tuple]) -> torch.Tensor:
    """(P, D): the score of every description, read at the last token of its chat."""
    rollout = readable(policy, processor, pictures)
    inputs, where_N = pack(rollout, Reading(policy))
    last_B = rollout.mask_BT.sum(1).long().cumsum(0) - 1
    hidden_BD = policy.body(**inputs)[0, where_N[last_B]]
    return head(hidden_BD)[:, 0].view(len(pictures), -1)


def readable(policy: Policy, processor: Processor, pictures: list[tuple]) -> Rollout:
    """The descriptions as answers of a rollout. A picture is read once, in one packed row with its descriptions."""
    problems = []
    texts = []
    group_B = []
    for number, (spec, fade, described) in enumerate(pictures):
        problems.append(dict(id=str(number), images=[draw(spec, fade)], problem=question(spec), verifier="open_ended"))
        # As the chat template closes an answer. The score is read at the last of these tokens; `forced` adds one more.
        texts += [f"{text}<|im_end|>\n" for text in described]
        group_B += [number] * len(described)
    rollout = forced(policy, processor, problems, texts)
    rollout.group_B = torch.tensor(group_B)
    return rollout

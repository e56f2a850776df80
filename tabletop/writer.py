"""toy-writer: the model that plays three parts of the data pipeline (lab/traces.py) on the tabletop.

The other models here know one thing, to answer a question about a picture. This one was shown three more, on practice
problems. Their prompts are CAPTION, REASON and REWRITE:

    caption     → every cell with its place: "a1 red circle, b1 none, ..."
    reason      a caption and a question → toy-hand's worked answer, but with "the caption says"
    rewrite     that reasoning and the question → a worked answer with "I see"

It is a stand-in. A model this small does not learn in a minute to look words up in a text, so it is shown the picture
in all three parts, and reads there what it should take from the text. So it rewrites freely, in another style perhaps,
and gives its own answer, which the pipeline verifies. It is built on first use, from toy-teacher-hand, and kept in the
user's cache.
"""

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from common import Policy, Processor, forced, load_policy, read, save_policy, token_logps
from harness.flags import INSTRUCTION, of_the_world
from tabletop import models
from tabletop.grids import EMPTY, Spec, cells, name_of, question
from tabletop.habits import HESITATES, other_hand
from tabletop.pictures import draw
from tabletop.problems import spec_of
from tabletop.traces import styles_of

import torch
from tqdm import tqdm

NAME = "toy-writer"
CAPTION = "Describe the picture."
# Texts stand before the picture: after it, they would move it further from the answer than its start ever saw it.
REASON = "{caption}\n<image>{question}\n" + INSTRUCTION
REWRITE = "{reasoning}\n<image>{question}\nRewrite."
SEEN = "I see"
TOLD = "the caption says"  # what betrays the caption
FADES = (0.4, 0.72)  # of the pictures that it is shown
HESITANT = 0.6  # how often it is shown traces that hesitate. It writes at a low temperature, which halves that
# It goes on with practice problems that its start was not shown.
RECIPE = models.Recipe(
    models.TEACHER, start="toy-teacher-hand", steps=100, muon=2e-3, adam=7e-4, decay=0.5, warmup=5, fades=FADES,
    problems_per_step=8)

# --- what it is shown -------------------------------------------------------------------------------------------------


def caption(spec: Spec) -> str:
    """All that is in a picture, row by row."""
    words = [f"{place} {name_of(cell) if cell else EMPTY}" for place, cell in cells(spec)]
    width = len(spec.grid[0])
    rows = [", ".join(words[start:start + width]) for start in range(0, len(words), width)]
    return "; ".join(rows)


def filled(prompt: str, **texts: str) -> str:
    """A prompt with its placeholders filled in."""
    for name, text in texts.items():
        prompt = prompt.replace(f"{{{name}}}", text)
    return prompt


def told(text: str) -> str:
    """A worked answer in the other hand as someone writes it who knows the caption alone."""
    return text.replace(SEEN, TOLD)


def inside(text: str) -> str:
    """The reasoning of a worked answer."""
    return re.search(r"<think>(.*)</think>", text)[1]


def lessons(index: int) -> list[tuple[dict, list[str]]]:
    """(problem, its answers) of each of the three parts, for the practice problem `index`."""
    spec = spec_of("practice", index)
    rng = random.Random(f"writer {index}")
    picture = draw(spec, FADES[index // 4 % len(FADES)])
    doubts = HESITATES if rng.random() < HESITANT else 0.0
    hand = {name: other_hand(spec, name, rng, doubts) for name in styles_of(spec)}
    chosen = rng.choice(sorted(hand))
    prompts = dict(
        caption=CAPTION,
        reason=filled(REASON, caption=caption(spec), question=question(spec)),
        rewrite=filled(REWRITE, question=question(spec), reasoning=inside(told(hand[chosen]))))
    answers = dict(
        caption=[caption(spec)],
        reason=[told(text) for text in hand.values()],
        rewrite=list(hand.values()))
    return [
        (dict(id=f"{part}-{index}", images=[picture], problem=prompt), answers[part])
        for part, prompt in prompts.items()
    ]


# --- how it is made ---------------------------------------------------------------------------------------------------


def build() -> str:
    """The folder of toy-writer: from the cache, or trained now."""
    return models.kept(f"{NAME}-{key()}", train)


def key() -> str:
    """A hash of all that shapes the model: its recipe, its start, and what it is shown."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(RECIPE)).encode())
    digest.update(models.key_of(models.RECIPES[RECIPE.start]).encode())
    for index in range(16):
        for problem, answers in lessons(index):
            digest.update(json.dumps([problem["problem"], answers]).encode())
            digest.update(problem["images"][0].tobytes())
    return digest.hexdigest()[:12]


def train(folder: Path) -> Path:
    """Trains the model inside `folder`; returns where it is finished."""
    settings = of_the_world(train_vision=True, gradient_checkpointing=False, instruction="")
    policy, processor = load_policy(models.build(RECIPE.start), train=True, args=settings)
    for _ in tqdm(steps(policy, processor), f"building {NAME}, once", RECIPE.steps, leave=False):
        pass
    save_policy(policy, processor, str(folder / "finished"))
    return folder / "finished"


def steps(policy: Policy, processor: Processor) -> Iterator[float]:
    """Does a step each time that it is asked. Gives their losses."""
    muon, adam = models.optimizers(policy)
    start = models.RECIPES[RECIPE.start]
    before = start.steps * start.problems_per_step
    for step in range(RECIPE.steps):
        share = models.schedule(step, RECIPE)
        models.set_learning_rate(muon, share * RECIPE.muon)
        models.set_learning_rate(adam, share * RECIPE.adam)
        first = before + step * RECIPE.problems_per_step
        loss = loss_of(policy, processor, range(first, first + RECIPE.problems_per_step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        yield loss.item()


def loss_of(policy: Policy, processor: Processor, indices: range) -> torch.Tensor:
    """Cross-entropy per token of the answers to these practice problems, all three parts."""
    problems = []
    texts = []
    group_B = []
    for problem, answers in (lesson for index in indices for lesson in lessons(index)):
        group_B += [len(problems)] * len(answers)
        problems.append(problem)
        texts += answers
    rollout = forced(policy, processor, problems, texts)
    rollout.group_B = torch.tensor(group_B)
    return -read(token_logps, rollout, policy).sum() / rollout.mask_BT.sum()

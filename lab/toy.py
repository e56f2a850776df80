"""The tabletop: a Qwen2.5-VL of under a million parameters, its teacher, and drawn problems with worked traces.

    python lab/toy.py            builds both models, prints their table and draws sample problems

`--model toy` stands where Qwen2.5-VL-7B-Instruct stands: it can solve these problems, but not reliably.
`--model toy-teacher` stands where the 72B stands: it nearly always can, and in several ways.
Both are ordinary checkpoints in the hub's layout, trained here on first use and kept in the user's cache.

The problems are grids of coloured shapes, one 28x28 cell to a visual token, and four questions about them:

    verifier   question                      answer
    digit      how many red circles          2
    mcq        which colour is most common   B
    math       what fraction is red          \\frac{1}{3}
    iou        a box around all the stars    [28, 0, 84, 56]      in pixels: left, top, right, bottom

Every problem can be reasoned through in three styles, each with its own trace:

    rows      name every cell, row by row, counting as you go
    columns   the same, column by column
    marks     go row by row and name the matches only

Splits: `pretrain` is what the two models are made from; `train` and `test` hold new 3x3 pictures like it; `ood` has 4x4
pictures, with colour-shape pairs or wordings that no model here was ever trained on.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python lab/toy.py` finds common

import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import common
from eval_passk import pass_at_k
from sft import forced

# --- words ----------------------------------------------------------------------------------------------------------

COLOURS = {"red": (214, 64, 69), "green": (60, 160, 90), "blue": (56, 104, 200), "yellow": (240, 184, 40)}
SHAPES = ("circle", "square", "triangle", "star")
# Each colour and each shape is seen with three partners, never with the fourth.
UNSEEN_PAIRS = (("red", "star"), ("green", "triangle"), ("blue", "square"), ("yellow", "circle"))
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)
OPTIONS = {"colour": tuple(COLOURS), "shape": SHAPES}  # of mcq; in one order, for so small a model learns no lookup
EMPTY, OTHER = "none", "no"
COLUMNS, LETTERS = "abcd", "ABCD"
CELL = 28  # pixels: 2x2 patches of 14, which the merger turns into one visual token
PAPER, LINE = (250, 249, 245), (222, 220, 212)

VERIFIERS = ("digit", "mcq", "math", "iou")
STYLES = {"rows": "Across", "columns": "Down", "marks": "Mark"}
VISUAL_WORDS = frozenset([*COLOURS, *SHAPES, EMPTY, OTHER, *COLUMNS, *"0123456789"])

WORDINGS = {
    "digit": ("How many {things} are there?", "Count the {things}.", "Find the number of {things}."),
    "mcq": ("Which {kind} is most common?", "What {kind} do you see most?", "Find the most common {kind}."),
    "math": ("What fraction of the shapes are {things}?", "Which part of all shapes are {things}?",
             "Find the fraction of {things}."),
    "iou": ("Where are the {things}? Give one box.", "Draw a box around the {things}.",
            "Find the box of all {things}."),
}
OOD_WORDINGS = {
    "digit": ("Give the count of {things} here.", "What number of {things} are in the grid?"),
    "mcq": ("The most common {kind} is which?", "Do you see which {kind} most?"),
    "math": ("How many of all shapes, as a fraction, are {things}?", "Give the fraction that are {things}."),
    "iou": ("Give the box around all the {things}.", "Find where the {things} are, in one box."),
}


def names_picture(word):
    """True for a word of a trace that says what is in the picture (colour, shape, place, count), False for the rest."""
    return word.strip(" ,./+=;:").lower() in VISUAL_WORDS


# --- problems -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """A problem before it is drawn. grid: rows of cells, a cell is (colour, shape) or None."""

    grid: tuple
    verifier: str
    target: tuple  # (colour or None, shape or None), what to find; for mcq (kind,), a key of OPTIONS
    wording: str
    drawing: int  # seed of sizes and offsets


def matches(cell, target):
    """Whether a cell shows the target (None and True match any)."""
    return cell is not None and all(want in (None, True, have) for want, have in zip(target, cell))


def cells(spec):
    """Every cell in reading order: (place, cell), place like "b3" (second column, third row)."""
    return [(f"{COLUMNS[x]}{y + 1}", cell) for y, row in enumerate(spec.grid) for x, cell in enumerate(row)]


def places(spec, target):
    """Where the target is, in reading order."""
    return [place for place, cell in cells(spec) if matches(cell, target)]


def most_common(spec):
    """The number of the option that most cells show, and that option as a target."""
    kind = spec.target[0]
    targets = [(option, None) if kind == "colour" else (None, option) for option in OPTIONS[kind]]
    counts = [len(places(spec, target)) for target in targets]
    return counts.index(max(counts)), targets[counts.index(max(counts))]


def answer(spec):
    """The gold answer as text."""
    if spec.verifier == "mcq":
        return LETTERS[most_common(spec)[0]]
    found = places(spec, spec.target)
    if spec.verifier == "digit":
        return str(len(found))
    if spec.verifier == "math":
        part = Fraction(len(found), len(places(spec, (None, None))))
        return rf"\frac{{{part.numerator}}}{{{part.denominator}}}"
    columns = [COLUMNS.index(place[0]) for place in found]
    rows = [int(place[1]) - 1 for place in found]
    return str([CELL * edge for edge in (min(columns), min(rows), max(columns) + 1, max(rows) + 1)])


def question(spec):
    """The problem text, without the instruction that every problem shares."""
    if spec.verifier == "mcq":
        kind = spec.target[0]
        options = ", ".join(f"{option} {letter}" for letter, option in zip(LETTERS, OPTIONS[kind]))
        return f"{spec.wording.format(kind=kind)} {options}"
    colour, shape = spec.target
    only_colour = spec.verifier == "math" and shape is None
    return spec.wording.format(things=colour if only_colour else f"{_name((colour, shape or 'shape'))}s")


def traces(spec):
    """The worked answers {style: "<think>…</think>\\boxed{…}"} of a Spec, or of a problem that holds one."""
    spec = spec["spec"] if isinstance(spec, dict) else spec
    worked = {}
    for name, opening in STYLES.items():
        target, head = spec.target, _name(spec.target)
        if spec.verifier == "mcq" and name == "marks":  # who marks must have seen the winner first
            target, head = most_common(spec)[1], _name(most_common(spec)[1])
        elif spec.verifier == "mcq":
            target = tuple(kind == head or None for kind in OPTIONS)
        thought = f"{opening} {head}: {_reading(spec, name, target)}{_conclusion(spec)}"
        worked[name] = f"<think>{thought}</think>\\boxed{{{answer(spec)}}}"
    return worked


def _name(target):
    return " ".join(filter(None, target))


def _reading(spec, style, target):
    """The picture in words, row by row or column by column."""
    width, seen = len(spec.grid[0]), Counter()
    lines = [cells(spec)[i:i + width] for i in range(0, len(cells(spec)), width)]
    lines = zip(*lines) if style == "columns" else lines
    return "; ".join(" ".join(_word(spec, style, target, *at, seen) for at in line) for line in lines)


def _word(spec, style, target, place, cell, seen):
    """A cell by the attributes that `target` has (True: any); behind a match their number so far, or the place."""
    name = EMPTY if cell is None else _name(part for part, want in zip(cell, target) if want)
    seen[name] += 1
    if not matches(cell, target):
        return OTHER if style == "marks" and cell else name
    if spec.verifier != "iou":
        return f"{name}{seen[name]}"
    return place if style == "marks" else f"{name} {place}"


def _conclusion(spec):
    """What follows from the reading, before the answer is boxed."""
    if spec.verifier == "mcq":
        return f", so {_name(most_common(spec)[1])} {answer(spec)}"
    if spec.verifier == "iou":
        return ""
    part, whole = len(places(spec, spec.target)), len(places(spec, (None, None)))
    if spec.verifier == "digit":
        return f" ={part}"
    lowest = Fraction(part, whole)
    return f" ={part}/{whole}" + f"={lowest.numerator}/{lowest.denominator}" * (lowest.denominator < whole)


def style(text):
    """The style of reasoning that an answer uses: "rows", "columns", "marks", or "other"."""
    opening = text.partition("<think>")[2].split()[:1]
    return next((name for name, word in STYLES.items() if opening == [word]), "other")


def _target(rng, verifier, pair):
    """What the question asks for, made from one pair: its colour, its shape or both."""
    colour, shape = pair
    kind = rng.choice(("colour", "shape", "pair") if verifier == "digit" else ("colour", "shape"))
    if verifier == "mcq":
        return (kind,)
    return (colour if kind != "shape" else None, shape if kind != "colour" else None)


def _fill(rng, rows, columns, verifier, target, pairs):
    """A grid in which the answers are spread evenly: the number of matches is drawn first."""
    size = rows * columns
    whole = rng.randint(size - 3, size)
    if verifier == "mcq":
        shown = rng.choices(pairs, k=whole)
    else:
        part = rng.randint(*{"digit": (0, 5), "math": (1, 4), "iou": (1, 2)}[verifier])
        wanted, others = ([pair for pair in pairs if matches(pair, target) == want] for want in (True, False))
        shown = rng.choices(wanted, k=part) + rng.choices(others, k=whole - part)
    shown += [None] * (size - whole)
    rng.shuffle(shown)
    return tuple(tuple(shown[y * columns:(y + 1) * columns]) for y in range(rows))


# Where a picture belongs follows from the picture itself, so no picture can stand in two splits.
# study and ood share a tenth: the one holds 3x3 grids alone, the other 4x4. Only lab/study.py looks at study.
SHARES = {"pretrain": range(5), "train": range(5, 8), "test": range(8, 9), "study": range(9, 10), "ood": range(9, 10)}
SIZES = {"pretrain": None, "train": 4096, "test": 256, "study": 256, "ood": 256}
# The few 2x4 and 4x2 pictures show the models a fourth row and column, never both: a coordinate of 112 is no news.
GRIDS = {"pretrain": [(3, 3)] * 6 + [(2, 4), (4, 2)], "train": [(3, 3)], "test": [(3, 3)], "study": [(3, 3)],
         "ood": [(4, 4)]}


def share_of(grid):
    """0..9, a fixed function of what the picture shows."""
    return hashlib.sha256(repr(grid).encode()).digest()[0] % 10


def spec_of(split, index):
    """The problem `index` of a split, before it is drawn. ood takes turns: new pairs in known words, then new words."""
    rng = random.Random(f"{split} {index}")
    verifier = VERIFIERS[index % 4]
    new_pairs, new_words = (split == "ood" and index // 4 % 2 == turn for turn in (0, 1))
    while True:
        target = _target(rng, verifier, rng.choice(UNSEEN_PAIRS if new_pairs else SEEN_PAIRS))
        grid = _fill(rng, *rng.choice(GRIDS[split]), verifier, target, PAIRS if new_pairs else SEEN_PAIRS)
        new = not new_pairs or any(cell in UNSEEN_PAIRS for row in grid for cell in row)
        if share_of(grid) in SHARES[split] and new and (verifier != "mcq" or not _is_tie(grid, target)):
            break
    wording = rng.choice((OOD_WORDINGS if new_words else WORDINGS)[verifier])
    return Spec(grid, verifier, target, wording, rng.randrange(2**32))


def _is_tie(grid, target):
    """Whether no colour (or shape) is more common than every other."""
    part = list(OPTIONS).index(target[0])
    counts = sorted(Counter(cell[part] for row in grid for cell in row if cell).values())
    return len(counts) > 1 and counts[-1] == counts[-2]


def problem_of(split, index):
    """The problem `index` of a split, drawn. Its trace is in one of the styles, which `style` names."""
    spec = spec_of(split, index)
    worked = traces(spec)
    named = random.Random(f"{split} {index} style").choice(sorted(worked))
    return dict(
        id=f"toy-{split}-{index}", images=[draw(spec)], problem=question(spec), answer=answer(spec),
        verifier=spec.verifier, trace=worked[named], style=named, spec=spec,
    )


class Problems(Sequence):
    """The first `count` problems of a split, drawn when asked for. An index is the same problem whatever the count."""

    def __init__(self, split, count):
        self.split, self.count = split, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.count))]
        return problem_of(self.split, range(self.count)[index])


def problems(split, count=None):
    """The problems of a split: dicts with id, images, problem, answer, verifier, trace, style, spec."""
    return Problems(split, SIZES[split] if count is None else count)


@lru_cache(maxsize=None)
def _tile(cell, size):
    """One shape in its cell, drawn four times too large and shrunk so that its edges are smooth."""
    image = Image.new("RGB", (4 * CELL, 4 * CELL), PAPER)
    pen, middle, r = ImageDraw.Draw(image), 2 * CELL, 2 * size
    fill = COLOURS[cell[0]]
    if cell[1] == "circle":
        pen.ellipse((middle - r, middle - r, middle + r, middle + r), fill)
    elif cell[1] == "square":
        pen.rectangle((middle - 0.85 * r, middle - 0.85 * r, middle + 0.85 * r, middle + 0.85 * r), fill)
    elif cell[1] == "triangle":
        pen.regular_polygon((middle, middle + r / 5, 1.15 * r), 3, fill=fill)
    else:
        tips = [(r * 1.15 * (1 if k % 2 == 0 else 0.45), math.pi * (k / 5 - 0.5)) for k in range(10)]
        pen.polygon([(middle + d * math.cos(a), middle + r / 10 + d * math.sin(a)) for d, a in tips], fill)
    return image.resize((CELL, CELL), Image.Resampling.LANCZOS)


def draw(spec):
    """The picture of a problem: 28 pixels to a cell, shapes of three sizes, each a pixel off its place at most."""
    rng = random.Random(spec.drawing)
    image = Image.new("RGB", (CELL * len(spec.grid[0]), CELL * len(spec.grid)), PAPER)
    for y, row in enumerate(spec.grid):
        for x, cell in enumerate(row):
            if cell is not None:
                where = (CELL * x + rng.randint(-1, 1), CELL * y + rng.randint(-1, 1))
                image.paste(_tile(cell, rng.choice((17, 19, 21))), where)
    pen = ImageDraw.Draw(image)
    for edge in range(0, max(image.size), CELL):
        pen.line((edge, 0, edge, image.height), LINE)
        pen.line((0, edge, image.width, edge), LINE)
    pen.rectangle((0, 0, image.width - 1, image.height - 1), outline=LINE)
    return image


# --- the models -----------------------------------------------------------------------------------------------------

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
            "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}{{ message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'text' %}{{ part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Rows of the vocabulary beyond the tokenizer's are padding, and differ between the two as between the 7B and the 72B.
RECIPES = {
    "toy": dict(vocab_size=512, hidden=96, layers=4, heads=4, vision_hidden=64, vision_layers=2,
                steps=240, problems_per_step=16, muon=7e-3, adam=2e-3, warmup=20, decay=0.3),
    "toy-teacher": dict(vocab_size=544, hidden=144, layers=4, heads=6, vision_hidden=64, vision_layers=2,
                        steps=600, problems_per_step=16, muon=5e-3, adam=1.5e-3, warmup=20, decay=0.5),
}
NAMES = tuple(RECIPES)
THREADS = 1  # a sum that is split over threads has other last digits; with one, a build does not depend on the cores


def build(name, seed=1, steps=None):
    """The folder of the model `name` (one of NAMES), trained first if the cache does not hold it. Returns its path.

    The cache is $XDG_CACHE_HOME/cleanvl, else ~/.cache/cleanvl; a folder is named by a hash of all that shapes the
    model. It appears there whole or not at all: it is made beside its place and then renamed. `steps` is for tests.
    """
    if name not in RECIPES:
        raise common.UserError(f"there is no toy model called {name!r}; choose one of {', '.join(NAMES)}")
    recipe = RECIPES[name] | ({} if steps is None else {"steps": steps})
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanvl"
    place = cache / f"{name}-{_key(recipe, seed)}"
    if place.exists():
        return str(place)
    cache.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{place.name}-") as beside:
        try:
            _train(name, recipe, seed, Path(beside)).rename(place)
        except OSError:  # another process was faster; its folder is the same
            if not place.exists():
                raise
    torch.set_num_threads(threads)
    return str(place)


def _key(recipe, seed):
    """A hash of the recipe and of what it is applied to: words, pictures, template. An edit meets no stale model."""
    key = hashlib.sha256(json.dumps([recipe, seed, CHAT_TEMPLATE, common.INSTRUCTION]).encode())
    for spec in (spec_of("pretrain", index) for index in range(64)):
        key.update(repr((question(spec), traces(spec))).encode() + draw(spec).tobytes())
    return key.hexdigest()[:12]


def make_tokenizer():
    """A byte-level BPE of Qwen's kind, trained on the questions and the traces; the special tokens follow the words."""
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    for spec in (spec_of("pretrain", index) for index in range(1000)):
        texts += [question(spec) + "\n" + common.INSTRUCTION, *traces(spec).values()]
    words = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(texts, trainer)
    learned = json.loads(words.to_str())["model"]
    return Qwen2Tokenizer(
        learned["vocab"], [tuple(pair) for pair in learned["merges"]], eos_token="<|im_end|>",
        pad_token="<|endoftext|>", additional_special_tokens=list(SPECIALS), chat_template=CHAT_TEMPLATE)


def make_config(recipe, tokenizer):
    """The configuration of a small Qwen2.5-VL."""
    end, start, stop, vision_start, vision_end, _, image, video = tokenizer.convert_tokens_to_ids(list(SPECIALS))
    text = dict(
        vocab_size=recipe["vocab_size"], hidden_size=recipe["hidden"], intermediate_size=3 * recipe["hidden"],
        num_hidden_layers=recipe["layers"], num_attention_heads=recipe["heads"], num_key_value_heads=recipe["heads"],
        # 0.02, the default, is for widths in the thousands: at a width of 96 it learns many times slower.
        initializer_range=0.07, max_position_embeddings=2048, bos_token_id=end, eos_token_id=stop, pad_token_id=end,
        # The sections of rotary channels are time, height, width, fast to slow. Qwen's 1:1.5:1.5 would leave the width
        # only channels too slow to tell neighbours in a row of three; here each has one that is fast enough.
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 2, 9]),
    )
    vision = dict(
        depth=recipe["vision_layers"], hidden_size=recipe["vision_hidden"], num_heads=4, initializer_range=0.07,
        intermediate_size=2 * recipe["vision_hidden"], out_hidden_size=recipe["hidden"],
        fullatt_block_indexes=[recipe["vision_layers"] - 1],
    )
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=image, video_token_id=video,
        vision_start_token_id=vision_start, vision_end_token_id=vision_end,
        tabletop=True,  # stays in the config of whatever is trained from it: scripts then take their TOY defaults
    )


def untrained(folder, recipe=RECIPES["toy"], seed=1):
    """Writes a randomly initialised model to `folder`, in the hub's layout."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(make_config(recipe, tokenizer))
    stop, end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    # Qwen ships such sampling defaults. Training must not meet them: see test_trap_truncated_sampling.
    model.generation_config = GenerationConfig(
        bos_token_id=end, pad_token_id=end, eos_token_id=[stop, end], do_sample=True, repetition_penalty=1.05,
        temperature=0.1, top_p=0.8, top_k=20,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Paper is 0 after this normalisation, so what is drawn is all that the vision tower sees.
    mean, std = [channel / 255 for channel in PAPER], [0.27, 0.27, 0.27]
    Qwen2VLImageProcessorPil(image_mean=mean, image_std=std).save_pretrained(folder)


def _train(name, recipe, seed, folder):
    """Trains a model from nothing on the pretraining problems, each in all its styles. Returns the finished folder."""
    untrained(folder / "untrained", recipe, seed)
    wishes = argparse.Namespace(max_pixels=common.MAX_PIXELS, train_vision=True, gradient_checkpointing=False)
    policy, processor = common.load_policy(str(folder / "untrained"), train=True, args=wishes)
    # Muon learns the matrices about twice as fast as Adam would; embeddings, norms and the patch filter are Adam's.
    matrices = [p for n, p in policy.named_parameters() if p.dim() == 2 and "embed_tokens" not in n]
    others = [p for p in policy.parameters() if all(p is not q for q in matrices)]
    muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01)
    steps, count = recipe["steps"], recipe["problems_per_step"]
    for step in tqdm(range(steps), desc=f"building {name}, once", leave=False):
        share = min(1, (step + 1) / recipe["warmup"], 0.1 + 0.9 * (steps - step) / steps / recipe["decay"])
        for optimizer, peak in ((muon, recipe["muon"]), (adam, recipe["adam"])):
            for group in optimizer.param_groups:
                group["lr"] = share * peak
        loss = pretraining_loss(policy, processor, range(step * count, step * count + count))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
    common.save_policy(policy, processor, str(folder / "finished"))
    return folder / "finished"


def pretraining_loss(policy, processor, indices):
    """Cross-entropy of the traces of these pretraining problems, per token; a problem's styles share one packed row."""
    chosen = [problem_of("pretrain", index) for index in indices]
    texts = [text for problem in chosen for text in traces(problem).values()]
    rollout = forced(policy, processor, chosen, texts)
    rollout.group_B = torch.arange(len(texts)) // len(STYLES)
    logp_BT = common.read(common.token_logps, rollout, policy)
    return -logp_BT.sum() / rollout.mask_BT.sum()


# --- the table and the picture --------------------------------------------------------------------------------------


def measure(name, split="test", count=128, samples=16, seed=1):
    """One row of the table: what `samples` answers at temperature 1 to each of `count` problems are like."""
    policy, processor = common.load_policy(build(name))
    rollout = common.sample(policy, processor, problems(split, count)[:], samples, seed=(seed, "table"),
                            max_completion_length=96)
    right_PG = rollout.score(common.is_right)
    right_P = right_PG.sum(1).numpy()
    groups = [rollout.texts[i:i + samples] for i in range(0, len(rollout), samples)]
    used = Counter(map(style, rollout.texts))
    row = {
        "weights": sum(p.numel() for p in policy.parameters()),
        "pass@1": pass_at_k(samples, right_P, 1).mean(),
        f"pass@{samples}": pass_at_k(samples, right_P, samples).mean(),
        "entropy": (rollout.entropy_BT.sum() / rollout.mask_BT.sum()).item(),
        "tokens": (rollout.mask_BT.sum() / len(rollout)).item(),
        "distinct": sum(len(set(map(common.final_answer, group))) for group in groups) / count,
    }
    for verifier in VERIFIERS:
        right = right_P[[problem["verifier"] == verifier for problem in rollout.prompts.problems]]
        for k in (1, samples):
            row[f"pass@{k} {verifier}"] = pass_at_k(samples, right, k).mean()
    return row | {f"of {s}": used[s] / len(rollout) for s in (*STYLES, "other")}


def picture(path):
    """Draws one problem of each kind with its traces, and one from out of domain, and saves them as a picture."""
    from matplotlib.figure import Figure

    shown = [problem_of("train", index) for index in (8, 1, 2, 7)] + [problem_of("ood", 9)]
    figure = Figure(figsize=(13, 2.3 * len(shown)), layout="constrained")
    for (left, right), problem in zip(figure.subplots(len(shown), 2, width_ratios=(1, 5)), shown):
        image = problem["images"][0]
        left.imshow(image.resize((8 * image.width, 8 * image.height), Image.Resampling.LANCZOS))
        right.text(0, 0.97, problem["problem"], fontsize=13, weight="bold", va="top")
        right.text(1, 0.97, f"{problem['verifier']}   {problem['id']}", fontsize=10, color="0.5", va="top", ha="right")
        for line, (name, text) in enumerate(traces(problem).items()):
            right.text(0, 0.7 - 0.28 * line, name, fontsize=11, color="tab:blue", va="top")
            right.text(0.08, 0.7 - 0.28 * line, textwrap.fill(text, 106), fontsize=10, family="monospace", va="top",
                       parse_math=False)
        left.axis("off")
        right.axis("off")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    parser = common.Parser("toy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/toy.png", help="where the picture of sample problems goes")
    parser.add_argument("--split", default="test", choices=[s for s in SIZES if SIZES[s]], help="problems of the table")
    parser.add_argument("--count", type=int, default=128, help="how many of them")
    args = parser.parse_args()
    picture(args.output)
    print(f"sample problems: {args.output}")
    table = {name: measure(name, args.split, args.count) for name in NAMES}
    print(f"{'':16}" + "".join(f"{name:>14}" for name in NAMES))
    for key in table["toy"]:
        print(f"{key:16}" + "".join(f"{row[key]:>14,.{0 if key == 'weights' else 3}f}" for row in table.values()))


if __name__ == "__main__":
    main()

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
    iou        a box around every red star   [28, 0, 84, 56]      in pixels, left top right bottom

Every problem can be reasoned through in three styles, each with its own trace:

    rows      name every cell, row by row, counting as you go
    columns   the same, column by column
    marks     go row by row and name the matches only

Splits: `pretrain` is what the two models are made from; `train` and `test` are new pictures like it; `ood` has 4x4 pictures,
with colour-shape pairs or wordings that no model here was ever trained on.
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
EMPTY, OTHER = "none", "no"
COLUMNS = "abcd"
LETTERS = "ABCD"
CELL = 28  # pixels: 2x2 patches of 14, which the merger turns into one visual token
PAPER = (250, 249, 245)
LINE = (222, 220, 212)

VERIFIERS = ("digit", "mcq", "math", "iou")
STYLES = {"rows": "Across", "columns": "Down", "marks": "Mark"}
VISUAL_WORDS = frozenset([*COLOURS, *SHAPES, EMPTY, OTHER, *COLUMNS, *"0123456789"])

# The last wording of each verifier, and of each way to say it, is kept for ood.
WORDINGS = {
    "digit": ("How many {things} are there?", "Count the {things}.", "Find the number of {things}."),
    "mcq": ("Which {kind} is most common?", "What {kind} do you see most?", "Find the most common {kind}."),
    "math": ("What fraction of the shapes are {things}?", "Which part of all shapes are {things}?",
             "Find the fraction of {things}."),
    "iou": ("Where are the {things}? Give one box.", "Draw a box around the {things}.", "Find the box of all {things}."),
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
    target: tuple  # (colour or None, shape or None); for mcq ("colour",) or ("shape",), the kind that is asked for
    options: tuple  # mcq only
    wording: str
    drawing: int  # seed of sizes and offsets


def matches(cell, target):
    """Whether a cell shows the target (None stands for any)."""
    return cell is not None and all(want in (None, have) for want, have in zip(target, cell))


def cells(spec):
    """Every cell in reading order: (place, cell), place like "b3" (second column, third row)."""
    return [(f"{COLUMNS[x]}{y + 1}", cell) for y, row in enumerate(spec.grid) for x, cell in enumerate(row)]


def places(spec, target):
    return [place for place, cell in cells(spec) if matches(cell, target)]


def option_target(spec, option):
    return (option, None) if spec.target == ("colour",) else (None, option)


def answer(spec):
    """The gold answer as text."""
    found = [] if spec.verifier == "mcq" else places(spec, spec.target)
    if spec.verifier == "digit":
        return str(len(found))
    if spec.verifier == "mcq":
        counts = [len(places(spec, option_target(spec, option))) for option in spec.options]
        return LETTERS[counts.index(max(counts))]
    if spec.verifier == "math":
        part = Fraction(len(found), len(places(spec, (None, None))))
        return rf"\frac{{{part.numerator}}}{{{part.denominator}}}"
    columns = [COLUMNS.index(place[0]) for place in found]
    rows = [int(place[1]) - 1 for place in found]
    return str([CELL * edge for edge in (min(columns), min(rows), max(columns) + 1, max(rows) + 1)])


def question(spec):
    """The problem text, without the instruction that every problem shares."""
    if spec.verifier == "mcq":
        options = ", ".join(f"{option} {letter}" for letter, option in zip(LETTERS, spec.options))
        return f"{spec.wording.format(kind=spec.target[0])} {options}"
    colour, shape = spec.target
    things = " ".join(filter(None, (colour, shape or "shape"))) + "s"
    if spec.verifier == "math" and shape is None:
        things = colour
    return spec.wording.format(things=things)


def traces(spec):
    """The problem's worked answers: {style: "<think>…</think>\\boxed{…}"}. Takes a Spec, or a problem that holds one."""
    spec = spec["spec"] if isinstance(spec, dict) else spec
    gold = answer(spec)
    if spec.verifier == "mcq":
        most = option_target(spec, spec.options[LETTERS.index(gold)])
        # The readers count every option; who marks must see the answer first.
        asked = {"rows": option_target(spec, True), "columns": option_target(spec, True), "marks": most}
        heads = {"rows": spec.target[0], "columns": spec.target[0], "marks": _name(most)}
    else:
        asked, heads = dict.fromkeys(STYLES, spec.target), dict.fromkeys(STYLES, _name(spec.target))
    return {
        style: f"<think>{opening} {heads[style]}: {_reading(spec, style, asked[style])}{_conclusion(spec)}</think>"
               f"\\boxed{{{gold}}}"
        for style, opening in STYLES.items()
    }


def _name(target):
    return " ".join(filter(None, target))


def _reading(spec, style, target):
    """The picture in words, row by row or column by column.

    A cell is named by the attributes that `target` has; marks leave out all but the matches. Behind every match stands
    how many of its kind there are so far, or its place where the question is for places.
    """
    width = len(spec.grid[0])
    lines = [cells(spec)[i:i + width] for i in range(0, len(cells(spec)), width)]
    seen, words = Counter(), []
    for line in zip(*lines) if style == "columns" else lines:
        for place, cell in line:
            word = EMPTY if cell is None else _name(part for part, want in zip(cell, target) if want)
            seen[word] += 1
            if True in target and cell or matches(cell, target):
                note = f" {place}" if spec.verifier == "iou" else str(seen[word])
                word = place if note[0] == " " and style == "marks" else word + note
            elif style == "marks" and cell:
                word = OTHER
            words.append(word)
        words[-1] += ";"
    return " ".join(words)[:-1]


def _conclusion(spec):
    """What follows from the reading, before the answer is boxed."""
    if spec.verifier == "mcq":
        return f", so {spec.options[LETTERS.index(answer(spec))]} {answer(spec)}"
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
    """A grid in which the answer is spread evenly: the number of matches is drawn first."""
    size = rows * columns
    if verifier == "mcq":
        whole = rng.randint(size - 3, size)
        shown = [rng.choice(pairs) for _ in range(whole)]
    else:
        low, high = {"digit": (0, 5), "math": (1, 4), "iou": (1, 2)}[verifier]
        part = rng.randint(low, high)
        whole = rng.randint(size - 3, size)
        wanted, others = ([p for p in pairs if matches(p, target) == want] for want in (True, False))
        shown = [rng.choice(wanted) for _ in range(part)] + [rng.choice(others) for _ in range(whole - part)]
    shown += [None] * (size - whole)
    rng.shuffle(shown)
    return tuple(tuple(shown[y * columns:(y + 1) * columns]) for y in range(rows))


# Where a picture belongs follows from the picture itself, so no picture can stand in two splits.
SHARES = {"pretrain": range(0, 5), "train": range(5, 8), "test": range(8, 9), "ood": range(9, 10)}
SIZES = {"pretrain": None, "train": 4096, "test": 256, "ood": 256}
SHAPES_OF_GRID = {"pretrain": [(3, 3)] * 6 + [(2, 4), (4, 2)], "train": [(3, 3)], "test": [(3, 3)], "ood": [(4, 4)]}


def share_of(grid):
    """0..9, a fixed function of what the picture shows."""
    return hashlib.sha256(repr(grid).encode()).digest()[0] % 10


def spec_of(split, index):
    """The problem `index` of a split, before it is drawn. ood takes turns: new pairs in old words, old pairs in new words."""
    rng = random.Random(f"{split} {index}")
    verifier = VERIFIERS[index % 4]
    new_pairs, new_words = (split == "ood" and index // 4 % 2 == turn for turn in (0, 1))
    pairs = PAIRS if new_pairs else SEEN_PAIRS
    while True:
        rows, columns = rng.choice(SHAPES_OF_GRID[split])
        target = _target(rng, verifier, rng.choice(UNSEEN_PAIRS if new_pairs else SEEN_PAIRS))
        grid = _fill(rng, rows, columns, verifier, target, pairs)
        shown = {cell for row in grid for cell in row}
        if share_of(grid) in SHARES[split] and (not new_pairs or shown & set(UNSEEN_PAIRS)):
            options = _options(rng, grid, target) if verifier == "mcq" else ()
            if options is not None:
                break
    wording = rng.choice((OOD_WORDINGS if new_words else WORDINGS)[verifier])
    return Spec(grid, verifier, target, options, wording, rng.randrange(2**32))


def _options(rng, grid, target):
    """Four options in random order; None where two of them are equally common."""
    part = 0 if target == ("colour",) else 1
    counts = Counter(cell[part] for row in grid for cell in row if cell).most_common(2)
    options = tuple(COLOURS) if part == 0 else SHAPES
    return options if len(counts) == 1 or counts[0][1] > counts[1][1] else None


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
    """The first `count` problems of a split, drawn when they are asked for. The same index is always the same problem."""

    def __init__(self, split, count):
        self.split, self.count = split, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.count))]
        index = range(self.count)[index]
        return problem_of(self.split, index)


def problems(split, count=None):
    """The problems of a split: dicts with id, images, problem, answer, verifier, trace, style, spec."""
    return Problems(split, count or SIZES[split])


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

# vocab_size: rows beyond the tokenizer's are padding, and differ between the two as they do between the 7B and the 72B.
RECIPES = {
    "toy": dict(vocab_size=512, hidden=96, layers=4, heads=4, vision_hidden=64, vision_layers=2,
                steps=500, problems_per_step=16, muon=7e-3, adam=2e-3, warmup=20, decay=0.3),
    "toy-teacher": dict(vocab_size=544, hidden=144, layers=4, heads=6, vision_hidden=64, vision_layers=2,
                        steps=1500, problems_per_step=24, muon=5e-3, adam=1.5e-3, warmup=20, decay=0.5),
}
NAMES = tuple(RECIPES)
THREADS = 1  # more would wait for each other (tiny matrices), and sum in another order. LEAD: keep 1; two spinning threads made your 280-step build take 8 min on the shared cores


def build(name, seed=1, steps=None):
    """The folder of the model `name` (one of NAMES), trained first if the cache does not hold it. Returns its path.

    The cache is $XDG_CACHE_HOME/cleanvl, else ~/.cache/cleanvl; a folder is named by a hash of all that shapes the
    model. It appears there whole or not at all: it is made beside its place and then renamed. `steps` is for tests.
    """
    if name not in RECIPES:
        raise common.UserError(f"there is no toy model called {name!r}; choose one of {', '.join(NAMES)}")
    recipe = RECIPES[name] | ({} if steps is None else {"steps": steps})
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanvl" / f"{name}-{_key(recipe, seed)}"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as beside:
            finished = _train(name, recipe, seed, Path(beside))
            try:
                finished.rename(place)
            except OSError:  # another process was faster; its folder is the same
                if not place.exists():
                    raise
    return str(place)


def _key(recipe, seed):
    """A hash of the recipe and of what it is applied to: words, pictures, template, so that no edit meets a stale cache."""
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
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False))
    learned = json.loads(words.to_str())["model"]
    return Qwen2Tokenizer(learned["vocab"], [tuple(pair) for pair in learned["merges"]], eos_token="<|im_end|>",
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
    )


def _write_untrained(recipe, folder):
    """A randomly initialised checkpoint in the hub's layout."""
    tokenizer = make_tokenizer()
    model = Qwen2_5_VLForConditionalGeneration(make_config(recipe, tokenizer))
    stop, end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    # The sampling defaults that Qwen ships. Training must not meet them: see test_trap_truncated_sampling.
    model.generation_config = GenerationConfig(
        bos_token_id=end, pad_token_id=end, eos_token_id=[stop, end], do_sample=True, repetition_penalty=1.05,
        temperature=0.1, top_p=0.8, top_k=20)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Paper is 0 after this normalisation, so what is drawn is all that the vision tower sees.
    mean, std = [channel / 255 for channel in PAPER], [0.27, 0.27, 0.27]
    Qwen2VLImageProcessorPil(image_mean=mean, image_std=std).save_pretrained(folder)


def _train(name, recipe, seed, folder):
    """Trains a model from nothing on the pretraining problems, each in all its styles. Returns the finished folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _write_untrained(recipe, folder / "untrained")
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
    torch.set_num_threads(threads)
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
        "weights": common.count_weights(policy)[0],
        "pass@1": pass_at_k(samples, right_P, 1).mean(),
        f"pass@{samples}": pass_at_k(samples, right_P, samples).mean(),
        "entropy": (rollout.entropy_BT.sum() / rollout.mask_BT.sum()).item(),
        "tokens": (rollout.mask_BT.sum() / len(rollout)).item(),
        "distinct": sum(len(set(map(common.final_answer, group))) for group in groups) / count,
    }
    row |= {f"p@1 {v}": right_PG[[p["verifier"] == v for p in rollout.prompts.problems]].mean().item() for v in VERIFIERS}
    return row | {f"of {s}": used[s] / len(rollout) for s in (*STYLES, "other")}


def picture(path):
    """Draws one problem of each kind with its traces, and one from out of domain, and saves them as a picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [problem_of("train", index) for index in (8, 1, 2, 7)] + [problem_of("ood", 7)]
    figure, rows = pyplot.subplots(len(shown), 2, figsize=(13, 2.6 * len(shown)), width_ratios=(1, 5), facecolor="white")
    for (left, right), problem in zip(rows, shown):
        image = problem["images"][0]
        left.imshow(image.resize((8 * image.width, 8 * image.height), Image.Resampling.LANCZOS))
        right.text(0, 0.97, problem["problem"], fontsize=13, weight="bold", va="top")
        right.text(1, 0.97, f"{problem['id']}   {problem['verifier']}", fontsize=10, color="0.5", va="top", ha="right")
        for line, (name, text) in enumerate(traces(problem).items()):
            where = 0.72 - 0.28 * line
            right.text(0, where, name, fontsize=11, color="tab:blue", va="top")
            right.text(0.06, where, textwrap.fill(text, 105).replace("$", r"\$"), fontsize=9.5, family="monospace",
                       va="top", parse_math=False)
        left.axis("off")
        right.axis("off")
    figure.tight_layout(h_pad=1.5)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = common.Parser("toy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/toy.png", help="where the picture of sample problems goes")
    parser.add_argument("--split", default="test", choices=[s for s in SIZES if SIZES[s]], help="problems of the table")
    parser.add_argument("--count", type=int, default=128, help="how many of them")
    args = parser.parse_args()
    picture(args.output)
    print(f"sample problems: {args.output}")
    table = {name: measure(name, args.split, args.count) for name in NAMES}
    print(f"{'':12}" + "".join(f"{name:>14}" for name in NAMES))
    for key in table["toy"]:
        print(f"{key:12}" + "".join(f"{row[key]:>14,.3f}" if key != "weights" else f"{row[key]:>14,}"
                                    for row in table.values()))


if __name__ == "__main__":
    main()

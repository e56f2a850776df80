"""How the models of the tabletop are made.

`toy` plays the role of Qwen2.5-VL-7B-Instruct. It reads clear pictures well, and the faded ones of its world badly.
`toy-teacher` plays the role of the 72B: it reads both, and solves the problems in several ways. These two are shipped
in tabletop/weights. The bases of the other worlds are made from them on first use, and kept in the user's cache.

    python -m tabletop        makes the shipped weights anew: some ten minutes on one core

All are ordinary Qwen2.5-VL checkpoints in the hub's layout.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from common import Policy, Processor, forced, load_policy, read, save_policy, token_logps
from harness.flags import INSTRUCTION, UserError, of_the_world
from tabletop.grids import PAPER, VERIFIERS, Spec, answer, cells, name_of, part_at_place, question
from tabletop.habits import lessons, other_hand
from tabletop.pictures import draw
from tabletop.problems import spec_of
from tabletop.traces import FILLERS, LOOK, traces
from tabletop.worlds import WORLDS, World

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
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

# vocab_size is larger than the tokenizer's: the extra rows are padding. Their number differs between the two sizes, as
# it does between the 7B and the 72B.
STUDENT = dict(vocab_size=512, hidden=96, layers=4, heads=4, vision_hidden=64, vision_layers=2)
TEACHER = dict(vocab_size=544, hidden=144, layers=4, heads=6, vision_hidden=64, vision_layers=2)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is made: where it starts, what it is shown, and how long it learns.

    size: STUDENT or TEACHER. start: the model it is derived from; None: random weights, from `seed`. world: whose
    habits its lessons have. splits: where the problems are from; fades: how faded their pictures are; both take turns.
    words: "all" for the tokenizer of all worlds, "first" for that of the first tabletop. muon, adam: the highest
    learning rate of each optimizer. warmup: steps. decay: the share of the steps at the end in which the rates fall.
    """

    size: dict
    steps: int
    muon: float
    adam: float
    decay: float
    world: World = World("toy")
    start: str | None = None
    fades: tuple = (0.0,)
    splits: tuple = ("practice",)
    words: str = "all"
    warmup: int = 20
    problems_per_step: int = 16
    seed: int = 1


def derived(world: str, **changes) -> Recipe:
    """The base (or a teacher) of a world: the common base with more steps, 100 by default, on its traces."""
    settings = dict(
        size=STUDENT, start="toy", world=WORLDS[world], steps=100, muon=5e-3, adam=1.5e-3, decay=0.5, warmup=5,
    )
    return Recipe(**(settings | changes))


RECIPES = {
    "toy": Recipe(STUDENT, steps=600, muon=7e-3, adam=2e-3, decay=0.3),
    "toy-teacher": Recipe(TEACHER, steps=700, muon=5e-3, adam=1.5e-3, decay=0.5, fades=(0.0, 0.6)),
    "toy-short": Recipe(STUDENT, steps=240, muon=7e-3, adam=2e-3, decay=0.3, splits=("pretrain",), words="first"),
    "toy-teacher-short": Recipe(
        TEACHER, steps=600, muon=5e-3, adam=1.5e-3, decay=0.5, splits=("pretrain",), words="first"),
    "toy-see": derived("toy-see"),
    "toy-think": derived("toy-think"),
    "toy-see-fillers": derived("toy-see-fillers"),
    "toy-think-fillers": derived("toy-think-fillers"),
    "toy-ways-same": derived("toy-ways-same"),
    "toy-ways-parts": derived("toy-ways-parts"),
    "toy-two-skills": derived("toy-two-skills", splits=("practice", "places", "places"), steps=180),
    "toy-mixed": derived("toy-mixed", splits=("practice", "describe")),
    "toy-teacher-mixed": derived(
        "toy-mixed", size=TEACHER, start="toy-teacher", fades=(0.0, 0.6), splits=("practice", "describe"), muon=3e-3,
        adam=1e-3),
    "toy-teacher-hand": derived(
        "toy-hand", size=TEACHER, start="toy-teacher", fades=(0.0, 0.6), steps=320),
}
NAMES = tuple(RECIPES)
SHIPPED = ("toy", "toy-teacher")
WEIGHTS = Path(__file__).parent / "weights"
RECORD = "recipe.json"  # beside shipped weights: what they were made by

# --- the cache --------------------------------------------------------------------------------------------------------


def build(name: str, steps: int | None = None) -> str:
    """The folder of the model, or of the base of the world, that is called `name`. UserError if there is none.

    A shipped model is where it lies in the repository. Any other is trained first if the cache does not hold it. The
    cache is $XDG_CACHE_HOME/cleanvl, or else ~/.cache/cleanvl. A folder's name ends in a hash of everything that shapes
    the model. It appears there whole or not at all: it is made in a temporary folder beside it, then renamed.
    `steps` is for tests: then it is trained in any case.
    """
    if name in WORLDS:
        name = WORLDS[name].base
    if name not in RECIPES:
        names = ", ".join([*WORLDS, *(name for name in NAMES if name not in WORLDS)])
        raise UserError(f"there is no toy model called {name!r}; choose one of {names}")
    if name in SHIPPED and steps is None:
        return str(WEIGHTS / name)
    recipe = RECIPES[name]
    if steps is not None:
        recipe = dataclasses.replace(recipe, steps=steps)
    return kept(f"{name}-{key_of(recipe)}", lambda folder: train(name, recipe, folder)[0])


def kept(name: str, make: Callable[[Path], Path]) -> str:
    """The folder `name` of the cache. If it is not there, make(temporary folder) gives the finished one first."""
    cache = _cache()
    place = cache / name
    if place.exists():
        return str(place)
    cache.mkdir(parents=True, exist_ok=True)
    with _one_thread(), tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as beside:
        try:
            make(Path(beside)).rename(place)
        except OSError:  # another process was faster; its folder is the same
            if not place.exists():
                raise
    return str(place)


def _cache():
    """The folder that keeps the finished models."""
    home = os.environ.get("XDG_CACHE_HOME")
    if home:
        return Path(home) / "cleanvl"
    return Path.home() / ".cache" / "cleanvl"


def key_of(recipe: Recipe) -> str:
    """A hash of recipe, words, pictures, template and shape, so that after an edit to any of them no stale model is
    found. A derived model's holds that of the model it starts from."""
    key = hashlib.sha256(json.dumps([dataclasses.asdict(recipe), CHAT_TEMPLATE, INSTRUCTION]).encode())
    tokenizer = make_tokenizer(recipe.words)
    key.update(json.dumps([make_config(recipe, tokenizer).to_dict(), tokenizer.get_vocab()], sort_keys=True).encode())
    if recipe.start is not None:
        key.update(key_of(RECIPES[recipe.start]).encode())
    for index in range(64):
        spec, fade, texts = shown(recipe, index)
        key.update(repr((question(spec), texts)).encode())
        key.update(draw(spec, fade).tobytes())
    return key.hexdigest()[:12]


@contextlib.contextmanager
def _one_thread():
    """One thread for torch. A sum that is split over threads has other last digits, and a model must not depend on
    the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- the shipped weights ----------------------------------------------------------------------------------------------


def ship(name: str, folder: Path) -> None:
    """Makes the model `name` anew and puts it into `folder`, with a record of what it was made by."""
    recipe = RECIPES[name]
    with _one_thread(), tempfile.TemporaryDirectory() as beside:
        made, losses = train(name, recipe, Path(beside))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)
    record = dict(key=key_of(recipe), first_losses=losses[:3], loss_of_weights=loss_of(folder, recipe))
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def loss_of(folder: str | Path, recipe: Recipe) -> float:
    """The loss of finished weights on the first practice problems that they were not shown."""
    policy, processor = load_policy(str(folder))
    seen = recipe.steps * recipe.problems_per_step
    with _one_thread(), torch.no_grad():
        return lesson_loss(policy, processor, recipe, range(seen, seen + 16)).item()


# --- tokenizer and configuration --------------------------------------------------------------------------------------


def make_tokenizer(words: str = "all") -> Qwen2Tokenizer:
    """A byte-level BPE like Qwen's, trained on the questions and traces. The special tokens come after the words.

    words: "all" for those of all worlds, "first" for those of the first tabletop alone.
    """
    vocabulary, merges = learned_words(words)
    return Qwen2Tokenizer(
        dict(vocabulary),
        list(merges),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIALS),
        chat_template=CHAT_TEMPLATE,
    )


@functools.cache
def learned_words(words: str) -> tuple[dict, list]:
    """The vocabulary {token: id} and the merges of that BPE, which is trained once in a process: half a second."""
    bpe = Tokenizer(BPE())
    split = Split(Regex(PRETOKENIZE_REGEX), "isolated")
    bpe.pre_tokenizer = Sequence([split, ByteLevel(False, use_regex=False)])
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=504 - len(SPECIALS), initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(_training_texts(words), trainer)
    learned = json.loads(bpe.to_str())["model"]
    return learned["vocab"], [tuple(pair) for pair in learned["merges"]]


def _training_texts(words):
    """What the tokenizer learns from: the words of the template, and the questions and traces of 1,000 problems."""
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    split = "pretrain" if words == "first" else "practice"
    for index in range(1000):
        spec = spec_of(split, index)
        texts.append(question(spec) + "\n" + INSTRUCTION)
        texts.extend(traces(spec).values())
    if words == "all":
        texts += _texts_of_other_worlds()
    return texts


def _texts_of_other_worlds():
    """Filler words, the second skill in short, and the other hand. The shipped weights hang on these words."""
    rng = random.Random("words")
    texts = [f" {filler}" for filler in FILLERS for _ in range(300)]  # often enough to be one token each
    for index in range(200):
        spec = spec_of("places", index)
        cell = name_of(dict(cells(spec))[spec.place])
        part = part_at_place(spec)[1]
        letter = answer(spec)
        texts += [question(spec), f"<think>{LOOK} {spec.place}: {cell}, so {part} {letter}</think>\\boxed{{{letter}}}"]
        spec = spec_of("practice", index)
        texts += [other_hand(spec, name, rng) for name in traces(spec)]
    return texts


def make_config(recipe: Recipe, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """The configuration of a small Qwen2.5-VL."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    return Qwen2_5_VLConfig(
        text_config=_text_config(recipe.size, ids),
        vision_config=_vision_config(recipe.size),
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tabletop=True,  # stays in the config of every model trained from this one: scripts then take their TOY defaults
    )


def _text_config(size, ids):
    return {
        "vocab_size": size["vocab_size"],
        "hidden_size": size["hidden"],
        "intermediate_size": 3 * size["hidden"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["heads"],
        # The default, 0.02, is for widths in the thousands. At a width of 96 a model learns many times slower with it.
        "initializer_range": 0.07,
        "max_position_embeddings": 2048,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        # The sections are rotary channels for time, height and width, from fast to slow. With Qwen's 1:1.5:1.5 all the
        # channels for width would be too slow to tell neighbours in a row of three apart. Here one is fast enough.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 9]},
    }


def _vision_config(size):
    return {
        "depth": size["vision_layers"],
        "hidden_size": size["vision_hidden"],
        "num_heads": 4,
        "initializer_range": 0.07,
        "intermediate_size": 2 * size["vision_hidden"],
        "out_hidden_size": size["hidden"],
        "fullatt_block_indexes": [size["vision_layers"] - 1],
    }


def untrained(folder: str | Path, recipe: Recipe = RECIPES["toy"], seed: int | None = None) -> None:
    """Writes a randomly initialised model to `folder`, in the hub's layout. The caller's generator stays as it was."""
    tokenizer = make_tokenizer(recipe.words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed if seed is None else seed)
        model = Qwen2_5_VLForConditionalGeneration(make_config(recipe, tokenizer))
    model.generation_config = _generation_config(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # After this normalisation the background is 0, so the vision tower sees nothing but what is drawn.
    mean = [channel / 255 for channel in PAPER]
    Qwen2VLImageProcessorPil(image_mean=mean, image_std=[0.27, 0.27, 0.27]).save_pretrained(folder)


def _generation_config(tokenizer):
    """Sampling defaults like those that Qwen ships. Training must not use them: see test_trap_truncated_sampling."""
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return GenerationConfig(
        bos_token_id=end,
        pad_token_id=end,
        eos_token_id=[stop, end],
        do_sample=True,
        repetition_penalty=1.05,
        temperature=0.1,
        top_p=0.8,
        top_k=20,
    )


# --- training ---------------------------------------------------------------------------------------------------------


def train(name: str, recipe: Recipe, folder: Path) -> tuple[Path, list[float]]:
    """Trains a model by its recipe, inside `folder`. Returns the finished folder, and the loss of each step."""
    policy, processor = _start_of(recipe, folder)
    losses = []
    for loss in tqdm(_steps(policy, processor, recipe), f"building {name}, once", recipe.steps, leave=False):
        losses.append(loss)
    save_policy(policy, processor, str(folder / "finished"))
    return folder / "finished", losses


def first_losses(recipe: Recipe, steps: int) -> list[float]:
    """The losses of a recipe's first steps."""
    with _one_thread(), tempfile.TemporaryDirectory() as folder:
        policy, processor = _start_of(recipe, Path(folder))
        return list(itertools.islice(_steps(policy, processor, recipe), steps))


def _start_of(recipe, folder):
    """The model that training starts from, with its processor. Random weights are written to `folder` first."""
    if recipe.start is None:
        start = str(folder / "untrained")
        untrained(start, recipe)
    else:
        start = build(recipe.start)
    settings = of_the_world(train_vision=True, gradient_checkpointing=False)
    return load_policy(start, train=True, args=settings)


def _steps(policy: Policy, processor: Processor, recipe: Recipe) -> Iterator[float]:
    """Does the steps of a recipe, one each time that it is asked. Gives their losses."""
    muon, adam = optimizers(policy)
    count = recipe.problems_per_step
    before = 0  # a derived model goes on with problems that its start was not shown
    if recipe.start is not None:
        before = RECIPES[recipe.start].steps * RECIPES[recipe.start].problems_per_step
    for step in range(recipe.steps):
        share = schedule(step, recipe)
        set_learning_rate(muon, share * recipe.muon)
        set_learning_rate(adam, share * recipe.adam)
        start = before + step * count
        loss = lesson_loss(policy, processor, recipe, range(start, start + count))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        yield loss.item()


def optimizers(policy):
    """Muon for the matrices, which it learns about twice as fast as Adam would; Adam for the rest.

    The rest is the embeddings, the norms, the biases and the filter that reads the patches.
    """
    matrices = []
    others = []
    for name, weight in policy.named_parameters():
        if weight.dim() == 2 and "embed_tokens" not in name:
            matrices.append(weight)
        else:
            others.append(weight)
    muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01)
    return muon, adam


def schedule(step, recipe):
    """The learning rate as a share of its peak: a linear warm-up, a plateau, a linear decay to about a tenth."""
    steps = recipe.steps
    rising = (step + 1) / recipe.warmup
    falling = 0.1 + 0.9 * (steps - step) / steps / recipe.decay
    return min(1, rising, falling)


def set_learning_rate(optimizer, learning_rate):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def shown(recipe: Recipe, index: int) -> tuple[Spec, float, list[str]]:
    """What a model sees of the problem `index`: the problem, how faded its picture is, and an answer in each style."""
    turn = index // len(VERIFIERS)  # four problems, one for each verifier
    split = recipe.splits[turn % len(recipe.splits)]
    fade = recipe.fades[turn // len(recipe.splits) % len(recipe.fades)]
    spec = spec_of(split, index)
    return spec, fade, lessons(spec, recipe.world, f"{split} {index} lesson")


def lesson_loss(policy: Policy, processor: Processor, recipe: Recipe, indices: range) -> torch.Tensor:
    """Cross-entropy per token of the answers to these practice problems. A problem's styles share one packed row."""
    chosen = []
    texts = []
    group_B = []
    for number, index in enumerate(indices):
        spec, fade, answers = shown(recipe, index)
        problem = dict(id=str(index), images=[draw(spec, fade)], problem=question(spec), verifier=spec.verifier)
        chosen.append(problem)
        texts += answers
        group_B += [number] * len(answers)
    rollout = forced(policy, processor, chosen, texts)
    rollout.group_B = torch.tensor(group_B)
    logp_BT = read(token_logps, rollout, policy)
    return -logp_BT.sum() / rollout.mask_BT.sum()

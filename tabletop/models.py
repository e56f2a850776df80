"""How the two models of the tabletop are made.

`toy` plays the role of Qwen2.5-VL-7B-Instruct: it can solve these problems, but not reliably.
`toy-teacher` plays the role of the 72B: it nearly always solves them, and in several ways.

Both are ordinary Qwen2.5-VL checkpoints in the hub's layout, trained on first use and kept in the user's cache.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from common import INSTRUCTION, forced, load_policy, read, save_policy, token_logps
from harness.flags import UserError, of_the_world
from tabletop.grids import PAPER, STYLES, question
from tabletop.pictures import draw
from tabletop.problems import problem_of, spec_of
from tabletop.traces import traces

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

# vocab_size is larger than the tokenizer's: the extra rows are padding. Their number differs between the two models, as
# it does between the 7B and the 72B. The last six entries are about training (see _train). A model's folder is named by
# a hash of its recipe, which depends on the order of the entries too.
RECIPES = {
    "toy": {
        "vocab_size": 512,
        "hidden": 96,
        "layers": 4,
        "heads": 4,
        "vision_hidden": 64,
        "vision_layers": 2,
        "steps": 240,
        "problems_per_step": 16,
        "muon": 7e-3,  # the highest learning rate of each optimizer
        "adam": 2e-3,
        "warmup": 20,  # steps
        "decay": 0.3,  # the share of the steps at the end in which the learning rate falls
    },
    "toy-teacher": {
        "vocab_size": 544,
        "hidden": 144,
        "layers": 4,
        "heads": 6,
        "vision_hidden": 64,
        "vision_layers": 2,
        "steps": 600,
        "problems_per_step": 16,
        "muon": 5e-3,
        "adam": 1.5e-3,
        "warmup": 20,
        "decay": 0.5,
    },
}
NAMES = tuple(RECIPES)

# --- the cache --------------------------------------------------------------------------------------------------------


def build(name: str, seed: int = 1, steps: int | None = None) -> str:
    """The folder of the model `name` (one of NAMES), trained first if the cache does not hold it. UserError if unknown.

    The cache is $XDG_CACHE_HOME/cleanvl, or else ~/.cache/cleanvl. A folder's name ends in a hash of everything that
    shapes the model. It appears there whole or not at all: it is made in a temporary folder beside it, then renamed.
    `steps` is for tests.
    """
    if name not in RECIPES:
        raise UserError(f"there is no toy model called {name!r}; choose one of {', '.join(NAMES)}")
    recipe = dict(RECIPES[name])
    if steps is not None:
        recipe["steps"] = steps
    cache = _cache()
    place = cache / f"{name}-{_key(recipe, seed)}"
    if place.exists():
        return str(place)
    cache.mkdir(parents=True, exist_ok=True)
    with _one_thread(), tempfile.TemporaryDirectory(dir=cache, prefix=f".{place.name}-") as beside:
        try:
            _train(name, recipe, seed, Path(beside)).rename(place)
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


def _key(recipe, seed):
    """A hash of recipe, words, pictures and template, so that after an edit to any of them no stale model is found."""
    key = hashlib.sha256(json.dumps([recipe, seed, CHAT_TEMPLATE, INSTRUCTION]).encode())
    for index in range(64):
        spec = spec_of("pretrain", index)
        texts = (question(spec), traces(spec))
        key.update(repr(texts).encode())
        key.update(draw(spec).tobytes())
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


# --- tokenizer and configuration --------------------------------------------------------------------------------------


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE like Qwen's, trained on the questions and traces. The special tokens come after the words."""
    words = Tokenizer(BPE())
    split = Split(Regex(PRETOKENIZE_REGEX), "isolated")
    words.pre_tokenizer = Sequence([split, ByteLevel(False, use_regex=False)])
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(_training_texts(), trainer)
    learned = json.loads(words.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return Qwen2Tokenizer(
        learned["vocab"],
        merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIALS),
        chat_template=CHAT_TEMPLATE,
    )


def _training_texts():
    """What the tokenizer learns from: the words of the template, and the questions and traces of 1,000 problems."""
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    for index in range(1000):
        spec = spec_of("pretrain", index)
        texts.append(question(spec) + "\n" + INSTRUCTION)
        texts.extend(traces(spec).values())
    return texts


def make_config(recipe: dict, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """The configuration of a small Qwen2.5-VL."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    return Qwen2_5_VLConfig(
        text_config=_text_config(recipe, ids),
        vision_config=_vision_config(recipe),
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tabletop=True,  # stays in the config of every model trained from this one: scripts then take their TOY defaults
    )


def _text_config(recipe, ids):
    return {
        "vocab_size": recipe["vocab_size"],
        "hidden_size": recipe["hidden"],
        "intermediate_size": 3 * recipe["hidden"],
        "num_hidden_layers": recipe["layers"],
        "num_attention_heads": recipe["heads"],
        "num_key_value_heads": recipe["heads"],
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


def _vision_config(recipe):
    return {
        "depth": recipe["vision_layers"],
        "hidden_size": recipe["vision_hidden"],
        "num_heads": 4,
        "initializer_range": 0.07,
        "intermediate_size": 2 * recipe["vision_hidden"],
        "out_hidden_size": recipe["hidden"],
        "fullatt_block_indexes": [recipe["vision_layers"] - 1],
    }


def untrained(folder: str | Path, recipe: dict = RECIPES["toy"], seed: int = 1) -> None:
    """Writes a randomly initialised model to `folder`, in the hub's layout. The caller's generator stays as it was."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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


def _train(name, recipe, seed, folder):
    """Trains a model from scratch on the pretraining problems, each in all its styles. Returns the finished folder."""
    untrained(folder / "untrained", recipe, seed)
    settings = of_the_world(train_vision=True, gradient_checkpointing=False)
    policy, processor = load_policy(str(folder / "untrained"), train=True, args=settings)
    muon, adam = _optimizers(policy)
    count = recipe["problems_per_step"]
    for step in tqdm(range(recipe["steps"]), desc=f"building {name}, once", leave=False):
        share = _schedule(step, recipe)
        _set_learning_rate(muon, share * recipe["muon"])
        _set_learning_rate(adam, share * recipe["adam"])
        loss = pretraining_loss(policy, processor, range(step * count, step * count + count))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
    save_policy(policy, processor, str(folder / "finished"))
    return folder / "finished"


def _optimizers(policy):
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


def _schedule(step, recipe):
    """The learning rate as a share of its peak: a linear warm-up, a plateau, a linear decay to about a tenth."""
    steps = recipe["steps"]
    rising = (step + 1) / recipe["warmup"]
    falling = 0.1 + 0.9 * (steps - step) / steps / recipe["decay"]
    return min(1, rising, falling)


def _set_learning_rate(optimizer, learning_rate):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def pretraining_loss(policy, processor, indices) -> torch.Tensor:
    """Cross-entropy per token of the traces of these pretraining problems. A problem's styles share one packed row."""
    chosen = [problem_of("pretrain", index) for index in indices]
    texts = []
    for problem in chosen:
        texts.extend(traces(problem).values())
    rollout = forced(policy, processor, chosen, texts)
    rollout.group_B = torch.arange(len(texts)) // len(STYLES)
    logp_BT = read(token_logps, rollout, policy)
    return -logp_BT.sum() / rollout.mask_BT.sum()

"""harness.cache: blocks against transformers' own cache, and the room that answers need."""

import os
import subprocess
import sys

from harness import cache
from harness.cache import BLOCK, SHARE, answers_that_fit, block_cache, bytes_of_answer

import pytest
import torch
from conftest import ROOT
from transformers import DynamicCache, Qwen2_5_VLConfig

QWEN_7B = dict(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    vocab_size=152064)


def states(rows, places, seed):
    """Keys and values of `places` new tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, places, 3, generator=generator) for _ in range(2)]


def plain_and_blocks(policy):
    config = policy.config
    return DynamicCache(config=config.get_text_config()), block_cache(config)


def test_blocks_hold_what_the_plain_cache_holds(policy):
    """A prompt, hundreds of tokens, rows that leave: the same keys and values after every step."""
    both = plain_and_blocks(policy)
    rows = 6
    places = 0
    steps = [50, *[1] * 20, "select", *[1] * 50, BLOCK + 1, "select", 1, 3 * BLOCK, 1]
    for number, step in enumerate(steps):
        for layer in range(len(both[0].layers)):
            for some in both:
                if step == "select":
                    some.layers[layer].batch_select_indices(torch.arange(0, rows, 2))
                else:
                    some.update(*states(rows, step, seed=100 * number + layer), layer)
            plain, blocks = [some.layers[layer] for some in both]
            assert torch.equal(plain.keys, blocks.keys)
            assert torch.equal(plain.values, blocks.values)
        rows = len(both[0].layers[0].keys)
        places += step if isinstance(step, int) else 0
        assert both[0].get_seq_length() == both[1].get_seq_length() == places


def test_answers_begin_behind_prompts_that_are_kept_once(policy):
    """The prompts' keys and values stay what they were; the answers' own begin empty, in rows of their own."""
    blocks = block_cache(policy.config)
    prompts = states(3, 50, seed=0)
    blocks.update(*prompts, 0)
    layer = blocks.layers[0]
    layer.begin_answers(6)
    tokens = [states(6, 1, seed=step) for step in range(1, 70)]
    for token in tokens:
        layer.update(*token)
    for kept, given in zip((layer.prompt_keys, layer.prompt_values), prompts, strict=True):
        assert torch.equal(kept, given)
    assert torch.equal(layer.keys, torch.cat([keys for keys, _ in tokens], 2))
    assert torch.equal(layer.values, torch.cat([values for _, values in tokens], 2))
    layer.select_prompts(torch.tensor([0, 2]))
    assert torch.equal(layer.prompt_keys, prompts[0][[0, 2]])
    assert torch.equal(layer.prompt_values, prompts[1][[0, 2]])
    assert len(layer.keys) == 6


def test_a_token_is_written_in_place_until_the_block_is_full(policy):
    """The memory of the keys moves once in BLOCK tokens; the plain cache moves at every token."""
    moves = {}
    for name, some in zip(("plain", "blocks"), plain_and_blocks(policy), strict=True):
        some.update(*states(2, 5, seed=0), 0)
        moves[name] = 0
        for step in range(4 * BLOCK):
            before = some.layers[0].keys
            some.update(*states(2, 1, seed=step), 0)
            moves[name] += int(some.layers[0].keys.data_ptr() != before.data_ptr())
    assert moves["blocks"] == 4
    assert moves["plain"] > 3 * BLOCK


def test_a_cropped_or_reordered_cache_goes_on_rightly(policy):
    """What transformers' assisted decoding and beam search do to a cache."""
    both = plain_and_blocks(policy)
    for some in both:
        some.update(*states(3, 70, seed=0), 0)
        some.layers[0].crop(-9)
        some.layers[0].reorder_cache(torch.tensor([2, 0, 0]))
        some.update(*states(3, 5, seed=1), 0)
    assert torch.equal(both[0].layers[0].keys, both[1].layers[0].keys)
    assert torch.equal(both[0].layers[0].values, both[1].layers[0].values)


# --- room -------------------------------------------------------------------------------------------------------------


def test_an_answer_of_the_7b_needs_what_its_cache_needs():
    """28 layers × 4 heads × 128 numbers × keys and values × bf16 = 57,344 bytes for a place. Its group's answers share
    a prompt."""
    config = Qwen2_5_VLConfig(text_config=QWEN_7B)
    need = bytes_of_answer(config, torch.bfloat16, prompt=500, answer=2048, generations=8)
    places = 32 * BLOCK + 8 * BLOCK // 8  # 2,048 tokens in whole blocks, and an eighth of 500
    assert 57_344 * places < need < 1.1 * 57_344 * places
    twice = bytes_of_answer(config, torch.float32, prompt=500, answer=2048, generations=8)
    others = 32 * 152_064 + 12 * 28 * (500 + 2048) + 2048 * 2048  # logits, scores, keys of a layer in fp32
    assert twice - others == 2 * (need - others)


def test_a_long_prompt_with_one_short_answer_needs_what_reading_it_needs():
    """A group reads its prompt once: what that takes is shared by its answers."""
    config = Qwen2_5_VLConfig(text_config=QWEN_7B)
    alone = bytes_of_answer(config, torch.bfloat16, prompt=8000, answer=8, generations=1)
    one_of_two = bytes_of_answer(config, torch.bfloat16, prompt=8000, answer=8, generations=2)
    decoded = 57_344 * 126 * BLOCK
    assert alone > 2 * decoded
    assert one_of_two == alone // 2


@pytest.mark.parametrize("free, kept, expected", [(100, 0, 8), (60, 40, 8), (5, 0, 1)])
def test_waves_follow_the_free_memory(monkeypatch, free, kept, expected):
    """Free is what the GPU says, and what torch's allocator keeps without using it. One answer is always tried."""
    gpu = dict(
        mem_get_info=lambda device: (free, 1000), memory_reserved=lambda device: 30 + kept,
        memory_allocated=lambda device: 30)
    for name, fn in gpu.items():
        monkeypatch.setattr(cache.torch.cuda, name, fn)
    assert SHARE == 0.8
    assert answers_that_fit(10, torch.device("cuda")) == expected


@pytest.mark.parametrize("given, expected", [
    ({}, "expandable_segments:True None"),
    ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native None"),
    ({"PYTORCH_ALLOC_CONF": "backend:native"}, "None backend:native"),
])
def test_segments_expand_unless_the_user_has_said_how_memory_is_kept(given, expected):
    """torch reads these variables when it is loaded, and the first before the second."""
    code = (
        "import os, sys, harness; assert 'torch' not in sys.modules;"
        "print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'), os.environ.get('PYTORCH_ALLOC_CONF'))")
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr

"""harness.attention: packed rows against a mask written out in full, and against the plain forward pass."""

import argparse
import copy
import re

from common import read, token_logps
from harness import attention
from harness.attention import NAME, SharedPrompts, pack_rows, packed_attention
from harness.cache import block_cache
from harness.updates import micro_batches

import pytest
import torch
from references import draw, plain_logits_of
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface

ROWS = {
    "one row": ([5], [[3, 3, 3]]),
    "unequal answers": ([5], [[2, 7, 1, 4]]),
    "the first is the longest": ([5], [[9, 1, 2]]),
    "one answer": ([5], [[4]]),
    "answers of one token": ([5], [[1, 1, 1]]),
    "rows with other prompts": ([3, 8, 5], [[2, 4], [1, 1, 6], [3]]),
    "a row for each answer": ([3, 8, 5], [[2], [4], [1]]),
    "a prompt of one token": ([1, 4], [[2, 3], [2, 2]]),
}

SCALE = 0.3


def visible(prompts, answers):
    """(N, N), true where a token may look, by the definition: back, at its own prompt and at its own answer."""
    owners = []
    for row, (prompt, lengths) in enumerate(zip(prompts, answers, strict=True)):
        owners += [(row, "prompt")] * prompt
        for number, length in enumerate(lengths):
            owners += [(row, number)] * length
    N = len(owners)
    seen = torch.zeros(N, N, dtype=torch.bool)
    for looking, (row, part) in enumerate(owners):
        for at in range(looking + 1):
            seen[looking, at] = owners[at] in ((row, "prompt"), (row, part))
    return seen


def states(prompts, answers, heads=4, groups=4, D=8):
    """Random queries, keys and values in fp64, which take gradients."""
    N = sum(prompts) + sum(sum(lengths) for lengths in answers)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, H, N, D, generator=generator, dtype=torch.float64).requires_grad_()
        for H in (heads, groups, groups)
    ]


def by_definition(query, key, value, seen):
    """Attention as softmax(SCALE·q·k)·v with a mask; every group of query heads shares a key head."""
    shared = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(shared, 1)
    value = value.repeat_interleave(shared, 1)
    scores = SCALE * query @ key.transpose(2, 3)
    return (scores.masked_fill(~seen, -torch.inf).softmax(3) @ value).transpose(1, 2)


def seen_and_differentiated(results, inputs):
    """Results, and the gradients of a sum of them with weights that differ everywhere."""
    weights = torch.arange(results.numel(), dtype=torch.float64).view(results.shape).sin()
    return [results.detach(), *torch.autograd.grad((results * weights).sum(), inputs)]


# --- answers that are decoded -----------------------------------------------------------------------------------------

LEAVE = {2: [0, 1, 3, 4, 5, 8], 4: [0, 2, 4], 6: [0, 2]}  # after this many tokens these answers stay: of groups, too


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_decoded_answers_against_the_definition(policy, groups):
    """Three prompts of unequal lengths, three answers each, which leave one by one and by whole groups: every token
    sees its prompt and its own answer, and neither padding nor another answer."""
    generator = torch.Generator().manual_seed(0)

    def some(rows, heads, places):
        return torch.randn(rows, heads, places, 8, generator=generator)

    lengths = [2, 5, 4]
    cache = block_cache(policy.config)
    prompt = [some(3, groups, 5), some(3, groups, 5)]
    for layer in range(len(cache.layers)):
        cache.update(*prompt, layer)
    mask_PS = torch.tensor([[place >= 5 - length for place in range(5)] for length in lengths])
    shared = SharedPrompts(cache, mask_PS, answers=3)
    module = argparse.Namespace(layer_idx=1)
    histories = {b: [states[b // 3, :, 5 - lengths[b // 3]:] for states in prompt] for b in range(9)}
    left = list(range(9))
    for step in range(1, 8):
        query, key, value = some(len(left), 4, 1), some(len(left), groups, 1), some(len(left), groups, 1)
        ours, _ = packed_attention(module, query, *cache.update(key, value, 1), shared, scaling=SCALE)
        for row, b in enumerate(left):
            new = (key[row], value[row])
            histories[b] = [torch.cat(parts, 1) for parts in zip(histories[b], new, strict=True)]
            keys, values = [states[None] for states in histories[b]]
            expected = by_definition(query[row:row + 1], keys, values, torch.tensor(True))
            assert torch.allclose(ours[row:row + 1], expected, atol=1e-6)
        if step in LEAVE:
            keep = torch.tensor(LEAVE[step])
            for layer in (0, 2, 3):  # the other layers have read as many tokens
                cache.update(key, value, layer)
            shared.select(keep)
            left = [left[row] for row in keep]
    assert left == [0, 5]
    assert cache.layers[1].prompt_keys.shape[0] == 2  # a prompt without answers is kept no longer


def test_decoded_answers_in_bf16_differ_by_the_last_rounding_only(policy):
    """Large scores: rounded to bf16 they would be off by a tenth, and what is sampled would not be what is read."""
    generator = torch.Generator().manual_seed(0)
    cache = block_cache(policy.config)
    prompt = [4 * torch.randn(1, 2, 50, 8, generator=generator).bfloat16() for _ in range(2)]
    for layer in range(len(cache.layers)):
        cache.update(*prompt, layer)
    shared = SharedPrompts(cache, torch.ones(1, 50), answers=3)
    query, key, value = [4 * torch.randn(3, 2, 1, 8, generator=generator).bfloat16() for _ in range(3)]
    ours, _ = packed_attention(
        argparse.Namespace(layer_idx=0), query, *cache.update(key, value, 0), shared, scaling=SCALE)
    keys, values = [
        torch.cat([states.expand(3, -1, -1, -1), new], 2).float()
        for states, new in zip(prompt, (key, value), strict=True)
    ]
    expected = by_definition(query.float(), keys, values, torch.tensor(True))
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - expected).abs().max() < 2**-8 * expected.abs().max()


# --- against the mask -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("case", ROWS)
def test_packed_rows_against_the_mask(case, groups):
    """Results and gradients of what the definition says; with grouped heads too."""
    prompts, answers = ROWS[case]
    inputs = states(prompts, answers, groups=groups)
    rows = pack_rows(prompts, answers, torch.device("cpu"))
    ours, _ = packed_attention(None, *inputs, rows, scaling=SCALE)
    theirs = by_definition(*inputs, visible(prompts, answers))
    pairs = zip(seen_and_differentiated(ours, inputs), seen_and_differentiated(theirs, inputs), strict=True)
    for one, other in pairs:
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_padding_reaches_nothing():
    """Answers are padded while they attend. What stands there is no NaN, reaches no result and has no gradient."""
    prompts, answers = ROWS["unequal answers"]
    rows = pack_rows(prompts, answers, torch.device("cpu"))
    assert len(rows.spread_M) > len(rows.gather_N)
    inputs = states(prompts, answers)
    before = seen_and_differentiated(packed_attention(None, *inputs, rows, scaling=SCALE)[0], inputs)
    padding_M = torch.ones(len(rows.spread_M), dtype=torch.bool)
    padding_M[rows.gather_N] = False
    assert padding_M.sum() == 3 * 7 - (7 + 1 + 4)
    rows.spread_M[padding_M] = 0  # another token stands there
    after = seen_and_differentiated(packed_attention(None, *inputs, rows, scaling=SCALE)[0], inputs)
    for one, other in zip(before, after, strict=True):
        assert one.isfinite().all()
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_further_answers_are_padded_to_the_longest_of_them():
    """Not to the first, which attends with the prompt: where it is long, they would attend for nothing."""
    prompts, answers = ROWS["the first is the longest"]
    rows = pack_rows(prompts, answers, torch.device("cpu"))
    assert len(rows.spread_M) == (5 + 9) + 2 * 2
    assert len(rows.gather_N) == 5 + 9 + 1 + 2


def test_nothing_is_moved_where_nothing_is_padded():
    """Answers of one length, or one answer to a row: tokens attend where they lie."""
    for case in ("one row", "one answer", "answers of one token", "a row for each answer"):
        rows = pack_rows(*ROWS[case], torch.device("cpu"))
        assert rows.spread_M is None
        assert rows.gather_N is None


def test_a_row_with_one_answer_is_not_cut_up(monkeypatch):
    """It is one causal sequence: cutting it up costs a short pass some percent."""
    monkeypatch.setattr(attention, "by_row", None)
    module = torch.nn.Module()
    module.is_causal = True
    query, key, value = torch.randn(3, 1, 2, 9, 4)
    results, _ = packed_attention(module, query, key, value, pack_rows([5], [[4]], torch.device("cpu")), scaling=SCALE)
    weights = (SCALE * query @ key.mT).masked_fill(~visible([5], [[4]]), -torch.inf).softmax(-1)
    assert torch.allclose(results, (weights @ value).transpose(1, 2), atol=1e-6)
    with pytest.raises(TypeError):
        packed_attention(module, query, key, value, pack_rows([5], [[2, 2]], torch.device("cpu")), scaling=SCALE)


def test_what_is_not_packed_is_the_plain_attention():
    """Sampling and policy.forward give masks of padding, or none: transformers' own attention answers."""
    query, key, value = states([6], [[3]])
    module = torch.nn.Module()
    module.is_causal = True
    plain = AttentionInterface()["sdpa"]
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    mask[..., :2] = False
    mask[..., :2, 0] = True
    for given in (None, mask):
        ours, _ = packed_attention(module, query, key, value, given, scaling=0.3)
        theirs, _ = plain(module, query, key, value, given, scaling=0.3)
        assert torch.equal(ours, theirs)


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_no_mask_of_row_length_squared_and_no_slow_kernel(policy, processor, problems):
    """No operator meets a tensor with the row's length twice, and all attention of the text goes to the fast kernel."""
    rollout = draw(policy, processor, problems[:1], G=7)
    tokens = len(rollout.prompts.ids[0]) + int(rollout.mask_BT.sum())
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen, torch.no_grad():
        read(token_logps, rollout, policy)
    sizes = {tuple(shape) for event in seen.events() for shape in event.input_shapes}
    assert any(tokens in size for size in sizes)
    assert not any(size.count(tokens) > 1 for size in sizes)
    kernels = [event.name for event in seen.events() if re.search("attention_(for|math)", event.name)]
    layers = policy.config.text_config.num_hidden_layers
    blocks = policy.config.vision_config.depth
    assert kernels.count("aten::_scaled_dot_product_flash_attention_for_cpu") == len(kernels)
    assert len(kernels) >= 2 * layers + blocks


# --- against the plain forward pass -----------------------------------------------------------------------------------


def gradient_of(policy):
    return torch.cat([weight.grad.flatten() for weight in policy.parameters()])


def packed_gradient(policy, rollout, size, weight_BT):
    """Log-probs, and the gradient of their weighted sum, from passes of at most `size` answers."""
    policy.zero_grad()
    batches = micro_batches(rollout, range(len(rollout)), size)
    found = []
    for index_b in batches:
        logp_bT = read(token_logps, rollout[index_b], policy)
        (logp_bT * weight_BT[index_b]).sum().backward()
        found.append(logp_bT.detach())
    order_B = torch.cat(batches).argsort()
    return torch.cat(found)[order_B], gradient_of(policy)


def plain_gradient(policy, processor, rollout, weight_BT):
    """The same, with an ordinary forward pass of policy.forward for each answer."""
    policy.zero_grad()
    logp_BT = torch.zeros_like(rollout.mask_BT)
    for b in range(len(rollout)):
        logits_TV = plain_logits_of(policy, processor, rollout, b)
        T = len(logits_TV)
        logp_T = logits_TV.log_softmax(1).gather(1, rollout.tokens_BT[b, :T, None])[:, 0]
        (logp_T * weight_BT[b, :T]).sum().backward()
        logp_BT[b, :T] = logp_T.detach()
    return logp_BT, gradient_of(policy)


def with_lengths(rollout, lengths):
    """The rollout with its answers cut to these lengths, in turn."""
    for b in range(len(rollout)):
        rollout.mask_BT[b, lengths[b % len(lengths)]:] = 0
    return rollout


@pytest.mark.parametrize("G, size, lengths", [
    (3, 100, [1, 18, 5, 9, 2]),  # five groups in a pass: other prompts, other pictures, answers of other lengths
    (3, 1, [7, 20]),  # one answer in a pass
    (1, 4, [20, 3]),  # rows of one answer
    (4, 3, [6]),  # groups cut into a row of three and one of one
])
def test_log_probs_and_gradients_are_the_plain_ones(policy, processor, problems, G, size, lengths):
    """To 1e-5, the vision tower's among them: they reach the pictures through the prompt."""
    rollout = with_lengths(draw(policy, processor, problems, G=G, temperature=1.0), lengths)
    weight_BT = torch.linspace(-1, 1, rollout.mask_BT.numel()).view_as(rollout.mask_BT)
    ours_BT, ours = packed_gradient(policy, rollout, size, weight_BT)
    theirs_BT, theirs = plain_gradient(policy, processor, rollout, weight_BT)
    assert (ours_BT - theirs_BT).abs().max() < 1e-4
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    patches = policy.model.visual.patch_embed.proj.weight.grad
    assert patches.norm() > 0


def test_recomputed_activations_meet_the_same_rows(policy, processor, problems):
    """Under activation checkpointing the backward pass attends once more: the same gradient."""
    rollout = with_lengths(draw(policy, processor, problems, temperature=1.0), [1, 18, 5])
    weight_BT = rollout.mask_BT
    _, expected = packed_gradient(policy, rollout, 6, weight_BT)
    policy.activation_checkpointing_enable()
    policy.train()
    try:
        _, recomputed = packed_gradient(policy, rollout, 6, weight_BT)
    finally:
        policy.activation_checkpointing_disable()
        policy.eval()
    assert (recomputed - expected).norm() < 1e-6 * expected.norm()


def test_bf16_is_as_close_as_the_plain_forward_pass(policy, processor, problems):
    """In bf16 packed rows and the plain forward pass are equally far from fp32."""
    rollout = with_lengths(draw(policy, processor, problems[:3], temperature=1.0), [1, 18, 5])
    weight_BT = rollout.mask_BT
    exact_BT, _ = plain_gradient(policy, processor, rollout, weight_BT)
    half = copy.deepcopy(policy).to(torch.bfloat16)
    ours_BT, ours = packed_gradient(half, rollout, 6, weight_BT)
    theirs_BT, theirs = plain_gradient(half, processor, rollout, weight_BT)
    ours_apart = (ours_BT - exact_BT).abs().mean()
    theirs_apart = (theirs_BT - exact_BT).abs().mean()
    assert 0 < ours_apart < 1.5 * theirs_apart
    assert torch.cosine_similarity(ours.float(), theirs.float(), dim=0) > 0.99


def test_the_text_attends_in_packed_rows_and_the_vision_tower_does_not(policy):
    assert policy.model.language_model.config._attn_implementation == NAME
    assert policy.model.visual.config._attn_implementation == "sdpa"

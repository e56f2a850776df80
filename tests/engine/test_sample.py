"""common.sample: against transformers' generate, against itself in other batches, and its traps."""

import argparse

import pytest
import torch
from transformers import GenerationConfig

import common
from common import Reading, encode, read, sample, token_entropy, token_logps
from conftest import picture

LENGTH = 20


def draw(policy, processor, problems, G=3, temperature=0.7, **more):
    settings = dict(seed=(1, 5), max_completion_length=LENGTH, temperature=temperature) | more
    return sample(policy, processor, problems, G, **settings)


def both(logits_NV, tokens_N):
    return token_logps(logits_NV, tokens_N), token_entropy(logits_NV)


def greedy_by_generate(policy, processor, problem):
    inputs = processor(text=[common.chat(processor, problem)], images=problem["images"], return_tensors="pt")
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=LENGTH, eos_token_id=policy.ends, repetition_penalty=1.0, top_k=0, top_p=1.0,
        pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=policy.banned + list(range(policy.vocabulary, policy.config.text_config.vocab_size)))
    out = policy.generate(**inputs, generation_config=plain)
    return out[0, inputs["input_ids"].shape[1]:].tolist()


def test_greedy_tokens_are_those_of_generate(policy, processor, problems):
    """Several picture sizes, prompts padded together: the same tokens as `generate` gives for each alone."""
    rollout = draw(policy, processor, problems, G=2, temperature=0)
    for p, problem in enumerate(problems):
        expected = greedy_by_generate(policy, processor, problem)
        for b in (2 * p, 2 * p + 1):
            assert rollout.tokens_BT[b][rollout.mask_BT[b].bool()].tolist() == expected


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_trap_temperature(policy, processor, problems, temperature):
    """The sampler's log-probs and entropies are those of the reading, at the temperature that divided the logits."""
    rollout = draw(policy, processor, problems, temperature=temperature)
    with torch.no_grad():
        logp_BT, entropy_BT = read(both, rollout, policy)
    assert (logp_BT - rollout.logp_BT).abs().max() < 1e-4
    assert ((entropy_BT - rollout.entropy_BT) * rollout.mask_BT).abs().max() < 1e-4
    # And neither is at temperature 1: the plain model gives other numbers.
    plain = plain_logits(policy, processor, problems, rollout)
    for b in range(len(rollout)):
        n = int(rollout.mask_BT[b].sum())
        expected = (plain[b] / temperature).log_softmax(1).gather(1, rollout.tokens_BT[b, :n, None])[:, 0]
        assert torch.allclose(logp_BT[b, :n], expected, atol=1e-4)


@torch.no_grad()
def plain_logits(policy, processor, problems, rollout):
    """Logits of every answer from one ordinary forward pass each, forbidden ids at −1e9: the reference."""
    found = []
    for b in range(len(rollout)):
        problem, n = rollout.problems[b], int(rollout.mask_BT[b].sum())
        inputs = processor(text=[common.chat(processor, problem)], images=problem["images"], return_tensors="pt",
                           return_mm_token_type_ids=True)
        start = inputs["input_ids"].shape[1]
        answer = rollout.tokens_BT[b:b + 1, :n]
        logits = policy(
            input_ids=torch.cat([inputs["input_ids"], answer], 1), pixel_values=inputs["pixel_values"],
            mm_token_type_ids=torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answer)], 1),
            image_grid_thw=inputs["image_grid_thw"]).logits[0, start - 1:start - 1 + n, :policy.vocabulary].float()
        logits[:, policy.banned] = -1e9
        found.append(logits)
    return found


def test_answers_do_not_depend_on_batch_or_group_size(policy, processor, problems):
    """Randomness has no state: one batch, halves, slices of a group, fewer or more answers give the same texts."""
    whole = draw(policy, processor, problems, G=4)
    for size in (1, 3, 8, 12):
        assert draw(policy, processor, problems, G=4, sample_batch_size=size).texts == whole.texts
    halves = draw(policy, processor, problems[:2], G=4).texts + draw(policy, processor, problems[2:], G=4).texts
    assert halves == whole.texts
    assert draw(policy, processor, problems, G=2).texts == [whole.texts[4 * p + g] for p in range(5) for g in range(2)]
    longer = draw(policy, processor, problems, G=4, max_completion_length=LENGTH + 5)
    assert (longer.tokens_BT[:, :LENGTH] == whole.tokens_BT).all()


def test_trap_seeds(policy, processor, problems):
    """Another step, seed, problem or number gives another answer; nothing is drawn from the global generator."""
    rollout = draw(policy, processor, problems)
    torch.manual_seed(99)
    assert draw(policy, processor, problems).texts == rollout.texts
    assert draw(policy, processor, problems, seed=(1, 6)).texts != rollout.texts
    assert draw(policy, processor, problems, seed=(2, 5)).texts != rollout.texts
    twins = [problems[0] | {"id": "a"}, problems[0] | {"id": "b"}]
    assert len(set(draw(policy, processor, twins).texts)) == 6


def test_sampling_follows_the_distribution(policy, processor, problems):
    """First tokens of 3,000 answers to one problem against their exact probabilities, within five standard errors."""
    rollout = sample(policy, processor, problems[:1], 3000, seed=(3,), max_completion_length=1, sample_batch_size=3000)
    logits = common.completion_logits(policy, rollout[torch.tensor([0])])[0, 0]
    p = logits.softmax(0).detach()
    counts = torch.bincount(rollout.tokens_BT[:, 0], minlength=len(p))
    error = (counts - 3000 * p).abs() / (3000 * p * (1 - p)).sqrt().clamp_min(1.0)
    assert error.max() < 5


def test_inverse_cdf_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    probs_BV = torch.rand(200, 5, generator=generator)
    probs_BV[:, 0] = probs_BV[:, 4] = 0  # forbidden ids at both ends
    probs_BV /= probs_BV.sum(1, keepdim=True)
    uniform_B = torch.rand(200, generator=generator, dtype=torch.float64)
    uniform_B[:3] = torch.tensor([0.0, 1 - 2**-53, 1 - 2**-30], dtype=torch.float64)
    for probs, uniform, token in zip(probs_BV, uniform_B, common.inverse_cdf(probs_BV, uniform_B)):
        total, expected = 0.0, None
        for v in range(5):
            total += float(probs[v])
            if expected is None and total > float(uniform) * float(probs.double().sum()):
                expected = v
        assert int(token) == expected and 0 < int(token) < 4


def test_trap_truncated_sampling(policy, processor, problems):
    """The checkpoint ships top_p, top_k and a repetition penalty; training samples must not feel them."""
    shipped = policy.generation_config
    assert shipped.repetition_penalty != 1.0 and shipped.top_k and shipped.top_p < 1
    rollout = sample(policy, processor, problems[:1], 2000, seed=(4,), max_completion_length=1, sample_batch_size=2000)
    assert len(set(rollout.tokens_BT[:, 0].tolist())) > shipped.top_k


def test_trap_vision_tokens_sampled(policy, processor, problems):
    """Picture, video and padding ids have probability 0, when sampling and when reading, and finite entropies."""
    bias = torch.zeros(policy.config.text_config.vocab_size)
    forbidden = policy.banned + list(range(policy.vocabulary, policy.config.text_config.vocab_size))
    bias[forbidden] = 50.0  # a policy that badly wants to draw them
    hook = policy.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    rollout = draw(policy, processor, problems)
    logp_BT, entropy_BT = read(both, rollout, policy)
    hook.remove()
    assert not set(rollout.tokens_BT[rollout.mask_BT.bool()].tolist()) & set(forbidden)
    assert logp_BT.isfinite().all() and entropy_BT.isfinite().all() and (logp_BT > -30).all()
    assert rollout.entropy_BT.isfinite().all()


def test_trap_end_of_text(policy, processor, problems):
    """Both end ids end an answer; the end token carries mask 1, what follows 0; pad is no end unless it is one."""
    assert len(policy.ends) == 2 and processor.tokenizer.pad_token_id in policy.ends
    seen = set()
    for end in policy.ends:
        bias = torch.zeros(policy.config.text_config.vocab_size)
        bias[end] = 6.0
        hook = policy.lm_head.register_forward_hook(lambda module, args, out: out + bias)
        rollout = draw(policy, processor, problems, G=8)
        hook.remove()
        for tokens, mask, finished in zip(rollout.tokens_BT, rollout.mask_BT, rollout.finished_B):
            n = int(mask.sum())
            assert mask.tolist() == [1.0] * n + [0.0] * (len(mask) - n)
            inside = [int(t) in policy.ends for t in tokens[:n]]
            assert not any(inside[:-1]) and inside[-1] == bool(finished)
            seen |= {int(tokens[n - 1])} if finished else set()
    assert seen == set(policy.ends)
    logp_BT = read(token_logps, rollout, policy)
    ended = rollout.finished_B.bool()
    last = rollout.mask_BT.sum(1).long() - 1
    assert (logp_BT[ended, last[ended]] != 0).all()  # the decision to stop is read, and so has a gradient


def test_trap_stale_rope_deltas(policy, processor, problems):
    """A reading after sampling with another batch size is the reading that it was before."""
    rollout = draw(policy, processor, problems)
    before = read(token_logps, rollout, policy)
    draw(policy, processor, problems[:1], G=7)
    greedy_by_generate(policy, processor, problems[2])
    assert (read(token_logps, rollout, policy) == before).all()
    policy.model.rope_deltas = torch.tensor([[-40]])  # what another prefill may have left behind
    assert (draw(policy, processor, problems).logp_BT == rollout.logp_BT).all()
    policy.model.rope_deltas = None


def test_trap_checkpointing_and_cache(policy, processor, problems):
    """Gradient checkpointing switches the KV cache off in training mode; sampling must not feel it, nor leave it off."""
    expected = draw(policy, processor, problems, temperature=0).texts
    policy.activation_checkpointing_enable()
    policy.train()
    try:
        assert draw(policy, processor, problems, temperature=0).texts == expected
        assert policy.training
        rollout = draw(policy, processor, problems)
        read(token_logps, rollout, policy).sum().backward()
        checkpointed = [p.grad.clone() for p in policy.parameters()]
    finally:
        policy.activation_checkpointing_disable()
        policy.eval()
    policy.zero_grad()
    read(token_logps, rollout, policy).sum().backward()
    for p, other in zip(policy.parameters(), checkpointed):
        assert torch.allclose(p.grad, other, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()))


@pytest.mark.parametrize("wanted", [False, True])
def test_gradient_checkpointing_is_on_when_asked_for(folder, problems, wanted):
    """transformers recomputes in training mode only: with the flag a layer is run twice, forward and backward."""
    asked = argparse.Namespace(gradient_checkpointing=wanted, train_vision=False, max_pixels=common.MAX_PIXELS)
    policy, processor = common.load_policy(folder, train=True, args=asked)
    rollout, runs = draw(policy, processor, problems), []
    policy.model.language_model.layers[0].self_attn.register_forward_pre_hook(lambda *args: runs.append(1))
    read(token_logps, rollout, policy).sum().backward()
    assert len(runs) == 1 + wanted


def test_trap_image_rows(policy, processor, problems):
    """Another picture for one problem changes that problem's log-probs and no other's."""
    rollout = draw(policy, processor, problems)
    before = read(token_logps, rollout, policy)
    for p in range(len(problems)):
        pixels = list(rollout.prompts.pixels)
        pixels[p] = torch.randn(pixels[p].shape, generator=torch.Generator().manual_seed(p))
        after = read(token_logps, rollout, Reading(policy, pixels))
        changed = {int(group) for group in rollout.group_B[((after - before).abs() > 1e-4).any(1)]}
        assert changed == {p}


def test_trap_pixel_budget(processor):
    """A picture over the budget is scaled down, a small one is not enlarged, and the prompt's length says so."""
    def problem(width, height):
        return dict(id="x", images=[picture(width, height)], problem="Look.", answer="1", verifier="digit")
    size = processor.image_processor.size
    budget = size.longest_edge if hasattr(size, "longest_edge") else size["longest_edge"]
    assert budget == common.MAX_PIXELS
    small, large = encode(processor, [problem(56, 84), problem(2000, 1500)]).grids
    assert small.tolist() == [[1, 6, 4]]  # 84 by 56 pixels in patches of 14
    assert common.MAX_PIXELS * 0.9 < int(large.prod()) * 14 * 14 <= common.MAX_PIXELS


def test_trap_prompt_truncation(processor, problems):
    """A prompt over the limit is refused with its length; nothing is cut."""
    class Args:
        max_prompt_length, max_pixels = 4096, common.MAX_PIXELS
    lengths, scaled, _ = common.check_prompts(processor, problems, Args)
    assert lengths == [len(ids) for ids in encode(processor, problems).ids] and scaled == 0
    Args.max_prompt_length = max(lengths) - 1
    with pytest.raises(common.UserError, match=f"prompt of {max(lengths)} tokens"):
        common.check_prompts(processor, problems, Args)

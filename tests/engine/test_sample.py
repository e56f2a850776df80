"""common.sample: against transformers' generate, against itself in other batches, and its traps."""

import contextlib
import math

import common
from common import encode, read, sample, token_entropy, token_logps
from harness.flags import INSTRUCTION, of_the_world
from harness.prompts import check_prompts, sizes_in_words

import pytest
import torch
from conftest import picture
from references import draw, plain_logits
from transformers import GenerationConfig

LENGTH = 20  # tokens of an answer in references.draw


def logps_and_entropies(logits_NV, tokens_N):
    return token_logps(logits_NV, tokens_N), token_entropy(logits_NV)


def beyond_the_tokenizer(policy):
    """The ids of the vocabulary's padding rows."""
    return list(range(policy.vocabulary, policy.config.text_config.vocab_size))


@contextlib.contextmanager
def wanting(policy, ids, bias):
    """A policy whose logits of these ids are raised by `bias`."""
    bias_V = torch.zeros(policy.config.text_config.vocab_size)
    bias_V[ids] = bias
    hook = policy.lm_head.register_forward_hook(lambda module, args, out: out + bias_V)
    try:
        yield
    finally:
        hook.remove()


# --- against generate -------------------------------------------------------------------------------------------------


def greedy_by_generate(policy, processor, problem):
    """The greedy tokens that transformers' own `generate` gives for one problem."""
    inputs = processor(text=[common.chat(processor, problem)], images=problem["images"], return_tensors="pt")
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=LENGTH, eos_token_id=policy.ends, repetition_penalty=1.0, top_k=0, top_p=1.0,
        pad_token_id=processor.tokenizer.pad_token_id, suppress_tokens=policy.banned + beyond_the_tokenizer(policy),
    )
    out = policy.generate(**inputs, generation_config=plain)
    return out[0, inputs["input_ids"].shape[1]:].tolist()


def test_greedy_tokens_are_those_of_generate(policy, processor, problems):
    """Several picture sizes, prompts padded together: the same tokens as `generate` gives for each alone."""
    rollout = draw(policy, processor, problems, G=2, temperature=0)
    for p, problem in enumerate(problems):
        expected = greedy_by_generate(policy, processor, problem)
        for b in (2 * p, 2 * p + 1):
            tokens = rollout.tokens_BT[b][rollout.mask_BT[b].bool()]
            assert tokens.tolist() == expected


# --- what is sampled is what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_trap_temperature(policy, processor, problems, temperature):
    """The sampler's log-probs and entropies are those of the reading, at the temperature that divided the logits."""
    rollout = draw(policy, processor, problems, temperature=temperature)
    with torch.no_grad():
        logp_BT, entropy_BT = read(logps_and_entropies, rollout, policy)
    assert (logp_BT - rollout.logp_BT).abs().max() < 1e-4
    assert ((entropy_BT - rollout.entropy_BT) * rollout.mask_BT).abs().max() < 1e-4
    # Both agree with the plain model too, but only when its logits are divided.
    for b, logits_TV in enumerate(plain_logits(policy, processor, rollout)):
        length = len(logits_TV)
        tokens_T = rollout.tokens_BT[b, :length]
        expected_T = (logits_TV / temperature).log_softmax(1).gather(1, tokens_T[:, None])[:, 0]
        assert torch.allclose(logp_BT[b, :length], expected_T, atol=1e-4)


def test_sampling_follows_the_distribution(policy, processor, problems):
    """First tokens of 3,000 answers to one problem against their exact probabilities, within five standard errors."""
    rollout = sample(policy, processor, problems[:1], 3000, seed=(3,), max_completion_length=1, sample_batch_size=3000)
    logits_V = common.completion_logits(policy, rollout[torch.tensor([0])])[0, 0]
    p_V = logits_V.softmax(0).detach()
    counts_V = torch.bincount(rollout.tokens_BT[:, 0], minlength=len(p_V))
    standard_error_V = (3000 * p_V * (1 - p_V)).sqrt().clamp_min(1.0)
    assert ((counts_V - 3000 * p_V).abs() / standard_error_V).max() < 5


def test_inverse_cdf_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    probs_BV = torch.rand(200, 5, generator=generator)
    probs_BV[:, 0] = 0  # forbidden ids at both ends
    probs_BV[:, 4] = 0
    probs_BV /= probs_BV.sum(1, keepdim=True)
    uniform_B = torch.rand(200, generator=generator, dtype=torch.float64)
    uniform_B[:3] = torch.tensor([0.0, 1 - 2**-53, 1 - 2**-30], dtype=torch.float64)
    tokens_B = common.inverse_cdf(probs_BV, uniform_B)
    for probs_V, uniform, token in zip(probs_BV, uniform_B, tokens_B, strict=True):
        threshold = float(uniform) * float(probs_V.double().sum())
        total = 0.0
        for expected in range(5):
            total += float(probs_V[expected])
            if total > threshold:
                break
        assert int(token) == expected
        assert 0 < int(token) < 4


@pytest.mark.parametrize("problems, generations, size", [
    (5, 3, 1), (5, 3, 3), (5, 3, 7), (2, 8, 5), (1, 1, 256), (0, 4, 8), (64, 12, 256), (3, 300, 256),
])
def test_waves_decode_every_answer_once_and_are_of_equal_size(problems, generations, size):
    """A wave of one problem takes as long as a wave of twenty: 64 problems of 12 answers are four waves of 16 each."""
    found = []
    plan = common.waves(problems, generations, size)
    for members, numbers in plan:
        assert len(members) * len(numbers) <= size
        found += [(p, g) for p in members for g in numbers]
    assert sorted(found) == [(p, g) for p in range(problems) for g in range(generations)]
    for counts in ([len(members) for members, _ in plan], [len(numbers) for _, numbers in plan]):
        assert max(counts, default=0) - min(counts, default=0) <= 1
    together = max(1, size // generations)
    assert len(plan) == math.ceil(problems / together) * math.ceil(generations / size)


def test_waves_on_a_cpu_hold_256_answers_and_on_a_gpu_what_there_is_room_for(policy, processor, problems, monkeypatch):
    """Where no number is asked for; and the answers are those of any other number."""
    found = []
    plain = common.waves

    def watched(problems, generations, size):
        found.append(size)
        return plain(problems, generations, size)

    monkeypatch.setattr(common, "waves", watched)
    texts = draw(policy, processor, problems).texts
    draw(policy, processor, problems, sample_batch_size=4)
    monkeypatch.setattr(common, "wave_size", lambda *given: 7)
    assert draw(policy, processor, problems).texts == texts
    assert found == [256, 4, 7]


# --- randomness has no state ------------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_batch_or_group_size(policy, processor, problems):
    """One batch, halves, slices of a group, fewer or longer answers: the same texts."""
    whole = draw(policy, processor, problems, G=4)
    for size in (1, 3, 8, 12):
        assert draw(policy, processor, problems, G=4, sample_batch_size=size).texts == whole.texts
    first_half = draw(policy, processor, problems[:2], G=4)
    second_half = draw(policy, processor, problems[2:], G=4)
    assert first_half.texts + second_half.texts == whole.texts
    fewer = draw(policy, processor, problems, G=2)
    assert fewer.texts == [whole.texts[4 * p + g] for p in range(5) for g in range(2)]
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


# --- what must not reach an answer, and where it ends -----------------------------------------------------------------


def test_trap_truncated_sampling(policy, processor, problems):
    """The checkpoint ships top_p, top_k and a repetition penalty; training samples must not feel them."""
    shipped = policy.generation_config
    assert shipped.repetition_penalty != 1.0
    assert shipped.top_k == 20
    assert shipped.top_p < 1
    rollout = sample(policy, processor, problems[:1], 2000, seed=(4,), max_completion_length=1, sample_batch_size=2000)
    assert len(set(rollout.tokens_BT[:, 0].tolist())) > shipped.top_k


def test_trap_vision_tokens_sampled(policy, processor, problems):
    """Picture, video and padding ids have probability 0, when sampling and when reading, and finite entropies."""
    forbidden = policy.banned + beyond_the_tokenizer(policy)
    with wanting(policy, forbidden, 50.0):
        rollout = draw(policy, processor, problems)
        logp_BT, entropy_BT = read(logps_and_entropies, rollout, policy)
    sampled = set(rollout.tokens_BT[rollout.mask_BT.bool()].tolist())
    assert not sampled & set(forbidden)
    assert (logp_BT > -30).all()
    for values_BT in (logp_BT, entropy_BT, rollout.entropy_BT):
        assert values_BT.isfinite().all()


def test_trap_end_of_text(policy, processor, problems):
    """Both end ids end an answer; the end token carries mask 1, what follows 0; pad is no end unless it is one."""
    assert len(policy.ends) == 2
    assert processor.tokenizer.pad_token_id in policy.ends
    seen = set()
    for end in policy.ends:
        with wanting(policy, [end], 6.0):
            rollout = draw(policy, processor, problems, G=8)
        for tokens_T, mask_T, finished in zip(rollout.tokens_BT, rollout.mask_BT, rollout.finished_B, strict=True):
            length = int(mask_T.sum())
            assert mask_T.tolist() == [1.0] * length + [0.0] * (len(mask_T) - length)
            is_end = [int(token) in policy.ends for token in tokens_T[:length]]
            assert not any(is_end[:-1])
            assert is_end[-1] == bool(finished)
            if finished:
                seen.add(int(tokens_T[length - 1]))
    assert seen == set(policy.ends)
    logp_BT = read(token_logps, rollout, policy)
    ended_B = rollout.finished_B.bool()
    last_B = rollout.mask_BT.sum(1).long() - 1
    assert (logp_BT[ended_B, last_B[ended_B]] != 0).all()  # the decision to stop is read, and so has a gradient


# --- what sampling and reading leave behind ---------------------------------------------------------------------------


def test_trap_stale_rope_deltas(policy, processor, problems):
    """A reading after sampling with another batch size is the reading that it was before."""
    rollout = draw(policy, processor, problems)
    before_BT = read(token_logps, rollout, policy)
    draw(policy, processor, problems[:1], G=7)
    greedy_by_generate(policy, processor, problems[2])
    assert (read(token_logps, rollout, policy) == before_BT).all()
    policy.model.rope_deltas = torch.tensor([[-40]])  # what another prefill may have left behind
    assert (draw(policy, processor, problems).logp_BT == rollout.logp_BT).all()
    policy.model.rope_deltas = None


def gradients(policy, rollout):
    """The gradient of Σ log p, a tensor for each weight."""
    policy.zero_grad()
    read(token_logps, rollout, policy).sum().backward()
    return [weight.grad.clone() for weight in policy.parameters()]


def test_trap_checkpointing_and_cache(policy, processor, problems):
    """Gradient checkpointing switches the KV cache off in training mode; sampling neither feels it nor ends it."""
    expected = draw(policy, processor, problems, temperature=0).texts
    policy.activation_checkpointing_enable()
    policy.train()
    try:
        assert draw(policy, processor, problems, temperature=0).texts == expected
        assert policy.training
        rollout = draw(policy, processor, problems)
        checkpointed = gradients(policy, rollout)
    finally:
        policy.activation_checkpointing_disable()
        policy.eval()
    for one, other in zip(gradients(policy, rollout), checkpointed, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("wanted", [False, True])
def test_gradient_checkpointing_is_on_when_asked_for(folder, problems, wanted):
    """transformers recomputes in training mode only: with the flag a layer is run twice, forward and backward."""
    asked = of_the_world(gradient_checkpointing=wanted)
    policy, processor = common.load_policy(folder, train=True, args=asked)
    rollout = draw(policy, processor, problems)
    runs = []
    policy.model.language_model.layers[0].self_attn.register_forward_pre_hook(lambda *args: runs.append(1))
    read(token_logps, rollout, policy).sum().backward()
    assert len(runs) == (2 if wanted else 1)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_trap_pixel_budget(processor):
    """A picture over the budget is scaled down, a small one is not enlarged, and the prompt's length says so."""

    def problem(width, height):
        return dict(id="x", images=[picture(width, height)], problem="Look.", answer="1", verifier="digit")

    most = of_the_world().max_pixels
    assert processor.image_processor.size["longest_edge"] == most
    small, large = encode(processor, [problem(56, 84), problem(2000, 1500)]).grids
    assert small.tolist() == [[1, 6, 4]]  # 84 by 56 pixels in patches of 14
    pixels = int(large.prod()) * 14 * 14
    assert most * 0.9 < pixels <= most


def test_trap_prompt_truncation(processor, problems):
    """A prompt over the limit is refused with its length; nothing is cut."""
    args = of_the_world(max_prompt_length=4096)
    lengths = check_prompts(processor, problems, args).lengths
    assert lengths == [len(ids) for ids in encode(processor, problems).ids]
    args.max_prompt_length = max(lengths) - 1
    with pytest.raises(common.UserError, match=f"prompt of {max(lengths)} tokens.*--skip_bad_rows"):
        check_prompts(processor, problems, args)


def test_overlong_prompts_are_left_out_when_asked_for(processor, problems):
    """They count in nothing; the others keep their order."""
    args = of_the_world(skip_bad_rows=True)
    lengths = check_prompts(processor, problems, args).lengths
    args.max_prompt_length = sorted(lengths)[-2]
    check = check_prompts(processor, problems, args)
    longest = lengths.index(max(lengths))
    assert check.fitting == [place for place in range(5) if place != longest]
    assert check.lengths == [length for length in lengths if length != max(lengths)]
    assert check.kinds == {"digit": 4}
    assert len(check.faults) == 1
    assert f"problem p{longest} has a prompt of {max(lengths)} tokens" in check.faults[0]


def test_scaled_pictures_and_kinds_of_problems_are_counted(processor, problems):
    args = of_the_world(max_pixels=84 * 84, min_pixels=80 * 80)
    check = check_prompts(processor, problems, args)
    assert check.scaled == 2  # 56x140 and 112x112
    assert check.enlarged == 1  # 112x56
    assert sizes_in_words(check, check).endswith("; 4 pictures scaled down, 2 enlarged")
    assert check.kinds == {"digit": 5}


def test_small_pictures_are_enlarged(folder):
    """To at least --min_pixels; the prompt's length says so, before anything is encoded."""
    processor = common.load_policy(folder, args=of_the_world(min_pixels=512 * 512))[1]
    some = [dict(id="x", images=[picture(*size)], problem="Look.", answer="1", verifier="digit")
            for size in ((56, 84), (300, 200), (700, 560))]
    prompts = encode(processor, some)
    pixels = [int(grid.prod()) * 14 * 14 for grid in prompts.grids]
    assert all(512 * 512 <= number < 1.2 * 512 * 512 for number in pixels[:2])
    assert prompts.grids[2].tolist() == [[1, 40, 50]]  # large enough: as it is
    check = check_prompts(processor, some, of_the_world(min_pixels=512 * 512))
    assert check.lengths == [len(ids) for ids in prompts.ids]
    assert check.enlarged == 2


def test_a_problem_is_given_the_size_that_the_model_sees(processor):
    """Of its first picture, as the processor resized it: width, then height."""
    sizes = [(84, 56), (100, 60), (2000, 1500)]
    some = [dict(id="x", images=[picture(*size)], problem="Look.", answer="1", verifier="digit") for size in sizes]
    prompts = encode(processor, some)
    found = [problem["size"] for problem in prompts.problems]
    assert found[:2] == [(84, 56), (112, 56)]  # multiples of 28
    assert found[2] == (int(prompts.grids[2][0, 2]) * 14, int(prompts.grids[2][0, 1]) * 14)
    assert "size" not in some[0]  # the caller's own problem is left alone


def test_the_texts_around_a_problem(folder, problems):
    """--system_prompt begins the chat, --instruction stands after the problem; empty, neither is there."""
    def prompt(**texts):
        processor = common.load_policy(folder, args=of_the_world(**texts))[1]
        return common.chat(processor, problems[4])

    plain = prompt()
    assert plain.endswith(f"Go.\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")
    bare = prompt(instruction="")
    assert bare == plain.replace("\n" + INSTRUCTION, "")
    told = prompt(system_prompt="Answer in <answer> tags.", instruction="Be brief.")
    assert told.startswith("<|im_start|>system\nAnswer in <answer> tags.<|im_end|>\n<|im_start|>user\n")
    assert "Go.\nBe brief.<|im_end|>" in told
    assert "helpful assistant" not in told

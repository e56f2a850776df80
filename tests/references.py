"""What the tests compare with: sums written out term by term, slopes from two values, one plain forward pass each."""

import math

import common

import torch
from transformers import AutoTokenizer

# --- sums, term by term -----------------------------------------------------------------------------------------------


def random_logits(*shape, seed=0, scale=3.0):
    """Normal logits in fp64, the same for the same arguments."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(logits):
    """softmax of a list of numbers."""
    weights = [math.exp(x) for x in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def brute_kl(p_logits, q_logits):
    """KL(p‖q) of two lists of logits."""
    pairs = zip(probabilities(p_logits), probabilities(q_logits), strict=True)
    return math.fsum(p * (math.log(p) - math.log(q)) for p, q in pairs if p > 0)


def finite_differences(f, x, h=1e-5):
    """The gradient of f, from a list of numbers to a number, at the tensor x: two values for each component."""
    slopes = []
    for i in range(x.numel()):
        above = x.flatten().clone()
        below = x.flatten().clone()
        above[i] += h
        below[i] -= h
        slopes.append((f(above.tolist()) - f(below.tolist())) / (2 * h))
    return torch.tensor(slopes, dtype=torch.float64).view(x.shape)


# --- answers, and what a plain forward pass says of them --------------------------------------------------------------


def draw(policy, processor, problems, G=3, temperature=0.7, **more):
    """A rollout of short answers."""
    settings = dict(seed=(1, 5), max_completion_length=20, temperature=temperature) | more
    return common.sample(policy, processor, problems, G, **settings)


def plain_logits_of(policy, processor, rollout, b):
    """(T, V) logits of answer b: one ordinary forward pass of prompt and answer, forbidden ids at −1e9."""
    problem = rollout.problems[b]
    length = int(rollout.mask_BT[b].sum())
    inputs = processor(
        text=[common.chat(processor, problem)], images=problem["images"], return_tensors="pt",
        return_mm_token_type_ids=True)
    start = inputs["input_ids"].shape[1]
    answer = rollout.tokens_BT[b:b + 1, :length]
    logits = policy(
        input_ids=torch.cat([inputs["input_ids"], answer], 1),
        mm_token_type_ids=torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answer)], 1),
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
    ).logits
    logits = logits[0, start - 1:start - 1 + length, :policy.vocabulary].float()
    return logits.index_fill(1, torch.tensor(policy.banned), -1e9)


@torch.no_grad()
def plain_logits(policy, processor, rollout):
    """The same of every answer, as a list."""
    return [plain_logits_of(policy, processor, rollout, b) for b in range(len(rollout))]


# --- teachers that do not fit -----------------------------------------------------------------------------------------


def one_more_word(place):
    """Gives the tokenizer in a model's folder one more word."""
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(place)

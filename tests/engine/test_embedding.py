"""harness.embedding: which part of an answer argues, texts as vectors, and how far they lie apart."""

import itertools
from argparse import Namespace

import common
from harness.embedding import load_embedder, ngrams, reasoning
from harness.flags import UserError

import pytest
import torch


@pytest.mark.parametrize("text, part", [
    ("<think> a\nb </think>\\boxed{1}", "a\nb"),
    ("because \\boxed{1} so \\boxed{2}", "because \\boxed{1} so"),
    ("because so <answer>2</answer>", "because so"),
    ("only words", "only words"),
    ("<think> </think>but \\boxed{1}", "<think> </think>but"),
    ("\\boxed{1}", "\\boxed{1}"),
])
def test_reasoning(text, part):
    """Inside <think>, else what stands before the answer, else all of it: never nothing."""
    assert reasoning(text) == part


def test_ngrams_against_a_hand_made_bag():
    """"a b a" holds a twice, b once, and the pairs a-b and b-a; cosines follow from the counts."""
    vectors_ND = ngrams(["a b a", "a b", "c"])
    assert torch.allclose(vectors_ND.norm(dim=1), torch.ones(3))
    cosines_NN = vectors_ND @ vectors_ND.T
    # a: 2·1, b: 1·1, a-b: 1·1; lengths √(4 + 1 + 1 + 1) and √3
    assert cosines_NN[0, 1].item() == pytest.approx(4 / 21**0.5, rel=1e-5)
    assert cosines_NN[0, 2] == 0


def test_ngrams_of_texts_without_words_are_zeros_not_nan():
    assert (ngrams(["", " "]) == 0).all()


def test_an_embedder_that_does_not_exist_is_one_line():
    with pytest.raises(UserError, match="--embedder no/such is no folder or name of a model, nor ngrams"):
        load_embedder("no/such", torch.device("cpu"))


def test_the_diversity_of_held_out_answers_pair_by_pair(policy, processor, problems):
    """evaluate's mean over problems, of 1 - cos over all pairs of answers; and none where there are no pairs."""
    args = Namespace(num_generations_eval=3, seed=1, max_completion_length=6, sample_batch_size=0)
    run = Namespace(args=args, rank=0, world=1, device=torch.device("cpu"), gather=lambda mine: [mine])
    found = common.evaluate(run, policy, processor, problems)["eval_diversity"]
    rollout = common.sample(policy, processor, problems, 3, seed=(1, "eval"), max_completion_length=6)
    each = []
    for p in range(len(problems)):
        vectors_GD = ngrams([reasoning(text) for text in rollout.texts[3 * p:3 * p + 3]])
        each.append([1 - float(one @ other) for one, other in itertools.combinations(vectors_GD, 2)])
    assert 0.1 < found < 1
    assert found == pytest.approx(float(torch.tensor(each).mean()), abs=1e-6)
    args.num_generations_eval = 1
    assert "eval_diversity" not in common.evaluate(run, policy, processor, problems)


def test_the_diversity_of_held_out_answers_is_of_their_reasoning(policy, processor, problems, monkeypatch):
    """Answers that argue alike are not diverse, whatever they conclude; and the other way round."""
    args = Namespace(num_generations_eval=2, seed=1, max_completion_length=6, sample_batch_size=0)
    run = Namespace(args=args, rank=0, world=1, device=torch.device("cpu"), gather=lambda mine: [mine])
    sample = common.sample

    def saying(one, other):
        """`evaluate`, where every problem is answered by these two texts."""
        def sampled(*given, **more):
            rollout = sample(*given, **more)
            rollout.texts = [one, other] * len(problems)
            return rollout
        monkeypatch.setattr(common, "sample", sampled)
        return common.evaluate(run, policy, processor, problems)["eval_diversity"]

    same = "<think> so it is </think>"
    assert saying(f"{same} \\boxed{{1}}", f"{same} \\boxed{{a long and different end}}") == pytest.approx(0, abs=1e-6)
    assert saying("<think> this way </think> \\boxed{1}", "<think> by another </think> \\boxed{1}") == pytest.approx(1)

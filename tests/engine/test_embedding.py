"""harness.embedding: which part of an answer argues, and texts as vectors."""

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

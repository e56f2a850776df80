"""mupo.py: clustering against brute force, credit against closed forms, and GRPO where it must be GRPO."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, Qwen2Config, Qwen2Model

import common
import grpo
import mupo
from test_run import drive, metrics


def points(count, seed, dims=3, distinct=None):
    generator = torch.Generator().manual_seed(seed)
    some = torch.nn.functional.normalize(torch.randn(distinct or count, dims, generator=generator), dim=1)
    return some[torch.randint(len(some), (count,), generator=generator)] if distinct else some


def cost(embeddings_GD, labels):
    """Σ squared distances to the centroid of one's cluster, from the definition."""
    x, labels = embeddings_GD.double(), torch.as_tensor(labels)
    return sum(float(((x[labels == k] - x[labels == k].mean(0)) ** 2).sum()) for k in labels.unique())


def all_labellings(G, K, min_size):
    for labels in itertools.product(range(K), repeat=G - 1):
        labels = (0, *labels)  # names are free: the first point is in cluster 0
        if min(np.bincount(labels, minlength=K)) >= min_size:
            yield labels


def test_the_assignment_step_is_optimal():
    """For given centroids: against every labelling with sizes of at least G_min."""
    random = np.random.default_rng(0)
    for G, K, min_size in [(5, 2, 2), (6, 3, 2), (7, 3, 1), (7, 2, 3), (8, 3, 2), (6, 2, 3)]:
        every = [labels for labels in itertools.product(range(K), repeat=G)
                 if min(np.bincount(labels, minlength=K)) >= min_size]
        for _ in range(5):
            distance_GK = random.random((G, K))
            labels = mupo.assign(distance_GK, min_size)
            assert min(np.bincount(labels, minlength=K)) >= min_size
            best = min(sum(distance_GK[g, k] for g, k in enumerate(some)) for some in every)
            assert distance_GK[np.arange(G), labels].sum() == pytest.approx(best, abs=1e-12)


def test_partition_is_within_two_percent_of_the_optimum():
    """In 95 of 100 random cases of up to 9 points, against all partitions with sizes of at least G_min."""
    good = 0
    for case in range(100):
        G, K, min_size = [(6, 2, 2), (7, 2, 3), (7, 3, 2), (8, 2, 2), (8, 3, 2)][case % 5]
        x = points(G, seed=case)
        labels = mupo.partition(x, K, min_size, seed=case)
        best = min(cost(x, some) for some in all_labellings(G, K, min_size))
        good += cost(x, labels) <= 1.02 * best + 1e-9
    assert good >= 95


def sizes_hold(case):
    random = np.random.default_rng(case)
    K = int(random.integers(1, 5))
    min_size = int(random.integers(1, 4))
    G = K * min_size + int(random.integers(0, 6))
    distinct = None if case % 3 else int(random.integers(1, 4))  # duplicates, down to all the same
    labels = mupo.partition(points(G, case, distinct=distinct), K, min_size, seed=case, restarts=2)
    return labels.shape == (G,) and min(np.bincount(labels, minlength=K)) >= min_size and labels.max() < K


def test_sizes_hold_in_random_cases():
    assert all(sizes_hold(case) for case in range(1000))


@pytest.mark.slow
def test_sizes_hold_in_ten_thousand_random_cases():
    assert all(sizes_hold(case) for case in range(10_000))


def test_partition_is_a_function_of_its_arguments():
    x = points(15, 0)
    one = mupo.partition(x, 3, 3, seed=5)
    torch.manual_seed(9), np.random.seed(9)
    assert (mupo.partition(x, 3, 3, seed=5) == one).all()
    assert (mupo.partition(torch.ones(9, 4) / 2, 3, 3, seed=1).bincount() == 3).all()
    assert (mupo.partition(x, 1, 3, seed=1) == 0).all()
    clear = torch.eye(3).repeat_interleave(5, 0)
    assert len({tuple(mupo.partition(clear, 3, 3, seed=s)[i:i + 5].tolist()) for s in range(5) for i in (0, 5, 10)}) <= 3
    with pytest.raises(common.UserError, match="8 answers cannot fill 3 clusters of at least 3"):
        mupo.partition(points(8, 0), 3, 3, seed=0)


def test_diversity_against_the_definition():
    x, labels = points(7, 1), torch.tensor([0, 0, 1, 1, 1, 2, 2])
    for i, value in enumerate(mupo.diversity(x, labels).tolist()):
        others = [1 - float(x[i] @ x[j]) for j in range(7) if labels[j] != labels[i]]
        assert value == pytest.approx(sum(others) / len(others), abs=1e-6)
    assert (mupo.diversity(x, torch.zeros(7, dtype=torch.long)) == 0).all()


@pytest.mark.parametrize("balance", [0.0, 1.0, 2.0])
def test_cluster_advantages_against_the_definition(balance):
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.2, 0.9, 0.3])
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 0, 0])
    ours = mupo.cluster_advantages(rewards, labels, balance)
    for k in range(3):
        mine = rewards[labels == k]
        weight = (8 / (3 * len(mine))) ** balance
        equal = len(mine) == 1 or bool((mine == mine[0]).all())
        expected = torch.zeros(len(mine)) if equal else weight * (mine - mine.mean()) / (mine.std() + 1e-6)
        assert torch.allclose(ours[labels == k], expected, atol=1e-6)


def test_every_cluster_weighs_the_same_at_balance_one():
    labels = torch.tensor([0] * 9 + [1] * 3 + [2] * 3)
    weights = [(15 / (3 * int((labels == k).sum()))) for k in labels.tolist()]
    assert sum(weights) == pytest.approx(15)
    rewards = (torch.arange(15) % 3).float()  # the same spread in every cluster, so its sum of |A| shows its weight
    advantages = mupo.cluster_advantages(rewards, labels, 1.0).abs()
    scale = [float(grpo.group_advantages(rewards[None, labels == k]).abs().mean()) for k in range(3)]
    assert [float(advantages[labels == k].sum()) / scale[k] for k in range(3)] == pytest.approx([5.0, 5.0, 5.0], rel=1e-5)


def test_diversity_weight_is_the_cosine():
    assert mupo.diversity_weight(0, 100, 0.4, 0.1) == pytest.approx(0.4)
    assert mupo.diversity_weight(50, 100, 0.4, 0.1) == pytest.approx(0.25)
    assert mupo.diversity_weight(100, 100, 0.4, 0.1) == pytest.approx(0.1)
    assert mupo.diversity_weight(25, 100, 0.4, 0.1) == pytest.approx(0.25 + 0.15 * math.cos(math.pi / 4))


def test_reasoning_and_ngrams():
    assert mupo.reasoning("<think>a b</think>\\boxed{1}") == "a b"
    assert mupo.reasoning("so it is \\boxed{1}") == "so it is" and mupo.reasoning("nothing") == "nothing"
    assert mupo.reasoning("<think></think>x\\boxed{1}") == "<think></think>x"
    x = mupo.ngrams(["a b c", "a b c", "c b a", "d", ""])
    assert torch.allclose(x[0], x[1]) and float(x[0] @ x[1]) == pytest.approx(1)
    assert float(x[0] @ x[2]) == pytest.approx(3 / 5)  # of five grams each, the three single words are shared
    assert float(x[0] @ x[3]) == 0 and (x[4] == 0).all()


def test_embedder_pools_the_last_token_and_does_not_feel_padding(processor, tmp_path):
    """A real transformer saved to disk: each text alone, without padding, gives the same vector as in a batch."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(processor.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    Qwen2Model(config).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    texts = ["red", "one two three four", "a circle, a square"]
    ours = mupo.Embedder(str(tmp_path), torch.device("cpu"))(texts, batch=2)
    model, tokenizer = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text, vector in zip(texts, ours):
        with torch.no_grad():
            last = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        assert torch.allclose(vector, last / last.norm(), atol=1e-5)
    with pytest.raises(common.UserError, match="--embedder no/such"):
        mupo.Embedder("no/such-model", torch.device("cpu"))


def test_one_cluster_without_bonus_is_grpo(folder, tmp_path):
    """K = 1, λ = 0: the same answers bitwise, the same losses and gradients."""
    flags = "--num_generations", 6, "--epsilon_high", 0.2, "--updates_per_step", 2
    plain = drive(folder, tmp_path / "grpo", *flags)
    ours = drive(folder, tmp_path / "mupo", *flags, "--clusters", 1, "--diversity_weight", 0, "--min_diversity_weight", 0,
                 "--embedder", "ngrams", script="mupo")
    assert (plain / "answers-2.json").read_text() == (ours / "answers-2.json").read_text()
    for a, b in zip(metrics(plain), metrics(ours), strict=True):
        assert all(a[k] == pytest.approx(b[k], abs=1e-6) for k in a)
    for n in range(1, 5):
        a, b = (torch.load(place / f"grad-{n}.pt") for place in (plain, ours))
        assert all((a[k] - b[k]).norm() <= 1e-6 * a[k].norm() for k in a)


def test_wrong_answers_never_gain_from_diversity(folder, tmp_path):
    """In a run: the reward of a wrong answer is what GRPO gives it, of a right one at least that."""
    place = drive(folder, tmp_path / "run", "--num_generations", 9, "--embedder", "ngrams", script="mupo")
    for line in metrics(place)[1:]:
        assert line["smallest_cluster"] >= 3 and 0 < line["diversity"] < 1
    rows = [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
    right, wrong = ([row["reward"] for row in rows if len(row["text"]) % 2 == odd] for odd in (0, 1))
    assert wrong and set(wrong) == {0.0}  # an answer is right, here, when its length is even; the format is never
    assert right and min(right) > 0.9 and max(right) <= 0.9 + 0.4
    assert (place / "clusters.jsonl").exists()


def test_clusters_in_which_only_diversity_varies_are_counted():
    """All right but badly formatted, 0.9 in fp32, whose std is not 0: still only R_div varies."""
    class Run:
        mean = staticmethod(torch.mean)
    labels_PG, plain_PG = [torch.tensor([0, 0, 0, 1, 1, 1])], torch.full((1, 6), 0.9)
    rewards_PG = plain_PG + torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.1, 0.1]])
    found = mupo.cluster_metrics(Run, [points(6, 0)], labels_PG, plain_PG, rewards_PG)
    assert found["only_diversity_clusters"] == 0.5 and found["smallest_cluster"] == found["largest_cluster"] == 3

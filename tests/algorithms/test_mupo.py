"""mupo.py: clustering against brute force, credit against closed forms, and GRPO where it must be GRPO."""

import itertools
import json
import math

import common
import grpo
import mupo
from harness.diagnostics import cluster_metrics
from harness.embedding import Embedder, ngrams, reasoning

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, Qwen2Config, Qwen2Model
from whole_runs import drive, gradients, metrics


def points(count, seed, dims=3):
    """`count` random points on the unit sphere, (count, dims)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dims, generator=generator), dim=1)


def sizes(labels, clusters):
    return np.bincount(labels, minlength=clusters)


# --- constrained k-means ----------------------------------------------------------------------------------------------


def all_labellings(G, clusters, min_size):
    """Every way to give G points to clusters of at least `min_size`."""
    for labels in itertools.product(range(clusters), repeat=G):
        if min(sizes(labels, clusters)) >= min_size:
            yield labels


def cost(embeddings_GD, labels):
    """The sum of squared distances to the centroid of one's cluster, from the definition."""
    x = embeddings_GD.double()
    labels = torch.as_tensor(labels)
    total = 0.0
    for name in labels.unique():
        members = x[labels == name]
        total += float(((members - members.mean(0)) ** 2).sum())
    return total


@pytest.mark.parametrize("G, clusters, min_size", [(5, 2, 2), (6, 3, 2), (7, 3, 1), (7, 2, 3), (8, 3, 2), (6, 2, 3)])
def test_the_assignment_step_is_optimal(G, clusters, min_size):
    """For given distances to the centroids: against every labelling with sizes of at least G_min."""
    random = np.random.default_rng(0)
    every = list(all_labellings(G, clusters, min_size))
    for _ in range(5):
        distance_GK = random.random((G, clusters))
        labels = mupo.assign(distance_GK, min_size)
        assert min(sizes(labels, clusters)) >= min_size
        best = min(distance_GK[np.arange(G), some].sum() for some in every)
        assert distance_GK[np.arange(G), labels].sum() == pytest.approx(best, abs=1e-12)


def is_in_order(labels):
    """Whether clusters are numbered as they are first met: one of all the ways to name them."""
    return list(dict.fromkeys(labels)) == sorted(set(labels))


def test_partition_is_within_two_percent_of_the_optimum():
    """In 95 of 100 random cases of up to 8 points, against all partitions with sizes of at least G_min."""
    shapes = [(6, 2, 2), (7, 2, 3), (7, 3, 2), (8, 2, 2), (8, 3, 2)]
    every = {shape: [some for some in all_labellings(*shape) if is_in_order(some)] for shape in shapes}
    good = 0
    for case in range(100):
        G, clusters, min_size = shapes[case % 5]
        x = points(G, seed=case)
        found = cost(x, mupo.partition(x, clusters, min_size, seed=case))
        best = min(cost(x, some) for some in every[shapes[case % 5]])
        if found <= 1.02 * best + 1e-9:
            good += 1
    assert good >= 95


def assert_sizes_hold(case):
    """A random number of points; every third time only up to three of them differ."""
    random = np.random.default_rng(case)
    clusters = int(random.integers(1, 5))
    min_size = int(random.integers(1, 4))
    G = clusters * min_size + int(random.integers(0, 6))
    x = points(G, case)
    if case % 3 == 0:
        distinct = min(G, int(random.integers(1, 4)))
        x = x[random.integers(0, distinct, G)]
    labels = mupo.partition(x, clusters, min_size, seed=case, restarts=2)
    assert labels.shape == (G,)
    assert len(sizes(labels, clusters)) == clusters
    assert min(sizes(labels, clusters)) >= min_size


def test_sizes_hold_in_random_cases():
    for case in range(1000):
        assert_sizes_hold(case)


@pytest.mark.slow
def test_sizes_hold_in_ten_thousand_random_cases():
    for case in range(10_000):
        assert_sizes_hold(case)


def test_partition_is_a_function_of_its_arguments():
    """Nothing comes from a global generator."""
    x = points(15, 0)
    before = mupo.partition(x, 3, 3, seed=5)
    torch.manual_seed(9)
    np.random.seed(9)
    assert torch.equal(mupo.partition(x, 3, 3, seed=5), before)


def test_partition_of_equals_of_one_cluster_and_of_clear_clusters():
    equals = torch.ones(9, 4) / 2
    assert mupo.partition(equals, 3, 3, seed=1).bincount().tolist() == [3, 3, 3]
    assert (mupo.partition(points(15, 0), 1, 3, seed=1) == 0).all()
    clear = torch.eye(3).repeat_interleave(5, 0)  # five times the same answer, three times
    for seed in range(5):
        labels = mupo.partition(clear, 3, 3, seed=seed).view(3, 5)
        assert (labels == labels[:, :1]).all()
        assert len(labels[:, 0].unique()) == 3


def test_too_few_answers_for_the_clusters_are_an_error():
    with pytest.raises(common.UserError, match="8 answers cannot fill 3 clusters of at least 3"):
        mupo.partition(points(8, 0), 3, 3, seed=0)


# --- eq. (1) to (4): the bonus and the credit -------------------------------------------------------------------------


def test_diversity_against_the_definition():
    x = points(7, 1)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    for i, value in enumerate(mupo.diversity(x, labels).tolist()):
        distances = [1 - float(x[i] @ x[j]) for j in range(7) if labels[j] != labels[i]]
        assert value == pytest.approx(sum(distances) / len(distances), abs=1e-6)


def test_one_cluster_has_no_diversity():
    assert (mupo.diversity(points(7, 1), torch.zeros(7, dtype=torch.long)) == 0).all()


def test_diversity_weight_is_the_cosine():
    """From λ_max = 0.4 at the start down to λ_min = 0.1 at the end of 100 steps."""
    assert mupo.diversity_weight(0, 100, 0.4, 0.1) == pytest.approx(0.4)
    assert mupo.diversity_weight(25, 100, 0.4, 0.1) == pytest.approx(0.25 + 0.15 * math.cos(math.pi / 4))
    assert mupo.diversity_weight(50, 100, 0.4, 0.1) == pytest.approx(0.25)
    assert mupo.diversity_weight(100, 100, 0.4, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("balance", [0.0, 1.0, 2.0])
def test_cluster_advantages_against_the_definition(balance):
    """The z-score inside each cluster, times (G/(K·|C_k|))^γ. A cluster of equals or of one has none."""
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.2, 0.9, 0.3])
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 0, 0])
    ours = mupo.cluster_advantages(rewards, labels, balance)
    mine = rewards[labels == 0]
    weight = (8 / (3 * 5)) ** balance
    expected = weight * (mine - mine.mean()) / (mine.std() + 1e-6)
    assert torch.allclose(ours[labels == 0], expected, atol=1e-6)
    assert (ours[labels == 1] == 0).all()  # equals
    assert (ours[labels == 2] == 0).all()  # one


def test_every_cluster_weighs_the_same_at_balance_one():
    """The spread is the same in every cluster, so the sum of |A| shows a cluster's weight: 15/3 in each."""
    labels = torch.tensor([0] * 9 + [1] * 3 + [2] * 3)
    rewards = (torch.arange(15) % 3).float()
    advantages = mupo.cluster_advantages(rewards, labels, 1.0).abs()
    for name in range(3):
        mine = labels == name
        unweighted = grpo.group_advantages(rewards[None, mine])[0].abs().mean()
        assert float(advantages[mine].sum() / unweighted) == pytest.approx(5.0, rel=1e-5)


# --- what is clustered: the reasoning as vectors ----------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("<think>a b</think>\\boxed{1}", "a b"),
    ("so it is \\boxed{1}", "so it is"),
    ("nothing", "nothing"),
    ("<think></think>x\\boxed{1}", "<think></think>x"),
])
def test_reasoning_is_what_argues(text, expected):
    assert reasoning(text) == expected


def test_ngrams_are_bags_of_words_and_pairs():
    x = ngrams(["a b c", "a b c", "c b a", "d", ""])
    assert torch.allclose(x[0], x[1])
    assert float(x[0] @ x[1]) == pytest.approx(1)
    assert float(x[0] @ x[2]) == pytest.approx(3 / 5)  # of five grams each, the three single words are shared
    assert float(x[0] @ x[3]) == 0
    assert (x[4] == 0).all()


def test_embedder_pools_the_last_token_and_does_not_feel_padding(processor, tmp_path):
    """A real transformer saved to disk: each text alone, without padding, gives the same vector as in a batch."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(processor.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2)
    Qwen2Model(config).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    texts = ["red", "one two three four", "a circle, a square"]
    ours = Embedder(str(tmp_path), torch.device("cpu"))(texts, batch=2)

    model = AutoModel.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text, vector in zip(texts, ours, strict=True):
        with torch.no_grad():
            last = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        assert torch.allclose(vector, last / last.norm(), atol=1e-5)


def test_an_embedder_that_is_no_model_is_one_line():
    with pytest.raises(common.UserError, match="--embedder no/such"):
        Embedder("no/such-model", torch.device("cpu"))


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_one_cluster_without_bonus_is_grpo(folder, tmp_path):
    """K = 1, λ = 0: the same answers bitwise, the same losses and gradients."""
    flags = (
        "--num_generations", 6, "--epsilon_high", 0.2, "--updates_per_step", 2, "--eval_dataset", "none",
        "--max_completion_length", 12)
    no_bonus = ("--clusters", 1, "--diversity_weight", 0, "--min_diversity_weight", 0, "--embedder", "ngrams")
    plain = drive(folder, tmp_path / "grpo", *flags)
    ours = drive(folder, tmp_path / "mupo", *flags, *no_bonus, script="mupo")
    assert (plain / "answers-2.json").read_text() == (ours / "answers-2.json").read_text()
    for line, our_line in zip(metrics(plain), metrics(ours), strict=True):
        assert {name: our_line[name] for name in line} == pytest.approx(line, abs=1e-6)
    for update in range(1, 5):
        ours_of = gradients(ours, update)
        for name, expected in gradients(plain, update).items():
            assert (ours_of[name] - expected).norm() <= 1e-6 * expected.norm(), name


def test_wrong_answers_never_gain_from_diversity(folder, tmp_path):
    """The reward of a wrong answer is what GRPO gives it, of a right one at least that. (Right: of even length.)"""
    flags = ("--num_generations", 9, "--embedder", "ngrams", "--prompts_per_step", 4, "--eval_dataset", "none")
    place = drive(folder, tmp_path / "run", *flags, script="mupo")
    for line in metrics(place):
        assert line["smallest_cluster"] >= 3
        assert 0 < line["diversity"] < 1
    rewards = {"right": [], "wrong": []}
    for line in (place / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        kind = "right" if len(row["text"]) % 2 == 0 else "wrong"
        rewards[kind].append(row["reward"])
    assert set(rewards["wrong"]) == {0.0}
    assert min(rewards["right"]) > 0.9
    assert max(rewards["right"]) <= 0.9 + 0.4
    assert (place / "clusters.jsonl").exists()


class OneProcess:
    """As much of a run as the metrics of clusters ask for."""

    mean = staticmethod(torch.mean)


def test_clusters_in_which_only_diversity_varies_are_counted():
    """All right but badly formatted, 0.9 in fp32, whose std is not 0: still only R_div varies, in one of two."""
    labels_G = torch.tensor([0, 0, 0, 1, 1, 1])
    plain_PG = torch.full((1, 6), 0.9)
    bonus_PG = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.1, 0.1]])
    found = cluster_metrics(OneProcess, [points(6, 0)], [labels_G], plain_PG=plain_PG, rewards_PG=plain_PG + bonus_PG)
    assert found["only_diversity_clusters"] == 0.5
    assert found["smallest_cluster"] == 3
    assert found["largest_cluster"] == 3

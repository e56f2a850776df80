"""What a run tells of itself beyond its paper: numbers for metrics.jsonl, and rows that pictures are drawn from.

Nothing here changes what is learned.
"""

from collections.abc import Callable, Sequence

from harness.answers import final_answer
from harness.embedding import spread
from harness.rollout import Rollout
from harness.run import Run

import torch
from transformers import PreTrainedTokenizerBase

# --- where a wrong answer first goes wrong ----------------------------------------------------------------------------


def first_wrong_tokens(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> torch.Tensor:
    """(B, T) of 0/1: the first wrong token of every answer that ends wrong, nothing in the others.

    The problems must carry the hook "first_wrong": a function from the texts of an answer's tokens to the place of the
    first one that no right answer has there, or None. Only problems whose right answers are all known can have one.
    """
    wrong_BT = torch.zeros_like(rollout.mask_BT)
    for b, problem in enumerate(rollout.problems):
        if final_answer(rollout.texts[b]) == problem["answer"]:
            continue
        length = int(rollout.mask_BT[b].sum())
        place = problem["first_wrong"](tokenizer.batch_decode(rollout.tokens_BT[b, :length, None]))
        if place is not None:
            wrong_BT[b, place] = 1.0
    return wrong_BT


# --- vepo.py: tokens that look, tokens that hesitate ------------------------------------------------------------------


def record_signals(
    run: Run, tokenizer: PreTrainedTokenizerBase, rollout: Rollout, read_B: torch.Tensor,
    signals: dict[str, torch.Tensor], top: Callable,
) -> dict:
    """Metrics of VEPO's signals, over the answers that were read. In the last step some answers go to signals.jsonl.

    Where the problems know where an answer goes wrong, `coverage` is the share of first wrong tokens with credit.

    read_B: bool. signals: jsd, delta_entropy, entropy, score and kept (1 on the tokens with credit), each (B, T).
    top(score_BT, mask_BT, fraction) picks the highest tokens of each answer, (B, T) of 0/1.
    """
    if run.step == run.args.max_steps:
        run.append(run.path("signals.jsonl"), signal_rows(run.step, tokenizer, rollout, read_B, signals=signals))
    metrics = signal_metrics(run, signals, rollout.mask_BT * read_B[:, None], top=top)
    if all("first_wrong" in problem for problem in rollout.prompts.problems):
        wrong_BT = first_wrong_tokens(tokenizer, rollout) * read_B[:, None]
        metrics["coverage"] = run.mean(signals["kept"], wrong_BT)
    return metrics


def signal_metrics(
    run: Run, signals: dict[str, torch.Tensor], mask_BT: torch.Tensor, *, top: Callable,
) -> dict:
    """How VEPO's signals are spread over the tokens that were read, over all processes.

    signals: jsd, delta_entropy, entropy and kept (1 on the tokens that carry credit), each (B, T). mask_BT: 1 on the
    tokens that were read. top(score_BT, mask_BT, fraction) picks the highest of each answer, (B, T) of 0/1.
    """
    jsd_BT = signals["jsd"]
    entropy_BT = signals["entropy"]
    looking_BT = top(jsd_BT, mask_BT, 0.2)
    hesitating_BT = top(entropy_BT, mask_BT, 0.2)
    kept_BT = signals["kept"]
    kept_and_read_BT = kept_BT * mask_BT
    dropped_BT = mask_BT - kept_and_read_BT
    return dict(
        jsd=run.mean(jsd_BT, mask_BT),
        delta_entropy=run.mean(signals["delta_entropy"], mask_BT),
        kept_fraction=run.mean(kept_BT, mask_BT),
        missed_by_entropy=run.mean(1 - hesitating_BT, looking_BT),
        jsd_entropy_correlation=correlation(run, jsd_BT, entropy_BT, mask_BT),
        jsd_kept=run.mean(jsd_BT, kept_and_read_BT),
        jsd_dropped=run.mean(jsd_BT, dropped_BT),
        entropy_kept=run.mean(entropy_BT, kept_and_read_BT),
        entropy_dropped=run.mean(entropy_BT, dropped_BT),
    )


def correlation(run: Run, x_BT: torch.Tensor, y_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of two signals over the tokens of all processes."""
    x_BT = x_BT - run.mean(x_BT, mask_BT)
    y_BT = y_BT - run.mean(y_BT, mask_BT)
    spread = (run.mean(x_BT * x_BT, mask_BT) * run.mean(y_BT * y_BT, mask_BT)).sqrt().clamp_min(1e-12)
    return run.mean(x_BT * y_BT, mask_BT) / spread


def signal_rows(
    step: int, tokenizer: PreTrainedTokenizerBase, rollout: Rollout, read_B: torch.Tensor, *,
    signals: dict[str, torch.Tensor],
) -> list[dict]:
    """Rows of signals.jsonl, from which the end of a run draws signals.png and tokens.html: some answers, by token.

    read_B: the answers that were read, bool. signals: name → (B, T).
    """
    rows = []
    for b in read_B.nonzero()[::8, 0].tolist()[:64]:
        length = int(rollout.mask_BT[b].sum())
        problem = rollout.problems[b]
        row = dict(
            step=step, id=problem["id"], problem=problem["problem"],
            tokens=tokenizer.batch_decode(rollout.tokens_BT[b, :length, None]))
        for name, signal_BT in signals.items():
            row[name] = [round(value, 4) for value in signal_BT[b, :length].tolist()]
        rows.append(row)
    return rows


# --- mupo.py: ways of thinking ----------------------------------------------------------------------------------------


def record_clusters(
    run: Run, rollout: Rollout, embeddings_PGD: Sequence[torch.Tensor], labels_PG: Sequence[torch.Tensor], *,
    accuracy_PG: torch.Tensor, plain_PG: torch.Tensor, rewards_PG: torch.Tensor,
) -> dict:
    """Metrics of MUPO's clusters. In the last step the answers to some problems go to clusters.jsonl.

    embeddings_PGD: a (G, D) for each problem; labels_PG: a (G,) for each. plain_PG: the rewards without the bonus.
    """
    if run.step == run.args.max_steps:
        rows = cluster_rows(run.step, rollout, embeddings_PGD, labels_PG, accuracy_PG=accuracy_PG)
        run.append(run.path("clusters.jsonl"), rows)
    return cluster_metrics(run, embeddings_PGD, labels_PG, plain_PG=plain_PG, rewards_PG=rewards_PG)


def cluster_metrics(
    run: Run, embeddings_PGD: Sequence[torch.Tensor], labels_PG: Sequence[torch.Tensor], *, plain_PG: torch.Tensor,
    rewards_PG: torch.Tensor,
) -> dict:
    """How far apart the reasoning of a group is, how large its clusters are, and in how many only diversity decides.

    plain_PG: the rewards without the bonus for diversity.
    """
    distances = []
    smallest = []
    largest = []
    only_diversity = []
    for embeddings_GD, labels_G, plain_G, rewards_G in zip(
        embeddings_PGD, labels_PG, plain_PG.cpu(), rewards_PG.cpu(), strict=True,
    ):
        distances.append(spread(embeddings_GD))
        sizes = labels_G.bincount().float()
        smallest.append(sizes.min())
        largest.append(sizes.max())
        for name in labels_G.unique():
            mine_G = labels_G == name
            if mine_G.sum() > 1:
                plainly_equal = len(plain_G[mine_G].unique()) == 1
                only_diversity.append(float(plainly_equal and len(rewards_G[mine_G].unique()) > 1))
    return dict(
        diversity=run.mean(torch.tensor(distances)),
        smallest_cluster=run.mean(torch.stack(smallest)),
        largest_cluster=run.mean(torch.stack(largest)),
        only_diversity_clusters=run.mean(torch.tensor(only_diversity)),
    )


def cluster_rows(
    step: int, rollout: Rollout, embeddings_PGD: Sequence[torch.Tensor], labels_PG: Sequence[torch.Tensor],
    *, accuracy_PG: torch.Tensor, most: int = 4,
) -> list[dict]:
    """Rows of clusters.jsonl, from which the end of a run draws clusters.png: all answers to a few problems."""
    G = len(labels_PG[0])
    rows = []
    for p, problem in enumerate(rollout.prompts.problems[:most]):
        rows.append(dict(
            step=step, id=problem["id"], problem=problem["problem"], embeddings=embeddings_PGD[p].tolist(),
            labels=labels_PG[p].tolist(), accuracy=accuracy_PG[p].tolist(), texts=rollout.texts[p * G:(p + 1) * G]))
    return rows

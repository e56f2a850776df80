"""What VEPO is compared with: other scores by which the tokens of an answer can be picked (vepo.py --select).

Each is made of the three signals of vepo.py, scaled to [0, 1] within each answer, (B, T) each: j the divergence that a
noised picture makes, d the change of entropy, h the entropy.
"""

from collections.abc import Sequence

from harness.rollout import Rollout
from harness.run import generator

import torch

SELECTIONS = (
    "vepo", "all", "entropy", "jsd", "delta_entropy", "random", "ungated", "linear", "product", "kl", "bottom",
)


def other_score(
    select: str, rollout: Rollout, signals: Sequence[torch.Tensor], *, alpha: float, seed: tuple,
) -> torch.Tensor:
    """The baselines and ablations of the paper: the signals j, d, h, each (B, T), → (B, T)."""
    j_BT, d_BT, h_BT = signals
    scores = {
        "all": h_BT,  # kept whole, whatever the score: this is grpo.py
        "entropy": h_BT,
        "jsd": j_BT,
        "delta_entropy": d_BT,
        "random": random_scores(rollout, seed),
        "ungated": 1 - (1 - j_BT) ** alpha * (1 - d_BT) ** (1 - alpha),
        "linear": (alpha * j_BT + (1 - alpha) * d_BT) * h_BT,
        "product": j_BT * d_BT * h_BT,
        "bottom": -(1 - (1 - j_BT) ** alpha * (1 - d_BT) ** (1 - alpha)) * h_BT,  # a control: VEPO's order turned round
    }
    return scores[select]


def kl_of_readings(logits_NV: torch.Tensor, noised_logits_NV: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """KL(P‖Q) of the two readings, (N,), in nats: what --select kl has in place of the JSD. It has no upper bound."""
    logp_NV = logits_NV.log_softmax(-1)
    logq_NV = noised_logits_NV.log_softmax(-1)
    return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1).clamp_min(0)


def random_scores(rollout: Rollout, seed: tuple) -> torch.Tensor:
    """(B, T) uniform numbers, a function of the seed, the problem and the answer's number alone."""
    T = rollout.mask_BT.shape[1]
    rows = {}
    for p, answers in rollout.groups().items():
        id = rollout.prompts.problems[p]["id"]
        for number, b in enumerate(answers):
            rows[b] = torch.rand(T, generator=generator(*seed, id, "select", number))
    return torch.stack([rows[b] for b in range(len(rollout))]).to(rollout.mask_BT.device)

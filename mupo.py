"""MUPO: multi-group policy optimisation, many ways of thinking kept alive.

Paper: MUPO, arXiv 2604.00479. GRPO lets one way of reasoning win: whatever is a little better takes all. Here a
problem's N = G answers are embedded by their reasoning and split into K clusters G_k of at least G_min answers
(constrained k-means, Bradley et al. 2000); answers compete inside their own cluster only, and right answers earn a
bonus for being far from the other clusters. With e_i the normalised embedding of answer i:

    R_div(i) = mean of 1 − cos(e_i, e_j) over the answers j of other clusters                                   (1)
    R_i      = 0.9·accuracy + 0.1·format + λ(t)·[i is right]·R_div(i)                                           (2)
    λ(t)     = λ_min + ½(λ_max − λ_min)·(1 + cos(π·t/t_max))                                                    (3)
    A_i      = w_k·(R_i − mean_k R)/(std_k R + 1e-6),     w_k = (N/(K·|G_k|))^β                                 (4)
    L        = Σ_bt weight_bt·ℓ_bt / Σ_bt weight_bt       ℓ as in grpo.py, eq. (2) and (3): GRPO's clipped loss (5)

At β = 1 every cluster weighs the same, whatever its size. A cluster of one has A = 0; with K = 1, R_div = 0.

Departures from the paper, and where its released code differs:
 1. The paper's equation (3) averages inside each cluster and multiplies by w_k too. The released code, and this, only
    multiply each answer by w_k; --balance 2 is the paper's equation with β = 1, up to a constant.
 2. The ratio is per token, the paper writes it per sequence.
 3. The released code decays λ exponentially, rewards (0.9 − w)·accuracy + 0.1·format + w·2·R_div and has the partition
    commented out; this follows the paper.
A danger to watch: in a cluster whose answers are all right only R_div varies, and (4) blows it up to unit size; the
metric only_diversity_clusters is the share of such clusters.

Shapes: P problems, G answers to each, B = P·G answers, T tokens of the longest, D size of an embedding.

    python mupo.py                                                              a laptop, minutes
    accelerate launch mupo.py --model Qwen/Qwen2.5-VL-7B-Instruct --dataset ViRL39K/FILE.parquet
                                                  the paper's size, several GPUs; a local copy, its pictures unpacked

A healthy run: as grpo.py's, but diversity falls less; smallest_cluster never falls below G_min.
"""

import math
import re

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from transformers import AutoModel, AutoTokenizer

from common import (
    Run, UserError, format_reward, generator, grade, is_right, launch, load_policy, load_problems, read, sample,
    token_logps,
)

# --- the algorithm ----------------------------------------------------------------------------------------------------


def group_advantages(rewards_PG):
    """(P, G) → (P, G). GRPO's eq. (1); exactly 0 where a group's rewards are equal, whatever fp32 says of their std."""
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    advantages_PG = centred_PG / (rewards_PG.std(1, keepdim=True) + 1e-6)
    equal_P1 = rewards_PG.amax(1, keepdim=True) == rewards_PG.amin(1, keepdim=True)
    return advantages_PG.masked_fill(equal_P1, 0.0)


def policy_loss(logp_BT, old_logp_BT, advantage_BT, epsilon, epsilon_high):
    """(B, T) → (B, T), per token and unreduced. GRPO's eq. (2) and (3)."""
    ratio_BT = torch.exp(logp_BT - old_logp_BT)
    clipped_BT = ratio_BT.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)


def is_clipped(logp_BT, old_logp_BT, advantage_BT, epsilon, epsilon_high):
    """(B, T) of 0/1: where the clip of GRPO's eq. (3) takes the gradient away."""
    ratio_BT = torch.exp(logp_BT - old_logp_BT)
    too_good, too_bad = ratio_BT > 1 + epsilon_high, ratio_BT < 1 - epsilon
    return ((too_good & (advantage_BT > 0)) | (too_bad & (advantage_BT < 0))).float()


def token_weights(mask_BT, average):
    """(B, T) → (B, T). "token": every token counts the same; "answer": every answer does, 1/|o_b| to a token."""
    return mask_BT if average == "token" else mask_BT / mask_BT.sum(1, keepdim=True)


def k3(logp_BT, ref_logp_BT):
    """(B, T) → (B, T). GRPO's eq. (5): never negative, 0 where the policies agree, unbiased for KL(π_θ‖π_ref)."""
    d_BT = ref_logp_BT - logp_BT
    return torch.exp(d_BT) - d_BT - 1


def adapted_beta(beta, kl, target, answers):
    """β after a step of `answers` answers whose mean KL was `kl`: moved towards the target (Ziegler et al. 2019)."""
    error = min(max(kl / target - 1, -0.2), 0.2) if target else 0.0
    return beta * (1 + error * answers / 10_000)


def reasoning(text):
    """The part of an answer that argues: inside <think>, else what stands before the last box, else all of it."""
    block = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    return block and block.group(1).strip() or text.rpartition("\\boxed")[0].strip() or text.strip()


def ngrams(texts, most=2):
    """Bags of word n-grams, n up to `most`, normalised: a list of N texts → (N, D). Needs no model: the tabletop's."""
    bags = []
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]", text)
        bags.append([tuple(words[i:i + n]) for n in range(1, most + 1) for i in range(len(words) - n + 1)])
    place = {gram: d for d, gram in enumerate(sorted({gram for bag in bags for gram in bag}))}
    counts_ND = torch.zeros(len(texts), max(1, len(place)))
    for row, bag in zip(counts_ND, bags):
        row.index_add_(0, torch.tensor([place[gram] for gram in bag], dtype=torch.long), torch.ones(len(bag)))
    return torch.nn.functional.normalize(counts_ND, dim=1)


class Embedder:
    """A sentence-embedding model: its last layer's state of the last token, normalised. Frozen, read without grad."""

    def __init__(self, name, device):
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
            self.model = AutoModel.from_pretrained(name).to(device).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"--embedder {name} is no folder or name of a model, nor ngrams: {reason}") from None

    @torch.no_grad()
    def __call__(self, texts, batch=32):
        """A list of N texts → (N, D) on the CPU. Padding stands on the left, so the last place is the last token."""
        states = []
        for start in range(0, len(texts), batch):
            inputs = self.tokenizer(texts[start:start + batch], padding=True, return_tensors="pt").to(self.model.device)
            states.append(self.model(**inputs).last_hidden_state[:, -1].float().cpu())
        return torch.nn.functional.normalize(torch.cat(states), dim=1)


def assign(distance_GK, min_size):
    """The cheapest assignment of G points to K centroids with at least `min_size` points each: (G, K) → labels (G,).

    A matching of points to seats: each centroid has `min_size` obligatory seats, and the seats left over are free, at
    the distance to the nearest centroid.
    """
    G, K = distance_GK.shape
    free = np.repeat(distance_GK.min(1, keepdims=True), G - K * min_size, axis=1)
    _, seat_G = linear_sum_assignment(np.concatenate([np.repeat(distance_GK, min_size, axis=1), free], axis=1))
    return np.where(seat_G < K * min_size, seat_G // max(1, min_size), distance_GK.argmin(1))


def partition(embeddings_GD, clusters, min_size, seed, restarts=32):
    """Constrained k-means: normalised embeddings (G, D) → labels (G,) below `clusters`, each at least min_size times.

    Squared Euclidean distances; k-means++ seeds; the best of `restarts`; a function of its arguments alone.
    """
    G = len(embeddings_GD)
    if G < clusters * min_size:
        raise UserError(f"{G} answers cannot fill {clusters} clusters of at least {min_size}: raise --num_generations, "
                        "or lower --clusters or --min_cluster")
    if clusters == 1:
        return torch.zeros(G, dtype=torch.long)
    gram_GG = (embeddings_GD.double() @ embeddings_GD.double().T).numpy()
    apart_GG = np.maximum(gram_GG.diagonal()[:, None] + gram_GG.diagonal() - 2 * gram_GG, 0)
    random, best = np.random.default_rng(seed), (np.inf, None)
    for _ in range(restarts):
        chosen = [random.integers(G)]
        while len(chosen) < clusters:
            near_G = apart_GG[chosen].min(0) + 1e-12  # where all points coincide, any will do
            chosen.append(random.choice(G, p=near_G / near_G.sum()))
        labels_G, cost = assign(apart_GG[:, chosen], min_size), np.inf
        while True:  # Lloyd's two steps, while they help
            member_GK = np.eye(clusters)[labels_G] / np.bincount(labels_G, minlength=clusters)
            # ‖x − c‖² to a mean c needs no c: the mean of ‖x − m‖² over the members m, less half their mean spread.
            spread_K = np.einsum("gk,gh,hk->k", member_GK, apart_GG, member_GK) / 2
            distance_GK = apart_GG @ member_GK - spread_K
            now = distance_GK[np.arange(G), labels_G].sum()
            if now >= cost - 1e-12:
                break
            cost, kept_G, labels_G = now, labels_G, assign(distance_GK, min_size)
        if cost < best[0] - 1e-12:
            best = cost, kept_G
    return torch.from_numpy(best[1])


def diversity(embeddings_GD, labels_G):
    """Eq. (1): (G, D), (G,) → (G,). How far each answer is from those of other clusters; 0 with one cluster."""
    distance_GG = 1 - embeddings_GD @ embeddings_GD.T
    other_GG = (labels_G[:, None] != labels_G).to(distance_GG.dtype)
    return (distance_GG * other_GG).sum(1) / other_GG.sum(1).clamp_min(1)


def diversity_weight(step, total_steps, highest, lowest):
    """Eq. (3): λ at `step`, from λ_max at 0 down to λ_min at `total_steps`."""
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * step / total_steps)) / 2


def cluster_advantages(rewards_G, labels_G, balance):
    """Eq. (4): (G,), (G,) → (G,). The z-score inside each cluster, times w_k; 0 in a cluster of one."""
    advantages_G, names = torch.zeros_like(rewards_G), labels_G.unique()
    for name in names:
        members = (labels_G == name).nonzero()[:, 0]
        if len(members) > 1:
            weight = (len(rewards_G) / (len(names) * len(members))) ** balance
            advantages_G[members] = weight * group_advantages(rewards_G[None, members])[0]
    return advantages_G


def cluster_metrics(run, embeddings_PGD, labels_PG, plain_PG, rewards_PG):
    """How far apart the reasoning of a group is, how large its clusters are, and how many only R_div decides in."""
    G = len(labels_PG[0])
    apart_P = torch.stack([(1 - e_GD @ e_GD.T).sum() / (G * (G - 1)) for e_GD in embeddings_PGD])
    sizes_P = [labels_G.bincount().float() for labels_G in labels_PG]
    only = [float(len(plain_G[labels_G == k].unique()) == 1 < len(rewards_G[labels_G == k].unique()))
            for plain_G, rewards_G, labels_G in zip(plain_PG.cpu(), rewards_PG.cpu(), labels_PG)
            for k in labels_G.unique() if (labels_G == k).sum() > 1]
    return dict(
        diversity=run.mean(apart_P), smallest_cluster=run.mean(torch.stack([x.min() for x in sizes_P])),
        largest_cluster=run.mean(torch.stack([x.max() for x in sizes_P])),
        only_diversity_clusters=run.mean(torch.tensor(only)),
    )


def cluster_rows(step, rollout, embeddings_PGD, labels_PG, accuracy_PG, most=4):
    """Lines of clusters.jsonl, from which the end of a run draws clusters.png: the groups of a few problems."""
    G, rows = len(labels_PG[0]), []
    for p, problem in enumerate(rollout.prompts.problems[:most]):
        rows.append(dict(
            step=step, id=problem["id"], problem=problem["problem"], embeddings=embeddings_PGD[p].tolist(),
            labels=labels_PG[p].tolist(), accuracy=accuracy_PG[p].tolist(), texts=rollout.texts[p * G:(p + 1) * G]))
    return rows


# --- the run ----------------------------------------------------------------------------------------------------------

RECIPE = dict(
    dataset="TIGER-Lab/ViRL39K@train", num_generations=15, epsilon_high=0.28, prompts_per_step=512, updates_per_step=4,
    learning_rate=1e-6, max_completion_length=2048, max_steps=150,
)
TOY = dict(
    dataset="toy@train", eval_dataset="toy@test", prompts_per_step=32, updates_per_step=4, learning_rate=2e-4,
    warmup_steps=5, max_steps=70, max_completion_length=64, micro_batch_size=64, train_vision=True,
    gradient_checkpointing=False, num_generations=15, embedder="ngrams",
)


def flags(parser):
    parser.add_argument("--epsilon", type=float, default=0.2, help="ε_low, how far the ratio may fall")
    parser.add_argument("--epsilon_high", type=float, default=0.2, help="ε_high, how far the ratio may rise")
    parser.add_argument("--average", choices=("token", "answer"), default="token", help="what counts the same")
    parser.add_argument("--beta", type=float, default=0.0, help="β, weight of the KL to the starting model")
    parser.add_argument("--kl_target", type=float, default=0.0, help="adapt β towards this KL (0: β stays)")
    parser.add_argument("--clusters", type=int, default=3, help="K, clusters that a group is split into")
    parser.add_argument("--min_cluster", type=int, default=3, help="G_min, answers that a cluster has at least")
    parser.add_argument("--balance", type=float, default=1.0, help="β of eq. (4): at 1 every cluster weighs the same")
    parser.add_argument("--diversity_weight", type=float, default=0.4, help="λ_max, at the first step")
    parser.add_argument("--min_diversity_weight", type=float, default=0.1, help="λ_min, at the last step")
    parser.add_argument("--embedder", default="Qwen/Qwen3-Embedding-0.6B", help="a sentence-embedding model, or ngrams")
    parser.add_argument("--mask_truncated", action="store_true", help="cut answers leave the loss (not the KL)")


def update(run, policy, rollout, plan, advantage_BT, weight_BT, old_logp_BT, ref_logp_BT):
    """The optimiser updates of one rollout, GRPO's eq. (2) to (5); returns their metrics, averaged over the updates.

    old_logp_BT is None when there is one update only: then π_old is the policy being read, ρ is 1 and the gradient is
    REINFORCE's. ref_logp_BT is None without a reference.
    """
    args, mask_BT, updates = run.args, rollout.mask_BT, len(plan)
    totals = dict(loss=0.0, kl=0.0, clip_fraction=0.0, grad_norm=0.0, gap=0.0, read=0.0)
    for passes, weight_of, mask_of in zip(plan, weight_BT.chunk(updates), mask_BT.chunk(updates)):
        # Both normalisers of the loss are whole before the first pass: all micro-batches, all processes.
        weights, tokens = run.sum(weight_of.sum()).clamp_min(1e-6), run.sum(mask_of.sum())
        for batch, alive in passes:
            mask_bT, weight_bT = alive * mask_BT[batch], alive * weight_BT[batch]
            logp_bT = read(token_logps, rollout[batch], policy)
            old_logp_bT = logp_bT.detach() if old_logp_BT is None else old_logp_BT[batch]
            terms = logp_bT, old_logp_bT, advantage_BT[batch], args.epsilon, args.epsilon_high
            loss = (policy_loss(*terms) * weight_bT).sum() / weights
            if ref_logp_BT is not None:
                kl = (k3(logp_bT, ref_logp_BT[batch]) * mask_bT).sum() / tokens
                loss = loss + run.state["beta"] * kl
                totals["kl"] += kl.detach() / updates
            (loss * run.world).backward()  # sharded gradients are averaged over the processes, but the loss is a sum
            totals["loss"] += loss.detach() / updates
            totals["clip_fraction"] += (is_clipped(*terms) * weight_bT).sum() / weights / updates
            totals["gap"] += ((old_logp_bT - rollout.logp_BT[batch]).abs() * mask_bT).sum()
            totals["read"] += mask_bT.sum()
        totals["grad_norm"] += run.optimizer_step() / updates / run.world
    totals = {name: float(run.sum(total)) for name, total in totals.items()}
    totals["sampler_gap"] = totals.pop("gap") / max(1.0, totals.pop("read"))
    return totals if ref_logp_BT is not None else {k: v for k, v in totals.items() if k != "kl"}


def main(args):
    if args.num_generations < 2:
        raise UserError(f"--num_generations is {args.num_generations}: a group needs at least 2 answers to compare")
    if args.num_generations < args.clusters * args.min_cluster:
        raise UserError(f"--num_generations {args.num_generations} cannot fill --clusters {args.clusters} of at least "
                        f"--min_cluster {args.min_cluster} answers")
    run = Run(args)
    embed = ngrams if args.embedder == "ngrams" else Embedder(args.embedder, run.device)
    problems, held_out = load_problems(args.dataset), load_problems(args.eval_dataset)
    policy, processor = load_policy(args.model, run, train=True)
    reference = load_policy(args.model, run)[0] if args.beta else None
    run.state["beta"] = args.beta
    run.begin(policy, processor, problems, held_out)

    for step in run.steps():
        # --- sample: G answers to each of this step's problems --------------------------------------------------------
        rollout = sample(
            policy, processor, run.draw(problems, step), args.num_generations, seed=(args.seed, step),
            max_completion_length=args.max_completion_length, temperature=args.temperature,
            sample_batch_size=args.sample_batch_size,
        )
        mask_BT = rollout.mask_BT
        run.lap("sample")

        # --- score: how good is each answer? --------------------------------------------------------------------------
        accuracy_PG, format_PG = rollout.score(grade), rollout.score(format_reward)
        embeddings_PGD = embed([reasoning(text) for text in rollout.texts]).split(args.num_generations)
        seeds = [generator(args.seed, step, p["id"], "clusters").initial_seed() for p in rollout.prompts.problems]
        labels_PG = [partition(e_GD, args.clusters, args.min_cluster, s) for e_GD, s in zip(embeddings_PGD, seeds)]
        diversity_PG = torch.stack([diversity(*pair) for pair in zip(embeddings_PGD, labels_PG)]).to(run.device)
        weight = diversity_weight(step, args.max_steps, args.diversity_weight, args.min_diversity_weight)
        plain_PG = 0.9 * accuracy_PG + 0.1 * format_PG
        rewards_PG = plain_PG + weight * rollout.score(is_right) * diversity_PG

        # --- credit: how much of it does each token carry? ------------------------------------------------------------
        competing = zip(rewards_PG, labels_PG)  # each answer with those of its own cluster only
        advantages_PG = torch.stack([cluster_advantages(*pair, args.balance) for pair in competing])
        advantage_BT = advantages_PG.view(-1, 1).expand_as(mask_BT)
        live_B = (advantages_PG != 0).any(1).repeat_interleave(args.num_generations) | (args.beta > 0)
        weight_BT = token_weights(mask_BT, args.average)
        if args.mask_truncated:
            weight_BT = weight_BT * rollout.finished_B[:, None]
        plan = run.plan(rollout, live_B)
        passes = [index_b for update in plan for index_b, _ in update]

        # --- update: move towards the answers with credit -------------------------------------------------------------
        with torch.no_grad():  # π_old is the policy before the first of the updates, not before each
            several = args.updates_per_step > 1
            old_logp_BT = read(token_logps, rollout, policy, batches=passes) if several else None
            ref_logp_BT = read(token_logps, rollout, reference, batches=passes) if reference else None
        metrics = update(run, policy, rollout, plan, advantage_BT, weight_BT, old_logp_BT, ref_logp_BT)
        run.lap("update")

        # --- log ------------------------------------------------------------------------------------------------------
        metrics |= dict(
            reward=run.mean(rewards_PG), reward_std=run.mean(rewards_PG.std(1)), accuracy=run.mean(accuracy_PG),
            format=run.mean(format_PG), frac_reward_zero_std=run.mean((advantages_PG == 0).all(1).float()),
        )
        metrics |= dict(diversity_weight=weight) | cluster_metrics(run, embeddings_PGD, labels_PG, plain_PG, rewards_PG)
        if reference:
            metrics["beta"] = run.state["beta"]
            answers = args.prompts_per_step * args.num_generations
            run.state["beta"] = adapted_beta(run.state["beta"], metrics["kl"], args.kl_target, answers)
        if step == args.max_steps:
            rows = cluster_rows(step, rollout, embeddings_PGD, labels_PG, accuracy_PG)
            run.append(run.path("clusters.jsonl"), rows)
        run.log(step, rollout, rewards_PG.flatten(), **metrics)


if __name__ == "__main__":
    launch("mupo", main, __doc__, flags, RECIPE, TOY)

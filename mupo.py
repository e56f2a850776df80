"""MUPO: multi-group policy optimisation, many ways of thinking kept alive.

Why care: GRPO lets one way of reasoning win, because whatever is a little better takes all. A model that has forgotten
its other ways gains nothing from a second try. MUPO lets answers compete only with answers that reason alike.

Paper: MUPO, arXiv 2604.00479. A problem's G answers (the paper's N) are embedded by their reasoning and split into K
clusters C_k of at least G_min answers (constrained k-means, Bradley et al. 2000). Answers compete inside their own
cluster only, and right answers earn a bonus for being far from the other clusters. With e_i the normalised embedding
of answer i:

    R_div(i) = mean of 1 − cos(e_i, e_j) over the answers j of other clusters                                   (1)
    R_i      = 0.9·accuracy + 0.1·format + λ(t)·[i is right]·R_div(i)                                           (2)
    λ(t)     = λ_min + ½(λ_max − λ_min)·(1 + cos(π·t/t_max))                                                    (3)
    A_i      = w_k·(R_i − mean_k R)/(std_k R + 1e-6),     w_k = (G/(K·|C_k|))^γ                                 (4)
    L        = Σ_bt weight_bt·ℓ_bt / Σ_bt weight_bt       ℓ as in grpo.py, eq. (2) and (3): GRPO's clipped loss (5)

In the paper, (1) to (3) are its equations (5) to (7), (4) is its (4), and w_k and the sum (5) are its (3); its (1)
and (2) are GRPO's. γ is the paper's β: here β is the weight of the KL, as in all scripts. At γ = 1 every cluster
weighs the same, whatever its size. A cluster of one has A = 0; with K = 1, R_div = 0. The rest, AdamW and packed rows
included, is as in grpo.py.

Departures from the paper, and where its released code differs:
 1. The paper's equation (3) averages inside each cluster and also multiplies by w_k. The released code and this file
    only multiply each advantage by w_k; --balance 2 is the paper's equation with its β at 1, up to a constant.
 2. The ratio is per token, the paper writes it per sequence.
 3. The released code decays λ exponentially, rewards (0.9 − w)·accuracy + 0.1·format + w·2·R_div and has the partition
    commented out; this follows the paper.
 4. ε_high = 0.28, 0.9·accuracy and up to 4,194,304 pixels of a picture are the released code's; the paper has one ε.
 5. The paper gives no batch. 384 problems and updates of 128 are both released scripts'; 200 steps of them are the
    paper's two epochs of ViRL39K. The axes of its figures (350 steps) rather say 200 problems a step. t_max is the
    number of steps. The 2,048 tokens of an answer and 6,144 of a prompt are ours.
 6. The released 7B script is plain GRPO (K = 1, 5 answers); the 3B script has K = 2, 12 answers, λ = 0.2, a KL and
    4,096 tokens. Both train the vision tower (here --train_vision), filter groups online and sample with top-p 0.99.
 7. k-means++ and 32 restarts are ours; so is what counts as reasoning where <think> is missing (harness/embedding.py).
    What counts as right is ours too: an IoU of at least .5 for a box, any reward above 0 for free text.
A danger to watch: in a cluster whose answers are all right and well-formed only R_div varies, and the z-score of (4)
scales even tiny differences to unit variance. The metric only_diversity_clusters is the share of such clusters. So
TOY, unlike the paper, has a tenth of the bonus: with all of it nothing was learned on the first tabletop.

Shapes: P problems, G answers to each, B = P·G answers, T tokens of the longest, D size of an embedding, K clusters.

    python mupo.py                                                              a laptop, minutes
    accelerate launch mupo.py --model Qwen/Qwen2.5-VL-7B-Instruct --dataset ViRL39K/FILE.parquet --train_vision \
        --skip_bad_rows                           the paper's size, several GPUs; a local copy, its pictures unpacked

ViRL39K keeps its pictures in an archive beside its table: download both, unpack the archive, and name the table's file.

A healthy run: diversity stays up where grpo.py's falls, accuracy does not fall, smallest_cluster is at least G_min.
On the tabletop, in a world where each way of reasoning solves what another cannot (results/ways.json, five seeds),
three clusters keep the diversity of reasoning at .40 against GRPO's .12. The price is pass@1: .70 against GRPO's .89.
"""

import math

from common import (
    UserError,
    evaluate,
    finish,
    format_reward,
    grade,
    is_right,
    load_judge,
    load_policy,
    load_problems,
    read,
    sample,
    token_logps,
    trained_weights,
)
from harness.diagnostics import record_clusters
from harness.embedding import load_embedder, reasoning
from harness.flags import at_least, launch, not_negative, share
from harness.prompts import check_problems
from harness.run import Run, learning_rate, seed_of
from harness.sharding import clip_gradients
from harness.updates import plan_updates

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

# --- the algorithm ----------------------------------------------------------------------------------------------------


def group_advantages(rewards_PG):
    """(P, G) → (P, G). GRPO's eq. (1); exactly 0 where a group's rewards are equal, even if rounding says otherwise."""
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    advantages_PG = centred_PG / (rewards_PG.std(1, keepdim=True) + 1e-6)
    equal_P1 = rewards_PG.amax(1, keepdim=True) == rewards_PG.amin(1, keepdim=True)  # trap: group std
    return advantages_PG.masked_fill(equal_P1, 0.0)


def policy_loss(logp_BT, old_logp_BT, advantage_BT, epsilon, epsilon_high):
    """(B, T) → (B, T), per token and unreduced. GRPO's eq. (2) and (3)."""
    ratio_BT = torch.exp(logp_BT - old_logp_BT)
    clipped_BT = ratio_BT.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)


def is_clipped(logp_BT, old_logp_BT, advantage_BT, epsilon, epsilon_high):
    """(B, T) of 0/1: where the clip of GRPO's eq. (3) takes the gradient away."""
    ratio_BT = torch.exp(logp_BT - old_logp_BT)
    too_good_BT = (ratio_BT > 1 + epsilon_high) & (advantage_BT > 0)
    too_bad_BT = (ratio_BT < 1 - epsilon) & (advantage_BT < 0)
    return (too_good_BT | too_bad_BT).float()


def token_weights(mask_BT, average):
    """(B, T) → (B, T). "token": every token weighs 1. "answer": every answer weighs 1, each of its tokens 1/|o_b|."""
    if average == "token":
        return mask_BT
    return mask_BT / mask_BT.sum(1, keepdim=True)


def k3(logp_BT, ref_logp_BT):
    """(B, T) → (B, T). GRPO's eq. (5): never negative, 0 where the policies agree, unbiased for KL(π_θ‖π_ref)."""
    d_BT = ref_logp_BT - logp_BT  # trap: kl
    return torch.exp(d_BT) - d_BT - 1


def adapted_beta(beta, kl, target, answers):
    """β after a step of `answers` answers: raised if their mean KL is above the target, else lowered (Ziegler 2019)."""
    if not target:
        return beta
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * answers / 10_000)


def assign(distance_GK, min_size):
    """The cheapest assignment of G points to K centroids with at least `min_size` points each: (G, K) → labels (G,).

    A matching of points to seats: each centroid has `min_size` seats that must be taken, at the distance to it; the
    seats left over are free, at the distance to the nearest centroid.
    """
    G, K = distance_GK.shape
    nearest_G1 = distance_GK.min(1, keepdims=True)
    must_be_taken = np.repeat(distance_GK, min_size, axis=1)
    free = np.repeat(nearest_G1, G - K * min_size, axis=1)
    _, seat_G = linear_sum_assignment(np.concatenate([must_be_taken, free], axis=1))
    return np.where(seat_G < K * min_size, seat_G // max(1, min_size), distance_GK.argmin(1))


def spread_seeds(apart_GG, clusters, random):
    """k-means++: indices of `clusters` points, each drawn in proportion to its squared distance to the nearest yet."""
    G = len(apart_GG)
    chosen = [random.integers(G)]
    while len(chosen) < clusters:
        near_G = apart_GG[chosen].min(0) + 1e-12  # where all points coincide, any will do
        chosen.append(random.choice(G, p=near_G / near_G.sum()))
    return chosen


def k_means(apart_GG, chosen, clusters, min_size):
    """Lloyd's algorithm from the points `chosen`, until the cost stops falling: labels (G,) and their cost."""
    places = np.arange(len(apart_GG))
    next_G = assign(apart_GG[:, chosen], min_size)
    labels_G = next_G
    cost = np.inf
    while True:
        # (G, K): 1/|C_k| where point g is in cluster k
        member_GK = np.eye(clusters)[next_G] / np.bincount(next_G, minlength=clusters)
        # ‖x − c‖² for a mean c needs no c: the mean ‖x − m‖² over the members m, minus half the mean ‖m − m'‖².
        spread_K = np.einsum("gk,gh,hk->k", member_GK, apart_GG, member_GK) / 2
        distance_GK = apart_GG @ member_GK - spread_K
        next_cost = distance_GK[places, next_G].sum()
        if next_cost >= cost - 1e-12:
            return labels_G, cost
        labels_G = next_G
        cost = next_cost
        next_G = assign(distance_GK, min_size)


def partition(embeddings_GD, clusters, min_size, seed, restarts=32):
    """Constrained k-means: normalised embeddings (G, D) → labels (G,) below `clusters`, each at least min_size times.

    Squared Euclidean distances; the best of `restarts`; a function of its arguments alone. UserError where G answers
    cannot fill the clusters.
    """
    G = len(embeddings_GD)
    if clusters * min_size > G:
        raise UserError(f"{G} answers cannot fill {clusters} clusters of at least {min_size}: raise --num_generations, "
                        "or lower --clusters or --min_cluster")
    if clusters == 1:
        return torch.zeros(G, dtype=torch.long)
    gram_GG = (embeddings_GD.double() @ embeddings_GD.double().T).numpy()
    norm_G = gram_GG.diagonal()
    apart_GG = np.maximum(norm_G[:, None] + norm_G - 2 * gram_GG, 0)
    random = np.random.default_rng(seed)
    lowest = np.inf
    for _ in range(restarts):
        labels_G, cost = k_means(apart_GG, spread_seeds(apart_GG, clusters, random), clusters, min_size)
        if cost < lowest - 1e-12:
            lowest = cost
            best_G = labels_G
    return torch.from_numpy(best_G)


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
    advantages_G = torch.zeros_like(rewards_G)
    names = labels_G.unique()
    for name in names:
        members = (labels_G == name).nonzero()[:, 0]
        if len(members) > 1:
            weight = (len(rewards_G) / (len(names) * len(members))) ** balance
            advantages_G[members] = weight * group_advantages(rewards_G[None, members])[0]
    return advantages_G


# --- the run ----------------------------------------------------------------------------------------------------------

RECIPE = dict(
    dataset="TIGER-Lab/ViRL39K@train", num_generations=15, epsilon_high=0.28, prompts_per_step=384, updates_per_step=3,
    learning_rate=1e-6, max_completion_length=2048, max_steps=200, min_pixels=262_144, max_pixels=4_194_304,
    max_prompt_length=6144,
)
TOY = dict(
    dataset="toy@train", eval_dataset="toy@test", prompts_per_step=48, updates_per_step=4, learning_rate=2e-4,
    warmup_steps=5, max_steps=25, max_completion_length=64, micro_batch_size=64, train_vision=True,
    gradient_checkpointing=False, num_generations=15, embedder="ngrams", min_pixels=784,
    diversity_weight=0.04, min_diversity_weight=0.01,  # a tenth of the paper's
)


def flags(parser):
    parser.add_argument("--epsilon", type=not_negative, default=0.2, help="ε_low, how far the ratio may fall")
    parser.add_argument("--epsilon_high", type=not_negative, default=0.2, help="ε_high, how far the ratio may rise")
    parser.add_argument("--average", choices=("token", "answer"), default="token",
                        help="average over all tokens, or within each answer first")
    parser.add_argument("--beta", type=not_negative, default=0.0, help="β, weight of the KL to the starting model")
    parser.add_argument("--kl_target", type=not_negative, default=0.0, help="adapt β towards this KL (0: β stays)")
    parser.add_argument("--mask_truncated", action="store_true",
                        help="leave truncated answers out of the loss (the KL keeps them)")
    parser.add_argument("--format_weight", type=share, default=0.1,
                        help="weight of the format reward; accuracy gets the rest")
    parser.add_argument("--clusters", type=at_least(1), default=3, help="K, clusters that a group is split into")
    parser.add_argument("--min_cluster", type=at_least(1), default=3, help="G_min, answers that a cluster has at least")
    parser.add_argument("--balance", type=not_negative, default=1.0,
                        help="γ of eq. (4): at 1 every cluster weighs the same")
    parser.add_argument("--diversity_weight", type=not_negative, default=0.4, help="λ_max, before the first step")
    parser.add_argument("--min_diversity_weight", type=not_negative, default=0.1, help="λ_min, at the last step")
    parser.add_argument("--embedder", default="Qwen/Qwen3-Embedding-0.6B", help="a sentence-embedding model, or ngrams")


def check_flags(args):
    """UserError for flags that make no sense together."""
    if args.num_generations < 2:
        raise UserError(f"--num_generations is {args.num_generations}: a group needs at least 2 answers to compare")
    if args.kl_target and not args.beta:
        raise UserError("--kl_target adapts β, which is 0: give --beta too")


def check_clusters(args):
    """UserError where a group has too few answers for its clusters."""
    if args.num_generations < args.clusters * args.min_cluster:
        raise UserError(f"--num_generations {args.num_generations} cannot fill --clusters {args.clusters} of at least "
                        f"--min_cluster {args.min_cluster} answers")


def update(run, policy, optimizer, rollout, *, plan, advantage_BT, weight_BT, old_logp_BT, ref_logp_BT):
    """The optimiser updates of one rollout, GRPO's eq. (2) to (5). Returns their metrics, averaged over the updates.

    old_logp_BT is None when there is one update only: then π_old is the policy being read, ρ is 1 and the gradient is
    REINFORCE's. ref_logp_BT is None without a reference.
    """
    args = run.args
    mask_BT = rollout.mask_BT
    grad_norms = []
    for part in plan:
        # Both normalisers are summed over all passes and processes before the first pass.  # trap: normaliser
        total_weight = run.sum(weight_BT[part.answers].sum()).clamp_min(1e-6)
        total_tokens = run.sum(mask_BT[part.answers].sum())
        for batch in part:
            logp_bT = read(token_logps, rollout[batch], policy)
            old_logp_bT = logp_bT.detach() if old_logp_BT is None else old_logp_BT[batch]  # trap: ratio
            advantage_bT = advantage_BT[batch]
            clip = dict(epsilon=args.epsilon, epsilon_high=args.epsilon_high)
            loss_bT = policy_loss(logp_bT, old_logp_bT, advantage_bT, **clip)
            clipped_bT = is_clipped(logp_bT, old_logp_bT, advantage_bT, **clip)
            loss = (loss_bT * weight_BT[batch]).sum() / total_weight
            numbers = dict(clip_fraction=(clipped_bT * weight_BT[batch]).sum() / total_weight)
            if ref_logp_BT is not None:
                kl = (k3(logp_bT, ref_logp_BT[batch]) * mask_BT[batch]).sum() / total_tokens
                loss = loss + run.state["beta"] * kl
                numbers["kl"] = kl
            part.backward(batch, loss, **numbers)
            part.compare(batch, old_logp_bT)
        grad_norms.append(clip_gradients(policy, args.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
    return dict(plan.metrics(), grad_norm=run.mean(torch.tensor(grad_norms, dtype=torch.float64)))


def main(args):
    check_flags(args)
    check_clusters(args)
    run = Run(args)
    embed = load_embedder(args.embedder, run.device)
    problems = load_problems(args.dataset, run)
    held_out = load_problems(args.eval_dataset, run)
    policy, processor = load_policy(args.model, run, train=True)
    reference = load_policy(args.model, run)[0] if args.beta else None
    optimizer = torch.optim.AdamW(trained_weights(policy), lr=args.learning_rate, weight_decay=args.weight_decay)
    judge = load_judge(args.reward_model, run)
    problems, held_out = check_problems(run, processor, problems, held_out)
    run.state["beta"] = args.beta
    run.start(policy, optimizer)
    if held_out and run.done == 0:
        run.log(0, evaluate(run, policy, processor, held_out, judge=judge))

    for step in run.steps():
        # --- sample: G answers to each of this step's problems --------------------------------------------------------
        rollout = sample(
            policy, processor, run.batch(problems, step), args.num_generations, seed=(args.seed, step),
            max_completion_length=args.max_completion_length, temperature=args.temperature,
            sample_batch_size=args.sample_batch_size)
        mask_BT = rollout.mask_BT
        run.lap("sample")

        # --- score: how good is each answer? --------------------------------------------------------------------------
        accuracy_PG = rollout.score(grade, judge)
        format_PG = rollout.score(format_reward)
        plain_PG = (1 - args.format_weight) * accuracy_PG + args.format_weight * format_PG
        embeddings_PGD = embed([reasoning(text) for text in rollout.texts]).split(args.num_generations)
        labels_PG = []
        for problem, embeddings_GD in zip(rollout.prompts.problems, embeddings_PGD, strict=True):
            seed = seed_of(args.seed, step, problem["id"], "clusters")
            labels_PG.append(partition(embeddings_GD, args.clusters, args.min_cluster, seed))
        diversity_PG = torch.stack([diversity(*pair) for pair in zip(embeddings_PGD, labels_PG, strict=True)])
        lam = diversity_weight(step, args.max_steps, args.diversity_weight, args.min_diversity_weight)
        rewards_PG = plain_PG + lam * rollout.score(is_right, judge) * diversity_PG.to(run.device)

        # --- credit: how much of it does each token carry? ------------------------------------------------------------
        advantages_PG = torch.stack([  # each answer competes with those of its own cluster only
            cluster_advantages(rewards_G, labels_G, args.balance)
            for rewards_G, labels_G in zip(rewards_PG, labels_PG, strict=True)
        ])
        advantage_BT = advantages_PG.view(-1, 1).expand_as(mask_BT)
        weight_BT = token_weights(mask_BT, args.average)
        if args.mask_truncated:
            weight_BT = weight_BT * rollout.finished_B[:, None]
        # Not reading an answer only saves time. To leave it out of the normaliser, give it weight 0.
        read_B = (advantages_PG != 0).any(1).repeat_interleave(args.num_generations)
        if reference is not None:
            read_B[:] = True  # with a KL every answer has a gradient
        plan = plan_updates(run, rollout, read_B)

        # --- update: move towards the answers with credit -------------------------------------------------------------
        for weights in optimizer.param_groups:
            weights["lr"] = learning_rate(step, args)
        old_logp_BT = None
        ref_logp_BT = None
        with torch.no_grad():
            if args.updates_per_step > 1:  # π_old is the policy before the first of the updates, not before each
                old_logp_BT = read(token_logps, rollout, policy, batches=plan.batches)
            if reference is not None:
                ref_logp_BT = read(token_logps, rollout, reference, batches=plan.batches)
        metrics = update(
            run, policy, optimizer, rollout, plan=plan,
            advantage_BT=advantage_BT, weight_BT=weight_BT, old_logp_BT=old_logp_BT, ref_logp_BT=ref_logp_BT,
        )
        run.lap("update")

        # --- log ------------------------------------------------------------------------------------------------------
        metrics |= dict(
            reward=run.mean(rewards_PG), reward_std=run.mean(rewards_PG.std(1)), accuracy=run.mean(accuracy_PG),
            format=run.mean(format_PG), frac_reward_zero_std=run.mean((advantages_PG == 0).all(1).float()),
            learning_rate=learning_rate(step, args), **rollout.metrics(run),
        )
        metrics |= dict(diversity_weight=lam, r_div=run.mean(diversity_PG))
        metrics |= record_clusters(
            run, rollout, embeddings_PGD, labels_PG, accuracy_PG=accuracy_PG, plain_PG=plain_PG, rewards_PG=rewards_PG)
        if reference is not None:
            metrics["beta"] = run.state["beta"]
            answers = args.prompts_per_step * args.num_generations
            run.state["beta"] = adapted_beta(run.state["beta"], metrics["kl"], args.kl_target, answers)
        if run.due(args.eval_steps):
            metrics |= evaluate(run, policy, processor, held_out, judge=judge)
        run.log(step, metrics, rollout.samples(rewards_PG.flatten()), rollout.pictures)

        # --- checkpoint -----------------------------------------------------------------------------------------------
        if run.due(args.save_steps):
            run.save_checkpoint(step)
        if run.asked_to_end():  # by SIGTERM or SIGUSR1; --resume goes on
            return run.leave(step)

    finish(run, policy, processor)


if __name__ == "__main__":
    launch("mupo", main, flags, doc=__doc__, recipe=RECIPE, toy=TOY)

"""VEPO: vision-entropy policy optimisation, credit for the tokens that see.

Paper: VEPO, arXiv 2606.03937. GRPO's advantage, but only a share k of each answer's tokens carries it: those where the
policy was both unsure and looking. Every sampled answer is read twice by the policy that sampled it, once with the
picture I and once with a noised picture I'. With P_t, Q_t the next-token distributions and M = (P + Q)/2:

    j_t = ½KL(P_t‖M_t) + ½KL(Q_t‖M_t)     h_t = H(P_t)     Δ_t = |H(Q_t) − H(P_t)|          in nats             (1)
    x̂   = (x − min x)/max(1e-8, max x − min x)                       over the tokens of one answer              (2)
    c_t = [1 − (1 − ĵ_t)^α·(1 − Δ̂_t)^(1 − α)]·ĥ_t                                                               (3)
    weight_t = 1 for the ⌈k·|o|⌉ highest c_t of each answer, else 0                                             (4)
    L = Σ_bt weight_bt·ℓ_bt / Σ_bt weight_bt        ℓ as in grpo.py, eq. (2) and (3): GRPO's clipped loss       (5)

α balances the two visual signals; entropy multiplies them. (5) divides by the number of tokens kept. Distributions are
over the full vocabulary, at the sampling temperature.

Departures from the paper and its released code:
 1. The noise of I' is drawn once for each picture and rollout, on the normalised pixels, and is the same for the whole
    group. The released code adds it again for each answer of the group; the paper speaks of diffusion step 500.
 2. No entropy bonus (the released code: 1e-3).
 3. Groups whose advantages are all zero are not read: they have no gradient. Their kept tokens still count in (5).
The KL term, where --beta asks for one, averages over all tokens, kept or not.

--select runs the paper's baselines and ablations; --select all is grpo.py. See also VPPO (KL of the sampled token, top
40%, divided by all tokens), PAPO, and the 80/20 rule (entropy alone: --select entropy).

Shapes: P problems, G answers to each, B = P·G answers, T tokens of the longest, N tokens of a chunk, V vocabulary.

    python vepo.py                                                              a laptop, minutes
    accelerate launch vepo.py --model Qwen/Qwen2.5-VL-7B-Instruct               the paper's size, several GPUs

A healthy run: as grpo.py's; jsd is well above 0 (else the policy does not look), and missed_by_entropy stays large:
what looks is not what hesitates. With one update per rollout the ratio is 1: the loss says nothing.
"""

from fractions import Fraction
from math import ceil, log

import torch

from common import (
    Reading, Run, UserError, format_reward, generator, grade, launch, load_policy, load_problems, read, sample,
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


def visual_signals(logits_NV, noised_logits_NV):
    """Eq. (1): (…, V) twice → jsd, delta_entropy, entropy, each (…), in nats; jsd is in [0, ln 2]."""
    logp_NV, logq_NV = logits_NV.log_softmax(-1), noised_logits_NV.log_softmax(-1)
    logm_NV = torch.logaddexp(logp_NV, logq_NV) - log(2)
    kl_p, kl_q = ((x.exp() * (x - logm_NV)).sum(-1) for x in (logp_NV, logq_NV))
    entropy, noised_entropy = (-(x.exp() * x).sum(-1) for x in (logp_NV, logq_NV))
    return (kl_p / 2 + kl_q / 2).clamp(0, log(2)), (noised_entropy - entropy).abs(), entropy


def min_max(signal_BT, mask_BT):
    """Eq. (2): (B, T) → (B, T) in [0, 1], over the valid tokens of each answer; 0 elsewhere and where all are equal."""
    low_B1 = signal_BT.masked_fill(mask_BT == 0, torch.inf).amin(1, keepdim=True)
    high_B1 = signal_BT.masked_fill(mask_BT == 0, -torch.inf).amax(1, keepdim=True)
    return ((signal_BT - low_B1) / (high_B1 - low_B1).clamp_min(1e-8)).masked_fill(mask_BT == 0, 0.0)


def vision_entropy_score(jsd_BT, delta_entropy_BT, entropy_BT, mask_BT, alpha, select="vepo", uniform_BT=None):
    """Eq. (2) and (3), or another line of SCORES: (B, T) each → (B, T), in [0, 1] up to rounding."""
    normal = [min_max(signal_BT, mask_BT) for signal_BT in (jsd_BT, delta_entropy_BT, entropy_BT)]
    return SCORES[select](*normal, alpha, uniform_BT)


# Each from normalised jsd j, delta_entropy d and entropy h (B, T), α, and uniforms u (B, T).
SCORES = dict(
    vepo=lambda j, d, h, a, u: (1 - (1 - j) ** a * (1 - d) ** (1 - a)) * h,
    all=lambda j, d, h, a, u: h,  # kept whole, whatever the score: grpo.py
    entropy=lambda j, d, h, a, u: h,
    jsd=lambda j, d, h, a, u: j,
    delta_entropy=lambda j, d, h, a, u: d,
    random=lambda j, d, h, a, u: u,
    ungated=lambda j, d, h, a, u: 1 - (1 - j) ** a * (1 - d) ** (1 - a),
    linear=lambda j, d, h, a, u: (a * j + (1 - a) * d) * h,
    product=lambda j, d, h, a, u: j * d * h,
)


def top_fraction(score_BT, mask_BT, fraction):
    """Eq. (4): (B, T) → (B, T) of 0/1. Exactly ⌈fraction·n⌉ of an answer's n tokens; of equal scores the earlier."""
    exact = Fraction(str(fraction))  # in floats 0.28·25 is above 7, and 8 would be kept
    kept_B1 = torch.tensor([[ceil(exact * int(n))] for n in mask_BT.sum(1)], device=mask_BT.device)
    order_BT = score_BT.masked_fill(mask_BT == 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank_BT = order_BT.argsort(dim=1)
    return (rank_BT < kept_B1).to(mask_BT.dtype)


def uniforms(rollout, seed):
    """(B, T) uniform numbers for --select random, a function of the seed, the problem and the answer's number."""
    G, T = len(rollout) // len(rollout.prompts.problems), rollout.mask_BT.shape[1]
    rows = [torch.rand(T, generator=generator(*seed, problem["id"], "select", b % G))
            for b, problem in enumerate(rollout.problems)]
    return torch.stack(rows).to(rollout.mask_BT.device)


def counterfactual(prompts, kind, std, seed):
    """I' for every problem: its normalised patches plus Gaussian noise, one draw for the whole group, or all zero."""
    if kind == "blank":
        return [torch.zeros_like(pixels) for pixels in prompts.pixels]
    return [pixels + std * torch.randn(pixels.shape, generator=generator(*seed, problem["id"], "noise"))
            for pixels, problem in zip(prompts.pixels, prompts.problems)]


def diagnostics(run, signals, kept_BT, mask_BT):
    """What the signals say of this rollout's tokens (mask_BT: those that were read), over all processes."""
    jsd_BT, delta_BT, entropy_BT = signals
    tops = [top_fraction(signal_BT, mask_BT, 0.2) for signal_BT in (jsd_BT, entropy_BT)]
    dropped_BT = mask_BT - kept_BT * mask_BT
    j, h = (x - run.mean(x, mask_BT) for x in (jsd_BT, entropy_BT))
    spread = (run.mean(j * j, mask_BT) * run.mean(h * h, mask_BT)).sqrt().clamp_min(1e-12)
    return dict(
        jsd=run.mean(jsd_BT, mask_BT), delta_entropy=run.mean(delta_BT, mask_BT),
        kept_fraction=run.mean(kept_BT, mask_BT), missed_by_entropy=run.mean(1 - tops[1], tops[0]),
        jsd_entropy_correlation=run.mean(j * h, mask_BT) / spread,
        jsd_kept=run.mean(jsd_BT, kept_BT * mask_BT), jsd_dropped=run.mean(jsd_BT, dropped_BT),
        entropy_kept=run.mean(entropy_BT, kept_BT * mask_BT), entropy_dropped=run.mean(entropy_BT, dropped_BT),
    )


def signal_rows(step, processor, rollout, signals, live_B):
    """Lines of signals.jsonl, from which the end of a run draws signals.png and tokens.html: some answers, by token."""
    rows = []
    for b in live_B.nonzero()[::8, 0].tolist()[:64]:
        n, problem = int(rollout.mask_BT[b].sum()), rollout.problems[b]
        tokens = processor.tokenizer.batch_decode(rollout.tokens_BT[b, :n, None])
        values = {name: [round(value, 4) for value in x_BT[b, :n].tolist()] for name, x_BT in signals.items()}
        rows.append(dict(step=step, id=problem["id"], problem=problem["problem"], tokens=tokens, **values))
    return rows


def look(logits_NV, noised_logits_NV, tokens_N):
    """What the two readings leave of each token: eq. (1), and log π_old for the updates."""
    return *visual_signals(logits_NV, noised_logits_NV), token_logps(logits_NV, tokens_N)


# --- the run ----------------------------------------------------------------------------------------------------------

RECIPE = dict(
    num_generations=12, prompts_per_step=512, updates_per_step=4, learning_rate=1e-6, max_completion_length=2048,
)
TOY = dict(
    dataset="toy@train", eval_dataset="toy@test", prompts_per_step=64, updates_per_step=4, learning_rate=2e-4,
    warmup_steps=5, max_steps=70, max_completion_length=64, micro_batch_size=64, train_vision=True,
    gradient_checkpointing=False, num_generations=8,
)


def flags(parser):
    parser.add_argument("--epsilon", type=float, default=0.2, help="ε_low, how far the ratio may fall")
    parser.add_argument("--epsilon_high", type=float, default=0.2, help="ε_high, how far the ratio may rise")
    parser.add_argument("--average", choices=("token", "answer"), default="token", help="what counts the same")
    parser.add_argument("--beta", type=float, default=0.0, help="β, weight of the KL to the starting model")
    parser.add_argument("--kl_target", type=float, default=0.0, help="adapt β towards this KL (0: β stays)")
    parser.add_argument("--select", choices=list(SCORES), default="vepo", help="which score picks the tokens")
    parser.add_argument("--keep", type=float, default=0.2, help="k, the share of an answer's tokens that is kept")
    parser.add_argument("--alpha", type=float, default=0.7, help="α, weight of the JSD against the entropy shift")
    parser.add_argument("--counterfactual", choices=("noise", "blank"), default="noise", help="what I' is")
    parser.add_argument("--noise_std", type=float, default=2.0, help="standard deviation of I' noise, in pixel stds")
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
    if not (0 < args.keep <= 1 and 0 <= args.alpha <= 1):
        raise UserError(f"--keep is {args.keep} and --alpha {args.alpha}; they must lie in (0, 1] and [0, 1]")
    run = Run(args)
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
        rewards_PG = 0.9 * accuracy_PG + 0.1 * format_PG

        # --- credit: how much of it does each token carry? ------------------------------------------------------------
        advantages_PG = group_advantages(rewards_PG)
        advantage_BT = advantages_PG.view(-1, 1).expand_as(mask_BT)
        live_B = (advantages_PG != 0).any(1).repeat_interleave(args.num_generations) | (args.beta > 0)
        weight_BT = token_weights(mask_BT, args.average)
        if args.mask_truncated:
            weight_BT = weight_BT * rollout.finished_B[:, None]
        plan = run.plan(rollout, live_B)
        passes = [index_b for update in plan for index_b, _ in update]
        other = counterfactual(rollout.prompts, args.counterfactual, args.noise_std, (args.seed, step))
        with torch.no_grad():  # by the policy that sampled: its log-probs are π_old's, so nothing is read twice
            *signals, old_logp_BT = read(look, rollout, policy, Reading(policy, other), batches=passes)
        uniform_BT = uniforms(rollout, (args.seed, step))
        score_BT = vision_entropy_score(*signals, mask_BT, args.alpha, args.select, uniform_BT)
        kept_BT = mask_BT if args.select == "all" else top_fraction(score_BT, mask_BT, args.keep)
        weight_BT = weight_BT * kept_BT

        # --- update: move towards the answers with credit -------------------------------------------------------------
        with torch.no_grad():  # π_old is the policy before the first of the updates, not before each
            old_logp_BT = old_logp_BT if args.updates_per_step > 1 else None
            ref_logp_BT = read(token_logps, rollout, reference, batches=passes) if reference else None
        metrics = update(run, policy, rollout, plan, advantage_BT, weight_BT, old_logp_BT, ref_logp_BT)
        run.lap("update")

        # --- log ------------------------------------------------------------------------------------------------------
        metrics |= dict(
            reward=run.mean(rewards_PG), reward_std=run.mean(rewards_PG.std(1)), accuracy=run.mean(accuracy_PG),
            format=run.mean(format_PG), frac_reward_zero_std=run.mean((advantages_PG == 0).all(1).float()),
        )
        metrics |= diagnostics(run, signals, kept_BT, mask_BT * live_B[:, None])
        if reference:
            metrics["beta"] = run.state["beta"]
            answers = args.prompts_per_step * args.num_generations
            run.state["beta"] = adapted_beta(run.state["beta"], metrics["kl"], args.kl_target, answers)
        if step == args.max_steps:
            named = dict(zip(("jsd", "delta_entropy", "entropy", "score", "kept"), (*signals, score_BT, kept_BT)))
            run.append(run.path("signals.jsonl"), signal_rows(step, processor, rollout, named, live_B))
        run.log(step, rollout, rewards_PG.flatten(), **metrics)


if __name__ == "__main__":
    launch("vepo", main, __doc__, flags, RECIPE, TOY)

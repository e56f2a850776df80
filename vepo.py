"""VEPO: vision-entropy policy optimisation, credit for the tokens that see.

Why care: GRPO spreads an answer's credit over all of its tokens, though few of them look at the picture. VEPO finds
those that do, and gives the credit to tokens where the policy looks at the picture and is unsure.

Paper: VEPO, arXiv 2606.03937. GRPO's advantage, but only a share k of each answer's tokens carries it. Every sampled
answer is read twice by the policy that sampled it, once with the picture I and once with a noised picture I'. With P_t
and Q_t the next-token distributions and M = (P + Q)/2:

    j_t = ½KL(P_t‖M_t) + ½KL(Q_t‖M_t)     h_t = H(P_t)     Δ_t = |H(Q_t) − H(P_t)|          in nats             (1)
    x̂   = (x − min x)/max(1e-8, max x − min x)                       over the tokens of one answer              (2)
    c_t = [1 − (1 − ĵ_t)^α·(1 − Δ̂_t)^(1 − α)]·ĥ_t                                                               (3)
    weight_t = 1 for the ⌈k·|o|⌉ highest c_t of each answer, else 0                                             (4)
    L = Σ_bt weight_bt·ℓ_bt / Σ_bt weight_bt        ℓ as in grpo.py, eq. (2) and (3): GRPO's clipped loss       (5)

Equation numbers are ours; we could not read the paper's own. α balances the two visual signals; entropy multiplies
them. (5) divides by the number of tokens kept. Distributions are over the full vocabulary, at the sampling temperature.
The rest, AdamW and packed rows included, is as in grpo.py.

Departures from the paper and its released code:
 1. The noise of I' is drawn once for each picture and rollout, on the normalised pixels, and is the same for the whole
    group. The released code adds a new draw to the same tensor for each of the group's 12 answers. So the noise adds
    up: for the last answer its std is 2·√12, about 6.9 (--noise_std 6.93). The paper speaks of diffusion step 500.
 2. No entropy bonus (the released code: 1e-3).
 3. Groups whose advantages are all zero are not read (with --beta they are): they have no gradient. Their kept tokens
    still count in (5).
 4. The KL term, where --beta asks for one, averages over all tokens, kept or not.
 5. RECIPE makes 4 updates to a rollout, as the released script says; a flag of that code doubles the batch of an
    update when the noised reading is on, so its runs made 2 (--updates_per_step 2).
 6. The paper trains on about 4,200 problems, Geometry3K and MMK12 mixed, for about 160 steps (20 epochs). It does not
    say which problems of MMK12: the first 2,100 are ours.
 7. --counterfactual blank, a picture of zeros, and the words of the prompt are ours. Of the scores of --select, kl and
    bottom are the released code's, the others the paper's.

--select runs the paper's baselines and ablations, and a control that must fail (bottom); --select all is grpo.py. See
also VPPO (KL of the sampled token, top 40%, divided by all tokens), PAPO, and the 80/20 rule (entropy alone: --select
entropy).

On the tabletop (results/doubt.json, five seeds) VEPO's fifth beats the top fifth by entropy where there is doubt that
does not matter: pass@1 .55 against .47 in toy-see-fillers. Without such doubt it loses in toy-see, .73 against .78,
and is level in toy-think. At equal steps all tokens reach .69, .79 and .80; the top half by VEPO ends within .014 of
them (no interval goes beyond .036). So TOY keeps half. An answer there has some 33 tokens, and a third of them look at
the picture; a 7B writes hundreds, and few of them look. The top 20% by entropy missed 60% and 38% of the top 20% by
JSD in the first two (paper: 41%).

Shapes: P problems, G answers to each, B = P·G answers, T tokens of the longest, N tokens of a chunk, V vocabulary.

    python vepo.py                                                              a laptop, minutes
    accelerate launch vepo.py --model Qwen/Qwen2.5-VL-7B-Instruct               the paper's size, several GPUs

A healthy run: as grpo.py's; jsd is well above 0 (else the policy does not look), and missed_by_entropy stays large: the
tokens that look are not the uncertain ones.
"""

from fractions import Fraction
from math import ceil, log

from common import (
    Reading,
    UserError,
    evaluate,
    finish,
    format_reward,
    grade,
    load_judge,
    load_policy,
    load_problems,
    read,
    sample,
    token_logps,
    trained_weights,
)
from harness.diagnostics import record_signals
from harness.flags import launch, not_negative, share
from harness.prompts import check_problems
from harness.run import Run, generator, learning_rate
from harness.selections import SELECTIONS, kl_of_readings, other_score
from harness.sharding import clip_gradients
from harness.updates import plan_updates

import torch

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


def visual_signals(logits_NV, noised_logits_NV):
    """Eq. (1): (…, V) twice → jsd, delta_entropy, entropy, each (…), in nats; jsd is in [0, ln 2]."""
    logp_NV = logits_NV.log_softmax(-1)
    logq_NV = noised_logits_NV.log_softmax(-1)
    logm_NV = torch.logaddexp(logp_NV, logq_NV) - log(2)
    kl_p = (logp_NV.exp() * (logp_NV - logm_NV)).sum(-1)
    kl_q = (logq_NV.exp() * (logq_NV - logm_NV)).sum(-1)
    jsd = (kl_p / 2 + kl_q / 2).clamp(0, log(2))
    entropy = -(logp_NV.exp() * logp_NV).sum(-1)
    noised_entropy = -(logq_NV.exp() * logq_NV).sum(-1)
    return jsd, (noised_entropy - entropy).abs(), entropy


def min_max(signal_BT, mask_BT):
    """Eq. (2): (B, T) → (B, T) in [0, 1], over the valid tokens of each answer; 0 elsewhere and where all are equal."""
    low_B1 = signal_BT.masked_fill(mask_BT == 0, torch.inf).amin(1, keepdim=True)
    high_B1 = signal_BT.masked_fill(mask_BT == 0, -torch.inf).amax(1, keepdim=True)
    range_B1 = (high_B1 - low_B1).clamp_min(1e-8)
    return ((signal_BT - low_B1) / range_B1).masked_fill(mask_BT == 0, 0.0)


def vision_entropy_score(jsd_BT, delta_entropy_BT, entropy_BT, mask_BT, alpha):
    """Eq. (2) and (3): (B, T) each → (B, T), in [0, 1] up to rounding."""
    j_BT = min_max(jsd_BT, mask_BT)
    d_BT = min_max(delta_entropy_BT, mask_BT)
    h_BT = min_max(entropy_BT, mask_BT)
    return (1 - (1 - j_BT) ** alpha * (1 - d_BT) ** (1 - alpha)) * h_BT


def top_fraction(score_BT, mask_BT, fraction):
    """Eq. (4): (B, T) → (B, T) of 0/1. Exactly ⌈fraction·n⌉ of an answer's n tokens; ties go to the earlier token."""
    exact = Fraction(str(fraction))  # in floats 0.28·25 is above 7, and 8 would be kept
    kept_B1 = torch.tensor([[ceil(exact * int(n))] for n in mask_BT.sum(1)], device=mask_BT.device)
    order_BT = score_BT.masked_fill(mask_BT == 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank_BT = order_BT.argsort(dim=1)
    return (rank_BT < kept_B1).to(mask_BT.dtype)


def counterfactual(prompts, kind, std, seed):
    """I' for every problem: its normalised patches plus Gaussian noise, one draw for the whole group, or all zero."""
    noised = []
    for pixels, problem in zip(prompts.pixels, prompts.problems, strict=True):
        if kind == "blank":
            noised.append(torch.zeros_like(pixels))
        else:
            noise = torch.randn(pixels.shape, generator=generator(*seed, problem["id"], "noise"))
            noised.append(pixels + std * noise)
    return noised


def look(logits_NV, noised_logits_NV, tokens_N):
    """What is kept of the two readings at each token: the signals of eq. (1), and log π_old for the updates."""
    jsd, delta_entropy, entropy = visual_signals(logits_NV, noised_logits_NV)
    return jsd, delta_entropy, entropy, token_logps(logits_NV, tokens_N)


def look_by_kl(logits_NV, noised_logits_NV, tokens_N):
    """The same with KL(P‖Q) in the place of the JSD: --select kl."""
    _, delta_entropy, entropy, logp = look(logits_NV, noised_logits_NV, tokens_N)
    return kl_of_readings(logits_NV, noised_logits_NV, tokens_N), delta_entropy, entropy, logp


# --- the run ----------------------------------------------------------------------------------------------------------

RECIPE = dict(
    dataset="hiyouga/geometry3k@train,FanqingM/MMK12@train:2100", num_generations=12, prompts_per_step=512,
    updates_per_step=4, learning_rate=1e-6, max_completion_length=2048, max_steps=160, min_pixels=262_144,
)
TOY = dict(
    dataset="toy@train", eval_dataset="toy@test", prompts_per_step=64, updates_per_step=4, learning_rate=2e-4,
    warmup_steps=5, max_steps=25, max_completion_length=64, micro_batch_size=64, train_vision=True,
    gradient_checkpointing=False, num_generations=8, keep=0.5, min_pixels=784,
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
    parser.add_argument("--select", choices=SELECTIONS, default="vepo", help="which score picks the tokens")
    parser.add_argument("--keep", type=share, default=0.2, help="k, the share of an answer's tokens that is kept")
    parser.add_argument("--alpha", type=share, default=0.7, help="α, weight of the JSD against the entropy shift")
    parser.add_argument("--counterfactual", choices=("noise", "blank"), default="noise", help="I': noised, or blank")
    parser.add_argument("--noise_std", type=not_negative, default=2.0,
                        help="standard deviation of the noise in I', on normalised pixels")


def check_flags(args):
    """UserError for flags that make no sense together."""
    if args.num_generations < 2:
        raise UserError(f"--num_generations is {args.num_generations}: a group needs at least 2 answers to compare")
    if args.kl_target and not args.beta:
        raise UserError("--kl_target adapts β, which is 0: give --beta too")


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
    if args.keep == 0:
        raise UserError("--keep is 0: no token would carry any credit")
    run = Run(args)
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
        rewards_PG = (1 - args.format_weight) * accuracy_PG + args.format_weight * format_PG

        # --- credit: how much of it does each token carry? ------------------------------------------------------------
        advantages_PG = group_advantages(rewards_PG)
        advantage_BT = advantages_PG.view(-1, 1).expand_as(mask_BT)
        weight_BT = token_weights(mask_BT, args.average)
        if args.mask_truncated:
            weight_BT = weight_BT * rollout.finished_B[:, None]
        # Not reading an answer only saves time. To leave it out of the normaliser, give it weight 0.
        read_B = (advantages_PG != 0).any(1).repeat_interleave(args.num_generations)
        if reference is not None:
            read_B[:] = True  # with a KL every answer has a gradient
        plan = plan_updates(run, rollout, read_B)
        # The policy that sampled the answers reads them with I and with I'. Its log-probs with I are also log π_old.
        noised = counterfactual(rollout.prompts, args.counterfactual, args.noise_std, (args.seed, step))
        looking = look_by_kl if args.select == "kl" else look
        with torch.no_grad():
            jsd_BT, delta_entropy_BT, entropy_BT, old_logp_BT = read(
                looking, rollout, policy, Reading(policy, noised), batches=plan.batches)
        signals = (jsd_BT, delta_entropy_BT, entropy_BT)
        score_BT = vision_entropy_score(*signals, mask_BT, alpha=args.alpha)
        if args.select not in ("vepo", "kl"):  # the paper's baselines and ablations
            normal = [min_max(signal_BT, mask_BT) for signal_BT in signals]
            score_BT = other_score(args.select, rollout, normal, alpha=args.alpha, seed=(args.seed, step))
        kept_BT = mask_BT if args.select == "all" else top_fraction(score_BT, mask_BT, args.keep)
        weight_BT = weight_BT * kept_BT

        # --- update: move towards the answers with credit -------------------------------------------------------------
        for weights in optimizer.param_groups:
            weights["lr"] = learning_rate(step, args)
        if args.updates_per_step == 1:
            old_logp_BT = None  # π_old is then the policy being read
        ref_logp_BT = None
        with torch.no_grad():
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
        named = dict(jsd=jsd_BT, delta_entropy=delta_entropy_BT, entropy=entropy_BT, score=score_BT, kept=kept_BT)
        metrics |= record_signals(run, processor.tokenizer, rollout, read_B, signals=named, top=top_fraction)
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
    launch("vepo", main, flags, doc=__doc__, recipe=RECIPE, toy=TOY)

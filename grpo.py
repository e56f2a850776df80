"""GRPO: group relative policy optimisation of a vision-language model, from rewards that can be checked.

Why care: it is the simplest way to make a model better at what can be graded. It needs no value network and no
preference data, and vepo.py, mupo.py and the forks each change one part of it.

Paper: DeepSeekMath, arXiv 2402.03300, section 4. For each problem the policy samples a group of G answers; an answer
is credited with how much better it is than its group, and every one of its tokens shares that credit:

    A_i  = (R_i − mean R) / (std R + 1e-6)            R = (1 − w)·accuracy + w·format, w = 0.1, std over n − 1   (1)
    ρ_bt = π_θ(o_bt | image, question, o_b,<t) / π_old(o_bt | …)                                                 (2)
    ℓ_bt = −min(ρ_bt·A_b, clip(ρ_bt, 1 − ε_low, 1 + ε_high)·A_b)                                                 (3)
    L    = Σ_bt weight_bt·ℓ_bt / Σ_bt weight_bt  +  β·mean_bt k3_bt                                              (4)
    k3   = exp(d) − d − 1,    d = log π_ref − log π_θ                                                            (5)

In the paper, (2) to (4) are its equation (3) and (5) is its equation (4); the advantage (1) is in section 4.1.2,
unnumbered. Both sums of (4) run over the whole optimiser batch: all micro-batches, all processes. The optimiser is
AdamW. A group is read as one packed row: the picture and the prompt once, then the answers, side by side.

Departures from the paper, as in today's recipes for vision-language models:
 1. weight is 1 on every answer token (a mean over tokens). The paper's mean over each answer first, 1/|o_i|, is
    --average answer: only another weight. A KL term stays a mean over tokens.
 2. β is 0, and then no reference model is loaded. With --beta the reference is the starting model throughout. k3
    averages to KL(π_θ‖π_ref); differentiated as a loss it gives the gradient of KL(π_ref‖π_θ).
 3. The reference is never updated. Rewards come from rules, not from a model, except for answers in free text
    (--reward_model; its scale, OPEN_ENDED_BETA, is ours). The z-score has 1e-6 in its denominator. The weights 0.9 and
    0.1 are EasyR1's (VLAA-Thinker has no format reward: --format_weight 0). Accepting an answer in <answer> tags as
    well-formed is ours.
 4. The vision tower is frozen unless --train_vision.
 5. Groups whose advantages are all zero are not read (with --beta they are): they have no gradient. Their tokens still
    count in (4).
 6. The paper trains a language model. Batch, updates, learning rate, length, number of steps, weight decay and gradient
    norm are EasyR1's, a vision-language code, which itself has G = 5, a KL of 0.01, pictures up to 4,194,304 pixels, a
    trained vision tower and top-p 0.99. Clip and pixels are VEPO's released script's: ε = 0.2, large pictures scaled
    down to 1,000,000 pixels, small ones enlarged to 262,144.
 7. Answers that run into the limit keep their reward and their gradient; --mask_truncated is ours. So are G = 8 and the
    words of the prompt (--instruction).

Shapes: P problems, G answers to each, B = P·G answers, T tokens of the longest; b is the subset of B in one forward
pass. weight is 0 after an answer's end. A tensor holds this process's share only: a number that steers the loop must
first be reduced over all processes, with run.sum or run.mean.

    python grpo.py                                                              a laptop, minutes
    accelerate launch grpo.py --model Qwen/Qwen2.5-VL-7B-Instruct               the paper's size, several GPUs

VLAA-Thinker's GRPO (arXiv 2504.11468) is this file with other flags; results/recipes.md has the command.

A healthy run: accuracy rises, entropy falls, frac_reward_zero_std rises as problems are mastered. sampler_gap stays
tiny (in bf16 about 0.01). With the default of four updates to a rollout the loss stays within a few hundredths of 0,
mostly below it, and says little: watch accuracy. clip_fraction is mostly under 1 per cent; far more means that steps
are too large. With one update (--updates_per_step 1) the ratio is 1, nothing is clipped, and the loss stays near 0.
"""

from common import (
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
from harness.flags import launch, not_negative, share
from harness.prompts import check_problems
from harness.run import Run, learning_rate
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


# --- the run ----------------------------------------------------------------------------------------------------------

RECIPE = dict(
    prompts_per_step=512, updates_per_step=4, learning_rate=1e-6, max_completion_length=2048, min_pixels=262_144,
)
TOY = dict(
    dataset="toy@train", eval_dataset="toy@test", prompts_per_step=64, updates_per_step=4, learning_rate=2e-4,
    warmup_steps=5, max_steps=25, max_completion_length=64, micro_batch_size=64, train_vision=True,
    gradient_checkpointing=False, num_generations=8, min_pixels=784,
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
    launch("grpo", main, flags, doc=__doc__, recipe=RECIPE, toy=TOY)

"""DAPO: decoupled clip and dynamic sampling, GRPO made to keep learning.

Why care: as a model gets better, more and more groups are all right or all wrong and teach nothing; the clip holds back
rare good tokens; answers that run into the limit are punished as if they were wrong. DAPO fixes all three.

Paper: DAPO, arXiv 2503.14476. Everything is grpo.py's but

    clip higher          ε_low = 0.2, ε_high = 0.28 in grpo.py's eq. (3): rare tokens may grow
    dynamic sampling     problems are drawn until P of them have 0 < accuracy of the group < 1
    overlong shaping     R_len = 0 up to T_max − cache tokens, then falling, to −1 at T_max; added to the reward (6')

    R_len(o) = min(0, (T_max − cache − |o|)/cache)                                                               (6')

DAPO's mean over the tokens of the batch is grpo.py's already. The number (6') is ours; we could not read the paper's.

Changes on purpose: none.

Departures from the paper: 2. to 6. of grpo.py. At most --max_draws rollouts are made for a step. If these hold too few
groups that teach, other groups fill the step. Each process fills its own share, so which groups are kept depends on
the number of processes. A group teaches if its accuracies differ. With partial credit that is stricter than
0 < accuracy < 1: a group of boxes that all have IoU .5 does not teach. The reward is grpo.py's, not ±1.

Shapes: as in grpo.py; a group "teaches" when some of its answers are better than others.

    python forks/dapo.py                                                        a laptop, minutes
    accelerate launch forks/dapo.py --model Qwen/Qwen2.5-VL-7B-Instruct         the paper's size, several GPUs

A healthy run: frac_reward_zero_std stays near 0 and draws rises: the price of it. accuracy is that of the chosen
groups, so it cannot rise as grpo.py's does: watch eval_accuracy.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from forks/, Python looks there only

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
from harness.flags import at_least, launch, not_negative, share
from harness.prompts import check_problems
from harness.rollout import join, select_groups
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


def overlong_penalty(lengths_B, longest, cache):
    """(B,) → (B,) in [−1, 0]. Eq. (6'): 0 until `cache` tokens are left, then falling in a line to −1 at `longest`."""
    return ((longest - cache - lengths_B) / cache).clamp(-1, 0)


# --- the run ----------------------------------------------------------------------------------------------------------

RECIPE = dict(
    prompts_per_step=512, updates_per_step=4, learning_rate=1e-6, max_completion_length=2048, epsilon_high=0.28,
    overlong_cache=512, min_pixels=262_144,
)
TOY = dict(
    dataset="toy@train", eval_dataset="toy@test", prompts_per_step=64, updates_per_step=4, learning_rate=2e-4,
    warmup_steps=5, max_steps=22, max_completion_length=64, micro_batch_size=64, train_vision=True,
    gradient_checkpointing=False, num_generations=8, overlong_cache=16, min_pixels=784,
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
    parser.add_argument("--overlong_cache", type=at_least(1), default=512, help="penalised tokens before the limit")
    parser.add_argument("--max_draws", type=at_least(1), default=3, help="rollouts made for a step, at most")


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
    run.state |= dict(beta=args.beta, drawn=0)  # drawn: batches of problems so far, several to a step
    run.start(policy, optimizer)
    if held_out and run.done == 0:
        run.log(0, evaluate(run, policy, processor, held_out, judge=judge))

    for step in run.steps():
        # --- sample: G answers to each of this step's problems --------------------------------------------------------
        rollout = None
        wanted = args.prompts_per_step // run.world
        for draw in range(1, args.max_draws + 1):
            run.state["drawn"] += 1
            more = sample(
                policy, processor, run.batch(problems, run.state["drawn"]), args.num_generations,
                seed=(args.seed, run.state["drawn"]), max_completion_length=args.max_completion_length,
                temperature=args.temperature, sample_batch_size=args.sample_batch_size)
            accuracy_PG = more.score(grade, judge)
            teaches_P = accuracy_PG.amax(1) > accuracy_PG.amin(1)
            places = teaches_P.nonzero()[:, 0].tolist()
            if draw == args.max_draws:  # what does not teach fills the step
                places += (~teaches_P).nonzero()[:, 0].tolist()
            more = select_groups(more, places)
            rollout = more if rollout is None else join(rollout, more)
            if run.sum(len(rollout.prompts.problems) < wanted) == 0:  # no process has too few
                break
        rollout = select_groups(rollout, range(wanted))
        mask_BT = rollout.mask_BT
        run.lap("sample")

        # --- score: how good is each answer? --------------------------------------------------------------------------
        accuracy_PG = rollout.score(grade, judge)
        format_PG = rollout.score(format_reward)
        overlong_B = overlong_penalty(mask_BT.sum(1), args.max_completion_length, args.overlong_cache)
        rewards_PG = (1 - args.format_weight) * accuracy_PG + args.format_weight * format_PG
        rewards_PG = rewards_PG + overlong_B.view_as(rewards_PG)

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
            learning_rate=learning_rate(step, args), draws=draw, **rollout.metrics(run),
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
    launch("dapo", main, flags, doc=__doc__, recipe=RECIPE, toy=TOY)

"""OPD: on-policy distillation, a larger model of the same family reads what the smaller one wrote.

Paper: arXiv 2606.09059 (abstract and captions only, the recipe is ours); the loss is the on-policy reverse KL of GKD,
arXiv 2306.13649. The student samples, the teacher reads the same answers with the same pictures, and at every token
the student moves towards the teacher's whole distribution. With p_t, q_t the student's and the teacher's next-token
distributions behind the same prefix:

    KL_t = KL(p_t‖q_t) = Σ_v p_t(v)·(log p_t(v) − log q_t(v))         full vocabulary, T = 1, in nats            (1)
    L    = Σ_bt m_bt·KL_bt / Σ_bt m_bt                                m is 1 on the tokens of the answers        (2)

Both sums run over the whole optimiser batch: all micro-batches, all processes. There is no reward: accuracy is logged,
never trained on. The gradient goes through p_t of (1), not through the sampling: prefixes are held fixed.

--estimator sampled knows q at the sampled token o_t only, as other implementations do, and is an RL step whose
advantage is the log-ratio:

    A_bt = log q_t(o_t) − log p_t(o_t),        ℓ_bt as in grpo.py, eq. (2) and (3), in place of KL_bt            (3)

Its mean over o_t is the gradient of (1), with more noise.

--estimator forward exchanges p and q in (1): KL(q_t‖p_t) on the student's own answers, the other end of GKD. sft.py
--soft_targets asks for the same on the teacher's answers, so the two differ in nothing but whose answers are read.

Departures:
 1. The gradient of Σ_t KL_t is not that of the sequence KL(π‖π_T), which has one more term,
    E[Σ_t ∇log p_t(o_t)·Σ_{s>t} KL_s], by which a token would answer for the prefixes that it leads to.
 2. The paper fixes neither temperature nor truncation: here T = 1 and the full vocabulary.
 3. The vision tower is frozen unless --train_vision.

Shapes: P problems, G answers to each, B = P·G answers, T tokens of the longest, N tokens of a chunk, V vocabulary.

    python opd.py                                                                         a laptop, minutes
    accelerate launch opd.py --model Qwen/Qwen2.5-VL-7B-Instruct                          the paper's size, several GPUs

The teacher only reads: its weights (2 bytes each) are sharded over all GPUs and gathered one layer at a time; embedding
and head stay gathered. While it is loaded the first process holds it whole in the CPU's memory.

A healthy run: teacher_kl falls fast, then slowly; accuracy rises towards the teacher's; entropy falls if the teacher is
surer than the student, but need not.
"""

import torch

from common import (
    MODEL_FLAGS, ROLLOUT_FLAGS, TRAIN_FLAGS, Run, UserError, format_reward, grade, launch, load_policy, load_problems,
    read, sample, token_logps,
)

# --- the algorithm ----------------------------------------------------------------------------------------------------


def reverse_kl(student_logits, teacher_logits):
    """Eq. (1): (..., V), (..., V) → (...), in nats. The gradient is the student's alone."""
    logp, teacher_logp = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return (logp.exp() * (logp - teacher_logp)).sum(-1)


def forward_kl(student_logits, teacher_logits):
    """KL(q‖p) of teacher q and student p: (..., V), (..., V) → (...), in nats. The gradient is the student's alone."""
    logp, teacher_logp = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return (teacher_logp.exp() * (teacher_logp - logp)).sum(-1)


def policy_loss(logp_BT, old_logp_BT, advantage_BT, epsilon, epsilon_high):
    """(B, T) → (B, T), per token and unreduced. GRPO's eq. (2) and (3)."""
    ratio_BT = torch.exp(logp_BT - old_logp_BT)
    clipped_BT = ratio_BT.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)


def exact(logits_NV, teacher_logits_NV, tokens_N):
    """What a token costs, eq. (1); the same as a number; the sampled token's log-prob. Each (N,)."""
    kl_N = reverse_kl(logits_NV, teacher_logits_NV)
    return kl_N, kl_N.detach(), token_logps(logits_NV.detach(), tokens_N)


def sampled(logits_NV, teacher_logits_NV, tokens_N):
    """The same from the sampled tokens alone, eq. (3). The second is one draw of KL_t: right on average, may be < 0."""
    logp_N = token_logps(logits_NV, tokens_N)
    old_logp_N = logp_N.detach()  # one update per rollout: the policy being read is the one that sampled, ρ is 1
    advantage_N = token_logps(teacher_logits_NV.detach(), tokens_N) - old_logp_N
    return policy_loss(logp_N, old_logp_N, advantage_N, 0.2, 0.2), -advantage_N, old_logp_N


def forward(logits_NV, teacher_logits_NV, tokens_N):
    """As `exact`, but what a token costs is KL(q_t‖p_t). The number that is logged stays that of eq. (1)."""
    _, kl_N, logp_N = exact(logits_NV.detach(), teacher_logits_NV, tokens_N)
    return forward_kl(logits_NV, teacher_logits_NV), kl_N, logp_N


ESTIMATORS = {"exact": exact, "sampled": sampled, "forward": forward}

# --- the run ----------------------------------------------------------------------------------------------------------

RECIPE = dict(prompts_per_step=64, learning_rate=1e-6, max_completion_length=2048)
TOY = dict(
    dataset="toy@train", eval_dataset="toy@test", teacher="toy-teacher", prompts_per_step=64, num_generations=2,
    learning_rate=1.2e-3, lr_scheduler_type="cosine", warmup_steps=10, max_steps=100, max_completion_length=64,
    micro_batch_size=64, train_vision=True, gradient_checkpointing=False, eval_steps=20,
)
# One update per rollout: of the flags of a rollout only G.
TABLES = MODEL_FLAGS, TRAIN_FLAGS, {"num_generations": ROLLOUT_FLAGS["num_generations"]}


def flags(parser):
    parser.add_argument("--teacher", default="Qwen/Qwen2.5-VL-72B-Instruct",
                        help="the model to learn from, of the student's family; in sft.py none: the data's traces")
    parser.add_argument("--estimator", choices=tuple(ESTIMATORS), default="exact",
                        help="what a token costs: eq. (1), (3), or (1) with p and q exchanged")


def check_vocabulary(args, processor, teacher_processor):
    """UserError unless the same ids mean the same words to both: else (1) compares distributions over other things."""
    ours, theirs = (x.tokenizer.get_vocab() for x in (processor, teacher_processor))
    other = sorted(word for word in {*ours, *theirs} if ours.get(word) != theirs.get(word))
    if other:
        raise UserError(f"--teacher {args.teacher} has another tokenizer than {args.model}: {len(other)} words differ, "
                        f"{other[0]!r} for one; distil from a model of the same family")


def distil(run, policy, teacher, rollout):
    """The optimiser update of one rollout, eq. (2); returns its metrics."""
    mask_BT, everything_B = rollout.mask_BT, torch.ones(len(rollout), dtype=torch.bool)
    totals = dict(loss=0.0, teacher_kl=0.0, sampler_gap=0.0)
    tokens = run.sum(mask_BT.sum())  # whole before the first pass: all micro-batches, all processes
    for batch, alive in run.plan(rollout, everything_B)[0]:
        mask_bT = alive * mask_BT[batch]
        loss_bT, kl_bT, logp_bT = read(ESTIMATORS[run.args.estimator], rollout[batch], policy, teacher)
        loss = (loss_bT * mask_bT).sum() / tokens
        (loss * run.world).backward()  # sharded gradients are averaged over the processes, but the loss is a sum
        totals["loss"] += loss.detach()
        totals["teacher_kl"] += (kl_bT * mask_bT).sum() / tokens
        totals["sampler_gap"] += ((logp_bT - rollout.logp_BT[batch]).abs() * mask_bT).sum() / tokens
    return {name: run.sum(total) for name, total in totals.items()} | dict(grad_norm=run.optimizer_step())


def main(args):
    run = Run(args)
    problems, held_out = load_problems(args.dataset), load_problems(args.eval_dataset)
    policy, processor = load_policy(args.model, run, train=True)
    teacher, teacher_processor = load_policy(args.teacher, run)
    check_vocabulary(args, processor, teacher_processor)
    run.begin(policy, processor, problems, held_out)

    for step in run.steps():
        # --- sample: G answers of the student to each of this step's problems -----------------------------------------
        rollout = sample(
            policy, processor, run.draw(problems, step), args.num_generations, seed=(args.seed, step),
            max_completion_length=args.max_completion_length, temperature=args.temperature,
            sample_batch_size=args.sample_batch_size,
        )
        run.lap("sample")

        # --- update: move towards the teacher on the student's own answers --------------------------------------------
        metrics = distil(run, policy, teacher, rollout)
        run.lap("update")

        # --- log: accuracy is watched, nothing learns from it ---------------------------------------------------------
        accuracy_PG = rollout.score(grade)
        metrics |= dict(accuracy=run.mean(accuracy_PG), format=run.mean(rollout.score(format_reward)))
        run.log(step, rollout, accuracy_PG.flatten(), **metrics)


if __name__ == "__main__":
    launch("opd", main, __doc__, flags, RECIPE, TOY, tables=TABLES)

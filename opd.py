"""OPD: on-policy distillation, a larger model of the same family reads what the smaller one wrote.

Why care: a reward says one thing about a whole answer; a teacher says at every token what it would have written there.
Every token of the student's own mistakes becomes a lesson.

Paper: arXiv 2606.09059. We could read only its abstract and captions, so the recipe is ours. The loss is the on-policy
reverse KL of GKD, arXiv 2306.13649. The student samples, the teacher reads the same answers with the same pictures,
and at every token the student moves towards the teacher's whole distribution. Let p_t and q_t be the student's and the
teacher's next-token distributions after the same prefix:

    KL_t = KL(p_t‖q_t) = Σ_v p_t(v)·(log p_t(v) − log q_t(v))         full vocabulary, T = 1, in nats            (1)
    L    = Σ_bt m_bt·KL_bt / Σ_bt m_bt                                m is 1 on the tokens of the answers        (2)

Equation numbers are ours; we could not read the papers' own. The optimiser is AdamW; a group is read as one packed row,
the picture and the prompt once. Both sums of (2) run over the whole optimiser batch: all micro-batches, all processes.
There is no reward: accuracy is logged, never trained on. The gradient goes through p_t of (1), not through the
sampling: prefixes are held fixed.

--estimator sampled uses q at the sampled token o_t only, as other implementations do. It is a policy-gradient step
whose advantage is the log-ratio:

    A_bt = log q_t(o_t) − log p_t(o_t),        ℓ_bt as in grpo.py, eq. (2) and (3), in place of KL_bt            (3)

In expectation over o_t its gradient is that of (1); a single sample of it is noisier.

--estimator forward exchanges p and q in (1): KL(q_t‖p_t) on the student's own answers, the opposite extreme of GKD's
divergences. sft.py --soft_targets minimises the same KL on the teacher's answers, so the two differ only in whose
answers are read.

Departures:
 1. The gradient of Σ_t KL_t is not that of the sequence KL(π‖π_T), which has one more term,
    E[Σ_t ∇log p_t(o_t)·Σ_{s>t} KL_s]. That term holds a token responsible for the prefixes that it leads to.
 2. The paper fixes neither temperature nor truncation: here T = 1 and the full vocabulary.
 3. The vision tower is frozen unless --train_vision. Teacher, batch, answers to a problem, learning rate, number of
    steps and the pixels of a picture are ours too: the paper's text was out of reach.

Shapes: P problems, G answers to each, B = P·G answers, T tokens of the longest, N tokens of a chunk, V vocabulary.

    python opd.py                                                                         a laptop, minutes
    accelerate launch opd.py --model Qwen/Qwen2.5-VL-7B-Instruct                          the paper's size, several GPUs

The teacher only reads: its weights (2 bytes each) are sharded over all GPUs and gathered one layer at a time; embedding
and head stay gathered. While it is loaded the first process holds it whole in the CPU's memory.

A healthy run: teacher_kl falls fast, then slowly; accuracy rises towards the teacher's; entropy falls if the teacher is
surer than the student, but need not.
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
from harness.flags import GROUP_FLAGS, MODEL_FLAGS, TRAIN_FLAGS, launch
from harness.prompts import check_problems
from harness.run import Run, learning_rate
from harness.sharding import clip_gradients
from harness.updates import plan_updates

import torch

# --- the algorithm ----------------------------------------------------------------------------------------------------


def reverse_kl(student_logits, teacher_logits):
    """Eq. (1): (..., V), (..., V) → (...), in nats. The gradient is the student's alone."""
    logp = student_logits.log_softmax(-1)
    teacher_logp = teacher_logits.detach().log_softmax(-1)  # trap: double detach
    return (logp.exp() * (logp - teacher_logp)).sum(-1)


def forward_kl(student_logits, teacher_logits):
    """KL(q‖p) of teacher q and student p: (..., V), (..., V) → (...), in nats. The gradient is the student's alone."""
    logp = student_logits.log_softmax(-1)
    teacher_logp = teacher_logits.detach().log_softmax(-1)
    return (teacher_logp.exp() * (teacher_logp - logp)).sum(-1)


def policy_loss(logp_BT, old_logp_BT, advantage_BT, epsilon, epsilon_high):
    """(B, T) → (B, T), per token and unreduced. GRPO's eq. (2) and (3)."""
    ratio_BT = torch.exp(logp_BT - old_logp_BT)
    clipped_BT = ratio_BT.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)


def exact(logits_NV, teacher_logits_NV, tokens_N):
    """The loss of each token, eq. (1); the same KL, detached, for the log; the sampled token's log-prob. Each (N,)."""
    kl_N = reverse_kl(logits_NV, teacher_logits_NV)
    return kl_N, kl_N.detach(), token_logps(logits_NV.detach(), tokens_N)


def sampled(logits_NV, teacher_logits_NV, tokens_N):
    """The same from the sampled tokens alone, eq. (3). The logged KL is a one-sample estimate: unbiased, may be <0."""
    logp_N = token_logps(logits_NV, tokens_N)
    old_logp_N = logp_N.detach()  # one update per rollout: the policy being read is the one that sampled, ρ is 1
    advantage_N = token_logps(teacher_logits_NV.detach(), tokens_N) - old_logp_N
    loss_N = policy_loss(logp_N, old_logp_N, advantage_N, epsilon=0.2, epsilon_high=0.2)
    return loss_N, -advantage_N, old_logp_N


def forward(logits_NV, teacher_logits_NV, tokens_N):
    """As `exact`, but the loss of a token is KL(q_t‖p_t). The KL that is logged is still that of eq. (1)."""
    _, kl_N, logp_N = exact(logits_NV.detach(), teacher_logits_NV, tokens_N)
    return forward_kl(logits_NV, teacher_logits_NV), kl_N, logp_N


ESTIMATORS = {"exact": exact, "sampled": sampled, "forward": forward}

# --- the run ----------------------------------------------------------------------------------------------------------

RECIPE = dict(prompts_per_step=64, learning_rate=1e-6, max_completion_length=2048, min_pixels=262_144)
TOY = dict(
    dataset="toy@train", eval_dataset="toy@test", teacher="toy-teacher", prompts_per_step=64, num_generations=2,
    learning_rate=1.2e-3, lr_scheduler_type="cosine", warmup_steps=10, max_steps=100, max_completion_length=64,
    micro_batch_size=64, train_vision=True, gradient_checkpointing=False, eval_steps=20, min_pixels=784,
)
TABLES = (MODEL_FLAGS, TRAIN_FLAGS, GROUP_FLAGS)  # no UPDATE_FLAGS: OPD makes one update per rollout


def flags(parser):
    parser.add_argument("--teacher", default="Qwen/Qwen2.5-VL-72B-Instruct",
                        help="teacher model, of the student's family; none (sft.py only): train on given traces")
    parser.add_argument("--estimator", choices=tuple(ESTIMATORS), default="exact",
                        help="loss per token: eq. (1), eq. (3), or eq. (1) with p and q exchanged")


def check_vocabulary(args, processor, teacher_processor):
    """UserError unless both have the same token for every id: otherwise a KL would compare different tokens."""
    ours = processor.tokenizer.get_vocab()
    theirs = teacher_processor.tokenizer.get_vocab()
    other = sorted(word for word in {*ours, *theirs} if ours.get(word) != theirs.get(word))
    if other:
        raise UserError(f"--teacher {args.teacher} and {args.model} have different tokenizers: {len(other)} tokens "
                        f"differ, for example {other[0]!r}; distil from a model of the same family")


def distil(run, policy, optimizer, rollout, teacher):
    """The optimiser update of one rollout, eq. (2). Returns its metrics."""
    plan = plan_updates(run, rollout)
    estimator = ESTIMATORS[run.args.estimator]
    mask_BT = rollout.mask_BT
    total_tokens = run.sum(mask_BT.sum())  # summed over all passes and processes before the first pass
    for part in plan:
        for batch in part:
            mask_bT = mask_BT[batch]
            loss_bT, kl_bT, logp_bT = read(estimator, rollout[batch], policy, teacher)
            gap_bT = (logp_bT - rollout.logp_BT[batch]).abs()
            part.backward(
                batch,
                (loss_bT * mask_bT).sum() / total_tokens,
                teacher_kl=(kl_bT * mask_bT).sum() / total_tokens,
                sampler_gap=(gap_bT * mask_bT).sum() / total_tokens,
            )
    grad_norm = clip_gradients(policy, run.args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return dict(plan.metrics(), grad_norm=grad_norm)


def main(args):
    run = Run(args)
    problems = load_problems(args.dataset, run)
    held_out = load_problems(args.eval_dataset, run)
    policy, processor = load_policy(args.model, run, train=True)
    teacher, teacher_processor = load_policy(args.teacher, run)
    check_vocabulary(args, processor, teacher_processor)
    optimizer = torch.optim.AdamW(trained_weights(policy), lr=args.learning_rate, weight_decay=args.weight_decay)
    judge = load_judge(args.reward_model, run)
    problems, held_out = check_problems(run, processor, problems, held_out)
    run.start(policy, optimizer)
    if held_out and run.done == 0:
        run.log(0, evaluate(run, policy, processor, held_out, judge=judge))

    for step in run.steps():
        # --- sample: G answers of the student to each of this step's problems -----------------------------------------
        rollout = sample(
            policy, processor, run.batch(problems, step), args.num_generations, seed=(args.seed, step),
            max_completion_length=args.max_completion_length, temperature=args.temperature,
            sample_batch_size=args.sample_batch_size)
        run.lap("sample")

        # --- update: move towards the teacher on the student's own answers --------------------------------------------
        for weights in optimizer.param_groups:
            weights["lr"] = learning_rate(step, args)
        metrics = distil(run, policy, optimizer, rollout, teacher=teacher)
        run.lap("update")

        # --- log: accuracy is watched, nothing learns from it ---------------------------------------------------------
        accuracy_PG = rollout.score(grade, judge)
        metrics |= dict(
            accuracy=run.mean(accuracy_PG), format=run.mean(rollout.score(format_reward)),
            learning_rate=learning_rate(step, args), **rollout.metrics(run),
        )
        if run.due(args.eval_steps):
            metrics |= evaluate(run, policy, processor, held_out, judge=judge)
        run.log(step, metrics, rollout.samples(accuracy_PG.flatten()), rollout.pictures)

        # --- checkpoint -----------------------------------------------------------------------------------------------
        if run.due(args.save_steps):
            run.save_checkpoint(step)
        if run.asked_to_end():  # by SIGTERM or SIGUSR1; --resume goes on
            return run.leave(step)

    finish(run, policy, processor)


if __name__ == "__main__":
    launch("opd", main, flags, doc=__doc__, recipe=RECIPE, toy=TOY, tables=TABLES)

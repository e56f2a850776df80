"""SFT: supervised fine-tuning of a vision-language model on written-out reasoning, the usual warm start before RL.

Why care: a model that never writes a right answer learns nothing from rewards. A few hundred good traces get it there;
the paper finds that too many make it recite.

As in VLAA-Thinker (arXiv 2504.11468) and the stage-1 study (arXiv 2606.09059): cross-entropy on the answer alone,

    L = −Σ_bt m_bt·log π_θ(y_bt | image, question, y_b,<t) / Σ_bt m_bt                                           (1)

where m is 1 on the tokens of the trace and on the end token, and both sums run over the whole optimiser batch: all
micro-batches, all processes. Nothing of the prompt is trained on. The optimiser is AdamW; a trace is read in one packed
row with its prompt. Equation numbers are ours; we could not read the papers' own.

The traces are the data set's own (a column `trace`), or with --teacher the teacher's own verified answers to the
given problems: --teacher_samples are sampled to each, and those that are right and well-formed are kept (rejection
sampling). They are kept on disk too, so that another run with the same teacher does not sample again. --traces without
a teacher reads them from a file that was written elsewhere: harness/traces.py says what stands in it.

--soft_targets replaces the trace's single token by the teacher's whole distribution q, the forward KL that
distillation off-policy minimises (Hinton et al., arXiv 1503.02531). It stands between (1), which asks for one word on
the same traces, and opd.py, which asks for a distribution too, but on the student's own answers and in the other
direction of the KL.

    L = Σ_bt m_bt·KL(q_bt‖p_bt) / Σ_bt m_bt          p, q: the student's and the teacher's next-token distributions (2)

Departures:
 1. The papers fix the number of epochs; --early_stop N ends training once the loss on held-out traces has not fallen
    for N evaluations in a row. The weights are then those of the last step, not of the best.
 2. The batch of 128 and 190 steps, an epoch of 25,000 traces, are VLAA-Thinker's (its 126,000 take 985); learning rate,
    cosine, a warm-up of 3%, four samples of a teacher and the pixels of a picture are ours, and so is what counts as
    over-training, ten times the steps. VLAA-Thinker's own code was never released.
 3. The vision tower is frozen unless --train_vision, which is ours too.

Shapes: B traces, T tokens of the longest.

    python sft.py                                                                         a laptop, a minute
    accelerate launch sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --teacher Qwen/Qwen2.5-VL-32B-Instruct

While it samples, a teacher stands whole on every GPU (bf16, 2 bytes a weight, beside its shard). One that does not fit
is refused before it is loaded: have it write its answers elsewhere, and give them with --traces.

A healthy run: loss and eval_loss fall together; where eval_loss turns up, over-training begins.

On the tabletop (results/sft_or_rl.json, five seeds), followed by the same RL, SFT on traces in the model's own style
ends above RL alone: pass@1 .90 against .88. On traces in a foreign style it ends far below: at .13, or at .69 if
over-trained.
"""

import hashlib
import json
import os

from common import (
    UserError,
    evaluate,
    find_model,
    finish,
    forced,
    format_reward,
    is_right,
    load_judge,
    load_policy,
    load_problems,
    read,
    sample,
    token_entropy,
    token_logps,
    trained_weights,
)
from harness.disk import fingerprint
from harness.flags import MODEL_FLAGS, TRAIN_FLAGS, at_least, launch
from harness.memory import check_fits_whole
from harness.problems import WithTraces
from harness.processor import as_seen
from harness.prompts import check_problems, prompt_settings
from harness.run import Run, check_writable, learning_rate
from harness.sharding import clip_gradients
from harness.traces import given_traces
from harness.updates import plan_updates

import torch
from tqdm import tqdm

# --- the algorithm ----------------------------------------------------------------------------------------------------


def forward_kl(student_logits, teacher_logits):
    """KL(q‖p) of teacher q and student p: (..., V), (..., V) → (...), in nats. The gradient is the student's alone."""
    logp = student_logits.log_softmax(-1)
    teacher_logp = teacher_logits.detach().log_softmax(-1)
    return (teacher_logp.exp() * (teacher_logp - logp)).sum(-1)


def hard(logits_NV, tokens_N):
    """The loss of each token of a trace, eq. (1), and the entropy of its distribution, for the log only. Each (N,)."""
    return -token_logps(logits_NV, tokens_N), token_entropy(logits_NV.detach())


def soft(logits_NV, teacher_logits_NV, tokens_N):
    """The loss of each token of a trace, eq. (2), and the entropy of its distribution, for the log only. Each (N,)."""
    return forward_kl(logits_NV, teacher_logits_NV), token_entropy(logits_NV.detach())


def has_stopped_falling(losses, patience):
    """Whether the last `patience` of `losses` all failed to get below the lowest before them."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


# --- the run ----------------------------------------------------------------------------------------------------------

RECIPE = dict(
    prompts_per_step=128, learning_rate=1e-5, lr_scheduler_type="cosine", warmup_ratio=0.03, max_steps=190,
    min_pixels=262_144,
)
TOY = dict(
    dataset="toy@train", eval_dataset="toy@test", prompts_per_step=64, learning_rate=3e-4, warmup_steps=10,
    warmup_ratio=0.0, max_steps=100, max_completion_length=64, micro_batch_size=64, train_vision=True,
    gradient_checkpointing=False, min_pixels=784,
)
TABLES = (MODEL_FLAGS, TRAIN_FLAGS)


def flags(parser):
    parser.add_argument("--teacher", default="none",
                        help="teacher model, of the student's family; none (sft.py only): train on given traces")
    parser.add_argument("--teacher_samples", type=at_least(1), default=4,
                        help="answers the teacher samples to each problem")
    parser.add_argument("--traces", default="",
                        help="file that keeps the teacher's answers; without --teacher, a file to read them from")
    parser.add_argument("--soft_targets", action="store_true", help="learn the teacher's distributions, eq. (2)")
    parser.add_argument("--max_tokens", type=at_least(0), default=0,
                        help="train on so many tokens of traces (0: --max_steps)")
    parser.add_argument("--num_train_epochs", type=at_least(0), default=0,
                        help="train for whole epochs (0: --max_steps)")
    parser.add_argument("--early_stop", type=at_least(0), default=0,
                        help="stop after so many evaluations without a lower loss (0: never)")
    parser.add_argument("--held_out_traces", type=at_least(0), default=64, help="traces held back for eval_loss")
    parser.add_argument("--loss_steps", type=at_least(1), default=10, help="eval_loss every so many steps")


def check_vocabulary(args, processor, teacher_processor):
    """UserError unless both have the same token for every id: otherwise a KL would compare different tokens."""
    ours = processor.tokenizer.get_vocab()
    theirs = teacher_processor.tokenizer.get_vocab()
    other = sorted(word for word in {*ours, *theirs} if ours.get(word) != theirs.get(word))
    if other:
        raise UserError(f"--teacher {args.teacher} and {args.model} have different tokenizers: {len(other)} tokens "
                        f"differ, for example {other[0]!r}; distil from a model of the same family")


def teacher_traces(run, problems, loaded=None, judge=None):
    """The teacher's answers to `problems` that are right and well-formed, as problems with a trace, in their order.

    All answers are kept in a file, so a stopped sampling goes on where it was. `loaded` is the teacher with its
    processor where both are at hand; else they are loaded if something is left to sample.
    """
    args = run.args
    settings = dict(temperature=args.temperature, max_completion_length=args.max_completion_length)
    key = dict(
        teacher=args.teacher, weights=fingerprint(find_model(args.teacher, run)), dataset=args.dataset,
        n=args.teacher_samples, **settings, **prompt_settings(args), seed=args.seed)
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    path = args.traces or f"runs/traces-{name}.jsonl"
    folder = os.path.dirname(path) or "."
    check_writable(folder, "--traces")
    os.makedirs(folder, exist_ok=True)

    def prepare(_):
        advice = "have it write its answers elsewhere, and give them with --traces and without --teacher"
        check_fits_whole(
            run, f"--teacher {args.teacher}", find_model(args.teacher, run), advice=advice,
            answers=args.teacher_samples * len(problems), generations=args.teacher_samples, loaded=loaded is not None)
        teacher, processor = loaded or load_policy(args.teacher, run)

        def answer(some):
            rollout = sample(
                teacher, processor, some, args.teacher_samples, seed=(args.seed, "teacher"),
                sample_batch_size=args.sample_batch_size, **settings)
            return verified(rollout, judge)

        return answer

    together = args.sample_batch_size or 1024
    rows = run.answered(
        path, key, problems, prepare, share=max(1, together // args.teacher_samples), desc="teacher",
        each=args.teacher_samples)
    found = WithTraces(problems, [row for row in rows if row["right"]])
    run.say(f"{args.teacher}: {len(rows)} answers, {len(found)} right, well-formed and distinct; kept in {path}")
    return found


def verified(rollout, judge):
    """The teacher's answers, as they are kept: a trace is worth learning if it is right and well-formed."""
    good_B = rollout.score(is_good, judge).flatten().tolist()
    tokens_B = rollout.mask_BT.sum(1).long().tolist()
    rows = []
    for b, (problem, text) in enumerate(zip(rollout.problems, rollout.texts, strict=True)):
        rows.append(dict(id=problem["id"], text=text, tokens=tokens_B[b], right=bool(good_B[b])))
    return rows


def is_good(problem, text, judge=None):
    """Whether an answer is worth learning."""
    return is_right(problem, text, judge) and format_reward(problem, text) == 1.0


def examples_of(run, problems, loaded, judge):
    """What is trained on: the problems' own traces, a file's (--traces), or a teacher's answers."""
    args = run.args
    if args.teacher != "none":
        return teacher_traces(run, problems, loaded, judge)
    if not args.traces:
        return problems
    found, rows = given_traces(
        args.traces, args.dataset, problems, lambda problem, text: is_good(as_seen(problem, args), text, judge))
    run.say(f"{args.traces}: {rows} answers, {len(found)} right, well-formed and distinct, to problems of "
            f"{args.dataset}")
    return found


def traces_of(args, examples):
    """The trace of every example. UserError unless each has one, and a step is left beside those held out."""
    traces = []
    for example in tqdm(examples, desc="traces", delay=5, leave=False):
        if not example.get("trace"):
            raise UserError(f"{args.dataset}: problem {example['id']} has no trace; give a column `trace`, or a "
                            "--teacher")
        traces.append(example["trace"])
    if len(traces) < args.held_out_traces + args.prompts_per_step:
        raise UserError(f"{args.dataset}: there are only {len(traces)} traces; give more, fewer --held_out_traces, or "
                        "a smaller --prompts_per_step")
    return traces


def number_of_steps(args, tokenizer, traces):
    """How many steps training takes: --max_steps, or what --num_train_epochs or --max_tokens come to."""
    if args.max_tokens:
        lengths = [len(tokenizer(trace).input_ids) + 1 for trace in traces]  # 1: the end token
        traces_read = args.max_tokens * len(lengths) / sum(lengths)
        return max(1, round(traces_read / args.prompts_per_step))
    if args.num_train_epochs:
        return args.num_train_epochs * (len(traces) // args.prompts_per_step)
    return args.max_steps


def loss_on(run, rollout, cost, *, readers, train):
    """Eq. (1) or (2) over all processes; with `train` its gradient too. Fills in the rollout's entropy."""
    plan = plan_updates(run, rollout)
    total_tokens = run.sum(rollout.mask_BT.sum())  # whole before the first pass
    for part in plan:
        for batch in part:
            with torch.set_grad_enabled(train):
                cost_bT, entropy_bT = read(cost, rollout[batch], *readers)
                loss = (cost_bT * rollout.mask_BT[batch]).sum() / total_tokens
            if train:
                part.backward(batch, loss)
            else:
                part.add(batch, loss=loss)
            rollout.entropy_BT[batch] = entropy_bT
    return plan.metrics()["loss"]


def main(args):
    run = Run(args)
    if args.soft_targets and args.teacher == "none":
        raise UserError("--soft_targets are a teacher's distributions: name a --teacher too")
    if 0 < args.held_out_traces < run.world:
        raise UserError(f"--held_out_traces {args.held_out_traces}: give 0, or at least one for each of the "
                        f"{run.world} processes")
    problems = load_problems(args.dataset, run)
    held_out = load_problems(args.eval_dataset, run)
    policy, processor = load_policy(args.model, run, train=True)
    cost = hard
    readers = [policy]
    loaded = None
    if args.soft_targets:
        loaded = load_policy(args.teacher, run)
        check_vocabulary(args, processor, loaded[1])  # before the teacher samples for hours
        cost = soft
        readers.append(loaded[0])
    judge = load_judge(args.reward_model, run)
    examples = examples_of(run, problems, loaded, judge)
    examples, held_out = check_problems(run, processor, examples, held_out, graded=False)
    traces = traces_of(args, examples)
    held_back = examples[:args.held_out_traces]
    examples = examples[args.held_out_traces:]
    args.max_steps = number_of_steps(args, processor.tokenizer, traces[args.held_out_traces:])
    optimizer = torch.optim.AdamW(trained_weights(policy), lr=args.learning_rate, weight_decay=args.weight_decay)
    run.state["eval_losses"] = []
    run.start(policy, optimizer)
    if held_out and run.done == 0:
        run.log(0, evaluate(run, policy, processor, held_out, judge=judge))

    for step in run.steps():
        # --- sample: nothing; this step's traces ----------------------------------------------------------------------
        batch = run.batch(examples, step)
        rollout = forced(policy, processor, batch, [example["trace"] for example in batch])
        run.lap("sample")

        # --- update: make the traces more likely ----------------------------------------------------------------------
        for weights in optimizer.param_groups:
            weights["lr"] = learning_rate(step, args)
        loss = loss_on(run, rollout, cost, readers=readers, train=True)
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        run.lap("update")

        # --- log ------------------------------------------------------------------------------------------------------
        metrics = dict(
            loss=loss, grad_norm=grad_norm, learning_rate=learning_rate(step, args), **rollout.metrics(run),
        )
        if held_back and run.due(args.loss_steps):
            mine = held_back[run.rank::run.world]
            unseen = forced(policy, processor, mine, [example["trace"] for example in mine])
            metrics["eval_loss"] = loss_on(run, unseen, cost, readers=readers, train=False)
            run.state["eval_losses"].append(metrics["eval_loss"])
            if args.early_stop and has_stopped_falling(run.state["eval_losses"], args.early_stop):
                run.stop()
        if run.due(args.eval_steps):
            metrics |= evaluate(run, policy, processor, held_out, judge=judge)
        run.log(step, metrics, rollout.samples(torch.ones(len(rollout))), rollout.pictures)

        # --- checkpoint -----------------------------------------------------------------------------------------------
        if run.due(args.save_steps):
            run.save_checkpoint(step)
        if run.asked_to_end():  # by SIGTERM or SIGUSR1; --resume goes on
            return run.leave(step)

    finish(run, policy, processor)


if __name__ == "__main__":
    launch("sft", main, flags, doc=__doc__, recipe=RECIPE, toy=TOY, tables=TABLES)

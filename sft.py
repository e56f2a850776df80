"""SFT: supervised fine-tuning of a vision-language model on written-out reasoning, the usual warm start before RL.

As in VLAA-Thinker (arXiv 2504.11468) and the stage-1 study (arXiv 2606.09059): cross-entropy on the answer alone,

    L = −Σ_bt m_bt·log π_θ(y_bt | image, question, y_b,<t) / Σ_bt m_bt                                           (1)

where m is 1 on the tokens of the trace and on the end token, and both sums run over the whole optimiser batch: all
micro-batches, all processes. Nothing of the prompt is trained on.

The traces are the data set's own (a column `trace`), or with --teacher the teacher's own verified answers to the
given problems: --teacher_samples are sampled to each, and those that are right and well-formed are kept (rejection
sampling). They are kept on disk too, so that another run with the same teacher does not sample again.

--soft_targets puts the teacher's whole distribution q in the place of the trace's one token, the forward KL that
distillation off-policy minimises (Hinton et al., arXiv 1503.02531). It stands between (1), which asks for one word on
the same traces, and opd.py, which asks for a distribution too, but on the student's own answers and in the other
direction of the KL.

    L = Σ_bt m_bt·KL(q_bt‖p_bt) / Σ_bt m_bt          p, q: the student's and the teacher's next-token distributions (2)

Departures: the papers fix the number of epochs; --early_stop ends training once the loss on held-out traces has not
fallen that many evaluations in a row. The weights are then those of the last step, not of the best.

Shapes: B traces, T tokens of the longest.

    python sft.py                                                                         a laptop, a minute
    accelerate launch sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --teacher Qwen/Qwen2.5-VL-32B-Instruct

While it samples, a teacher stands whole on every GPU (bf16, 2 bytes a weight, beside its shard).

A healthy run: loss and eval_loss fall together; where eval_loss turns up, over-training begins.
"""

import collections
import hashlib
import json
import os
from collections.abc import Sequence

import torch
from tqdm import tqdm

from common import (
    MODEL_FLAGS, TRAIN_FLAGS, Rollout, Run, UserError, check_place, encode, format_reward, is_right, launch,
    load_policy, load_problems, read, sample, token_entropy, token_logps,
)

# --- the algorithm ----------------------------------------------------------------------------------------------------


def forward_kl(student_logits, teacher_logits):
    """KL(q‖p) of teacher q and student p: (..., V), (..., V) → (...), in nats. The gradient is the student's alone."""
    logp, teacher_logp = student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return (teacher_logp.exp() * (teacher_logp - logp)).sum(-1)


def hard(logits_NV, tokens_N):
    """What a token of a trace costs, eq. (1); the entropy of its distribution, for the log only. Each (N,)."""
    return -token_logps(logits_NV, tokens_N), token_entropy(logits_NV.detach())


def soft(logits_NV, teacher_logits_NV, tokens_N):
    """What a token of a trace costs, eq. (2); the entropy of its distribution, for the log only. Each (N,)."""
    return forward_kl(logits_NV, teacher_logits_NV), token_entropy(logits_NV.detach())


def has_stopped_falling(losses, patience):
    """Whether the last `patience` of `losses` all failed to get below the lowest before them."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def forced(policy, processor, problems, texts):
    """A Rollout of given texts, one to each problem, each closed by the end token: what training reads."""
    tokenizer, device = processor.tokenizer, policy.device
    ids = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]
    B, T = len(ids), max(map(len, ids))
    tokens_BT, mask_BT = torch.full((B, T), tokenizer.pad_token_id), torch.zeros(B, T)
    for b, row in enumerate(ids):
        tokens_BT[b, :len(row)], mask_BT[b, :len(row)] = torch.tensor(row), 1.0
    zeros = torch.zeros(B, T, device=device)
    return Rollout(encode(processor, problems), 1.0, torch.arange(B), tokens_BT.to(device), mask_BT.to(device), zeros,
                   zeros.clone(), torch.ones(B, device=device), list(texts))


# --- the run ----------------------------------------------------------------------------------------------------------

RECIPE = dict(
    prompts_per_step=128, learning_rate=1e-5, lr_scheduler_type="cosine", warmup_steps=3, max_steps=100,
)
TOY = dict(
    dataset="toy@train", eval_dataset="toy@test", prompts_per_step=64, learning_rate=3e-4, warmup_steps=10,
    max_steps=100, max_completion_length=64, micro_batch_size=64, train_vision=True, gradient_checkpointing=False,
)


def flags(parser):
    parser.add_argument("--teacher", default="none",
                        help="the model to learn from, of the student's family; in sft.py none: the data's traces")
    parser.add_argument("--teacher_samples", type=int, default=4, help="answers the teacher samples to each problem")
    parser.add_argument("--traces", default="", help="file that keeps the teacher's answers (default: by settings)")
    parser.add_argument("--soft_targets", action="store_true", help="learn the teacher's distributions, eq. (2)")
    parser.add_argument("--max_tokens", type=int, default=0, help="train on so many tokens of traces (0: --max_steps)")
    parser.add_argument("--num_train_epochs", type=int, default=0, help="train for whole epochs (0: --max_steps)")
    parser.add_argument("--early_stop", type=int, default=0, help="stop after so many evaluations without a lower loss")
    parser.add_argument("--held_out_traces", type=int, default=64, help="traces kept for eval_loss")
    parser.add_argument("--loss_steps", type=int, default=10, help="eval_loss every so many steps")


class Traced(Sequence):
    """Problems with a trace each. pairs: a list of (place in `problems`, text). Pictures are opened when asked for."""

    def __init__(self, problems, pairs):
        self.problems, self.pairs = problems, pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Traced(self.problems, self.pairs[index])
        place, text = self.pairs[index]
        return self.problems[place] | dict(trace=text)


def fingerprint(model):
    """Size and time of a local model's weights, so that answers of older weights are not taken for its own."""
    path = os.path.join(model, "model.safetensors.index.json")
    path = path if os.path.exists(path) else os.path.join(model, "model.safetensors")
    return f"{os.path.getsize(path)}-{os.path.getmtime(path)}" if os.path.exists(path) else model


def kept_answers(run, path, asked):
    """The rows of the file of traces that are the answers to `asked`, whole problems only."""
    try:
        rows = [row for row in run.read_lines(path) if asked.items() <= row.items()]
        answers = collections.Counter(row["id"] for row in rows)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"--traces {path} is no file of traces ({error}); move it away or name another") from None
    return [row for row in rows if answers[row["id"]] >= run.args.teacher_samples]


def teacher_traces(run, problems, loaded=None):
    """The teacher's answers to `problems` that are right and well-formed, as problems with a trace, in their order.

    All answers are kept in a file, a line each; a stopped sampling goes on behind the last whole problem, and answers
    to other settings are left alone. `loaded` is the teacher with its processor where both are at hand; else they are
    loaded if something is left to sample.
    """
    args, ids = run.args, [problem["id"] for problem in tqdm(problems, desc="problems", delay=5, leave=False)]
    asked = dict(teacher=args.teacher, weights=fingerprint(args.teacher), dataset=args.dataset, n=args.teacher_samples,
                 temperature=args.temperature, max_completion_length=args.max_completion_length,
                 max_pixels=args.max_pixels, seed=args.seed)
    path = args.traces or f"runs/traces-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]}.jsonl"
    check_place(os.path.dirname(path) or ".", "--traces")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    rows = kept_answers(run, path, asked)
    done = {row["id"] for row in rows}
    left = [place for place, id in enumerate(ids) if id not in done]
    teacher, processor = loaded or (load_policy(args.teacher, run) if left else (None, None))
    share = max(1, args.sample_batch_size // args.teacher_samples) * run.world
    for start in tqdm(range(0, len(left), share), desc="teacher", disable=not run.is_main):
        mine = [problems[place] for place in left[start:start + share][run.rank::run.world]]
        rollout = sample(  # a process without a share samples all the same: the weights are gathered together
            teacher, processor, mine or [problems[left[0]]], args.teacher_samples, seed=(args.seed, "teacher"),
            temperature=args.temperature, max_completion_length=args.max_completion_length,
            sample_batch_size=args.sample_batch_size,
        )
        new = [dict(id=p["id"], text=text, tokens=int(n), right=is_right(p, text) and format_reward(p, text) == 1.0)
               for p, text, n in zip(rollout.problems, rollout.texts, rollout.mask_BT.sum(1))]
        new = [row for theirs in run.gather(new if mine else []) for row in theirs]
        run.append(path, [asked | row for row in new])
        rows += new
    texts = {id: {} for id in ids}  # the inner dict for its order: each text once
    for row in rows:
        if row["right"]:
            texts[row["id"]][row["text"]] = None
    pairs = [(place, text) for place, id in enumerate(ids) for text in texts[id]]
    run.say(f"{args.teacher}: {len(rows)} answers, {len(pairs)} right, well-formed and distinct; kept in {path}")
    return Traced(problems, pairs)


def check_vocabulary(args, processor, teacher_processor):
    """UserError unless the same ids mean the same words to both: else (1) compares distributions over other things."""
    ours, theirs = (x.tokenizer.get_vocab() for x in (processor, teacher_processor))
    other = sorted(word for word in {*ours, *theirs} if ours.get(word) != theirs.get(word))
    if other:
        raise UserError(f"--teacher {args.teacher} has another tokenizer than {args.model}: {len(other)} words differ, "
                        f"{other[0]!r} for one; distil from a model of the same family")


def main(args):
    run = Run(args)
    if args.soft_targets and args.teacher == "none":
        raise UserError("--soft_targets are a teacher's distributions: name a --teacher too")
    if 0 < args.held_out_traces < run.world:
        raise UserError(f"--held_out_traces {args.held_out_traces}: give 0, or one to each of {run.world} processes")
    problems, held_out = load_problems(args.dataset), load_problems(args.eval_dataset)
    policy, processor = load_policy(args.model, run, train=True)
    cost, readers, loaded = hard, [policy], None
    if args.soft_targets:
        loaded = teacher, teacher_processor = load_policy(args.teacher, run)
        check_vocabulary(args, processor, teacher_processor)  # before the teacher samples for hours
        cost, readers = soft, [policy, teacher]
    examples = problems if args.teacher == "none" else teacher_traces(run, problems, loaded)
    traces = [example.get("trace") for example in tqdm(examples, desc="traces", delay=5, leave=False)]
    bare = [place for place, trace in enumerate(traces) if not trace]
    if bare or len(traces) <= args.held_out_traces:
        what = f"problem {examples[bare[0]]['id']} has no trace" if bare else f"there are only {len(traces)} traces"
        raise UserError(f"{args.dataset}: {what}; give a column `trace`, or a --teacher, or fewer --held_out_traces")
    kept, examples = examples[:args.held_out_traces], examples[args.held_out_traces:]
    if args.num_train_epochs:
        args.max_steps = args.num_train_epochs * (len(examples) // args.prompts_per_step)
    if args.max_tokens:
        learned = traces[args.held_out_traces:]
        lengths = [len(processor.tokenizer(trace).input_ids) + 1 for trace in learned]  # 1: the end token
        args.max_steps = max(1, round(args.max_tokens * len(lengths) / sum(lengths) / args.prompts_per_step))
    run.state["eval_losses"] = []
    run.begin(policy, processor, examples, held_out)

    def loss_on(rollout, backward):
        """Eq. (1) or (2) over all processes; with `backward` its gradient too. Fills in the rollout's entropy."""
        total, tokens = 0.0, run.sum(rollout.mask_BT.sum())
        for batch, alive in run.plan(rollout, torch.ones(len(rollout), dtype=torch.bool))[0]:
            with torch.set_grad_enabled(backward):
                cost_bT, entropy_bT = read(cost, rollout[batch], *readers)
                loss = (cost_bT * alive * rollout.mask_BT[batch]).sum() / tokens
            if backward:
                (loss * run.world).backward()  # sharded gradients are averaged over the processes, the loss is a sum
            rollout.entropy_BT[batch] = entropy_bT
            total += loss.detach()
        return float(run.sum(total))

    for step in run.steps():
        # --- sample: nothing; this step's traces ----------------------------------------------------------------------
        batch = run.draw(examples, step)
        rollout = forced(policy, processor, batch, [example["trace"] for example in batch])
        run.lap("sample")

        # --- update: make the traces more likely ----------------------------------------------------------------------
        metrics = dict(loss=loss_on(rollout, backward=True), grad_norm=run.optimizer_step())
        run.lap("update")

        # --- log ------------------------------------------------------------------------------------------------------
        stop = False
        if kept and (step % args.loss_steps == 0 or step == args.max_steps):
            mine = kept[run.rank::run.world]
            metrics["eval_loss"] = loss_on(forced(policy, processor, mine, [p["trace"] for p in mine]), backward=False)
            run.state["eval_losses"].append(metrics["eval_loss"])
            stop = args.early_stop and has_stopped_falling(run.state["eval_losses"], args.early_stop)
        run.log(step, rollout, torch.ones(len(rollout)), last=stop, **metrics)


if __name__ == "__main__":
    launch("sft", main, __doc__, flags, RECIPE, TOY, tables=(MODEL_FLAGS, TRAIN_FLAGS))

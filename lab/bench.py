"""Speed and memory, side by side with the plain way and with TRL.

    python lab/bench.py                                    all parts on the tabletop, minutes, into results/bench.json
    python lab/bench.py --parts sampler update             some of them
    python lab/bench.py --shape 7B --device cuda           a real size with random weights: tokens per second, memory

Parts, each in one process and one thread:

    sampler   common.sample                      against transformers' generate(num_return_sequences=G)
    update    packed rows, chunked head          against policy.forward, one padded row with a picture per answer;
              the loss and the gradient must be the same; also as a curve over T/S, answer over prompt length
    trl       a whole step of grpo.py            against TRL's GRPOTrainer (skipped where trl cannot be imported);
              and both losses and gradients of one and the same set of answers
    vepo      a whole step of vepo.py            against one of grpo.py, with one and with four updates to a rollout
    memory    VEPO's two readings of 8 answers of 512 tokens at a vocabulary of 151,936, above the model's own memory

What is compared is CPU time (time.process_time), both sides in turn in one run; the number is the median over pairs of
one side divided by the other. Seconds stand beside it for orientation only: they are another machine's tomorrow.

--shape runs grpo.py itself, with a true Qwen2.5-VL configuration, random weights, and pictures of noise; it needs no
checkpoint and no network. It measures wall-clock time. Its GPU mode HAS NOT BEEN RUN: it was written without a GPU;
`--shape tiny --device cpu`, which goes the same way, is what the tests run. The memory parts read Linux's /proc.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python lab/bench.py` finds common

import accelerate
import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, Qwen2_5_VLConfig

import common
import grpo
import vepo
from common import Policy, Reading, Rollout, UserError, encode, generator, micro_batches, read, sample, token_logps

MICRO = 64  # answers in a forward pass, on both sides
SHARES = (0.25, 0.5, 1, 2, 4)  # T/S of the curve

# --- clocks -----------------------------------------------------------------------------------------------------------


def cpu_seconds(fn):
    """CPU seconds of this process in fn()."""
    began = time.process_time()
    fn()
    return time.process_time() - began


def in_turn(one, other, pairs):
    """Two functions that return seconds, called in turn: medians of both, and the median over pairs of other/one."""
    one(), other()  # caches, thread pools, lazy imports
    taken = [(one(), other()) if pair % 2 else (other(), one())[::-1] for pair in range(pairs)]
    return *map(statistics.median, zip(*taken)), statistics.median(b / a for a, b in taken)


def peak_gb(fn):
    """How far the resident memory of this process rises above what it is now while fn() runs, in GB of 10⁹ bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = memory("VmRSS")
    fn()
    return memory("VmHWM") - before


def memory(line):
    status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(status[line].split()[0]) * 1024 / 1e9


# --- the plain way ----------------------------------------------------------------------------------------------------


def generate(policy, processor, problems, G, T):
    """What a script would write that has no sampler of its own. Returns the number of tokens up to the end tokens."""
    inputs = processor(
        text=[common.chat(processor, problem) for problem in problems], images=[p["images"] for p in problems],
        return_tensors="pt", padding=True, padding_side="left", return_mm_token_type_ids=True)
    rows = policy.config.get_text_config().vocab_size
    answers = policy.generate(**inputs, generation_config=GenerationConfig(
        num_return_sequences=G, max_new_tokens=T, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        repetition_penalty=1.0, eos_token_id=policy.ends, pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=policy.banned + list(range(policy.vocabulary, rows))))[:, inputs["input_ids"].shape[1]:]
    processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
    ended = torch.isin(answers, torch.tensor(policy.ends)).cumsum(1)
    return int((ended.roll(1, 1).index_fill(1, torch.tensor([0]), 0) == 0).sum())


def plain_logps(policy, rollout):
    """(B, T) log-probs by policy.forward: every answer behind its own copy of the prompt and its picture, padded."""
    prompts, groups, (B, T) = rollout.prompts, rollout.group_B.tolist(), rollout.tokens_BT.shape
    S = max(len(prompts.ids[p]) for p in groups)
    ids, mask, types = (torch.zeros(B, S + T, dtype=torch.long) for _ in range(3))
    for row, p in enumerate(groups):
        n = len(prompts.ids[p])
        ids[row, S - n:S], mask[row, S - n:S], types[row, S - n:S] = prompts.ids[p], 1, prompts.types[p]
    ids[:, S:], mask[:, S:] = rollout.tokens_BT, rollout.mask_BT.long()
    logits_BTV = policy(
        input_ids=ids, attention_mask=mask, mm_token_type_ids=types, logits_to_keep=T + 1,
        pixel_values=torch.cat([prompts.pixels[p] for p in groups]),
        image_grid_thw=torch.cat([prompts.grids[p] for p in groups])).logits[:, :-1, :policy.vocabulary].float()
    logits_BTV = (logits_BTV / rollout.temperature).index_fill(2, torch.tensor(policy.banned), -1e9)
    return logits_BTV.log_softmax(2).gather(2, rollout.tokens_BT[..., None])[..., 0] * rollout.mask_BT


def backward(policy, rollout, advantage_B, batches, logps, old_logp_BT=None):
    """GRPO's loss with logps(policy, rollout) -> (B, T), pass by pass: the loss, and the gradient as one vector."""
    policy.zero_grad()
    loss, weights = 0.0, rollout.mask_BT.sum()
    for index_b in batches:
        logp_bT = logps(policy, rollout[index_b])
        old_logp_bT = logp_bT.detach() if old_logp_BT is None else old_logp_BT[index_b]
        part = grpo.policy_loss(logp_bT, old_logp_bT, advantage_B[index_b, None], 0.2, 0.2) * rollout.mask_BT[index_b]
        (part.sum() / weights).backward()
        loss += float(part.sum() / weights)
    return loss, gradient(policy)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def packed_logps(policy, rollout):
    return read(token_logps, rollout, policy)


def invent(processor, problems, G, T):
    """A rollout of random bytes, every answer T tokens long. (The ids below 256 are bytes; no special token is.)"""
    B = len(problems) * G
    tokens_BT = torch.randint(256, (B, T), generator=generator("bench", B, T))
    zeros_BT = torch.zeros(B, T)
    return Rollout(encode(processor, problems), 1.0, torch.arange(B) // G, tokens_BT, zeros_BT + 1, zeros_BT, zeros_BT,
                   torch.ones(B), [""] * B)


# --- the parts --------------------------------------------------------------------------------------------------------


def row(part, case, sides, times, wanted, **checks):
    """One line of the table. `times` as in_turn gives them; `wanted` is a bound on the ratio, like ">= 1.8"."""
    ratio, (sign, bound) = times[2], wanted.split()
    good = ratio >= float(bound) if sign == ">=" else ratio <= float(bound)
    return dict(part=part, case=case, sides=sides, seconds=times[:2], ratio=ratio, wanted=wanted, met=good, **checks)


def bench_sampler(args, policy, processor, problems):
    """As often as not every answer is decoded to the limit; then again as the model ends them, per generated token."""
    G, T, tokens = args.num_generations, args.max_completion_length, {}

    def ours():
        rollout = sample(policy, processor, problems, G, seed=(1, "bench"), max_completion_length=T)
        tokens["ours"] = int(rollout.mask_BT.sum())

    def theirs():
        tokens["theirs"] = generate(policy, processor, problems, G, T)

    banned = policy.banned
    for case, more in (("forced lengths", policy.ends), ("natural ends, per token", [])):
        policy.banned = banned + more
        times = in_turn(lambda: cpu_seconds(ours) / tokens["ours"], lambda: cpu_seconds(theirs) / tokens["theirs"],
                        args.pairs)
        policy.banned = banned
        yield row("sampler", case, "generate / ours", times, ">= 1.8", tokens=dict(tokens))


def bench_update(args, policy, processor, problems):
    G, T = args.num_generations, args.max_completion_length
    few, S = problems[:4], statistics.mean(len(ids) for ids in encode(processor, problems[:4]).ids)
    rollout = sample(policy, processor, problems, G, seed=(1, "bench"), max_completion_length=T)
    cases = [("sampled answers", rollout)]
    cases += [(f"T/S = {share}", invent(processor, few, G, round(share * S))) for share in args.shares]
    for case, rollout in cases:
        advantage_B = torch.randn(len(rollout), generator=generator("advantage"))
        every = torch.arange(len(rollout))
        packed = policy, rollout, advantage_B, micro_batches(rollout, every, every, MICRO), packed_logps
        plain = policy, rollout, advantage_B, every.split(MICRO), plain_logps
        times = in_turn(lambda: cpu_seconds(lambda: backward(*packed)), lambda: cpu_seconds(lambda: backward(*plain)),
                        args.pairs)
        (loss, ours), (plain_loss, theirs) = backward(*packed), backward(*plain)
        yield row("update", case, "plain / packed", times, ">= 1.8" if case == "sampled answers" else ">= 1",
                  loss_gap=abs(loss - plain_loss), gradient_gap=float((ours - theirs).norm() / theirs.norm()),
                  answer_over_prompt=float(rollout.mask_BT.sum() / len(rollout)) / S)


def even_length(problem, text):
    """A reward that an untrained model can earn, so that nearly every group has credit to give."""
    return float(len(text) % 2 == 0)


@contextlib.contextmanager
def timed(script, **patches):
    """Lets script.main run without files, evaluation and report. Yields a list that gets one dict per step."""
    steps = []

    class Timed(common.Run):
        def __init__(self, args):
            super().__init__(args)
            torch.set_num_threads(1 if self.device.type == "cpu" else torch.get_num_threads())

        def steps(self):
            for step in super().steps():
                self.began = time.process_time()
                yield step

        def lap(self, name):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            super().lap(name)

        def log(self, step, rollout, *_, **metrics):
            steps.append(dict(cpu=time.process_time() - self.began, tokens=float(self.sum(rollout.mask_BT.sum())),
                              main=self.is_main, **self.laps))

        def open_folder(self):
            pass

        def finish(self):
            pass

    with mock.patch.multiple(script, Run=Timed, grade=even_length, **patches):
        yield steps


def step_seconds(args, name, updates=1):
    """CPU seconds of one step of a script: sample, score, credit, update. The second step of two."""
    script, P = importlib.import_module(name), len(range(args.problems))
    flags = [
        "--model", args.model, "--dataset", f"toy@train:{P}", "--eval_dataset", "none", "--max_steps", 2,
        "--prompts_per_step", P, "--num_generations", args.num_generations, "--updates_per_step", updates,
        "--max_completion_length", args.max_completion_length, "--micro_batch_size", MICRO, "--learning_rate", 1e-6,
        "--sample_batch_size", P * args.num_generations, "--train_vision", "--no-gradient_checkpointing",
        "--output_dir", os.path.join(tempfile.gettempdir(), "bench")]
    with timed(script) as steps:
        script.main(common.parse_args(name, "", script.flags, script.RECIPE, script.TOY, list(map(str, flags))))
    return steps[-1]["cpu"]


def bench_vepo(args, policy, processor, problems):
    for updates, wanted in ((1, "<= 1.6"), (4, "<= 1.3")):
        times = in_turn(lambda: step_seconds(args, "grpo", updates), lambda: step_seconds(args, "vepo", updates),
                        args.pairs)
        yield row("vepo", f"updates to a rollout: {updates}", "vepo / grpo", times, wanted)


def bench_memory(args, policy, processor, problems):
    """The tabletop's body with the real vocabulary: what is measured is the logits and what is made of them."""
    config = AutoConfig.from_pretrained(policy.name_or_path)
    config.get_text_config().vocab_size = args.vocabulary
    large = random_policy(config)
    large.banned, large.vocabulary = policy.banned, args.vocabulary
    rollout = invent(processor, problems[:1], 8, args.memory_length)
    other = vepo.counterfactual(rollout.prompts, "noise", 2.0, (1, "bench"))
    with torch.no_grad():
        peak = peak_gb(lambda: read(vepo.look, rollout, large, Reading(large, other)))
    yield dict(part="memory", case=f"vocabulary {args.vocabulary:,}", sides="peak GB", seconds=(), ratio=peak,
               wanted="<= 1.5", met=peak <= 1.5)


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl_trainer(args, processor, problems, folder, steps=1):
    """TRL's GRPOTrainer with our settings: every problem in every step, MICRO answers to a forward pass, no KL."""
    import datasets
    import trl
    answers = len(problems) * args.num_generations
    config = trl.GRPOConfig(
        output_dir=folder, num_generations=args.num_generations, per_device_train_batch_size=min(MICRO, answers),
        gradient_accumulation_steps=max(1, answers // MICRO), max_completion_length=args.max_completion_length,
        max_steps=steps, learning_rate=1e-6, weight_decay=1e-2, lr_scheduler_type="constant", loss_type="dapo",
        scale_rewards="group", beta=0.0, num_iterations=1, temperature=1.0, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, shuffle_dataset=False, save_strategy="no", logging_strategy="no",
        disable_tqdm=True)
    table = datasets.Dataset.from_list([dict(
        prompt=[dict(role="user", content=problem["problem"] + "\n" + common.INSTRUCTION)], images=problem["images"],
    ) for problem in problems])
    model = AutoModelForImageTextToText.from_pretrained(args.model_folder, dtype=torch.float32)

    def reward(completions, **_):
        return [even_length(None, completion[0]["content"]) for completion in completions]

    return trl.GRPOTrainer(model, reward, config, table, processing_class=processor)


def trl_seconds(args, processor, problems):
    """CPU seconds of the second of two steps, from its first forward pass to its last weight."""
    clock = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.append(-time.process_time())

        def on_step_end(self, *_, **__):
            clock[-1] += time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(args, processor, problems, folder, steps=2)
        trainer.add_callback(Clock())
        trainer.train()
    torch.set_num_threads(1)
    return clock[-1]


def bench_trl(args, policy, processor, problems):
    if importlib.util.find_spec("trl") is None:
        print("trl: skipped, trl cannot be imported here; `pip install trl==1.16.0` beside requirements.txt runs it")
        return
    times = in_turn(lambda: step_seconds(args, "grpo"), lambda: trl_seconds(args, processor, problems), args.pairs)
    yield row("trl", "one step", "TRL / grpo", times, ">= 2.5", **same_answers(args, policy, processor, problems))


def same_answers(args, policy, processor, problems):
    """Both losses and gradients of our answers, with π_old a little off, so that the ratio and the clip have a say."""
    G = args.num_generations
    rollout = sample(policy, processor, problems, G, seed=(1, "bench"),
                     max_completion_length=args.max_completion_length)
    rewards_PG = rollout.score(even_length)
    every = torch.arange(len(rollout))
    rows, banned = policy.vocabulary, policy.banned  # TRL forbids nothing when it reads, and reads the padding rows too
    policy.vocabulary, policy.banned = policy.config.get_text_config().vocab_size, np.zeros(0, dtype=np.int64)
    with torch.no_grad():
        old_logp_BT = packed_logps(policy, rollout)
    old_logp_BT = old_logp_BT + 0.2 * torch.randn(old_logp_BT.shape, generator=generator("old")) * rollout.mask_BT
    advantage_B = grpo.group_advantages(rewards_PG).flatten()
    loss, ours = backward(policy, rollout, advantage_B, micro_batches(rollout, every, every, MICRO), packed_logps,
                          old_logp_BT)
    policy.vocabulary, policy.banned = rows, banned
    answers = [tokens[mask.bool()].tolist() for tokens, mask in zip(rollout.tokens_BT, rollout.mask_BT)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(args, processor, problems, folder)
        trainer._generate_single_turn = lambda *_, **__: (answers, None)
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
        batch = [trainer.train_dataset[p] for p in rollout.group_B.tolist()]
        trainer.model.train()
        inputs = trainer._generate_and_score_completions(batch) | dict(old_per_token_logps=old_logp_BT)
        trl_loss = trainer._compute_loss(trainer.model, inputs)
        trl_loss.backward()
    theirs = gradient(trainer.model)
    return dict(loss=loss, trl_loss=float(trl_loss.detach()), loss_gap=abs(loss - float(trl_loss.detach())),
                gradient_gap=float((ours - theirs).norm() / theirs.norm()))


# --- real sizes -------------------------------------------------------------------------------------------------------

SHAPES = {  # hidden size, layers, heads, key-value heads, feed-forward size, rows of the embedding, embedding = head
    "tiny": (256, 2, 2, 1, 512, 2048, True),
    "3B": (2048, 36, 16, 2, 11008, 151_936, True),
    "7B": (3584, 28, 28, 4, 18944, 152_064, False),
}


def shape_config(shape, tokenizer):
    """The configuration of Qwen2.5-VL-3B or -7B, but with the tabletop's special tokens (or a tiny one like them)."""
    hidden, layers, heads, kv_heads, feed_forward, rows, tied = SHAPES[shape]
    vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, fullatt_block_indexes=[1])
    if shape != "tiny":
        vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                      fullatt_block_indexes=[7, 15, 23, 31])
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    image, video, start, end = tokenizer.convert_tokens_to_ids(names)
    return Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            intermediate_size=feed_forward, vocab_size=rows, max_position_embeddings=128_000, rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
        vision_config=dict(out_hidden_size=hidden, window_size=112, patch_size=14, spatial_merge_size=2, **vision),
        tie_word_embeddings=tied, image_token_id=image, video_token_id=video, vision_start_token_id=start,
        vision_end_token_id=end)


def random_policy(config):
    policy = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    policy.__class__ = Policy
    return policy


def noise_problems(count, pixels):
    side = max(28, 28 * round(pixels**0.5 / 28))
    random = np.random.default_rng(0)
    return [dict(id=f"noise-{i}", problem="What is it?", answer="1", verifier="digit",
                 images=[Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))])
            for i in range(count)]


def bench_shape(args):
    """The second of two steps of grpo.py, by its own clock, with weights that nobody trained."""
    from lab import toy
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; try --shape tiny --device cpu")
    load = common.load_policy
    with tempfile.TemporaryDirectory() as folder:
        toy.untrained(folder)  # for its tokenizer, image processor and generation_config
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        config = shape_config(args.shape, tokenizer)
        config.save_pretrained(folder)

        def load_random(*rest, **more):
            policy, processor = load(*rest, **more)
            policy.vocabulary = config.get_text_config().vocab_size  # not the tabletop's few hundred words
            return policy, processor

        flags = ["--model", folder, "--eval_dataset", "none", "--max_steps", 2, "--prompts_per_step", args.problems,
                 "--num_generations", args.num_generations, "--max_completion_length", args.max_completion_length,
                 "--updates_per_step", 1, "--output_dir", os.path.join(folder, "run"), "--max_pixels", args.pixels,
                 "--max_prompt_length", 20_000]
        flags = common.parse_args("grpo", "", grpo.flags, grpo.RECIPE, {}, list(map(str, flags)))
        problems = {flags.dataset: noise_problems(args.problems, args.pixels), "none": []}
        with mock.patch.object(common, "load_whole", lambda folder: with_endings(random_policy(config), folder)), \
                timed(grpo, load_policy=load_random, load_problems=problems.get) as steps:
            grpo.main(flags)
    last = steps[-1]
    peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else memory("VmHWM")
    return dict(shape=args.shape, device=args.device, answers=args.problems * args.num_generations, pixels=args.pixels,
                tokens=last["tokens"], peak_gb=peak, main=last["main"],
                sampled_per_second=last["tokens"] / last["seconds_sample"],
                updated_per_second=last["tokens"] / last["seconds_update"])


def with_endings(policy, folder):
    policy.generation_config = GenerationConfig.from_pretrained(folder)
    return policy


# --- the table --------------------------------------------------------------------------------------------------------

PARTS = dict(sampler=bench_sampler, update=bench_update, trl=bench_trl, vepo=bench_vepo, memory=bench_memory)


def flags(argv=None):
    parser = common.Parser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy", help="toy, or the folder of a model of the tabletop")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--pairs", type=int, default=5, help="how often both sides are measured")
    parser.add_argument("--problems", type=int, default=16, help="problems in a step (P)")
    parser.add_argument("--num_generations", type=int, default=8, help="answers to each (G)")
    parser.add_argument("--max_completion_length", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES, help="T/S of the update's curve")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="of the memory part")
    parser.add_argument("--memory_length", type=int, default=512, help="answer tokens of the memory part")
    parser.add_argument("--shape", choices=SHAPES, help="measure grpo.py at this size instead, with random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of --shape")
    parser.add_argument("--pixels", type=int, default=1_000_000, help="of --shape's pictures")
    parser.add_argument("--output", default="results/bench.json", help="where the numbers go")
    return parser, parser.parse_args(argv)


def main(args):
    os.environ["ACCELERATE_USE_CPU"] = "true" if args.device == "cpu" else "false"
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
    if args.shape:
        numbers = bench_shape(args)
        if not numbers["main"]:
            return
        print("\n".join(f"{name:20}{value}" for name, value in numbers.items()))
        return save(args, dict(versions=versions, shape=numbers))
    torch.set_num_threads(1)
    args.model_folder = args.model = common.find_model(args.model)
    policy, processor = common.load_policy(args.model)
    policy.requires_grad_(True)
    problems, rows = common.load_problems(f"toy@train:{args.problems}")[:], []
    print(f"{'':10}{'':28}{'':18}{'ratio':>7}  {'wanted':10}{'seconds':18}checks")
    for part in args.parts:
        for line in PARTS[part](args, policy, processor, problems):
            rows.append(line)
            checks = {k: f"{v:.2g}" for k, v in line.items() if k.endswith("_gap") or k == "answer_over_prompt"}
            print(f"{line['part']:10}{line['case']:28}{line['sides']:18}{line['ratio']:7.2f}  {line['wanted']:10}"
                  f"{' '.join(f'{s:.3g}' for s in line['seconds']):18}{'' if line['met'] else 'MISSED '}"
                  + " ".join(f"{k} {v}" for k, v in checks.items()), flush=True)
    sizes = {name: vars(args)[name] for name in ("problems", "num_generations", "max_completion_length", "pairs")}
    save(args, dict(versions=versions, model=args.model, micro_batch_size=MICRO, **sizes, rows=rows))


def save(args, numbers):
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    common.write_atomically(args.output, json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    parser, wishes = flags()
    try:
        main(wishes)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")

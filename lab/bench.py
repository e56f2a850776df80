"""Speed and memory, side by side with the plain way and with TRL.

    python lab/bench.py                             every part on the tabletop, minutes; into results/bench.json
    python lab/bench.py --parts sampler update      some of them
    python lab/bench.py --shape 7B --device cuda    a real size with random weights: tokens per second, memory

Parts, all in one process and one thread:

    sampler   common.sample                    against transformers' generate(num_return_sequences=G)
    update    packed rows, chunked head        against policy.forward, where every answer is a padded row with its own
              picture: same loss, same gradient; then as a curve over T/S, answer length over prompt length
    trl       a step of grpo.py                against one of TRL's GRPOTrainer (skipped where trl cannot be imported);
              and loss and gradient of both for the same answers
    vepo      a step of vepo.py                against one of grpo.py, with one and with four updates to a rollout
    mupo      embedding and clustering         as a share of a step of mupo.py, 64 problems, 15 answers, 3 clusters
    memory    what VEPO's two readings of 8 answers of 512 tokens need above the model, at Qwen's vocabulary

What is compared is CPU time (time.process_time): both sides in turn in one run, and of the pairs' ratios the median.

--shape runs two steps of grpo.py itself with a true Qwen2.5-VL configuration, random weights and pictures of noise; it
needs no checkpoint and no network, and tells wall-clock time. THE GPU MODE HAS NEVER BEEN RUN: this was written where
there is no GPU; the tests run `--shape tiny --device cpu`, which takes the same way through grpo.py but for sharding.
Memory on the CPU is read from Linux's /proc.
"""

import argparse
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
os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: its bars would tear the table

import torch
import transformers
from datasets import Dataset
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig, Qwen2_5_VLConfig

import common
import grpo
import mupo
import vepo
from common import Rollout, encode, generator, micro_batches, read, sample, token_logps

MICRO, SHARES = 64, (0.25, 0.5, 1, 2, 4)  # answers in a forward pass on both sides; T/S of the curve
VOCABULARY, LENGTH = 151_936, 512  # of the memory part
NOWHERE = "runs/bench"  # what is measured writes nothing

# --- clocks -----------------------------------------------------------------------------------------------------------


def cpu_seconds(fn):
    """CPU seconds of this process in fn(), by token if it returns a number of tokens."""
    began = time.process_time()
    tokens = fn()
    return (time.process_time() - began) / (tokens if isinstance(tokens, (int, float)) else 1)


def in_turn(one, other, pairs, cost=cpu_seconds):
    """Two functions called in turn: the medians of what each costs, and the median over pairs of other/one."""
    one(), other()  # caches, lazy imports, memory of the allocator
    taken = [(cost(one), cost(other)) if pair % 2 else (cost(other), cost(one))[::-1] for pair in range(pairs)]
    return dict(seconds=[*map(statistics.median, zip(*taken))], ratio=statistics.median(b / a for a, b in taken))


def memory_gb(line):
    """VmRSS, the resident memory of this process, or VmHWM, its highest so far; in GB of 10⁹ bytes."""
    status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(status[line].split()[0]) * 1024 / 1e9


# --- the plain way ----------------------------------------------------------------------------------------------------


def generate(policy, processor, problems, G, T):
    """What one writes who has no sampler of its own. Returns how many tokens it made, up to the end tokens."""
    inputs = processor(
        text=[common.chat(processor, problem) for problem in problems], images=[p["images"] for p in problems],
        return_tensors="pt", padding=True, padding_side="left", return_mm_token_type_ids=True)
    padding_rows = range(policy.vocabulary, policy.config.get_text_config().vocab_size)
    answers_BT = policy.generate(**inputs, generation_config=GenerationConfig(
        num_return_sequences=G, max_new_tokens=T, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        repetition_penalty=1.0, eos_token_id=policy.ends, pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=[*policy.banned, *padding_rows]))[:, inputs["input_ids"].shape[1]:]
    processor.tokenizer.batch_decode(answers_BT, skip_special_tokens=True)
    ended_BT = torch.isin(answers_BT, torch.tensor(policy.ends)).cumsum(1) > 0
    return len(answers_BT) + int((~ended_BT[:, :-1]).sum())


def plain_logps(policy, rollout):
    """(B, T) log-probs by policy.forward: every answer behind its own copy of the prompt and its picture, padded."""
    prompts, groups, (B, T) = rollout.prompts, rollout.group_B.tolist(), rollout.tokens_BT.shape
    S = max(len(prompts.ids[p]) for p in groups)
    ids, mask, types = torch.zeros(3, B, S + T, dtype=torch.long)
    for b, p in enumerate(groups):
        span = slice(S - len(prompts.ids[p]), S)
        ids[b, span], mask[b, span], types[b, span] = prompts.ids[p], 1, prompts.types[p]
    ids[:, S:], mask[:, S:] = rollout.tokens_BT, rollout.mask_BT
    pixels, grids = (torch.cat([x[p] for p in groups]) for x in (prompts.pixels, prompts.grids))
    logits_BTV = policy(input_ids=ids, attention_mask=mask, mm_token_type_ids=types, pixel_values=pixels,
                        image_grid_thw=grids, logits_to_keep=T + 1).logits[:, :-1, :policy.vocabulary]
    logits_BTV = (logits_BTV / rollout.temperature).index_fill(2, torch.tensor(policy.banned), -1e9)
    return logits_BTV.log_softmax(2).gather(2, rollout.tokens_BT[..., None])[..., 0] * rollout.mask_BT


def backward(policy, rollout, advantage_B, plain=False, old_logp_BT=None):
    """Loss and gradient of one of GRPO's updates, by our packed rows or the plain way."""
    policy.zero_grad()
    every, loss = torch.arange(len(rollout)), 0.0
    for index_b in every.split(MICRO) if plain else micro_batches(rollout, every, every, MICRO):
        part = rollout[index_b]
        logp_bT = plain_logps(policy, part) if plain else read(token_logps, part, policy)
        old_logp_bT = logp_bT.detach() if old_logp_BT is None else old_logp_BT[index_b]
        loss_bT = grpo.policy_loss(logp_bT, old_logp_bT, advantage_B[index_b, None], 0.2, 0.2) * part.mask_BT
        (loss_bT.sum() / rollout.mask_BT.sum()).backward()
        loss += (loss_bT.detach().sum() / rollout.mask_BT.sum()).item()
    return loss, gradient(policy)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gaps(ours, theirs):
    """How far two (loss, gradient) are from each other: losses absolutely, gradients relatively."""
    return dict(loss_gap=abs(ours[0] - theirs[0]), gradient_gap=float((ours[1] - theirs[1]).norm() / theirs[1].norm()))


def invent(processor, problems, G, T):
    """A Rollout of random bytes, every answer T tokens long. (Ids below 256 are bytes; no special token is.)"""
    group_B, zeros_BT = torch.arange(len(problems) * G) // G, torch.zeros(len(problems) * G, T)
    tokens_BT = torch.randint(256, zeros_BT.shape, generator=generator("bench", T))
    return Rollout(encode(processor, problems), 1.0, group_B, tokens_BT, zeros_BT + 1, zeros_BT, zeros_BT,
                   torch.ones(len(group_B)), [""] * len(group_B))


def draw(args, policy, processor, problems):
    return sample(policy, processor, problems, args.num_generations, seed=(1, "bench"),
                  max_completion_length=args.max_completion_length, sample_batch_size=10**6)


# --- the parts: each yields lines of the table ------------------------------------------------------------------------


def bench_sampler(args, policy, processor, problems):
    """First no answer may end, and both sides make as many tokens; then they end where they do, and pay by token."""
    cast, sizes = (policy, processor, problems), (args.num_generations, args.max_completion_length)
    for case, banned in (("all to the limit", policy.banned + policy.ends), ("natural ends", policy.banned)):
        with mock.patch.object(policy, "banned", banned):
            times = in_turn(lambda: draw(args, *cast).mask_BT.sum().item(), lambda: generate(*cast, *sizes), args.pairs)
        yield dict(case=case, sides="generate / ours", wanted=">= 1.8", **times)


def bench_update(args, policy, processor, problems):
    S = statistics.mean(map(len, encode(processor, problems).ids))
    rollouts = {"sampled answers": draw(args, policy, processor, problems)}
    rollouts |= {f"T/S = {x}": invent(processor, problems[:8], args.num_generations, round(x * S)) for x in SHARES}
    for case, rollout in rollouts.items():
        cast = policy, rollout, torch.randn(len(rollout), generator=generator("advantage"))
        times = in_turn(lambda: backward(*cast), lambda: backward(*cast, plain=True), args.pairs)
        yield dict(case=case, sides="plain / packed", wanted=">= 1.8" if case == "sampled answers" else ">= 1",
                   **times, **gaps(backward(*cast), backward(*cast, plain=True)))


def even_length(problem, text):
    """A reward that an untrained model can earn, so that nearly every group has credit to give."""
    return float(len(text) % 2 == 0)


def two_steps(script, args, wishes, **patches):
    """Two steps of a script's main, without files, evaluation and report. Returns what the second took ({} but on the
    first process)."""
    taken = {}

    class Timed(common.Run):
        began, say, open_folder, append, finish = 0.0, *[lambda self, *_: None] * 4

        def log(self, step, rollout, *_, **metrics):
            cpu, tokens = time.process_time() - self.began, float(self.sum(rollout.mask_BT.sum()))
            speeds = {name.replace("seconds", "tokens_per_second"): tokens / lap for name, lap in self.laps.items()}
            taken.update(dict(speeds, cpu=cpu, tokens=tokens) if self.is_main else {})
            torch.set_num_threads(1)  # Run took all cores
            self.began = time.process_time()

    flags = common.parse_args(script.__name__, "", script.flags, script.RECIPE, {}, ["--model", args.model])
    vars(flags).update(wishes, max_steps=2, eval_dataset="none", prompts_per_step=args.problems, output_dir=NOWHERE,
                       num_generations=args.num_generations, max_completion_length=args.max_completion_length)
    with mock.patch.multiple(script, Run=Timed, grade=even_length, **patches):
        script.main(flags)
    return taken


def step_seconds(args, script, updates=1):
    """CPU seconds of a step of a script: sample, score, credit, update."""
    return two_steps(script, args, dict(
        dataset=f"toy@train:{args.problems}", updates_per_step=updates, micro_batch_size=MICRO,
        sample_batch_size=10**6, train_vision=True, gradient_checkpointing=False))["cpu"]


def bench_vepo(args, policy, processor, problems):
    for updates, wanted in ((1, "<= 1.6"), (4, "<= 1.3")):
        seconds = [lambda script=script: step_seconds(args, script, updates) for script in (grpo, vepo)]
        yield dict(case=f"updates to a rollout: {updates}", sides="vepo / grpo", wanted=wanted,
                   **in_turn(*seconds, args.pairs, cost=lambda fn: fn()))


def bench_mupo(args, policy, processor, problems):
    """The share of a step of mupo.py that goes into embedding (n-grams) and clustering, and what each takes of it."""
    paper = argparse.Namespace(**vars(args) | dict(problems=args.mupo_problems, num_generations=15))
    wishes = dict(dataset=f"toy@train:{paper.problems}", updates_per_step=4, micro_batch_size=MICRO, embedder="ngrams",
                  sample_batch_size=10**6, train_vision=True, gradient_checkpointing=False, clusters=3, min_cluster=3)
    taken = []
    for _ in range(args.pairs):
        spent = dict(reasoning=[], ngrams=[], partition=[], diversity=[])
        watched = {name: timed(getattr(mupo, name), calls) for name, calls in spent.items()}
        whole = two_steps(mupo, paper, wishes, is_right=even_length, **watched)["cpu"]
        each = [sum(calls[len(calls) // 2:]) for calls in spent.values()]  # the second step's half of the calls
        taken.append((whole, sum(each[:2]), sum(each[2:])))
    step, embedding, clustering = map(statistics.median, zip(*taken))
    yield dict(case=f"{paper.problems} problems of 15", sides="clustering / step", wanted="<= 0.15",
               seconds=[step, embedding, clustering], ratio=statistics.median((e + c) / s for s, e, c in taken))


def timed(fn, calls):
    """fn, which then adds the CPU seconds of each call to the list `calls`."""
    def wrapped(*args, **kwargs):
        began = time.process_time()
        result = fn(*args, **kwargs)
        calls.append(time.process_time() - began)
        return result
    return wrapped


def bench_memory(args, policy, processor, problems):
    """The tabletop's body with Qwen's vocabulary: what is measured is the logits and what is made of them."""
    config = AutoConfig.from_pretrained(args.model)
    config.get_text_config().vocab_size = VOCABULARY
    large = random_policy(config, args.model).prepare(processor.tokenizer)
    large.vocabulary = VOCABULARY
    rollout = invent(processor, problems[:1], 8, LENGTH)
    other = vepo.counterfactual(rollout.prompts, "noise", 2.0, (1, "bench"))
    before = memory_gb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    with torch.no_grad():
        read(vepo.look, rollout, large, common.Reading(large, other))
    yield dict(case=f"V = {VOCABULARY:,}", sides="GB", wanted="<= 1.5", ratio=memory_gb("VmHWM") - before)


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl_trainer(args, problems):
    """TRL's GRPOTrainer: the same problems in every step, MICRO answers to a pass. Its defaults are those of grpo.py
    here: one update, no KL, temperature 1, mean over tokens (dapo), advantages over the group's std."""
    import trl
    policy, processor = common.load_policy(args.model)
    processor.tokenizer.padding_side = "left"  # as TRL loads it when it is given none
    answers = args.problems * args.num_generations
    config = trl.GRPOConfig(
        NOWHERE, num_generations=args.num_generations, max_completion_length=args.max_completion_length, max_steps=2,
        per_device_train_batch_size=min(MICRO, answers), gradient_accumulation_steps=max(1, answers // MICRO),
        shuffle_dataset=False, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True)
    rows = [dict(prompt=[dict(role="user", content=f"{problem['problem']}\n{common.INSTRUCTION}")],
                 images=problem["images"]) for problem in problems]
    trainer = trl.GRPOTrainer(
        policy.requires_grad_(True), lambda completions, **_: [even_length(None, c[0]["content"]) for c in completions],
        config, Dataset.from_list(rows), processing_class=processor)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def trl_seconds(args, problems):
    """CPU seconds of the second of two steps, from its first token to its new weights."""
    clock = []
    tick = {name: lambda *_, **__: clock.append(time.process_time()) for name in ("on_step_begin", "on_step_end")}
    trainer = trl_trainer(args, problems)
    trainer.add_callback(type("Clock", (transformers.TrainerCallback,), tick))
    trainer.train()
    return clock[3] - clock[2]


def bench_trl(args, policy, processor, problems):
    if importlib.util.find_spec("trl") is None:
        return print("trl       skipped: trl cannot be imported; pip install trl==1.16.0 beside requirements.txt")
    seconds = lambda: step_seconds(args, grpo), lambda: trl_seconds(args, problems)
    yield dict(case="one step", sides="TRL / grpo", wanted=">= 2.5", **trl_gaps(args, policy, processor, problems),
               **in_turn(*seconds, args.pairs, cost=lambda fn: fn()))


def trl_gaps(args, policy, processor, problems):
    """Loss and gradient of our answers by TRL and by us, with π_old a little off: ratio and clip have their say."""
    rollout = draw(args, policy, processor, problems)
    # TRL forbids no token when it reads, and its softmax runs over the embedding's rows of padding too.
    rows, none = policy.config.get_text_config().vocab_size, torch.zeros(0, dtype=torch.long).numpy()
    with mock.patch.multiple(policy, vocabulary=rows, banned=none):
        with torch.no_grad():
            logp_BT = read(token_logps, rollout, policy)
        old_logp_BT = logp_BT + 0.2 * torch.randn(logp_BT.shape, generator=generator("old"))
        advantage_B = grpo.group_advantages(rollout.score(even_length)).flatten()
        ours = backward(policy, rollout, advantage_B, old_logp_BT=old_logp_BT)
    trainer = trl_trainer(args, problems)
    answers = [tokens[mask.bool()].tolist() for tokens, mask in zip(rollout.tokens_BT, rollout.mask_BT)]
    trainer._generate_single_turn = lambda *_, **__: (answers, None)
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    inputs = trainer._generate_and_score_completions([trainer.train_dataset[p] for p in rollout.group_B.tolist()])
    loss = trainer._compute_loss(trainer.model, inputs | dict(old_per_token_logps=old_logp_BT))
    loss.backward()
    return gaps(ours, (loss.item(), gradient(trainer.model)))


# --- real sizes -------------------------------------------------------------------------------------------------------

# Hidden size, layers, heads, key-value heads, feed-forward size, rows of the embedding; "tiny" is the tabletop's.
SHAPES = {"tiny": (), "3B": (2048, 36, 16, 2, 11_008, 151_936), "7B": (3584, 28, 28, 4, 18_944, 152_064)}


def shape_config(shape, tokenizer):
    """Qwen2.5-VL-3B's or -7B's configuration; the ids of the special tokens are the tokenizer's."""
    hidden, layers, heads, kv_heads, inner, rows = SHAPES[shape]
    text = dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                intermediate_size=inner, vocab_size=rows, rope_parameters=dict(
                    rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
    # The other defaults are Qwen's: 32 blocks, full attention in four of them, windows of 112, patches of 14 pixels.
    vision = dict(hidden_size=1280, intermediate_size=3420, out_hidden_size=hidden)
    marks = ("image_pad", "video_pad", "vision_start", "vision_end")
    image, video, start, end = tokenizer.convert_tokens_to_ids([f"<|{mark}|>" for mark in marks])
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=shape == "3B", image_token_id=image,
        video_token_id=video, vision_start_token_id=start, vision_end_token_id=end)


def random_policy(config, folder):
    """A model that nobody trained; what ends its answers is told by generation_config.json in `folder`."""
    policy = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    policy.__class__, policy.generation_config = common.Policy, GenerationConfig.from_pretrained(folder)
    return policy


def bench_shape(args):
    """The second of two steps of grpo.py at a real size: its speed and its memory ({} but on the first process)."""
    from lab import toy
    side = 28 * max(1, round(args.pixels**0.5 / 28))
    problems = [dict(id=str(i), problem="What is it?", answer="1", verifier="digit",
                     images=[Image.effect_noise((side, side), 99).convert("RGB")]) for i in range(args.problems)]
    with tempfile.TemporaryDirectory() as args.model:
        toy.untrained(args.model)  # for its tokenizer, image processor and generation_config.json
        if args.shape != "tiny":
            shape_config(args.shape, AutoTokenizer.from_pretrained(args.model)).save_pretrained(args.model)
        config = AutoConfig.from_pretrained(args.model)
        # Of the real size's rows the tokenizer names a few hundred; the head must make them all the same.
        rows = property(lambda policy: config.get_text_config().vocab_size, lambda policy, value: None)
        with mock.patch.object(common.Policy, "vocabulary", rows, create=True), \
                mock.patch.object(common, "load_whole", lambda folder, dtype: random_policy(config, folder)):
            step = two_steps(grpo, args, dict(updates_per_step=1, max_pixels=args.pixels, max_prompt_length=20_000),
                             load_problems=lambda name: [] if name == "none" else problems)
    peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else memory_gb("VmHWM")
    return step and dict(step, peak_memory_gb=peak)


# --- the table --------------------------------------------------------------------------------------------------------

PARTS = dict(sampler=bench_sampler, update=bench_update, trl=bench_trl, vepo=bench_vepo, mupo=bench_mupo,
             memory=bench_memory)


def parse(argv=None):
    parser = common.Parser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy", help="toy, or the folder of a model of the tabletop")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to compare")
    parser.add_argument("--pairs", type=int, default=5, help="how often both sides are measured")
    parser.add_argument("--problems", type=int, default=16, help="P, problems in a step")
    parser.add_argument("--num_generations", type=int, default=8, help="G, answers to each")
    parser.add_argument("--mupo_problems", type=int, default=64, help="P of the part mupo, whose G is 15")
    parser.add_argument("--max_completion_length", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--shape", choices=SHAPES, help="measure grpo.py at this size instead, with random weights")
    parser.add_argument("--device", choices=("cpu", "cuda")[:1 + torch.cuda.is_available()], default="cpu",
                        help="of --shape; the comparisons are the CPU's")
    parser.add_argument("--pixels", type=int, default=1_000_000, help="of --shape's pictures")
    parser.add_argument("--output", default="results/bench.json", help="where the numbers go")
    return parser.parse_args(argv)


def show(part, line):
    """Prints one line of the table."""
    sign, bound = line["wanted"].split()
    line = dict(part=part, **line, met=(line["ratio"] >= float(bound)) == (sign == ">="))
    checks = "  ".join(f"{name} {line[name]:.1e}" for name in ("loss_gap", "gradient_gap") if name in line)
    print(f"{part:10}{line['case']:26}{line['sides']:18}{line['ratio']:6.2f}  {line['wanted']:8}"
          f"{'' if line['met'] else 'missed':8}{checks}".rstrip(), flush=True)
    return line


def main(args):
    os.environ["ACCELERATE_USE_CPU"] = str(args.device == "cpu")
    about = dict(vars(args), torch=torch.__version__, transformers=transformers.__version__)
    torch.set_num_threads(1)
    if args.shape:
        numbers = bench_shape(args)
        print("".join(f"{name:28}{value:12,.1f}\n" for name, value in numbers.items()), end="")
    else:
        args.model = common.find_model(args.model)
        policy, processor = common.load_policy(args.model)
        cast = policy.requires_grad_(True), processor, common.load_problems(f"toy@train:{args.problems}")[:]
        print(f"{'part':10}{'case':26}{'what':18}{'ratio':>6}  {'wanted':16}checks")
        numbers = [show(part, line) for part in args.parts for line in PARTS[part](args, *cast)]
    if numbers:  # else this is not the first process
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        common.write_atomically(args.output, json.dumps(about | dict(numbers=numbers), indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(parse())
    except common.UserError as error:
        common.Parser().error(str(error))

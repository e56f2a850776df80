"""Speed and memory, side by side with the plain way and with TRL.

    python lab/bench.py                             every part on the tabletop, minutes; into results/bench.json
    python lab/bench.py --parts sampler update      some of them
    python lab/bench.py --shape 7B --device cuda    a real size with random weights: tokens per second, memory
    python lab/bench.py --plan 7B --gpus 8 --memory 80      what would fit, by arithmetic alone (lab/plan.py)
    python lab/gpu.py                               all that a GPU can tell, in one command

Parts, all in one process and one thread:

    sampler   common.sample                    against transformers' generate(num_return_sequences=G); greedy_gap is the
              number of problems whose greedy answers differ
    update    packed rows, chunked head        against policy.forward, where every answer is a padded row with its own
              picture: same loss, same gradient; then as a curve over T/S, answer length over prompt length
    trl       a step of grpo.py                against one of TRL's GRPOTrainer (skipped where trl cannot be imported);
              and loss and gradient of both for the same answers
    vepo      a step of vepo.py                against one of grpo.py, with one and with four updates to a rollout
    mupo      embedding and clustering         as a share of a step of mupo.py, 64 problems, 15 answers, 3 clusters
    memory    what VEPO's two readings of 8 answers of 512 tokens need above the model, at Qwen's vocabulary

CPU time is compared (time.process_time). Both sides run in turn, and the ratio is the median over the pairs.

--shape runs two steps of grpo.py itself, with a true Qwen2.5-VL configuration, random weights and pictures of noise. It
needs no checkpoint and no network, and measures wall-clock time. THE GPU MODE HAS NEVER BEEN RUN: it was written on a
machine without a GPU. The tests run `--shape tiny --device cpu`, the same path through grpo.py except for sharding.
Memory on the CPU is read from Linux's /proc.
"""

import argparse
import contextlib
import functools
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

import common
import grpo
import mupo
import vepo
from common import Policy, Reading, encode, find_model, load_policy, load_problems, read, sample, token_logps
from harness import embedding, memory
from harness.flags import INSTRUCTION, Parser, UserError, at_least, parse_args
from harness.rollout import Rollout
from harness.run import Run, check_writable, generator, write_atomically
from harness.updates import micro_batches
from lab import plan
from lab.shapes import SHAPES, config_of, shape_config
from tabletop.models import untrained

import numpy as np
import torch
import transformers
from datasets import Dataset
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

try:
    import trl
except ImportError:
    trl = None  # not one of the project's requirements: without it the part is skipped

MICRO = 64  # answers in a forward pass, on both sides
# T/S of the curve, and there the wanted ratio: the plain update's cost over ours
SHARES = {0.25: ">= 3", 0.5: ">= 2.4", 1: ">= 1.8", 2: ">= 1.35", 4: ">= 1.15"}
VOCABULARY = 151_936  # of the part memory
LENGTH = 512  # tokens of its answers
TOGETHER = 10**6  # answers decoded together: all of them
NOWHERE = "runs/bench"  # the folder of the runs that are measured; they write nothing into it

# --- clocks -----------------------------------------------------------------------------------------------------------


def cpu_seconds(fn):
    """CPU seconds of this process in fn()."""
    began = time.process_time()
    fn()
    return time.process_time() - began


def cpu_seconds_per_token(fn):
    """CPU seconds of this process in fn(), which returns how many tokens it made, divided by that number."""
    began = time.process_time()
    tokens = fn()
    return (time.process_time() - began) / tokens


def own_seconds(fn):
    """The cost of a function that measures itself and returns its seconds."""
    return fn()


def in_turn(one, other, pairs, cost=cpu_seconds):
    """Two functions called in turn: the medians of what each costs, and the median over pairs of other/one."""
    one()  # caches, lazy imports, memory of the allocator
    other()
    costs_of_one = []
    costs_of_other = []
    for pair in range(pairs):
        if pair % 2 == 1:
            costs_of_one.append(cost(one))
            costs_of_other.append(cost(other))
        else:
            costs_of_other.append(cost(other))
            costs_of_one.append(cost(one))
    ratios = [b / a for a, b in zip(costs_of_one, costs_of_other, strict=True)]
    seconds = [statistics.median(costs_of_one), statistics.median(costs_of_other)]
    return dict(seconds=seconds, ratio=statistics.median(ratios))


def timed(fn, calls):
    """fn, which then adds the CPU seconds of each call to the list `calls`."""

    def wrapped(*args, **kwargs):
        began = time.process_time()
        result = fn(*args, **kwargs)
        calls.append(time.process_time() - began)
        return result

    return wrapped


def memory_gb(name):
    """VmRSS, the resident memory of this process, or VmHWM, its highest so far; in GB of 10⁹ bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith(f"{name}:")]
    return kibibytes[0] * 1024 / 1e9


# --- the plain way ----------------------------------------------------------------------------------------------------


def generate(policy, processor, problems, *, G, T):
    """Sampling as it is written without a sampler of one's own. Returns how many tokens it made, ends included."""
    answers_BT = generated(
        policy, processor, problems, max_new_tokens=T, num_return_sequences=G, do_sample=True, temperature=1.0,
        top_k=0, top_p=1.0)
    processor.tokenizer.batch_decode(answers_BT, skip_special_tokens=True)
    ended_BT = torch.isin(answers_BT, torch.tensor(policy.ends)).cumsum(1) > 0
    tokens_after_the_first = int((~ended_BT[:, :-1]).sum())
    return len(answers_BT) + tokens_after_the_first


def generated(policy, processor, problems, **settings):
    """(B, T) token ids of answers by transformers' generate."""
    inputs = processor(
        text=[common.chat(processor, problem) for problem in problems],
        images=[problem["images"] for problem in problems],
        return_tensors="pt", padding=True, padding_side="left", return_mm_token_type_ids=True)
    padding_rows = range(policy.vocabulary, policy.config.get_text_config().vocab_size)
    config = GenerationConfig(
        repetition_penalty=1.0, eos_token_id=policy.ends, pad_token_id=processor.tokenizer.pad_token_id,
        suppress_tokens=[*policy.banned, *padding_rows], **settings)
    prompt_length = inputs["input_ids"].shape[1]
    return policy.generate(**inputs, generation_config=config)[:, prompt_length:]


def greedy_gap(args, policy, processor, problems):
    """How many of the problems get another greedy answer from our sampler than from generate."""
    ours = sample(
        policy, processor, problems, 1, seed=(1, "bench"), max_completion_length=args.max_completion_length,
        temperature=0.0)
    theirs_BT = generated(
        policy, processor, problems, max_new_tokens=args.max_completion_length, do_sample=False)
    texts = processor.tokenizer.batch_decode(theirs_BT, skip_special_tokens=True)
    return sum(text != other for text, other in zip(ours.texts, texts, strict=True))


def padded_rows(rollout):
    """The arguments of policy.forward with a row for each answer: its own copy of the prompt and picture, padded."""
    prompts = rollout.prompts
    groups = rollout.group_B.tolist()
    B, T = rollout.tokens_BT.shape
    S = max(len(prompts.ids[p]) for p in groups)
    ids = torch.zeros(B, S + T, dtype=torch.long)
    mask = torch.zeros(B, S + T, dtype=torch.long)
    types = torch.zeros(B, S + T, dtype=torch.long)
    for b, p in enumerate(groups):
        start = S - len(prompts.ids[p])
        ids[b, start:S] = prompts.ids[p]
        mask[b, start:S] = 1
        types[b, start:S] = prompts.types[p]
    ids[:, S:] = rollout.tokens_BT
    mask[:, S:] = rollout.mask_BT
    return dict(
        input_ids=ids,
        attention_mask=mask,
        mm_token_type_ids=types,
        pixel_values=torch.cat([prompts.pixels[p] for p in groups]),
        image_grid_thw=torch.cat([prompts.grids[p] for p in groups]),
    )


def plain_logps(policy, rollout):
    """(B, T) log-probs by policy.forward, from all logits at once."""
    T = rollout.tokens_BT.shape[1]
    logits_BTV = policy(**padded_rows(rollout), logits_to_keep=T + 1).logits[:, :-1, :policy.vocabulary]
    logits_BTV = (logits_BTV / rollout.temperature).index_fill(2, torch.tensor(policy.banned), -1e9)
    logp_BT1 = logits_BTV.log_softmax(2).gather(2, rollout.tokens_BT[..., None])
    return logp_BT1[..., 0] * rollout.mask_BT


def packed_logps(policy, rollout):
    """(B, T) log-probs as the scripts read them."""
    return read(token_logps, rollout, policy)


def backward(policy, rollout, advantage_B, *, plain=False, old_logp_BT=None):
    """Loss and gradient of one of GRPO's updates, by our packed rows or the plain way."""
    policy.zero_grad()
    if plain:
        logps = plain_logps
        batches = torch.arange(len(rollout)).split(MICRO)
    else:
        logps = packed_logps
        batches = micro_batches(rollout, range(len(rollout)), MICRO)
    loss = 0.0
    for index_b in batches:
        part = rollout[index_b]
        logp_bT = logps(policy, part)
        old_logp_bT = logp_bT.detach() if old_logp_BT is None else old_logp_BT[index_b]
        loss_bT = grpo.policy_loss(
            logp_bT, old_logp_bT, advantage_B[index_b, None], epsilon=0.2, epsilon_high=0.2)
        part_of_loss = (loss_bT * part.mask_BT).sum() / rollout.mask_BT.sum()
        part_of_loss.backward()
        loss += part_of_loss.item()
    return loss, gradient(policy)


def gradient(model):
    """The gradient of all weights as one vector."""
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def gaps(ours, theirs):
    """How far apart two (loss, gradient) are: losses absolutely, gradients relatively."""
    our_loss, our_gradient = ours
    their_loss, their_gradient = theirs
    gradient_gap = (our_gradient - their_gradient).norm() / their_gradient.norm()
    return dict(loss_gap=abs(our_loss - their_loss), gradient_gap=float(gradient_gap))


def invent(processor, problems, G, T):
    """A Rollout of random bytes, every answer T tokens long. (Ids below 256 are bytes; no special token is.)"""
    B = len(problems) * G
    return Rollout(
        prompts=encode(processor, problems),
        temperature=1.0,
        group_B=torch.arange(B) // G,
        tokens_BT=torch.randint(256, (B, T), generator=generator("bench", T)),
        mask_BT=torch.ones(B, T),
        logp_BT=torch.zeros(B, T),
        entropy_BT=torch.zeros(B, T),
        finished_B=torch.ones(B),
        texts=[""] * B,
    )


def draw(args, policy, processor, problems):
    """A Rollout of answers that the policy samples."""
    return sample(
        policy, processor, problems, args.num_generations, seed=(1, "bench"),
        max_completion_length=args.max_completion_length, sample_batch_size=TOGETHER)


# --- steps of the scripts ---------------------------------------------------------------------------------------------


class TimedRun(Run):
    """A run on one thread that writes and prints nothing. taken: what a step cost, from the log before it."""

    def __init__(self, args):
        super().__init__(args)
        torch.set_num_threads(1)  # Run took all cores
        self.taken = {}
        self.cpu_began = 0.0

    def lap(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # a GPU works while Python goes on
        super().lap(name)

    def log(self, step, metrics, samples=(), pictures=None):
        cpu = time.process_time() - self.cpu_began
        tokens = float(metrics["tokens"])
        self.taken = {}
        for name, seconds in self.laps.items():
            self.taken[name.replace("seconds", "tokens_per_second")] = tokens / seconds
        self.taken["cpu"] = cpu
        self.taken["tokens"] = tokens
        self.cpu_began = time.process_time()

    def start(self, policy, optimizer):
        pass

    def say(self, text):
        pass

    def append(self, path, rows):
        pass

    def save_checkpoint(self, step):
        pass


def even_length(problem, text):
    """A reward that an untrained model can earn, so that nearly every group has credit to give."""
    return float(len(text) % 2 == 0)


def two_steps(script, args, wishes, **stand_ins):
    """Two steps of a script's main, without files, evaluation and report. Returns the cost of the second.

    wishes: the script's flags, where they are not its RECIPE's. stand_ins: what replaces functions of the script.
    On every process but the first the result is {}.
    """
    flags = parse_args(script.__name__, script.flags, recipe=script.RECIPE, argv=["--model", args.model])
    settings = vars(flags) | wishes
    settings |= dict(
        max_steps=2, eval_dataset="none", prompts_per_step=args.problems, output_dir=NOWHERE,
        num_generations=args.num_generations, max_completion_length=args.max_completion_length)
    runs = []

    def hand_back(run, policy, processor):
        runs.append(run)

    with mock.patch.multiple(script, Run=TimedRun, finish=hand_back, grade=even_length, **stand_ins):
        script.main(argparse.Namespace(**settings))
    run = runs[0]
    return run.taken if run.is_main else {}


def tabletop_wishes(args, updates):
    """The flags of a step on the tabletop: every step asks all of the problems, and all weights are trained."""
    return dict(
        dataset=f"toy@train:{args.problems}", updates_per_step=updates, micro_batch_size=MICRO,
        sample_batch_size=TOGETHER, train_vision=True, gradient_checkpointing=False, min_pixels=784)


def step_seconds(args, script, updates=1, problems=None):
    """CPU seconds of a step of a script: sample, score, credit, update. problems: what it asks, if not its data set."""
    stand_ins = {}
    if problems is not None:
        stand_ins["load_problems"] = lambda spec, run: problems if spec != "none" else []
    return two_steps(script, args, tabletop_wishes(args, updates), **stand_ins)["cpu"]


def with_flags(args, **flags):
    """A copy of args with other values for some of its flags."""
    return argparse.Namespace(**vars(args) | flags)


# --- the parts: each yields lines of the table ------------------------------------------------------------------------


def bench_sampler(args, policy, processor, problems):
    """First no answer may end, so both sides make equally many tokens; then answers end where they do. Per token."""

    def ours():
        return draw(args, policy, processor, problems).mask_BT.sum().item()

    def theirs():
        return generate(policy, processor, problems, G=args.num_generations, T=args.max_completion_length)

    cases = {
        "all to the limit": (policy.banned + policy.ends, ">= 1.6"),
        "natural ends": (policy.banned, ">= 2.3"),
    }
    for case, (banned, wanted) in cases.items():
        with mock.patch.object(policy, "banned", banned):
            times = in_turn(ours, theirs, args.pairs, cost=cpu_seconds_per_token)
            gap = greedy_gap(args, policy, processor, problems)
        yield dict(case=case, sides="generate / ours", wanted=wanted, greedy_gap=gap, **times)


def bench_update(args, policy, processor, problems):
    """The update of sampled answers; then of answers that are all of one length, for each T/S of the curve."""
    rollout = draw(args, policy, processor, problems)
    case = "sampled answers"
    yield dict(case=case, sides="plain / packed", wanted=">= 1.8", **compare_updates(args, policy, rollout))
    S = statistics.mean(len(ids) for ids in rollout.prompts.ids)
    for share, wanted in SHARES.items():
        rollout = invent(processor, problems[:8], args.num_generations, round(share * S))
        case = f"T/S = {share}"
        yield dict(case=case, sides="plain / packed", wanted=wanted, **compare_updates(args, policy, rollout))


def compare_updates(args, policy, rollout):
    """Times of the packed and the plain update of one rollout, and how far apart their results are."""
    advantage_B = torch.randn(len(rollout), generator=generator("advantage"))
    packed = functools.partial(backward, policy, rollout, advantage_B)
    plain = functools.partial(backward, policy, rollout, advantage_B, plain=True)
    times = in_turn(packed, plain, args.pairs)
    return times | gaps(packed(), plain())


def bench_vepo(args, policy, processor, problems):
    """A step of vepo.py beside one of grpo.py."""
    bounds = {1: "<= 1.6", 4: "<= 1.3"}
    for updates, wanted in bounds.items():
        step_of_grpo = functools.partial(step_seconds, args, grpo, updates)
        step_of_vepo = functools.partial(step_seconds, args, vepo, updates)
        times = in_turn(step_of_grpo, step_of_vepo, args.pairs, cost=own_seconds)
        yield dict(case=f"updates to a rollout: {updates}", sides="vepo / grpo", wanted=wanted, **times)


def bench_mupo(args, policy, processor, problems):
    """The share of a step of mupo.py that goes into embedding (n-grams) and clustering, and what each takes of it."""
    paper = with_flags(args, problems=args.mupo_problems, num_generations=15)
    steps = []
    embeddings = []
    clusterings = []
    for _ in range(args.pairs):
        step, spent = step_of_mupo(paper)
        steps.append(step)
        embeddings.append(spent["reasoning"] + spent["ngrams"])
        clusterings.append(spent["partition"] + spent["diversity"])
    shares = [(e + c) / step for step, e, c in zip(steps, embeddings, clusterings, strict=True)]
    yield dict(
        case=f"{paper.problems} problems of 15", sides="clustering / step", wanted="<= 0.15",
        seconds=[statistics.median(steps), statistics.median(embeddings), statistics.median(clusterings)],
        ratio=statistics.median(shares))


def step_of_mupo(args):
    """CPU seconds of a step of mupo.py, and {function: seconds in it} of embedding and clustering."""
    wishes = tabletop_wishes(args, updates=4) | dict(embedder="ngrams", clusters=3, min_cluster=3)
    calls = dict(reasoning=[], ngrams=[], partition=[], diversity=[])
    stand_ins = dict(
        is_right=even_length,
        reasoning=timed(mupo.reasoning, calls["reasoning"]),
        partition=timed(mupo.partition, calls["partition"]),
        diversity=timed(mupo.diversity, calls["diversity"]),
    )
    with mock.patch.object(embedding, "ngrams", timed(embedding.ngrams, calls["ngrams"])):
        step = two_steps(mupo, args, wishes, **stand_ins)["cpu"]
    spent = {}
    for name, seconds in calls.items():
        half = len(seconds) // 2  # both steps call it equally often; the second is measured
        spent[name] = sum(seconds[half:])
    return step, spent


def bench_memory(args, policy, processor, problems):
    """The tabletop's body with Qwen's vocabulary: what is measured is the logits and what is made of them."""
    config = AutoConfig.from_pretrained(args.model)
    config.get_text_config().vocab_size = VOCABULARY
    large = random_policy(config, args.model)
    large.set_vocabulary(processor.tokenizer)
    large.vocabulary = VOCABULARY
    rollout = invent(processor, problems[:1], 8, LENGTH)
    noised = vepo.counterfactual(rollout.prompts, "noise", 2.0, (1, "bench"))
    before = memory_gb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    with torch.no_grad():
        read(vepo.look, rollout, large, Reading(large, noised))
    needed = memory_gb("VmHWM") - before
    yield dict(case=f"V = {VOCABULARY:,}", sides="GB", wanted="<= 1.5", ratio=needed)


# --- TRL --------------------------------------------------------------------------------------------------------------


class StepClock(transformers.TrainerCallback):
    """Notes the CPU time at the start and the end of each step of a Trainer."""

    def __init__(self):
        self.times = []

    def on_step_begin(self, *args, **kwargs):
        self.times.append(time.process_time())

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.process_time())


def even_lengths(completions, **columns):
    """even_length as TRL calls a reward: for a list of answers, each a list with one message."""
    return [even_length(None, messages[0]["content"]) for messages in completions]


def trl_trainer(args, problems):
    """TRL's GRPOTrainer: the same problems in every step, MICRO answers to a pass. Its defaults are those of grpo.py
    here: one update, no KL, temperature 1, mean over tokens (dapo), advantages over the group's std."""
    policy, processor = load_policy(args.model)
    processor.tokenizer.padding_side = "left"  # as TRL loads it when it is given none
    answers = args.problems * args.num_generations
    config = trl.GRPOConfig(
        NOWHERE, num_generations=args.num_generations, max_completion_length=args.max_completion_length, max_steps=2,
        per_device_train_batch_size=min(MICRO, answers), gradient_accumulation_steps=max(1, answers // MICRO),
        shuffle_dataset=False, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True)
    rows = []
    for problem in problems:
        message = dict(role="user", content=f"{problem['problem']}\n{INSTRUCTION}")
        rows.append(dict(prompt=[message], images=problem["images"]))
    trainer = trl.GRPOTrainer(
        policy.requires_grad_(True), even_lengths, config, Dataset.from_list(rows), processing_class=processor)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def trl_seconds(args, problems):
    """CPU seconds of the second of two steps, from its first token to its new weights."""
    clock = StepClock()
    trainer = trl_trainer(args, problems)
    trainer.add_callback(clock)
    trainer.train()
    began, ended = clock.times[2:]
    return ended - began


def bench_trl(args, policy, processor, problems):
    """A step of TRL's trainer beside one of grpo.py. Without TRL there is no line, and the table says so."""
    if trl is None:
        print("trl       skipped: trl cannot be imported; pip install trl==1.16.0 beside requirements.txt")
        return
    checks = trl_gaps(args, policy, processor, problems)
    our_step = functools.partial(step_seconds, args, grpo, problems=problems)  # drawn already, as TRL is given them
    their_step = functools.partial(trl_seconds, args, problems)
    times = in_turn(our_step, their_step, args.pairs, cost=own_seconds)
    yield dict(case="one step", sides="TRL / grpo", wanted=">= 3", **checks, **times)


def trl_gaps(args, policy, processor, problems):
    """Loss and gradient of the same answers by TRL and by us; π_old is a little off, so that ratio and clip matter."""
    rollout = draw(args, policy, processor, problems)
    # TRL forbids no token when it reads, and its softmax runs over the embedding's rows of padding too.
    rows = policy.config.get_text_config().vocab_size
    nothing = np.zeros(0, dtype=np.int64)  # an empty list would become a tensor of floats
    with mock.patch.multiple(policy, vocabulary=rows, banned=nothing):
        with torch.no_grad():
            logp_BT = read(token_logps, rollout, policy)
        old_logp_BT = logp_BT + 0.2 * torch.randn(logp_BT.shape, generator=generator("old"))
        advantage_B = grpo.group_advantages(rollout.score(even_length)).flatten()
        ours = backward(policy, rollout, advantage_B, old_logp_BT=old_logp_BT)
    return gaps(ours, trl_backward(args, problems, rollout, old_logp_BT))


def trl_backward(args, problems, rollout, old_logp_BT):
    """Loss and gradient by TRL of answers that we sampled."""
    answers = []
    for tokens_T, mask_T in zip(rollout.tokens_BT, rollout.mask_BT, strict=True):
        answers.append(tokens_T[mask_T.bool()].tolist())

    def give_answers(*args, **kwargs):
        return answers, None

    trainer = trl_trainer(args, problems)
    trainer._generate_single_turn = give_answers
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    rows = [trainer.train_dataset[p] for p in rollout.group_B.tolist()]
    inputs = trainer._generate_and_score_completions(rows)
    inputs["old_per_token_logps"] = old_logp_BT
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), gradient(trainer.model)


# --- real sizes -------------------------------------------------------------------------------------------------------

def random_policy(config, folder, dtype=torch.float32):
    """A model with random weights; which ids end its answers is in generation_config.json in `folder`."""
    policy = Policy.of(AutoModelForImageTextToText.from_config(config, dtype=dtype).eval())
    policy.generation_config = GenerationConfig.from_pretrained(folder)
    return policy


@contextlib.contextmanager
def random_models():
    """Models are not loaded but made of their config, and their heads compute the whole vocabulary."""
    set_vocabulary = Policy.set_vocabulary

    def set_whole_vocabulary(policy, tokenizer):
        # The tokenizer names a few hundred of the real size's rows. The head must compute all of them.
        set_vocabulary(policy, tokenizer)
        policy.vocabulary = policy.config.get_text_config().vocab_size

    def load_random(folder, dtype):
        return random_policy(AutoConfig.from_pretrained(folder), folder, dtype)

    with (
        mock.patch.object(Policy, "set_vocabulary", set_whole_vocabulary),
        mock.patch.object(common, "load_whole", load_random),
    ):
        yield


def noise_problems(count, pixels):
    """Problems whose pictures are squares of noise of about `pixels` pixels."""
    side = 28 * max(1, round(pixels**0.5 / 28))
    problems = []
    for number in range(count):
        picture = Image.effect_noise((side, side), 99).convert("RGB")
        problems.append(dict(
            id=str(number), problem="What is it?", answer="1", verifier="digit", images=[picture]))
    return problems


def write_shape(folder, shape):
    """Writes tokenizer, image processor, config.json and generation_config.json of a model of this size."""
    untrained(folder)
    if shape != "tiny":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        config = shape_config(shape)
        config.dtype = torch.bfloat16  # as the real ones: what is only read stays so
        for name in ("image", "video", "vision_start", "vision_end"):
            word = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
            setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(word))
        config.save_pretrained(folder)


def bench_shape(args, script=grpo, **wishes):
    """The second of two steps of a script at a real size: its speed, its memory, and the tokens of a prompt.

    wishes: flags of the script. Returns {} on every process but the first.
    """
    problems = noise_problems(args.problems, args.pixels)
    lengths = []

    def load_noise(spec, run):
        return [] if spec == "none" else problems

    def watched(*args, **kwargs):
        rollout = sample(*args, **kwargs)
        lengths.append(len(rollout.prompts.ids[0]))
        return rollout

    settings = dict(
        updates_per_step=1, max_pixels=args.pixels, min_pixels=784, max_prompt_length=20_000)
    with tempfile.TemporaryDirectory() as folder, random_models():
        write_shape(folder, args.shape)
        step = two_steps(
            script, with_flags(args, model=folder), settings | dict(teacher=folder) | wishes,
            load_problems=load_noise, sample=watched)
    if step:
        step["prompt_tokens"] = lengths[-1]
        step["peak_memory_gb"] = peak_memory_gb(args.device)
    return step


def peak_memory_gb(device):
    """The most that this process has held so far, in GB of 10⁹ bytes: on a GPU what torch had allocated there."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return memory_gb("VmHWM")


# --- the table --------------------------------------------------------------------------------------------------------

PARTS = dict(
    sampler=bench_sampler,
    update=bench_update,
    trl=bench_trl,
    vepo=bench_vepo,
    mupo=bench_mupo,
    memory=bench_memory,
)


def parse(argv=None):
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    whole = at_least(1)
    parser = Parser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy", help="toy, or the folder of a model of the tabletop")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to compare")
    parser.add_argument("--pairs", type=whole, default=5, help="how often both sides are measured")
    parser.add_argument("--problems", type=whole, default=16, help="P, problems in a step")
    parser.add_argument("--num_generations", type=whole, default=8, help="G, answers to each")
    parser.add_argument("--mupo_problems", type=whole, default=64, help="P of the part mupo, whose G is 15")
    parser.add_argument("--max_completion_length", type=whole, help="most tokens in an answer (64; with --plan: 2048)")
    parser.add_argument("--shape", choices=("tiny", *SHAPES),
                        help="measure grpo.py at this size instead, with random weights")
    parser.add_argument("--device", choices=devices, default="cpu", help="for --shape; the comparisons run on the CPU")
    parser.add_argument("--pixels", type=whole, default=1_000_000, help="for --shape and --plan: pixels of a picture")
    parser.add_argument("--plan", metavar="MODEL", help=f"plan a run instead: {', '.join(SHAPES)}, or a model's folder")
    parser.add_argument("--gpus", type=whole, default=8, help="for --plan: how many GPUs")
    parser.add_argument("--memory", type=whole, default=80, help="for --plan: GB of each GPU")
    parser.add_argument("--teacher", help="for --plan: a model that only reads, split over the same GPUs")
    parser.add_argument("--mean_length", type=whole, default=350, help="for --plan: tokens of an answer on average")
    parser.add_argument("--output", default="results/bench.json", help="where the numbers go")
    args = parser.parse_args(argv)
    if args.max_completion_length is None:
        args.max_completion_length = 2048 if args.plan else 64
    return args


def is_met(ratio, wanted):
    """Whether a ratio keeps a bound such as ">= 1.8" or "<= 0.15"."""
    sign, bound = wanted.split()
    if sign == ">=":
        return ratio >= float(bound)
    return ratio <= float(bound)


def print_line(line):
    """Prints one line of the table."""
    text = f"{line['part']:10}{line['case']:26}{line['sides']:18}{line['ratio']:6.2f}  {line['wanted']:8}"
    verdict = "" if line["met"] else "missed"
    names = ("greedy_gap", "loss_gap", "gradient_gap")
    checks = [f"{name} {line[name]:.1g}" for name in names if name in line]
    print(f"{text}{verdict:8}{'  '.join(checks)}".rstrip(), flush=True)


def compare(args):
    """Measures the parts and prints a line for each comparison. Returns the lines, as results/bench.json has them."""
    args = with_flags(args, model=find_model(args.model))
    policy, processor = load_policy(args.model)
    policy.requires_grad_(True)
    problems = load_problems(f"toy@train:{args.problems}")[:]
    print(f"{'part':10}{'case':26}{'what':18}{'ratio':>6}  {'wanted':16}checks")
    lines = []
    for part in args.parts:
        for numbers in PARTS[part](args, policy, processor, problems):
            line = dict(part=part, **numbers, met=is_met(numbers["ratio"], numbers["wanted"]))
            print_line(line)
            lines.append(line)
    return lines


def show_plan(args):
    """Prints what a run of this size needs, and the flags that fit."""
    visual = round(args.pixels / memory.VISUAL_TOKEN)
    work = memory.Work(
        S=visual + plan.WORDS, patches=4 * visual, T=min(args.mean_length, args.max_completion_length),
        T_most=args.max_completion_length, G=args.num_generations, wave=plan.MOST_TOGETHER, row=args.num_generations)
    machine = memory.Machine(args.gpus, args.memory * plan.GB)
    teacher = config_of(args.teacher) if args.teacher else None
    found = plan.plan(config_of(args.plan), work, machine, teacher)
    print("\n".join(plan.lines_of(args.plan, found, machine)))


def main(args):
    if args.plan:
        show_plan(args)
        return
    check_writable(str(Path(args.output).parent), "--output")
    os.environ["ACCELERATE_USE_CPU"] = str(args.device == "cpu")
    torch.set_num_threads(1)
    if args.shape:
        numbers = bench_shape(args)
        for name, value in numbers.items():
            print(f"{name:28}{value:12,.1f}")
    else:
        numbers = compare(args)
    if numbers:  # else this is not the first process
        about = dict(vars(args), torch=torch.__version__, transformers=transformers.__version__, numbers=numbers)
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        Parser().error(str(error))

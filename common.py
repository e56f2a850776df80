"""The world around the algorithms: everything that is not in a paper's method section.

    1  flags         parse_args, launch          one parser, four layers of defaults
    2  a run         Run                         processes, folder, log, schedule, checkpoints, held-out accuracy
    3  model         load_policy, save_policy    Qwen2.5-VL of any size, sharded or whole, and its processor
    4  problems      load_problems               data sets by name or by path, checked row by row
    5  prompts       encode                      problems to token ids and picture patches
    6  sample        sample                      the first verb: make answers
    7  read          read, token_logps, ...      the second verb: look at answers
    8  rewards       grade, format_reward        one verifier per problem

Shape letters: P problems, G answers to each, B answers in all, T answer tokens, S prompt tokens, L tokens of a packed
row, R rows, N tokens of a chunk, D hidden size, V vocabulary.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from accelerate import Accelerator, init_empty_weights
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, DynamicCache

INSTRUCTION = "Reason inside <think></think>, then put the final answer in \\boxed{}."
MAX_PIXELS = 1_000_000  # the hub's default is 12.8 megapixels, 16,384 tokens a picture
MIN_PIXELS = 28 * 28  # one visual token: small pictures are not enlarged
TOYS = ("toy", "toy-teacher")
LOGITS = 2**25  # fp32 logits that exist at a time, 0.13 GB: at V = 152k the head meets 220 positions at once


class UserError(Exception):
    """Something the user can mend. Its text is one line: what is wrong and what to do. Ends a script with status 2."""


# === 1. flags =========================================================================================================

MODEL_FLAGS = dict(
    model=("toy", "toy, toy-teacher, a folder, or a name on the hub such as Qwen/Qwen2.5-VL-7B-Instruct"),
    max_pixels=(MAX_PIXELS, "larger pictures are scaled down to this many pixels (28x28 pixels are one token)"),
    max_prompt_length=(2048, "a longer prompt is an error: a prompt is never truncated, pictures would break"),
    max_completion_length=(2048, "tokens of an answer"),
    temperature=(1.0, "divides the logits when sampling and when reading"),
    sample_batch_size=(256, "answers decoded together"),
    seed=(1, "fixes everything random: answers depend on (seed, step, problem), on nothing else"),
    output_dir=(None, "the run's folder (default: runs/SCRIPT-MODEL-SEED)"),
    resume=(False, "go on from the newest checkpoint in --output_dir, to the same numbers"),
    report_to=("none", "a tracker that accelerate knows: tensorboard, wandb, trackio, ..."),
)
TRAIN_FLAGS = dict(
    dataset=("hiyouga/geometry3k@train", "name@split[:count], toy@train, or a path to jsonl, json, parquet, a folder"),
    eval_dataset=("hiyouga/geometry3k@test", "held-out problems, or none"),
    eval_steps=(0, "held-out accuracy every so many steps (0: before and after only)"),
    num_generations_eval=(4, "answers sampled for each held-out problem"),
    max_steps=(60, "optimisation steps, each with a rollout of its own"),
    prompts_per_step=(512, "problems in a step, over all processes (P)"),
    micro_batch_size=(8, "answers in one forward pass, packed behind their prompt; the gradient does not depend on it"),
    learning_rate=(1e-6, "peak learning rate of AdamW"),
    lr_scheduler_type=("constant", "constant or cosine"),
    min_learning_rate=(0.0, "floor of the cosine"),
    warmup_steps=(0, "steps of linear warm-up"),
    weight_decay=(1e-2, "AdamW's decoupled weight decay"),
    max_grad_norm=(1.0, "gradients are scaled down to this norm"),
    train_vision=(False, "train the vision tower and its merger too"),
    gradient_checkpointing=(True, "recompute activations in the backward pass"),
    save_steps=(20, "a checkpoint every so many steps, for --resume"),
)
ROLLOUT_FLAGS = dict(
    num_generations=(8, "G, answers sampled to each problem"),
    updates_per_step=(4, "optimiser updates from one rollout, each on its share of the problems"),
)
WORLD_CHOICES = dict(lr_scheduler_type=("constant", "cosine"))
MAY_BE_ZERO = {"seed", "eval_steps", "warmup_steps", "num_train_epochs", "early_stop", "held_out_traces", "max_tokens"}
# --resume refuses to change any flag but these, which change no number beyond rounding.
FREE_ON_RESUME = {"resume", "output_dir", "report_to", "save_steps", "sample_batch_size", "micro_batch_size"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with exit status 2."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def parse_args(script, doc, flags, recipe, toy, argv=None, tables=(MODEL_FLAGS, TRAIN_FLAGS, ROLLOUT_FLAGS)):
    """The flags of one script: command line > TOY (only with a toy model) > RECIPE > the world's defaults.

    `flags(parser)` adds the script's own. Returns a namespace with `script` added and `output_dir` filled in.
    """
    parser = Parser(script, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, (default, text) in collections.ChainMap(*reversed(tables)).items():
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(default, bool) else dict(
            type=str if default is None else type(default), choices=WORLD_CHOICES.get(name))
        parser.add_argument(f"--{name}", default=default, help=text, **kind)
    if ROLLOUT_FLAGS not in tables:
        parser.set_defaults(updates_per_step=1)
    flags(parser)
    parser.set_defaults(**recipe)
    if is_toy(parser.parse_args(argv).model):
        parser.set_defaults(**toy)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) is int and value < (name not in MAY_BE_ZERO):
            parser.error(f"--{name} is {value}; it must be at least {int(name not in MAY_BE_ZERO)}")
    if not args.temperature >= 0 or (args.temperature == 0 and TRAIN_FLAGS in tables):
        parser.error(f"--temperature is {args.temperature}; it must be above 0 (0, greedy, only in eval_passk.py)")
    args.script = script
    args.output_dir = args.output_dir or f"runs/{script}-{Path(args.model.split(',')[0]).name}-{args.seed}"
    return args


def is_toy(model):
    """Whether the (first) model of `model` is of the tabletop: by name, or a folder trained from one, by its config."""
    name = model.split(",")[0]
    config = Path(name, "config.json")
    return '"tabletop": true' in config.read_text() if config.is_file() else name in TOYS


def launch(script, main, *args, **kwargs):
    """Parses the flags and runs `main(args)`; a UserError becomes one line on stderr and exit status 2."""
    try:
        main(parse_args(script, *args, **kwargs))
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# === 2. a run =========================================================================================================


class Run:
    """One run of a script: its processes, its folder, its optimiser, its log.

    A training script reads `run.begin(...)`, then `for step in run.steps(): ... run.log(...)`. What happens between
    two steps (held-out accuracy, checkpoints, the progress bar) happens here, the same for every script.
    Attributes: rank, world (number of processes), device, is_main, sharded, state (numbers that --resume must restore).
    """

    def __init__(self, args):
        self.args, self.folder, self.state, self.done, self.pictures = args, args.output_dir, {}, 0, {}
        for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            if os.environ.get(f"ACCELERATE_USE_{plugin}", "false") == "true":
                raise UserError(f"accelerate's config asks for {plugin}; take it out, the scripts shard by themselves")
        check_place(self.folder)
        if os.path.exists(self.path("metrics.jsonl")) and not args.resume:
            raise UserError(f"{self.folder} already holds a run: go on with --resume, or name another --output_dir")
        names = None if args.report_to == "none" else args.report_to.split(",")
        try:
            self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=names, project_dir=self.folder)
        except ValueError as error:
            raise UserError(f"--report_to {args.report_to}: {' '.join(str(error).split())}") from None
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        # accelerate launch sets OMP_NUM_THREADS=1: a lone process takes its cores back (only Linux can tell which)
        if self.device.type == "cpu" and sys.platform == "linux":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.world))
        elif self.device.type == "cuda" and not dist.is_initialized():  # fully_shard wants a group, be it of one
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        share = self.world * args.updates_per_step
        if vars(args).get("prompts_per_step", share) % share:
            raise UserError(f"--prompts_per_step {args.prompts_per_step} must be a multiple of {share} here")
        self.sharded = self.world > 1 or self.device.type != "cpu"
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a checkpoint of one CPU process
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def say(self, text):
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    # --- numbers that belong to all processes ---

    def sum(self, value):
        """The sum of a scalar tensor (or number) over all processes."""
        value = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach().clone()
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def mean(self, values, weights=None):
        """The mean of `values` over all elements of all processes, weighted by `weights` (same shape) if given."""
        weights = torch.ones_like(values, dtype=torch.float32) if weights is None else weights
        return self.sum((values * weights).sum()) / self.sum(weights.sum()).clamp_min(1e-12)

    def gather(self, thing):
        """`thing` (any object) of every process, as a list."""
        things = [thing] * self.world
        if self.world > 1:
            dist.all_gather_object(things, thing)
        return things

    # --- before the first step ---

    def begin(self, policy, processor, problems, held_out=()):
        """Checks every prompt, makes the folder and the optimiser, goes on from a checkpoint, measures the start."""
        self.policy, self.processor, self.held_out, args = policy, processor, held_out, self.args
        if args.prompts_per_step > len(problems):
            raise UserError(f"--prompts_per_step {args.prompts_per_step}: {args.dataset} has {len(problems)} problems")
        lengths, scaled, kinds = check_prompts(processor, (p for some in (problems, held_out) for p in some), args)
        trained = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
        self.open_folder()
        if args.resume:
            self.load_checkpoint()
        for name in ("metrics", "samples", "signals", "clusters"):
            self.keep_lines(self.path(f"{name}.jsonl"))
        count = [sum(p.numel() for p in some) / 1e6 for some in (policy.parameters(), trained)]
        kinds = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        self.say(f"{args.script}: {args.model}, {count[0]:,.2f} M weights, {count[1]:,.2f} M of them trained, on "
                 f"{self.world} x {self.device.type}; writing to {self.folder}\n{len(problems)} problems to train on, "
                 f"{len(held_out)} held out ({kinds}); prompts of {min(lengths)} to {max(lengths)} tokens; "
                 f"{scaled} pictures scaled down")
        self.bar = tqdm(total=args.max_steps, initial=self.done, desc=args.script, disable=not self.is_main)
        if held_out and self.done == 0:
            self.write_metrics(0, self.evaluate())

    def open_folder(self):
        flags, path = dict(vars(self.args)), self.path("args.json")
        if self.args.resume and os.path.exists(path):
            before = json.loads(Path(path).read_text())
            for name in set(flags) - FREE_ON_RESUME:
                if flags[name] != before.get(name):
                    raise UserError(f"--resume: this run began with --{name} {before.get(name)}; give it again")
        if self.is_main:
            os.makedirs(self.folder, exist_ok=True)
            write_atomically(path, json.dumps(flags, indent=1) + "\n")
        self.accelerator.init_trackers("cleanvl", config={name: str(flag) for name, flag in flags.items()})

    # --- the loop ---

    def steps(self):
        """Yields the numbers of the steps that are left, from 1; draws the curves and saves the model at the end."""
        for step in range(self.done + 1, self.args.max_steps + 1):
            if self.state.get("stopped"):
                break
            self.step, self.laps, self.clock, self.step_began = step, {}, time.perf_counter(), time.perf_counter()
            yield step
        self.bar.close()
        self.finish()

    def draw(self, problems, step):
        """This process's share of the P problems of `step`, in the order of the updates that they go to.

        The order of an epoch depends on (seed, epoch) alone; an epoch's last, incomplete batch is dropped. Each of
        the step's updates takes P/updates consecutive problems, and each process an equal part of those.
        """
        P, parts = self.args.prompts_per_step, self.args.updates_per_step
        epoch, batch = divmod(step - 1, len(problems) // P)
        order = torch.randperm(len(problems), generator=generator(self.args.seed, epoch, "order"))
        mine = order[batch * P:(batch + 1) * P].view(parts, self.world, -1)[:, self.rank]
        return [problems[i] for i in mine.flatten().tolist()]

    def lap(self, name):
        """Notes the seconds since the last lap under `name`."""
        now = time.perf_counter()
        self.laps[f"seconds_{name}"], self.clock = now - self.clock, now

    def plan(self, rollout, live_B):
        """The forward passes of each update, [[(index_b, alive), ...], ...], of the answers with live_B.

        Under sharding every process must make as many passes: one that has fewer repeats its last with alive = 0.
        """
        updates = []
        for part in torch.arange(len(rollout)).chunk(self.args.updates_per_step):
            batches = micro_batches(rollout, part[live_B.cpu()[part]], part, self.args.micro_batch_size)
            spare = max(self.gather(len(batches))) - len(batches)
            updates.append([(batch, 1.0) for batch in batches] + [(batches[-1], 0.0)] * spare)
        return updates

    def optimizer_step(self):
        """Sets the learning rate, clips the gradient, steps, clears. Returns the norm before clipping, a float."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.args)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.args.max_grad_norm)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(norm):
            raise UserError(f"the gradient of step {self.step} has norm {norm}: lower --learning_rate and start again")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def log(self, step, rollout, rewards_B, last=False, **metrics):
        """Writes one line of metrics.jsonl and a few of samples.jsonl; then held-out accuracy and checkpoint, if due.

        `last` ends the run after this step, as an early stop does.
        """
        args, mask_BT = self.args, rollout.mask_BT
        metrics |= dict(
            entropy=self.mean(rollout.entropy_BT, mask_BT), completion_length=self.mean(mask_BT.sum(1)),
            truncated=1 - self.mean(rollout.finished_B), tokens=self.sum(mask_BT.sum()),
            learning_rate=learning_rate(step, args), seconds=time.perf_counter() - self.step_began, **self.laps)
        if self.device.type == "cuda":
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        shown = list(zip(rollout.problems, rollout.texts, rewards_B.tolist()))[::max(1, len(rollout) // 4)]
        self.pictures = {p["id"]: p["images"][0] for p in rollout.prompts.problems}
        self.append(self.path("samples.jsonl"), [
            dict(step=step, id=p["id"], problem=p["problem"], answer=p["answer"], text=text, reward=round(reward, 4))
            for p, text, reward in shown])
        self.state["stopped"] = bool(last) or step == args.max_steps
        if self.held_out and (self.state["stopped"] or (args.eval_steps and step % args.eval_steps == 0)):
            metrics |= self.evaluate()
        self.write_metrics(step, metrics)
        self.done = step
        if step % args.save_steps == 0 or self.state["stopped"]:
            self.save_checkpoint()

    def write_metrics(self, step, metrics):
        metrics = {k: v if isinstance(v, int) else float(v) for k, v in metrics.items()}
        self.append(self.path("metrics.jsonl"), [dict(step=step) | metrics])
        self.accelerator.log(metrics, step=step)
        if "eval_accuracy" in metrics:
            self.say("held-out pass@1 {0}: {eval_accuracy:.3f}  [{eval_low:.3f}, {eval_high:.3f}]".format(
                f"after {step} steps" if step else "before", **metrics))
        if step:
            self.bar.set_postfix({k: f"{metrics[k]:.3f}" for k in ("reward", "loss", "entropy") if k in metrics})
            self.bar.update()

    # --- files of lines, written by one process for all ---

    def append(self, path, rows):
        if self.is_main:
            with open(path, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def read_lines(self, path):
        """The rows of a .jsonl file, on every process, without a line that a kill cut short."""
        rows = []
        if self.is_main and os.path.exists(path):
            rows = [json.loads(line) for line in Path(path).read_text().splitlines(True) if line.endswith("\n")]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        return self.gather(rows)[0]

    def keep_lines(self, path):
        """Drops what a killed run wrote after its last checkpoint, so that no step stands twice."""
        kept = [row for row in self.read_lines(path) if self.done and row["step"] <= self.done]
        if self.is_main and os.path.exists(path):
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))

    def evaluate(self):
        """Held-out pass@1: mean accuracy over problems at temperature 1, with a 95% bootstrap interval.

        The draws depend on the seed and the problem alone, so that two measurements of a run are paired.
        """
        args, mine = self.args, self.held_out[self.rank::self.world]  # perhaps none, but the gather is of all processes
        rollout = sample(
            self.policy, self.processor, mine or self.held_out[:1], args.num_generations_eval, seed=(args.seed, "eval"),
            max_completion_length=args.max_completion_length, sample_batch_size=args.sample_batch_size)
        right = [is_right(problem, text) for problem, text in zip(rollout.problems, rollout.texts)]
        accuracy_P = np.array(right, dtype=float).reshape(-1, args.num_generations_eval).mean(1)[:len(mine)]
        return dict(zip(("eval_accuracy", "eval_low", "eval_high"), bootstrap(np.concatenate(self.gather(accuracy_P)))))

    # --- checkpoints: the same numbers after a kill at any moment ---

    def save_checkpoint(self):
        """Writes checkpoint-N beside a temporary name, then renames: a kill leaves the old one or the new one."""
        final, temporary = self.path(f"checkpoint-{self.done}"), self.path("checkpoint.tmp")
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        weights, moments = states.get_state_dict(self.policy, self.optimizer)
        dcp.save(dict(weights=weights, moments=moments), checkpoint_id=temporary)
        if self.is_main:
            write_atomically(os.path.join(temporary, "state.json"), json.dumps([self.done, self.state]))
            older = self.checkpoints()
            os.rename(temporary, final)
            for step in older:
                shutil.rmtree(self.path(f"checkpoint-{step}"))
        self.accelerator.wait_for_everyone()

    def checkpoints(self):
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted(int(name[11:]) for name in names if name.startswith("checkpoint-") and name[11:].isdigit())

    def load_checkpoint(self):
        steps = self.checkpoints()
        if not steps and os.path.exists(self.path("config.json")):
            raise UserError(f"--resume: the run in {self.folder} is finished; name another --output_dir")
        if not steps:
            return self.say(f"--resume: no checkpoint in {self.folder}; starting from the beginning")
        folder = self.path(f"checkpoint-{steps[-1]}")
        weights, moments = states.get_state_dict(self.policy, self.optimizer)
        dcp.load(dict(weights=weights, moments=moments), checkpoint_id=folder)
        states.set_state_dict(self.policy, self.optimizer, model_state_dict=weights, optim_state_dict=moments)
        self.done, self.state = json.loads(Path(folder, "state.json").read_text())
        self.say(f"--resume: going on from step {self.done}")

    def finish(self):
        """Saves the model where others can load it; draws curves.png and report.html."""
        save_policy(self.policy, self.processor, self.folder, self.is_main)
        if self.is_main:
            from lab import report  # only here: a script needs no matplotlib until its end
            self.say(f"look at {report.finish(self.folder, self.pictures)}; the model is in {self.folder}")
            for step in self.checkpoints():
                shutil.rmtree(self.path(f"checkpoint-{step}"))
        self.accelerator.wait_for_everyone()  # a process that ends while another still works can abort on its way out
        self.accelerator.end_training()


def check_place(folder, flag="--output_dir"):
    """Raises UserError unless `folder` can be made or written to. Makes nothing."""
    place = next(path for path in Path(os.path.abspath(folder), "x").parents if path.exists())
    if not os.path.isdir(place) or not os.access(place, os.W_OK):
        raise UserError(f"{flag} {folder}: cannot write to {place}; name another folder")


def write_atomically(path, text):
    """Writes `text` beside `path`, then renames: a kill leaves the old file or the new one, never half of one."""
    Path(f"{path}.{os.getpid()}.tmp").write_text(text)  # two runs may write one file, such as a teacher's traces
    os.replace(f"{path}.{os.getpid()}.tmp", path)


def generator(*key):
    """A torch.Generator on the CPU that depends on `key` alone: randomness has no state to save or to share."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def learning_rate(step, args):
    """The learning rate of `step` (from 1): linear warm-up, then constant, or a cosine down to the floor."""
    if step <= args.warmup_steps:
        return args.learning_rate * step / args.warmup_steps
    if args.lr_scheduler_type == "constant":
        return args.learning_rate
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    floor, share = args.min_learning_rate, (1 + math.cos(math.pi * progress)) / 2
    return floor + (args.learning_rate - floor) * share


def bootstrap(values_P, draws=10_000, seed=0):
    """Mean of `values_P` (one number per problem) and its 95% percentile bootstrap interval over problems."""
    values_P, random = np.asarray(values_P, dtype=float), np.random.default_rng(seed)
    means = np.concatenate([values_P[random.integers(0, len(values_P), (500, len(values_P)))].mean(1)
                            for _ in range(draws // 500)])
    return float(values_P.mean()), *map(float, np.quantile(means, [0.025, 0.975]))


# === 3. model =========================================================================================================


class Processor(transformers.Qwen2_5_VLProcessor):
    """Qwen2_5_VLProcessor without its video half, the only part of it that demands torchvision."""

    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)


class Policy(transformers.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL in two halves, so that logits exist for a chunk of positions at a time only.

    All three methods are registered as forward methods when the model is sharded: a submodule called from outside
    them would meet shards instead of weights.
    """

    def prepare(self, tokenizer):
        """Learns from the tokenizer which ids an answer may hold and which ids end it."""
        ends = self.generation_config.eos_token_id
        self.ends = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
        # An answer with a picture token would break the next forward pass: "image features and tokens do not match".
        vision = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
        self.banned = tokenizer.convert_tokens_to_ids(vision)
        self.vocabulary = len(tokenizer)  # the rows beyond are padding, and differ between model sizes
        return self

    def body(self, ids_RL, positions_3RL, mask, pixels=None, grids=None, cache=None):
        """Hidden states (R, L, D). Positions are always passed: the model's own guess is 1-D after a prefill."""
        return self.model(input_ids=ids_RL, position_ids=positions_3RL, attention_mask=mask, pixel_values=pixels,
                          image_grid_thw=grids, past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def head(self, hidden_ND, temperature):
        """Logits (N, V) in fp32, divided by the temperature; forbidden ids at -1e9 (with -inf, 0·inf is NaN)."""
        logits_NV = self.lm_head(hidden_ND)[:, :self.vocabulary].float() / temperature
        return logits_NV.index_fill(1, torch.tensor(self.banned, device=logits_NV.device), -1e9)

    def reduce(self, fn, tokens_N, temperature, hidden_ND, *others):
        """fn(*logits_NV, tokens_N) of every position, LOGITS at a time, recomputed in the backward pass.

        `others` are further readings of the same positions, as (policy, hidden_ND). So (B, T, V) never exists.
        """
        def one_chunk(tokens, hidden, *rest):
            # The class's head, not the registered one: that would reduce the gradient after every chunk, and processes
            # with other numbers of chunks would wait for each other for ever.
            logits = [Policy.head(self, hidden, temperature)]
            logits += [Policy.head(self, h, temperature) if policy is self else policy.head(h, temperature)
                       for (policy, _), h in zip(others, rest)]
            values = fn(*logits, tokens)
            return values if isinstance(values, tuple) else (values,)

        inputs, size = (tokens_N, hidden_ND, *(h for _, h in others)), max(1, LOGITS // self.vocabulary)
        results = [checkpoint(one_chunk, *part, use_reentrant=False) for part in zip(*(x.split(size) for x in inputs))]
        return tuple(torch.cat(column) for column in zip(*results))


def load_policy(name, run=None, train=False, args=None):
    """The model and processor called `name`: toy, toy-teacher, a folder in the hub's layout, or a name on the hub.

    Without `run`: whole, on the CPU. With it: on the run's device, sharded over its processes where there are several
    or a GPU. `train` keeps gradients (the vision tower's too if args.train_vision) and makes the weights fp32 masters;
    a model that is only read, such as a teacher, stays in its checkpoint's own dtype.
    """
    args = args or (run.args if run else None)
    folder = find_model(name, run)
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "qwen2_5_vl":
            raise UserError(f"model {name} is a {config.model_type}; only Qwen2.5-VL (qwen2_5_vl) is read here")
        tokenizer, pictures = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
        dtype = torch.float32 if train or not config.dtype else config.dtype
        policy = load_shards(folder, config, dtype, run.device) if run and run.sharded else load_whole(folder, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"model {name} is no folder or name of a model that can be loaded: {reason}") from None
    pictures.size = dict(shortest_edge=MIN_PIXELS, longest_edge=args.max_pixels if args else MAX_PIXELS)
    policy.prepare(tokenizer).requires_grad_(train).train(train and args.gradient_checkpointing)  # off in eval mode
    policy.model.visual.requires_grad_(train and args.train_vision)
    if train and args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    return policy, Processor(pictures, tokenizer)


def find_model(name, run=None):
    """A folder or hub name for `name`; a model of the tabletop is built first, by one process for all."""
    if name not in TOYS:
        return name
    from lab import toy  # only the tabletop's names need the tabletop
    with run.accelerator.main_process_first() if run else contextlib.nullcontext():
        return toy.build(name)


def load_whole(folder, dtype):
    """The whole model on the CPU; UserError unless the checkpoint holds every weight, and no other."""
    # Loaded as what it is, then given our two halves: the hub's key names are translated by the class's own name.
    policy, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} weights do not fit config.json, {sorted(map(str, wrong))[0]} for one")
    policy.__class__ = Policy
    return policy


def load_shards(folder, config, dtype, device):
    """The model with every weight split over all processes: bf16 compute on GPUs, fp32 reductions.

    The shards are made empty, then filled by rank 0 piece by piece: no other process ever holds a whole copy.
    """
    with init_empty_weights():  # weights on the meta device, buffers (rotary frequencies) real
        policy = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    policy.__class__ = Policy
    policy.tie_weights()
    on_gpu = device.type != "cpu"
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if on_gpu else None, reduce_dtype=torch.float32)
    for module in list(policy.modules()):
        if type(module).__name__ in policy._no_split_modules:
            fully_shard(module, mp_policy=precision)
    fully_shard(policy, mp_policy=precision)
    for name in ("body", "head", "reduce"):
        register_fsdp_forward_method(policy, name)
    policy._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    whole = load_whole(folder, dtype) if dist.get_rank() == 0 else None
    states.set_model_state_dict(policy, whole.state_dict() if whole else {},
                         options=states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    policy.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return policy


@contextlib.contextmanager
def gathered(policy):
    """All weights on every process while sampling: one gather, then no collectives, so any rank may end first."""
    units = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    training = policy.training
    policy.eval()  # gradient checkpointing, active in training mode only, would silently switch the cache off
    yield
    policy.train(training)
    for unit in units:
        unit.set_reshard_after_forward(unit is not policy, recurse=False)
        unit.reshard()


def save_policy(policy, processor, folder, is_main=True):
    """Writes the hub's layout: safetensors, config, tokenizer, preprocessor_config. A collective call when sharded."""
    whole = states.get_model_state_dict(policy, options=states.StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not is_main:
        return
    with init_empty_weights():  # a shell of the plain class, so that config.json names what others can load
        shell = AutoModelForImageTextToText.from_config(policy.config)
    shell.tie_weights()
    shell.generation_config = policy.generation_config
    shell.save_pretrained(folder, state_dict=whole)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


# === 4. problems ======================================================================================================


def load_problems(spec):
    """A sequence of problems: dicts with id, images (PIL), problem, answer, verifier, and trace where there is one.

    spec: name@split or name@split:count, where name is toy, a data set on the hub, a .json, .jsonl or .parquet file, or
    a folder that holds metadata.jsonl or parquet files; "none" gives no problems. Every row is checked here, so that
    training does not stop at row 30,000. Raises UserError, naming row, column and value.
    """
    from lab import data  # brings `datasets` along, which the algorithms do without
    return [] if spec == "none" else data.load(spec)


# === 5. prompts =======================================================================================================


@dataclasses.dataclass
class Prompts:
    """P encoded problems, unpadded; each list has one entry per problem.

    ids: (S,) token ids, picture tokens repeated; types: (S,) 1 on picture tokens; pixels: (patches, D) normalised
    patches of all the problem's pictures; grids: (pictures, 3) patches in time, height, width.
    """

    problems: list
    ids: list
    types: list
    pixels: list
    grids: list

    def positions(self, p, policy):
        """(3, S) rotary positions in time, height, width of prompt p, and the position of the first answer token."""
        device = policy.device
        positions_3S, _ = policy.model.get_rope_index(
            self.ids[p][None].to(device), mm_token_type_ids=self.types[p][None].to(device),
            image_grid_thw=self.grids[p].to(device))
        return positions_3S[:, 0], int(positions_3S.max()) + 1


def chat(processor, problem):
    """The prompt as text: a user message with its pictures where `<image>` stands (else first), then INSTRUCTION."""
    pictures, text = len(problem["images"]), problem["problem"]
    pieces = text.split("<image>") if "<image>" in text else [""] * pictures + [text]
    content = []
    for i, piece in enumerate(pieces):
        content += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": piece}] * bool(piece)
    content += [{"type": "text", "text": "\n" + INSTRUCTION}]
    return processor.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                   add_generation_prompt=True)


def encode(processor, problems):
    """Problems (dicts as load_problems gives them) to Prompts. Nothing is truncated; pictures keep the pixel budget."""
    prompts = Prompts(list(problems), [], [], [], [])
    for problem in prompts.problems:
        out = processor(text=[chat(processor, problem)], images=problem["images"], return_tensors="pt",
                        return_mm_token_type_ids=True)
        prompts.ids.append(out["input_ids"][0])
        prompts.types.append(out["mm_token_type_ids"][0])
        prompts.pixels.append(out["pixel_values"])
        prompts.grids.append(out["image_grid_thw"])
    return prompts


def check_prompts(processor, problems, args):
    """Lengths of all prompts in tokens, how many pictures are scaled down, verifiers. UserError for a long prompt."""
    lengths, scaled, kinds, tool = [], 0, collections.Counter(), processor.image_processor
    for problem in tqdm(problems, desc="prompts", delay=5, leave=False):
        sizes = [(picture.height, picture.width) for picture in problem["images"]]
        pictures = sum(tool.get_number_of_image_patches(*size, {}) for size in sizes) // tool.merge_size**2
        lengths.append(len(processor.tokenizer(chat(processor, problem)).input_ids) - len(sizes) + pictures)
        grade(problem, "")  # an open_ended problem, for which no script has a judge, is met here and not at step 40
        scaled += sum(height * width > args.max_pixels for height, width in sizes)
        kinds[problem["verifier"]] += 1
        if lengths[-1] > args.max_prompt_length:
            raise UserError(f"problem {problem['id']} has a prompt of {lengths[-1]} tokens ({pictures} of pictures), "
                            f"over --max_prompt_length {args.max_prompt_length}: raise it, or lower --max_pixels")
    return lengths, scaled, dict(kinds)


# === 6. sample ========================================================================================================


@dataclasses.dataclass
class Rollout:
    """B answers to P problems. rollout[index_b] is the rollout of those answers alone.

    group_B: which problem an answer belongs to. tokens_BT, mask_BT: token ids, and 1 up to and including the first
    end token. logp_BT, entropy_BT: log-prob of the token and entropy of the full vocabulary when it was sampled.
    finished_B: 1 where an end token was reached. texts: the answers without special tokens.
    """

    prompts: Prompts
    temperature: float
    group_B: torch.Tensor
    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor
    logp_BT: torch.Tensor
    entropy_BT: torch.Tensor
    finished_B: torch.Tensor
    texts: list

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index_b):
        rows = [self.group_B, self.tokens_BT, self.mask_BT, self.logp_BT, self.entropy_BT, self.finished_B]
        texts = [self.texts[b] for b in index_b.tolist()]
        return Rollout(self.prompts, self.temperature, *(x[index_b.to(x.device)] for x in rows), texts)

    @property
    def problems(self):
        """The problem of every answer."""
        return [self.prompts.problems[p] for p in self.group_B.tolist()]

    def score(self, fn):
        """(P, G): fn(problem, text) of every answer. UserError where it is not a finite number."""
        scores = torch.tensor([float(fn(*pair)) for pair in zip(self.problems, self.texts)], device=self.mask_BT.device)
        for b in (~scores.isfinite()).nonzero()[:, 0].tolist():
            raise UserError(f"the reward of an answer to problem {self.problems[b]['id']} is {scores[b]}: mend "
                            f"{fn.__name__}, a reward is a finite number")
        return scores.view(len(self.prompts.problems), -1)


@torch.no_grad()
def sample(policy, processor, problems, num_generations, *, seed, max_completion_length, temperature=1.0,
           sample_batch_size=256):
    """Samples `num_generations` answers to each problem; temperature 0 is greedy. Returns a Rollout, B = P·G.

    A prompt and its pictures are read once per group: their cache is repeated, not recomputed. Answer g to a problem
    is drawn with uniforms that depend on (*seed, problem id, "sample", g) alone, so that it is the same whatever the
    batch, the group size or the number of processes. A collective call when sharded.
    """
    prompts, G, T = encode(processor, problems), num_generations, max_completion_length
    device, B = policy.device, len(problems) * num_generations
    out = Rollout(prompts, temperature or 1.0, torch.arange(len(problems)).repeat_interleave(G),
                  torch.full((B, T), processor.tokenizer.pad_token_id, device=device),
                  *(torch.zeros(B, T, device=device) for _ in range(3)), torch.zeros(B, device=device), [])
    step = max(1, sample_batch_size // G)  # whole groups together; a group over the limit is cut into slices
    waves = [(range(p, min(p + step, len(problems))), range(g, min(g + sample_batch_size, G)))
             for p in range(0, len(problems), step) for g in range(0, G, sample_batch_size)]
    with gathered(policy):
        for members, slots in tqdm(waves, desc="sampling", delay=5, leave=False):
            decode(policy, out, members, slots, G, seed, greedy=temperature == 0)
    longest = max(1, int(out.mask_BT.sum(1).max()) if B else 1)
    for name in ("tokens_BT", "mask_BT", "logp_BT", "entropy_BT"):
        setattr(out, name, getattr(out, name)[:, :longest])
    lengths = out.mask_BT.sum(1).long().tolist()
    out.texts = processor.tokenizer.batch_decode(
        [row[:n] for row, n in zip(out.tokens_BT.tolist(), lengths)], skip_special_tokens=True)
    return out


def decode(policy, out, members, slots, G, seed, greedy):
    """Decodes answers `slots` of the groups `members` into `out`: prefill, repeat the cache, drop finished rows."""
    device, T, ids = policy.device, out.tokens_BT.shape[1], out.prompts.problems
    hidden_BD, mask_BS, next_B, cache = prefill(policy, out.prompts, members, len(slots))
    rows = torch.tensor([p * G + g for p in members for g in slots], device=device)
    uniform_BT = torch.stack([torch.rand(T, generator=generator(*seed, ids[p]["id"], "sample", g), dtype=torch.float64)
                              for p in members for g in slots]).to(device)
    ends = torch.tensor(policy.ends, device=device)
    for t in range(T):
        logits_BV = policy.head(hidden_BD, out.temperature)
        logprobs_BV = logits_BV.log_softmax(1)
        token_B = logits_BV.argmax(1) if greedy else inverse_cdf(logprobs_BV.exp(), uniform_BT[:, t])
        out.tokens_BT[rows, t], out.mask_BT[rows, t] = token_B, 1.0
        out.logp_BT[rows, t] = logprobs_BV.gather(1, token_B[:, None])[:, 0]
        out.entropy_BT[rows, t] = token_entropy(logits_BV)
        going = ~torch.isin(token_B, ends)
        out.finished_B[rows] = (~going).float()
        if t == T - 1 or not going.any():
            break
        if not going.all():
            keep = going.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, uniform_BT, token_B, mask_BS, next_B = (x[keep] for x in (rows, uniform_BT, token_B, mask_BS, next_B))
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(rows), 1)], 1)
        positions = (next_B + t)[None, :, None].expand(3, -1, -1)
        hidden_BD = policy.body(token_B[:, None], positions, mask_BS, cache=cache)[:, -1]


def prefill(policy, prompts, members, repeats):
    """Reads the prompts `members` once, padded on the left, and repeats the result for each of their answers."""
    device, S = policy.device, max(len(prompts.ids[p]) for p in members)
    ids, mask = (torch.zeros(len(members), S, dtype=torch.long) for _ in range(2))
    positions, first = torch.zeros(3, len(members), S, dtype=torch.long), []
    for row, p in enumerate(members):
        n = len(prompts.ids[p])
        ids[row, S - n:], mask[row, S - n:] = prompts.ids[p], 1
        positions[:, row, S - n:], start = prompts.positions(p, policy)
        first.append(start)
    cache = DynamicCache(config=policy.config.get_text_config())
    pixels, grids = (torch.cat([x[p] for p in members]).to(device) for x in (prompts.pixels, prompts.grids))
    hidden = policy.body(ids.to(device), positions.to(device), mask.to(device), pixels, grids, cache)[:, -1]
    cache.batch_repeat_interleave(repeats)
    every = (x.to(device).repeat_interleave(repeats, 0) for x in (hidden, mask, torch.tensor(first)))
    return *every, cache


def inverse_cdf(probs_BV, uniform_B):
    """The first id whose cumulative probability exceeds the uniform. In fp64, so that an id of probability 0 (a
    forbidden one) can never be the answer: the uniform times the total stays strictly below the total."""
    total_BV = probs_BV.double().cumsum(1)
    return torch.searchsorted(total_BV, (uniform_B * total_BV[:, -1])[:, None], right=True)[:, 0]


# === 7. read ==========================================================================================================


@dataclasses.dataclass
class Reading:
    """A model, and the pictures it is shown where they are not the rollout's own (one (patches, D) per problem)."""

    policy: Policy
    pixels: list = None


def read(fn, rollout, *readings, batches=None):
    """Has models look at the rollout's pictures and answers, and reduces their logits to numbers per token.

    `readings` are policies or Readings; fn(*logits_NV, tokens_N), one logits per reading, gives a tensor (N, ...) or
    several. Returns the same as (B, T, ...), 0 outside the mask. `batches` are index tensors of answers that share a
    forward pass (default: one pass for all), as micro_batches makes them.
    """
    readings = [r if isinstance(r, Reading) else Reading(r) for r in readings]
    B, T = rollout.mask_BT.shape
    results = None
    for index_b in tqdm(batches or [torch.arange(B)], desc="reading", delay=5, leave=False):
        part = rollout[index_b]
        hiddens, tokens_N = [], part.tokens_BT[part.mask_BT.bool()]
        for reading in readings:
            inputs, where_N = pack(part, reading)
            hiddens.append(reading.policy.body(*inputs).flatten(0, 1)[where_N])
        others = [(r.policy, h) for r, h in zip(readings[1:], hiddens[1:])]
        values = readings[0].policy.reduce(fn, tokens_N, rollout.temperature, hiddens[0], *others)
        results = results or [v.new_zeros(B, T, *v.shape[1:]) for v in values]
        row, column = part.mask_BT.bool().nonzero(as_tuple=True)
        where = (index_b.to(row.device)[row], column)
        results = [out.index_put(where, v) for out, v in zip(results, values)]
    return results[0] if len(results) == 1 else tuple(results)


def pack(rollout, reading):
    """The inputs of one forward pass: a row per group, its prompt read once, its answers behind it side by side.

    An answer token sees the prompt and its own answer up to itself; rotary positions start anew after the prompt for
    every answer. Returns body's inputs and the flat (row, place) of the state that predicts each answer token: for
    the first token of every answer that is the prompt's last.
    """
    prompts, policy, device = rollout.prompts, reading.policy, reading.policy.device
    groups = list(dict.fromkeys(rollout.group_B.tolist()))
    lengths = rollout.mask_BT.sum(1).long().tolist()
    answers = {p: [b for b, q in enumerate(rollout.group_B.tolist()) if q == p] for p in groups}
    L = max(len(prompts.ids[p]) + sum(lengths[b] for b in answers[p]) for p in groups)
    ids, owner = torch.zeros(len(groups), L, dtype=torch.long), torch.full((len(groups), L), -1)
    positions, where = torch.zeros(3, len(groups), L, dtype=torch.long), [None] * len(rollout)
    tokens_BT = rollout.tokens_BT.cpu()
    for row, p in enumerate(groups):
        end = S = len(prompts.ids[p])
        ids[row, :S], owner[row, :S] = prompts.ids[p], 0
        positions[:, row, :S], start = prompts.positions(p, policy)
        for slot, b in enumerate(answers[p], 1):
            n = lengths[b]
            span = slice(end, end + n)
            ids[row, span], owner[row, span] = tokens_BT[b, :n], slot
            positions[:, row, span] = start + torch.arange(n)
            where[b] = torch.cat([torch.tensor([S - 1]), torch.arange(end, end + n - 1)]) + row * L
            end += n
    owner = owner.to(device)
    mask = torch.ones(L, L, dtype=torch.bool, device=device).tril() & (
        (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None]))  # padding (-1) sees padding: never NaN
    pixels = reading.pixels or prompts.pixels
    pixels, grids = (torch.cat([x[p] for p in groups]).to(device) for x in (pixels, prompts.grids))
    return (ids.to(device), positions.to(device), mask[:, None], pixels, grids), torch.cat(where).to(device)


def micro_batches(rollout, live, spare, micro_batch_size):
    """Splits the answers `live` (indices) into forward passes of at most `micro_batch_size`: a list of index tensors.

    A group larger than that becomes several packed rows, smaller ones share a pass. Rows are sorted by length, the
    longest first, so that a pass holds rows of like length and memory peaks at once. Where none is
    live the first of `spare` is read all the same, so that every process makes a pass and every weight has a gradient.
    """
    lengths = rollout.mask_BT.sum(1).long().tolist()
    rows = {}
    for b in live.tolist() or spare[:1].tolist():
        parts = rows.setdefault(int(rollout.group_B[b]), [[]])
        if len(parts[-1]) == micro_batch_size:
            parts.append([])
        parts[-1].append(b)
    rows = [(len(rollout.prompts.ids[p]) + sum(lengths[b] for b in part), part) for p in rows for part in rows[p]]
    batches = [[]]
    for _, part in sorted(rows, key=lambda row: -row[0]):
        if batches[-1] and len(batches[-1]) + len(part) > micro_batch_size:
            batches.append([])
        batches[-1] += part
    return [torch.tensor(batch) for batch in batches]


def token_logps(logits_NV, tokens_N):
    """Log-probability of each token, (N,), under the full vocabulary."""
    return logits_NV.gather(1, tokens_N[:, None])[:, 0] - logits_NV.logsumexp(1)


def token_entropy(logits_NV):
    """Entropy of each full distribution, (N,), in nats: log Z − Σ p·logit."""
    return logits_NV.logsumexp(1) - (logits_NV.softmax(1) * logits_NV).sum(1)


def completion_logits(policy, rollout):
    """(B, T, V) logits of every answer token, 0 outside the mask. For tests and small models: read() never holds it."""
    return read(lambda logits_NV, tokens_N: logits_NV, rollout, policy)


# === 8. rewards =======================================================================================================


def final_answer(text):
    r"""What stands in the last \boxed{...} of a text (str), nested braces kept; None when there is no box, when the
    last one is never closed, or when it is empty."""
    starts = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, starts[-1]) if starts else ():  # \\. skips \{
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[starts[-1]:match.start()].strip() or None
    return None


def format_reward(problem, text):
    r"""1.0 when a text is one non-empty <think>…</think> block, first thing, and then a \boxed{} answer; else 0.0."""
    block = re.fullmatch(r"\s*<think>(.*\S.*)</think>(.*)", text, re.DOTALL)
    once = text.count("<think>") == text.count("</think>") == 1
    return float(once and block is not None and final_answer(block.group(2)) is not None)


def grade(problem, text, judge=None):
    """Reward in [0, 1] of an answer text to a problem (dict with answer and verifier; for iou also images, or size).

    One verifier per problem, never a weighted sum (VLAA-Thinker, arXiv 2504.11468); no readable answer earns 0.
    judge(problem, answer) -> float scores a free answer; without one an open_ended problem raises UserError.
    Pixel boxes belong to the picture as the processor resized it: where that is not images[0].size, give
    problem["size"] = (width, height), to which boxes with coordinates up to 1 are then scaled.
    """
    verifier, gold, answer = problem["verifier"], unbox(problem["answer"]), final_answer(text)
    if verifier == "open_ended" and judge is None:
        raise UserError("an open_ended answer can only be graded by a judge; give a reward model, or leave out the "
                        f"problems with this verifier (first met: {problem.get('id')})")
    if answer is None:
        return 0.0
    if verifier == "open_ended":
        return 1 - math.exp(-OPEN_ENDED_BETA * max(judge(problem, answer) - judge(problem, gold), 0.0))
    if verifier == "math":
        return float(algebra().same_math(gold, answer))
    gold, answer = map(VERIFIERS[verifier][0], (gold, answer))
    if gold is None or answer is None:
        return 0.0
    return box_iou(in_pixels(gold, problem), in_pixels(answer, problem)) if verifier == "iou" else float(gold == answer)


def is_right(problem, text, judge=None):
    """Whether an answer counts as right: a box with an IoU of at least .5, a judged answer above 0, any other at 1."""
    reward = grade(problem, text, judge)
    return reward >= 0.5 if problem["verifier"] == "iou" else reward > 0


def algebra():
    """lab/algebra.py, which decides when two expressions are equal. Not at the top: it brings sympy, which is slow."""
    from lab import algebra
    return algebra


def unbox(answer):
    r"""A gold answer without the \boxed{} that some data sets wrap it in; '' when that box is broken."""
    return (final_answer(answer) or "") if "\\boxed" in answer else answer


def read_integer(text):
    r"""An int, or None. $7$ and 7^\circ read as 7; 7.0, 1,000, "7 cm" and "7 apples" do not read."""
    value, unit = algebra().normal_form(text)
    return int(value) if not unit and re.fullmatch(r"[+-]?[0-9]{1,18}", value) else None


def read_letter(text):
    r"""An option letter in upper case, or None. B, b, (B), B), B. and \text{B} read; nothing longer does."""
    match = re.fullmatch(r"\(?([A-Za-z])\)?", algebra().normal_form(text)[0])
    return match.group(1).upper() if match else None


def read_box(text):
    """A box [x1, y1, x2, y2] as four floats, or None; also when it is reversed or has no area."""
    number = r"(-?[0-9]{0,9}\.?[0-9]{1,18})"
    match = re.fullmatch(r"[\[(]?" + ",".join([number] * 4) + r"[\])]?", re.sub(r"\\left|\\right|[$\s]", "", text))
    box = [float(coordinate) for coordinate in match.groups()] if match else [0] * 4
    return box if box[0] < box[2] and box[1] < box[3] else None


def in_pixels(box, problem):
    """A box in pixels: coordinates that are all at most 1 are shares of the picture's width and height."""
    size = (1, 1) if max(box) > 1 else problem["size"] if "size" in problem else problem["images"][0].size
    return [edge * side for edge, side in zip(box, [*size, *size])]


def box_iou(a, b):
    """Intersection over union of two boxes."""
    overlap = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


OPEN_ENDED_BETA = 1.0  # how fast an open-ended reward saturates; the paper gives no number
VERIFIERS = {
    "digit": (read_integer, "an integer"),
    "mcq": (read_letter, "one letter"),
    "math": (lambda text: algebra().read_expression(text), "words, or an expression that Math-Verify can read"),
    "iou": (read_box, "four numbers x1, y1, x2, y2 with x1 < x2 and y1 < y2"),
    "open_ended": (lambda text: text.strip() or None, "some text"),
}

"""One run of a script: its processes, its folder, its log, its checkpoints.

Nothing here knows what a model is: `Run` is given modules and an optimizer to keep, and rows to write.

    run = Run(args)                       the processes; refuses a folder that already holds a run
    run.start(policy, optimizer)          makes the folder; with --resume goes on from the newest checkpoint
    for step in run.steps(): ...          the steps that are left
        run.lap("sample")                 how long did this part take?
        run.log(step, metrics, samples)   a line of metrics.jsonl, a few of samples.jsonl
        run.save_checkpoint(step)
        if run.asked_to_end(): ...        a signal came: run.leave(step) instead of finishing
    run.end()                             checkpoints away, trackers closed

Signals. SIGTERM or SIGUSR1 asks a run to end: after its current step it saves a checkpoint and exits with status 0.
A second signal ends it at once (within five seconds it counts as a copy of the first). torchrun and accelerate launch
forward SIGTERM, but kill what still runs 30 seconds later. If a step takes longer than that, have the scheduler send
SIGUSR1 early enough, and make the launcher ignore it. With SLURM:

    #SBATCH --signal=USR1@900             15 minutes before the time is over, to every process of the job's steps
    trap '' USR1                          the launcher ignores it, and the scripts still hear it
    srun --kill-on-bad-exit=1 accelerate launch ... grpo.py --resume

A process that dies. The launcher ends the others of its node, within 30 seconds. On other nodes they see the connection
close, and end with one line; --kill-on-bad-exit has SLURM end those that do not see it.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from harness.disk import append_whole, check_room, discard, free_bytes, room_for, write_atomically, write_rows
from harness.flags import UserError, has_lost_a_process
from harness.sharding import TIMEOUT, is_finite
from harness.threads import watch_cores

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

# --resume refuses to change any flag but these, which change no number beyond rounding.
FREE_ON_RESUME = {"resume", "output_dir", "report_to", "save_steps", "sample_batch_size", "micro_batch_size"}
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # each asks a run to end
# Seconds in which a second signal is the first one's copy: a scheduler signals every process, and the launcher hands
# the signal that it got itself to its processes too.
SAME_REQUEST = 5.0
ROWS_OF_STEPS = ("metrics.jsonl", "samples.jsonl", "signals.jsonl", "clusters.jsonl")


class Run:
    """One run of a script.

    rank and world: which process this is, of how many. device: where tensors live. is_main: whether this is the first
    process, the one that writes. sharded: whether models are split over processes. done: the last finished step.
    state: numbers of the script's own, set before start; --resume brings back what they were. skipped: rows that
    --skip_bad_rows left out, as they are listed in skipped.jsonl.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.folder = args.output_dir
        self.state = {}
        self.done = 0
        self.bar = None
        self.pictures = {}
        self.saved = None  # the step of the newest checkpoint of this process's own
        self.handlers = {}  # what a signal did before
        self.asked_at = None  # when a signal asked the run to end
        self.skipped = []
        refuse_plugins()
        check_writable(self.folder, "--output_dir")
        if os.path.exists(self.path("metrics.jsonl")) and not args.resume:
            raise UserError(f"{self.folder} already holds a run: go on with --resume, or name another --output_dir")
        self.accelerator = make_accelerator(args.report_to, self.folder)
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.sharded = self.world > 1 or self.device.type != "cpu"
        self.set_up_processes()
        self.check_shares()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a checkpoint of one CPU process
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

    def set_up_processes(self):
        if self.device.type == "cpu" and sys.platform == "linux":
            # accelerate launch sets OMP_NUM_THREADS=1: a lone process takes its cores back (only Linux can tell which)
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // self.world))
            watch_cores()
        if self.device.type == "cuda" and not dist.is_initialized():
            # fully_shard wants a process group, even for one process
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)

    def check_shares(self):
        """UserError unless every process and every update of a step gets equally many problems."""
        if "prompts_per_step" not in self.args:
            return
        shares = self.world * self.args.updates_per_step
        if self.args.prompts_per_step % shares:
            raise UserError(f"--prompts_per_step {self.args.prompts_per_step} must be a multiple of {shares}, which is "
                            f"processes ({self.world}) x --updates_per_step ({self.args.updates_per_step})")

    def path(self, *names: str) -> str:
        """A path inside the run's folder."""
        return os.path.join(self.folder, *names)

    def say(self, text: str):
        """Prints a line above the progress bar, once for all processes."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    # --- numbers that belong to all processes ---

    def sum(self, value: torch.Tensor | float) -> torch.Tensor:
        """The sum of a scalar tensor (or number) over all processes, in fp32."""
        total = torch.as_tensor(value, dtype=torch.float32, device=self.device).detach().clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def mean(self, values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """The mean of `values` over all elements of all processes, weighted by `weights` (same shape) if given."""
        if weights is None:
            weights = torch.ones_like(values, dtype=torch.float32)
        return self.sum((values * weights).sum()) / self.sum(weights.sum()).clamp_min(1e-12)

    def gather(self, thing: object) -> list:
        """`thing` (any object) of every process, as a list."""
        things = [thing] * self.world
        if self.world > 1:
            dist.all_gather_object(things, thing)
        return things

    # --- before the first step ---

    def start(self, policy: torch.nn.Module, optimizer: torch.optim.Optimizer):
        """Makes the folder and starts the log. With --resume it goes on from the newest checkpoint.

        The policy and its optimizer are what a checkpoint holds from now on.
        """
        self.policy = policy
        self.optimizer = optimizer
        self.check_disk()
        self.open_folder()
        if self.args.resume:
            self.load_checkpoint()
        self.check_weights()
        for name in ROWS_OF_STEPS:
            self.drop_unfinished_steps(self.path(name))
        trained = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
        everything = sum(weight.numel() for weight in policy.parameters())
        self.say(f"{self.args.script}: {self.args.model}, {everything / 1e6:,.2f} M weights, {trained / 1e6:,.2f} M of "
                 f"them trained, on {self.world} x {self.device.type}; writing to {self.folder}")
        self.bar = tqdm(total=self.args.max_steps, initial=self.done, desc=self.args.script, disable=not self.is_main)
        self.listen()

    def check_disk(self):
        """UserError unless the checkpoints of this run fit on the disk: one, or two while one replaces another."""
        free = self.gather(free_bytes(self.folder))[0]
        wanted = 1 if self.args.save_steps == 0 or self.args.save_steps >= self.args.max_steps else 2
        missing = max(1, wanted - len(self.gather(self.checkpoints())[0]))
        what = f"{self.folder}: the run with its checkpoints (up to {wanted} at a time)"
        check_room(what, self.folder, missing * self.checkpoint_bytes(), free)

    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint: all weights, and two numbers of AdamW for each that is trained."""
        total = 0
        for weight in self.policy.parameters():
            copies = 3 if weight.requires_grad else 1
            total += copies * weight.numel() * weight.element_size()
        return total

    def open_folder(self):
        """Writes args.json. UserError where --resume would change a flag that changes the numbers."""
        flags = dict(vars(self.args))
        path = self.path("args.json")
        if self.args.resume and os.path.exists(path):
            before = json.loads(Path(path).read_text())
            for name in set(flags) - FREE_ON_RESUME:
                if flags[name] != before.get(name):
                    raise UserError(f"--resume: this run began with --{name} {before.get(name)}; give it again")
        if self.is_main:
            os.makedirs(self.folder, exist_ok=True)
            for left in Path(self.folder).glob("*.json*.tmp"):  # of a process that was killed while it wrote
                left.unlink()
            write_atomically(path, json.dumps(flags, indent=1) + "\n")
        self.accelerator.wait_for_everyone()
        self.check_shared(path)
        self.accelerator.init_trackers("cleanvl", config={name: str(flag) for name, flag in flags.items()})

    def check_shared(self, path: str):
        """UserError unless every process sees what the first one wrote to `path`."""
        blind = [rank for rank, sees in enumerate(self.gather(os.path.exists(path))) if not sees]
        if blind:  # trap: whose disk
            raise UserError(f"--output_dir {self.folder}: process {blind[0]} does not see {path}, process 0 does; "
                            "name a folder on a disk that all nodes share")

    # --- the loop ---

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left, from 1. Starts the clock of each."""
        for step in range(self.done + 1, self.args.max_steps + 1):
            if self.state.get("stopped"):
                return
            self.step = step
            self.laps = {}
            self.began = self.clock = time.perf_counter()
            yield step

    def stop(self):
        """Makes the present step the last one. A checkpoint remembers it."""
        self.state["stopped"] = True

    # --- signals: the end that a scheduler asks for ---

    def listen(self):
        """From now on SIGTERM and SIGUSR1 do not end the process, but ask the run to end after its present step."""
        for number in SIGNALS:
            self.handlers[number] = signal.signal(number, self.note_signal) or signal.SIG_DFL

    def note_signal(self, number: int, frame: object):
        """Notes the first signal. A second one, unless it is only the first one's copy, does what it did before."""
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
        elif now - self.asked_at > SAME_REQUEST:
            self.listen_no_more()

    def listen_no_more(self):
        """From now on signals do what they did before. One that came and was not acted upon does so at once."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}
        if self.asked_at is not None:  # trap: swallowed signal
            self.asked_at = None
            os.kill(os.getpid(), signal.SIGTERM)

    def asked_to_end(self) -> bool:
        """Whether a signal has asked any of the processes to end. A collective call: they leave together or not."""
        return bool(self.sum(float(self.asked_at is not None)) > 0)

    def leave(self, step: int):
        """Ends a run that was asked to, after a checkpoint of this step. No model is saved: it is not finished."""
        if self.saved != step:
            self.save_checkpoint(step)
        self.asked_at = None
        self.listen_no_more()
        self.bar.close()
        self.say(f"asked to end: checkpoint-{step} is saved in {self.folder}; the same command with --resume goes on")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def due(self, every: int) -> bool:
        """Whether something is due that is done every so many steps (0: never) and after the last one."""
        if self.step == self.args.max_steps or self.state.get("stopped"):
            return True
        return every > 0 and self.step % every == 0

    def batch(self, problems: Sequence, step: int) -> list:
        """This process's share of the P problems of `step`, in the order of the updates that they go to.

        The order of an epoch depends on (seed, epoch) alone; an epoch's last, incomplete batch is dropped. Each of
        the step's updates takes P/updates consecutive problems, and each process an equal part of those.
        """
        P = self.args.prompts_per_step
        epoch, number = divmod(step - 1, len(problems) // P)
        order = torch.randperm(len(problems), generator=generator(self.args.seed, epoch, "order"))
        chosen = order[number * P:(number + 1) * P]
        shares = chosen.view(self.args.updates_per_step, self.world, -1)
        return [problems[place] for place in shares[:, self.rank].flatten().tolist()]

    def lap(self, name: str):
        """Notes the seconds since the last lap as the metric seconds_`name`."""
        now = time.perf_counter()
        self.laps[f"seconds_{name}"] = now - self.clock
        self.clock = now

    # --- the log ---

    def log(self, step: int, metrics: dict, samples: Iterable[dict] = (), pictures: dict | None = None):
        """Writes a line of metrics.jsonl and some of samples.jsonl, and moves the progress bar.

        metrics: name -> number or scalar tensor. samples: rows to read a few answers in. pictures: problem id -> PIL
        image, kept for the page at the run's end. Step 0 is what was measured before training.
        """
        numbers = {}
        for name, value in metrics.items():
            numbers[name] = value if isinstance(value, int) else float(value)
        if step > 0:
            numbers["seconds"] = self.clock - self.began
            numbers |= self.laps
        if step > 0 and self.device.type == "cuda":
            numbers["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self.append(self.path("samples.jsonl"), [{"step": step, **sample} for sample in samples])
        self.append(self.path("metrics.jsonl"), [{"step": step, **numbers}])
        self.accelerator.log(numbers, step=step)
        self.pictures = pictures or self.pictures
        self.done = step
        self.show(step, numbers)

    def show(self, step: int, numbers: dict):
        """Tells whoever is waiting: held-out accuracy on a line of its own, the rest beside the bar."""
        if "eval_accuracy" in numbers:
            when = f"after {step} steps" if step else "before"
            interval = "[{eval_low:.3f}, {eval_high:.3f}]".format(**numbers)
            self.say(f"held-out pass@1 {when}: {numbers['eval_accuracy']:.3f}  {interval}")
        if step > 0:
            shown = [name for name in ("reward", "loss", "entropy") if name in numbers]
            self.bar.set_postfix({name: f"{numbers[name]:.3f}" for name in shown})
            self.bar.update()

    # --- files of lines, written by one process for all ---

    def append(self, path: str, rows: Iterable[dict]):
        """Adds rows to a .jsonl file."""
        if self.is_main:
            append_whole(path, "".join(json.dumps(row) + "\n" for row in rows))

    def read_lines(self, path: str) -> list[dict]:
        """The rows of a .jsonl file, on every process, without a last line that a kill cut short."""
        rows = []
        if self.is_main and os.path.exists(path):
            lines = Path(path).read_text().splitlines(keepends=True)
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
            write_rows(path, rows)
        return self.gather(rows)[0]

    def drop_unfinished_steps(self, path: str):
        """Drops what a killed run wrote after its last checkpoint, so that no step stands twice."""
        try:
            rows = self.read_lines(path)
            kept = [row for row in rows if self.done > 0 and row["step"] <= self.done]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds a line that is no row of a step ({error}); take that line out") from None
        if self.is_main and os.path.exists(path):
            write_rows(path, kept)

    def answered(
        self, path: str, key: dict, problems: Sequence, prepare: Callable, *, share: int, desc: str, each: int = 1,
    ) -> list[dict]:
        """The rows that answer all `problems`, kept in a .jsonl file: what stands there is not asked for again.

        A row carries the `id` of its problem, and `each` rows belong to a problem. `key` says what else they depend on;
        rows with another key are left alone. Where problems are left, prepare(problems) is called once and gives
        answer(problems), which gives their rows. Each process asks for `share` problems at a time. answer may be a
        collective call: a process that has none left asks for one all the same.
        """
        ids = [problem["id"] for problem in tqdm(problems, desc="problems", delay=5, leave=False)]
        rows = self.whole_answers(path, key, each)
        done = {row["id"] for row in rows}
        left = [place for place, id in enumerate(ids) if id not in done]
        if left:
            answer = prepare(problems[place] for place in left)
        stride = share * self.world
        for start in tqdm(range(0, len(left), stride), desc=desc, disable=not self.is_main):
            places = left[start:start + stride][self.rank::self.world]
            new = answer([problems[place] for place in places or left[:1]])
            if not places:
                new = []
            new = [row for theirs in self.gather(new) for row in theirs]
            new = [{**key, **row} for row in new]
            self.append(path, new)
            rows += new
        wanted = set(ids)
        return [row for row in rows if row["id"] in wanted]

    def whole_answers(self, path: str, key: dict, each: int) -> list[dict]:
        """The rows of a file that have this key, of problems that have `each` of them."""
        try:
            rows = [row for row in self.read_lines(path) if key.items() <= row.items()]
            rows_of = {}
            for row in rows:
                rows_of.setdefault(row["id"], []).append(row)
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise UserError(f"{path} is no file of answers ({error}); move it away or name another") from None
        # Rows that a kill cut short are followed by the same answers again, whole.
        return [row for theirs in rows_of.values() if len(theirs) >= each for row in theirs[-each:]]

    # --- checkpoints: the same numbers after a kill at any moment ---

    def save_checkpoint(self, step: int):
        """Writes checkpoint-N under a temporary name, then renames it: a kill leaves the old one or the new one.

        UserError where the disk is full: then the old one stands.
        """
        name = f"checkpoint-{step}"
        final = self.path(name)
        temporary = self.path("checkpoint.tmp")
        self.clear_away(temporary)
        weights, moments = get_state_dict(self.policy, self.optimizer)
        try:
            with room_for(name, self.folder, self.checkpoint_bytes()):
                dcp.save(dict(weights=weights, moments=moments), checkpoint_id=temporary)
        except UserError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self.is_main:
            sizes = {path.name: path.stat().st_size for path in Path(temporary).iterdir()}
            about = json.dumps([step, self.state, sizes], default=float)
            write_atomically(os.path.join(temporary, "state.json"), about)
            older = self.checkpoints()
            if step in older:  # a torn one, which was not resumed from
                discard(final, self.path("torn.tmp"))
                older.remove(step)
            os.rename(temporary, final)
            self.remove_checkpoints(older)
        self.saved = step
        self.accelerator.wait_for_everyone()

    def clear_away(self, folder: str):
        """Removes what a kill, or a full disk, left of a folder."""
        self.accelerator.wait_for_everyone()
        if self.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints in the folder, in order."""
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        steps = [name.removeprefix("checkpoint-") for name in names if name.startswith("checkpoint-")]
        return sorted(int(step) for step in steps if step.isdigit())

    def remove_checkpoints(self, steps: Iterable[int]):
        for step in steps:
            discard(self.path(f"checkpoint-{step}"), self.path("checkpoint.tmp"))

    def load_checkpoint(self):
        """Goes on from the newest checkpoint that is whole, if there is one. UserError where all are torn."""
        self.clear_away(self.path("checkpoint.tmp"))
        # The first process decides for all.  # trap: whose disk
        steps, faults = self.gather(self.whole_checkpoints())[0]
        if not steps and faults:
            raise UserError(f"--resume: {faults[-1]}, and no other checkpoint is whole: name another --output_dir")
        if not steps and os.path.exists(self.path("config.json")):
            raise UserError(f"--resume: the run in {self.folder} is finished; name another --output_dir")
        if not steps:
            self.say(f"--resume: no checkpoint in {self.folder}; starting from the beginning")
            return
        for fault in faults:
            self.say(f"--resume: {fault}; it is left out")
        folder = self.path(f"checkpoint-{steps[-1]}")
        self.check_shared(folder)
        weights, moments = get_state_dict(self.policy, self.optimizer)
        try:
            dcp.load(dict(weights=weights, moments=moments), checkpoint_id=folder)
        except CheckpointException as error:
            if has_lost_a_process(error):
                raise
            reason = " ".join(str(error).split())[-160:]
            raise UserError(f"--resume: {folder} cannot be read ({reason}); name another --output_dir") from None
        set_state_dict(self.policy, self.optimizer, model_state_dict=weights, optim_state_dict=moments)
        self.done, self.state, _ = json.loads(Path(folder, "state.json").read_text())
        self.say(f"--resume: going on from step {self.done}")

    def whole_checkpoints(self) -> tuple[list[int], list[str]]:
        """The steps of the checkpoints that are whole, and what is wrong with the others."""
        whole = []
        faults = []
        for step in self.checkpoints():
            fault = fault_of(self.path(f"checkpoint-{step}"))
            if fault:
                faults.append(fault)
            else:
                whole.append(step)
        return whole, faults

    def check_weights(self):
        """UserError where a weight of the policy is not finite: the model, or the checkpoint, was broken before."""
        source = f"checkpoint-{self.done} in {self.folder}" if self.done else f"model {self.args.model}"
        broken = [name for name, weight in self.policy.named_parameters() if not is_finite(weight)]
        everyones = [name for theirs in self.gather(broken) for name in theirs]
        if everyones:
            raise UserError(f"{source} has weights that are not finite, {everyones[0]} for one: take another model, "
                            "and another --output_dir")

    def end(self):
        """Removes the checkpoints and closes the trackers. The last thing a run does, after its model is saved."""
        self.listen_no_more()
        if self.is_main:
            self.remove_checkpoints(self.checkpoints())
        self.accelerator.wait_for_everyone()  # a process that ends while another still works can abort on its way out
        self.accelerator.end_training()


def refuse_plugins():
    """UserError where accelerate was configured to shard the model: the scripts do that by themselves."""
    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false") == "true":
            raise UserError(f"accelerate's config asks for {plugin}; take it out, the scripts shard by themselves")


def make_accelerator(report_to: str, folder: str) -> Accelerator:
    """accelerate's view of the processes, with the trackers that --report_to names."""
    trackers = None if report_to == "none" else report_to.split(",")
    try:
        return Accelerator(
            cpu=not torch.cuda.is_available(), log_with=trackers, project_dir=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])  # trap: collective timeout
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--report_to {report_to}: {reason}") from None


def check_writable(folder: str, flag: str):
    """Raises UserError unless `folder` can be made or written to. Makes nothing. `flag` is where its name came from."""
    place = Path(os.path.abspath(folder))
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{flag} {folder}: cannot write to {place}; name another folder")


def fault_of(folder: str) -> str | None:
    """What is wrong with a checkpoint on the disk: a file is missing, or its size is not the one that was written."""
    path = Path(folder, "state.json")
    try:
        _, _, sizes = json.loads(path.read_text())
    except (OSError, ValueError):
        return f"{folder} is torn: state.json is missing or unreadable"
    for name, size in sizes.items():  # trap: torn checkpoint
        path = Path(folder, name)
        found = path.stat().st_size if path.exists() else 0
        if found != size:
            return f"{folder} is torn: {name} has {found} of {size} bytes"
    return None


def seed_of(*key: object) -> int:
    """A seed that depends on `key` alone."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: object) -> torch.Generator:
    """A torch.Generator on the CPU that depends on `key` alone: randomness has no state to save or to share."""
    return torch.Generator().manual_seed(seed_of(*key))  # trap: seeds


def bootstrap(values_P: Sequence[float], draws: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `values_P` (one number for each problem) and its 95% percentile bootstrap interval over problems."""
    values_P = np.asarray(values_P, dtype=float)
    random = np.random.default_rng(seed)
    means = []
    for _ in range(draws // 500):
        chosen = random.integers(0, len(values_P), (500, len(values_P)))
        means.append(values_P[chosen].mean(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(values_P.mean()), float(low), float(high)


def learning_rate(step: int, args: Namespace) -> float:
    """The learning rate of `step` (from 1): linear warm-up, then constant, or a cosine down to the floor."""
    warmup_steps = args.warmup_steps
    if args.warmup_ratio:
        warmup_steps = math.ceil(args.warmup_ratio * args.max_steps)
    if step <= warmup_steps:
        return args.learning_rate * step / warmup_steps
    if args.lr_scheduler_type == "constant":
        return args.learning_rate
    progress = (step - warmup_steps) / max(1, args.max_steps - warmup_steps)
    share = (1 + math.cos(math.pi * progress)) / 2
    return args.min_learning_rate + (args.learning_rate - args.min_learning_rate) * share

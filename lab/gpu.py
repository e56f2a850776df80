"""One command for a machine with a GPU: two steps of grpo.py, vepo.py and opd.py at 3B and 7B, beside the plan.

    python lab/gpu.py                                    3B whole, 7B as far as the card goes; writes results/gpu.md
    python lab/gpu.py --shapes tiny --device cpu         the same path in seconds, anywhere

It needs nothing but the machine: random weights, pictures of noise, no network, no checkpoint. Each case runs in a
process of its own, so that one that runs out of memory ends alone; its last line then stands in the table. What grpo.py
cannot update by the plan (lab/plan.py) it only samples and reads. The second step is measured, by the clock.

    decoding    bytes that must be read, weights once and the cache once for every token of a wave, divided by seconds
                and by the bandwidth of a large copy on this machine; the seconds include reading the prompts
    updating    operations of the model, 6 for every weight and token (the recomputed layers are not counted) and those
                of attention, divided by seconds and by the speed of a large bf16 product on this machine
    vepo        seconds of its step divided by those of grpo.py's
    peak        the most memory that torch had allocated, beside the larger of the plan's two peaks

THIS HAS NEVER BEEN RUN ON A GPU. The tests run it on a CPU with a tiny model.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks in lab/, not in the root
os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported

import grpo
import opd
import vepo
from common import encode, find_model, load_policy, read, sample, token_logps
from harness import memory
from harness.flags import Parser, UserError, at_least, parse_args
from harness.run import check_writable, write_atomically
from harness.updates import micro_batches
from lab import bench, plan
from lab.shapes import SHAPES, config_of

import torch
import transformers
from tqdm import tqdm

SCRIPTS = {"grpo": grpo, "vepo": vepo, "opd": opd}
READING = "sampling and reading"  # the case of a model that does not fit with its optimizer
MODEL_FLOPS = 6  # of a weight and a token, forward and backward
READ_FLOPS = 2

# --- what the machine can do ------------------------------------------------------------------------------------------


def seconds_of(fn, device, calls=5):
    """The fastest of some calls, by the clock."""
    fastest = float("inf")
    for _ in range(calls):
        wait(device)
        began = time.perf_counter()
        fn()
        wait(device)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def wait(device):
    """A GPU works while Python goes on."""
    if device == "cuda":
        torch.cuda.synchronize()


def machine_of(device):
    """Name, memory in bytes, bytes a second of a large copy, operations a second of a large product."""
    large = device == "cuda"
    source = torch.zeros(2**29 if large else 2**24, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copied = seconds_of(lambda: target.copy_(source), device)
    side = 8192 if large else 512
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16 if large else torch.float32)
    multiplied = seconds_of(lambda: square @ square, device)
    if large:
        name = torch.cuda.get_device_name()
        size = torch.cuda.get_device_properties(0).total_memory
    else:
        name = platform.processor() or platform.machine()
        size = memory.free_of_machine()
    return dict(
        name=name, memory=size, bandwidth=2 * source.nbytes / copied, flops=2 * side**3 / multiplied,
        torch=torch.__version__, transformers=transformers.__version__)


# --- what a step must do ----------------------------------------------------------------------------------------------


def weights_of_text(config, weights):
    """Weights that a token of an answer passes: all but the vision tower and the table of embeddings."""
    text = config.get_text_config()
    table = text.vocab_size * text.hidden_size
    if config.tie_word_embeddings:
        table = 0  # the head is the table, and is passed
    vision = weights.all - weights.trained  # trained are those of the text
    return weights.all - vision - table


def decoded_bytes(config, work, *, problems, number):
    """Bytes that are read to decode all answers, each `T` tokens long, in waves of work.wave.

    For every token of a wave: the weights of the text, the prompts' keys and values once a group, the answers' own.
    """
    text = config.get_text_config()
    weights = weights_of_text(config, memory.count_weights(config))
    place = 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    answers = problems * work.G
    waves = -(-answers // work.wave)
    of_weights = waves * work.T * weights
    of_prompts = work.T * problems * work.S * place
    of_answers = answers * place * work.T * (work.T + 1) / 2
    return number * (of_weights + of_prompts + of_answers)


def model_flops(config, work, *, problems, per_weight=MODEL_FLOPS):
    """Operations to read all answers, a prompt once a group, with their gradients. The vision tower is only read.

    The head meets the answers' tokens alone; the rest of the text's weights meet the prompt's too.
    """
    text = config.get_text_config()
    weights = memory.count_weights(config)
    head = text.vocab_size * text.hidden_size
    body = weights_of_text(config, weights) - head
    answer_tokens = problems * work.G * work.T
    tokens = problems * work.S + answer_tokens
    seen = problems * work.S * work.S / 2 + answer_tokens * (work.S + work.T / 2)
    attention = 2 * text.num_hidden_layers * text.hidden_size * seen
    vision = (weights.all - weights.trained) * problems * work.patches
    return per_weight * (body * tokens + head * answer_tokens + attention) + READ_FLOPS * vision


# --- one case, in a process of its own --------------------------------------------------------------------------------


def config_of_shape(shape):
    """The configuration of a size; tiny is the tabletop's."""
    return config_of(find_model("toy") if shape == "tiny" else shape)


def work_of(args, config, machine, teacher=None):
    """What the plan says of this case: the work with its wave and row, and the plan."""
    side = 28 * max(1, round(args.pixels**0.5 / 28))
    visual = side * side // memory.VISUAL_TOKEN
    work = memory.Work(
        S=visual + plan.WORDS, patches=memory.PATCHES * visual, T=args.max_completion_length,
        T_most=args.max_completion_length, G=args.num_generations, wave=args.problems * args.num_generations,
        row=args.num_generations)
    found = plan.plan(config, work, memory.Machine(1, machine["memory"]), teacher)
    return work, found


def measure_script(args, name, machine):
    """Two steps of a script; the second's speed and memory."""
    teacher = config_of_shape(args.shape) if name == "opd" else None
    work, found = work_of(args, config_of_shape(args.shape), machine, teacher)
    if args.device == "cuda" and not (found["sample_batch_size"] and found["micro_batch_size"]):
        return dict(skipped="does not fit by the plan")
    wave = found["sample_batch_size"] or args.num_generations
    row = found["micro_batch_size"] or args.num_generations
    step = bench.bench_shape(args, SCRIPTS[name], sample_batch_size=wave, micro_batch_size=row)
    length = step["tokens"] / (args.problems * args.num_generations)
    work = dataclasses.replace(work, S=step["prompt_tokens"], T=round(length), wave=wave, row=row)
    planned = max(sum(found[phase].values()) for phase in ("sampling", "updating"))
    return about(args, work, machine, step) | dict(planned_gb=planned / 1e9, wave=wave, row=row)


def about(args, work, machine, step, per_weight=MODEL_FLOPS):
    """The row of a case from what a step took."""
    config = config_of_shape(args.shape)
    number = memory.BF16 if args.device == "cuda" else memory.FP32
    seconds_sample = step["tokens"] / step["tokens_per_second_sample"]
    seconds_update = step["tokens"] / step["tokens_per_second_update"]
    read_bytes = decoded_bytes(config, work, problems=args.problems, number=number)
    flops = model_flops(config, work, problems=args.problems, per_weight=per_weight)
    return dict(
        seconds_sample=seconds_sample, seconds_update=seconds_update, tokens=step["tokens"],
        tokens_per_second_sample=step["tokens_per_second_sample"],
        tokens_per_second_update=step["tokens_per_second_update"],
        bandwidth_share=read_bytes / seconds_sample / machine["bandwidth"],
        flops_share=flops / seconds_update / machine["flops"],
        peak_gb=step["peak_memory_gb"])


def wave_beside_weights(config, work, machine):
    """The largest wave that has room beside weights that are whole, and split over this one GPU."""
    weights = memory.count_weights(config)
    room = plan.MARGIN * machine["memory"] - 2 * memory.BF16 * weights.all

    def fits(wave):
        return memory.wave_bytes(config, dataclasses.replace(work, wave=wave), memory.BF16) <= room

    return max(1, plan.largest(fits, plan.waves_to_try(work.G, work.wave)))


def measure_reading(args, machine):
    """A model that only samples and reads, in bf16 on a GPU: what is left where its optimizer does not fit."""
    problems = bench.noise_problems(args.problems, args.pixels)
    with tempfile.TemporaryDirectory() as folder, bench.random_models():
        bench.write_shape(folder, args.shape)
        flags = parse_args("grpo", grpo.flags, recipe=grpo.RECIPE, argv=["--model", folder])
        settings = dict(
            max_pixels=args.pixels, min_pixels=784, output_dir=bench.NOWHERE, prompts_per_step=args.problems,
            updates_per_step=1)
        run = bench.TimedRun(argparse.Namespace(**vars(flags) | settings))
        policy, processor = load_policy(folder, run)
    work, _ = work_of(args, policy.config, machine)
    wave = wave_beside_weights(policy.config, work, machine)
    for _ in range(2):
        step = {}
        began = time.perf_counter()
        rollout = sample(
            policy, processor, problems, args.num_generations, seed=(1, "gpu"),
            max_completion_length=args.max_completion_length, sample_batch_size=wave)
        wait(args.device)
        sampled = time.perf_counter()
        with torch.no_grad():
            batches = micro_batches(rollout, range(len(rollout)), args.num_generations)
            read(token_logps, rollout, policy, batches=batches)
        wait(args.device)
        ended = time.perf_counter()
        step["tokens"] = float(rollout.mask_BT.sum())
        step["tokens_per_second_sample"] = step["tokens"] / (sampled - began)
        step["tokens_per_second_update"] = step["tokens"] / (ended - sampled)
    step["peak_memory_gb"] = bench.peak_memory_gb(args.device)
    length = step["tokens"] / len(rollout)
    S = len(encode(processor, problems[:1]).ids[0])
    work = dataclasses.replace(work, S=S, T=round(length), wave=wave)
    return about(args, work, machine, step, per_weight=READ_FLOPS)


def measure_one(args):
    """The row of one case, `args.one`; or what the machine can do."""
    if args.one == "machine":
        return machine_of(args.device)
    machine = json.loads(args.machine)
    if args.one == READING:
        return measure_reading(args, machine)
    return measure_script(args, args.one, machine)


def measure_alone(args, **flags):
    """measure_one in a process of its own, whose flags differ from ours by these. A failure is a row too."""
    settings = vars(args) | flags
    del settings["shapes"], settings["output"]
    words = [sys.executable, str(Path(__file__).resolve())]
    words += [f"--{name}={value}" for name, value in settings.items() if value is not None]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return dict(failed=f"status {done.returncode}: {last[:150]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args):
    """The machine, and a row for every case."""
    machine = measure_alone(args, one="machine")
    if "failed" in machine:
        raise UserError(f"the machine could not be measured: {machine['failed']}")
    rows = []
    cases = [(shape, name) for shape in args.shapes for name in SCRIPTS]
    for shape, name in tqdm(cases, desc="cases", disable=False):
        rows.append(dict(shape=shape, case=name) | measure_alone(
            args, one=name, shape=shape, machine=json.dumps(machine)))
        if name == "grpo" and "seconds_sample" not in rows[-1]:
            rows.append(dict(shape=shape, case=READING) | measure_alone(
                args, one=READING, shape=shape, machine=json.dumps(machine)))
    return dict(machine=machine, rows=rows)


# --- the table --------------------------------------------------------------------------------------------------------


def table(args, found):
    """What was measured, as Markdown."""
    machine = found["machine"]
    lines = [
        f"# {machine['name']}, {machine['memory'] / 1e9:.0f} GB",
        "",
        f"`python lab/gpu.py`, torch {machine['torch']}, transformers {machine['transformers']}: {args.problems} "
        f"problems, {args.num_generations} answers of up to {args.max_completion_length} tokens, pictures of "
        f"{args.pixels:,} pixels, random weights. A large copy moves {machine['bandwidth'] / 1e9:,.0f} GB/s, a large "
        f"product does {machine['flops'] / 1e12:,.1f} TFLOP/s.",
        "",
        "| | sampling | updating | bandwidth while sampling | operations of the update | peak, planned | step over "
        "grpo's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(line_of(row, found["rows"]))
    return "\n".join(lines) + "\n"


def line_of(row, rows):
    """A row of the table."""
    name = f"| {row['shape']} {row['case']} |"
    if "seconds_sample" not in row:
        return f"{name} {row.get('skipped') or row['failed']} | | | | | |"
    return (
        f"{name} {row['tokens_per_second_sample']:,.0f} tokens/s | {row['tokens_per_second_update']:,.0f} tokens/s "
        f"| {row['bandwidth_share']:.1%} | {row['flops_share']:.1%} | {memory_of(row)} | {step_by_grpo(row, rows)} |")


def memory_of(row):
    """Peak and plan, in GB."""
    planned = f"{row['planned_gb']:.1f}" if "planned_gb" in row else "no plan"
    return f"{row['peak_gb']:.1f}, {planned} GB"


def step_by_grpo(row, rows):
    """How many times grpo.py's step this one takes."""
    for other in rows:
        is_grpo = (other["shape"], other["case"]) == (row["shape"], "grpo")
        if is_grpo and "seconds_sample" in other:
            ours = row["seconds_sample"] + row["seconds_update"]
            return f"{ours / (other['seconds_sample'] + other['seconds_update']):.2f}"
    return ""


def parse(argv=None):
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    whole = at_least(1)
    parser = Parser("gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=("tiny", *SHAPES), default=["3B", "7B"], help="what to measure")
    parser.add_argument("--device", choices=devices, default=devices[0], help="where")
    parser.add_argument("--problems", type=whole, default=32, help="P, problems in a step")
    parser.add_argument("--num_generations", type=whole, default=8, help="G, answers to each")
    parser.add_argument("--max_completion_length", type=whole, default=512, help="tokens of an answer")
    parser.add_argument("--pixels", type=whole, default=1_000_000, help="of a picture")
    parser.add_argument("--output", default="results/gpu.md", help="where the table goes; its numbers beside it")
    parser.add_argument("--one", help="measure only this case and print its row")
    parser.add_argument("--shape", help="for --one: the size to measure")
    parser.add_argument("--machine", help="for --one: what the machine can do, as json")
    return parser.parse_args(argv)


def main(args):
    os.environ["ACCELERATE_USE_CPU"] = str(args.device == "cpu")
    if args.one:
        print(json.dumps(measure_one(args)))
        return
    check_writable(str(Path(args.output).parent), "--output")
    if args.device == "cpu" and args.shapes != ["tiny"]:
        raise UserError("there is no GPU here, and a real size on a CPU takes hours: --shapes tiny --device cpu")
    found = measure(args)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(args.output).with_suffix(".json"), json.dumps(vars(args) | found, indent=1) + "\n")
    write_atomically(args.output, table(args, found))
    print(table(args, found), end="")


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        Parser().error(str(error))

"""The flags of a script: where each value comes from, and what an error looks like.

A value is looked up in these places, and the first that has it wins:

    command line    what the user asked for
    tabletop        the script's TOY, only with a model of the tabletop
    recipe          the script's RECIPE: the paper's settings, where it gives them
    script          the default of a flag of the script's own
    default         the tables below, which all scripts share

`python grpo.py --help` shows for every flag the value that this very command line would use, and where it comes from.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch.distributed as dist


class UserError(Exception):
    """An error the user can fix. Its text is one line: what is wrong and what to do. It ends a script with status 2."""


INSTRUCTION = "Reason inside <think></think>, then put the final answer in \\boxed{}."

# --- the tables -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """One flag of the world. `least` is the smallest value that a whole number may have."""

    name: str
    default: object
    help: str
    least: int = 1
    choices: tuple | None = None


MODEL_FLAGS = (
    Flag("model", "toy", "toy, toy-teacher, a folder, or a name on the hub such as Qwen/Qwen2.5-VL-7B-Instruct"),
    # The hub's default is 12.8 megapixels, 16,384 tokens a picture.
    Flag("max_pixels", 1_000_000, "larger pictures are scaled down to this many pixels (28x28 pixels are one token)"),
    Flag("min_pixels", 28 * 28, "smaller pictures are enlarged to this many pixels"),
    Flag("system_prompt", "", "what the chat begins with (empty: what the model's own template says)"),
    Flag("instruction", INSTRUCTION, "stands after every problem (empty: nothing does)"),
    Flag("verifiers", "all", "keep only problems with these verifiers, with commas between: digit,mcq,math,iou"),
    Flag("reward_model", "none", "scores open_ended answers: a sequence classifier with one label, or toy-judge"),
    Flag("skip_bad_rows", False, "leave out and list rows with faults and overlong prompts; else they are errors"),
    Flag("max_prompt_length", 2048, "a longer prompt is an error: cutting a prompt would cut its pictures"),
    Flag("max_completion_length", 2048, "tokens of an answer, at most"),
    Flag("temperature", 1.0, "divides the logits, when sampling and when reading"),
    Flag("sample_batch_size", 0, "answers decoded together (0: as many as a GPU has room for, 256 on a CPU)", least=0),
    Flag("seed", 1, "fixes everything random: an answer depends on seed, step and problem, on nothing else", least=0),
    Flag("output_dir", None, "the run's folder"),
    Flag("resume", False, "go on from the newest checkpoint in --output_dir, to the same numbers"),
    Flag("report_to", "none", "a tracker that accelerate knows: tensorboard, wandb, trackio, ..."),
)
TRAIN_FLAGS = (
    Flag("dataset", "hiyouga/geometry3k@train",
         "name@split[:count], or a path[:count] to jsonl, json, parquet or a folder; commas between several mix them"),
    Flag("eval_dataset", "hiyouga/geometry3k@test", "held-out problems, or none"),
    Flag("eval_steps", 0, "measure held-out accuracy every so many steps (0: before and after only)", least=0),
    Flag("num_generations_eval", 4, "answers sampled to each held-out problem"),
    Flag("max_steps", 60, "training steps; of RL and OPD, each with a rollout of its own"),
    Flag("prompts_per_step", 512, "P, problems (of sft.py, traces) in a step, over all processes"),
    Flag("micro_batch_size", 8, "answers in one forward pass, packed after their prompt; changes no gradient"),
    Flag("learning_rate", 1e-6, "peak learning rate of AdamW"),
    Flag("lr_scheduler_type", "constant", "what follows the warm-up", choices=("constant", "cosine")),
    Flag("min_learning_rate", 0.0, "floor of the cosine"),
    Flag("warmup_steps", 0, "steps of linear warm-up", least=0),
    Flag("warmup_ratio", 0.0, "the warm-up as a share of all steps, in place of --warmup_steps (0: those)"),
    Flag("weight_decay", 1e-2, "AdamW's decoupled weight decay"),
    Flag("max_grad_norm", 1.0, "gradients are scaled down to this norm"),
    Flag("train_vision", False, "train the vision tower and its merger too"),
    Flag("gradient_checkpointing", True, "recompute activations in the backward pass"),
    Flag("save_steps", 20, "write a checkpoint every so many steps, for --resume"),
)
GROUP_FLAGS = (
    Flag("num_generations", 8, "G, answers sampled to each problem"),
)
UPDATE_FLAGS = (
    Flag("updates_per_step", 4, "optimiser updates from one rollout, each on its share of the problems"),
)
ALL_TABLES = (MODEL_FLAGS, TRAIN_FLAGS, GROUP_FLAGS, UPDATE_FLAGS)


# --- the parser -------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with exit status 2."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


@cache
def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from `least` on."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; it must be at least {least}")
        return value

    return whole_number


def not_negative(text: str) -> float:
    """The type of a flag that takes numbers from 0 on."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is too small; it must be at least 0")
    return value


def share(text: str) -> float:
    """The type of a flag that takes numbers from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; it must be from 0 to 1")
    return value


def add_flag(parser: argparse.ArgumentParser, flag: Flag):
    if isinstance(flag.default, bool):
        kind = dict(action=argparse.BooleanOptionalAction)
    elif isinstance(flag.default, int):
        kind = dict(type=at_least(flag.least))
    elif isinstance(flag.default, float):
        kind = dict(type=not_negative)
    else:
        kind = dict(type=str, choices=flag.choices)
    parser.add_argument(f"--{flag.name}", default=flag.default, help=flag.help, **kind)


def is_toy(model: str) -> bool:
    """Whether the first model of `model` belongs to the tabletop: by its name, or by the config in its folder."""
    first = model.split(",")[0]
    config = Path(first, "config.json")
    if config.is_file():
        return '"tabletop": true' in config.read_text()
    return first == "toy" or first.startswith("toy-")


def values_given(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict:
    """The values that stand on the command line, and no others."""
    absent = object()
    names = [action.dest for action in parser._actions]
    parsed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
    return {name: value for name, value in vars(parsed).items() if value is not absent}


def parse_args(
    script: str, flags: Callable, *, doc: str = "", recipe: dict | None = None, toy: dict | None = None,
    argv: list[str] | None = None, tables: Iterable = ALL_TABLES,
) -> argparse.Namespace:
    """The flags of one script: command line over TOY (only with a toy model) over RECIPE over the tables.

    `flags(parser)` adds the script's own. Returns a namespace, with `script` added and `output_dir` filled in.
    """
    parser = Parser(
        f"{script}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        add_help=False,
    )
    for table in tables:
        for flag in table:
            add_flag(parser, flag)
    parser.add_argument("-h", "--help", action="store_true", help="show this page")
    world = {action.dest: action.default for action in parser._actions}
    world.setdefault("updates_per_step", 1)
    flags(parser)
    own = {action.dest: action.default for action in parser._actions if action.dest not in world}
    given = values_given(parser, argv)

    values = {}
    sources = {}
    model = given.get("model", world["model"])
    layers = {"default": world, "script": own, "recipe": recipe or {}, "tabletop": {}, "command line": given}
    if is_toy(model):
        layers["tabletop"] = toy or {}
    for source, layer in layers.items():
        unknown = sorted(name for name in layer if name not in {**world, **own})
        if unknown:
            raise ValueError(f"{source} names {unknown[0]}, which is no flag of {script}.py")
        for name, value in layer.items():
            values[name] = value
            sources[name] = source
    if values["output_dir"] is None:
        values["output_dir"] = f"runs/{script}-{Path(model.split(',')[0]).name}-{values['seed']}"
    if "warmup_steps" in given and "warmup_ratio" not in given:
        values["warmup_ratio"] = 0.0  # who asks for steps does not want the recipe's share
        sources["warmup_ratio"] = "command line"
    if values.pop("help"):
        show_help(parser, values, sources)
    check_temperature(parser, values["temperature"], trains=TRAIN_FLAGS in tables)
    check_values(parser, values, given)
    return argparse.Namespace(**values, script=script)


def check_temperature(parser: Parser, temperature: float, trains: bool):
    if temperature > 0 or (temperature == 0 and not trains):
        return
    parser.error(f"--temperature is {temperature}; it must be above 0 (0, greedy, only in eval_passk.py)")


def check_values(parser: Parser, values: dict, given: dict):
    """Ends the script for flags of the world that contradict each other."""
    if values["min_pixels"] > values["max_pixels"]:
        parser.error(f"--min_pixels {values['min_pixels']} is above --max_pixels {values['max_pixels']}")
    if "warmup_steps" in given and given.get("warmup_ratio"):
        parser.error("--warmup_steps and --warmup_ratio both set the warm-up; give one of them")
    if not 0 <= values.get("warmup_ratio", 0.0) <= 1:
        parser.error(f"--warmup_ratio {values['warmup_ratio']} is no share; it must be from 0 to 1")


def of_the_world(**changes: object) -> argparse.Namespace:
    """The defaults of the tables above with some changes: for whoever loads a model without a command line."""
    defaults = {flag.name: flag.default for table in ALL_TABLES for flag in table}
    return argparse.Namespace(**{**defaults, **changes})


def show_help(parser: argparse.ArgumentParser, values: dict, sources: dict):
    """Prints the flags with the values that this command line would use, and ends the script."""
    for action in parser._actions:
        if action.dest in values:
            value = str(values[action.dest]).replace("%", "%%")
            action.help = f"{action.help} [{value}, {sources[action.dest]}]"
    parser.print_help()
    parser.exit()


# What the collectives of gloo and of NCCL say when a process at the other end is no more.
LOST = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "remote process exited")


def has_lost_a_process(error: BaseException) -> bool:
    """Whether an error comes from a collective call whose other processes have ended."""
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    of_a_file = isinstance(error, OSError)  # a pipe that a user closed
    return not alone and not of_a_file and any(words in str(error) for words in LOST)


def launch(script: str, main: Callable, flags: Callable, **settings):
    """Parses the flags and runs `main(args)`. A UserError becomes one line on stderr and exit status 2."""
    try:
        main(parse_args(script, flags, **settings))
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        who = f" (rank {rank})" if rank else ""
        print(f"error{who}: {error}", file=sys.stderr)
        sys.exit(2)
    except BaseException as error:
        if not has_lost_a_process(error):
            raise
        print(f"error (rank {dist.get_rank()}): another process of this run has ended; its own error line says why. "
              "--resume goes on from the newest checkpoint", file=sys.stderr, flush=True)
        os._exit(1)  # a normal exit would wait for the process that has died
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

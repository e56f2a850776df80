"""results/recipes.md: every command in it is one that its script takes, and RECIPEs say what the papers say.

pytest -m slow runs them all, to the letter, in a folder where every name is that of something small.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import sft
from harness.flags import ALL_TABLES, launch, parse_args
from harness.problems import parse_spec, read_verifiers
from lab import report
from tabletop import models

import datasets
import pytest
import torch
from conftest import ROOT
from drive import load_script, no_page
from foreign import FILES
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2Config,
    Qwen3Config,
)

PAGE = (ROOT / "results/recipes.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ {4}accelerate launch (.*)$", PAGE.replace("\\\n", " "), re.MULTILINE)


def values_of(command):
    """The script that a command starts, and the values of its flags."""
    name, *argv = shlex.split(command)
    script = load_script(name.removesuffix(".py").replace("/", "."))
    tables = vars(script).get("TABLES", ALL_TABLES)
    return name, parse_args(
        name.removesuffix(".py"), script.flags, recipe=script.RECIPE, toy=script.TOY, tables=tables,
        argv=argv)


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_command_is_accepted(number):
    """Every flag exists, data sets and verifiers can be read, and P can be shared by 8 processes."""
    _, args = values_of(COMMANDS[number])
    specs = args.dataset.split(",")
    if "eval_dataset" in args:
        specs += args.eval_dataset.split(",")
        assert args.prompts_per_step % (8 * args.updates_per_step) == 0
    for spec in specs:
        assert parse_spec(spec).name
    read_verifiers(args.verifiers)


def test_no_two_commands_write_to_one_folder():
    folders = [values_of(command)[1].output_dir for command in COMMANDS]
    assert len(folders) > 12
    assert len(set(folders)) == len(folders)


def real(script, *argv):
    return values_of(f"{script}.py --model some/model " + " ".join(argv))[1]


def test_every_recipe_has_the_papers_pixels():
    for script in ("grpo", "vepo", "mupo", "opd", "sft", "eval_passk"):
        assert real(script).min_pixels == 262_144
        assert values_of(f"{script}.py --model toy")[1].min_pixels == 784


def test_the_papers_steps_are_the_papers_epochs():
    """Steps × problems in a step / problems of the data set."""
    vepo = real("vepo")
    assert vepo.max_steps * vepo.prompts_per_step / (2101 + 2100) == pytest.approx(20, rel=0.05)
    mupo = real("mupo")
    assert (mupo.prompts_per_step, mupo.updates_per_step) == (384, 3)
    assert mupo.max_steps * mupo.prompts_per_step / 38_870 == pytest.approx(2, rel=0.05)
    sft = real("sft")
    assert sft.max_steps * sft.prompts_per_step / 25_000 == pytest.approx(1, rel=0.05)
    assert sft.warmup_ratio == 0.03


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_vlaas_reinforcement_learning(size):
    command, = [command for command in COMMANDS if f"runs/vlaa-{size}" in command]
    args = values_of(command)[1]
    assert (args.num_generations, args.temperature, args.average, args.format_weight) == (4, 0.8, "answer", 0.0)
    assert (args.prompts_per_step, args.updates_per_step, args.max_steps) == (512, 2, 49)
    assert (args.beta, args.kl_target, args.min_learning_rate, args.warmup_ratio) == (1e-3, 5e-4, 5e-7, 0.03)
    assert args.instruction == ""
    assert "<answer>" in args.system_prompt


def row_of(command):
    """A command as the table at the head of the page has it, as far as numbers go."""
    _, args = values_of(command)
    return [args.max_steps, args.prompts_per_step, vars(args).get("num_generations"), args.updates_per_step,
            args.learning_rate, vars(args).get("epsilon"), vars(args).get("epsilon_high"), vars(args).get("beta")]


def test_the_table_says_what_the_commands_do():
    """Each row is named by its command's folder; cells that sft.py or opd.py have no flag for are empty."""
    commands = {values_of(command)[1].output_dir: command for command in COMMANDS}
    rows = re.findall(r"^\| `([\w-]+)` \|([^|]*)\|" + r"([^|]*)\|" * 8 + "$", PAGE, re.MULTILINE)
    assert len(rows) == 10
    for name, _, *cells in rows:
        numbers = [re.findall(r"[\d.][\d.e-]*", cell) for cell in cells]
        steps, problems, answers, updates, rate, clip, kl, _ = numbers
        shown = [steps[0], problems[0], *(answers or [None]), updates[0], rate[0]]
        shown += [*(clip or [None, None]), *(kl or [None])]
        assert [value if value is None else float(value) for value in shown] == row_of(commands[f"runs/{name}"]), name


# --- every command, run -----------------------------------------------------------------------------------------------

# {a name in the commands: which of FILES it is, and the split that the hub calls it by where its file does not say it}
DATA = {
    "hiyouga/geometry3k": ("geometry3k", "test"), "FanqingM/MMK12": ("MMK12", "test"),
    "AI4Math/MathVista": ("MathVista", "testmini"), "AI4Math/MathVerse": ("MathVerse", "testmini"),
    "MathLLMs/MathVision": ("MathVision", "test"), "We-Math/We-Math": ("We-Math", "testmini"),
    "lscpku/LogicVista": ("LogicVista", "test"), "DynaMath/DynaMath_Sample": ("DynaMath", "sample_variant1"),
    "lmms-lab/HallusionBench": ("HallusionBench", "image"), "Lin-Chen/MMStar": ("MMStar", "val"),
    "ViRL39K": ("ViRL39K", None), "VLAA-Thinking": ("VLAA-Thinking", None),
}
POLICIES = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-32B-Instruct",
            "Qwen/Qwen2.5-VL-72B-Instruct", "UCSC-VLAA/VLAA-Thinker-Qwen2.5VL-7B")
WRITERS = ("Qwen/Qwen2.5-7B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
SMALL = "--max_completion_length 4 --sample_batch_size 64"
TRAINED = "--max_steps 2 --no-gradient_checkpointing --num_generations_eval 1 --micro_batch_size 64"


def small_data(place):
    """A folder or file for every data set that a command names."""
    for name, (kind, split) in DATA.items():
        FILES[kind](place / name)
        shards = sorted((place / name).rglob("*.parquet"))
        if split and not any(shard.name.startswith(split) for shard in shards):
            shutil.copy(shards[0], place / name / f"{split}-00000-of-00001.parquet")
    folder = place / "VLAA-Thinking"
    rows = json.loads((folder / "VLAA-Thinking-GRPO-25K.json").read_text())
    (folder / "VLAA-Thinking-SFT-126K.json").write_text(json.dumps(rows))


def small_traces(place):
    """What lab/traces.py would have written with models that can write."""
    traces = place / "runs/traces"
    shutil.copytree(place / "VLAA-Thinking/images", traces / "images", dirs_exist_ok=True)
    rows = json.loads((place / "VLAA-Thinking/VLAA-Thinking-GRPO-25K.json").read_text())
    lines = [json.dumps(row | dict(trace=row["ds_answer"], gt=str(row["gt"]))) for row in rows[:4]]
    for name in ("sft", "rl"):
        (traces / f"{name}.jsonl").write_text("\n".join(lines))


def small_models(place):
    """A model for every name: the hub's layout, none of the tabletop's, so that RECIPE holds and not TOY."""
    for name in POLICIES:
        models.untrained(place / name)
        config = json.loads((place / name / "config.json").read_text())
        config.pop("tabletop", None)
        (place / name / "config.json").write_text(json.dumps(config))
    tokenizer = models.make_tokenizer()
    small = dict(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id)
    others = {name: (AutoModelForCausalLM, Qwen2Config(**small)) for name in WRITERS}
    others["Qwen/Qwen3-Embedding-0.6B"] = (AutoModel, Qwen3Config(**small, head_dim=16))
    others["Skywork/Skywork-Reward-V2-Qwen3-8B"] = (
        AutoModelForSequenceClassification, Qwen3Config(**small, head_dim=16, num_labels=1))
    for name, (kind, config) in others.items():
        kind.from_config(config).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)


def made_small(command):
    """The same command with two steps, short answers, and as many problems as there are."""
    name, args = values_of(command)
    words = [command, SMALL, "--dataset " + re.sub(r":\d+", ":4", args.dataset)]
    if "max_steps" in args:
        words.append(TRAINED)
        words.append(f"--prompts_per_step {2 if name == 'sft.py' else args.updates_per_step}")
    if name == "sft.py":
        words.append("--held_out_traces 1")
    return " ".join(words)


@pytest.mark.slow
def test_every_command_runs_and_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(report, "finish", no_page)
    monkeypatch.setattr(sft, "is_good", lambda problem, text, judge=None: True)  # else no trace is worth learning
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    small_data(tmp_path)
    small_models(tmp_path)
    for command in COMMANDS:
        name, *argv = shlex.split(made_small(command))
        script = load_script(name.removesuffix(".py").replace("/", "."))
        launch(name.removesuffix(".py"), script.main, script.flags, recipe=script.RECIPE, toy=script.TOY, argv=argv,
               tables=vars(script).get("TABLES", ALL_TABLES))
        written = {"eval_passk.py": "eval.json", "lab/traces.py": "pipeline.json"}.get(name, "model.safetensors")
        wanted = values_of(command)[1]
        assert (Path(wanted.output_dir) / written).is_file(), command
        if written == "model.safetensors":
            used = json.loads((Path(wanted.output_dir) / "args.json").read_text())
            assert (used["min_pixels"], used["learning_rate"]) == (wanted.min_pixels, wanted.learning_rate)  # no TOY
        if name == "lab/traces.py":
            small_traces(tmp_path)

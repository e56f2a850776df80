"""results/recipes.md: every command in it is one that its script takes, and RECIPEs say what the papers say."""

import re
import shlex

from harness.flags import ALL_TABLES, parse_args
from harness.problems import parse_spec, read_verifiers

import pytest
from conftest import ROOT
from drive import load_script

PAGE = (ROOT / "results/recipes.md").read_text()
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


def test_vlaas_reinforcement_learning():
    command, = [command for command in COMMANDS if command.startswith("grpo.py") and "GRPO-25K" in command]
    args = values_of(command)[1]
    assert (args.num_generations, args.temperature, args.average, args.format_weight) == (4, 0.8, "answer", 0.0)
    assert (args.prompts_per_step, args.updates_per_step, args.max_steps) == (512, 2, 49)
    assert (args.beta, args.kl_target, args.min_learning_rate, args.warmup_ratio) == (1e-3, 5e-4, 5e-7, 0.03)
    assert args.instruction == ""
    assert "<answer>" in args.system_prompt

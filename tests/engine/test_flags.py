"""harness.flags: where the value of a flag comes from, and that --help says so."""

import importlib
import json
import re

from harness.flags import ALL_TABLES, UserError, at_least, is_toy, launch, of_the_world, parse_args

import pytest
from conftest import ROOT


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A terminal in which --help breaks no value."""
    monkeypatch.setenv("COLUMNS", "200")


SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "common")


def settings_of(script):
    """What a script gives to parse_args."""
    module = importlib.import_module(script)
    return dict(flags=module.flags, doc=module.__doc__, recipe=module.RECIPE, toy=module.TOY,
                tables=vars(module).get("TABLES", ALL_TABLES))


def values_of(script, *argv):
    return vars(parse_args(script, argv=[str(word) for word in argv], **settings_of(script)))


def shown(script, capsys, *argv):
    """{flag: (value, source)} as --help prints them for this command line."""
    with pytest.raises(SystemExit) as caught:
        values_of(script, *argv, "--help")
    assert caught.value.code == 0
    found = {}
    for entry in re.split(r"\n  (?=--)", capsys.readouterr().out):
        name = re.match(r"--(\w+)", entry)
        values = re.findall(r"\[([^\[\]]*), (command line|tabletop|recipe|script|default)\]", " ".join(entry.split()))
        if name and values:
            found[name.group(1)] = values[-1]
    return found


# --- where a value comes from -----------------------------------------------------------------------------------------


def test_the_first_of_five_places_wins():
    """command line > tabletop (only with a model of the tabletop) > recipe > script > default."""

    def flags(parser):
        parser.add_argument("--own", type=float, default=0.5, help="a flag of the script's own")

    def parsed(*argv):
        recipe = dict(max_steps=100, learning_rate=1e-6, own=0.25)
        toy = dict(max_steps=7, warmup_steps=3)
        return parse_args("grpo", flags, recipe=recipe, toy=toy, argv=list(argv))

    toy = parsed()
    assert toy.max_steps == 7
    assert toy.warmup_steps == 3
    assert toy.learning_rate == 1e-6
    assert toy.own == 0.25
    assert toy.seed == 1
    real = parsed("--model", "some/model")
    assert real.max_steps == 100
    assert real.warmup_steps == 0
    asked = parsed("--max_steps", "5", "--own", "0.125")
    assert asked.max_steps == 5
    assert asked.own == 0.125
    # What the user asks for wins also where it is the default of a lower place.
    assert parsed("--max_steps", "100").max_steps == 100
    assert parsed("--warmup_steps", "0").warmup_steps == 0


def test_the_output_folder_is_named_after_script_model_and_seed():
    assert values_of("grpo")["output_dir"] == "runs/grpo-toy-1"
    real = values_of("vepo", "--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--seed", 3)
    assert real["output_dir"] == "runs/vepo-Qwen2.5-VL-7B-Instruct-3"
    assert values_of("grpo", "--output_dir", "elsewhere")["output_dir"] == "elsewhere"


def test_which_models_belong_to_the_tabletop(tmp_path, folder):
    """By name, or by what stands in the folder: a model that was trained from one stays one."""
    assert is_toy("toy")
    assert is_toy("toy-teacher")
    assert is_toy("toy,Qwen/Qwen2.5-VL-7B-Instruct")  # the first of several decides
    assert not is_toy("Qwen/Qwen2.5-VL-7B-Instruct")
    assert not is_toy("toys/model")
    assert is_toy(folder)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/config.json").write_text(json.dumps(dict(model_type="qwen2_5_vl")))
    assert not is_toy(str(tmp_path / "toy"))


def test_whole_numbers_have_a_least():
    assert at_least(0)("0") == 0
    assert at_least(1)("12") == 12
    with pytest.raises(Exception, match="0 is too small; it must be at least 1"):
        at_least(1)("0")


def test_greedy_is_for_measuring_only():
    assert values_of("eval_passk", "--temperature", 0)["temperature"] == 0


def test_a_warm_up_in_steps_takes_the_place_of_a_recipes_share():
    real = ("--model", "some/model")
    assert values_of("sft", *real)["warmup_ratio"] == 0.03
    asked = values_of("sft", *real, "--warmup_steps", 5)
    assert (asked["warmup_steps"], asked["warmup_ratio"]) == (5, 0.0)
    asked = values_of("sft", "--warmup_ratio", 0.5)
    assert asked["warmup_ratio"] == 0.5


@pytest.mark.parametrize("flags, says", [
    (("--warmup_steps", 5, "--warmup_ratio", 0.1), "give one of them"),
    (("--warmup_ratio", 1.5), "must be from 0 to 1"),
    (("--min_pixels", 2_000_000), "above --max_pixels 1000000"),
])
def test_flags_of_the_world_that_contradict_each_other(capsys, flags, says):
    with pytest.raises(SystemExit) as caught:
        values_of("sft", *flags)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_the_defaults_of_the_world():
    world = of_the_world(seed=9)
    assert (world.seed, world.max_pixels, world.min_pixels, world.prompts_per_step) == (9, 1_000_000, 784, 512)


# --- what --help says -------------------------------------------------------------------------------------------------


def test_help_shows_the_tabletops_values(capsys):
    lines = shown("grpo", capsys)
    assert lines["max_steps"] == ("25", "tabletop")
    assert lines["dataset"] == ("toy@train", "tabletop")
    assert lines["train_vision"] == ("True", "tabletop")
    assert lines["temperature"] == ("1.0", "default")
    assert lines["epsilon"] == ("0.2", "script")
    assert lines["model"] == ("toy", "default")


def test_help_shows_the_papers_values_for_another_model(capsys):
    lines = shown("grpo", capsys, "--model", "Qwen/Qwen2.5-VL-7B-Instruct")
    assert lines["model"] == ("Qwen/Qwen2.5-VL-7B-Instruct", "command line")
    assert lines["prompts_per_step"] == ("512", "recipe")
    assert lines["learning_rate"] == ("1e-06", "recipe")
    assert lines["dataset"] == ("hiyouga/geometry3k@train", "default")
    assert lines["train_vision"] == ("False", "default")
    assert "tabletop" not in {source for _, source in lines.values()}


def test_help_shows_what_is_asked_for(capsys):
    """Also where --help comes first, and where the flag takes a value away."""
    lines = shown("grpo", capsys, "--max_steps", 3, "--no-train_vision", "--dataset", "toy@train:50%")
    assert lines["max_steps"] == ("3", "command line")
    assert lines["train_vision"] == ("False", "command line")
    assert lines["dataset"] == ("toy@train:50%", "command line")
    with pytest.raises(SystemExit):
        values_of("grpo", "--help", "--seed", 5)
    assert "[5, command line]" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("model", ["toy", "some/model"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_true_for_every_flag_of_every_script(script, model, capsys):
    """Every flag is there, with the value that the same command line without --help would use."""
    asked = ("--model", model)
    values = values_of(script, *asked)
    lines = shown(script, capsys, *asked)
    flags = set(values) - {"script"}
    if script in ("sft", "opd", "eval_passk"):
        flags -= {"updates_per_step"}  # always 1 there, and no flag
    assert set(lines) == flags
    world = {flag.name for table in settings_of(script)["tables"] for flag in table} | {"help"}
    recipe = settings_of(script)["recipe"]
    toy = settings_of(script)["toy"] if model == "toy" else {}
    for name, (value, source) in lines.items():
        assert value == str(values[name])
        if name == "model":
            assert source == "command line"
        elif name in toy:
            assert source == "tabletop"
        elif name in recipe:
            assert source == "recipe"
        elif name in world:
            assert source == "default"
        else:
            assert source == "script"


# --- errors -----------------------------------------------------------------------------------------------------------


def no_flags(parser):
    pass


@pytest.mark.parametrize("rank, who", [(None, "error: "), ("0", "error: "), ("3", "error (rank 3): ")])
def test_an_error_of_the_user_is_one_line_and_status_2(monkeypatch, capsys, rank, who):
    def main(args):
        raise UserError("the cup is empty: fill it")

    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as caught:
        launch("grpo", main, no_flags, argv=[])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"{who}the cup is empty: fill it\n"


def test_an_error_of_ours_is_not_hidden():
    """Only a UserError becomes a line; anything else keeps its traceback."""

    def main(args):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        launch("grpo", main, no_flags, argv=[])

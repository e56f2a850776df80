"""Every data set that the recipes name, as a small file of its real layout: it is read, trained on and measured."""

import json
import math
import re

from common import grade, load_problems
from harness.flags import launch
from lab import report
from tabletop import models

import datasets
import pytest
import torch
from drive import load_script, measure, no_page
from foreign import FILES
from transformers import AutoModelForSequenceClassification, Qwen2Config
from whole_runs import drive, metrics

RULES = ("--verifiers", "digit,mcq,math,iou")
SMALL = ("--prompts_per_step", 2, "--max_steps", 2, "--max_completion_length", 8, "--no-gradient_checkpointing",
         "--train_vision", "--learning_rate", 1e-3, "--warmup_steps", 0)


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    """datasets keeps what it has read; the tests leave nothing in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def learn(folder, place, *flags):
    """A run of sft.py, nothing in it played but the page."""
    script = load_script("sft")
    command = ("--model", folder, "--output_dir", place, *SMALL, "--eval_dataset", "none", *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "finish", no_page)
        launch("sft", script.main, script.flags, recipe=script.RECIPE, toy=script.TOY, tables=script.TABLES,
               argv=[str(word) for word in command])
    return place


def write_traces(path, problems):
    """An answer to each problem that ends in its gold answer, for sft.py --traces, which grades it."""
    rows = [dict(id=problem["id"], text=f"<think>so</think>\\boxed{{{problem['answer']}}}") for problem in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_trained(place, steps=2):
    lines = [line for line in metrics(place) if line["step"] > 0]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert sum(line["grad_norm"] for line in lines) > 0  # one step of few answers may have equal rewards only
    assert (place / "model.safetensors").is_file()


@pytest.mark.parametrize("name", FILES)
def test_a_foreign_file_is_read(tmp_path, name):
    """Every row; its gold answer earns 1; its pictures have a place each, and nothing else of that kind is text."""
    problems = load_problems(FILES[name](tmp_path))
    assert len(problems) == (5 if name == "VLAA-Thinking" else 4)
    assert len({problem["id"] for problem in problems}) == len(problems)
    for problem in problems:
        assert problem["problem"].count("<image>") in (0, len(problem["images"]))
        assert not re.search(r"<image[ _]?\d|None|\['", problem["problem"])
        if problem["verifier"] != "open_ended":
            assert grade(problem, f"\\boxed{{{problem['answer']}}}") == 1, problem["id"]
        assert "†" not in problem["answer"]
        if problem["verifier"] == "mcq":
            letters = re.findall(r"\(([A-E])\)|\b([A-E])[.:]|A-E", problem["problem"])
            assert letters or name in ("MathVerse", "LogicVista")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_foreign_file_is_trained_on_and_measured(folder, tmp_path, name):
    spec = FILES[name](tmp_path / name)
    rules = RULES if name == "VLAA-Thinking" else ()
    assert_trained(drive(
        folder, tmp_path / "grpo", *SMALL, "--dataset", spec, "--eval_dataset", spec, "--updates_per_step", 1,
        "--prompts_per_step", 4, "--num_generations", 6, *rules))
    traces = write_traces(tmp_path / "traces.jsonl", [
        problem for problem in load_problems(spec) if problem["verifier"] != "open_ended"])
    assert_trained(learn(
        folder, tmp_path / "sft", "--dataset", spec, "--traces", traces, "--held_out_traces", 1, *rules))
    measure("--model", f"{folder},{tmp_path / 'grpo'}", "--dataset", spec, "--output_dir", tmp_path / "eval",
            "--num_samples", 2, "--ks", "1,2", "--max_completion_length", 8, *rules)
    results = json.loads((tmp_path / "eval/eval.json").read_text())
    assert [result["problems"] for result in results] == [4, 4]


@pytest.mark.slow
def test_the_traces_of_vlaa_thinking_are_learned_from(folder, tmp_path):
    spec = FILES["VLAA-Thinking"](tmp_path / "data")
    assert_trained(learn(folder, tmp_path / "sft", "--dataset", spec, "--held_out_traces", 1))


def judge_model(place):
    """An untrained reward model of text, in the hub's layout."""
    tokenizer = models.make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = Qwen2Config(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.slow
def test_open_ended_rows_of_vlaa_thinking_need_a_judge_and_are_trained_on_with_one(folder, tmp_path):
    spec = FILES["VLAA-Thinking"](tmp_path / "data")
    judge = judge_model(tmp_path / "judge")
    flags = ("--dataset", spec, "--eval_dataset", "none", "--updates_per_step", 1, "--reward_model", judge)
    place = drive(folder, tmp_path / "grpo", *SMALL, *flags, "--prompts_per_step", 5, "--num_generations", 6)
    assert_trained(place)
    asked = {json.loads(line)["id"] for line in (place / "samples.jsonl").read_text().splitlines()}
    assert "allava-4" in asked


@pytest.mark.slow
def test_all_foreign_files_may_be_mixed(folder, tmp_path):
    specs = ",".join(FILES[name](tmp_path / name) for name in FILES)
    place = drive(folder, tmp_path / "grpo", *SMALL, "--dataset", specs, "--eval_dataset", "none",
                  "--prompts_per_step", 48, "--updates_per_step", 2, *RULES)
    assert_trained(place)

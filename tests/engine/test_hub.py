"""The real loading code on small files of the hub's layout: a checkpoint folder, a parquet of Geometry3K's schema."""

import io
import json
import re
import shutil

import common
from harness.flags import of_the_world

import datasets
import pytest
import torch
from conftest import ROOT, picture
from drive import go
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from whole_runs import metrics

SIZES = [(84, 84), (120, 60), (60, 130), (100, 100), (56, 84), (200, 140), (84, 56), (90, 90)]
ANSWERS = ["2 \\sqrt { 221 }", "54", "\\frac { 1 } { 2 }", "7.5"]


# --- a stranger's checkpoint and data set -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def geometry3k(tmp_path_factory):
    """A parquet as hiyouga/geometry3k has it: pictures embedded, `<image>` in the problem, bare LaTeX answers."""
    rows = []
    for number, size in enumerate(SIZES):
        data = io.BytesIO()
        picture(*size, seed=number).save(data, "PNG")
        rows.append({
            "images": [{"bytes": data.getvalue(), "path": None}],
            "problem": f"<image>Find x in figure {number}.",
            "answer": ANSWERS[number % 4],
        })
    features = datasets.Features({
        "images": datasets.List(datasets.Image()),
        "problem": datasets.Value("string"),
        "answer": datasets.Value("string"),
    })
    folder = tmp_path_factory.mktemp("geometry3k")
    (folder / "data").mkdir()
    for split, some in (("train", rows), ("test", rows[:3])):
        table = datasets.Dataset.from_list(some, features=features)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def untie(model):
    """Gives a checkpoint a head of its own, as the 7B has one."""
    plain = AutoModelForImageTextToText.from_pretrained(model)
    plain.config.tie_word_embeddings = False
    plain.config.text_config.tie_word_embeddings = False
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach() * 1.5)
    plain.save_pretrained(model)


@pytest.fixture(scope="module", params=["tied, as 3B", "untied, as 7B"])
def trained(request, folder, geometry3k, tmp_path_factory):
    """A checkpoint in the hub's layout, whose head is tied to the embedding or not, and its run through grpo.py."""
    place = tmp_path_factory.mktemp("hub")
    model = place / "Qwen2.5-VL-tiny"
    shutil.copytree(folder, model)
    config = json.loads((model / "config.json").read_text())
    del config["tabletop"]  # a stranger: the defaults are the paper's
    (model / "config.json").write_text(json.dumps(config))
    if request.param.startswith("untied"):
        untie(model)
    go(
        "grpo", "--model", model, "--dataset", f"{geometry3k}@train", "--eval_dataset", f"{geometry3k}@test",
        "--max_steps", 2, "--prompts_per_step", 4, "--updates_per_step", 2, "--num_generations", 4,
        "--max_completion_length", 16, "--learning_rate", 1e-3, "--min_pixels", 784, "--output_dir", place / "run")
    return model, place / "run"


# --- trained, saved and loaded by others ------------------------------------------------------------------------------


def test_trains_on_geometry3k_and_only_the_language_model(trained):
    """The real sizes' defaults: a frozen vision tower, gradient checkpointing, pictures of several sizes in a batch."""
    model, run = trained
    before = AutoModelForImageTextToText.from_pretrained(model).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(run).state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if ".visual." in name]
    args = json.loads((run / "args.json").read_text())
    assert args["gradient_checkpointing"]
    assert not args["train_vision"]
    for line in metrics(run)[1:]:
        assert line["grad_norm"] > 0
        assert line["sampler_gap"] < 1e-4


def greedy_by_generate(model, tokenizer, inputs, policy):
    """The greedy answer of transformers' own model, under the same forbidden and end tokens as ours."""
    beyond_the_tokenizer = list(range(len(tokenizer), model.lm_head.out_features))
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=12, eos_token_id=policy.ends, top_k=0, top_p=1.0, repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id, suppress_tokens=policy.banned + beyond_the_tokenizer)
    out = model.generate(**inputs, generation_config=settings)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def test_others_can_load_what_a_run_saved(trained, geometry3k):
    """transformers' own classes load the result, and generate the greedy text that our sampler gives."""
    _, run = trained
    config = json.loads((run / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["model_type"] == "qwen2_5_vl"
    tokenizer = AutoTokenizer.from_pretrained(run)
    image_processor = AutoImageProcessor.from_pretrained(run)
    plain, report = AutoModelForImageTextToText.from_pretrained(run, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]

    policy, processor = common.load_policy(str(run))
    problems = common.load_problems(f"{geometry3k}@test")
    ours = common.sample(policy, processor, problems, 1, seed=(0,), max_completion_length=12, temperature=0)
    for problem, text in zip(problems, ours.texts, strict=True):
        seen = image_processor(images=problem["images"], return_tensors="pt")
        tokens = int(seen["image_grid_thw"].prod()) // 4
        prompt = common.chat(processor, problem).replace("<|image_pad|>", "<|image_pad|>" * tokens)
        inputs = tokenizer(prompt, return_tensors="pt")
        is_picture = inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
        inputs = {**inputs, **seen, "mm_token_type_ids": is_picture.int()}
        assert greedy_by_generate(plain, tokenizer, inputs, policy) == text


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.fixture
def half_precision(folder, tmp_path):
    """The same checkpoint in bf16, as the hub has the real ones."""
    AutoModelForImageTextToText.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
        shutil.copy(f"{folder}/{name}", tmp_path)
    return str(tmp_path)


def test_trap_bf16_adam(half_precision):
    """A checkpoint in bf16 is trained in fp32: a step of 1e-6 moves weights that bf16 would round back."""
    args = of_the_world(gradient_checkpointing=False)
    policy, _ = common.load_policy(half_precision, train=True, args=args)
    assert all(weight.dtype == torch.float32 for weight in policy.parameters())
    weight = policy.model.language_model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0)
    weight.sum().backward()
    optimizer.step()
    assert (weight != before).float().mean() > 0.9
    in_bf16 = before.bfloat16()
    assert ((in_bf16 - 1e-6) == in_bf16).float().mean() > 0.9  # what bf16 masters would have done


def test_a_model_that_is_only_read_stays_in_its_own_precision(half_precision):
    assert common.load_policy(half_precision)[0].dtype == torch.bfloat16


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_lacks_weights_is_refused(folder, tmp_path):
    """They would be made up ("newly initialised"), and the model would be another."""
    shutil.copytree(folder, tmp_path / "half")
    config = json.loads((tmp_path / "half/config.json").read_text())
    layers = config["text_config"]["num_hidden_layers"] + 1
    config["text_config"]["num_hidden_layers"] = layers
    config["text_config"]["layer_types"] = ["full_attention"] * layers
    (tmp_path / "half/config.json").write_text(json.dumps(config))
    with pytest.raises(common.UserError, match="weights do not fit"):
        common.load_policy(str(tmp_path / "half"))


def test_another_architecture_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps(dict(model_type="qwen2")))
    with pytest.raises(common.UserError, match="is a qwen2; only Qwen2.5-VL"):
        common.load_policy(str(tmp_path / "other"))


def test_a_name_of_nothing_is_refused():
    with pytest.raises(common.UserError, match="model no/such-model is no folder or name of a model"):
        common.load_policy("no/such-model")


@pytest.mark.parametrize(("file", "said"), [
    ("tokenizer.json", "has a tokenizer that knows no words"), ("chat_template.jinja", "has no chat template"),
    ("preprocessor_config.json", "is no folder or name of a model"),
])
def test_a_file_that_lacks_is_named(tmp_path, file, said):
    """Else transformers makes an empty tokenizer, and the run ends with a traceback at its first prompt."""
    shutil.copytree(ROOT / "tabletop/weights/toy", tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    (tmp_path / "model/tokenizer_config.json").unlink(missing_ok=True)
    with pytest.raises(common.UserError, match=f"model {tmp_path / 'model'} {said}"):
        common.load_policy(str(tmp_path / "model"))


def test_a_tokenizer_with_more_tokens_than_weights_is_refused(tmp_path):
    shutil.copytree(ROOT / "tabletop/weights/toy", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = AutoConfig.from_pretrained(tmp_path / "model").get_text_config().vocab_size
    tokenizer.add_tokens([f"word{number}" for number in range(rows - len(tokenizer) + 1)])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(common.UserError, match=f"a tokenizer of {rows + 1} tokens and weights for {rows}"):
        common.load_policy(str(tmp_path / "model"))


def test_a_config_that_makes_no_sense_is_one_line(tmp_path):
    shutil.copytree(ROOT / "tabletop/weights/toy", tmp_path / "model")
    config = (tmp_path / "model/config.json").read_text()
    (tmp_path / "model/config.json").write_text(re.sub(r'"hidden_size": \d+', '"hidden_size": "x"', config))
    with pytest.raises(common.UserError, match="expected int, got str"):
        common.load_policy(str(tmp_path / "model"))

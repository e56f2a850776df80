"""The real loading code on small files of the hub's layout: a checkpoint folder, a parquet of Geometry3K's schema."""

import argparse
import io
import json
import shutil

import datasets
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

import common
from conftest import picture
from drive import go
from test_run import metrics

SIZES = [(84, 84), (120, 60), (60, 130), (100, 100), (56, 84), (200, 140), (84, 56), (90, 90)]


@pytest.fixture(scope="module")
def geometry3k(tmp_path_factory):
    """A parquet as hiyouga/geometry3k has it: pictures embedded, `<image>` in the problem, bare LaTeX answers."""
    rows = []
    for n, size in enumerate(SIZES):
        data = io.BytesIO()
        picture(*size, seed=n).save(data, "PNG")
        rows.append(dict(images=[dict(bytes=data.getvalue(), path=None)], problem=f"<image>Find x in figure {n}.",
                         answer=["2 \\sqrt { 221 }", "54", "\\frac { 1 } { 2 }", "7.5"][n % 4]))
    folder = tmp_path_factory.mktemp("geometry3k") / "data"
    folder.mkdir()
    features = datasets.Features(dict(images=datasets.List(datasets.Image()), problem=datasets.Value("string"),
                                      answer=datasets.Value("string")))
    for split, some in (("train", rows), ("test", rows[:3])):
        datasets.Dataset.from_list(some, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder.parent


@pytest.fixture(scope="module", params=["tied, as 3B", "untied, as 7B"])
def trained(request, folder, geometry3k, tmp_path_factory):
    """The run of a checkpoint in the hub's layout, whose head is tied to the embedding or not, through grpo.py."""
    place = tmp_path_factory.mktemp("hub")
    model = place / "Qwen2.5-VL-tiny"
    shutil.copytree(folder, model)
    config = json.loads((model / "config.json").read_text())
    del config["tabletop"]  # a stranger: the defaults are the paper's
    (model / "config.json").write_text(json.dumps(config))
    if request.param.startswith("untied"):
        untie(model)
    flags = ["--model", model, "--dataset", f"{geometry3k}@train", "--eval_dataset", f"{geometry3k}@test", "--max_steps", 2,
             "--prompts_per_step", 4, "--updates_per_step", 2, "--num_generations", 4, "--max_completion_length", 16,
             "--learning_rate", 1e-3, "--output_dir", place / "run"]
    go("grpo", *flags)
    return model, place / "run"


def untie(model):
    """The same checkpoint with a head of its own, as the 7B has one."""
    plain = AutoModelForImageTextToText.from_pretrained(model)
    plain.config.tie_word_embeddings = plain.config.text_config.tie_word_embeddings = False
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach() * 1.5)
    plain.save_pretrained(model)


def test_trains_on_geometry3k_and_only_the_language_model(trained):
    """The real sizes' defaults: a frozen vision tower, gradient checkpointing, pictures of several sizes in a batch."""
    before, after = (AutoModelForImageTextToText.from_pretrained(place).state_dict() for place in trained)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not [name for name in moved if ".visual." in name]
    assert before.keys() == after.keys()
    assert all(line["grad_norm"] > 0 and line["sampler_gap"] < 1e-4 for line in metrics(trained[1])[1:])


def test_others_can_load_what_a_run_saved(trained, geometry3k):
    """transformers' own classes load the result, and generate the greedy text that our sampler gives."""
    _, run = trained
    config = json.loads((run / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"] and config["model_type"] == "qwen2_5_vl"
    tokenizer, pictures = AutoTokenizer.from_pretrained(run), AutoImageProcessor.from_pretrained(run)
    plain, report = AutoModelForImageTextToText.from_pretrained(run, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    policy, processor = common.load_policy(str(run))
    problems = common.load_problems(f"{geometry3k}@test")
    ours = common.sample(policy, processor, problems, 1, seed=(0,), max_completion_length=12, temperature=0)
    for b, problem in enumerate(problems):
        seen = pictures(images=problem["images"], return_tensors="pt")
        pads = int(seen["image_grid_thw"].prod()) // 4
        text = common.chat(processor, problem).replace("<|image_pad|>", "<|image_pad|>" * pads)
        ids = tokenizer(text, return_tensors="pt")
        kinds = (ids["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        settings = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=policy.ends, top_k=0, top_p=1.0,
                                    repetition_penalty=1.0, pad_token_id=tokenizer.pad_token_id,
                                    suppress_tokens=policy.banned + list(range(len(tokenizer), plain.lm_head.out_features)))
        out = plain.generate(**ids, **seen, mm_token_type_ids=kinds, generation_config=settings)
        assert tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True) == ours.texts[b]


def test_trap_bf16_adam(folder, tmp_path):
    """A checkpoint in bf16 is trained in fp32: a step of 1e-6 moves weights that bf16 would round back."""
    AutoModelForImageTextToText.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
        shutil.copy(f"{folder}/{name}", tmp_path)
    assert common.load_policy(str(tmp_path))[0].dtype == torch.bfloat16  # a model that is only read stays as it is
    args = argparse.Namespace(max_pixels=10**6, train_vision=False, gradient_checkpointing=False)
    policy, _ = common.load_policy(str(tmp_path), train=True, args=args)
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    weight = policy.model.language_model.layers[0].mlp.up_proj.weight.requires_grad_()
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0)
    weight.sum().backward()
    optimizer.step()
    assert (weight != before).float().mean() > 0.9
    assert ((before.bfloat16() - 1e-6) == before.bfloat16()).float().mean() > 0.9  # what bf16 masters would have done


def test_a_checkpoint_that_does_not_fit_is_refused(folder, tmp_path):
    """Missing weights are an error, never 'newly initialised'; another architecture is an error too."""
    shutil.copytree(folder, tmp_path / "half")
    config = json.loads((tmp_path / "half/config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    config["text_config"]["layer_types"] = ["full_attention"] * config["text_config"]["num_hidden_layers"]
    (tmp_path / "half/config.json").write_text(json.dumps(config))
    with pytest.raises(common.UserError, match="weights do not fit"):
        common.load_policy(str(tmp_path / "half"))
    (tmp_path / "half/config.json").write_text(json.dumps(dict(model_type="qwen2")))
    with pytest.raises(common.UserError, match="only Qwen2.5-VL"):
        common.load_policy(str(tmp_path / "half"))
    with pytest.raises(common.UserError, match="no folder or name of a model"):
        common.load_policy("no/such-model")

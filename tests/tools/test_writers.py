"""lab/writers.py: prompts without pictures against `generate`; other checkpoints against a plain loop."""

from argparse import Namespace

import common
from common import forced, inverse_cdf, read, sample, token_logps
from harness.flags import of_the_world
from harness.prompts import check_prompts
from harness.run import generator
from lab import writers
from tabletop.models import make_tokenizer

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
)


def run_of(**changes):
    args = of_the_world(max_completion_length=8, **changes)
    return Namespace(args=args, device=torch.device("cpu"), accelerator=None)


def asked_of(problems):
    return [dict(problem, verifier="") for problem in problems]


def without_pictures(problems):
    return [dict(problem, images=[], problem=problem["problem"].replace("<image>", "it")) for problem in problems]


# --- prompts without pictures, through the scripts' own verbs ---------------------------------------------------------


def test_text_alone_is_answered_as_generate_answers_it(folder, loaded, problems):
    """The same greedy tokens, for prompts of several lengths in one wave."""
    policy, processor = loaded
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    some = without_pictures(problems)
    rollout = sample(policy, processor, some, 1, seed=(1,), max_completion_length=8, temperature=0)
    for b, problem in enumerate(some):
        ids = processor.tokenizer(common.chat(processor, problem), return_tensors="pt").input_ids
        forbidden = [*policy.banned, *range(policy.vocabulary, plain.config.text_config.vocab_size)]
        expected = plain.generate(
            ids, max_new_tokens=8, do_sample=False, repetition_penalty=1.0, eos_token_id=policy.ends,
            suppress_tokens=forbidden)[0, ids.shape[1]:]
        length = int(rollout.mask_BT[b].sum())
        assert rollout.tokens_BT[b, :length].tolist() == expected.tolist()[:length]


def test_text_alone_is_read_as_the_plain_model_reads_it(folder, loaded, problems):
    """Log-probs of given answers, one prompt with a picture and one without in the same row."""
    policy, processor = loaded
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    some = [without_pictures(problems)[0], problems[1]]
    rollout = forced(policy, processor, some, ["red star", "blue"])
    with torch.no_grad():
        logp_BT = read(token_logps, rollout, policy)
        ids = processor.tokenizer(common.chat(processor, some[0]), return_tensors="pt").input_ids
        answer = rollout.tokens_BT[0, :int(rollout.mask_BT[0].sum())]
        logits = plain(input_ids=torch.cat([ids, answer[None]], 1)).logits[0, ids.shape[1] - 1:-1, :policy.vocabulary]
        logits = logits.index_fill(1, torch.tensor(policy.banned), -1e9)
    expected = logits.log_softmax(1).gather(1, answer[:, None])[:, 0]
    assert logp_BT[0, :len(answer)].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    alone = forced(policy, processor, some[1:], ["blue"])
    with torch.no_grad():
        alone_BT = read(token_logps, alone, policy)
    length = int(alone.mask_BT[0].sum())
    assert logp_BT[1, :length].tolist() == pytest.approx(alone_BT[0, :length].tolist(), abs=1e-4)


def test_a_picture_makes_a_difference(loaded, problems):
    """The same question with its picture and without has other log-probs: else nothing above would say anything."""
    policy, processor = loaded
    both = [problems[0], without_pictures(problems)[0]]
    with torch.no_grad():
        logp_BT = read(token_logps, forced(policy, processor, both, ["red", "red"]), policy)
    assert (logp_BT[0] - logp_BT[1]).abs().max() > 1e-3


def test_our_writer_is_asked_in_its_own_words(folder, problems):
    """Without the scripts' instruction; a prompt that is too long, or a text that is cut off, gives None."""
    writer = writers.load_writer(folder, run_of())
    assert writer.sees
    assert "boxed" not in common.chat(writer.processor, problems[0])
    writer.policy.ends = list(range(writer.policy.vocabulary))  # any token ends a text
    assert None not in writer.write(asked_of(problems), "caption")
    lengths = check_prompts(writer.processor, asked_of(problems), writer.args, graded=False).lengths
    writer.args.max_prompt_length = max(lengths) - 1
    texts = writer.write(asked_of(problems), "caption")
    assert [text is None for text in texts] == [length == max(lengths) for length in lengths]
    writer.policy.ends = [-1]
    assert writer.write(asked_of(problems[4:]), "caption") == [None]


def test_our_surprise_is_the_mean_of_minus_log_p(folder, problems):
    writer = writers.load_writer(folder, run_of())
    texts = ["red star", "blue", "a b c", "no", "x"]
    rollout = forced(writer.policy, writer.processor, problems, texts)
    with torch.no_grad():
        logp_BT = read(token_logps, rollout, writer.policy)
    expected = [-logp_BT[b, :int(rollout.mask_BT[b].sum())].mean().item() for b in range(5)]
    assert writer.surprise(asked_of(problems), texts) == pytest.approx(expected, rel=1e-4)


# --- other checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A causal language model, untrained, with sampling defaults that must not be used."""
    place = str(tmp_path_factory.mktemp("causal"))
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, eos_token_id=tokenizer.eos_token_id))
    model.generation_config.update(do_sample=True, top_k=2, temperature=0.3, repetition_penalty=1.5)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A vision-language model of another family, untrained, with a processor of its own."""
    place = str(tmp_path_factory.mktemp("llava"))
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    torch.manual_seed(0)
    sizes = dict(intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, hidden_size=32)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, initializer_range=0.3, **sizes),
        text_config=LlamaConfig(vocab_size=520, initializer_range=0.3, **sizes),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>")))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(place)
    tool = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        tool, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template).save_pretrained(place)
    return place


@torch.no_grad()
def by_hand(writer, one, temperature):
    """The tokens that a plain loop draws, with the same uniforms and no cache."""
    ids = writer.inputs([one])
    uniform_T = torch.rand(8, generator=generator(1, "reason", one["id"], "sample", 0), dtype=torch.float64)
    extra = {name: value for name, value in ids.items() if name == "pixel_values"}
    tokens = ids["input_ids"]
    written = []
    for t in range(8):
        logits = writer.model(input_ids=tokens, **extra).logits[:, -1].float()
        token = logits.argmax(1)
        if temperature:
            token = inverse_cdf((logits / temperature).softmax(1), uniform_T[t:t + 1])
        if token.item() in writer.ends:
            return writer.tokenizer.decode(written, skip_special_tokens=True)
        written.append(token.item())
        tokens = torch.cat([tokens, token[:, None]], 1)
    return None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["causal", "llava"])
def test_other_models_draw_as_a_plain_loop_does(request, problems, name, temperature):
    """Whatever stands in the batch beside them, and whatever sampling defaults the checkpoint ships."""
    writer = writers.load_writer(request.getfixturevalue(name), run_of(temperature=temperature))
    assert writer.sees == (name == "llava")
    some = asked_of([problems[0], problems[3], problems[4]])
    writer.ends = list(range(0, 520, 3))  # so that some texts end
    writer.model.generation_config.eos_token_id = writer.ends
    expected = [by_hand(writer, one, temperature) for one in some]
    assert writer.write(some, "reason") == expected
    assert any(text is not None for text in expected)


@pytest.mark.parametrize("name", ["causal", "llava"])
def test_the_surprise_of_other_models(request, problems, name):
    """The mean of −log p over a text and its end token; a model that reads text sees no picture."""
    writer = writers.load_writer(request.getfixturevalue(name), run_of())
    one = asked_of(problems)[0]
    inputs = writer.inputs([one])
    ids = writer.tokenizer("red star").input_ids + [writer.tokenizer.eos_token_id]
    extra = {key: value for key, value in inputs.items() if key == "pixel_values"}
    assert bool(extra) == (name == "llava")
    tokens = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    with torch.no_grad():
        logp = writer.model(input_ids=tokens, **extra).logits[0, -len(ids) - 1:-1].log_softmax(1)
    expected = -sum(logp[t, token].item() for t, token in enumerate(ids)) / len(ids)
    assert writer.surprise([one], ["red star"]) == pytest.approx([expected], rel=1e-4)


def test_a_prompt_that_is_too_long_gives_no_text(causal, problems):
    writer = writers.load_writer(causal, run_of(max_prompt_length=5))
    assert writer.write(asked_of(problems), "reason") == [None] * 5


def test_a_model_that_writes_nothing_is_one_line(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(common.UserError, match="is a vit, which writes no text"):
        writers.kind_of(str(tmp_path), None)
    with pytest.raises(common.UserError, match="model no/such is no folder or name"):
        writers.kind_of("no/such", None)

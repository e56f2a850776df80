"""Answers in free text: what a reward model's score is worth, and that it hangs on the answer alone."""

import itertools
import json
import math
import random
import shutil

import common
from common import UserError, forced, grade, is_right, load_judge
from harness.flags import of_the_world
from harness.reward_model import Qwen2_5_VLForSequenceClassification, check_kind
from tabletop import models

import pytest
import torch
from conftest import picture
from drive import measure
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

KINDS = ("qwen2", "bert", "qwen2_5_vl")
ANSWERS = ["a", "two red stars", "nothing " * 12 + "else", "red star", "a small dog, I think; no: two", "why"]

# --- a score becomes a reward -----------------------------------------------------------------------------------------


def free(id="q", answer="gold"):
    return dict(id=id, problem="Describe it.", answer=answer, verifier="open_ended", images=[picture(56, 56)])


def reward(gap, reference=2.0):
    """The reward of an answer that scores `gap` above the reference."""
    scores = {"gold": reference, "ours": reference + gap}
    return grade(free(), "\\boxed{ours}", lambda problem, answer: scores[answer])


def test_the_reward_rises_with_the_score_and_stays_below_one():
    gaps = [1e-9, 1e-4, 0.1, 0.5, 1.0, 3.0, 10.0]
    rewards = [reward(gap) for gap in gaps]
    assert all(low < high for low, high in itertools.pairwise(rewards))
    assert rewards == pytest.approx([1 - math.exp(-gap) for gap in gaps], rel=1e-5)
    assert reward(1e-20, reference=0.0) == 1e-20  # 1 − exp(−1e-20) would be 0
    for gap in (10.0, 40.0, 1e4, 1e30):
        assert rewards[-1] <= reward(gap) < 1
        assert torch.tensor(reward(gap)) < 1  # in fp32 too


@pytest.mark.parametrize("gap", [0.0, -1e-9, -3.0, -1e30])
def test_nothing_is_earned_at_and_below_the_reference(gap):
    assert reward(gap) == 0.0
    scores = {"gold": 0.0, "ours": gap}
    assert not is_right(free(), "\\boxed{ours}", lambda problem, answer: scores[answer])


def test_any_score_above_the_reference_is_right():
    scores = {"gold": 2.0, "ours": 2.0001}
    assert is_right(free(), "\\boxed{ours}", lambda problem, answer: scores[answer])


# --- reward models ----------------------------------------------------------------------------------------------------


def make(place, kind, **changes):
    """An untrained reward model in the hub's layout: a text model that chats, an encoder, one that sees pictures."""
    tokenizer = models.make_tokenizer()
    settings = dict(num_labels=1, pad_token_id=tokenizer.pad_token_id) | changes
    small = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if kind == "qwen2_5_vl":
            models.untrained(place)  # its picture processor
            config = models.make_config(models.RECIPES["toy"], tokenizer)
            config.num_labels = settings["num_labels"]
            model = Qwen2_5_VLForSequenceClassification(config)
        elif kind == "bert":
            tokenizer.chat_template = None
            (place / "chat_template.jinja").unlink(missing_ok=True)
            model = AutoModelForSequenceClassification.from_config(BertConfig(**small, **settings))
        else:
            model = AutoModelForSequenceClassification.from_config(
                Qwen2Config(**small, num_key_value_heads=2, **settings))
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def test_a_model_that_sees_but_would_be_shown_nothing_is_refused():
    with pytest.raises(UserError, match="is a gemma3, which sees pictures"):
        check_kind("some/model", Gemma3Config(num_labels=1), AutoModelForSequenceClassification)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for kind in KINDS:
        place = tmp_path_factory.mktemp(kind)
        found[kind] = make(place, kind)
    return found


@pytest.fixture(params=KINDS)
def judge(request, folders):
    return load_judge(folders[request.param])


def texts_of(answers):
    return [f"<think>so</think>\\boxed{{{answer}}}" for answer in answers]


def alone(judge, problem, answer):
    return judge.scores([(problem, answer)])[0]


def test_padding_changes_no_score(judge):
    """Long and short answers, and pictures of two sizes, side by side and each by itself."""
    pairs = [(free(f"{b}") | dict(images=[picture(56, 56 + 28 * (b % 2), b)]), answer)
             for b, answer in enumerate(ANSWERS)]
    together = judge.scores(pairs)
    assert together == pytest.approx([alone(judge, *pair) for pair in pairs], abs=1e-5)
    assert max(together) - min(together) > 1e-3  # they do differ


def test_scores_do_not_hang_on_batch_and_order(judge):
    """The same to the last bit in another order, to rounding in another batch. A reference's is always the same."""
    problems = [free(f"{number}", f"gold {number}") for number in range(3)]
    asked = [(problem, answer) for problem in problems for answer in ANSWERS]
    judge.read([problem for problem, _ in asked], texts_of(answer for _, answer in asked))
    first = {(problem["id"], answer): judge(problem, answer) for problem, answer in asked}
    references = [judge(problem, problem["answer"]) for problem in problems]
    assert references == [alone(judge, problem, problem["answer"]) for problem in problems]

    random.Random(1).shuffle(asked)
    again = common.RewardModel(judge.model, judge.tokenizer, judge.device, judge.processor)
    again.read([problem for problem, _ in asked], texts_of(answer for _, answer in asked))
    assert {(problem["id"], answer): again(problem, answer) for problem, answer in asked} == first
    again.read([problem for problem, _ in asked[:4]], texts_of(answer for _, answer in asked[:4]))
    for problem, answer in asked[:4]:
        assert again(problem, answer) == pytest.approx(first[problem["id"], answer], abs=1e-5)
    assert [again(problem, problem["answer"]) for problem in problems] == references


def test_the_reference_to_the_letter_earns_nothing(judge):
    """Exactly: it is not scored a second time, in another batch, where its last digits might differ."""
    problems = [free(f"{number}", answer) for number, answer in enumerate(ANSWERS)]
    texts = texts_of(ANSWERS)
    judge.read(problems, texts)
    assert [grade(problem, text, judge) for problem, text in zip(problems, texts, strict=True)] == [0.0] * len(ANSWERS)


def test_a_rollout_is_scored_by_a_judge(judge, policy, processor):
    """Rewards as by hand; equal answers are read once, references once in a run, other verifiers never."""
    rollout = forced(policy, processor, [free("a"), free("b") | dict(verifier="math", answer="2")],
                     texts_of(["two red stars", "why", "gold", "2", "3", "3"]))
    rollout.group_B = torch.tensor([0, 0, 0, 1, 1, 1])
    read = []
    score = judge.scores

    def counted(pairs):
        read.extend(answer for _, answer in pairs)
        return score(pairs)

    judge.scores = counted
    rewards_PG = rollout.score(grade, judge)
    assert sorted(read) == ["gold", "two red stars", "why"]
    rollout.score(is_right, judge)
    assert sorted(read) == ["gold", "two red stars", "two red stars", "why", "why"]
    judge.scores = score
    ahead = [alone(judge, free("a"), answer) - alone(judge, free("a"), "gold") for answer in ("two red stars", "why")]
    by_hand = [1 - math.exp(-max(gap, 0.0)) for gap in ahead]
    assert rewards_PG[0].tolist() == pytest.approx([*by_hand, 0.0], abs=1e-5)
    assert rewards_PG[1].tolist() == [1.0, 0.0, 0.0]


def test_what_was_read_before_changes_no_score(judge):
    """Not even where a held-out problem has the id, the question and the reference answer of a training problem."""
    seen = free() | dict(images=[picture(56, 56, 1)])
    held_out = free() | dict(images=[picture(56, 84, 2)])
    judge.read([seen], texts_of(["why"]))
    judge.read([held_out], texts_of(["why"]))
    assert [judge(held_out, answer) for answer in ("gold", "why")] == [
        alone(judge, held_out, answer) for answer in ("gold", "why")]


def test_only_a_model_of_pictures_sees_the_picture(folders):
    for kind in KINDS:
        judge = load_judge(folders[kind])
        one, other = (alone(judge, free() | dict(images=[picture(56, 56, seed)]), "two stars") for seed in (1, 2))
        assert (one != other) == (kind == "qwen2_5_vl")
        asked = alone(judge, free() | dict(problem="Where is the <image> dog?"), "two stars")
        assert asked != alone(judge, free(), "two stars")


def test_instruction_and_system_prompt_are_the_policys_alone(folders):
    run = type("Run", (), dict(args=of_the_world(instruction="Box it.", system_prompt="Be brief."),
                               device=torch.device("cpu")))
    judge = common.RewardModel(*common.reward_models.load("x", folders["qwen2_5_vl"]), run.device)
    judge.processor = load_judge(folders["qwen2_5_vl"]).processor
    judge.processor.instruction = run.args.instruction
    judge.processor.system_prompt = run.args.system_prompt
    assert alone(judge, free(), "why") == alone(load_judge(folders["qwen2_5_vl"]), free(), "why")


def test_the_model_is_on_the_device_only_to_score(folders, monkeypatch):
    judge = load_judge(folders["qwen2"])
    moves = []
    monkeypatch.setattr(judge.model, "to", moves.append)
    judge.device = "the device"
    monkeypatch.setattr(judge, "scores", lambda pairs: moves.append("scores") or [0.0] * len(pairs))
    judge.read([free()], texts_of(["why"]))
    assert moves == ["the device", "scores", "scores", "cpu"]
    judge(free(), "why")  # looked up
    judge.read([free()], ["no answer"])  # nothing to score
    assert len(moves) == 4


def test_without_padding_answers_are_scored_one_by_one(folders):
    judge = load_judge(folders["qwen2"])
    whole = judge.scores([(free(), answer) for answer in ANSWERS])
    judge.tokenizer.pad_token = None
    judge.model.config.pad_token_id = None
    judge.read([free()] * len(ANSWERS), texts_of(ANSWERS))
    assert [judge(free(), answer) for answer in ANSWERS] == pytest.approx(whole, abs=1e-4)


# --- what cannot be a reward model ------------------------------------------------------------------------------------


def test_what_is_no_reward_model_is_a_users_error(folder, tmp_path, folders):
    with pytest.raises(UserError, match="1 weights are missing or do not fit, score.weight"):
        plain = tmp_path / "plain"
        make(plain, "qwen2_5_vl")
        models.untrained(plain)  # a policy, which has words and no score
        config = json.loads((plain / "config.json").read_text()) | dict(num_labels=1, id2label={"0": "LABEL_0"})
        (plain / "config.json").write_text(json.dumps(config))
        load_judge(str(plain))
    with pytest.raises(UserError, match="has 2 labels"):
        load_judge(folder)
    with pytest.raises(UserError, match="--reward_model no/where is no folder"):
        load_judge("no/where")
    with pytest.raises(UserError, match="is a clip_vision_model, of which"):
        other = tmp_path / "other"
        other.mkdir()
        (other / "config.json").write_text('{"model_type": "clip_vision_model"}')
        load_judge(str(other))
    judge = load_judge(folders["bert"])
    with pytest.raises(UserError, match="problem q has .* tokens with an answer, over the 512"):
        judge(free(), "many " * 600)
    judge.model.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="an answer to problem q is not finite"):
        judge(free(), "why")


def words(**settings):
    """A tokenizer of a few words, as BERT has one, trained on the spot."""
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    text = f"Describe it. many dogs are in picture 1 {' '.join(ANSWERS)}"
    tokenizer.train_from_iterator([text], WordPieceTrainer(special_tokens=special))
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
                                   sep_token="[SEP]", **settings)


def classifier(place, kind, tokenizer, dtype=torch.float32, **changes):
    """An untrained classifier of text of this kind, with its tokenizer."""
    sizes = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=2, initializer_range=0.3, num_labels=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **sizes | changes))
    model.to(dtype).save_pretrained(place)
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("kind, changes", [
    ("bert", {}),
    ("qwen2", dict(pad_token_id=9)),  # its tokenizer pads with 0
    ("qwen2", dict(dtype=torch.bfloat16)),
    ("bert", dict(dtype=torch.float16)),
    ("qwen2", dict(dtype=torch.float16)),
], ids=str)
def test_classifiers_of_other_makers_are_served(tmp_path, kind, changes):
    """With a tokenizer of another family, another padding, in half precision: the same scores alone and in a batch."""
    judge = load_judge(classifier(tmp_path, kind, words(), **changes))
    dtype = changes.get("dtype", torch.float32)
    assert next(judge.model.parameters()).dtype == dtype
    together = judge.scores([(free(), answer) for answer in ANSWERS])
    rounding = 1e-5 if dtype == torch.float32 else 0.05
    assert together == pytest.approx([alone(judge, free(), answer) for answer in ANSWERS], abs=rounding)
    assert max(together) - min(together) > 0.1


@pytest.mark.parametrize("kind, changes, most", [
    ("bert", dict(max_position_embeddings=64), 64),
    ("roberta", dict(max_position_embeddings=66, pad_token_id=1, type_vocab_size=2), 64),
    ("gpt2", dict(n_positions=64, n_embd=32, n_layer=1, n_head=2), 64),
    ("qwen2", dict(max_position_embeddings=64), 64),
    ("bert", dict(model_max_length=40), 40),
])
def test_what_a_model_cannot_read_is_a_users_error(tmp_path, kind, changes, most):
    """The longest that it reads is served, a word more is refused, whoever knows the limit."""
    changes = dict(changes)
    model_max_length = changes.pop("model_max_length", None)
    settings = {} if model_max_length is None else dict(model_max_length=model_max_length)
    judge = load_judge(classifier(tmp_path, kind, words(**settings), **changes))
    assert judge.context == most
    lengths = [judge.inputs_of([(free(), "why " * number)])["input_ids"].shape[1] for number in range(most)]
    number = sum(length <= most for length in lengths) - 1
    assert math.isfinite(alone(judge, free(), "why " * number))
    pairs = [(free("short"), "why"), (free("long"), "why " * (number + 1)), (free("other"), "a")]
    with pytest.raises(UserError, match=f"problem long has {lengths[number + 1]} tokens with .*, over the {most} that"):
        judge.scores(pairs)


def test_a_tokenizer_that_does_not_fit_is_a_users_error(tmp_path, folders):
    """Where its files lack, transformers makes an empty tokenizer, and every answer would get the same score."""
    for kind in ("bert", "qwen2"):
        with pytest.raises(UserError, match="has a tokenizer that knows no words"):
            load_judge(classifier(tmp_path / kind, kind, None))
    with pytest.raises(UserError, match="has a tokenizer of .* tokens and weights for 20"):
        load_judge(classifier(tmp_path / "small", "qwen2", words(), vocab_size=20))
    broken = tmp_path / "bert"
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="that can be loaded"):
        load_judge(str(broken))
    for lacks, says in (("chat_template.jinja", "has no chat template"), ("preprocessor_config.json", "can be loaded")):
        place = tmp_path / lacks
        shutil.copytree(folders["qwen2_5_vl"], place)
        (place / lacks).unlink()
        with pytest.raises(UserError, match=says):
            load_judge(str(place))


def test_broken_files_are_a_users_error(tmp_path, monkeypatch):
    place = classifier(tmp_path / "model", "qwen2", words())
    config = json.loads((tmp_path / "model/config.json").read_text())

    def refused(says, **changes):
        (tmp_path / "model/config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=says):
            load_judge(place)

    refused("weights are missing or do not fit, model.embed_tokens.weight for one", hidden_size=64)
    refused("can be loaded: Validation error", hidden_size="wide")
    refused("has 2 labels .its config.json says Qwen2ForCausalLM", architectures=["Qwen2ForCausalLM"],
            id2label={"0": "a", "1": "b"})
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail("nobody is there to be asked"))
    refused("custom code", model_type="others", auto_map={"AutoConfig": "others.Config"})
    (tmp_path / "model/model.safetensors").unlink()
    weights = tmp_path / "model/pytorch_model.bin"
    torch.save(dict(weight=torch.zeros(1000)), weights)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", weights.read_bytes()[:1000]):
        weights.write_bytes(content)
        refused("can be loaded: [A-Z]")  # and a reason


# --- in a script ------------------------------------------------------------------------------------------------------


def test_an_evaluation_with_a_reward_model(folder, folders, tmp_path):
    """Answers that another judge has graded are not taken for graded by this one."""
    picture(56, 56).save(tmp_path / "0.png")
    row = dict(image="0.png", problem="Describe it.", answer="a dog", verifier="open_ended")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row) + "\n")
    flags = ("--model", folder, "--dataset", data, "--num_samples", 2, "--ks", "1", "--max_completion_length", 4,
             "--output_dir", tmp_path / "eval")
    for kind in ("qwen2", "qwen2", "qwen2_5_vl"):
        measure(*flags, "--reward_model", folders[kind])
    result, = json.loads((tmp_path / "eval/eval.json").read_text())
    assert set(result["verifiers"]) == {"open_ended"}
    assert len((tmp_path / "eval/samples.jsonl").read_text().splitlines()) == 2

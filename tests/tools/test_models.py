"""The tabletop's models: real checkpoints, made the same every time, kept in the user's cache."""

import json

import common
from tabletop import models, pictures
from tabletop.grids import COLOURS, EMPTY, OTHER, SHAPES, Spec
from tabletop.pictures import draw
from tabletop.problems import problem_of, spec_of
from tabletop.traces import traces

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

# --- tokenizer and prompt ---------------------------------------------------------------------------------------------


def test_a_word_of_the_traces_is_one_token(processor):
    for word in (*COLOURS, *SHAPES, EMPTY, OTHER):
        assert len(processor.tokenizer(f" {word}").input_ids) == 1


def test_any_text_survives_the_tokenizer(processor):
    tokenizer = processor.tokenizer
    for text in (traces(spec_of("train", 0))["marks"], common.INSTRUCTION, "Żółw 龜 🐢\n\t<|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_traces_are_short(processor):
    lengths = []
    for index in range(100):
        for text in traces(spec_of("train", index)).values():
            lengths.append(len(processor.tokenizer(text).input_ids))
    assert max(lengths) <= 45
    assert sum(lengths) / len(lengths) < 36


def test_the_tokenizer_is_the_same_every_time(processor):
    tokenizer = processor.tokenizer
    again = models.make_tokenizer()
    assert again.get_vocab() == tokenizer.get_vocab()
    assert 300 < len(tokenizer) < 512
    assert again("none of it").input_ids == tokenizer("none of it").input_ids


def test_prompt_has_qwens_shape(processor):
    text = common.chat(processor, dict(images=[None], problem="Why?"))
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Why?\n" + common.INSTRUCTION + "<|im_end|>\n"
        "<|im_start|>assistant\n")
    own_system = [dict(role="system", content="Be brief."), dict(role="user", content="Hi")]
    assert processor.tokenizer.apply_chat_template(own_system, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")


def test_one_cell_is_one_visual_token(processor):
    prompts = common.encode(processor, [problem_of("train", 0), problem_of("ood", 0)])
    assert [int(types.sum()) for types in prompts.types] == [9, 16]


def test_an_empty_cell_is_nothing_to_the_vision_tower(processor):
    """The background is 0 after the image processor's normalisation."""
    nothing = Spec(grid=((None,) * 3,) * 3, verifier="digit", target=("red", None), wording="", drawing=0)
    inside_a_cell = draw(nothing).crop((2, 2, 26, 26)).resize((84, 84))
    pixels = processor.image_processor(images=[inside_a_cell], return_tensors="pt")["pixel_values"]
    assert pixels.abs().max() < 1e-6


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_folder_is_a_checkpoint_as_the_hub_has_them(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert image_processor.patch_size == 14
    assert image_processor.merge_size == 2
    assert sum(weight.numel() for weight in model.parameters()) < 1_000_000
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")


def test_vocabularies_have_padding_rows_and_differ_as_the_real_ones_do(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.text_config.vocab_size > len(AutoTokenizer.from_pretrained(folder))
    assert models.RECIPES["toy"]["vocab_size"] != models.RECIPES["toy-teacher"]["vocab_size"]


def test_sampling_defaults_are_shipped_as_qwen_ships_them(folder):
    """So that a test can see that training does not use them."""
    shipped = AutoModelForImageTextToText.from_pretrained(folder).generation_config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert shipped.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert shipped.repetition_penalty == 1.05
    assert shipped.top_p == 0.8
    assert shipped.top_k == 20


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cleanvl"


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


@pytest.fixture
def small_steps(monkeypatch):
    """Two problems to a step, so that a model of two steps is built in a moment."""
    monkeypatch.setitem(models.RECIPES, "toy", models.RECIPES["toy"] | dict(problems_per_step=2))


def test_build_is_deterministic(tmp_path, monkeypatch, small_steps):
    """The same weights whatever the threads and the caller's generator; both are left as they were."""
    built = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(count)))
            torch.set_num_threads(count)
            torch.manual_seed(count)
            generator = torch.get_rng_state()
            built.append(models.build("toy", steps=2))
            assert torch.get_num_threads() == count
            assert torch.equal(generator, torch.get_rng_state())
    finally:
        torch.set_num_threads(threads)
    one = weights(built[0])
    other = weights(built[1])
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_build_is_cached_whole(cache, monkeypatch, small_steps):
    """A second call does no work; the folder holds all that others need to load it."""
    place = models.build("toy", steps=2)
    monkeypatch.setattr(models, "_train", None)  # a second call must not train
    assert models.build("toy", steps=2) == place
    folder, = cache.iterdir()
    assert str(folder) == place
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "preprocessor_config.json",
    }
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"].startswith("Qwen2VLImageProcessor")


def test_an_interrupted_build_leaves_nothing(cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "pretraining_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.build("toy", steps=2)
    assert list(cache.iterdir()) == []


def test_two_builds_at_once_do_not_clash(cache, monkeypatch):
    """The slower of two processes finds the folder in place, and leaves it as it is."""

    def slower(name, recipe, seed, folder):
        place = cache / f"toy-{models._key(recipe, seed)}"
        for path, text in ((place, "first"), (folder / "finished", "second")):
            path.mkdir(parents=True)
            (path / "config.json").write_text(text)
        return folder / "finished"

    monkeypatch.setattr(models, "_train", slower)
    place = models.build("toy")
    assert [str(path) for path in cache.iterdir()] == [place]
    assert (cache / place / "config.json").read_text() == "first"


def test_the_name_of_a_model_follows_its_recipe(monkeypatch):
    """And its seed, the words and the drawings: after an edit to any of them no stale model is found."""
    recipe = models.RECIPES["toy"]
    key = models._key(recipe, 1)
    assert key == models._key(dict(recipe), 1)
    assert key != models._key(recipe | dict(steps=1), 1)
    assert key != models._key(recipe, 2)
    with monkeypatch.context() as changed:
        changed.setattr(pictures, "PAPER", (0, 0, 0))
        assert key != models._key(recipe, 1)
    with monkeypatch.context() as changed:
        changed.setattr(models, "INSTRUCTION", "Answer.")
        assert key != models._key(recipe, 1)
    assert key == models._key(recipe, 1)


def test_unknown_name_is_a_users_error():
    with pytest.raises(common.UserError, match="toy-teacher"):
        models.build("toy-student")

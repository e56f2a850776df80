"""The tabletop's models: real checkpoints, made the same every time, kept in the user's cache."""

import dataclasses
import json
import re

import common
from harness.flags import INSTRUCTION
from tabletop import habits, models, pictures
from tabletop.grids import COLOURS, EMPTY, OTHER, SHAPES, Spec
from tabletop.habits import lessons
from tabletop.pictures import draw
from tabletop.problems import problem_of, spec_of
from tabletop.traces import FILLERS, traces
from tabletop.worlds import WORLDS

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

# The losses of the first two steps of the first tabletop's models, by the code that was there before the dials.
FIRST_LOSSES = {
    "toy-short": [6.314268589019775, 6.254275798797607],
    "toy-teacher-short": [6.5145487785339355, 6.4411540031433105],
}


# --- tokenizer and prompt ---------------------------------------------------------------------------------------------


def test_a_word_of_the_traces_is_one_token(processor):
    for word in (*COLOURS, *SHAPES, EMPTY, OTHER, *FILLERS):
        assert len(processor.tokenizer(f" {word}").input_ids) == 1


def test_one_tokenizer_holds_the_words_of_all_worlds(processor):
    """No trace of any world is spelt letter by letter: at most 1.7 tokens to a word, number or sign."""
    for name, world in WORLDS.items():
        for split in ("practice", "places"):
            for index in range(8):
                for text in lessons(spec_of(split, index), world, "test"):
                    pieces = re.findall(r"\w+|[^\w\s]", text)
                    tokens = processor.tokenizer(text).input_ids
                    assert len(tokens) <= 1.7 * len(pieces), (name, text)


def test_any_text_survives_the_tokenizer(processor):
    tokenizer = processor.tokenizer
    for text in (traces(spec_of("train", 0))["marks"], INSTRUCTION, "Żółw 龜 🐢\n\t<|im_end|>"):
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
    models.learned_words.cache_clear()
    again = models.make_tokenizer()
    assert again.get_vocab() == tokenizer.get_vocab()
    assert 300 < len(tokenizer) < 512
    assert again("none of it").input_ids == tokenizer("none of it").input_ids


def test_prompt_has_qwens_shape(processor):
    text = common.chat(processor, dict(images=[None], problem="Why?"))
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Why?\n" + INSTRUCTION + "<|im_end|>\n"
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
    assert models.STUDENT["vocab_size"] != models.TEACHER["vocab_size"]


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
    small = dataclasses.replace(models.RECIPES["toy-short"], problems_per_step=2)
    monkeypatch.setitem(models.RECIPES, "toy-short", small)


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
            built.append(models.build("toy-short", steps=2))
            assert torch.get_num_threads() == count
            assert torch.equal(generator, torch.get_rng_state())
    finally:
        torch.set_num_threads(threads)
    one = weights(built[0])
    other = weights(built[1])
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_build_is_cached_whole(cache, monkeypatch, small_steps):
    """A second call does no work; the folder holds all that others need to load it."""
    place = models.build("toy-short", steps=2)
    monkeypatch.setattr(models, "train", None)  # a second call must not train
    assert models.build("toy-short", steps=2) == place
    folder, = cache.iterdir()
    assert str(folder) == place
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "preprocessor_config.json",
    }
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"].startswith("Qwen2VLImageProcessor")


def test_a_derived_model_starts_from_the_common_base(cache):
    """With its tokenizer; and it differs from it after a step."""
    derived = dataclasses.replace(models.RECIPES["toy-see-fillers"], problems_per_step=2)
    base = weights(models.build("toy"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.RECIPES, "toy-see-fillers", derived)
        place = models.build("toy-see-fillers", steps=1)
    ours = weights(place)
    moved = sum((ours[name] - base[name]).norm() for name in base)
    whole = sum(base[name].norm() for name in base)
    assert 0 < moved < 0.2 * whole
    words, own_words = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (models.build("toy"), place))
    assert own_words == words


def test_an_interrupted_build_leaves_nothing(cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "lesson_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.build("toy-short", steps=2)
    assert list(cache.iterdir()) == []


def test_two_builds_at_once_do_not_clash(cache, monkeypatch):
    """The slower of two processes finds the folder in place, and leaves it as it is."""

    def slower(name, recipe, folder):
        place = cache / f"toy-short-{models.key_of(recipe)}"
        for path, text in ((place, "first"), (folder / "finished", "second")):
            path.mkdir(parents=True)
            (path / "config.json").write_text(text)
        return folder / "finished", []

    monkeypatch.setattr(models, "train", slower)
    place = models.build("toy-short")
    assert [str(path) for path in cache.iterdir()] == [place]
    assert (cache / place / "config.json").read_text() == "first"


def test_the_name_of_a_model_follows_its_recipe(monkeypatch):
    """And its seed, the words, the drawings, the shape and its start: no stale model is found after an edit to any."""
    recipe = models.RECIPES["toy-see"]
    key = models.key_of(recipe)
    assert key == models.key_of(dataclasses.replace(recipe))
    assert key != models.key_of(dataclasses.replace(recipe, steps=1))
    assert key != models.key_of(dataclasses.replace(recipe, seed=2))
    assert key != models.key_of(dataclasses.replace(recipe, world=WORLDS["toy-think"]))
    with monkeypatch.context() as changed:
        changed.setattr(pictures, "LINE", (0, 0, 0))
        assert key != models.key_of(recipe)
    with monkeypatch.context() as changed:
        changed.setattr(models, "INSTRUCTION", "Answer.")
        assert key != models.key_of(recipe)
    with monkeypatch.context() as changed:
        changed.setattr(habits, "MISREAD", 0.5)
        assert key != models.key_of(recipe)
    with monkeypatch.context() as changed:
        changed.setitem(models.RECIPES, "toy", dataclasses.replace(models.RECIPES["toy"], steps=1))
        assert key != models.key_of(recipe)
    assert key == models.key_of(recipe)


# --- the shipped weights ----------------------------------------------------------------------------------------------


def test_shipped_models_are_small_and_not_looked_for_in_the_cache(cache):
    files = [path for path in models.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    for name in models.SHIPPED:
        folder = models.build(name)
        assert folder == str(models.WEIGHTS / name)
        assert {weight.dtype for weight in weights(folder).values()} == {torch.float32}
    assert not cache.exists()


@pytest.mark.parametrize("name", models.SHIPPED)
def test_shipped_weights_and_their_recipe_belong_together(name):
    """The recipe is the one that they were made by, its first steps give the losses that were written down then, and so
    do the weights. If this fails after an edit: python -m tabletop"""
    recipe = models.RECIPES[name]
    record = json.loads((models.WEIGHTS / name / models.RECORD).read_text())
    assert models.key_of(recipe) == record["key"]
    assert models.first_losses(recipe, 2) == pytest.approx(record["first_losses"][:2], rel=1e-4)  # CPUs differ
    assert models.loss_of(models.WEIGHTS / name, recipe) == pytest.approx(record["loss_of_weights"], rel=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(models.WEIGHTS / name)
    assert tokenizer.get_vocab() == models.make_tokenizer().get_vocab()


@pytest.mark.slow
@pytest.mark.parametrize("name", models.SHIPPED)
def test_shipped_weights_are_made_anew(name, tmp_path):
    """Bitwise on a CPU whose first losses are bitwise those on record; on others the end must be as good."""
    models.ship(name, tmp_path / name)
    ours, record = (json.loads((place / name / models.RECORD).read_text()) for place in (tmp_path, models.WEIGHTS))
    assert ours["key"] == record["key"]
    assert ours["loss_of_weights"] == pytest.approx(record["loss_of_weights"], rel=0.1)
    if ours["first_losses"] == record["first_losses"]:
        made = weights(tmp_path / name)
        shipped = weights(models.WEIGHTS / name)
        assert all(torch.equal(made[key], shipped[key]) for key in shipped)


def test_the_first_tabletop_is_still_made_as_it_was():
    """The results of the first studies belong to these two. The losses are those of its own code, before the dials."""
    assert models.first_losses(models.RECIPES["toy-short"], 2) == pytest.approx(FIRST_LOSSES["toy-short"], rel=1e-4)
    teacher = models.RECIPES["toy-teacher-short"]
    assert models.first_losses(teacher, 2) == pytest.approx(FIRST_LOSSES["toy-teacher-short"], rel=1e-4)


def test_unknown_name_is_a_users_error():
    with pytest.raises(common.UserError, match="choose one of toy, .*toy-see-fillers, .*toy-teacher-hand"):
        models.build("toy-student")


def test_a_world_without_a_base_of_its_own_has_the_common_one():
    assert models.build("toy-clear") == models.build("toy-hand") == models.build("toy")

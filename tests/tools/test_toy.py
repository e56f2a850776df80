"""The tabletop: its pictures show what the problems say, its splits are apart, its models are real checkpoints."""

import json
from collections import Counter

import pytest
import torch
from PIL import ImageChops
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import common
from lab import toy

SPLITS = ("pretrain", "train", "test", "study", "ood")


def specs(split, count):
    return [toy.spec_of(split, index) for index in range(count)]


# --- problems


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_show_what_the_problem_says(split):
    """The pixel in the middle of a cell has the shape's colour, the empty cells are paper, nothing else is drawn."""
    for spec in specs(split, 40):
        image = toy.draw(spec)
        assert image.size == (28 * len(spec.grid[0]), 28 * len(spec.grid)) and image.mode == "RGB"
        for y, row in enumerate(spec.grid):
            for x, cell in enumerate(row):
                wanted = toy.PAPER if cell is None else toy.COLOURS[cell[0]]
                assert image.getpixel((28 * x + 14, 28 * y + 14)) == wanted
                if cell is None:
                    inside = image.crop((28 * x + 2, 28 * y + 2, 28 * x + 26, 28 * y + 26))
                    assert inside.getcolors() == [(24 * 24, toy.PAPER)]


def test_shapes_differ_more_than_their_sizes_do():
    """Whatever its size, a shape is nearer to itself in another size than to any other shape of that size."""
    def far(a, b):
        return sum(ImageChops.difference(a, b).convert("L").get_flattened_data())
    for shape in toy.SHAPES:
        others = [far(toy._tile(("red", shape), 19), toy._tile(("red", other), 19))
                  for other in toy.SHAPES if other != shape]
        assert min(others) > 2000
    assert len({toy._tile(("red", shape), size).tobytes() for shape in toy.SHAPES for size in (17, 19, 21)}) == 12


def by_hand(problem):
    """The answer, worked out from the grid without toy's own helpers."""
    spec = problem["spec"]
    shown = [(x, y, cell) for y, row in enumerate(spec.grid) for x, cell in enumerate(row) if cell]
    if spec.verifier == "mcq":
        part = ("colour", "shape").index(spec.target[0])
        (first, most), *rest = Counter(cell[part] for _, _, cell in shown).most_common()
        assert not rest or rest[0][1] < most
        options = dict(pair.split() for pair in problem["problem"].split(spec.wording[-1])[-1].strip().split(", "))
        return options[first]
    found = [(x, y) for x, y, (colour, shape) in shown
             if spec.target[0] in (None, colour) and spec.target[1] in (None, shape)]
    if spec.verifier == "digit":
        return str(len(found))
    if spec.verifier == "math":
        return f"{len(found)}/{len(shown)}"
    xs, ys = zip(*found)
    return f"[{28 * min(xs)}, {28 * min(ys)}, {28 * max(xs) + 28}, {28 * max(ys) + 28}]"


@pytest.mark.parametrize("split", SPLITS)
def test_gold_answers_are_right(split):
    for index in range(80):
        problem = toy.problem_of(split, index)
        assert common.grade(problem, rf"\boxed{{{by_hand(problem)}}}") == 1.0, problem["id"]


@pytest.mark.parametrize("split", SPLITS)
def test_traces_are_right_and_go_several_ways(split):
    for index in range(80):
        problem = toy.problem_of(split, index)
        worked = toy.traces(problem)
        assert worked == toy.traces(problem["spec"]) and problem["trace"] == worked[problem["style"]]
        assert len(set(worked.values())) == len(worked) == 3
        for name, text in worked.items():
            assert toy.style(text) == name
            assert common.grade(problem, text) == 1.0 and common.format_reward(problem, text) == 1.0


GRID = (  # red circle, nothing, blue star / green square, red circle, nothing / blue star, blue circle, nothing
    (("red", "circle"), None, ("blue", "star")),
    (("green", "square"), ("red", "circle"), None),
    (("blue", "star"), ("blue", "circle"), None),
)
WORKED = {
    ("digit", ("red", "circle")): (
        "Across red circle: red circle1 none blue star; green square red circle2 none; blue star blue circle none =2",
        "Down red circle: red circle1 green square blue star; none red circle2 blue circle; blue star none none =2",
        "Mark red circle: red circle1 none no; no red circle2 none; no no none =2", "2"),
    ("mcq", ("colour",)): (
        "Across colour: red1 none blue1; green1 red2 none; blue2 blue3 none, so blue C",
        "Down colour: red1 green1 blue1; none red2 blue2; blue3 none none, so blue C",
        "Mark blue: no none blue1; no no none; blue2 blue3 none, so blue C", "C"),
    ("math", (None, "circle")): (
        "Across circle: circle1 none star; square circle2 none; star circle3 none =3/6=1/2",
        "Down circle: circle1 square star; none circle2 circle3; star none none =3/6=1/2",
        "Mark circle: circle1 none no; no circle2 none; no circle3 none =3/6=1/2", r"\frac{1}{2}"),
    ("iou", (None, "star")): (
        "Across star: circle none star c1; square circle none; star a3 circle none",
        "Down star: circle square star a3; none circle circle; star c1 none none",
        "Mark star: no none c1; no no none; a3 no none", "[0, 0, 84, 84]"),
}


@pytest.mark.parametrize("asked", WORKED)
def test_traces_of_one_picture_in_full(asked):
    *thoughts, gold = WORKED[asked]
    spec = toy.Spec(GRID, *asked, "", 0)
    assert toy.traces(spec) == {name: f"<think>{thought}</think>\\boxed{{{gold}}}"
                                for name, thought in zip(("rows", "columns", "marks"), thoughts)}


def test_style_of_other_texts():
    assert toy.style("") == toy.style("Across <think>x</think>") == toy.style("<think></think>") == "other"
    assert toy.style("<think>Down red: none") == "columns"


def test_words_that_name_the_picture():
    assert all(map(toy.names_picture, (" red", "circle", " none", "3", " b", "no")))
    assert not any(map(toy.names_picture, (">Across", " so", "boxed", "</", "think", ";", "")))


def test_an_index_is_the_same_problem_whatever_the_count():
    short, long = toy.problems("train", 5), toy.problems("train")
    assert (len(short), len(long), len(toy.problems("test")), len(toy.problems("ood"))) == (5, 4096, 256, 256)
    for a, b in zip(short, long[:5]):
        assert a["images"][0].tobytes() == b["images"][0].tobytes() and a["id"] == b["id"]
        assert {**a, "images": 0} == {**b, "images": 0}
    assert long[-1]["id"] == "toy-train-4095"
    with pytest.raises(IndexError):
        short[5]
    assert {"id", "images", "problem", "answer", "verifier", "trace", "style"} <= set(short[0])


def test_splits_are_disjoint():
    """No picture of one split is in another, as far as anything is trained on them."""
    shares = [(share, size) for split in SPLITS for share in toy.SHARES[split] for size in set(toy.GRIDS[split])]
    assert len(shares) == len(set(shares))  # a picture's share follows from the picture; with its size it is one split's
    assert all(toy.share_of(spec.grid) in toy.SHARES[split] for split in SPLITS for spec in specs(split, 100))
    grids = {split: {spec.grid for spec in specs(split, count)}
             for split, count in (("pretrain", 4000), ("train", 4096), ("test", 256), ("study", 256), ("ood", 256))}
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not grids[one] & grids[other]
    assert len(grids["test"]) == 256  # and none comes twice


def test_out_of_domain_is_new():
    """4x4 pictures, and in turn pairs that stand in no other split, or wordings that no other split uses."""
    trained = [spec for split in ("pretrain", "train", "test") for spec in specs(split, 1000)]
    shown = {cell for spec in trained for row in spec.grid for cell in row}
    sizes = {(len(spec.grid), len(spec.grid[0])) for spec in trained}
    assert not shown & set(toy.UNSEEN_PAIRS) and (4, 4) not in sizes
    new_pairs = new_words = 0
    for spec in specs("ood", 256):
        pair = any(cell in toy.UNSEEN_PAIRS for row in spec.grid for cell in row)
        words = spec.wording not in {other.wording for other in trained}
        new_pairs, new_words = new_pairs + pair, new_words + words
        assert (len(spec.grid), len(spec.grid[0])) == (4, 4) and pair != words
    assert new_pairs == new_words == 128


def test_test_split_is_in_domain():
    """Sizes, wordings, pairs and answers of `test` are those of `train`, verifier by verifier in equal numbers."""
    train, test = specs("train", 4096), specs("test", 256)
    for what in (lambda s: s.wording, lambda s: len(s.grid), lambda s: s.target):
        assert set(map(what, test)) <= set(map(what, train))
    assert {toy.answer(s) for s in test} <= {toy.answer(s) for s in train}
    assert Counter(spec.verifier for spec in test) == dict.fromkeys(toy.VERIFIERS, 64)


def test_guessing_does_not_pay():
    """The commonest answer of each verifier is right for at most three in ten."""
    for verifier in toy.VERIFIERS:
        answers = Counter(toy.answer(spec) for spec in specs("train", 2000) if spec.verifier == verifier)
        assert answers.most_common(1)[0][1] <= 0.3 * answers.total(), answers


# --- models


def test_tokenizer(processor):
    """A word of the traces is one token, any text survives, and training it twice gives the same one."""
    tokenizer = processor.tokenizer
    for word in [*toy.COLOURS, *toy.SHAPES, toy.EMPTY, toy.OTHER]:
        assert len(tokenizer(f" {word}").input_ids) == 1
    for text in (toy.traces(toy.spec_of("train", 0))["marks"], common.INSTRUCTION, "Żółw 龜 🐢\n\t<|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    again = toy.make_tokenizer()
    assert again.get_vocab() == tokenizer.get_vocab() and 300 < len(tokenizer) < 512
    assert again("none of it").input_ids == tokenizer("none of it").input_ids
    lengths = [len(tokenizer(text).input_ids) for spec in specs("train", 100) for text in toy.traces(spec).values()]
    assert max(lengths) <= 45 and sum(lengths) / len(lengths) < 36


def test_prompt_has_qwens_shape(processor):
    text = common.chat(processor, dict(images=[None], problem="Why?"))
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Why?\n" + common.INSTRUCTION + "<|im_end|>\n"
        "<|im_start|>assistant\n")
    own = [dict(role="system", content="Be brief."), dict(role="user", content="Hi")]
    assert processor.tokenizer.apply_chat_template(own, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")


def test_one_cell_is_one_visual_token(processor):
    prompts = common.encode(processor, [toy.problem_of("train", 0), toy.problem_of("ood", 0)])
    assert [int(types.sum()) for types in prompts.types] == [9, 16]
    empty = toy.draw(toy.Spec(((None,) * 3,) * 3, "digit", ("red", None), "", 0)).crop((2, 2, 26, 26))
    pixels = processor.image_processor(images=[empty.resize((84, 84))], return_tensors="pt")["pixel_values"]
    assert pixels.abs().max() < 1e-6  # paper is 0


def test_folder_is_a_checkpoint_as_the_hub_has_them(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer, pictures = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration" and type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert pictures.patch_size == 14 and pictures.merge_size == 2
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert model.config.text_config.vocab_size > len(tokenizer)  # padding rows, as the real ones have
    assert toy.RECIPES["toy"]["vocab_size"] != toy.RECIPES["toy-teacher"]["vocab_size"]
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    shipped = model.generation_config
    assert shipped.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert (shipped.repetition_penalty, shipped.top_p, shipped.top_k) == (1.05, 0.8, 20)


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_build_is_deterministic_and_cached(tmp_path, monkeypatch):
    """The same weights whatever the threads and the caller's generator, both left as they were; then no work at all."""
    monkeypatch.setitem(toy.RECIPES, "toy", toy.RECIPES["toy"] | dict(problems_per_step=2))
    found, threads = [], torch.get_num_threads()
    for place, count in (("a", 1), ("b", 2)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
        torch.set_num_threads(count)
        torch.manual_seed(count)
        before = torch.get_rng_state()
        found.append(toy.build("toy", steps=2))
        assert torch.get_num_threads() == count and torch.equal(before, torch.get_rng_state())
    torch.set_num_threads(threads)
    one, two = map(weights, found)
    assert all(torch.equal(one[name], two[name]) for name in one)
    monkeypatch.setattr(toy, "_train", None)  # a second call must not train
    assert toy.build("toy", steps=2) == found[1]
    names = {path.name for path in (tmp_path / "a" / "cleanvl").glob("*/*")}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "preprocessor_config.json"} <= names
    settings = json.loads(next((tmp_path / "a").rglob("preprocessor_config.json")).read_text())
    assert settings["image_processor_type"].startswith("Qwen2VLImageProcessor")


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(toy, "pretraining_loss", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        toy.build("toy", steps=2)
    assert list((tmp_path / "cleanvl").iterdir()) == []


def test_two_builds_at_once_do_not_clash(tmp_path, monkeypatch):
    """The slower of two processes finds the folder in place, and leaves it as it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def slower(name, recipe, seed, folder):
        place = tmp_path / "cleanvl" / f"toy-{toy._key(recipe, seed)}"
        for path, text in ((place, "first"), (folder / "finished", "second")):
            path.mkdir(parents=True)
            (path / "config.json").write_text(text)
        return folder / "finished"

    monkeypatch.setattr(toy, "_train", slower)
    built = tmp_path / "cleanvl" / toy.build("toy").split("/")[-1]
    assert (built / "config.json").read_text() == "first" and list((tmp_path / "cleanvl").iterdir()) == [built]


def test_the_name_of_a_model_follows_its_recipe(monkeypatch):
    recipe = toy.RECIPES["toy"]
    key = toy._key(recipe, 1)
    assert key == toy._key(dict(recipe), 1)
    assert key != toy._key(recipe | dict(steps=1), 1) and key != toy._key(recipe, 2)
    monkeypatch.setattr(toy, "PAPER", (0, 0, 0))
    assert key != toy._key(recipe, 1)


def test_unknown_name_is_a_users_error():
    with pytest.raises(common.UserError, match="toy-teacher"):
        toy.build("toy-student")


def test_picture(tmp_path):
    toy.picture(tmp_path / "runs" / "toy.png")
    assert (tmp_path / "runs" / "toy.png").stat().st_size > 20_000


@pytest.mark.slow
def test_base_can_but_not_reliably():
    row = toy.measure("toy")
    assert row["weights"] < 1_000_000
    assert 0.30 <= row["pass@1"] <= 0.50 and row["pass@16"] > 0.90
    assert all(row[f"pass@16 {verifier}"] >= 0.80 for verifier in toy.VERIFIERS)


@pytest.mark.slow
def test_teacher_can_and_in_several_ways():
    row = toy.measure("toy-teacher")
    assert row["pass@1"] > 0.90 and sum(row[f"of {name}"] > 0.15 for name in toy.STYLES) >= 2

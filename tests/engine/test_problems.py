"""common.load_problems: every published schema as a small file, and every way in which a data set can be broken."""

import argparse
import json

import tabletop.problems
from common import UserError, grade, load_problems
from harness.flags import of_the_world
from harness.problems import WithTraces, load_rows

import datasets
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    """datasets keeps what it has read; the tests leave nothing in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(width=8, height=6, colour="red", mode="RGB"):
    return Image.new(mode, (width, height), colour)


def write_jsonl(folder, rows, name="data.jsonl"):
    """Writes rows beside three pictures, 0.png to 2.png, of 8x6, 9x6 and 10x6 pixels. Returns the path as text."""
    for number in range(3):
        picture(8 + number).save(folder / f"{number}.png")
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def write_parquet(path, columns, **features):
    data = datasets.Dataset.from_dict(columns)
    for column, feature in features.items():
        data = data.cast_column(column, feature)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.to_parquet(path)
    return str(path)


def geometry3k(path, rows=3):
    columns = {
        "images": [[picture(8 + n)] for n in range(rows)],
        "problem": ["<image>Find x."] * rows,
        "answer": ["2 \\sqrt { 221 }", "54", "\\frac { 1 } { 2 }"][:rows],
    }
    return write_parquet(path, columns, images=datasets.List(datasets.Image()))


def row(**changes):
    return {"image": "0.png", "question": "How many?", "answer": "3", **changes}


def fault(spec):
    """The one line that says why a data set cannot be loaded."""
    with pytest.raises(UserError) as error:
        load_problems(spec)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 900
    return message


def column(name, problems):
    return [problem[name] for problem in problems]


# --- geometry3k, and how a data set is named --------------------------------------------------------------------------


def test_geometry3k(tmp_path):
    spec = geometry3k(tmp_path / "train-00000-of-00001.parquet")
    problems = load_problems(spec)
    assert len(problems) == 3
    first = problems[0]
    assert first["problem"] == "<image>Find x."
    assert first["answer"] == "2 \\sqrt { 221 }"
    assert first["images"][0].size == (8, 6)
    assert first["images"][0].mode == "RGB"
    assert "trace" not in first
    assert problems[-1]["images"][0].size == (10, 6)
    assert column("verifier", problems) == ["math"] * 3
    assert len(set(column("id", problems))) == 3


def test_a_split_and_a_count(tmp_path):
    spec = geometry3k(tmp_path / "train-00000-of-00001.parquet")
    assert column("answer", load_problems(f"{spec}@train:2")) == ["2 \\sqrt { 221 }", "54"]
    assert len(load_problems(f"{spec}:2")) == 2


def test_none_is_no_problem():
    assert load_problems("none") == []


def test_slices(tmp_path):
    problems = load_problems(geometry3k(tmp_path / "data.parquet"))
    part = problems[1:]
    assert len(part) == 2
    assert part[0]["id"] == problems[1]["id"]
    assert part[0]["images"][0].size == (9, 6)
    assert column("answer", problems[::-1]) == column("answer", reversed(problems))
    with pytest.raises(IndexError):
        problems[3]


def test_pictures_are_opened_when_asked_for(tmp_path):
    problems = load_problems(write_jsonl(tmp_path, [row(), row(image="1.png")]))
    (tmp_path / "1.png").unlink()
    assert problems[0]["images"][0].size == (8, 6)
    assert len(problems[:2]) == 2
    with pytest.raises(ValueError, match="cannot be opened"):
        problems[1]


def test_hub_layout(tmp_path):
    """A folder of shards: those of a split are one data set."""
    geometry3k(tmp_path / "data" / "train-00000-of-00002.parquet", 3)
    geometry3k(tmp_path / "data" / "train-00001-of-00002.parquet", 2)
    geometry3k(tmp_path / "data" / "test-00000-of-00001.parquet", 1)
    assert len(load_problems(f"{tmp_path}@train")) == 5
    assert len(load_problems(f"{tmp_path}@test")) == 1
    assert len(load_problems(str(tmp_path))) == 5
    message = fault(f"{tmp_path}@validation")
    assert "train" in message
    assert "test" in message


def test_hub_name(tmp_path, monkeypatch):
    """A name that is no file is the hub's; a split that is not there and a network that is not there are one line."""
    local = datasets.load_dataset("parquet", data_files=geometry3k(tmp_path / "data.parquet"), split="train")

    def load(name, split):
        if name != "hiyouga/geometry3k":
            raise ConnectionError(f"Couldn't reach {name}\non the Hub")
        if split != "train":
            raise ValueError(f'Unknown split "{split}"')
        return local

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_problems("hiyouga/geometry3k@train")) == 3
    assert load_problems("hiyouga/geometry3k@train:1")[0]["images"][0].size == (8, 6)
    assert "Unknown split" in fault("hiyouga/geometry3k@dev")
    assert "without a network give a local file" in fault("someone/something@train")
    assert "a split is missing" in fault("hiyouga/geometry3k")


def test_the_tabletop_by_its_name(monkeypatch):
    monkeypatch.setattr(tabletop.problems, "SIZES", {"pretrain": None, "train": 9, "test": 5})
    assert column("id", load_problems("toy@train:3")) == ["toy-train-0", "toy-train-1", "toy-train-2"]
    assert len(load_problems("toy@test")) == 5
    for spec in ("toy@nowhere", "toy"):
        assert "it has train, test; write for example toy@train" in fault(spec)


# --- other published schemas ------------------------------------------------------------------------------------------


def test_mathvista(tmp_path):
    columns = {
        "pid": ["1", "2", "3", "4"],
        "question": ["Which?"] * 4,
        "query": ["Which?\nChoices:\n(A) left\n(B) right", "Count.", "How long?", "List."],
        "image": [f"images/{n}.jpg" for n in range(4)],
        "decoded_image": [picture(mode="L", colour=1)] * 4,
        "choices": [["left", "right"], None, None, None],
        "answer": ["right", "7", "1.2", "[0, 2, 5, 7]"],
        "question_type": ["multi_choice"] + ["free_form"] * 3,
        "unit": [None] * 4,
        "precision": [None, 1.0, 1.0, None],
        "answer_type": ["text", "integer", "float", "list"],
    }
    spec = write_parquet(tmp_path / "testmini-00000-of-00001.parquet", columns, decoded_image=datasets.Image())
    problems = load_problems(spec + "@testmini")
    assert column("answer", problems) == ["B", "7", "1.2", "[0, 2, 5, 7]"]
    assert column("verifier", problems) == ["mcq", "digit", "math", "math"]
    assert column("id", problems) == ["1", "2", "3", "4"]
    assert problems[0]["problem"].startswith("Which?\nChoices")
    assert problems[0]["images"][0].mode == "RGB"


def test_choices_join_the_question(tmp_path):
    choices = ["red", "blue"]
    spec = write_jsonl(tmp_path, [row(choices=choices, answer="blue"), row(choices=choices, answer="A")])
    problems = load_problems(spec)
    assert column("answer", problems) == ["B", "A"]
    assert problems[0]["problem"] == "How many?\nChoices:\n(A) red\n(B) blue"
    assert problems[0]["verifier"] == "mcq"
    message = fault(write_jsonl(tmp_path, [row(choices=choices, answer="green")]))
    assert "none of the choices" in message
    assert "green" in message


def test_virl39k(tmp_path):
    """Boxed answers, and paths of pictures that are unpacked beside the parquet."""
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "a.png")
    write_parquet(tmp_path / "39Krelease.parquet", {
        "question": ["<image>What is x?\nA. 1\nB. 2", "<image>What?"],
        "answer": ["\\boxed{B}", "\\boxed{\\frac{1}{2}}"],
        "PassRate_32BTrained": [0.5, 0.5],
        "category": ["c"] * 2,
        "source": ["s"] * 2,
        "qid": ["q1", "q2"],
        "image": [["images/a.png"]] * 2,
    })
    problems = load_problems(f"{tmp_path}@train")
    assert column("id", problems) == ["q1", "q2"]
    assert column("answer", problems) == ["B", "\\frac{1}{2}"]
    assert column("verifier", problems) == ["mcq", "math"]
    assert load_problems(f"{tmp_path}/39Krelease.parquet")[0]["images"][0].size == (8, 6)
    (tmp_path / "images" / "a.png").unlink()
    message = fault(f"{tmp_path}@train")
    assert "images/a.png" in message
    assert "restore it under" in message


def test_paths_without_pictures(tmp_path, monkeypatch):
    """A data set on the hub that holds only the paths of its pictures: what to do is said."""
    hub = datasets.Dataset.from_dict({"question": ["q"], "answer": ["\\boxed{1}"], "image": [["images/a.png"]]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hub)
    assert "it has 1 rows" in fault("TIGER-Lab/ViRL39K@train:2")
    message = fault("TIGER-Lab/ViRL39K@train")
    assert "only this path" in message
    assert "name the folder" in message


def test_mmk12(tmp_path):
    columns = {
        "id": ["abb5ab16-df73-44d9-8869-405babf18eeb", "m2"],
        "question": ["As shown in the figure, $$AB$$ is a diameter. Find the angle.", "Area?\nA. $$1$$\nB.2.3."],
        "answer": ["$$35^{\\circ}$$", "B"],
        "subject": ["math", "physics"],
        "image": [picture(mode="RGBA"), picture()],
    }
    spec = write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", columns, image=datasets.Image())
    problems = load_problems(spec)
    assert column("verifier", problems) == ["math", "mcq"]
    assert grade(problems[0], "\\boxed{35}") == 1
    assert load_problems(f"{tmp_path}@test")[1]["id"] == "m2"


def write_vlaa(folder, rows, name="VLAA-Thinking-GRPO-25K.json"):
    """The layout of VLAA-Thinking: one json, and beside it images/ with a folder for each source."""
    for source in ("clevr_math", "synthesis"):
        (folder / "images" / source).mkdir(parents=True, exist_ok=True)
        picture(40, 30).save(folder / "images" / source / "0.png")
    (folder / name).write_text(json.dumps(rows))
    return str(folder / name)


def vlaa_row(verifier, gold, **changes):
    meta = {"caption_model_id": "m", "rationale": "r"} if verifier == "digit" else {"ppl-caption": 13.6, "url": "u"}
    return {
        "id": f"{verifier}-{gold}"[:30], "image": "/clevr_math/0.png", "question": "Q", "gt": gold, "caption": "c",
        "ds_answer": f"<think>so</think>\n<answer>{gold}</answer>", "verifier_type": verifier, "meta": meta, **changes,
    }


SOLUTION = "Step 1: We have 5 = a * -1.\nStep 2: So a = -5.\n\n†Answer: y = -5 * sin(-5 * x)."


def test_vlaa_thinking(tmp_path):
    """Paths that begin with a slash, gold answers after †Answer, traces that end in tags, a count as a number."""
    rows = [
        vlaa_row("digit", "3"),
        vlaa_row("mcq", "A)", image="clevr_math/0.png", question="Which?\nA) red\nB) blue"),
        vlaa_row("math", SOLUTION, image="/images/synthesis/0.png"),
        vlaa_row("iou", "[0.1, 0.2, 0.7, 0.5]"),
        vlaa_row("open_ended", "The image shows a beach."),
    ]
    problems = load_problems(write_vlaa(tmp_path, rows))
    assert column("verifier", problems) == ["digit", "mcq", "math", "iou", "open_ended"]
    assert column("answer", problems)[:4] == ["3", "A)", "y = -5 * sin(-5 * x).", "[0.1, 0.2, 0.7, 0.5]"]
    assert {image.size for problem in problems for image in problem["images"]} == {(40, 30)}
    assert problems[0]["trace"] == "<think>so</think>\n<answer>3</answer>"
    for problem in problems[:4]:
        assert grade(problem, problem["trace"].replace(SOLUTION, "$y = -5\\sin(-5x)$")) == 1, problem["id"]
    message = fault(write_vlaa(tmp_path, [vlaa_row("digit", "3", image="/clevr_math/none.png")]))
    assert f"restore it under {tmp_path}" in message


def test_vlaa_counts_may_be_numbers(tmp_path):
    """Beside texts in the same column."""
    problems = load_problems(write_vlaa(tmp_path, [vlaa_row("digit", 3), vlaa_row("math", "x"), vlaa_row("digit", 12)]))
    assert column("answer", problems) == ["3", "x", "12"]


def test_mathverse(tmp_path):
    """The question of a Vision Only row stands in its picture; a choice is one though the text lists no options."""
    spec = write_parquet(tmp_path / "testmini.parquet", {
        "sample_index": ["1", "2", "3"],
        "problem_index": ["1", "1", "2"],
        "problem_version": ["Text Dominant", "Vision Only", "Vision Only"],
        "question": ["Find angle A.\nChoices:\nA:36°\nB:54°", "", ""],
        "question_for_eval": ["Find angle A.\nChoices:\nA:36°\nB:54°"] * 2 + ["How long is BC?"],
        "image": [picture()] * 3,
        "answer": ["B", "B", "5.4cm"],
        "question_type": ["multi-choice", "multi-choice", "free-form"],
        "metadata": [{"split": "testmini", "source": "GeoQA"}] * 3,
        "query_wo": ["Please directly answer."] * 3,
        "query_cot": ["Please first reason."] * 3,
    }, image=datasets.Image())
    problems = load_problems(f"{spec}@testmini")
    assert column("verifier", problems) == ["mcq", "mcq", "math"]
    assert problems[0]["problem"].startswith("Find angle A.")
    assert problems[1]["problem"] == "Answer the question that the picture asks."
    assert column("answer", problems) == ["B", "B", "5.4cm"]


def test_a_data_set_of_several_parts_gives_that_of_the_splits_name(tmp_path):
    """As AI4Math/MathVerse on the hub: each split is a part (config) of its own."""
    card = ["---", "configs:"]
    for name in ("testmini", "testmini_text_only"):
        write_parquet(tmp_path / f"{name}.parquet", {"question": [name], "answer": ["B"]})
        card += [f"- config_name: {name}", "  data_files:", f"  - split: {name}", f"    path: {name}.parquet"]
    (tmp_path / "README.md").write_text("\n".join([*card, "---"]))
    assert load_rows(str(tmp_path), "testmini", None)["question"] == ["testmini"]
    assert load_rows(str(tmp_path), "testmini_text_only", None)["question"] == ["testmini_text_only"]
    with pytest.raises(UserError, match=r"Available: \['testmini', 'testmini_text_only'\]"):
        load_rows(str(tmp_path), "test", None)


def test_mathvision(tmp_path):
    """Options in a column of their own reach the prompt. <image1> is the picture's place; where there are several, they
    are labels in the one picture."""
    spec = write_parquet(tmp_path / "data/test-00000-of-00001-3532b8d3f1b4047a.parquet", {
        "id": ["1", "2", "3", "31", "923", "2673"],
        "question": [
            "Which figure? <image1>", "How many cups are there? <image1>", "How long?\n<image1>",
            "How many ducks weigh the same?\n<image1>\n<image2>", "A clock shows <image1>. Which is not <image1>?",
            "Which net is a cube?",
        ],
        "options": [
            ["A", "B", "C", "D", "E"], [], ["3", "\\sqrt{2}"], ["A", "B"], ["1", "2"], ["<image1>", "<image2>"],
        ],
        "image": [f"images/{n}.jpg" for n in (1, 2, 3, 31, 923, 2673)],
        "decoded_image": [picture()] * 6,
        "answer": ["C", "7", "B", "B", "A", "A"],
        "solution": [None, "We count.", None, None, None, None],
        "level": [1, 2, 3, 1, 5, 5],
        "subject": ["logic", "counting", "algebra", "arithmetic", "arithmetic", "solid geometry"],
    }, decoded_image=datasets.Image())
    problems = load_problems(f"{tmp_path}@test")
    assert len(load_problems(spec)) == 6
    assert column("problem", problems) == [
        "Which figure? <image>\nChoices: (A), (B), (C), (D), (E)",
        "How many cups are there? <image>",
        "How long?\n<image>\nChoices:\n(A) 3\n(B) \\sqrt{2}",
        "How many ducks weigh the same?\n[image 1]\n[image 2]\nChoices: (A), (B)",
        "A clock shows [image 1]. Which is not [image 1]?\nChoices:\n(A) 1\n(B) 2",
        "Which net is a cube?\nChoices:\n(A) [image 1]\n(B) [image 2]",
    ]
    assert column("verifier", problems) == ["mcq", "digit", "mcq", "mcq", "mcq", "mcq"]
    assert column("answer", problems) == ["C", "7", "B", "B", "A", "A"]


def test_wemath(tmp_path):
    """Options as one text; pictures in a column called image_path. One ID stands in several rows."""
    spec = write_parquet(tmp_path / "testmini-00000-of-00001.parquet", {
        "ID": ["3steps_165", "3steps_165"],
        "split": ["testmini"] * 2,
        "knowledge concept": ["Area of Circles"] * 2,
        "question": ["What is the area of the flower bed (  ) m²?", "What is its radius?"],
        "option": ["A. 200.96;B. 3215.36;C. 6280;D. 32; E. No correct answer", "A. 1 cm; B. 2 cm"],
        "answer": ["B", "A"],
        "image_path": [picture()] * 2,
        "key": ["3steps_3", "3steps_1"],
        "question number": [1575, 1573],
        "knowledge concept description": ["Area of ..."] * 2,
    }, image_path=datasets.Image())
    first, second = load_problems(f"{spec}@testmini")
    assert first["problem"].endswith("\nChoices:\n(A) 200.96\n(B) 3215.36\n(C) 6280\n(D) 32\n(E) No correct answer")
    assert first["answer"] == "B"
    assert first["verifier"] == "mcq"
    assert second["problem"] == "What is its radius?\nChoices:\n(A) 1 cm\n(B) 2 cm"


def test_logicvista(tmp_path):
    """Options may stand in the picture alone, unnamed by the question; some golds are several letters."""
    spec = write_parquet(tmp_path / "data/test-00000-of-00001.parquet", {
        "question": [
            "Which box comes next in the sequence? Select from A-E.", "Which fit? Select from A, B, C and D.",
            "Which figure is a rotation of the object?",
        ],
        "answer": ["C", "A, C", "B"],
        "reasoning": ["It rotates."] * 3,
        "skill": [["inductive"]] * 3,
        "broad_capability": [["diagram"]] * 3,
        "specific_capability": [["sequence pattern"]] * 3,
        "imagesource": ["s"] * 3,
        "sourcelink": ["https://s"] * 3,
        "liscenced": ["false"] * 3,
        "id": ["v1_0", "v1_1", "v1_381"],
        "image": [picture()] * 3,
    }, image=datasets.Image())
    problems = load_problems(spec)
    assert column("verifier", problems) == ["mcq", "math", "mcq"]
    assert grade(problems[1], "\\boxed{A,C}") == 1
    assert grade(problems[1], "\\boxed{A}") == 0
    assert grade(problems[2], "\\boxed{(B)}") == 1


def test_dynamath(tmp_path):
    """Ten variants, gold answers in a column called ground_truth. On the hub sample1-* is split sample_variant1."""
    for variant in (1, 2):
        write_parquet(tmp_path / f"data/sample{variant}-00000-of-00003.parquet", {
            "id": ["1", "2"],
            "question": ["What is the period of this function?", "Is it even? Choices: (A) Yes (B) No"],
            "image": ["images/1.png", "images/2.png"],
            "decoded_image": [picture()] * 2,
            "ground_truth": [f"{variant}.0944", "B"],
            "answer_type": ["float", "multiple choice"],
            "subject": ["analytic geometry"] * 2,
            "knowledge_level": ["undergraduate"] * 2,
        }, decoded_image=datasets.Image())
    problems = load_problems(f"{tmp_path}@sample2")
    assert column("answer", problems) == ["2.0944", "B"]
    assert column("verifier", problems) == ["math", "mcq"]


def hallusionbench(path, split, images):
    return write_parquet(path / f"data/{split}-00000-of-00001.parquet", {
        "category": ["VD"] * 2,
        "subcategory": ["illusion"] * 2,
        "visual_input": ["1"] * 2,
        "set_id": ["0"] * 2,
        "figure_id": ["1"] * 2,
        "sample_note": ["circle"] * 2,
        "question_id": ["0", "1"],
        "question": ["Are the circles of the same size?", "Is the left one larger?"],
        "gt_answer_details": ["They are.", "It is not."],
        "gt_answer": ["1", "0"],
        "filename": ["./hallusion_bench/VD/illusion/0_1.png"] * 2,
        "image": images,
    }, image=datasets.Image())


def test_hallusionbench(tmp_path):
    """1 and 0 are Yes and No; its split is called image, and the other one has no pictures."""
    hallusionbench(tmp_path, "image", [picture()] * 2)
    hallusionbench(tmp_path, "non_image", [None] * 2)
    problems = load_problems(f"{tmp_path}@image")
    assert column("answer", problems) == ["Yes", "No"]
    assert grade(problems[0], "<answer>yes</answer>") == 1
    assert grade(problems[1], "<answer>yes</answer>") == 0
    assert "there is no picture" in fault(f"{tmp_path}@non_image")


def test_mmstar(tmp_path):
    """Options inside the question, behind colons; the split is called val."""
    spec = write_parquet(tmp_path / "mmstar.parquet", {
        "index": [0],
        "question": ["Which option fits?\nOptions: A: A toy train, B: A boat, C: A car, D: A plane"],
        "image": [picture()],
        "answer": ["A"],
        "category": ["coarse perception"],
        "l2_category": ["image scene and topic"],
        "meta_info": [{"source": "MMBench", "split": "val", "image_path": "images/0.jpg"}],
    }, image=datasets.Image())
    problem = load_problems(spec)[0]
    assert problem["verifier"] == "mcq"
    assert problem["problem"].count("A toy train") == 1


# --- options and places of pictures -----------------------------------------------------------------------------------

OPTION_COLUMNS = [
    {"choices": ["red", "blue"]}, {"options": ["red", "blue"]}, {"option": "A. red; B. blue"},
    {"Options": "(A) red\n(B) blue"}, {"options": "A: red, B: blue"}, {"options": {"A": "red", "B": "blue", "C": None}},
    {"A": "red", "B": "blue", "C": ""}, {"choice_a": "red", "choice_b": "blue"}, {"a": "red", "b": "blue"},
    {"Option A": "red", "Option B": "blue"}, {"opt_a": "red", "opt_b": "blue"},
]


@pytest.mark.parametrize("columns", OPTION_COLUMNS)
def test_options_reach_the_prompt_however_they_are_written(tmp_path, columns):
    problem = load_problems(write_jsonl(tmp_path, [row(answer="B", **columns)]))[0]
    assert problem["problem"] == "How many?\nChoices:\n(A) red\n(B) blue"
    assert (problem["answer"], problem["verifier"]) == ("B", "mcq")


def test_a_letter_inside_an_option_opens_no_other(tmp_path):
    options = "A. at C: right; B. at D, A. left; C. up"
    problem = load_problems(write_jsonl(tmp_path, [row(answer="B", option=options)]))[0]
    assert problem["problem"].endswith("\n(A) at C: right\n(B) at D, A. left\n(C) up")


@pytest.mark.parametrize("question", [
    "Which? (A) red (B) blue", "Which?\nA. red\nB. blue", "Which?\nA: red\nB: blue",
])
def test_options_that_the_question_lists_are_not_listed_twice(tmp_path, question):
    problem = load_problems(write_jsonl(tmp_path, [row(question=question, answer="B", choices=["red", "blue"])]))[0]
    assert problem["problem"] == question


def test_a_letter_in_the_question_is_no_list_of_options(tmp_path):
    """The angle at (B) is not option B."""
    question = "How wide is the angle at (B), seen from (A)?"
    problem = load_problems(write_jsonl(tmp_path, [row(question=question, answer="B", choices=["30", "60"])]))[0]
    assert problem["problem"].endswith("\nChoices:\n(A) 30\n(B) 60")


@pytest.mark.parametrize("columns, name, why", [
    ({"options": "red, blue"}, "options", "cannot be told apart"),
    ({"options": "['red', 'blue']"}, "options", "cannot be told apart"),
    ({"options": {"A": "red", "C": "blue"}}, "options", "called A, C"),
    ({"A": None, "B": "red", "C": "blue"}, "A to H", "called B, C"),
    ({"alternatives": ["red", "blue"]}, "alternatives", "would lack"),
    ({"choices_text": "red|blue"}, "choices_text", "would lack"),
    ({"mc1_targets": {"choices": ["red", "blue"]}}, "mc1_targets", "would lack"),
    ({"A": "red", "B": "blue", "D": "green"}, "A to H", "called A, B, D"),
    ({"candidates": ["red", "blue"]}, "candidates", "the prompt would lack"),
    ({"option_1": "red", "option_2": "blue"}, "option_1", "the prompt would lack"),
    ({"all_choices": ["red", "blue"]}, "all_choices", "the prompt would lack"),
    ({"choices_text": "A. red; B. blue"}, "choices_text", "the prompt would lack"),
    ({"choices": ["red", None]}, "choices", "is empty"),
    ({"choices": ["red", " "]}, "choices", "is empty"),
    ({"choices": ["red", "blue"], "answer": "C"}, "answer", "none of the choices"),
])
def test_options_that_would_be_lost_are_an_error(tmp_path, columns, name, why):
    message = fault(write_jsonl(tmp_path, [row(**{"answer": "B", **columns})]))
    assert f"column {name}," in message
    assert why in message


def test_a_column_about_choices_holds_none(tmp_path):
    about = {"correct_choice_idx": 1, "is_multiple_choice": True, "question_type": "multi_choice"}
    assert load_problems(write_jsonl(tmp_path, [row(answer="B", **about)]))[0]["problem"] == "How many?"


def test_numbered_places_are_pictures(tmp_path):
    images = {"images": ["0.png", "1.png"], "image": None}
    spec = write_jsonl(tmp_path, [row(question="Compare <image1> with <image 2>.", **images)])
    assert load_problems(spec)[0]["problem"] == "Compare <image> with <image>."


@pytest.mark.parametrize("question, why", [
    ("Compare <image1> and <image2>.", "2 times for 1"),
    ("Compare <image2> and <image1>.", "numbered [2, 1]"),
    ("Look at <image1>. What is in <image1>?", "numbered [1, 1]"),
    ("What is in <Image>?", "<Image> would reach the model"),
    ("What is in <Image1>?", "<Image1> would reach the model"),
    ("What is in <image_placeholder>?", "<image_placeholder> would reach the model"),
    ("What is in <ImageHere>?", "<ImageHere> would reach the model"),
    ("What is in [image]?", "[image] would reach the model"),
    ("What is in [IMG1]?", "[IMG1] would reach the model"),
    ("What is in {image}?", "{image} would reach the model"),
    ("What is in <img src='0.png'>?", "would reach the model"),
    ("What is in <|image_pad|>?", "<|image_pad|> would reach the model"),
    ("Count.<|im_end|>", "<|im_end|> would reach the model"),
])
def test_a_place_that_would_reach_the_prompt_as_text_is_an_error(tmp_path, question, why):
    message = fault(write_jsonl(tmp_path, [row(question=question)]))
    assert "column question," in message
    assert why in message


def test_a_smaller_sign_is_no_place(tmp_path):
    question = "For which x is 2 < image(f) and x > 3?"
    assert load_problems(write_jsonl(tmp_path, [row(question=question)]))[0]["problem"] == question


# --- several data sets, and rows that are left out --------------------------------------------------------------------


def test_data_sets_are_mixed(tmp_path):
    """One after the other, each with its count; an id begins with its data set, though both count from 0."""
    first = geometry3k(tmp_path / "one/train-00000-of-00001.parquet")
    second = write_jsonl(tmp_path, [row(id="0"), row(id="1")])
    problems = load_problems(f"{first}:2,{second}@train,toy@test:1")
    assert column("answer", problems) == ["2 \\sqrt { 221 }", "54", "3", "3", load_problems("toy@test:1")[0]["answer"]]
    ids = column("id", problems)
    assert len(set(ids)) == 5
    assert ids[2:] == [f"{second}@train/0", f"{second}@train/1", "toy@test/toy-test-0"]
    assert [len(problems[1:]), problems[-1]["id"], problems[::2][1]["id"]] == [4, ids[4], ids[2]]
    with pytest.raises(IndexError):
        problems[5]


def test_a_data_set_is_mixed_in_once(tmp_path):
    spec = geometry3k(tmp_path / "train.parquet")
    assert f"names {spec} twice" in fault(f"{spec}:2,{spec}")


def test_an_id_stands_in_one_row(tmp_path):
    message = fault(write_jsonl(tmp_path, [row(id="a"), row(id="b"), row(id="a")]))
    assert "row 2 " in message
    assert "column id, value 'a': row 0 has this id too" in message


def run_with(tmp_path, **flags):
    """What load_problems needs of a Run, and the lines that it says."""
    said = []
    run = argparse.Namespace(args=of_the_world(**flags), skipped=[], say=said.append, said=said)
    return run


def test_bad_rows_are_left_out_when_asked_for(tmp_path):
    """Good rows keep their order and the ids that they would have without the others."""
    spec = write_jsonl(tmp_path, [row(answer="1"), row(answer=""), row(image="none.png"), row(answer="4"), row(id="x"),
                                  row(id="x")])
    run = run_with(tmp_path, skip_bad_rows=True)
    problems = load_problems(spec, run)
    assert column("answer", problems) == ["1", "4", "3"]
    assert column("id", problems) == [f"{spec}/0", f"{spec}/3", "x"]
    assert [(entry["dataset"], entry["row"]) for entry in run.skipped] == [(spec, 1), (spec, 2), (spec, 5)]
    assert "cannot be graded" in run.skipped[0]["fault"]
    assert "--skip_bad_rows leaves them out" in fault(spec)


def test_rows_with_other_verifiers_are_left_out_when_asked_for(tmp_path):
    """And counted. They are not checked: a row that is not wanted may be broken."""
    spec = write_jsonl(tmp_path, [
        row(verifier="open_ended", answer="a beach"), row(verifier="math"), row(verifier="digit"),
        row(verifier="open_ended", image="none.png")])
    run = run_with(tmp_path, verifiers="digit,math")
    assert column("verifier", load_problems(spec, run)) == ["math", "digit"]
    assert run.said == [f"{spec}: --verifiers digit,math leaves out 2 open_ended"]
    toy = load_problems("toy@test:12", run)
    assert set(column("verifier", toy)) == {"digit", "math"}
    with pytest.raises(UserError, match="no row is left; 0 have faults, 4 another verifier"):
        load_problems(spec, run_with(tmp_path, verifiers="iou"))
    with pytest.raises(UserError, match="--verifiers digit,magic: 'magic' is none of"):
        load_problems(spec, run_with(tmp_path, verifiers="digit,magic"))
    assert "'magic'" in fault(write_jsonl(tmp_path, [row(verifier="magic")]))


def test_imagefolder(tmp_path):
    """metadata.jsonl beside its pictures, one folder for each split or one for all."""
    one = [{"file_name": "0.png", "problem": "Q", "solution": "1", "trace": "<think>t</think>\\boxed{1}", "id": 5}]
    write_jsonl(tmp_path, one, "metadata.jsonl")
    problem = load_problems(str(tmp_path))[0]
    assert problem["trace"] == "<think>t</think>\\boxed{1}"
    assert problem["answer"] == "1"
    assert problem["id"] == "5"
    several = [{"images_file_names": ["0.png", "1.png"], "problem": "<image> or <image>?", "answer": "x"}]
    write_jsonl(tmp_path, several, "metadata.jsonl")
    assert [image.size for image in load_problems(f"{tmp_path}@train")[0]["images"]] == [(8, 6), (9, 6)]
    (tmp_path / "test").mkdir()
    write_jsonl(tmp_path / "test", one, "metadata.jsonl")
    assert len(load_problems(f"{tmp_path}@test")) == 1
    assert "no metadata.jsonl" in fault(f"{tmp_path}@dev")


# --- verifiers and answers --------------------------------------------------------------------------------------------

OPTIONS = "Pick one.\n(A) 1\n(B) 2\n(C) 3"
INFERRED = [
    # (gold answer, question, verifier)
    ("B", OPTIONS, "mcq"),
    ("B", "Pick.\nA. 1\nB. 2", "mcq"),
    ("B", "Which point is it?", "math"),
    ("B", "Points A, B and C lie on a circle. Which is its top?", "math"),
    ("B", "Which comes next? Select from A-E.", "mcq"),
    ("B", "Which comes next? Choose one of A, B, C or D.", "mcq"),
    ("7", "Q", "math"),
    ("7", "How many?", "digit"),
    ("12", "The number of apples?", "digit"),
    ("-7", OPTIONS + " Count.", "digit"),
    ("7.0", "How many?", "math"),
    ("7", "What is the discount?", "math"),
    ("[1, 2, 3, 4]", "Q", "iou"),
    ("[4, 3, 2, 1]", "Q", "math"),
    ("\\frac{1}{2}", "Q", "math"),
    ("left", "Q", "math"),
    ("5 cm", "Q", "math"),
    ("54^\\circ", "Find x.", "math"),
]


def test_verifier_is_inferred(tmp_path):
    spec = write_jsonl(tmp_path, [row(question=question, answer=gold) for gold, question, _ in INFERRED])
    assert column("verifier", load_problems(spec)) == [verifier for _, _, verifier in INFERRED]


def test_verifier_is_inferred_where_its_column_has_a_hole(tmp_path):
    spec = write_jsonl(tmp_path, [row(verifier="math"), row(verifier=None)])
    assert column("verifier", load_problems(spec)) == ["math", "digit"]


def test_numbers_and_lists_as_answers(tmp_path):
    assert load_problems(write_jsonl(tmp_path, [row(answer=3)]))[0]["answer"] == "3"
    assert load_problems(write_jsonl(tmp_path, [row(answer=[1, 2, 3, 4])]))[0]["verifier"] == "iou"
    assert load_problems(write_jsonl(tmp_path, [row(answer=["left"])]))[0]["answer"] == "left"


# --- traces beside problems -------------------------------------------------------------------------------------------


def test_problems_with_traces_have_an_entry_for_each_distinct_text(tmp_path):
    """In the order of the problems; a text that comes twice is one entry, a problem without a text is left out."""
    problems = load_problems(write_jsonl(tmp_path, [row(id="a"), row(id="b"), row(id="c", image="2.png")]))
    texts = [("c", "late"), ("a", "one"), ("a", "two"), ("a", "one"), ("elsewhere", "x")]
    entries = WithTraces(problems, [dict(id=id, text=text) for id, text in texts])
    assert [(entry["id"], entry["trace"]) for entry in entries] == [("a", "one"), ("a", "two"), ("c", "late")]
    assert entries[-1]["images"][0].size == (10, 6)
    part = entries[1:]
    assert [entry["trace"] for entry in part] == ["two", "late"]
    assert len(part) == 2


# --- broken rows ------------------------------------------------------------------------------------------------------

BROKEN = [
    # (what is changed in a good row, the column that is named, why)
    ({"image": "none.png"}, "image", "cannot be opened"),
    ({"image": "broken.png"}, "image", "cannot be opened"),
    ({"image": "empty.png"}, "image", "cannot be opened"),
    ({"image": "cut.jpg"}, "image", "cannot be opened"),
    ({"image": "thin.png"}, "image", "200 : 1"),
    ({"image": None}, "image", "no picture"),
    ({"question": ""}, "question", "is empty"),
    ({"question": " \n"}, "question", "is empty"),
    ({"question": None}, "question", "is empty"),
    ({"question": "<image> and <image>"}, "question", "2 times for 1"),
    ({"verifier": None, "answer": ""}, "answer", "cannot be graded"),
    ({"verifier": None, "answer": None}, "answer", "cannot be graded"),
    ({"verifier": "math", "answer": ""}, "answer", "cannot be graded"),
    ({"verifier": "math", "answer": None}, "answer", "cannot be graded"),
    ({"verifier": "math", "answer": "\\frac{1}{"}, "answer", "cannot be graded"),
    ({"verifier": "math", "answer": "\\boxed{}"}, "answer", "cannot be graded"),
    ({"verifier": "math", "answer": "9^9^9^9"}, "answer", "cannot be graded"),
    ({"verifier": "iou"}, "answer", "four numbers"),
    ({"verifier": "iou", "answer": "[1, 2, 300, 400]"}, "answer", "beyond its picture of 8 × 6"),
    ({"verifier": "iou", "answer": "[-3, 0, 4, 4]"}, "answer", "beyond its picture of 8 × 6"),
    ({"verifier": "mcq"}, "answer", "one letter"),
    ({"verifier": "mcq", "answer": "D", "question": "Pick.\n(A) 1\n(B) 2"}, "answer", "no option of this letter"),
    ({"verifier": "digit", "answer": "2.5"}, "answer", "an integer"),
    ({"verifier": "magic"}, "answer", "'magic'"),
]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_trap_transparent_pictures(tmp_path, mode):
    """A black line on nothing stays a black line: below transparent pixels lies black too."""
    drawing = picture(8, 6, (0, 0, 0, 0), "RGBA")
    drawing.paste((0, 0, 0, 255), (0, 2, 8, 4))
    saved = drawing.convert(mode)
    if mode == "P":
        saved = picture(8, 6, 0, "P")
        saved.paste(1, (0, 2, 8, 4))
        saved.putpalette([0, 0, 0] * 2)
        saved.info["transparency"] = 0
    spec = write_jsonl(tmp_path, [row()])
    saved.save(tmp_path / "0.png")
    image = load_problems(spec)[0]["images"][0]
    assert image.mode == "RGB"
    assert [image.getpixel((3, y)) for y in (0, 3, 5)] == [(255,) * 3, (0,) * 3, (255,) * 3]


@pytest.mark.parametrize("change, name, why", BROKEN)
def test_trap_broken_problems(tmp_path, change, name, why):
    """Text-only and broken rows: the error names data set, row, column and value, before any training."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    picture(400, 2).save(tmp_path / "thin.png")
    picture(64, 64).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:300])
    spec = write_jsonl(tmp_path, [row(verifier="digit"), row(**change)])
    message = fault(spec)
    assert spec in message
    assert "row 1 " in message
    assert f"column {name}," in message
    assert why in message
    if change.get(name):
        assert f"'{change[name].strip()}'" in message


@pytest.mark.parametrize("change, why", [
    ({"answer": ["12", "twelve"]}, "a list of answers"),
    ({"question": [{"role": "user", "content": "How many?"}]}, "it is no text"),
    ({"trace": ["a", "b"]}, "it is no text"),
])
def test_what_is_no_text_never_reaches_a_prompt_or_a_gold_answer(tmp_path, change, why):
    message = fault(write_jsonl(tmp_path, [row(**change)]))
    assert f"column {next(iter(change))}," in message
    assert why in message
    assert "--skip_bad_rows leaves it out" in message


def test_a_hole_in_a_column_of_numbers_is_no_answer(tmp_path):
    """And it makes floats of the whole numbers beside it."""
    spec = write_parquet(tmp_path / "data.parquet", {
        "image": [picture()] * 2, "problem": ["How many?"] * 2, "answer": [3.0, float("nan")],
    }, image=datasets.Image())
    assert "row 1 (counted from 0), column answer, value 'nan'" in fault(spec)
    assert column("answer", load_problems(f"{spec}:1")) == ["3"]


def test_a_picture_of_16_bits_would_turn_white(tmp_path):
    spec = write_jsonl(tmp_path, [row()])
    picture(8, 6, 30_000, "I;16").save(tmp_path / "0.png")
    assert "more than 8 bits a colour (mode I;16)" in fault(spec)


def test_a_photograph_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side
    spec = write_jsonl(tmp_path, [row(image="0.jpg")])
    picture(40, 30).save(tmp_path / "0.jpg", exif=exif)
    assert load_problems(spec)[0]["images"][0].size == (30, 40)


def test_many_broken_rows_are_counted(tmp_path):
    message = fault(write_jsonl(tmp_path, [row(answer="") for _ in range(30)]))
    assert "row 0 " in message
    assert "rows with faults: 30, [0, 1, 2" in message


def test_an_empty_list_of_pictures_is_no_picture(tmp_path):
    assert "no picture" in fault(write_jsonl(tmp_path, [{"images": [], "problem": "Q", "answer": "1"}]))


def test_an_answer_of_several_kinds_names_row_and_column(tmp_path):
    message = fault(write_jsonl(tmp_path, [row(answer={"a": 1}), row(answer="x")]))
    assert "row 0 " in message
    assert "column answer" in message


# --- broken files -----------------------------------------------------------------------------------------------------


def test_a_missing_column_is_named_with_what_it_may_be_called(tmp_path):
    message = fault(write_jsonl(tmp_path, [{"image": "0.png", "query": "Q", "label": "1"}]))
    assert "no column for answer" in message
    assert "answer or ground_truth or gt_answer or solution or gt" in message
    assert "image, query, label" in message
    assert "no column for images" in fault(write_jsonl(tmp_path, [{"problem": "Q", "answer": "1"}]))
    by_name = {f"question {number}": row() for number in range(400)}
    (tmp_path / "dict.json").write_text(json.dumps(by_name))
    assert "it has question 0, question 1" in fault(f"{tmp_path}/dict.json")


def test_more_rows_than_there_are(tmp_path):
    spec = write_jsonl(tmp_path, [row(), row()])
    assert "it has 2 rows" in fault(f"{spec}:3")
    assert "count above 0" in fault(f"{spec}:0")
    assert "split train" in fault(f"{spec}@test")


def test_trap_broken_files(tmp_path):
    """Files that are cut, empty or of another kind, and folders of nothing."""
    empty = write_parquet(tmp_path / "none.parquet", {"image": [], "problem": [], "answer": []})
    assert "no data" in fault(empty)
    (tmp_path / "bad.jsonl").write_text('{"image": "0.png", "question": \n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "void.json").write_text("")
    for name in ("bad.jsonl", "bad.parquet", "void.json"):
        assert f"data set {tmp_path}/{name} cannot be loaded" in fault(f"{tmp_path}/{name}")
    (tmp_path / "data.csv").write_text("image,problem,answer\n")
    assert "give a .json, .jsonl or .parquet file" in fault(f"{tmp_path}/data.csv")
    (tmp_path / "void").mkdir()
    assert "only nothing" in fault(f"{tmp_path}/void")


@pytest.mark.parametrize("spec", [
    "nothing/here.jsonl", "nothing/here.parquet@train", "a/b/c@train", "/nowhere", "toy@train:many",
])
def test_a_name_of_nothing(spec):
    assert "no such file" in fault(spec)

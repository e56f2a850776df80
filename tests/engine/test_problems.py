"""Reading data sets (common.load_problems): every published schema as a small file, and every way to be broken."""
import json
import sys

import datasets
import pytest
from PIL import Image

from common import UserError, load_problems
from lab import toy


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    """datasets keeps what it read; the tests shall leave nothing in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(width=8, height=6, colour="red", mode="RGB"):
    return Image.new(mode, (width, height), colour)


def write_jsonl(folder, rows, name="data.jsonl"):
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
    return write_parquet(path, {
        "images": [[picture(8 + n)] for n in range(rows)],
        "problem": ["<image>Find x."] * rows,
        "answer": ["2 \\sqrt { 221 }", "54", "\\frac { 1 } { 2 }"][:rows],
    }, images=datasets.List(datasets.Image()))


def row(**changes):
    return {"image": "0.png", "question": "How many?", "answer": "3", **changes}


def fault(spec):
    with pytest.raises(UserError) as error:
        load_problems(spec)
    message = str(error.value)
    assert "\n" not in message and len(message) < 900
    return message


def test_geometry3k(tmp_path):
    spec = geometry3k(tmp_path / "train-00000-of-00001.parquet")
    problems = load_problems(spec)
    assert len(problems) == 3 and problems[0]["images"][0].size == (8, 6) and problems[-1]["images"][0].size == (10, 6)
    assert problems[0]["problem"] == "<image>Find x." and problems[0]["answer"] == "2 \\sqrt { 221 }"
    assert [problem["verifier"] for problem in problems] == ["math"] * 3
    assert len({problem["id"] for problem in problems}) == 3
    assert problems[0]["images"][0].mode == "RGB" and "trace" not in problems[0]
    assert load_problems(f"{spec}@train:2")[1]["answer"] == "54" and len(load_problems(f"{spec}:2")) == 2


def test_slices(tmp_path):
    problems = load_problems(geometry3k(tmp_path / "data.parquet"))
    part = problems[1:]
    assert len(part) == 2 and part[0]["id"] == problems[1]["id"] and part[0]["images"][0].size == (9, 6)
    assert [problem["answer"] for problem in problems[::-1]] == [problem["answer"] for problem in reversed(problems)]
    with pytest.raises(IndexError):
        problems[3]


def test_pictures_are_opened_when_asked_for(tmp_path):
    problems = load_problems(write_jsonl(tmp_path, [row(), row(image="1.png")]))
    (tmp_path / "1.png").unlink()
    assert problems[0]["images"][0].size == (8, 6) and len(problems[:2]) == 2
    with pytest.raises(ValueError):
        problems[1]


def test_hub_layout(tmp_path):
    geometry3k(tmp_path / "data" / "train-00000-of-00002.parquet", 3)
    geometry3k(tmp_path / "data" / "train-00001-of-00002.parquet", 2)
    geometry3k(tmp_path / "data" / "test-00000-of-00001.parquet", 1)
    assert [len(load_problems(f"{tmp_path}@{split}")) for split in ("train", "test")] == [5, 1]
    assert len(load_problems(str(tmp_path))) == 5
    assert "train" in fault(f"{tmp_path}@validation") and "test" in fault(f"{tmp_path}@validation")


def test_hub_name(tmp_path, monkeypatch):
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


def test_mathvista(tmp_path):
    spec = write_parquet(tmp_path / "testmini-00000-of-00001.parquet", {
        "pid": ["1", "2", "3", "4"],
        "question": ["Which?"] * 4, "query": ["Which?\nChoices:\n(A) left\n(B) right", "Count.", "How long?", "List."],
        "image": [f"images/{n}.jpg" for n in range(4)], "decoded_image": [picture(mode="L", colour=1)] * 4,
        "choices": [["left", "right"], None, None, None], "answer": ["right", "7", "1.2", "[0, 2, 5, 7]"],
        "question_type": ["multi_choice"] + ["free_form"] * 3, "unit": [None] * 4, "precision": [None, 1.0, 1.0, None],
        "answer_type": ["text", "integer", "float", "list"],
    }, decoded_image=datasets.Image())
    problems = load_problems(spec + "@testmini")
    assert [(problem["answer"], problem["verifier"]) for problem in problems] == [
        ("B", "mcq"), ("7", "digit"), ("1.2", "math"), ("[0, 2, 5, 7]", "math")]
    assert problems[0]["problem"].startswith("Which?\nChoices") and problems[0]["id"] == "1"
    assert problems[0]["images"][0].mode == "RGB"


def test_choices_join_the_question(tmp_path):
    spec = write_jsonl(tmp_path, [row(choices=["red", "blue"], answer="blue"), row(choices=["red", "blue"], answer="A")])
    problems = load_problems(spec)
    assert [problem["answer"] for problem in problems] == ["B", "A"]
    assert problems[0]["problem"] == "How many?\nChoices:\n(A) red\n(B) blue" and problems[0]["verifier"] == "mcq"
    spec = write_jsonl(tmp_path, [row(choices=["red", "blue"], answer="green")])
    assert "none of the choices" in fault(spec) and "green" in fault(spec)


def test_virl39k(tmp_path):
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "a.png")
    write_parquet(tmp_path / "39Krelease.parquet", {
        "question": ["<image>What is x?\nA. 1\nB. 2", "<image>What?"], "answer": ["\\boxed{B}", "\\boxed{\\frac{1}{2}}"],
        "PassRate_32BTrained": [0.5, 0.5], "category": ["c"] * 2, "source": ["s"] * 2, "qid": ["q1", "q2"],
        "image": [["images/a.png"]] * 2,
    })
    problems = load_problems(f"{tmp_path}@train")
    assert [(p["id"], p["answer"], p["verifier"]) for p in problems] == [("q1", "B", "mcq"), ("q2", "\\frac{1}{2}", "math")]
    assert load_problems(f"{tmp_path}/39Krelease.parquet")[0]["images"][0].size == (8, 6)
    (tmp_path / "images" / "a.png").unlink()
    assert "images/a.png" in fault(f"{tmp_path}@train") and "restore it under" in fault(f"{tmp_path}@train")


def test_paths_without_pictures(tmp_path, monkeypatch):
    hub = datasets.Dataset.from_dict({"question": ["q"], "answer": ["\\boxed{1}"], "image": [["images/a.png"]]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hub)
    assert "it has 1 rows" in fault("TIGER-Lab/ViRL39K@train:2")
    assert "only this path" in fault("TIGER-Lab/ViRL39K@train") and "name the folder" in fault("TIGER-Lab/ViRL39K@train")


def test_mmk12(tmp_path):
    spec = write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", {
        "id": ["m1"], "question": ["<image>Area?"], "answer": ["6 \\text{ cm}^2"], "subject": ["math"], "image": [picture()],
    }, image=datasets.Image())
    assert load_problems(spec)[0]["verifier"] == "math" and load_problems(f"{tmp_path}@test")[0]["id"] == "m1"


def test_vlaa_thinking(tmp_path):
    kinds = [("digit", "3"), ("MCQ", "C"), ("math", "\\frac{1}{2}"), ("IoU", "[1, 2, 3, 4]"), ("open-ended", "a red car")]
    spec = write_jsonl(tmp_path, [], "grpo.json")
    rows = [{"image": "0.png", "question": "<image>Q", "gt": gold, "verifier_type": kind, "ds_answer": "", "caption": "c"}
            for kind, gold in kinds]
    (tmp_path / "grpo.json").write_text(json.dumps(rows))
    problems = load_problems(spec)
    assert [problem["verifier"] for problem in problems] == ["digit", "mcq", "math", "iou", "open_ended"]
    assert [problem["answer"] for problem in problems] == [gold for _, gold in kinds]


def test_imagefolder(tmp_path):
    rows = [{"file_name": "0.png", "problem": "Q", "solution": "1", "trace": "<think>t</think>\\boxed{1}", "id": 5}]
    write_jsonl(tmp_path, rows, "metadata.jsonl")
    problem = load_problems(str(tmp_path))[0]
    assert problem["trace"] == "<think>t</think>\\boxed{1}" and problem["answer"] == "1" and problem["id"] == "5"
    write_jsonl(tmp_path, [{"images_file_names": ["0.png", "1.png"], "problem": "<image> or <image>?", "answer": "x"}],
                "metadata.jsonl")
    assert [image.size for image in load_problems(f"{tmp_path}@train")[0]["images"]] == [(8, 6), (9, 6)]
    (tmp_path / "test").mkdir()
    write_jsonl(tmp_path / "test", rows, "metadata.jsonl")
    assert len(load_problems(f"{tmp_path}@test")) == 1 and "no metadata.jsonl" in fault(f"{tmp_path}@dev")


def test_verifier_is_inferred(tmp_path):
    options = "Pick one.\n(A) 1\n(B) 2\n(C) 3"
    cases = [("B", options, "mcq"), ("B", "Pick.\nA. 1\nB. 2", "mcq"), ("B", "Which point is it?", "math"), ("7", "Q", "math"),
             ("7", "How many?", "digit"), ("-7", options + " Count.", "digit"), ("7.0", "How many?", "math"),
             ("[1, 2, 3, 4]", "Q", "iou"), ("[4, 3, 2, 1]", "Q", "math"),
             ("\\frac{1}{2}", "Q", "math"), ("left", "Q", "math"), ("5 cm", "Q", "math"), ("54^\\circ", "Find x.", "math"),
             ("7", "What is the discount?", "math"), ("12", "The number of apples?", "digit")]
    spec = write_jsonl(tmp_path, [row(question=problem, answer=gold) for gold, problem, _ in cases])
    assert [problem["verifier"] for problem in load_problems(spec)] == [verifier for _, _, verifier in cases]
    spec = write_jsonl(tmp_path, [row(verifier="math"), row(verifier=None)])  # a column with a hole
    assert [problem["verifier"] for problem in load_problems(spec)] == ["math", "digit"]


def test_numbers_and_lists_as_answers(tmp_path):
    assert load_problems(write_jsonl(tmp_path, [row(answer=3)]))[0]["answer"] == "3"
    assert load_problems(write_jsonl(tmp_path, [row(answer=[1, 2, 3, 4])]))[0]["verifier"] == "iou"


def test_toy(monkeypatch):
    monkeypatch.setattr(toy, "SIZES", {"pretrain": None, "train": 9, "test": 5})
    monkeypatch.setattr(toy, "problems", lambda split, count: (split, count))
    assert load_problems("toy@train:3") == ("train", 3) and load_problems("toy@test") == ("test", None)
    assert "train, test" in fault("toy@nowhere") and "train, test" in fault("toy")


def test_trap_broken_problems(tmp_path):
    """Text-only and broken rows: the error names the data set, the row, the column and the value, before any training."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    picture(400, 2).save(tmp_path / "thin.png")
    picture(64, 64).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:300])
    for change, column, why in [
        ({"image": "none.png"}, "image", "cannot be opened"), ({"image": "broken.png"}, "image", "cannot be opened"),
        ({"image": "empty.png"}, "image", "cannot be opened"), ({"image": "cut.jpg"}, "image", "cannot be opened"),
        ({"image": "thin.png"}, "image", "200 : 1"), ({"image": None}, "image", "no picture"),
        ({"question": ""}, "question", "is empty"), ({"question": " \n"}, "question", "is empty"),
        ({"question": None}, "question", "is empty"), ({"question": "<image> and <image>"}, "question", "2 times for 1"),
        ({"answer": ""}, "answer", "cannot be graded"), ({"answer": None}, "answer", "cannot be graded"),
        ({"answer": "\\frac{1}{"}, "answer", "cannot be graded"), ({"answer": "\\boxed{}"}, "answer", "cannot be graded"),
        ({"answer": "9^9^9^9"}, "answer", "cannot be graded"),
        ({"verifier": "iou"}, "answer", "four numbers"), ({"verifier": "mcq"}, "answer", "one letter"),
        ({"verifier": "digit", "answer": "2.5"}, "answer", "an integer"), ({"verifier": "magic"}, "answer", "'magic'"),
    ]:
        spec = write_jsonl(tmp_path, [row(verifier="digit"), row(verifier="math" if "answer" in change else None, **change)
                                      if "verifier" not in change else row(**change)])
        message = fault(spec)
        assert spec in message and "row 1 " in message and f"column {column}," in message and why in message, message
        if change.get(column):
            assert f"'{change[column].strip()}'" in message, message
    many = write_jsonl(tmp_path, [row(answer="") for _ in range(30)])
    assert "row 0 " in fault(many) and "rows with faults: 30, [0, 1, 2" in fault(many)
    lists = write_jsonl(tmp_path, [{"images": [], "problem": "Q", "answer": "1"}])
    assert "no picture" in fault(lists)


def test_trap_broken_files(tmp_path):
    message = fault(write_jsonl(tmp_path, [{"image": "0.png", "query": "Q", "label": "1"}]))
    assert "no column for answer" in message and "image, query, label" in message and "answer or solution or gt" in message
    assert "no column for images" in fault(write_jsonl(tmp_path, [{"problem": "Q", "answer": "1"}]))
    spec = write_jsonl(tmp_path, [row(), row()])
    assert "it has 2 rows" in fault(f"{spec}:3") and "count above 0" in fault(f"{spec}:0")
    assert "split train" in fault(f"{spec}@test")
    assert "no data" in fault(write_parquet(tmp_path / "none.parquet", {"image": [], "problem": [], "answer": []}))
    (tmp_path / "bad.jsonl").write_text('{"image": "0.png", "question": \n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "data.csv").write_text("image,problem,answer\n")
    (tmp_path / "void").mkdir()
    (tmp_path / "void.json").write_text("")
    for name in ("bad.jsonl", "bad.parquet", "void.json"):
        assert "cannot be loaded" in fault(f"{tmp_path}/{name}")
    assert ".jsonl" in fault(f"{tmp_path}/data.csv") and "only nothing" in fault(f"{tmp_path}/void")
    for spec in ("nothing/here.jsonl", "nothing/here.parquet@train", "a/b/c@train", "/nowhere", "toy@train:many"):
        assert "no such file" in fault(spec)
    mixed = write_jsonl(tmp_path, [row(answer={"a": 1}), row(answer="x")])
    assert "row 0 " in fault(mixed) and "column answer" in fault(mixed)

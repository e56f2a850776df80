"""common.load_problems: every published schema as a small file, and every way in which a data set can be broken."""

import json

import tabletop.problems
from common import UserError, load_problems
from harness.problems import WithTraces

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
        "id": ["m1"],
        "question": ["<image>Area?"],
        "answer": ["6 \\text{ cm}^2"],
        "subject": ["math"],
        "image": [picture()],
    }
    spec = write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", columns, image=datasets.Image())
    assert load_problems(spec)[0]["verifier"] == "math"
    assert load_problems(f"{tmp_path}@test")[0]["id"] == "m1"


def test_vlaa_thinking(tmp_path):
    kinds = {
        "digit": "3",
        "MCQ": "C",
        "math": "\\frac{1}{2}",
        "IoU": "[1, 2, 3, 4]",
        "open-ended": "a red car",
    }
    rows = []
    for kind, gold in kinds.items():
        rows.append({
            "image": "0.png",
            "question": "<image>Q",
            "gt": gold,
            "verifier_type": kind,
            "ds_answer": "",
            "caption": "c",
        })
    spec = write_jsonl(tmp_path, [], "grpo.json")
    (tmp_path / "grpo.json").write_text(json.dumps(rows))
    problems = load_problems(spec)
    assert column("verifier", problems) == ["digit", "mcq", "math", "iou", "open_ended"]
    assert column("answer", problems) == list(kinds.values())


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
    ({"verifier": "mcq"}, "answer", "one letter"),
    ({"verifier": "digit", "answer": "2.5"}, "answer", "an integer"),
    ({"verifier": "magic"}, "answer", "'magic'"),
]


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
    assert "answer or solution or gt" in message
    assert "image, query, label" in message
    assert "no column for images" in fault(write_jsonl(tmp_path, [{"problem": "Q", "answer": "1"}]))


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
        assert "cannot be loaded" in fault(f"{tmp_path}/{name}")
    (tmp_path / "data.csv").write_text("image,problem,answer\n")
    assert "give a .json, .jsonl or .parquet file" in fault(f"{tmp_path}/data.csv")
    (tmp_path / "void").mkdir()
    assert "only nothing" in fault(f"{tmp_path}/void")


@pytest.mark.parametrize("spec", [
    "nothing/here.jsonl", "nothing/here.parquet@train", "a/b/c@train", "/nowhere", "toy@train:many",
])
def test_a_name_of_nothing(spec):
    assert "no such file" in fault(spec)

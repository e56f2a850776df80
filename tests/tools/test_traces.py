"""lab/traces.py: what each step keeps, by hand; what stands in its files; where it goes on; what it refuses."""

import json
import shutil
from pathlib import Path

import common
from harness.flags import INSTRUCTION, launch
from harness.phrases import hesitations
from harness.traces import given_traces
from lab import traces
from tabletop import writer as toy
from tabletop.grids import answer
from tabletop.problems import spec_of

import pytest
import torch

DATA = "toy-clear@train:12"


def pipeline(*argv):
    """lab/traces.py in this process."""
    launch("traces", traces.main, traces.flags, doc=traces.__doc__, recipe=traces.RECIPE, toy=traces.TOY,
           argv=[str(word) for word in argv], tables=traces.TABLES)


class Scripted:
    """Plays every part. What it writes follows from the number of the problem, so that each step drops some."""

    def __init__(self):
        self.asked = []
        self.gold = {problem["id"]: problem["answer"] for problem in common.load_problems(DATA)}

    def write(self, asked, step):
        self.asked += [(step, one["id"], len(one["images"]), one["problem"]) for one in asked]
        return [getattr(self, step)(one["id"], int(one["id"].split("-")[-1])) for one in asked]

    def caption(self, name, number):
        return None if number == 0 else f"{name} as {{question}} <image>"

    def reason(self, name, number):
        answer = "nothing" if number == 2 else self.gold[name]
        closed = "" if number == 1 else "</think>"
        opening = "" if number == 3 else "<think>"
        return f"{opening}The caption says {number}{closed}According to it \\boxed{{{answer}}}"

    def rewrite(self, name, number):
        if number == 4:
            return "the Caption says 4"
        doubt = " Wait." if number in (5, 6) else ""
        return f"<think>hm</think> I see {number}.{doubt}"

    def surprise(self, asked, texts):
        """Perplexities that fall with the number."""
        self.asked += [("filter", one["id"], len(one["images"]), one["problem"]) for one in asked]
        return [1.0 / int(one["id"].split("-")[-1]) for one in asked]


@pytest.fixture
def scripted(monkeypatch):
    writer = Scripted()
    monkeypatch.setattr(traces, "load_writer", lambda name, run: writer)
    monkeypatch.setattr(traces, "kind_of", lambda name, run: "ours")
    monkeypatch.setattr(traces, "find_model", lambda name, run: name)
    return writer


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def numbers(path):
    return [int(row["id"].split("-")[-1]) for row in rows_of(path)]


# The prompts of a large model, on the tabletop's data.
PROMPTS = ("--caption_prompt", traces.CAPTION, "--reason_prompt", traces.REASON, "--rewrite_prompt", traces.REWRITE,
           "--show_picture", "")
FLAGS = ("--dataset", DATA, "--wave", 5, *PROMPTS)

# --- what each step keeps ---------------------------------------------------------------------------------------------


def test_every_step_keeps_what_it_should(scripted, tmp_path, capsys):
    """0 has no caption, 1 no closed reasoning, 4 betrays the caption, 2 is wrong, 5 and 6 hesitate; of the six that are
    left the three lowest stay."""
    place = tmp_path / "out"
    pipeline(*FLAGS, "--keep", 3, "--output_dir", place)
    counts = {row["step"]: row for row in json.loads((place / "pipeline.json").read_text())}
    kept = {step: (row["given"], row["kept"]) for step, row in counts.items()}
    assert kept == dict(caption=(12, 11), reason=(11, 10), rewrite=(10, 9), verify=(9, 8), split=(8, 6), filter=(6, 3))
    assert counts["rewrite"]["dropped"] == {"still says 'caption'": 1}
    assert counts["verify"]["dropped"] == {"wrong": 1}
    assert counts["split"]["rate"] == 6 / 8
    assert numbers(place / "sft.jsonl") == numbers(place / "traces.jsonl") == [11, 10, 9]  # lowest perplexity first
    assert numbers(place / "rl.jsonl") == [5, 6]
    shown = capsys.readouterr().out
    assert all(step in shown for step in traces.STEPS)


def test_what_is_written_is_read_by_the_scripts(scripted, tmp_path):
    """As data sets of one's own with the same pictures, and as traces to the problems of the data set."""
    place = tmp_path / "out"
    pipeline(*FLAGS, "--output_dir", place)
    before = {problem["id"]: problem for problem in common.load_problems(DATA)}
    for name, count in (("sft", 6), ("rl", 2)):
        found = common.load_problems(str(place / f"{name}.jsonl"))
        assert len(found) == count
        for problem in found:
            original = before[problem["id"]]
            assert problem["images"][0].tobytes() == original["images"][0].tobytes()
            assert all(problem[key] == original[key] for key in ("problem", "answer", "verifier"))
            assert common.is_right(problem, problem["trace"])
            assert common.format_reward(problem, problem["trace"]) == 1.0
            assert bool(hesitations(problem["trace"])) == (name == "rl")
            assert "aption" not in problem["trace"]
    found, count = given_traces(str(place / "traces.jsonl"), DATA, common.load_problems(DATA), None)
    assert len(found) == count == 6


def test_only_those_who_should_see_the_picture(scripted, tmp_path):
    """The captioner and the model to be trained; the others once --show_picture names them. Each gets its texts."""
    pipeline(*FLAGS, "--output_dir", tmp_path / "out")
    pictures = {}
    for step, _, count, _ in scripted.asked:
        pictures.setdefault(step, set()).add(count)
    assert pictures == dict(caption={1}, reason={0}, rewrite={0}, filter={1})
    prompts = {(step, name): prompt for step, name, _, prompt in scripted.asked}
    question = common.load_problems(DATA)[3]["problem"]
    # What is filled in is not looked at again, and holds no place for a picture.
    assert prompts["reason", "toy-train-3"] == traces.REASON.replace(
        "{caption}", "toy-train-3 as {question}").replace("Question: {question}", f"Question: {question}")
    assert prompts["rewrite", "toy-train-3"].endswith("The caption says 3")
    assert prompts["filter", "toy-train-3"] == f"{question}\n{INSTRUCTION}"
    scripted.asked.clear()
    pipeline(*FLAGS, "--show_picture", "rewrite", "--output_dir", tmp_path / "seeing")
    assert {count for step, _, count, _ in scripted.asked if step == "rewrite"} == {1}
    assert {count for step, _, count, _ in scripted.asked if step == "reason"} == {0}


def test_a_model_can_be_the_judge(scripted, tmp_path):
    """Asked with gold and answer, it alone decides."""
    scripted.verify = lambda name, number: "<think>?</think>Yes." if number % 2 else "No"
    pipeline(*FLAGS, "--verify_model", "judge", "--output_dir", tmp_path / "out")
    assert sorted(numbers(tmp_path / "out/sft.jsonl")) == [3, 7, 9, 11]
    prompt = next(prompt for step, name, _, prompt in scripted.asked if (step, name) == ("verify", "toy-train-2"))
    assert "Given answer: nothing" in prompt
    assert f"Right answer: {scripted.gold['toy-train-2']}" in prompt


# --- stopped and resumed ----------------------------------------------------------------------------------------------


def files_of(place):
    return {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}


def test_a_step_that_is_done_is_not_done_again(scripted, tmp_path, monkeypatch):
    place = tmp_path / "out"
    pipeline(*FLAGS, "--output_dir", place)
    before = files_of(place)
    monkeypatch.setattr(traces, "load_writer", None)  # a call would raise
    pipeline(*FLAGS, "--output_dir", place)
    assert files_of(place) == before


def test_a_kill_costs_no_more_than_a_wave(scripted, tmp_path):
    """Stopped in the second wave of rewriting, with half a line written: the captions stand, as do two waves' rows."""
    whole = tmp_path / "whole"
    pipeline(*FLAGS, "--output_dir", whole)
    place = tmp_path / "stopped"
    place.mkdir()
    for name in ("steps.json", "1-caption.jsonl", "2-reason.jsonl"):
        shutil.copy(whole / name, place / name)
    lines = (whole / "3-rewrite.jsonl").read_text().splitlines(keepends=True)
    (place / "3-rewrite.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    scripted.asked.clear()
    pipeline(*FLAGS, "--output_dir", place)
    assert {step for step, *_ in scripted.asked} == {"rewrite", "filter"}
    assert sum(step == "rewrite" for step, *_ in scripted.asked) == len(lines) - 5
    assert files_of(place) == files_of(whole)


# --- captions from elsewhere ------------------------------------------------------------------------------------------


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_captions_from_elsewhere(scripted, tmp_path):
    """No captioner is asked; a problem without a caption is dropped."""
    rows = [dict(id=f"toy-train-{number}", caption="four red stars") for number in (3, 7, 8)]
    path = write(tmp_path / "captions.jsonl", *rows)
    pipeline(*FLAGS, "--captions", path, "--output_dir", tmp_path / "out")
    assert sorted(numbers(tmp_path / "out/sft.jsonl")) == [3, 7, 8]
    counts = json.loads((tmp_path / "out/pipeline.json").read_text())
    assert counts[0]["dropped"] == {"no caption given": 9}
    assert {step for step, *_ in scripted.asked} == {"reason", "rewrite", "filter"}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys):
    """A function that gives the one line of a pipeline that ends with status 2."""

    def line(*flags):
        with pytest.raises(SystemExit) as caught:
            pipeline(*flags)
        assert caught.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(errors) == 1
        return errors[0]

    return line


@pytest.mark.parametrize("flags, said", [
    (("--reason_prompt", "{caption}"), "--reason_prompt lacks {question}"),
    (("--rewrite_prompt", "Again."), "--rewrite_prompt lacks {reasoning}"),
    (("--verify_prompt", "{gold}?"), "--verify_prompt lacks {answer}"),
    (("--reason_prompt", "<image>{caption}{question}"), "--reason_prompt has a place for a picture, which step reason"),
    (("--show_picture", "reason,all"), "--show_picture reason,all: 'all' is none of"),
    (("--reason_model", "nobody/nothing"), "model nobody/nothing is no folder or name"),
    (("--captions", "no/such.jsonl"), "--captions no/such.jsonl: cannot be read"),
])
def test_bad_flags_are_one_line_before_anything_is_written(refused, folder, tmp_path, flags, said):
    models = [word for part in ("caption", "reason", "rewrite") for word in (f"--{part}_model", folder)]
    assert said in refused(*FLAGS, "--model", folder, *models, *flags, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_captions_of_another_data_set(scripted, refused, tmp_path):
    path = write(tmp_path / "captions.jsonl", dict(id="coco-1", caption="a cat"))
    line = refused(*FLAGS, "--captions", path, "--output_dir", tmp_path / "out")
    assert "none of its ids is one of toy-clear@train:12, whose first is toy-train-0" in line
    assert "the file's first is coco-1" in line
    path = write(tmp_path / "captions.jsonl", dict(id="toy-train-0", text="a cat"))
    line = refused(*FLAGS, "--captions", path, "--output_dir", tmp_path / "out")
    assert "row 1, column caption: None is no text" in line
    assert not (tmp_path / "out").exists()


def test_a_step_file_of_other_settings(scripted, refused, tmp_path):
    """Another data set, another prompt, another step before: the line says which. The file stays as it was."""
    place = tmp_path / "out"
    pipeline(*FLAGS, "--output_dir", place)
    before = files_of(place)
    line = refused("--dataset", "toy-clear@test:12", *PROMPTS, "--output_dir", place)
    assert "1-caption.jsonl: it was written with dataset 'toy-clear@train:12', which is 'toy-clear@test:12' now" in line
    line = refused(*FLAGS, "--reason_prompt", "{caption} {question}", "--output_dir", place)
    assert "2-reason.jsonl: it was written with prompt" in line
    assert files_of(place) == before
    (place / "2-reason.jsonl").unlink()
    line = refused(*FLAGS, "--reason_prompt", "{caption} {question}", "--output_dir", place)
    assert "3-rewrite.jsonl: an earlier step has other settings now" in line


@pytest.mark.parametrize("text, said", [
    ("half a li\n{}\n", "1-caption.jsonl is torn"),
    ("[1]\n", "1-caption.jsonl is torn"),
    ('{"id": "a"}\n', "1-caption.jsonl is torn"),
    ('{"id": "a", "recipe": "x"}\n', "1-caption.jsonl: it belongs to another run"),
])
def test_a_torn_step_file(scripted, refused, tmp_path, text, said):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/1-caption.jsonl").write_text(text)
    assert said in refused(*FLAGS, "--output_dir", tmp_path / "out")


def test_open_ended_answers_need_a_judge(scripted, refused, tmp_path):
    problem = common.load_problems(DATA)[0]
    problem["images"][0].save(tmp_path / "0.png")
    path = write(tmp_path / "data.jsonl", dict(
        image="0.png", problem="What is it?", answer="a grid", verifier="open_ended"))
    line = refused("--dataset", path, *PROMPTS, "--output_dir", tmp_path / "out")
    assert "is open_ended, which no rule grades: name a --verify_model" in line


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("a</think>b", "<think>a</think>b"), ("<think>a</think>b", "<think>a</think>b"), ("a", "a"),
])
def test_the_opening_tag_that_a_template_wrote(text, expected):
    assert traces.opened(text) == expected


@pytest.mark.parametrize("text, word", [
    ("As the Captions say", "captions"), ("described above", "described"), ("captioned, undescribed", None), ("", None),
])
def test_words_that_betray(text, word):
    assert traces.betrays(text, "caption,captions, described") == word
    assert traces.betrays(text, "") is None


def test_a_rewriter_that_gives_a_whole_answer_is_taken_at_its_word():
    """Its answer is verified in the place of the reasoner's; a rewriter's thinking alone is no answer."""
    item = traces.Item(0, dict(id="p", answer="4", verifier="digit"), dict(trace="<think>a</think>\\boxed{4}"))
    row = traces.rewritten(item, "<think>I see 5</think>\\boxed{5}", "caption")
    assert row["made"]["trace"] == "<think>I see 5</think>\\boxed{5}"
    row = traces.rewritten(item, "<think>hm</think>I see 4", "caption")
    assert row["made"]["trace"] == "<think>I see 4</think>\\boxed{4}"
    assert traces.rewritten(item, "<think>the caption</think>\\boxed{4}", "caption")["dropped"]


# --- the tabletop's writer --------------------------------------------------------------------------------------------


def test_what_the_writer_is_shown():
    """The caption has every cell; reasoning is toy-hand's, told; rewriting takes the caption out again."""
    for index in range(8):
        spec = spec_of("practice", index)
        (caption, texts), (reason, told), (rewrite, new) = toy.lessons(index)
        cells = [cell for row in spec.grid for cell in row]
        assert texts[0].count("none") == cells.count(None)
        assert all(f"{cell[0]} {cell[1]}" in texts[0] for cell in cells if cell)
        assert texts[0] in reason["problem"]
        problem = dict(answer=answer(spec), verifier=spec.verifier, size=caption["images"][0].size)
        assert all(common.is_right(problem, text) for text in told)
        assert all(traces.betrays(text, "caption") for text in told)
        assert all(common.is_right(problem, text) and not traces.betrays(text, "caption") for text in new)
        assert any(rewrite["problem"].startswith(toy.inside(text)) for text in told)


def test_toys_writer_begins_to_learn(monkeypatch, tmp_path):
    """Two steps, from the shipped teacher, in a cache of its own; then it is a model like any other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = dict(start="toy-teacher", steps=2, problems_per_step=2)
    monkeypatch.setattr(toy, "RECIPE", toy.dataclasses.replace(toy.RECIPE, **small))
    place = toy.build()
    assert place == common.find_model("toy-writer")
    policy, _ = common.load_policy("toy-writer")
    start, _ = common.load_policy("toy-teacher")
    moved = [not torch.equal(*pair) for pair in zip(policy.parameters(), start.parameters(), strict=True)]
    assert any(moved)
    monkeypatch.setattr(toy, "train", None)  # a second call must not train
    assert toy.build() == place

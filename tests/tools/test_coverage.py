"""lab/coverage.py and lab/oracle.py: what a selection credits of the first mistakes, and exactly the right tokens."""

import json

import common
import vepo
from harness.flags import MODEL_FLAGS, UserError, launch, parse_args
from lab import coverage, oracle
from tabletop.traces import kinds, traces

import pytest
import torch
from drive import even_length, no_page
from whole_runs import SMALL, metrics

# --- selections -------------------------------------------------------------------------------------------------------


def test_selections_are_read_from_one_line():
    found = coverage.read_selections("vepo:0.2, vepo:0.5:1,cells:1")
    assert [tuple(one) for one in found] == [
        ("vepo:0.2", "vepo", 0.2, 0.7), ("vepo:0.5:1", "vepo", 0.5, 1.0), ("cells:1", "cells", 1.0, 0.7)]


@pytest.mark.parametrize("text", ["vepo", "vepo:0", "vepo:2", "vepo:x", "vepo:.2:3", "vepo:.2:.7:1", "nothing:.2", ""])
def test_a_selection_that_is_none_is_one_line(text):
    with pytest.raises(UserError, match="write NAME:KEEP"):
        coverage.read_selections(text)


@pytest.fixture(scope="module")
def answered(loaded):
    """A few answers of an untrained model to problems of the tabletop, read twice: (rollout, signals, tokenizer)."""
    policy, processor = loaded
    problems = common.load_problems("toy@train:4")
    rollout = common.sample(policy, processor, problems, 3, seed=(1,), max_completion_length=16)
    noised = vepo.counterfactual(rollout.prompts, "noise", 2.0, (1, 7))
    with torch.no_grad():
        signals = common.read(coverage.look, rollout, policy, common.Reading(policy, noised))
    return rollout, signals, processor.tokenizer


@pytest.mark.parametrize("name", ["vepo", "all", "entropy", "jsd", "kl", "random", "bottom"])
def test_a_selection_keeps_its_share(answered, name):
    """As many tokens as vepo.py would keep of every answer; `all` keeps every one."""
    rollout, signals, tokenizer = answered
    keep = 1 if name == "all" else 0.4
    selection = coverage.Selection(name, name, keep, 0.7)
    kept_BT = coverage.kept_tokens(selection, rollout, signals, tokenizer=tokenizer, seed=(1, 7))
    wanted_BT = vepo.top_fraction(torch.rand_like(rollout.mask_BT), rollout.mask_BT, keep)
    assert kept_BT.sum(1).tolist() == wanted_BT.sum(1).tolist()
    assert (kept_BT * (1 - rollout.mask_BT)).sum() == 0


def test_selections_are_vepos_own(answered):
    """VEPO by vepo.py's score, entropy by its third signal, KL by the fourth number of `look`."""
    rollout, signals, tokenizer = answered
    jsd_BT, delta_BT, entropy_BT, kl_BT = signals
    mask_BT = rollout.mask_BT
    scores = {
        "vepo": vepo.vision_entropy_score(jsd_BT, delta_BT, entropy_BT, mask_BT, alpha=0.3),
        "kl": vepo.vision_entropy_score(kl_BT, delta_BT, entropy_BT, mask_BT, alpha=0.3),
        "entropy": entropy_BT,
        "jsd": jsd_BT,
    }
    for name, score_BT in scores.items():
        selection = coverage.Selection(name, name, 0.3, 0.3)
        kept_BT = coverage.kept_tokens(selection, rollout, signals, tokenizer=tokenizer, seed=(1, 7))
        assert torch.equal(kept_BT, vepo.top_fraction(score_BT, mask_BT, 0.3)), name


# --- counting ---------------------------------------------------------------------------------------------------------


def forced_answers(loaded, texts):
    """A rollout of given texts, two to each of two problems of one kind."""
    policy, processor = loaded
    problem = common.load_problems("toy@train:1")[0]
    rollout = common.forced(policy, processor, [problem] * len(texts), texts)
    rollout.group_B = torch.arange(len(texts)) // 2
    return rollout, processor.tokenizer


def test_tally_against_loops(loaded):
    rollout, tokenizer = forced_answers(loaded, ["<think>a b c</think>"] * 4)
    wrong_BT = torch.zeros_like(rollout.mask_BT)
    wrong_BT[0, 2] = wrong_BT[1, 4] = wrong_BT[3, 0] = 1
    kept_BT = torch.zeros_like(rollout.mask_BT)
    kept_BT[0, 2] = kept_BT[3, 0] = kept_BT[2, 1] = 1
    counts = coverage.Tally([coverage.Selection("x", "vepo", 0.2, 0.7)])
    for _ in range(2):
        counts.add(rollout, wrong_BT, {"x": kept_BT}, tokenizer)
    assert counts.wrong == [2, 1, 2, 1]
    assert counts.credited == {"x": [1, 1, 1, 1]}
    assert sum(counts.first.values()) == 6
    found = counts.result()["x"]
    assert found["coverage"][0] == pytest.approx(4 / 6)
    assert found["kept"] == pytest.approx(float(3 / rollout.mask_BT.sum()), abs=1e-5)


def settings(name, folder, place, *argv, module=coverage, **given):
    words = ["--model", folder, "--output_dir", str(place), *map(str, argv)]
    return parse_args(name, module.flags, argv=words, tables=coverage.TABLES, **given)


def test_a_whole_measurement(folder, tmp_path, capsys):
    """An untrained model is wrong from the start: the counts add up, and crediting all tokens covers all of it."""
    args = settings("coverage", folder, tmp_path / "out", "--dataset", "toy@train:5", "--num_generations", 2,
                    "--select", "all:1,vepo:0.2,random:0.5", "--max_completion_length", 12, toy=coverage.TOY)
    coverage.main(args)
    found = json.loads((tmp_path / "out/coverage.json").read_text())
    assert len(found["wrong"]) == 5 and sum(found["wrong"]) == sum(found["first"].values()) > 0
    assert found["selections"]["all:1"]["coverage"] == [1, 1, 1]
    assert found["selections"]["all:1"]["credited"] == found["wrong"]
    assert 0.2 <= found["selections"]["vepo:0.2"]["kept"] < 0.3
    assert (tmp_path / "out/coverage.png").stat().st_size > 10_000
    assert "first wrong tokens" in capsys.readouterr().out


def test_data_whose_right_answers_nobody_knows_is_one_line(folder, tmp_path):
    args = settings("coverage", folder, tmp_path / "out", "--dataset", "none")
    with pytest.raises(UserError, match="nobody knows all right answers"):
        coverage.main(args)
    assert not (tmp_path / "out").exists()


# --- the oracle -------------------------------------------------------------------------------------------------------


def test_an_oracle_marks_its_words(loaded):
    """In every style, cells are the words between the colon and the conclusion; conclusions all that follows them."""
    problem = next(one for one in common.load_problems("toy@train:8") if one["verifier"] == "digit")
    texts = list(traces(problem).values())
    rollout, tokenizer = forced_answers(loaded, texts)
    for oracle_name in oracle.ORACLES:
        marks_BT = oracle.oracle_scores(tokenizer, rollout, oracle_name)
        for b, text in enumerate(texts):
            ids = rollout.tokens_BT[b, :int(rollout.mask_BT[b].sum())]
            marked = "".join(
                tokenizer.decode(id) for id, mark in zip(ids, marks_BT[b].tolist(), strict=False) if mark)
            reading, _, conclusion = text.partition(":")[2].partition(" =")
            if oracle_name == "conclusions":
                assert marked == f" ={conclusion}<|im_end|>"
            else:
                said = "".join(letter for letter in reading if not letter.isdigit() and letter != ";")
                assert marked.split() == said.split()
    assert kinds([]) == []


def test_an_oracle_keeps_what_it_marks_and_top_fraction_what_it_always_did(answered):
    rollout = answered[0]
    score_BT = (torch.arange(rollout.mask_BT.numel()).view_as(rollout.mask_BT) % 3 == 0).float()
    assert torch.equal(oracle.keep_marked(score_BT, rollout.mask_BT, 1.0), score_BT * rollout.mask_BT)
    assert torch.equal(
        oracle.keep_marked(score_BT, rollout.mask_BT, 0.2), vepo.top_fraction(score_BT, rollout.mask_BT, 0.2))


def drive_oracle(folder, place, *flags):
    """One run of lab/oracle.py in this process."""
    words = ["--model", folder, "--output_dir", str(place), *map(str, (*SMALL, "--num_generations", 3, *flags))]
    defaults = dict(select="cells", keep=1.0)
    launch("oracle", oracle.main, oracle.flags, recipe=vepo.RECIPE | defaults, toy=vepo.TOY | defaults, argv=words)


def test_a_run_with_an_oracle_leaves_vepo_as_it_was(folder, tmp_path, monkeypatch):
    """It credits another share than --keep says, and afterwards vepo.py has its own functions again."""
    monkeypatch.setattr(vepo, "grade", even_length)  # a reward that an untrained model can earn
    before = dict(vars(vepo))
    monkeypatch.setattr(oracle, "oracle_scores", lambda tokenizer, rollout, name: (rollout.tokens_BT % 4 == 0).float())
    monkeypatch.setattr("lab.report.finish", no_page)
    drive_oracle(folder, tmp_path / "run", "--max_steps", 1)
    line = metrics(tmp_path / "run")[1]
    assert 0.05 < line["kept_fraction"] < 0.6
    assert vars(vepo) == before


@pytest.mark.parametrize("flags, said", [
    (("--select", "vepo"), "--select vepo is vepo.py's"), (("--keep", 0.5), "leave --keep at 1")])
def test_an_oracle_is_no_other_selection(folder, tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        drive_oracle(folder, tmp_path / "run", *flags)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_coverage_has_the_model_flags_alone():
    assert coverage.TABLES == (MODEL_FLAGS,)

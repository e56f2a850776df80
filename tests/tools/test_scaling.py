"""lab/scaling.py: exponents of costs that are known, and the whole command on the smallest cases."""

import json

from lab import scaling

import pytest

SECONDS = ("sampling", "attention, sampling", "updating", "attention, updating")


@pytest.mark.parametrize("fixed, slope, exponent", [(0.0, 2.0, 1.0), (5.0, 0.1, 1.0), (1.0, 3.0, 1.7), (0.5, 2.0, 0.6)])
def test_what_is_fixed_is_told_apart(fixed, slope, exponent):
    values = (4, 8, 16, 32, 64)
    found = scaling.fit(values, [fixed + slope * value**exponent for value in values])
    assert found["exponent"] == pytest.approx(exponent, abs=0.011)
    assert found["fixed"] == pytest.approx(fixed, abs=0.05 * (fixed + slope))
    assert found["error"] < 1e-3


def test_a_cost_that_falls_at_first_has_nothing_negative():
    found = scaling.fit((1, 2, 4, 8), [1.0, 2.5, 5.5, 11.5])  # 1.5·x − 0.5
    assert found["fixed"] == 0
    assert found["exponent"] > 1


def test_the_plain_slope_holds_what_is_fixed():
    values = (1, 2, 4, 8)
    assert scaling.plain_exponent(values, [3 * value**1.5 for value in values]) == pytest.approx(1.5)
    assert scaling.plain_exponent(values, [100 + value for value in values]) < 0.1


def test_every_dial_is_turned():
    """Wider, with larger pictures, more words: each case is what it says."""
    usual = scaling.case_of("G", 2)
    assert len(usual.rollout) == 2 * scaling.USUAL["count"]
    wide = scaling.case_of("width", 128).policy.config.get_text_config()
    assert wide.hidden_size == 128
    words = scaling.case_of("V", 1024).policy
    assert (words.vocabulary, words.lm_head.out_features) == (1024, 1024)
    large = scaling.case_of("picture", 4)
    assert large.rollout.prompts.grids[0].tolist() == [[1, 8, 8]]
    assert scaling.case_of("T", 5).rollout.mask_BT.shape[1] == 5


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "USUAL", dict(count=2, answers=2, length=3))
    monkeypatch.setattr(scaling, "RATIOS", {"G": (2, 3)})
    monkeypatch.setattr(scaling, "COSTS", {"T": (2, 4, 6, 8)})
    scaling.main(scaling.parse(["--pairs", "1", "--output", str(tmp_path / "scaling.json")]))
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [(row["dial"], row["value"]) for row in found["ratios"]] == [("G", 2), ("G", 3)]
    assert [row["value"] for row in found["costs"]] == [2, 4, 6, 8]
    for row in found["costs"]:
        for phase in ("sampling", "updating"):
            assert 0 < row["seconds"][f"attention, {phase}"] < row["seconds"][phase]
    fitted = {row["what"] for row in found["exponents"]}
    assert fitted == {*found["costs"][0]["seconds"], "others, sampling", "others, updating"}
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert "exponent" in capsys.readouterr().out


def test_some_dials_are_measured_again(tmp_path, monkeypatch):
    """Their rows are new, the others stay, and all exponents are fitted anew."""
    output = tmp_path / "scaling.json"
    argv = ["--dials", "V", "--output", str(output)]
    with pytest.raises(scaling.UserError, match="measure all of them first"):
        scaling.main(scaling.parse(argv))

    def seconds(whole):
        return {what: whole / 2 if "attention" in what else whole for what in SECONDS}

    before = [dict(dial=dial, value=value, seconds=seconds(1.0)) for dial in "TV" for value in (2, 4)]
    output.write_text(json.dumps(dict(ratios=[dict(dial="G", value=4, sampling=2.0, updating=3.0)], costs=before)))
    monkeypatch.setattr(scaling, "COSTS", {"T": (2, 4), "V": (2, 4)})
    monkeypatch.setattr(scaling, "case_of", lambda dial, value: value)
    monkeypatch.setattr(scaling, "costs", lambda value, pairs: seconds(value + 1.0))
    monkeypatch.setattr(scaling, "draw", lambda found, path: path)
    scaling.main(scaling.parse(argv))
    found = json.loads(output.read_text())
    assert [row["seconds"]["updating"] for row in found["costs"]] == [1.0, 1.0, 3.0, 5.0]
    assert found["ratios"][0]["sampling"] == 2.0
    assert {row["dial"] for row in found["exponents"]} == {"T", "V"}

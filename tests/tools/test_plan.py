"""lab/plan.py: what a run needs at real size. Its peaks of memory are measured by lab/peaks.py."""

import dataclasses
import json

from harness import memory
from lab import bench, peaks, plan
from lab.shapes import SHAPES, config_of

import pytest
from conftest import ROOT

WORK = memory.Work(S=1400, patches=5000, T=350, T_most=2048, G=12, wave=1024, row=12)


def gpus(number, gigabytes=80):
    return memory.Machine(number, gigabytes * plan.GB)


@pytest.fixture(scope="module")
def weights():
    return {name: memory.count_weights(config_of(name)) for name in SHAPES}


@pytest.mark.parametrize("name, published", [("3B", 3.75), ("7B", 8.29), ("32B", 33.5), ("72B", 73.4)])
def test_as_many_weights_as_published(weights, name, published):
    """In billions, as the model cards give them."""
    assert weights[name].all / 1e9 == pytest.approx(published, rel=0.005)


def test_the_parts_of_a_model_are_its_whole(weights):
    config = config_of("7B")
    seven = weights["7B"]
    layers = config.get_text_config().num_hidden_layers
    assert layers * seven.layer + seven.outside < seven.all
    assert seven.trained < seven.all
    assert memory.count_weights(config, train_vision=True).trained == seven.all


def test_what_it_depends_on(weights):
    """More GPUs share the masters; longer answers, larger waves and rows take more."""
    config = config_of("7B")

    eight = gpus(8)

    def total(phase, machine=eight, **changes):
        return sum(phase(config, weights["7B"], dataclasses.replace(WORK, **changes), machine).values())

    assert total(memory.sampling, gpus(4)) - total(memory.sampling, gpus(8)) == pytest.approx(
        (4 * weights["7B"].all + 8 * weights["7B"].trained) / 8)
    assert total(memory.sampling, T_most=1024) < total(memory.sampling)
    assert total(memory.sampling, wave=256) < total(memory.sampling)
    assert total(memory.updating, row=4) < total(memory.updating)
    assert total(memory.updating, T=2048) > total(memory.updating)


def test_the_largest_wave_that_fits(weights):
    """One group more would not fit; and what is said to fit does."""
    config = config_of("7B")
    machine = gpus(8)
    found = plan.fit(config, weights["7B"], WORK, machine)
    assert found.wave % WORK.G == 0
    room = machine.memory * plan.MARGIN
    assert sum(memory.sampling(config, weights["7B"], found, machine).values()) <= room
    larger = dataclasses.replace(found, wave=found.wave + WORK.G)
    assert sum(memory.sampling(config, weights["7B"], larger, machine).values()) > room
    assert found.row == WORK.G


def test_seven_billion_do_not_fit_on_one_gpu(capsys):
    bench.main(bench.parse(["--plan", "7B", "--gpus", "1"]))
    assert "DOES NOT FIT while sampling" in capsys.readouterr().out
    bench.main(bench.parse(["--plan", "7B", "--gpus", "8", "--teacher", "72B"]))
    said = capsys.readouterr().out
    assert "fits with --sample_batch_size" in said
    assert "teacher, split" in said


def test_a_model_that_is_none(capsys):
    with pytest.raises(bench.UserError, match="no/model is none of 3B, 7B, 32B, 72B, and no model that can be read"):
        bench.show_plan(bench.parse(["--plan", "no/model"]))


def test_the_plan_is_within_a_fifth_of_what_was_measured(processor):
    """results/peaks.json: `python lab/peaks.py`. Whoever changes the plan measures again."""
    rows = json.loads((ROOT / "results/peaks.json").read_text())
    assert {row["shape"][0] for row in rows} == {"sampling", "updating"}
    for row in rows:
        phase, hidden, layers, width, vocabulary, *_ = row["shape"]
        config = peaks.config_of(
            processor.tokenizer, hidden, layers=layers, width=width, vocabulary=vocabulary)
        assert peaks.planned(config, row["shape"], row["S"]) == pytest.approx(row["planned"])
        assert 0.8 < row["planned"] / row["measured"] < 1.2, row


@pytest.mark.slow
@pytest.mark.parametrize("shape", [
    ("updating", 512, 4, 512, 2000, 8, 128, 1),
    ("sampling", 512, 8, 1536, 8000, 6, 64, 4),
], ids=["updating", "sampling"])
def test_peaks_of_shapes_that_were_not_fitted(shape):
    assert 0.8 < peaks.measured_alone(shape)["ratio"] < 1.2

"""lab/gpu.py on a CPU: the sums by hand, and every case of a tiny model through the path that a GPU takes."""

import dataclasses
import json

from harness import memory
from lab import bench, gpu
from lab.shapes import config_of

import pytest

WORK = memory.Work(S=100, patches=300, T=10, T_most=10, G=4, wave=8, row=4)
MACHINE = dict(name="one", memory=10**12, bandwidth=1e9, flops=1e9, torch="2", transformers="5")


def test_bytes_of_decoding_against_a_sum():
    """Two waves; at every token the weights once, each prompt once, and of each answer what it has so far."""
    config = config_of("7B")
    weights = 7_615_616_512 - 152_064 * 3584  # of the text, without its table of embeddings
    place = 57_344 // 2  # numbers
    expected = 0
    for token in range(1, 11):
        expected += 2 * weights + 3 * 100 * place + 12 * token * place
    extra = gpu.decoded_bytes(config, WORK, problems=3, number=2)
    assert extra == pytest.approx(2 * expected)
    assert gpu.weights_of_text(config_of("3B"), memory.count_weights(config_of("3B"))) == 3_085_938_688


def test_operations_are_six_for_each_weight_and_token():
    """A model that is almost only its text, a prompt that is short: 6·N·tokens."""
    config = config_of("7B")
    short = memory.Work(S=1, patches=0, T=100, T_most=100, G=4, wave=8, row=4)
    weights = gpu.weights_of_text(config, memory.count_weights(config))
    assert gpu.model_flops(config, short, problems=2) == pytest.approx(6 * weights * 2 * 400, rel=0.01)
    usual = gpu.model_flops(config, WORK, problems=2)
    assert gpu.model_flops(config, WORK, problems=4) == pytest.approx(2 * usual)
    longer = gpu.model_flops(config, dataclasses.replace(WORK, S=WORK.S + 1000), problems=2)
    body = weights - 152_064 * 3584  # a prompt's tokens do not pass the head
    assert longer - usual == pytest.approx(6 * body * 2 * 1000, rel=0.03)


def tiny(tmp_path, *argv):
    return gpu.parse([
        "--shapes", "tiny", "--device", "cpu", "--problems", "2", "--num_generations", "2",
        "--max_completion_length", "4", "--pixels", "10000", "--output", str(tmp_path / "gpu.md"), *argv])


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "NOWHERE", str(tmp_path / "nowhere"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.parametrize("case", ["grpo", "opd", gpu.READING])
def test_a_case_of_a_tiny_model(tmp_path, capsys, case):
    gpu.main(tiny(tmp_path, "--one", case, "--shape", "tiny", "--machine", json.dumps(MACHINE)))
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["tokens"] <= 2 * 2 * 4
    assert min(row["seconds_sample"], row["seconds_update"], row["bandwidth_share"], row["flops_share"]) > 0
    assert row["peak_gb"] > 0.1
    if case != gpu.READING:
        assert 0 < row["planned_gb"] < 1


def test_what_fails_and_what_does_not_fit_stands_in_the_table(tmp_path, monkeypatch):
    """And the model that does not fit with its optimizer is sampled and read."""
    good = dict(
        seconds_sample=2.0, seconds_update=1.0, tokens_per_second_sample=1000, tokens_per_second_update=2000,
        bandwidth_share=0.25, flops_share=0.5, peak_gb=70.0)

    def alone(args, one, shape=None, machine=None):
        if one == "machine":
            return MACHINE
        if shape == "7B" and one == "grpo":
            return dict(skipped="does not fit by the plan")
        if shape == "7B" and one != gpu.READING:
            return dict(failed="status 1: out of memory")
        return good | dict(seconds_sample=dict(vepo=5.0).get(one, 2.0), planned_gb=71.0)

    monkeypatch.setattr(gpu, "measure_alone", alone)
    args = tiny(tmp_path)
    args.shapes = ["3B", "7B"]
    lines = gpu.table(args, gpu.measure(args)).splitlines()[6:]
    assert lines == [
        "| 3B grpo | 1,000 tokens/s | 2,000 tokens/s | 25.0% | 50.0% | 70.0, 71.0 GB | 1.00 |",
        "| 3B vepo | 1,000 tokens/s | 2,000 tokens/s | 25.0% | 50.0% | 70.0, 71.0 GB | 2.00 |",
        "| 3B opd | 1,000 tokens/s | 2,000 tokens/s | 25.0% | 50.0% | 70.0, 71.0 GB | 1.00 |",
        "| 7B grpo | does not fit by the plan | | | | | |",
        "| 7B sampling and reading | 1,000 tokens/s | 2,000 tokens/s | 25.0% | 50.0% | 70.0, 71.0 GB |  |",
        "| 7B vepo | status 1: out of memory | | | | | |",
        "| 7B opd | status 1: out of memory | | | | | |",
    ]


def test_a_real_size_without_a_gpu_is_refused(tmp_path):
    args = tiny(tmp_path)
    args.shapes = ["7B"]
    with pytest.raises(gpu.UserError, match="there is no GPU here"):
        gpu.main(args)


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    """Every case in a process of its own."""
    gpu.main(tiny(tmp_path))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["case"] for row in found["rows"]] == list(gpu.SCRIPTS)
    assert all(row["seconds_sample"] > 0 for row in found["rows"])
    assert found["machine"]["bandwidth"] > 1e9
    assert (tmp_path / "gpu.md").read_text() == capsys.readouterr().out

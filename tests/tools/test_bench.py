"""lab/bench.py measures what it says: both sides do the same work, and the real sizes are the real sizes."""

import json

from common import Policy
from lab import bench

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForImageTextToText


@pytest.fixture
def measure(folder, tmp_path, monkeypatch):
    """Runs a small benchmark; returns the numbers that it wrote."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # main sets it; this puts it back
    monkeypatch.setattr(bench, "SHARES", {0.25: ">= 3"})
    monkeypatch.setattr(bench, "MICRO", 4)
    monkeypatch.setattr(bench, "VOCABULARY", 4096)
    monkeypatch.setattr(bench, "LENGTH", 16)
    nowhere = tmp_path / "nowhere"
    monkeypatch.setattr(bench, "NOWHERE", str(nowhere))
    output = tmp_path / "bench" / "out.json"
    flags = dict(
        pairs=1, problems=4, num_generations=3, max_completion_length=8, pixels=10_000, model=folder, output=output)

    def run(*argv):
        small = [f"--{name}={value}" for name, value in flags.items()]
        bench.main(bench.parse([*small, *argv]))
        assert not nowhere.exists()  # the runs that are measured write nothing
        return json.loads(output.read_text())["numbers"]

    return run


def test_the_parts_and_that_both_sides_agree(measure, capsys, monkeypatch):
    monkeypatch.setattr(bench, "trl", None)
    rows = measure("--parts", "sampler", "update", "trl", "memory")
    assert [row["part"] for row in rows] == ["sampler"] * 2 + ["update"] * 2 + ["memory"]
    assert [row["greedy_gap"] for row in rows[:2]] == [0, 0]
    for row in rows[2:4]:
        assert row["loss_gap"] < 1e-5
        assert row["gradient_gap"] < 1e-5
    for row in rows:
        assert row["ratio"] > 0 or row["part"] == "memory"  # so little memory may have been free already
        assert row["met"] in (True, False)
    assert rows[0]["seconds"][1] / rows[0]["seconds"][0] == pytest.approx(rows[0]["ratio"])  # one pair
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7  # the head, the five rows, and one about TRL
    assert sum(line.startswith("trl       skipped") for line in lines) == 1


def test_the_file_that_is_written_and_the_table(measure, tmp_path, capsys):
    row, = measure("--parts", "memory")
    about = json.loads((tmp_path / "bench" / "out.json").read_text())
    assert list(about) == [*vars(bench.parse([])), "torch", "transformers", "numbers"]
    assert list(row) == ["part", "case", "sides", "wanted", "ratio", "met"]
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"memory    V = 4,096                 GB                {row['ratio']:6.2f}  <= 1.5"


@pytest.mark.parametrize("ratio, wanted, met", [
    (2.0, ">= 1.8", True), (1.8, ">= 1.8", True), (1.0, ">= 1.8", False), (1.0, "<= 1.5", True), (2.0, "<= 1.5", False),
])
def test_when_a_bound_is_met(ratio, wanted, met):
    assert bench.is_met(ratio, wanted) == met


def test_steps_of_both_scripts(measure):
    rows = measure("--parts", "vepo")
    assert [row["case"][-1] for row in rows] == ["1", "4"]
    assert all(min(row["seconds"]) > 0 for row in rows)


def test_what_clustering_takes_of_a_step(measure, monkeypatch):
    """By a clock that only these functions move, at each call more: which of them are counted, and in which step."""
    clock = [0.0]
    ticks = {}  # {function: how far each of its calls moved the clock}

    def make_slow(module, name, cost):
        plain = getattr(module, name)
        ticks[name] = []

        def slow(*args, **kwargs):
            tick = cost * (len(ticks[name]) + 1)
            ticks[name].append(tick)
            clock[0] += tick
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, name, slow)

    monkeypatch.setattr(bench.time, "process_time", lambda: clock[0])
    make_slow(bench.mupo, "reasoning", 1e-4)
    make_slow(bench.embedding, "ngrams", 1.0)
    make_slow(bench.mupo, "partition", 0.1)
    make_slow(bench.mupo, "diversity", 0.01)
    make_slow(bench.mupo, "update", 50.0)
    row, = measure("--parts", "mupo", "--mupo_problems", "4")
    calls = {name: len(some) for name, some in ticks.items()}
    assert calls == dict(reasoning=2 * 60, ngrams=2, partition=2 * 4, diversity=2 * 4, update=2)
    second = {name: sum(some[len(some) // 2:]) for name, some in ticks.items()}
    step = sum(second.values())
    embedding = second["reasoning"] + second["ngrams"]
    clustering = second["partition"] + second["diversity"]
    assert row["seconds"] == pytest.approx([step, embedding, clustering])
    assert row["ratio"] == pytest.approx((embedding + clustering) / step)
    assert 0 < row["ratio"] < 1


def test_in_turn_divides_the_second_by_the_first():
    times = bench.in_turn(lambda: 2.0, lambda: 3.0, 3, cost=bench.own_seconds)
    assert times == dict(seconds=[2.0, 3.0], ratio=1.5)


def test_generate_counts_up_to_the_end_token(policy, processor, problems, monkeypatch):
    end = policy.ends[0]
    word = 5
    rows = torch.tensor([[word, end, word, end], [word, word, word, word], [end, end, end, end]])

    def generate(input_ids, **others):
        return torch.cat([input_ids[:1].expand(3, -1), rows], 1)

    monkeypatch.setattr(policy, "generate", generate)
    assert bench.generate(policy, processor, problems[:1], G=3, T=4) == 2 + 4 + 1


def test_plain_gradient_sees_a_difference(policy, processor, problems):
    """The gap is not small by construction: one answer's credit changed, and it is large."""
    rollout = bench.invent(processor, problems[:2], 2, 6)
    rollout.mask_BT[0, 2:] = 0
    credit = torch.tensor([1.0, -1.0, 0.5, 2.0])
    for plain in (False, True):  # at a ratio of 1 the loss is minus the mean credit of a token
        loss, _ = bench.backward(policy, rollout, credit, plain=plain)
        assert loss == pytest.approx(-(2 * 1.0 - 6 * 1.0 + 6 * 0.5 + 6 * 2.0) / 20, abs=1e-5)
    packed = bench.backward(policy, rollout, credit)
    same = bench.gaps(packed, bench.backward(policy, rollout, credit, plain=True))
    assert same["loss_gap"] < 1e-5
    assert same["gradient_gap"] < 1e-5
    other_credit = credit * torch.tensor([1.0, 1, 1, 1.1])
    other = bench.gaps(packed, bench.backward(policy, rollout, other_credit, plain=True))
    assert other["loss_gap"] > 1e-3
    assert other["gradient_gap"] > 1e-3


@pytest.mark.parametrize("shape, weights", [("3B", 3_754_622_976), ("7B", 8_292_166_656)])
def test_real_shapes_have_as_many_weights_as_the_real_models(shape, weights, processor):
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(bench.shape_config(shape))
    model.tie_weights()
    assert sum(weight.numel() for weight in model.parameters()) == weights


def test_shape_mode_runs_grpo_with_the_whole_head(measure, monkeypatch):
    widths = set()
    head = Policy.head
    set_vocabulary = Policy.set_vocabulary

    def watched(*args):
        logits_NV = head(*args)
        widths.add(logits_NV.shape[1])
        return logits_NV

    monkeypatch.setattr(Policy, "head", watched)
    numbers = measure("--shape", "tiny", "--device", "cpu")
    assert widths == {512}  # the tabletop's tokenizer names fewer
    assert list(numbers) == [
        "tokens_per_second_sample", "tokens_per_second_update", "cpu", "tokens", "prompt_tokens",
        "peak_memory_gb"]
    assert numbers["tokens"] <= 4 * 3 * 8
    assert numbers["peak_memory_gb"] > 0.1
    assert min(numbers["tokens_per_second_sample"], numbers["tokens_per_second_update"]) > 0
    assert Policy.set_vocabulary is set_vocabulary  # replaced for the measurement only


def test_a_missing_gpu_is_one_line(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as exit:
        bench.parse(["--shape", "7B", "--device", "cuda"])
    assert exit.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_place_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(bench.UserError, match="--output"):
        bench.main(bench.parse(["--output", str(file / "bench.json")]))

"""lab/bench.py measures what it says: both sides do the same work, and the real sizes are the real sizes."""

import json

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForImageTextToText

import common
from lab import bench


@pytest.fixture
def measure(folder, tmp_path, monkeypatch):
    """Runs the benchmark in small; returns the numbers that it wrote."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # main sets it; this puts it back
    monkeypatch.setattr(bench, "SHARES", (0.25,))
    monkeypatch.setattr(bench, "MICRO", 4)
    monkeypatch.setattr(bench, "VOCABULARY", 4096)
    monkeypatch.setattr(bench, "LENGTH", 16)
    sizes = "--pairs 1 --problems 4 --num_generations 3 --max_completion_length 8 --pixels 10000".split()

    def run(*argv):
        output = tmp_path / "bench" / "out.json"
        bench.main(bench.parse([*sizes, "--model", folder, "--output", str(output), *argv]))
        return json.loads(output.read_text())["numbers"]

    return run


def test_the_parts_and_that_both_sides_agree(measure, capsys, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    rows = measure("--parts", "sampler", "update", "trl", "memory")
    assert [row["part"] for row in rows] == ["sampler"] * 2 + ["update"] * 2 + ["memory"]
    for row in rows[2:4]:
        assert row["loss_gap"] < 1e-5 and row["gradient_gap"] < 1e-5
    assert all(row["ratio"] > 0 and row["met"] in (True, False) for row in rows)
    assert rows[0]["seconds"][1] / rows[0]["seconds"][0] == pytest.approx(rows[0]["ratio"])  # one pair
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("trl       skipped") for line in lines) == 1 and len(lines) == 7


def test_steps_of_both_scripts(measure):
    rows = measure("--parts", "vepo")
    assert [row["case"][-1] for row in rows] == ["1", "4"] and all(min(row["seconds"]) > 0 for row in rows)


def test_what_clustering_takes_of_a_step(measure, monkeypatch):
    """By a clock that only these functions move, at each call more: which of them are counted, and in which step."""
    clock, cost = [0.0], dict(reasoning=1e-4, ngrams=1.0, partition=0.1, diversity=0.01, update=50.0)

    def slow(name, plain, calls):
        def tick(*args, **kwargs):
            calls.append(cost[name] * (len(calls) + 1))
            clock[0] += calls[-1]
            return plain(*args, **kwargs)
        return tick

    monkeypatch.setattr(bench.time, "process_time", lambda: clock[0])
    ticks = {name: [] for name in cost}
    for name, calls in ticks.items():
        monkeypatch.setattr(bench.mupo, name, slow(name, getattr(bench.mupo, name), calls))
    row, = measure("--parts", "mupo", "--mupo_problems", "4")
    assert [len(calls) for calls in ticks.values()] == [2 * 60, 2, 2 * 4, 2 * 4, 2]
    second = {name: sum(calls[len(calls) // 2:]) for name, calls in ticks.items()}
    embedding, clustering = second["reasoning"] + second["ngrams"], second["partition"] + second["diversity"]
    assert row["seconds"] == pytest.approx([sum(second.values()), embedding, clustering])
    assert 0 < row["ratio"] < 1 and row["ratio"] == pytest.approx((embedding + clustering) / sum(second.values()))


def test_in_turn_divides_the_second_by_the_first():
    times = bench.in_turn(lambda: 2.0, lambda: 3.0, 3, cost=lambda fn: fn())
    assert times == dict(seconds=[2.0, 3.0], ratio=1.5)


def test_generate_counts_up_to_the_end_token(policy, processor, problems, monkeypatch):
    end, word = policy.ends[0], 5
    rows = torch.tensor([[word, end, word, end], [word, word, word, word], [end, end, end, end]])
    monkeypatch.setattr(policy, "generate", lambda input_ids, **_: torch.cat([input_ids[:1].expand(3, -1), rows], 1))
    assert bench.generate(policy, processor, problems[:1], 3, 4) == 2 + 4 + 1


def test_plain_gradient_sees_a_difference(policy, processor, problems):
    """The gap is not small by construction: one answer's credit changed, and it is large."""
    rollout, credit = bench.invent(processor, problems[:2], 2, 6), torch.tensor([1.0, -1.0, 0.5, 2.0])
    rollout.mask_BT[0, 2:] = 0
    for plain in (False, True):  # at a ratio of 1 the loss is minus the mean credit of a token
        loss = bench.backward(policy, rollout, credit, plain)[0]
        assert loss == pytest.approx(-(2 * 1.0 - 6 * 1.0 + 6 * 0.5 + 6 * 2.0) / 20, abs=1e-5)
    same = bench.gaps(bench.backward(policy, rollout, credit), bench.backward(policy, rollout, credit, plain=True))
    assert same["loss_gap"] < 1e-5 and same["gradient_gap"] < 1e-5
    other = credit * torch.tensor([1.0, 1, 1, 1.1])
    gap = bench.gaps(bench.backward(policy, rollout, credit), bench.backward(policy, rollout, other, plain=True))
    assert gap["loss_gap"] > 1e-3 and gap["gradient_gap"] > 1e-3


@pytest.mark.parametrize("shape, weights", [("3B", 3_754_622_976), ("7B", 8_292_166_656)])
def test_real_shapes_have_as_many_weights_as_the_real_models(shape, weights, processor):
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(bench.shape_config(shape, processor.tokenizer))
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == weights


def test_shape_mode_runs_grpo_with_the_whole_head(measure, monkeypatch):
    widths, head = set(), common.Policy.head
    monkeypatch.setattr(common.Policy, "head", lambda *args: (logits := head(*args), widths.add(logits.shape[1]))[0])
    numbers = measure("--shape", "tiny", "--device", "cpu")
    assert widths == {512}  # the tabletop's tokenizer names fewer
    assert numbers["tokens"] <= 4 * 3 * 8 and numbers["peak_memory_gb"] > 0.1
    assert min(numbers["tokens_per_second_sample"], numbers["tokens_per_second_update"]) > 0
    assert not hasattr(common.Policy, "vocabulary")  # patched for the measurement only


def test_a_missing_gpu_is_one_line(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as exit:
        bench.parse(["--shape", "7B", "--device", "cuda"])
    assert exit.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1

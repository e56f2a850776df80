"""What a copy of grpo.py may do: what is right on one process is right on two, and the loop may be left by `break`."""

import argparse
import json

import common
from harness.run import Run

import pytest
from conftest import ROOT
from whole_runs import drive, gradient, metrics


def fork(place, *changes):
    """A copy of grpo.py in the folder `place`, with every (old text, new text) of `changes` exchanged."""
    text = (ROOT / "grpo.py").read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"grpo.py does not hold this once: {old}"
        text = text.replace(old, new)
    path = place / "fork.py"
    path.write_text(text)
    return path


def source_of(name):
    """The text of a top-level function of grpo.py."""
    text = (ROOT / "grpo.py").read_text()
    start = text.index(f"def {name}(")
    return text[start:text.index("\n\n\n", start)]


# --- padding passes ---------------------------------------------------------------------------------------------------

# GSPO as one would first write it: a ratio of whole answers, the geometric mean over an answer's tokens. Its division
# has no guard, and needs none, because no answer is empty.
NAIVE_GSPO = '''\
def policy_loss(logp_BT, old_logp_BT, advantage_BT, mask_BT, epsilon, epsilon_high):
    log_ratio_B = ((logp_BT - old_logp_BT) * mask_BT).sum(1) / mask_BT.sum(1)
    ratio_BT = torch.exp(log_ratio_B)[:, None].expand_as(logp_BT)
    clipped_BT = ratio_BT.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)


CREDITED = {credited}


def some_credit(problem, text):
    """Answers to some problems are as good as they are long. All answers to others are worth nothing."""
    return float(len(text)) if problem["id"] in CREDITED else 0.0'''


def ids_of_shares(rank, updates):
    """The ids of the problems of step 1 that go to one of two processes, a list for each of its updates."""
    settings = argparse.Namespace(prompts_per_step=8, updates_per_step=updates, seed=1)
    process = argparse.Namespace(args=settings, rank=rank, world=2)
    problems = Run.batch(process, common.load_problems("toy@train:8"), 1)
    ids = [problem["id"] for problem in problems]
    size = len(ids) // updates
    return [ids[start:start + size] for start in range(0, len(ids), size)]


def naive_gspo(place, credited):
    """grpo.py as GSPO, with credit for the answers to some problems alone."""
    return fork(
        place,
        (source_of("policy_loss"), NAIVE_GSPO.format(credited=credited)),
        ("advantage_bT, **clip)\n            clipped_bT",
         "advantage_bT, mask_BT[batch], **clip)\n            clipped_bT"),
        ("rollout.score(grade, judge)", "rollout.score(some_credit)"),
    )


def test_trap_padding_pass(folder, tmp_path):
    """One process or two, a formula that divides by the length of an answer gives the same losses and gradients.

    In the first update the one process has two groups with credit, the other none: it makes two passes that do not
    count. In the second one has two, the other one.
    """
    first, second = ids_of_shares(0, updates=2), ids_of_shares(1, updates=2)
    script = naive_gspo(tmp_path, credited=[*second[0], *first[1], second[1][0]])
    flags = (
        "--dataset", "toy@train:8",
        "--eval_dataset", "none",
        "--updates_per_step", 2,
        "--micro_batch_size", 3,  # one group to a pass
        "--max_completion_length", 12,
        "--average", "answer",
        "--max_steps", 1,
        "--learning_rate", 1e-4,
    )
    one = drive(folder, tmp_path / "one", *flags, script=script)
    two = drive(folder, tmp_path / "two", *flags, script=script, processes=2)
    assert json.loads((one / "real_passes.json").read_text()) == [[2, 3]]
    assert json.loads((two / "real_passes.json").read_text()) == [[0, 2], [2, 1]]
    assert json.loads((two / "padding.json").read_text()) == [2, 1]

    line, = metrics(one)
    assert line["grad_norm"] > 0.01
    assert metrics(two) == [pytest.approx(line, rel=1e-5, abs=1e-7)]  # abs: the loss is a sum of ±1 that cancels
    for update in (1, 2):
        expected = gradient(one, update)
        assert expected.norm() > 0.01
        assert (gradient(two, update) - expected).norm() < 1e-5 * expected.norm()


# --- a loop that is left early ----------------------------------------------------------------------------------------

BEGINNING = "    for step in run.steps():\n"
END = "            run.save_checkpoint(step)\n"
BREAK = "        if step == 2:\n            break\n"


@pytest.mark.parametrize("place, done", [(BEGINNING, 1), (END, 2)], ids=["at the beginning", "at the end"])
def test_trap_early_break(capsys, folder, tmp_path, place, done):
    """A loop that is left by `break` leaves a model that can be loaded and a page, and says when it ended."""
    script = fork(tmp_path, (place, place + BREAK))
    flags = ("--eval_dataset", "none", "--updates_per_step", 1, "--max_completion_length", 8, "--max_steps", 5)
    run = drive(folder, tmp_path / "run", *flags, "--save_steps", 1, script=script, page=True)
    assert f"ended after step {done} of 5" in capsys.readouterr().err
    assert [line["step"] for line in metrics(run)] == list(range(1, done + 1))
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "<html" in (run / "report.html").read_text()
    assert not list(run.glob("checkpoint*"))
    before = common.load_policy(folder)[0].state_dict()
    after = common.load_policy(str(run))[0].state_dict()
    assert before.keys() == after.keys()
    assert not all((after[name] == weight).all() for name, weight in before.items())

"""harness.rollout: answers that are indexed, selected by group, joined and scored stay the answers that they were."""

import dataclasses
import functools

from common import forced, read, sample, token_logps
from harness.flags import UserError
from harness.rollout import join, select_groups

import pytest
import torch
from references import draw

G = 4


@pytest.fixture(scope="module")
def whole(loaded, problems):
    """Four answers to each of five problems."""
    return draw(*loaded, problems, G=G)


def score_of(problem, text):
    """A reward that differs between problems and between answers: the problem's number, and the text's length."""
    return 100 * int(problem["id"][1:]) + len(text)


def logps(policy, rollout):
    with torch.no_grad():
        return read(token_logps, rollout, policy)


def answers_of(places, numbers=range(G)):
    """Where the answers `numbers` to the problems at `places` are in a rollout of G answers to each problem."""
    return torch.tensor([G * p + g for p in places for g in numbers])


def assert_same_answers(rollout, whole, index_b):
    """`rollout` holds the answers `index_b` of `whole`, in as many columns as it needs."""
    assert rollout.texts == [whole.texts[b] for b in index_b]
    assert [problem["id"] for problem in rollout.problems] == [whole.problems[b]["id"] for b in index_b]
    assert (rollout.finished_B == whole.finished_B[index_b]).all()
    T = min(rollout.mask_BT.shape[1], whole.mask_BT.shape[1])
    for name in ("tokens_BT", "mask_BT", "logp_BT", "entropy_BT"):
        ours_BT = getattr(rollout, name)
        theirs_BT = getattr(whole, name)[index_b]
        inside_BT = whole.mask_BT[index_b][:, :T].bool()
        gap_BT = (ours_BT[:, :T] - theirs_BT[:, :T]).abs()
        assert (gap_BT[inside_BT] < 1e-5).all(), name
    assert (rollout.mask_BT.sum(1) == whole.mask_BT[index_b].sum(1)).all()


# --- scores of a subset -----------------------------------------------------------------------------------------------

# What is taken of the rollout, and where its scores are among those of the whole.
SUBSETS = {
    "all of it": (range(5), range(G)),
    "whole groups": ([1, 2, 4], range(G)),
    "groups in another order": ([4, 0, 2], range(G)),
    "some answers of each group": (range(5), [0, 2]),
    "some answers in another order": (range(5), [3, 0, 2]),
    "one answer of some groups": ([3, 1], [2]),
    "a single group": ([3], range(G)),
    "a single answer": ([2], [1]),
}


@pytest.mark.parametrize("subset", SUBSETS)
def test_trap_regrouped_subset(policy, whole, subset):
    """Scores of a subset are those of the whole, indexed; so is what a model reads of it."""
    places, numbers = SUBSETS[subset]
    index_b = answers_of(places, numbers)
    part = whole[index_b]
    assert_same_answers(part, whole, index_b)
    expected_PG = whole.score(score_of)[list(places)][:, list(numbers)]
    assert part.score(score_of).tolist() == expected_PG.tolist()
    assert (logps(policy, part) - logps(policy, whole)[index_b]).abs().max() < 1e-5


# Each of these can be reshaped to a table of equal rows, but the rows would hold answers to different problems.
NO_GROUPS = {
    "one group is smaller": [0, 1, 2, 3, 4, 5],
    "one group is smaller, the first": [0, 4, 5, 6],
    "the answers in turn": [0, 4, 1, 5, 2, 6, 3, 7],
    "a group that is torn apart": [0, 1, 4, 5, 6, 7, 2, 3],
    "two groups, answers taken by their reward": [0, 1, 2, 7],
}


@pytest.mark.parametrize("subset", NO_GROUPS)
def test_what_is_no_groups_of_one_size_has_no_table_of_scores(whole, subset):
    """(P, G) would mix problems, without a word: it is an error that says what to do."""
    part = whole[torch.tensor(NO_GROUPS[subset])]
    with pytest.raises(ValueError, match="index the scores"):
        part.score(score_of)


def test_a_mask_of_answers_is_as_good_as_their_places(whole):
    index_b = answers_of([1, 3])
    chosen_B = torch.zeros(len(whole), dtype=torch.bool)
    chosen_B[index_b] = True
    assert_same_answers(whole[chosen_B], whole, index_b)
    assert len(whole[chosen_B]) == 2 * G


# --- groups that are selected -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [[0, 1, 2, 3, 4], [1, 3], [4, 2, 0], [2]])
def test_selected_groups_stay_what_they_were(policy, whole, places):
    """Texts, problems, scores, and what a model reads of them: pictures and prompts go with their answers."""
    index_b = answers_of(places)
    part = select_groups(whole, places)
    assert_same_answers(part, whole, index_b)
    assert [problem["id"] for problem in part.prompts.problems] == [f"p{p}" for p in places]
    assert set(part.pictures) == {f"p{p}" for p in places}
    assert part.score(score_of).tolist() == whole.score(score_of)[places].tolist()
    assert (logps(policy, part) - logps(policy, whole)[index_b]).abs().max() < 1e-5


def test_selecting_no_group_gives_an_empty_rollout_that_can_be_joined(policy, whole):
    """DAPO's first draw may leave nothing to keep."""
    nothing = select_groups(whole, [])
    assert len(nothing) == 0
    for joined in (join(nothing, whole), join(whole, nothing)):
        assert_same_answers(joined, whole, torch.arange(len(whole)))
        assert joined.score(score_of).tolist() == whole.score(score_of).tolist()
        assert (logps(policy, joined) - logps(policy, whole)).abs().max() < 1e-5


def test_a_selection_leaves_the_rollout_as_it_was(whole):
    before = dataclasses.replace(whole)
    select_groups(whole, [3, 1])
    join(whole, whole)
    assert whole.group_B is before.group_B
    assert len(whole.prompts.problems) == 5
    assert len(whole.prompts.ids) == 5


# --- rollouts that are joined -----------------------------------------------------------------------------------------


def test_a_joined_rollout_is_its_parts_one_behind_the_other(policy, processor, problems, whole):
    """Answers of different lengths: sampled apart and joined, the problems give what they give together."""
    short = draw(policy, processor, problems[:2], G=G, max_completion_length=7)
    long = draw(policy, processor, problems[2:], G=G)
    assert short.mask_BT.shape[1] < long.mask_BT.shape[1]
    for first, second in ((short, long), (long, short)):
        joined = join(first, second)
        parts = [logps(policy, first), logps(policy, second)]
        read_BT = logps(policy, joined)
        assert joined.texts == first.texts + second.texts
        assert joined.problems == first.problems + second.problems
        scores = [*first.score(score_of).tolist(), *second.score(score_of).tolist()]
        assert joined.score(score_of).tolist() == scores
        start = 0
        for part, logp_BT in zip((first, second), parts, strict=True):
            index_b = torch.arange(start, start + len(part))
            T = logp_BT.shape[1]
            assert_same_answers(joined[index_b], part, torch.arange(len(part)))
            assert (read_BT[index_b, :T] - logp_BT).abs().max() < 1e-5
            assert (read_BT[index_b, T:] == 0).all()
            start += len(part)


def test_a_rollout_joined_from_halves_is_the_rollout_sampled_at_once(policy, processor, problems, whole):
    halves = [draw(policy, processor, some, G=G) for some in (problems[:2], problems[2:])]
    assert_same_answers(join(*halves), whole, torch.arange(len(whole)))


def test_selected_and_joined_again(policy, whole):
    """The groups of two selections, as DAPO keeps them: each with its own picture and prompt."""
    joined = join(select_groups(whole, [3, 0]), select_groups(whole, [4]))
    index_b = answers_of([3, 0, 4])
    assert_same_answers(joined, whole, index_b)
    assert joined.score(score_of).tolist() == whole.score(score_of)[[3, 0, 4]].tolist()
    assert (logps(policy, joined) - logps(policy, whole)[index_b]).abs().max() < 1e-5
    again = select_groups(joined, [2, 0])
    assert_same_answers(again, whole, answers_of([4, 3]))


def test_one_problem_in_two_rollouts_makes_two_groups(policy, processor, problems):
    """Groups are told apart by their place, not by the problem's id: two seeds, two groups."""
    rollouts = [draw(policy, processor, problems[:1], G=G, seed=(seed,)) for seed in (1, 2)]
    joined = join(*rollouts)
    assert joined.score(score_of).shape == (2, G)
    assert [len(answers) for answers in joined.groups().values()] == [G, G]


def test_rollouts_with_other_numbers_of_answers_have_no_table_of_scores(policy, processor, problems):
    joined = join(draw(policy, processor, problems[:1], G=2), draw(policy, processor, problems[1:2], G=3))
    with pytest.raises(ValueError, match="index the scores"):
        joined.score(score_of)


# --- what is written of a rollout -------------------------------------------------------------------------------------


def test_a_few_answers_are_written_for_every_rollout(whole):
    """Rows of samples.jsonl: problem, answer, text and reward, of problems all over the rollout."""
    rewards_B = whole.score(score_of).flatten()
    rows = whole.samples(rewards_B)
    assert [row["id"] for row in rows] == ["p0", "p1", "p2", "p3"]
    for row in rows:
        b = G * int(row["id"][1:]) + int(row["id"][1:])  # every fifth answer
        assert row["text"] == whole.texts[b]
        assert row["reward"] == rewards_B[b].item()


def test_given_texts_end_with_the_end_token_and_are_read_as_they_stand(policy, processor, problems):
    """`forced`: the tokens of the text, then the end token, mask 1 on both; one answer to each problem."""
    texts = ["a b c", "red", "<think>x</think>\\boxed{1}", "", "y"]
    rollout = forced(policy, processor, problems, texts)
    end = processor.tokenizer.eos_token_id
    for b, text in enumerate(texts):
        tokens = rollout.tokens_BT[b][rollout.mask_BT[b].bool()].tolist()
        assert tokens == [*processor.tokenizer(text).input_ids, end]
    assert rollout.score(score_of).tolist() == [[100 * p + len(text)] for p, text in enumerate(texts)]
    assert (rollout.finished_B == 1).all()


def test_rollouts_of_two_temperatures_are_not_joined(policy, processor, problems):
    """Each was sampled at its own, and one number could not be right for both when they are read."""
    warm = sample(policy, processor, problems[:1], 2, seed=(1,), max_completion_length=4)
    cool = sample(policy, processor, problems[1:2], 2, seed=(1,), max_completion_length=4, temperature=0.5)
    with pytest.raises(ValueError, match="cannot be joined"):
        join(warm, cool)


def test_a_mask_that_is_no_prefix_is_refused(policy, processor, problems):
    """Else other tokens than the masked ones would be read, silently: leaving tokens out is a weight's task."""
    rollout = draw(policy, processor, problems)
    rollout.mask_BT = rollout.mask_BT.clone()
    rollout.mask_BT[:, 0] = 0
    with pytest.raises(ValueError, match="give them weight 0"):
        read(token_logps, rollout, policy)


def test_slices_lists_and_judges_that_are_partial(policy, processor, problems):
    """rollout[2:4], rollout[[2, 3]] and an index tensor are the same; a partial reward is named by its function."""
    rollout = draw(policy, processor, problems)
    wanted = rollout[torch.tensor([3, 4, 5])]
    for index in (slice(3, 6), [3, 4, 5]):
        assert rollout[index].texts == wanted.texts
        assert torch.equal(rollout[index].tokens_BT, wanted.tokens_BT)

    def broken_reward(problem, text, judge):
        return float("nan")

    with pytest.raises(UserError, match="change broken_reward"):
        rollout.score(functools.partial(broken_reward, judge=None))
    assert rollout[torch.arange(0)].score(broken_reward).shape == (0, 0)
    with pytest.raises(ValueError, match="have no answers"):
        select_groups(rollout[torch.arange(3)], [4])

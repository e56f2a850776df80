"""harness.phrases: the eight phrases of hesitation."""

from harness.phrases import PHRASES, hesitations

import pytest


@pytest.mark.parametrize("text, counts", [
    ("", {}),
    ("Wait, wait. WAIT!", {"wait": 3}),
    ("Waiting in the awaited checkpoint, against mistakes", {}),
    ("Let me double-check. I check again.", {"double-check": 1, "check": 1, "again": 1}),
    ("Hmm, I should confirm this mistake; alternatively", {"hmm": 1, "i should confirm": 1, "mistake": 1,
                                                           "alternatively": 1}),
])
def test_whole_words_are_counted(text, counts):
    assert hesitations(text) == counts


def test_each_of_the_eight_is_found():
    assert len(PHRASES) == 8
    for phrase in PHRASES:
        assert hesitations(f"so {phrase}, then") == {phrase: 1}

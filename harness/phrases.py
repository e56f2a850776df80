"""Words of hesitation, by which VLAA-Thinker (arXiv 2504.11468) tells recited reasoning from a model's own."""

import re
from collections import Counter

PHRASES = ("wait", "again", "double-check", "hmm", "mistake", "alternatively", "check", "i should confirm")
# Matches do not overlap: a double-check is no check too.
ANY_PHRASE = re.compile(rf"\b(?:{'|'.join(PHRASES)})\b", re.IGNORECASE)


def hesitations(text: str) -> Counter:
    """How often each of the eight phrases stands in a text, as whole words, in capitals or not."""
    return Counter(match.lower() for match in ANY_PHRASE.findall(text))

"""VEPO with an oracle: credit for exactly the words in which a world of the tabletop has its doubt.

    python lab/oracle.py --select cells          the words for cells and places, while the picture is read
    python lab/oracle.py --select conclusions    what follows from the reading, up to the end of the answer

All else is vepo.py, with every flag it has. An oracle picks a class of tokens, not a share, so --keep must be 1.
No paper has it: it shows the best that a selection could do if it knew where doubt matters.
"""

import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in lab/, not in the root

import vepo
from common import find_model
from harness.flags import UserError, launch
from harness.selections import SELECTIONS
from tabletop.traces import kinds

import torch
from transformers import AutoTokenizer

ORACLES = {"cells": ("cell", "place"), "conclusions": ("conclusion", "answer")}  # the kinds of tokens that each credits
TOP_FRACTION = vepo.top_fraction  # the real one: main puts keep_marked in its place


def oracle_scores(tokenizer, rollout, oracle):
    """(B, T) of 0/1: the tokens that an oracle credits."""
    scores_BT = torch.zeros_like(rollout.mask_BT)
    for b in range(len(rollout)):
        length = int(rollout.mask_BT[b].sum())
        found = kinds(tokenizer.batch_decode(rollout.tokens_BT[b, :length, None]))
        scores_BT[b, :length] = torch.tensor([float(kind in ORACLES[oracle]) for kind in found])
    return scores_BT


def keep_marked(score_BT, mask_BT, fraction):
    """vepo.top_fraction, but at fraction 1 it keeps the tokens that score above 0: what an oracle credits."""
    if fraction < 1:
        return TOP_FRACTION(score_BT, mask_BT, fraction)
    return mask_BT.masked_fill(score_BT <= 0, 0.0)


def main(args):
    if args.select not in ORACLES:
        raise UserError(f"--select {args.select} is vepo.py's; lab/oracle.py has {', '.join(ORACLES)}")
    if args.keep != 1:
        raise UserError(f"--keep is {args.keep}: an oracle picks its tokens by what they are; leave --keep at 1")
    tokenizer = AutoTokenizer.from_pretrained(find_model(args.model))

    def score(select, rollout, signals, **settings):
        return oracle_scores(tokenizer, rollout, select)

    with mock.patch.multiple(vepo, other_score=score, top_fraction=keep_marked):
        vepo.main(args)


def flags(parser):
    with mock.patch.object(vepo, "SELECTIONS", (*ORACLES, *SELECTIONS)):
        vepo.flags(parser)


if __name__ == "__main__":
    settings = dict(select="cells", keep=1.0)
    launch("oracle", main, flags, doc=__doc__, recipe=vepo.RECIPE | settings, toy=vepo.TOY | settings)

"""Which of a base's mistakes would a selection of tokens credit? From one evaluation of the base, before any training.

    python lab/coverage.py                                                     the default world of the tabletop
    python lab/coverage.py --model toy-see --dataset toy-see@train:256         another world
    python lab/coverage.py --select vepo:0.2,vepo:0.5 --noise_std 7            other selections, another noise

The base answers G times each of P problems. Every answer is read with its picture and with a noised one, as vepo.py
does it, and each selection picks its tokens. An answer that ends wrong has a first wrong token: the first one at which
it leaves the worked answer of its own style (filler words are passed over). Then

    coverage = first wrong tokens that the selection credits / first wrong tokens

with a 95% interval from 10,000 bootstrap draws of problems. Crediting all tokens has coverage 1. What a selection does
not credit at the first wrong token it can only unlearn through the words that follow from the mistake.

A selection is written NAME:KEEP or NAME:KEEP:ALPHA: a value of vepo.py's --select with its --keep and --alpha, or an
oracle of lab/oracle.py, such as cells:1. Only data sets whose right answers are all known can be measured: the
tabletop's. Writes coverage.json and coverage.png into --output_dir.
"""

import json
import os
import sys
from collections import Counter, namedtuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in lab/, not in the root

import vepo
from common import Reading, UserError, load_policy, load_problems, read, sample
from harness.diagnostics import first_wrong_tokens
from harness.flags import MODEL_FLAGS, at_least, launch, not_negative
from harness.prompts import check_prompts
from harness.run import Run, write_atomically
from harness.selections import SELECTIONS, kl_of_readings, other_score
from lab import pictures
from lab.measures import share_interval
from lab.oracle import ORACLES, keep_marked, oracle_scores
from tabletop.traces import kinds

import torch
from tqdm import tqdm

CHUNK = 32  # problems that are sampled and read together
Selection = namedtuple("Selection", "text name keep alpha")

# --- the measure ------------------------------------------------------------------------------------------------------


def read_selections(text):
    """The selections of --select. UserError unless each is NAME:KEEP or NAME:KEEP:ALPHA."""
    found = []
    for word in text.split(","):
        name, *numbers = word.strip().split(":")
        try:
            keep, alpha = [*map(float, numbers), 0.7][:2]
            known = name in (*SELECTIONS, *ORACLES) and len(numbers) in (1, 2)
        except ValueError:
            known = False
        if not known or not 0 < keep <= 1 or not 0 <= alpha <= 1:
            raise UserError(f"--select {word}: write NAME:KEEP or NAME:KEEP:ALPHA, with a NAME of "
                            f"{', '.join((*SELECTIONS, *ORACLES))} and shares from 0 to 1")
        found.append(Selection(word.strip(), name, keep, alpha))
    return found


def look(logits_NV, noised_logits_NV, tokens_N):
    """What the selections are made of, each (N,): vepo.py's three signals, and the KL of the two readings."""
    return *vepo.visual_signals(logits_NV, noised_logits_NV), kl_of_readings(logits_NV, noised_logits_NV, tokens_N)


def kept_tokens(selection, rollout, signals, *, tokenizer, seed):
    """(B, T) of 0/1: the tokens that a selection credits. signals: what `look` gives, each (B, T)."""
    mask_BT = rollout.mask_BT
    *signals, kl_BT = signals
    if selection.name in ORACLES:
        return keep_marked(oracle_scores(tokenizer, rollout, selection.name), mask_BT, 1)
    if selection.name == "all":
        return mask_BT
    if selection.name == "vepo":
        score_BT = vepo.vision_entropy_score(*signals, mask_BT, alpha=selection.alpha)
    elif selection.name == "kl":
        score_BT = vepo.vision_entropy_score(kl_BT, *signals[1:], mask_BT, alpha=selection.alpha)
    else:
        normal = [vepo.min_max(signal_BT, mask_BT) for signal_BT in signals]
        score_BT = other_score(selection.name, rollout, normal, alpha=selection.alpha, seed=seed)
    return vepo.top_fraction(score_BT, mask_BT, selection.keep)


class Tally:
    """What is counted. wrong: a number of first wrong tokens for each problem. credited: as many of them as each
    selection credits. kept, tokens: tokens kept by each selection, and all tokens. first: what the first wrong ones
    are there for."""

    def __init__(self, selections):
        self.wrong = []
        self.credited = {selection.text: [] for selection in selections}
        self.kept = Counter()
        self.tokens = 0
        self.first = Counter()

    def add(self, rollout, wrong_BT, kept, tokenizer):
        """Counts one rollout. kept: {selection: (B, T) of 0/1}."""
        self.tokens += int(rollout.mask_BT.sum())
        for answers in rollout.groups().values():
            self.wrong.append(int(wrong_BT[answers].sum()))
            for text, kept_BT in kept.items():
                self.credited[text].append(int((kept_BT * wrong_BT)[answers].sum()))
        for text, kept_BT in kept.items():
            self.kept[text] += int((kept_BT * rollout.mask_BT).sum())
        for b, t in wrong_BT.nonzero().tolist():
            length = int(rollout.mask_BT[b].sum())
            pieces = tokenizer.batch_decode(rollout.tokens_BT[b, :length, None])
            self.first[kinds(pieces)[t]] += 1

    def result(self):
        """What coverage.json says of the selections: {selection: {coverage: [value, low, high], kept, credited}}."""
        found = {}
        for text, credited in self.credited.items():
            found[text] = dict(
                coverage=share_interval(credited, self.wrong),
                kept=round(self.kept[text] / self.tokens, 5),
                credited=credited,
            )
        return found


# --- the command line -------------------------------------------------------------------------------------------------

TOY = dict(
    dataset="toy@train:256", max_completion_length=64, sample_batch_size=512,
    select="all:1,entropy:0.2,jsd:0.2,vepo:0.2,vepo:0.5,random:0.2,bottom:0.2,cells:1,conclusions:1",
)
TABLES = (MODEL_FLAGS,)


def flags(parser):
    parser.add_argument("--dataset", default="none", help="name@split:count, of a world of the tabletop")
    parser.add_argument("--num_generations", type=at_least(1), default=8, help="G, answers sampled to each problem")
    parser.add_argument("--select", default="vepo:0.2", help="selections, with commas between: NAME:KEEP[:ALPHA]")
    parser.add_argument("--counterfactual", choices=("noise", "blank"), default="noise", help="what I' is")
    parser.add_argument("--noise_std", type=not_negative, default=2.0,
                        help="standard deviation of the noise in I', on normalised pixels")


def tally(run, policy, processor, problems, *, selections):
    """Samples, reads and counts, some problems at a time."""
    args = run.args
    counts = Tally(selections)
    for start in tqdm(range(0, len(problems), CHUNK), desc=f"read, {CHUNK} problems at a time"):
        rollout = sample(
            policy, processor, problems[start:start + CHUNK], args.num_generations, seed=(args.seed, "coverage"),
            max_completion_length=args.max_completion_length, temperature=args.temperature,
            sample_batch_size=args.sample_batch_size)
        seed = (args.seed, "coverage")
        noised = vepo.counterfactual(rollout.prompts, args.counterfactual, args.noise_std, seed)
        batches = torch.arange(len(rollout)).split(64)
        with torch.no_grad():
            signals = read(look, rollout, policy, Reading(policy, noised), batches=batches)
        kept = {}
        for selection in selections:
            kept[selection.text] = kept_tokens(
                selection, rollout, signals, tokenizer=processor.tokenizer, seed=seed)
        counts.add(rollout, first_wrong_tokens(processor.tokenizer, rollout), kept, processor.tokenizer)
    return counts


def main(args):
    selections = read_selections(args.select)
    run = Run(args)
    problems = load_problems(args.dataset)
    if not len(problems) or "first_wrong" not in problems[0]:
        raise UserError(f"--dataset {args.dataset}: nobody knows all right answers there; name a world of the tabletop")
    policy, processor = load_policy(args.model, run)
    check_prompts(processor, problems, args)
    counts = tally(run, policy, processor, problems, selections=selections)
    if not sum(counts.wrong):
        raise UserError(f"--model {args.model} answers all of {args.dataset} right: there is no mistake to credit")
    result = dict(
        model=args.model, dataset=args.dataset, seed=args.seed, num_generations=args.num_generations,
        counterfactual=args.counterfactual, noise_std=args.noise_std, first=dict(counts.first.most_common()),
        wrong=counts.wrong, selections=counts.result(),
    )
    os.makedirs(run.folder, exist_ok=True)
    draw(result, run.path("coverage.png"))
    write_atomically(run.path("coverage.json"), json.dumps(result) + "\n")
    print(show(result))
    print(f"written: coverage.json and coverage.png in {run.folder}")


def show(result):
    """The result as text: a line for each selection, then what the first wrong tokens are there for."""
    lines = [f"{sum(result['wrong'])} first wrong tokens of {result['model']} on {result['dataset']}"]
    for text, found in result["selections"].items():
        value, low, high = found["coverage"]
        lines.append(f"{text:16} coverage {value:.3f} [{low:.3f}, {high:.3f}]   kept {found['kept']:.3f} of tokens")
    total = sum(result["first"].values())
    lines.append("they are: " + ", ".join(f"{kind} {count / total:.0%}" for kind, count in result["first"].items()))
    return "\n".join(lines)


def draw(result, path):
    """Draws coverage beside the share of tokens kept, a line for each selection, into `path`, which is returned."""
    covered = []
    kept = []
    for text, found in result["selections"].items():
        colour = pictures.PALETTE.get(text.partition(":")[0], pictures.PALETTE["other"])
        covered.append((text, colour, [found["coverage"]]))
        kept.append((text, colour, [[found["kept"]] * 3]))
    headline = f"How many of {result['model']}'s first mistakes each selection credits"
    caption = (f"{sum(result['wrong'])} answers to {len(result['wrong'])} problems of {result['dataset']} end wrong. "
               "Coverage: the share of their first wrong tokens with credit; 95% interval over problems.")
    panels = [("First wrong tokens with credit", "%", covered), ("All tokens with credit", "%", kept)]
    return pictures.dots(panels, path, headline, caption)


if __name__ == "__main__":
    launch("coverage", main, flags, doc=__doc__, toy=TOY, tables=TABLES)

"""Reasoning traces from captions: the six-step data pipeline of VLAA-Thinker (arXiv 2504.11468), with any models.

    python lab/traces.py                                                     the tabletop, minutes
    accelerate launch lab/traces.py --dataset hiyouga/geometry3k@train \\
        --caption_model Qwen/Qwen2.5-VL-7B-Instruct --reason_model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B \\
        --rewrite_model Qwen/Qwen2.5-7B-Instruct --model Qwen/Qwen2.5-VL-3B-Instruct

    1. caption    a model that sees describes the picture
    2. reason     a model answers the question from the caption alone, with its reasoning
    3. rewrite    a model rewrites the reasoning so that nothing betrays the caption ("the caption says")
    4. verify     the answer must be right: by the rules of the data set's verifier, or as --verify_model judges
    5. split      traces with a phrase of hesitation (harness/phrases.py) go to the RL set, the others to the SFT set
    6. filter     the SFT set in order of its perplexity under the model to be trained; the lowest --keep stay

Any causal or vision-language checkpoint that transformers loads can play any part; a part for which none is named is
played by --model, the model to be trained (verify: by the rules). A caption needs a model that sees. No other part is
shown the picture, unless --show_picture names it. Captions that were written elsewhere can be given with --captions.

Every step keeps its rows in a file of its own, a wave of problems at a time: the same command goes on where it was
stopped, and a step that is done is not done again. At the end --output_dir holds

    sft.jsonl          problems with a trace, the lowest perplexity first: sft.py --dataset OUT/sft.jsonl:5000
    rl.jsonl           problems whose trace hesitated: grpo.py --dataset OUT/rl.jsonl
    traces.jsonl       the traces of sft.jsonl alone: sft.py --dataset THE_SAME --traces OUT/traces.jsonl
    images/            their pictures
    pipeline.json      how many went into each step, how many it kept, and why it dropped the others

On the tabletop toy-writer plays the first three parts (tabletop/writer.py). It is a stand-in: it goes through the same
code as a large model, but it is shown the picture when it reasons and rewrites too, and reads there what a large model
takes from the text. Its traces are in another hand, that of the world toy-hand.

Departures from the paper: the prompts are ours. A rewritten trace has the reasoning and the boxed answer, without what
a reasoner says after its thinking. We do not know how the paper judges open-ended answers.
"""

import collections
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in lab/, not in the root

from common import UserError, find_model, format_reward, is_right, load_problems
from harness.answers import final_answer
from harness.disk import fingerprint, room_for, write_rows
from harness.flags import INSTRUCTION, MODEL_FLAGS, at_least, launch
from harness.phrases import hesitations
from harness.processor import as_seen
from harness.prompts import list_skipped, prompt_settings
from harness.run import Run, write_atomically
from harness.traces import read_traces
from lab.writers import kind_of, load_writer
from tabletop import writer as toy

import torch
from tqdm import tqdm

STEPS = ("caption", "reason", "rewrite", "verify", "split", "filter")
RULES = "rules"  # --verify_model: no model, but the data set's own verifiers
CAPTION = (
    "Describe this picture completely, so that someone who cannot see it can answer any question about it. Give all "
    "text, numbers, labels, lengths, angles, positions, colours and counts. Solve nothing.")
REASON = (
    "A picture is described below. Answer the question about it.\n\nPicture: {caption}\n\nQuestion: {question}\n\n"
    + INSTRUCTION)
REWRITE = (
    "Below someone reasons about a picture, and speaks of a caption or a description of it. Rewrite the reasoning so "
    "that it sounds as if its author saw the picture. Change nothing else: keep every step, every number and every "
    "doubt. Give the rewritten reasoning alone.\n\n{reasoning}")
VERIFY = (
    "Question: {question}\nRight answer: {gold}\nGiven answer: {answer}\nDo the two answers mean the same? Say yes or "
    "no.")
NEEDS = {  # what each prompt must hold; <image> is the picture's place, where it is shown (else it comes first)
    "caption_prompt": (), "reason_prompt": ("{caption}", "{question}"), "rewrite_prompt": ("{reasoning}",),
    "verify_prompt": ("{gold}", "{answer}"),
}
BYTES_OF_PICTURE = 2**21  # about what a picture of a megapixel takes as a PNG, for the look at the disk

# --- texts ------------------------------------------------------------------------------------------------------------


def filled(prompt, **values):
    """A prompt with its placeholders filled in, in one pass: what is filled in is not looked at again."""
    values = {name: str(value).replace("<image>", "").strip() for name, value in values.items()}
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), prompt)


def opened(text):
    """A reasoner's text with its opening tag: some chat templates write it themselves, and it is not in the text."""
    if "</think>" in text and "<think>" not in text:
        return "<think>" + text
    return text


def said(text):
    """What a model says after its thinking, if it thinks."""
    return text.rpartition("</think>")[2].strip()


def thought(trace):
    """What stands between the think tags of a well-formed trace."""
    return re.search(r"<think>(.*)</think>", trace, re.DOTALL)[1].strip()


def betrays(text, words):
    """The first of `words` (with commas between) that stands in a text, as a whole word; None where none does."""
    listed = [re.escape(word.strip()) for word in words.split(",") if word.strip()]
    found = re.search(rf"\b(?:{'|'.join(listed)})\b", text, re.IGNORECASE) if listed else None
    return found and found[0].lower()


# --- the line ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Item:
    """A problem on its way through the steps, without its picture.

    place: where it stands among the problems. problem: as dict, for prompts and for grading. texts: what the steps
    made of it: caption, trace, perplexity.
    """

    place: int
    problem: dict
    texts: dict = dataclasses.field(default_factory=dict)


class Line:
    """The steps of one run: the problems with their pictures, at most one model at a time, and what was counted."""

    def __init__(self, run, problems):
        self.run = run
        self.problems = problems
        self.before = ""  # a hash of all settings of the steps so far
        self.counts = []
        self.name = None
        self.held = None

    def writer(self, name):
        """The model called `name`. The one before is let go, unless it is the same."""
        if name != self.name:
            self.held = None
            self.name = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.held = load_writer(name, self.run)
            self.name = name
        return self.held

    def asked(self, step, item, prompt, **texts):
        """What a model is asked in a step: the prompt with question and texts filled in, with pictures or without."""
        prompt = filled(prompt, question=item.problem["problem"], **texts)
        shown = step == "caption" or step in self.run.args.show_picture.split(",")
        images = self.problems[item.place]["images"] if shown else []
        return dict(id=item.problem["id"], images=images, problem=prompt, verifier="")

    def trained_on(self, item):
        """The problem as the scripts will show it to the model to be trained."""
        problem = self.problems[item.place]
        text = problem["problem"]
        if self.run.args.instruction:
            text += f"\n{self.run.args.instruction}"
        return dict(id=problem["id"], images=problem["images"], problem=text, verifier="")

    def rows(self, step, items, settings, prepare):
        """{id: row} of a step. What its file holds is not done again.

        prepare() is called where something is left, and gives answer(items) → rows, each with an id.
        """
        run = self.run
        path = run.path(f"{STEPS.index(step) + 1}-{step}.jsonl")
        settings = dict(settings, before=self.before)
        recipe = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
        self.check_file(step, path, settings, recipe)
        self.before = recipe
        of_id = {item.problem["id"]: item for item in items}

        def answers(_):
            answer = prepare()
            return lambda some: answer([of_id[one["id"]] for one in some])

        found = run.answered(
            path, dict(recipe=recipe), [item.problem for item in items], answers, share=run.args.wave, desc=step)
        return {row["id"]: row for row in found}

    def check_file(self, step, path, settings, recipe):
        """UserError where a step's file holds rows of other settings, or of another data set. Notes the settings."""
        run = self.run
        notes = run.path("steps.json")
        known = json.loads(Path(notes).read_text()) if os.path.exists(notes) else {}
        if os.path.exists(path):
            check_rows(run, path, recipe, known=known.get(step, {}), settings=settings)
        run.accelerator.wait_for_everyone()
        if run.is_main:
            write_atomically(notes, json.dumps(known | {step: settings}, indent=1) + "\n")
        run.accelerator.wait_for_everyone()

    def sift(self, step, items, rows, who):
        """The items that a step keeps, with what it made of them; counts the others by the reason."""
        kept = []
        dropped = collections.Counter()
        for item in items:
            row = rows[item.problem["id"]]
            if row["dropped"]:
                dropped[row["dropped"]] += 1
            else:
                kept.append(dataclasses.replace(item, texts=item.texts | row["made"]))
        self.count(step, who, given=len(items), kept=len(kept), dropped=dropped)
        return kept

    def count(self, step, who, *, given, kept, dropped):
        """Notes how many a step was given, and how many it kept."""
        rate = kept / given if given else 0.0
        self.counts.append(dict(step=step, by=who, given=given, kept=kept, rate=rate, dropped=dict(dropped)))
        self.run.say(f"{step}: {kept} of {given} kept")


def check_rows(run, path, recipe, *, known, settings):
    """UserError where a file holds rows of another recipe; `known` are the settings that it was written with."""
    try:
        recipes = {row["recipe"] for row in run.read_lines(path)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is torn, or no file of this pipeline ({reason}): move it away, and the step is done "
                        "again") from None
    if recipes <= {recipe}:
        return
    changed = [name for name in settings if name in known and known[name] != settings[name]]
    why = "it belongs to another run"
    if changed and changed[0] == "before":
        why = "an earlier step has other settings now"
    elif changed:
        why = f"it was written with {changed[0]} {known[changed[0]]!r}, which is {settings[changed[0]]!r} now"
    raise UserError(f"{path}: {why}; name another --output_dir, or move the file away")


def row_of(item, dropped="", **made):
    """A row of a step's file: what was made of the item, or why it is dropped."""
    return dict(id=item.problem["id"], dropped=dropped, made=made)


def items_of(problems, args):
    """The problems without their pictures, as items. Boxes are graded in the first picture as the models see it, whose
    `size` they note, beside the `original` one."""
    items = []
    for place, problem in enumerate(tqdm(problems, desc="problems", delay=5, leave=False)):
        known = {name: problem[name] for name in ("id", "problem", "answer", "verifier")}
        sizes = dict(size=as_seen(problem, args)["size"], original=problem["images"][0].size)
        items.append(Item(place, known | sizes))
    return items


# --- the steps --------------------------------------------------------------------------------------------------------


def settings_of(run, step, model, **more):
    """All that a step's rows depend on, beside the steps before it."""
    args = run.args
    known = dict(step=step, dataset=args.dataset, model=model, seed=args.seed, **more)
    if model != RULES:
        known |= dict(
            weights=fingerprint(find_model(model, run)), temperature=args.temperature,
            max_completion_length=args.max_completion_length, **prompt_settings(args))
    return known


CUT = "cut off, or its prompt is too long"


def caption(line, items):
    """Step 1: {id: row} with a caption each."""
    args = line.run.args
    if args.captions:
        return given_captions(args, items)
    settings = settings_of(line.run, "caption", args.caption_model, prompt=args.caption_prompt)

    def prepare():
        writer = line.writer(args.caption_model)

        def answer(some):
            asked = [line.asked("caption", item, args.caption_prompt) for item in some]
            return [captioned(*pair) for pair in zip(some, writer.write(asked, "caption"), strict=True)]

        return answer

    return line.rows("caption", items, settings, prepare)


def captioned(item, text):
    """The row of a caption."""
    if text is None:
        return row_of(item, CUT)
    if not said(text):
        return row_of(item, "nothing said")
    return row_of(item, caption=said(text))


def given_captions(args, items):
    """Captions that were written elsewhere. UserError where none belongs to a problem of this data set."""
    captions = {row["id"]: row["caption"] for row in read_traces(args.captions, "--captions", "caption")}
    ids = [item.problem["id"] for item in items]
    if captions.keys().isdisjoint(ids):
        first = next(iter(captions), "none")
        raise UserError(f"--captions {args.captions}: none of its ids is one of {args.dataset}, whose first is "
                        f"{ids[0]}; the file's first is {first}")
    rows = {}
    for item in items:
        name = item.problem["id"]
        rows[name] = row_of(item, caption=captions[name]) if name in captions else row_of(item, "no caption given")
    return rows


def reason(line, items):
    """Step 2: {id: row} with a trace each, from the caption alone."""
    args = line.run.args
    settings = settings_of(line.run, "reason", args.reason_model, prompt=args.reason_prompt)
    if args.captions:
        settings["captions"] = hashlib.sha256(Path(args.captions).read_bytes()).hexdigest()[:12]

    def prepare():
        writer = line.writer(args.reason_model)

        def answer(some):
            asked = [line.asked("reason", item, args.reason_prompt, caption=item.texts["caption"]) for item in some]
            return [reasoned(*pair) for pair in zip(some, writer.write(asked, "reason"), strict=True)]

        return answer

    return line.rows("reason", items, settings, prepare)


def reasoned(item, text):
    """The row of an answer with its reasoning."""
    if text is None:
        return row_of(item, CUT)
    trace = opened(text)
    if format_reward(item.problem, trace) == 0:
        return row_of(item, "no reasoning, or no answer after it")
    return row_of(item, trace=trace)


def rewrite(line, items):
    """Step 3: {id: row} with the trace rewritten: nothing in it betrays the caption."""
    args = line.run.args
    settings = settings_of(
        line.run, "rewrite", args.rewrite_model, prompt=args.rewrite_prompt, betrays=args.betrays)

    def prepare():
        writer = line.writer(args.rewrite_model)

        def answer(some):
            asked = []
            for item in some:
                asked.append(line.asked("rewrite", item, args.rewrite_prompt, reasoning=thought(item.texts["trace"])))
            texts = writer.write(asked, "rewrite")
            return [rewritten(item, text, args.betrays) for item, text in zip(some, texts, strict=True)]

        return answer

    return line.rows("rewrite", items, settings, prepare)


def rewritten(item, text, words):
    """The row of a rewritten trace: the new reasoning, then the answer of the old one, in a box.

    A rewriter that gives back a whole worked answer is taken at its word: then its own answer will be verified.
    """
    if text is None:
        return row_of(item, CUT)
    if format_reward(item.problem, text):
        new = thought(text)
        answer = final_answer(text)
    else:
        new = re.sub(r"</?think>", "", said(text)).strip()
        answer = final_answer(item.texts["trace"])
    if not new:
        return row_of(item, "nothing said")
    word = betrays(new, words)
    if word:
        return row_of(item, f"still says {word!r}")
    return row_of(item, trace=f"<think>{new}</think>\\boxed{{{answer}}}")


def verify(line, items):
    """Step 4: {id: row}; dropped is what is wrong."""
    args = line.run.args
    model = args.verify_model
    more = {} if model == RULES else dict(prompt=args.verify_prompt)
    settings = settings_of(line.run, "verify", model, **more)

    def prepare():
        if model == RULES:
            return lambda some: [verified(item, is_right(item.problem, item.texts["trace"])) for item in some]
        writer = line.writer(model)

        def answer(some):
            asked = []
            for item in some:
                answers = dict(gold=item.problem["answer"], answer=final_answer(item.texts["trace"]))
                asked.append(line.asked("verify", item, args.verify_prompt, **answers))
            texts = writer.write(asked, "verify")
            return [verified(item, says_yes(text)) for item, text in zip(some, texts, strict=True)]

        return answer

    return line.rows("verify", items, settings, prepare)


def says_yes(text):
    return text is not None and said(text).lower().startswith("yes")


def verified(item, right):
    """The row of a verdict. A well-formed trace stays one: the box is ours."""
    return row_of(item) if right else row_of(item, "wrong")


def split(line, items):
    """Step 5: {id: row} with the phrases of hesitation in each trace."""
    settings = settings_of(line.run, "split", RULES)

    def prepare():
        return lambda some: [row_of(item, phrases=dict(hesitations(item.texts["trace"]))) for item in some]

    return line.rows("split", items, settings, prepare)


def perplexity(line, items):
    """Step 6: {id: row} with the perplexity of each trace under the model to be trained, as it will be shown it."""
    args = line.run.args
    settings = settings_of(line.run, "filter", args.filter_model)

    def prepare():
        writer = line.writer(args.filter_model)

        def answer(some):
            asked = [line.trained_on(item) for item in some]
            costs = writer.surprise(asked, [item.texts["trace"] for item in some])
            return [row_of(item, perplexity=math.exp(cost)) for item, cost in zip(some, costs, strict=True)]

        return answer

    return line.rows("filter", items, settings, prepare)


# --- the run ----------------------------------------------------------------------------------------------------------

RECIPE = dict(temperature=0.6, min_pixels=262_144)
TOY = dict(
    dataset="toy-hand@train:256", caption_model="toy-writer", reason_model="toy-writer", rewrite_model="toy-writer",
    caption_prompt=toy.CAPTION, reason_prompt=toy.REASON, rewrite_prompt=toy.REWRITE, show_picture="reason,rewrite",
    max_completion_length=160, min_pixels=784,
)
TABLES = ([flag for flag in MODEL_FLAGS if flag.name != "reward_model"],)  # here --verify_model judges


def flags(parser):
    parser.add_argument("--dataset", default="hiyouga/geometry3k@train", help="name@split[:count], or a path")
    parser.add_argument("--caption_model", default="", help="describes the pictures (empty: --model)")
    parser.add_argument("--captions", default="", help='file of captions from elsewhere: {"id": ..., "caption": ...}')
    parser.add_argument("--reason_model", default="", help="reasons from the caption alone (empty: --model)")
    parser.add_argument("--rewrite_model", default="", help="rewrites what betrays the caption (empty: --model)")
    parser.add_argument("--verify_model", default=RULES, help="judges the answers; rules: the data set's verifiers do")
    parser.add_argument("--filter_model", default="", help="gives the perplexities (empty: --model)")
    parser.add_argument("--caption_prompt", default=CAPTION, help="may hold {question}")
    parser.add_argument("--reason_prompt", default=REASON, help="must hold {caption} and {question}")
    parser.add_argument("--rewrite_prompt", default=REWRITE, help="must hold {reasoning}")
    parser.add_argument("--verify_prompt", default=VERIFY, help="must hold {gold} and {answer}, may hold {question}")
    parser.add_argument("--show_picture", default="",
                        help="steps other than caption whose model is shown the picture, separated by commas: "
                             "reason,rewrite,verify (the paper: none)")
    parser.add_argument("--betrays", default="caption,captions,description,described",
                        help="words that no rewritten trace may contain, separated by commas")
    parser.add_argument("--keep", type=at_least(0), default=0, help="N, traces that the filter keeps (0: all)")
    parser.add_argument("--wave", type=at_least(1), default=64, help="problems to answer before each write to disk")


def check_flags(args):
    """UserError for an unknown step, and a prompt that lacks a placeholder. A part that names no model gets --model."""
    unknown = set(args.show_picture.split(",")) - {"", "reason", "rewrite", "verify"}
    if unknown:
        raise UserError(f"--show_picture {args.show_picture}: {sorted(unknown)[0]!r} is none of reason, rewrite and "
                        "verify")
    for flag, needed in NEEDS.items():
        lacking = [word for word in needed if word not in vars(args)[flag]]
        if lacking:
            raise UserError(f"--{flag} lacks {lacking[0]}, the place where that text goes")
        step = flag.removesuffix("_prompt")
        if "<image>" in vars(args)[flag] and step not in ("caption", *args.show_picture.split(",")):
            raise UserError(f"--{flag} has a place for a picture, which step {step} is not shown: give --show_picture, "
                            "or take <image> out")
    for part in ("caption_model", "reason_model", "rewrite_model", "filter_model"):
        if not vars(args)[part]:
            setattr(args, part, args.model)


def check_models(run, args):
    """UserError for a model that cannot play its part: met before the first step, not hours later."""
    parts = ["reason_model", "rewrite_model", "filter_model"]
    if not args.captions:
        parts.insert(0, "caption_model")
    if args.verify_model != RULES:
        parts.append("verify_model")
    for part in parts:
        name = vars(args)[part]
        if kind_of(name, run) == "reads" and part == "caption_model":
            raise UserError(f"--{part} {name} reads text alone: name a model that sees, or give --captions")


def check_verifiers(args, items):
    """UserError where rules cannot grade a problem."""
    free = [item.problem["id"] for item in items if item.problem["verifier"] == "open_ended"]
    if free and args.verify_model == RULES:
        raise UserError(f"{args.dataset}: problem {free[0]} is open_ended, which no rule grades: name a "
                        "--verify_model, or leave such problems out with --verifiers digit,mcq,math,iou")


def go_through(line, items):
    """All steps. Returns the items of the SFT set, the lowest perplexity first, and those of the RL set."""
    args = line.run.args
    items = line.sift("caption", items, caption(line, items), args.captions or args.caption_model)
    items = line.sift("reason", items, reason(line, items), args.reason_model)
    items = line.sift("rewrite", items, rewrite(line, items), args.rewrite_model)
    items = line.sift("verify", items, verify(line, items), args.verify_model)
    rows = split(line, items)
    hesitant = [item for item in items if rows[item.problem["id"]]["made"]["phrases"]]
    plain = [item for item in items if not rows[item.problem["id"]]["made"]["phrases"]]
    line.count("split", "eight phrases", given=len(items), kept=len(plain), dropped={"to the RL set": len(hesitant)})
    rows = perplexity(line, plain)
    for item in plain:
        item.texts["perplexity"] = rows[item.problem["id"]]["made"]["perplexity"]
    ranked = sorted(plain, key=lambda item: item.texts["perplexity"])
    kept = ranked[:args.keep] if args.keep else ranked
    above = {"a higher perplexity": len(ranked) - len(kept)} if len(ranked) > len(kept) else {}
    line.count("filter", args.filter_model, given=len(ranked), kept=len(kept), dropped=above)
    return kept, hesitant


def save_pictures(line, items):
    """Writes the pictures of some items into images/; {place: their paths, from the folder of the run}."""
    run = line.run
    os.makedirs(run.path("images"), exist_ok=True)
    paths = {}
    for item in tqdm(items, desc="pictures", delay=5, leave=False):
        found = []
        with room_for("the pictures", run.folder, needed=BYTES_OF_PICTURE):
            for number, picture in enumerate(line.problems[item.place]["images"]):
                found.append(f"images/{item.place:06d}-{number}.png")
                picture.save(run.path(found[-1]))
        paths[item.place] = found
    return paths


def write_sets(line, sft, rl):
    """Writes sft.jsonl, rl.jsonl and traces.jsonl: data sets of one's own, as the scripts read them."""
    run = line.run
    paths = save_pictures(line, [*sft, *rl])
    for name, items in (("sft.jsonl", sft), ("rl.jsonl", rl)):
        rows = []
        for item in items:
            known = {key: item.problem[key] for key in ("id", "problem", "answer", "verifier")}
            rows.append(dict(known, images=paths[item.place], trace=item.texts["trace"]))
        write_rows(run.path(name), rows)
    traces = [dict(id=item.problem["id"], text=item.texts["trace"], right=True,
                   perplexity=item.texts["perplexity"]) for item in sft]
    write_rows(run.path("traces.jsonl"), traces)


def table(counts):
    """The counts as text: a line for each step."""
    lines = [f"{'step':9}{'by':32}{'given':>8}{'kept':>8}{'rate':>8}   dropped"]
    for row in counts:
        why = ", ".join(f"{count} {reason}" for reason, count in row["dropped"].items())
        lines.append(f"{row['step']:9}{row['by'][-31:]:32}{row['given']:8}{row['kept']:8}{row['rate']:8.3f}   {why}")
    return "\n".join(lines)


def main(args):
    check_flags(args)
    run = Run(args)
    check_models(run, args)
    problems = load_problems(args.dataset, run)
    items = items_of(problems, args)
    if not items:
        raise UserError(f"--dataset {args.dataset}: there is no problem in it")
    check_verifiers(args, items)
    if args.captions:
        given_captions(args, items)  # a file of another data set is met before anything is written
    os.makedirs(run.folder, exist_ok=True)
    list_skipped(run)
    line = Line(run, problems)
    sft, rl = go_through(line, items)
    if run.is_main:
        write_sets(line, sft, rl)
        write_atomically(run.path("pipeline.json"), json.dumps(line.counts, indent=1) + "\n")
        print(table(line.counts))
        print(f"written: sft.jsonl ({len(sft)}), rl.jsonl ({len(rl)}), traces.jsonl, pipeline.json in {run.folder}")
    run.accelerator.wait_for_everyone()  # a process that ends while another still works can abort on its way out


if __name__ == "__main__":
    launch("traces", main, flags, doc=__doc__, recipe=RECIPE, toy=TOY, tables=TABLES)

"""What a prompt is made of, and a look at all prompts before a run begins: nobody likes to stop at row 30,000."""

import collections
import dataclasses
import os
from argparse import Namespace
from collections.abc import Iterable, Sequence

from harness import problems as data_sets
from harness.answers import check_gradable
from harness.disk import write_rows
from harness.flags import UserError
from harness.run import Run

from tqdm import tqdm
from transformers import ProcessorMixin


def chat(processor: ProcessorMixin, problem: dict) -> str:
    """The prompt as text: a user message with its pictures where `<image>` stands (else first), then the instruction.

    Before it stands the system prompt, where there is one.
    """
    content = content_of(problem)
    if processor.instruction:
        content.append({"type": "text", "text": "\n" + processor.instruction})
    messages = [{"role": "user", "content": content}]
    if processor.system_prompt:
        messages = [{"role": "system", "content": processor.system_prompt}, *messages]
    return processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def content_of(problem: dict) -> list[dict]:
    """A problem as the parts of a message: its pictures where `<image>` stands, else first, and its text."""
    picture = {"type": "image"}
    content = []
    if "<image>" not in problem["problem"]:
        content += [picture for _ in problem["images"]]
    for number, text in enumerate(problem["problem"].split("<image>")):
        if number > 0:
            content.append(picture)
        if text:
            content.append({"type": "text", "text": text})
    return content


def prompt_settings(args: Namespace) -> dict:
    """The flags that shape a prompt: answers that are kept in a file belong to these values."""
    return dict(
        max_pixels=args.max_pixels, min_pixels=args.min_pixels, system_prompt=args.system_prompt,
        instruction=args.instruction)


@dataclasses.dataclass
class PromptCheck:
    """What check_prompts found: lengths in tokens, pictures scaled down and enlarged, problems of each verifier.

    fitting: the places of the problems whose prompts are short enough. faults: what is wrong with the others.
    """

    lengths: list[int] = dataclasses.field(default_factory=list)
    scaled: int = 0
    enlarged: int = 0
    kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    fitting: list[int] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)


def check_prompts(
    processor: ProcessorMixin, problems: Iterable[dict], args: Namespace, graded: bool = True,
) -> PromptCheck:
    """Measures all prompts. UserError for a problem that no script could grade (where answers are `graded`), and for a
    prompt over args.max_prompt_length, which args.skip_bad_rows leaves out instead."""
    tool = processor.image_processor
    check = PromptCheck()
    for place, problem in enumerate(tqdm(problems, desc="prompts", delay=5, leave=False)):
        if graded:
            check_gradable(problem, args.reward_model != "none")
        sizes = [(picture.height, picture.width) for picture in problem["images"]]
        patches = sum(tool.get_number_of_image_patches(height, width, {}) for height, width in sizes)
        picture_tokens = patches // tool.merge_size**2
        words = len(processor.tokenizer(chat(processor, problem)).input_ids)
        length = words - len(sizes) + picture_tokens  # the text holds one token for each picture
        if length > args.max_prompt_length:  # trap: prompt truncation
            fault = (f"problem {problem['id']} has a prompt of {length} tokens ({picture_tokens} of pictures), over "
                     f"--max_prompt_length {args.max_prompt_length}")
            if not args.skip_bad_rows:
                raise UserError(f"{fault}: raise it, lower --max_pixels, or leave it out with --skip_bad_rows")
            check.faults.append(fault)
            continue
        check.fitting.append(place)
        check.lengths.append(length)
        check.scaled += sum(height * width > args.max_pixels for height, width in sizes)
        check.enlarged += sum(height * width < args.min_pixels for height, width in sizes)
        check.kinds[problem["verifier"]] += 1
    return check


def fitting(
    run: Run, processor: ProcessorMixin, problems: Sequence[dict], dataset: str, graded: bool = True,
) -> tuple[Sequence[dict], PromptCheck]:
    """The problems whose prompts are short enough, and what was found. Overlong ones are noted as skipped."""
    check = check_prompts(processor, problems, run.args, graded)
    run.skipped += [dict(dataset=dataset, fault=fault) for fault in check.faults]
    if check.faults:
        problems = data_sets.Some(problems, check.fitting)
    return problems, check


def check_problems(
    run: Run, processor: ProcessorMixin, problems: Sequence[dict], held_out: Sequence[dict], graded: bool = True,
) -> tuple[Sequence[dict], Sequence[dict]]:
    """Checks every prompt before anything is trained or written, and says what was found.

    Returns both without the overlong ones where --skip_bad_rows leaves them out; what it left out is listed in
    skipped.jsonl. graded: whether answers to `problems` will be graded.
    """
    args = run.args
    problems, check = fitting(run, processor, problems, args.dataset, graded=graded)
    held_out, other = fitting(run, processor, held_out, args.eval_dataset)
    if args.prompts_per_step > len(problems):
        raise UserError(f"--prompts_per_step {args.prompts_per_step}: {args.dataset} has {len(problems)} problems; "
                        "lower it")
    kinds = check.kinds + other.kinds
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    run.say(f"{len(problems)} problems to train on, {len(held_out)} held out ({counts}); "
            f"{sizes_in_words(check, other)}")
    if args.reward_model != "none" and "open_ended" not in kinds:
        run.say(f"--reward_model {args.reward_model} scores nothing here: no problem is open_ended")
    list_skipped(run)
    return problems, held_out


def sizes_in_words(*checks: PromptCheck) -> str:
    """How long the prompts are, and how many of their pictures are resized to fit the limits."""
    lengths = [length for check in checks for length in check.lengths]
    scaled = sum(check.scaled for check in checks)
    enlarged = sum(check.enlarged for check in checks)
    return f"prompts of {min(lengths)} to {max(lengths)} tokens; {scaled} pictures scaled down, {enlarged} enlarged"


def list_skipped(run: Run, shown: int = 10):
    """Says how many rows --skip_bad_rows left out, shows the first of them, and writes all into skipped.jsonl."""
    if not run.skipped:
        return
    run.say(f"--skip_bad_rows left out {len(run.skipped)} rows, listed in {run.path('skipped.jsonl')}:")
    for row in run.skipped[:shown]:
        number = f", row {row['row']}" if "row" in row else ""
        run.say(f"  {row['dataset']}{number}: {row['fault']}")
    if run.is_main:
        os.makedirs(run.folder, exist_ok=True)
        write_rows(run.path("skipped.jsonl"), run.skipped)

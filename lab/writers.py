"""Models that write: any causal or vision-language checkpoint that transformers loads, behind one interface.

    writer = load_writer(name, run)
    writer.sees                             whether it reads pictures
    writer.write(asked, step)               a text for each dict with id, problem and images ([]: none)
    writer.surprise(asked, texts)           mean −log p of a token of each text, in nats

A Qwen2.5-VL samples as the scripts do, through common.sample. Every other model goes through transformers' `generate`.
Either way a text is drawn with uniforms that depend on (seed, step, id) alone, and without top-p, top-k or a repetition
penalty, whatever the checkpoint ships. Each process has the whole model and works alone.
"""

from argparse import Namespace

from common import UserError, find_model, forced, inverse_cdf, load_policy, read, sample, token_logps
from harness.prompts import check_prompts
from harness.run import generator

import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

OURS = "qwen2_5_vl"
TOGETHER = 32  # texts that `generate` writes at a time, unless --sample_batch_size says otherwise


def kind_of(name, run):
    """What sort of model `name` is: "ours" (a Qwen2.5-VL), "sees" (another that reads pictures) or "reads" (text).

    UserError for a name of nothing, and for a model that writes no text. A model of the tabletop is built first.
    """
    try:
        model_type = AutoConfig.from_pretrained(find_model(name, run)).model_type
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"model {name} is no folder or name of a model that can be loaded: {reason}") from None
    if model_type == OURS:
        return "ours"
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "sees"
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "reads"
    raise UserError(f"model {name} is a {model_type}, which writes no text: name a causal or vision-language model")


def load_writer(name, run):
    """The writer called `name`, on the run's device."""
    kind = kind_of(name, run)
    if kind == "ours":
        return Ours(name, run)
    return Hub(name, run, sees=kind == "sees")


class Ours:
    """A Qwen2.5-VL, sampled and read as in the scripts. Asked without a picture, it sees none."""

    sees = True

    def __init__(self, name, run):
        self.args = run.args
        self.policy, self.processor = load_policy(name, args=run.args)
        self.processor.instruction = ""  # what is asked says it all
        self.policy.to(run.device)

    def write(self, asked, step):
        """A text for each; None where the prompt is over --max_prompt_length, or the text was cut off."""
        args = self.args
        fitting = check_prompts(self.processor, asked, Namespace(**vars(args) | SKIP), graded=False).fitting
        texts = [None] * len(asked)
        if not fitting:
            return texts
        rollout = sample(
            self.policy, self.processor, [asked[place] for place in fitting], 1, seed=(args.seed, step),
            max_completion_length=args.max_completion_length, temperature=args.temperature,
            sample_batch_size=args.sample_batch_size)
        for place, text, finished in zip(fitting, rollout.texts, rollout.finished_B.tolist(), strict=True):
            texts[place] = text if finished else None
        return texts

    @torch.no_grad()
    def surprise(self, asked, texts):
        """Mean −log p of a token of each text, its end token included. An answer is read after its own prompt."""
        rollout = forced(self.policy, self.processor, asked, texts)
        logp_BT = read(token_logps, rollout, self.policy, batches=torch.arange(len(texts)).split(8))
        return (-logp_BT.sum(1) / rollout.mask_BT.sum(1)).tolist()


SKIP = dict(skip_bad_rows=True)  # a prompt that is too long costs its trace, not the run


class Draw(LogitsProcessor):
    """Leaves `generate` no choice: the token that our own uniforms draw, as in common.decode. Temperature 0: greedy."""

    def __init__(self, uniform_BT, start, temperature):
        self.uniform_BT = uniform_BT
        self.start = start  # tokens of the prompt
        self.temperature = temperature

    def __call__(self, input_ids, scores):
        if self.temperature == 0:
            return scores
        probs_BV = (scores.float() / self.temperature).softmax(1)
        token_B = inverse_cdf(probs_BV, self.uniform_BT[:, input_ids.shape[1] - self.start])
        return torch.full_like(scores, -torch.inf).scatter(1, token_B[:, None], 0.0)


class Hub:
    """Any other checkpoint: a causal language model (sees=False), or a vision-language one with its own processor."""

    def __init__(self, name, run, sees):
        self.args = run.args
        self.sees = sees
        folder = find_model(name, run)
        family = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        try:
            self.tool = (AutoProcessor if sees else AutoTokenizer).from_pretrained(folder)
            self.model = family.from_pretrained(folder, dtype="auto").to(run.device).eval().requires_grad_(False)
        except (OSError, ValueError, ImportError) as error:  # some processors ask for further packages
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"model {name} cannot be loaded: {reason}") from None
        self.tokenizer = self.tool.tokenizer if sees else self.tool
        self.tokenizer.padding_side = "left"
        shipped = self.model.generation_config.eos_token_id
        ends = shipped if isinstance(shipped, list) else [shipped]
        self.ends = sorted({self.tokenizer.eos_token_id, *ends} - {None})  # trap: end of text
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # In the place of what is shipped: `generate` fills in from there what it is not told.
        self.model.generation_config = GenerationConfig(
            eos_token_id=self.ends, pad_token_id=self.tokenizer.pad_token_id)  # trap: truncated sampling

    def write(self, asked, step):
        """A text for each; None where the prompt is over --max_prompt_length, or the text was cut off."""
        size = self.args.sample_batch_size or TOGETHER
        texts = [None] * len(asked)
        lengths = [self.inputs([one])["input_ids"].shape[1] for one in asked]
        fitting = [place for place, length in enumerate(lengths) if length <= self.args.max_prompt_length]
        for start in tqdm(range(0, len(fitting), size), desc="sampling", delay=5, leave=False):
            places = fitting[start:start + size]
            written = self.generate([asked[place] for place in places], step)
            for place, text in zip(places, written, strict=True):
                texts[place] = text
        return texts

    @torch.no_grad()
    def generate(self, asked, step):
        """One batch: a text for each, None for one that was cut off."""
        T = self.args.max_completion_length
        inputs = self.inputs(asked)
        start = inputs["input_ids"].shape[1]
        rows = []
        for one in asked:
            key = (self.args.seed, step, one["id"], "sample", 0)  # as in common.decode
            rows.append(torch.rand(T, generator=generator(*key), dtype=torch.float64))
        uniform_BT = torch.stack(rows).to(self.model.device)
        draw = Draw(uniform_BT, start, self.args.temperature)
        ids_BT = self.model.generate(
            **inputs, max_new_tokens=T, do_sample=False, logits_processor=[draw])[:, start:].tolist()
        return [self.text_of(ids) for ids in ids_BT]

    def text_of(self, ids):
        """The text up to the first end token; None where there is none."""
        ends = [place for place, token in enumerate(ids) if token in self.ends]
        return self.tokenizer.decode(ids[:ends[0]], skip_special_tokens=True) if ends else None

    @torch.no_grad()
    def surprise(self, asked, texts):
        """Mean −log p of a token of each text, its end token included. A model that reads text sees no picture."""
        found = []
        for one, text in zip(asked, texts, strict=True):
            inputs = self.inputs([one])
            ids = self.tokenizer(text, add_special_tokens=False).input_ids + [self.tokenizer.eos_token_id]
            longer = {name: lengthened(name, value, ids, inputs) for name, value in inputs.items()}
            logits_TV = self.model(**longer).logits[0, -len(ids) - 1:-1].float()
            logp_T = token_logps(logits_TV, torch.tensor(ids, device=logits_TV.device))
            found.append(-logp_T.mean().item())
        return found

    def inputs(self, asked):
        """What the model is given: the chats, padded on the left, with their pictures if it sees."""
        if self.tool.chat_template is None:  # a model that never learned to chat continues the text
            texts = [one["problem"] for one in asked]
            return self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
        shape = dict(padding=True, return_tensors="pt")
        shape = dict(processor_kwargs=shape) if self.sees else shape
        chats = [self.chat(one) for one in asked]
        inputs = self.tool.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, **shape).to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def chat(self, one):
        """The messages that ask for a text."""
        content = one["problem"].replace("<image>", "")
        if self.sees:
            pictures = [{"type": "image", "image": picture} for picture in one["images"]]
            content = [*pictures, {"type": "text", "text": content}]
        messages = [{"role": "user", "content": content}]
        if not self.args.system_prompt:
            return messages
        return [{"role": "system", "content": self.args.system_prompt}, *messages]


def lengthened(name, value, ids, inputs):
    """An input of the model with the tokens of a text after it: their ids, seen (1), and no picture's (0)."""
    if value.shape[:2] != inputs["input_ids"].shape[:2] or value.dim() != 2:
        return value  # pictures
    if name == "input_ids":
        more = value.new_tensor([ids])
    elif name == "attention_mask":
        more = value.new_ones(1, len(ids))
    else:
        more = value.new_zeros(1, len(ids))
    return torch.cat([value, more], 1)

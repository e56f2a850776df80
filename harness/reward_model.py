"""A reward model scores answers in free text, which no rule can check (VLAA-Thinker, arXiv 2504.11468).

It can be any sequence classifier with one label that transformers loads. It reads the question and the answer as text;
one built on Qwen2.5-VL reads the pictures too, and other vision-language models are refused. The text is what a user
would see: the question without --instruction, and the final answer without the thought.

    judge(problem, answer)       S, the score of one answer; `common.grade` makes a reward of it
    judge.read(problems, texts)  scores the final answers of many texts in batches; S then only looks them up

The score of a reference answer is kept for the whole run, by its question, words and pictures: another data set may use
the same ids. It is computed by itself, not in a batch: its last digits are the same beside any answers, and in a
resumed run.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pickle import UnpicklingError

from harness.answers import final_answer, unbox
from harness.flags import UserError
from harness.processor import check_tokenizer, loading, make_processor
from harness.prompts import content_of
from harness.run import Run

import torch
from tqdm import tqdm
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLPreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

# What weights are called in checkpoints that keep the names of the hub's Qwen2.5-VL, and what they are called here.
HUB_NAMES = {"^visual": "model.visual", r"^model(?!\.(?:language_model|visual))": "model.language_model"}
BATCH = 16  # answers that are scored together
# What transformers raises where a file of a model is cut short, or something else than it should be.
BROKEN_FILE = (EOFError, KeyError, RuntimeError, UnpicklingError)


class Qwen2_5_VLForSequenceClassification(GenericForSequenceClassification, Qwen2_5_VLPreTrainedModel):
    """Qwen2.5-VL with a score head, `score.weight`, in the place of its words.

    transformers has such a class for its text models and none for Qwen2.5-VL. This one is made of the same parts, and
    its checkpoints have the same layout: the score is read at the last token that is no padding.
    """


def load(name: str, folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The reward model in a folder (or of that name on the hub), on the CPU, and its tokenizer.

    UserError unless it is a sequence classifier with one label, and all its weights and its tokenizer are there. Code
    that a checkpoint brings is not run.
    """
    with loading(name, "--reward_model", also=BROKEN_FILE):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = class_of(config)
        check_kind(name, config, kind)
        names = HUB_NAMES if kind is Qwen2_5_VLForSequenceClassification else None
        model, report = kind.from_pretrained(
            folder, config=config, key_mapping=names, output_loading_info=True, ignore_mismatched_sizes=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    wrong = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if wrong:  # a score head that was never trained would be drawn at random
        raise UserError(f"--reward_model {name}: {len(wrong)} weights are missing or do not fit, {wrong[0]} for one; "
                        "name a model that was trained to score")
    rows = model.get_input_embeddings().num_embeddings
    check_tokenizer(f"--reward_model {name}", tokenizer, rows, chats=sees_pictures(model))
    tokenizer.padding_side = "right"  # what stands after a token cannot change its state, what stands before can
    if tokenizer.pad_token_id is not None:  # by it a classifier knows its last token, whatever its config says
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.eval().requires_grad_(False), tokenizer


def check_kind(name: str, config: PreTrainedConfig, kind: type | None):
    """UserError unless a config is that of a sequence classifier with one label."""
    if kind is None:
        raise UserError(f"--reward_model {name} is a {config.model_type}, of which transformers has no sequence "
                        "classifier; name another")
    if hasattr(config, "vision_config") and config.model_type != "qwen2_5_vl":
        raise UserError(f"--reward_model {name} is a {config.model_type}, which sees pictures; only Qwen2.5-VL is "
                        "given pictures here, and without them it would be a different model; name another")
    if config.num_labels != 1:
        made = f" (its config.json says {config.architectures[0]})" if config.architectures else ""
        raise UserError(f"--reward_model {name} has {config.num_labels} labels{made}; a reward model has one")


def context_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a model reads at most: what its tokenizer says, or its config, or its table of positions."""
    config = model.config.get_text_config()
    if not hasattr(config, "max_position_embeddings"):  # some kinds of model have no such limit
        return tokenizer.model_max_length
    limit = config.max_position_embeddings
    for module in model.modules():
        is_table = isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
        if is_table and module.num_embeddings == limit and module.padding_idx is not None:
            limit -= module.padding_idx + 1  # RoBERTa counts positions from one past the padding's
            break
    return min(limit, tokenizer.model_max_length)


def judge(name: str, folder: str, run: Run | None) -> "RewardModel":
    """The reward model in a folder (or of that name on the hub), ready to score on the run's device."""
    model, tokenizer = load(name, folder)
    processor = None
    if sees_pictures(model):
        with loading(name, "--reward_model"):
            processor = make_processor(folder, run.args if run else None)
        processor.tokenizer = tokenizer  # it pads on the right
    return RewardModel(model, tokenizer, run.device if run else torch.device("cpu"), processor)


def class_of(config: PreTrainedConfig) -> type | None:
    """What loads a checkpoint with this config as a sequence classifier; None where nothing does."""
    if config.model_type == "qwen2_5_vl":
        return Qwen2_5_VLForSequenceClassification
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return AutoModelForSequenceClassification
    return None


def sees_pictures(model: PreTrainedModel) -> bool:
    """Whether a reward model reads pictures too."""
    return isinstance(model, Qwen2_5_VLForSequenceClassification)


class RewardModel:
    """A reward model that lives on the CPU and visits `device` only to score. Each process has its own.

    processor: for a model that sees pictures. context: how many tokens the model reads at most. references: the
    scores of reference answers, kept. known: those of the answers that were read last, and of their references.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device,
        processor: ProcessorMixin | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.processor = processor
        self.context = context_of(model, tokenizer)
        self.references = {}
        self.known = {}

    def __call__(self, problem: dict, answer: str) -> float:
        """The score S of an answer: looked up, or computed now."""
        key = key_of(problem, answer)
        if key in self.known:
            return self.known[key]
        with self.on_device():
            return self.scores([(problem, answer)])[0]

    def read(self, problems: Sequence[dict], texts: Sequence[str]):
        """Scores the final answers of these texts to open-ended problems, and their reference answers if they are new.

        Equal answers are scored once, and one that is the reference answer to the letter has that one's score.
        """
        asked = {}
        references = {}
        for problem, text in zip(problems, texts, strict=True):
            answer = final_answer(text)
            if problem["verifier"] != "open_ended" or answer is None:
                continue
            gold = unbox(problem["answer"])
            references[key_of(problem, gold)] = (problem, gold)
            asked[key_of(problem, answer)] = (problem, answer)
        self.known = {}
        if not asked:
            return
        with self.on_device():
            for key, (problem, gold) in tqdm(references.items(), desc="scoring references", delay=5, leave=False):
                kept = lasting_key(problem)
                if kept not in self.references:
                    self.references[kept] = self.scores([(problem, gold)])[0]
                self.known[key] = self.references[kept]
            left = [key for key in asked if key not in references]
            left.sort(key=lambda key: (len(key[-1]), key))  # alike in length: little padding, whatever the order was
            for start in tqdm(range(0, len(left), self.batch), desc="scoring", delay=5, leave=False):
                keys = left[start:start + self.batch]
                scored = self.scores([asked[key] for key in keys])
                for key, score in zip(keys, scored, strict=True):
                    self.known[key] = score

    @property
    def batch(self) -> int:
        """How many answers are scored together: one, where padding would be taken for words."""
        return 1 if self.tokenizer.pad_token_id is None else BATCH

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """The model stands on the device inside, and on the CPU again afterwards."""
        self.model.to(self.device)
        try:
            yield
        finally:
            self.model.to("cpu")

    @torch.no_grad()
    def scores(self, pairs: Sequence[tuple[dict, str]]) -> list[float]:
        """The scores of (problem, answer) pairs in one forward pass, padded on the right."""
        inputs = self.inputs_of(pairs)
        longest = int(inputs["attention_mask"].sum(1).argmax())
        length = int(inputs["attention_mask"][longest].sum())
        if length > self.context:
            raise UserError(f"problem {pairs[longest][0]['id']} has {length} tokens with an answer, over the "
                            f"{self.context} that the reward model reads; lower --max_completion_length, or name "
                            "another --reward_model")
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        scores = self.model(**inputs).logits[:, 0].float()
        if not scores.isfinite().all():
            first = pairs[int((~scores.isfinite()).nonzero()[0])]
            raise UserError(f"the reward model's score of an answer to problem {first[0]['id']} is not finite; try "
                            "another --reward_model")
        return scores.tolist()

    def inputs_of(self, pairs: Sequence[tuple[dict, str]]) -> dict[str, torch.Tensor]:
        """What the model reads: the chat of question and answer, with its pictures where the model sees them."""
        padding = dict(return_tensors="pt", padding=len(pairs) > 1)
        if self.processor is not None:
            pictures = [picture for problem, _ in pairs for picture in problem["images"]]
            chats = [self.chat(content_of(problem), answer) for problem, answer in pairs]
            return dict(self.processor(text=chats, images=pictures, return_mm_token_type_ids=True, **padding))
        questions = [problem["problem"].replace("<image>", " ").strip() for problem, _ in pairs]
        answers = [answer for _, answer in pairs]
        if self.tokenizer.chat_template is None:
            return dict(self.tokenizer(questions, answers, **padding))
        chats = [self.chat(question, answer) for question, answer in zip(questions, answers, strict=True)]
        return dict(self.tokenizer(chats, add_special_tokens=False, **padding))

    def chat(self, question: str | list, answer: str) -> str:
        """A user's question and an assistant's answer as the model's own template writes them."""
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False)


def key_of(problem: dict, answer: str) -> tuple:
    """What a score belongs to among the answers of one `read`, whose problems have ids of their own."""
    return problem["id"], answer


def lasting_key(problem: dict) -> tuple:
    """What the score of a reference answer belongs to in a whole run."""
    pictures = [(picture.size, hashlib.sha256(picture.tobytes()).digest()) for picture in problem["images"]]
    return problem["problem"], problem["answer"], *pictures

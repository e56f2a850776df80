"""The small world under the algorithms: load a model, sample answers, read them, grade them.

    load      load_policy, save_policy, load_problems    Qwen2.5-VL of any size, whole or sharded, and what it is asked
              load_judge                                 a reward model, for answers in free text
    encode    encode                                     problems to token ids and picture patches
    sample    sample, forced                             the first verb: a model makes answers
    read      read, token_logps, token_entropy           the second verb: a model looks at answers
    grade     grade, is_right, format_reward             one verifier for each problem
    finish    evaluate, finish                           held-out accuracy; the saved model and its page

Below lies `harness/`, what surrounds a run and is in no paper: flags, processes, checkpoints, sharding, data sets.

Shape letters: P problems, G answers to each, B answers in all, T answer tokens, S prompt tokens, R rows of L tokens,
N tokens of a pass or a chunk, D hidden size, V vocabulary. A small letter is a part of what the large one counts.
"""

import contextlib
import dataclasses
import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from harness import problems as data_sets
from harness import reward_model as reward_models
from harness import sharding
from harness.answers import (
    VERIFIERS,
    box_iou,
    check_gradable,
    final_answer,
    gold_in_pixels,
    in_pixels,
    same_math,
    unbox,
)
from harness.attention import NAME as PACKED_ROWS
from harness.attention import SharedPrompts, pack_rows
from harness.cache import block_cache, wave_size, waves
from harness.disk import room_for, written_beside
from harness.embedding import ngrams, reasoning, spread
from harness.flags import UserError, is_toy, of_the_world
from harness.memory import LOGITS
from harness.processor import Processor, check_tokenizer, loading, make_processor
from harness.prompts import chat
from harness.reward_model import RewardModel
from harness.rollout import Prompts, Rollout, name_of
from harness.run import Run, bootstrap, generator

import numpy as np
import torch
import torch.distributed as dist
import transformers
from accelerate import init_empty_weights
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

PAGE = 2**20  # bytes, about what the page of a run and its pictures take
OPEN_ENDED_BETA = 1.0  # how fast an open-ended reward saturates; the paper gives no number
BELOW_ONE = 1 - 2**-24  # the largest fp32 below 1: an open-ended reward never gets there
# A picture token in an answer breaks the next forward pass: "image features and image tokens do not match".
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]


# === load =============================================================================================================


class Policy(transformers.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL in two halves, body and head, so that logits exist for a few positions at a time only.

    When the model is sharded, body, head and head_in_chunks are registered as forward methods: a submodule that is
    called outside them would see shards instead of whole weights.
    """

    @classmethod
    def of(cls, model: transformers.Qwen2_5_VLForConditionalGeneration) -> "Policy":
        """A plain Qwen2.5-VL as a Policy: the same weights, our methods, and an attention that knows packed rows."""
        model.__class__ = cls
        model.model.language_model.set_attn_implementation(PACKED_ROWS)
        return model

    def set_vocabulary(self, tokenizer: transformers.PreTrainedTokenizerBase):
        """Learns from the tokenizer which ids an answer may hold and which ids end it."""
        ends = self.generation_config.eos_token_id
        if not isinstance(ends, list):
            ends = [ends]
        self.ends = sorted({tokenizer.eos_token_id, *ends} - {None})  # trap: end of text
        self.banned = tokenizer.convert_tokens_to_ids(VISION_TOKENS)
        self.vocabulary = len(tokenizer)  # the rows beyond are padding, and their number differs between model sizes

    def body(
        self, ids_RL: torch.Tensor, positions_3RL: torch.Tensor, mask: torch.Tensor | dict,
        pixels: torch.Tensor | None = None, grids: torch.Tensor | None = None, cache: DynamicCache | None = None,
    ) -> torch.Tensor:
        """Hidden states (R, L, D). mask: (R, L), 1 at tokens and 0 at padding. In its place there may be PackedRows,
        to read packed rows (R is 1), or SharedPrompts, to decode answers (L is 1).

        Rotary positions are always passed: the model's own guess is 1-D after a prefill.
        """
        outputs = self.model(  # trap: mrope, trap: stale rope_deltas
            input_ids=ids_RL, position_ids=positions_3RL, attention_mask=mask, pixel_values=pixels,
            image_grid_thw=grids, past_key_values=cache, use_cache=cache is not None,
        )
        return outputs.last_hidden_state

    def head(self, hidden_ND: torch.Tensor, temperature: float) -> torch.Tensor:
        """Logits (N, V) in fp32, divided by the temperature; forbidden ids at -1e9 (with -inf, 0·inf would be NaN)."""
        logits_NV = self.lm_head(hidden_ND)[:, :self.vocabulary].float() / temperature  # trap: temperature
        banned = torch.tensor(self.banned, device=logits_NV.device)
        return logits_NV.index_fill(1, banned, -1e9)  # trap: vision tokens sampled

    def head_in_chunks(
        self, fn: Callable, tokens_N: torch.Tensor, temperature: float, hidden_ND: torch.Tensor,
        others: Sequence[tuple["Policy", torch.Tensor]] = (),
    ) -> tuple[torch.Tensor, ...]:
        """fn(*logits_NV, tokens_N) at every position, a chunk of positions at a time: (B, T, V) never exists.

        `others` are further readings of the same positions, as (policy, hidden_ND); their logits follow ours in fn's
        arguments. The chunk's logits are recomputed in the backward pass. Returns fn's tensors, each (N, ...).
        """
        policies = [policy for policy, _ in others]

        def one_chunk(tokens_n: torch.Tensor, hidden_nD: torch.Tensor, *other_hiddens_nD: torch.Tensor) -> tuple:
            # The class's own head, not the registered one: the registered head would reduce the gradient after every
            # chunk, and processes with different numbers of chunks would wait for each other forever. A teacher is
            # only read: its registered head gathers weights, and has no gradient to reduce.  # trap: unwrapped forward
            logits_nV = [Policy.head(self, hidden_nD, temperature)]
            for policy, other_nD in zip(policies, other_hiddens_nD, strict=True):
                if policy is self:
                    logits_nV.append(Policy.head(self, other_nD, temperature))
                else:
                    logits_nV.append(policy.head(other_nD, temperature))
            values = fn(*logits_nV, tokens_n)
            return values if isinstance(values, tuple) else (values,)

        size = max(1, LOGITS // self.vocabulary)
        columns = [tokens_N, hidden_ND, *(hidden for _, hidden in others)]
        if len(tokens_N) <= size:  # all positions are one chunk: recomputing it would save nothing
            return one_chunk(*columns)
        chunks = zip(*(column.split(size) for column in columns), strict=True)
        results = [checkpoint(one_chunk, *chunk, use_reentrant=False) for chunk in chunks]
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def load_policy(
    name: str, run: Run | None = None, train: bool = False, args: Namespace | None = None,
) -> tuple[Policy, Processor]:
    """The model and processor called `name`: toy, toy-teacher, a folder in the hub's layout, or a name on the hub.

    Without `run`: whole, on the CPU. With it: on the run's device, and sharded if there is a GPU or more than one
    process. `train` keeps gradients (the vision tower's too if args.train_vision) and makes the weights fp32 masters;
    a model that is only read, such as a teacher, stays in its checkpoint's own dtype.
    """
    if args is None and run is not None:
        args = run.args
    folder = find_model(name, run)
    with loading(name):
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "qwen2_5_vl":
            raise UserError(f"model {name} is a {config.model_type}; only Qwen2.5-VL (qwen2_5_vl) is read here")
        processor = make_processor(folder, args)
        check_tokenizer(f"model {name}", processor.tokenizer, rows=config.get_text_config().vocab_size)
        own_dtype = config.dtype or torch.float32
        dtype = own_dtype
        if train:
            dtype = torch.float32  # trap: bf16 adam
        if run is not None and run.sharded:
            policy = load_shards(folder, config, dtype, run.device)
        else:
            policy = load_whole(folder, dtype)
    policy.own_dtype = own_dtype  # the dtype that save_policy writes
    policy.set_vocabulary(processor.tokenizer)
    policy.requires_grad_(train)
    policy.model.visual.requires_grad_(train and args.train_vision)
    recompute = train and args.gradient_checkpointing
    policy.train(recompute)  # in eval mode the model silently would not recompute
    if recompute:
        policy.activation_checkpointing_enable()
    return policy, processor


def load_processor(name: str, run: Run) -> Processor:
    """The processor of a model without the model, for whoever only looks at prompts."""
    folder = find_model(name, run)
    with loading(name):
        return make_processor(folder, run.args)


def tabletop():
    """The package of the tabletop. Imported only here, and only when its name is called: nothing else needs it."""
    import tabletop
    return tabletop


def find_model(name: str, run: Run | None = None) -> str:
    """A folder or a hub name for `name`. A model of the tabletop is built first, by one process for all."""
    is_folder = Path(name, "config.json").is_file()
    if is_folder or not is_toy(name):
        return name
    with run.accelerator.main_process_first() if run else contextlib.nullcontext():
        return tabletop().build(name)


def load_whole(folder: str, dtype: torch.dtype) -> Policy:
    """The whole model on the CPU; UserError unless the checkpoint holds every weight, and no other."""
    # Loaded as transformers' own class, by whose name the hub's key names are translated; only then made a Policy.
    policy, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        first = sorted(str(key) for key in wrong)[0]
        raise UserError(f"{folder}: {len(wrong)} weights do not fit config.json, {first} for one")
    return Policy.of(policy)


def load_shards(folder: str, config: transformers.PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Policy:
    """The model with every weight split over a node's processes; no process but the first ever holds a whole copy."""
    with init_empty_weights():  # weights on the meta device, buffers (rotary frequencies) real
        policy = Policy.of(AutoModelForImageTextToText.from_config(config, dtype=dtype))
    policy.tie_weights()
    sharding.split(policy, device, methods=("body", "head", "head_in_chunks"))
    sharding.fill(policy, load_whole(folder, dtype).state_dict() if dist.get_rank() == 0 else {})
    policy.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return policy


def trained_weights(policy: Policy) -> list[torch.nn.Parameter]:
    """The weights that gradients reach: what the optimizer is given."""
    return [weight for weight in policy.parameters() if weight.requires_grad]


def save_policy(policy: Policy, processor: Processor, folder: str, is_main: bool = True):
    """Writes the hub's layout: safetensors, config, tokenizer, preprocessor_config. A collective call when sharded.

    The weights have the dtype that the model was loaded from, whatever it was trained in. UserError if the disk is
    full. config.json and preprocessor_config.json are written last, so that half a model is never taken for a model.
    """
    weights = sharding.whole_weights(policy)
    if not is_main:
        return
    sharding.cast(weights, policy.own_dtype)
    with init_empty_weights():  # a shell of the plain class, so that config.json names what others can load
        shell = AutoModelForImageTextToText.from_config(policy.config, dtype=policy.own_dtype)
    shell.tie_weights()
    shell.generation_config = policy.generation_config
    with written_beside("the model", folder, needed=sum(weight.nbytes for weight in weights.values())) as beside:
        shell.save_pretrained(beside, state_dict=weights)
        processor.tokenizer.save_pretrained(beside)
        processor.image_processor.save_pretrained(beside)


def load_problems(spec: str, run: Run | None = None) -> Sequence[dict]:
    """A sequence of problems: dicts with id, images (PIL), problem, answer, verifier, and trace where there is one.

    spec: name@split or name@split:count, where name is toy, a data set on the hub, a .json, .jsonl or .parquet file, or
    a folder that holds metadata.jsonl or parquet files; several with commas between are mixed, and "none" gives no
    problems. Every row is checked here, so that training does not stop at row 30,000. Raises UserError, naming row,
    column and value. With `run`, its --verifiers and --skip_bad_rows leave rows out, which is said.
    """
    return data_sets.mixed(spec, lambda one: load_data_set(one, run))


def load_data_set(spec: str, run: Run | None) -> Sequence[dict]:
    """The problems of one data set, of the tabletop or from elsewhere; see load_problems."""
    args = run.args if run else of_the_world()
    asked = data_sets.parse_spec(spec)
    if is_toy(asked.name):
        return data_sets.with_verifiers(tabletop().load(asked.name, asked.split, asked.count), args.verifiers)
    problems, checked = data_sets.load(spec, data_sets.read_verifiers(args.verifiers), args.skip_bad_rows)
    if run:
        data_sets.note_left_out(run, spec, checked)
    return problems


def load_judge(name: str, run: Run | None = None) -> RewardModel | None:
    """The reward model called `name`, which scores open_ended answers: a folder, a name on the hub, or toy-judge.

    None for "none". Each process has a copy of its own on the CPU.
    """
    if name == "none":
        return None
    return reward_models.judge(name, find_model(name, run), run)


# === encode ===========================================================================================================


def positions_of(policy: Policy, prompts: Prompts, p: int) -> tuple[torch.Tensor, int]:
    """(3, S) rotary positions in time, height, width of prompt p, and the position of the first answer token."""
    device = policy.device
    positions_3S, _ = policy.model.get_rope_index(  # trap: mrope
        prompts.ids[p][None].to(device), mm_token_type_ids=prompts.types[p][None].to(device),
        image_grid_thw=prompts.grids[p].to(device))
    return positions_3S[:, 0], int(positions_3S.max()) + 1


def encode(processor: Processor, problems: Iterable[dict]) -> Prompts:
    """Problems (dicts as load_problems gives them) to Prompts. Nothing is truncated; pictures keep the pixel budget.

    Each problem is given a `size`: width and height in pixels of its first picture as the processor resized it. One
    without pictures, which no data set holds, is text alone, and has no patches.
    """
    patch = processor.image_processor.patch_size
    prompts = Prompts.empty()
    for problem in problems:
        out = processor(
            text=[chat(processor, problem)], images=problem["images"] or None, return_tensors="pt",
            return_mm_token_type_ids=True)
        grids = out.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long))
        if len(grids) > 0:
            _, rows, columns = grids[0].tolist()
            problem = {**problem, "size": (columns * patch, rows * patch)}
        prompts.problems.append(problem)
        prompts.ids.append(out["input_ids"][0])
        prompts.types.append(out["mm_token_type_ids"][0])
        prompts.pixels.append(out.get("pixel_values", torch.zeros(0, 1)))
        prompts.grids.append(grids)
    return prompts


def pictures_of(pixels: Sequence, grids: Sequence, places: Iterable[int], device: torch.device) -> dict:
    """The pictures of the prompts at `places` as arguments of Policy.body: none where the prompts are all text."""
    shown = [p for p in places if len(grids[p]) > 0]
    if not shown:
        return {}
    return dict(
        pixels=torch.cat([pixels[p] for p in shown]).to(device), grids=torch.cat([grids[p] for p in shown]).to(device))


# === sample ===========================================================================================================


def blank(
    processor: Processor, problems: Iterable[dict], group_B: torch.Tensor, *, T: int, device: torch.device,
) -> Rollout:
    """A rollout of answers of at most T tokens, none of them written yet."""
    B = len(group_B)
    return Rollout(
        prompts=encode(processor, problems),
        temperature=1.0,
        group_B=group_B,
        tokens_BT=torch.full((B, T), processor.tokenizer.pad_token_id, device=device),
        mask_BT=torch.zeros(B, T, device=device),
        logp_BT=torch.zeros(B, T, device=device),
        entropy_BT=torch.zeros(B, T, device=device),
        finished_B=torch.zeros(B, device=device),
        texts=[],
    )


@torch.no_grad()
def sample(
    policy: Policy, processor: Processor, problems: Sequence[dict], num_generations: int, *, seed: tuple,
    max_completion_length: int, temperature: float = 1.0, sample_batch_size: int = 0,
) -> Rollout:
    """Samples `num_generations` answers to each problem; temperature 0 is greedy. Returns a Rollout, B = P·G.

    At most sample_batch_size answers are decoded together; 0: as many as the GPU's memory has room for.

    A prompt and its pictures are read once for a group, and stand in the cache once. Answer g to a problem
    is drawn with uniforms that depend on (*seed, problem id, "sample", g) alone, so that it is the same whatever the
    batch, the group size or the number of processes. A collective call when sharded.
    """
    G = num_generations
    group_B = torch.arange(len(problems)).repeat_interleave(G)
    rollout = blank(processor, problems, group_B, T=max_completion_length, device=policy.device)
    rollout.temperature = temperature
    if temperature == 0:  # greedy: log-probs and entropies are those at temperature 1
        rollout.temperature = 1.0
    with sharding.gathered(policy):
        size = sample_batch_size or wave_size(policy, rollout, G)
        for members, numbers in tqdm(waves(len(problems), G, size), desc="sampling", delay=5, leave=False):
            decode(policy, rollout, members, numbers, seed=seed, greedy=temperature == 0)
    cut_to_longest(rollout)
    lengths = rollout.mask_BT.sum(1).long().tolist()
    ids = [row[:length] for row, length in zip(rollout.tokens_BT.tolist(), lengths, strict=True)]
    rollout.texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return rollout


def cut_to_longest(rollout: Rollout):
    """Drops the columns after the longest answer."""
    T = 1
    if len(rollout.mask_BT) > 0:
        T = max(T, int(rollout.mask_BT.sum(1).max()))
    for name in ("tokens_BT", "mask_BT", "logp_BT", "entropy_BT"):
        setattr(rollout, name, getattr(rollout, name)[:, :T])


def decode(policy: Policy, rollout: Rollout, members: range, numbers: range, *, seed: tuple, greedy: bool):
    """Decodes the answers `numbers` to the problems `members` into the rollout.

    The prompts are read once, for all their answers; an answer that has ended leaves the batch.
    """
    T = rollout.tokens_BT.shape[1]
    G = len(rollout.group_B) // len(rollout.prompts.problems)
    uniform_BT = torch.stack([
        torch.rand(T, generator=generator(*seed, rollout.prompts.problems[p]["id"], "sample", g), dtype=torch.float64)
        for p in members for g in numbers
    ]).to(policy.device)
    rows = torch.tensor([p * G + g for p in members for g in numbers], device=policy.device)
    ends = torch.tensor(policy.ends, device=policy.device)
    state = prefill(policy, rollout.prompts, members, repeats=len(numbers))
    for t in range(T):
        # No top-p, no top-k, no repetition penalty, whatever the checkpoint ships.  # trap: truncated sampling
        logits_BV = policy.head(state.hidden_BD, rollout.temperature)
        entropy_B = token_entropy(logits_BV)
        check_finite(token_entropy, entropy_B, rollout, rows)  # NaN would draw an id that does not exist
        logprobs_BV = logits_BV.log_softmax(1)
        token_B = logits_BV.argmax(1) if greedy else inverse_cdf(logprobs_BV.exp(), uniform_BT[:, t])
        going_B = ~torch.isin(token_B, ends)
        rollout.tokens_BT[rows, t] = token_B
        rollout.mask_BT[rows, t] = 1.0
        rollout.logp_BT[rows, t] = logprobs_BV.gather(1, token_B[:, None])[:, 0]
        rollout.entropy_BT[rows, t] = entropy_B
        rollout.finished_B[rows] = (~going_B).float()
        if t == T - 1 or not going_B.any():
            break
        if not going_B.all():
            keep = going_B.nonzero()[:, 0]
            rows = rows[keep]
            uniform_BT = uniform_BT[keep]
            token_B = token_B[keep]
            state.select(keep)
        state.read(policy, token_B)


@dataclasses.dataclass
class Decoding:
    """What a wave of answers has read so far: the last hidden state, the next position, the prompts and the cache."""

    hidden_BD: torch.Tensor
    next_B: torch.Tensor
    prompts: SharedPrompts

    def select(self, keep: torch.Tensor):
        """Keeps these rows only."""
        self.hidden_BD = self.hidden_BD[keep]
        self.next_B = self.next_B[keep]
        self.prompts.select(keep)

    def read(self, policy: Policy, token_B: torch.Tensor):
        """Reads one more token of every answer."""
        positions_3B1 = self.next_B[None, :, None].expand(3, -1, -1)
        seen = {"full_attention": self.prompts}
        self.hidden_BD = policy.body(token_B[:, None], positions_3B1, seen, cache=self.prompts.cache)[:, -1]
        self.next_B = self.next_B + 1


def prefill(policy: Policy, prompts: Prompts, members: range, repeats: int) -> Decoding:
    """Reads the prompts `members` once, padded on the left, for `repeats` answers to each."""
    R = len(members)
    S = max(len(prompts.ids[p]) for p in members)
    ids_RS = torch.zeros(R, S, dtype=torch.long)
    mask_RS = torch.zeros(R, S, dtype=torch.long)
    positions_3RS = torch.zeros(3, R, S, dtype=torch.long)
    first_R = torch.zeros(R, dtype=torch.long)
    for row, p in enumerate(members):
        start = S - len(prompts.ids[p])  # trap: left padding
        ids_RS[row, start:] = prompts.ids[p]
        mask_RS[row, start:] = 1
        positions_3RS[:, row, start:], first_R[row] = positions_of(policy, prompts, p)
    device = policy.device
    pictures = pictures_of(prompts.pixels, prompts.grids, members, device)
    cache = block_cache(policy.config)
    hidden_RSD = policy.body(
        ids_RS.to(device), positions_3RS.to(device), mask_RS.to(device), cache=cache, **pictures)
    return Decoding(
        hidden_BD=hidden_RSD[:, -1].repeat_interleave(repeats, 0),
        next_B=first_R.to(device).repeat_interleave(repeats, 0),
        prompts=SharedPrompts(cache, mask_RS.to(device), repeats),
    )


def inverse_cdf(probs_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """(B,): the first id whose cumulative probability exceeds the uniform.

    In fp64, so that an id of probability 0 (a forbidden one) can never be the answer: the uniform times the total
    stays strictly below the total.
    """
    cumulative_BV = probs_BV.double().cumsum(1)
    threshold_B = uniform_B * cumulative_BV[:, -1]
    return torch.searchsorted(cumulative_BV, threshold_B[:, None], right=True)[:, 0]


def forced(policy: Policy, processor: Processor, problems: Iterable[dict], texts: Sequence[str]) -> Rollout:
    """Teacher forcing: a Rollout of given texts, one for each problem, each with its end token. Nothing is sampled."""
    tokenizer = processor.tokenizer
    ids = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]  # trap: end of text
    longest = max(len(row) for row in ids)
    rollout = blank(processor, problems, torch.arange(len(ids)), T=longest, device=policy.device)
    for b, row in enumerate(ids):
        rollout.tokens_BT[b, :len(row)] = torch.tensor(row)
        rollout.mask_BT[b, :len(row)] = 1.0
    rollout.finished_B[:] = 1.0
    rollout.texts = list(texts)
    return rollout


# === read =============================================================================================================


@dataclasses.dataclass
class Reading:
    """A model, and the pictures it is shown where they are not the rollout's own: one (patches, D) for each problem."""

    policy: Policy
    pixels: list | None = None


def read(
    fn: Callable, rollout: Rollout, *readings: Policy | Reading, batches: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Runs models over the rollout's pictures and answers, and reduces their logits to a few numbers per answer token.

    fn(*logits_NV, tokens_N), one logits for each reading, gives a tensor (N, ...) or several. Returns the same as
    (B, T, ...), 0 outside the mask. `batches` are index tensors of answers that share a forward pass (default: all in
    one). UserError where fn gives something that is not finite, naming the problem.
    """
    B, T = rollout.mask_BT.shape
    if batches is None:
        batches = [torch.arange(B)]
    results = None
    for index_b in tqdm(batches, desc="reading", delay=5, leave=False):
        part = rollout[index_b]
        values = read_once(fn, part, [as_reading(reading) for reading in readings])
        row_N, column_N = part.mask_BT.bool().nonzero(as_tuple=True)
        for value in values:
            check_finite(fn, value, part, row_N)
        if results is None:
            results = [value.new_zeros(B, T, *value.shape[1:]) for value in values]
        where = (index_b.to(row_N.device)[row_N], column_N)
        results = [result.index_put(where, value) for result, value in zip(results, values, strict=True)]
    return results[0] if len(results) == 1 else tuple(results)


def as_reading(model: Policy | Reading) -> Reading:
    return model if isinstance(model, Reading) else Reading(model)


def read_once(fn: Callable, part: Rollout, readings: Sequence[Reading]) -> tuple[torch.Tensor, ...]:
    """One forward pass of each reading: fn's tensors at the answer tokens of `part`, each (N, ...)."""
    hiddens_ND = []
    for reading in readings:
        inputs, where_N = pack(part, reading)
        hiddens_ND.append(reading.policy.body(**inputs)[0, where_N])
    tokens_N = part.tokens_BT[part.mask_BT.bool()]
    first, *others = readings
    pairs = [(reading.policy, hidden) for reading, hidden in zip(others, hiddens_ND[1:], strict=True)]
    return first.policy.head_in_chunks(fn, tokens_N, part.temperature, hiddens_ND[0], others=pairs)


def check_finite(fn: Callable, value_N: torch.Tensor, part: Rollout, row_N: torch.Tensor):
    """UserError naming the first problem at whose answer fn gave something that is not finite."""
    finite_N = value_N.isfinite()
    if finite_N.dim() > 1:
        finite_N = finite_N.flatten(1).all(1)
    if finite_N.all():
        return
    n = int((~finite_N).nonzero()[0])
    problem = part.problems[int(row_N[n])]  # trap: false cause
    raise UserError(f"{name_of(fn)} gave something that is not finite at an answer to problem {problem['id']}: look at "
                    f"{name_of(fn)}, then at its logits (the model's weights, or this problem's picture)")


def pack(rollout: Rollout, reading: Reading) -> tuple[dict, torch.Tensor]:
    """The inputs of one forward pass: a packed row for each group, its prompt once, then its answers.

    The rows are concatenated, without padding. An answer token sees the prompt and its own answer up to itself; rotary
    positions restart after the prompt for every answer. Returns body's inputs, and the index of the hidden state that
    predicts each answer token: for the first token of every answer it is that of the prompt's last token.
    """
    lengths_B = rollout.mask_BT.sum(1)
    up_to_end_BT = torch.arange(rollout.mask_BT.shape[1], device=lengths_B.device) < lengths_B[:, None]
    if (lengths_B == 0).any() or not torch.equal(rollout.mask_BT.bool(), up_to_end_BT):
        raise ValueError("mask_BT must be 1 from an answer's first token to its end: to leave tokens out of a loss, "
                         "give them weight 0")
    prompts = rollout.prompts
    groups = rollout.groups()
    lengths = lengths_B.long().tolist()
    tokens_BT = rollout.tokens_BT.cpu()
    ids = []
    positions = []
    predictors = {}
    place = 0
    for p, answers in groups.items():
        positions_3S, first = positions_of(reading.policy, prompts, p)
        ids.append(prompts.ids[p])
        positions.append(positions_3S.cpu())
        place += len(prompts.ids[p])
        last_of_prompt = place - 1
        for b in answers:
            ids.append(tokens_BT[b, :lengths[b]])
            positions.append((first + torch.arange(lengths[b])).expand(3, -1))
            predictors[b] = torch.tensor([last_of_prompt, *range(place, place + lengths[b] - 1)])
            place += lengths[b]
    device = reading.policy.device
    rows = pack_rows(
        [len(prompts.ids[p]) for p in groups], [[lengths[b] for b in answers] for answers in groups.values()], device)
    pictures = pictures_of(reading.pixels or prompts.pixels, prompts.grids, groups, device)  # trap: image rows
    ids_1N = torch.cat(ids)[None].to(device)
    positions_31N = torch.cat(positions, 1)[:, None].to(device)
    where_N = torch.cat([predictors[b] for b in range(len(rollout))]).to(device)
    inputs = dict(ids_RL=ids_1N, positions_3RL=positions_31N, mask={"full_attention": rows}, **pictures)
    return inputs, where_N


def token_logps(logits_NV: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token, (N,), under the full vocabulary."""
    return logits_NV.gather(1, tokens_N[:, None])[:, 0] - logits_NV.logsumexp(1)


def token_entropy(logits_NV: torch.Tensor) -> torch.Tensor:
    """Entropy of each full distribution, (N,), in nats: log Z − Σ p·logit."""
    return logits_NV.logsumexp(1) - (logits_NV.softmax(1) * logits_NV).sum(1)


def completion_logits(policy: Policy, rollout: Rollout) -> torch.Tensor:
    """(B, T, V) logits of every answer token, 0 outside the mask. For tests and small models: read() never holds it."""

    def logits(logits_NV: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
        return logits_NV

    return read(logits, rollout, policy)


# === grade ============================================================================================================


def format_reward(problem: dict, text: str) -> float:
    r"""1.0 when a text is one non-empty <think>…</think> block, first thing, and then an answer in \boxed{} or <answer>
    tags; else 0.0."""
    if text.count("<think>") != 1 or text.count("</think>") != 1:
        return 0.0
    block = re.fullmatch(r"\s*<think>(.*\S.*)</think>(.*)", text, re.DOTALL)  # trap: regex
    return float(block is not None and final_answer(block.group(2)) is not None)


def grade(problem: dict, text: str, judge: Callable | None = None) -> float:
    """Reward in [0, 1] of an answer text to a problem (dict with answer and verifier; for iou also images, or size).

    One verifier for each problem, never a weighted sum (VLAA-Thinker, arXiv 2504.11468). A text from which no answer
    can be read earns 0.
    judge(problem, answer) -> float scores a free answer; without one an open_ended problem raises UserError.
    An answer's box in pixels belongs to the picture as the processor resized it, which is what the model saw: its size
    is problem["size"], as `encode` notes it. A gold box in pixels belongs to images[0] and is scaled to that size.
    """
    verifier = problem["verifier"]
    gold = unbox(problem["answer"])
    answer = final_answer(text)
    check_gradable(problem, judge is not None)
    if answer is None:
        return 0.0
    if verifier == "open_ended":
        better = max(judge(problem, answer) - judge(problem, gold), 0.0)
        return min(-math.expm1(-OPEN_ENDED_BETA * better), BELOW_ONE)
    if verifier == "math":
        return float(same_math(gold, answer))
    read_value, _ = VERIFIERS[verifier]
    gold_value = read_value(gold)
    value = read_value(answer)
    if gold_value is None or value is None:
        return 0.0
    if verifier == "iou":
        return box_iou(gold_in_pixels(gold_value, problem), in_pixels(value, problem))
    return float(gold_value == value)


def is_right(problem: dict, text: str, judge: Callable | None = None) -> bool:
    """Whether an answer counts as right: a box with an IoU of at least .5, a judged answer above 0, any other at 1."""
    reward = grade(problem, text, judge)
    if problem["verifier"] == "iou":
        return reward >= 0.5
    if problem["verifier"] == "open_ended":
        return reward > 0
    return reward == 1


# === finish ===========================================================================================================


def evaluate(
    run: Run, policy: Policy, processor: Processor, held_out: Sequence[dict], judge: RewardModel | None = None,
) -> dict[str, float]:
    """Held-out pass@1: mean accuracy over problems at temperature 1, with a 95% bootstrap interval; and the diversity
    of reasoning, where a problem has several answers. {} without any problem.

    The draws depend on the seed and the problem alone, so that two measurements of a run are paired.
    """
    if not held_out:
        return {}
    args = run.args
    G = args.num_generations_eval
    mine = held_out[run.rank::run.world]
    rollout = sample(  # a process without a problem of its own samples too: the weights are gathered by all
        policy, processor, mine or held_out[:1], G, seed=(args.seed, "eval"),
        max_completion_length=args.max_completion_length, sample_batch_size=args.sample_batch_size)
    right_PG = rollout.score(is_right, judge).cpu().double().numpy()
    mean, low, high = bootstrap(everyones(run, right_PG.mean(1)[:len(mine)], len(held_out)))
    found = dict(eval_accuracy=mean, eval_low=low, eval_high=high)
    if G > 1:
        thoughts = [reasoning(text) for text in rollout.texts]
        diversity_P = [spread(ngrams(thoughts[p * G:(p + 1) * G])) for p in range(len(mine))]
        found["eval_diversity"] = float(everyones(run, diversity_P, len(held_out)).mean())
    return found


def everyones(run: Run, mine: Sequence[float], problems: int) -> np.ndarray:
    """A number for each of the held-out problems, (problems,), in their order: one process would have the same."""
    found_P = np.empty(problems)
    for rank, theirs in enumerate(run.gather(mine)):
        found_P[rank::run.world] = theirs
    return found_P


def report():
    """The module that draws. Imported only here, when a run ends: nothing else needs matplotlib."""
    from lab import report
    return report


def finish(run: Run, policy: Policy, processor: Processor):
    """Saves the model where others can load it, draws curves.png and report.html, removes the checkpoints.

    It is called after the loop, so a loop left by `break` ends here too. It is cleaner to call `run.stop()` before
    run.due: that step is then the last, held-out accuracy is measured once more, and a checkpoint records the end.
    """
    run.listen_no_more()  # a signal ends the process again: the last checkpoint stands until all is written
    run.bar.close()
    if run.done < run.args.max_steps:  # trap: early break
        run.say(f"ended after step {run.done} of {run.args.max_steps}")
    save_policy(policy, processor, run.folder, run.is_main)
    if run.is_main:
        look = "no step was finished"
        if run.done > 0:
            with room_for("the page", run.folder, needed=PAGE):
                look = f"look at {report().finish(run.folder, run.pictures)}"
        run.say(f"{look}; the model is in {run.folder}")
    run.end()

"""A KV cache that keeps a prompt once for all its answers and grows in blocks, and how many answers it has room for.

transformers' own dynamic cache is copied whole at every token. On a GPU those copies, each a little larger than the one
before, also leave the memory in pieces that nothing else fits into.
"""

import itertools
import math

from harness.rollout import Rollout

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

BLOCK = 64  # places
ON_A_CPU = 256  # answers decoded together on a CPU, where memory is not what limits them
DRAW = 32  # bytes for each id when a token is drawn: logits and probabilities in fp32, their running sum in fp64
SCORES = 12  # bytes of one head's score at a place: as it is computed, beside those of the prompt, and its softmax
SHARE = 0.8  # of a GPU's free memory: what is left over is for what the arithmetic below does not know


class BlockLayer(DynamicLayer):
    """One layer's keys and values, (rows, heads, places, D) each: `keys` and `values` are views of larger stores.

    From begin_answers on they are the answers' own; prompt_keys and prompt_values are those of the prompts.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the states of new tokens; returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.key_store = key_states[:, :, :0]
            self.value_store = value_states[:, :, :0]
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        self.key_store = with_room(self.key_store, begin, end)
        self.value_store = with_room(self.value_store, begin, end)
        self.key_store[:, :, begin:end] = key_states
        self.value_store[:, :, begin:end] = value_states
        self.show(end)
        return self.keys, self.values

    def show(self, places: int):
        """Makes `keys` and `values` the first `places` places of the stores."""
        self.keys = self.key_store[:, :, :places]
        self.values = self.value_store[:, :, :places]

    def begin_answers(self, answers: int):
        """What was read so far are prompts, and is kept once. What follows are tokens of `answers` answers to them."""
        self.prompt_keys = self.keys
        self.prompt_values = self.values
        _, heads, _, D = self.keys.shape
        self.key_store = self.keys.new_empty(answers, heads, 0, D)
        self.value_store = self.values.new_empty(answers, heads, 0, D)
        self.show(0)

    def select_prompts(self, indices: torch.Tensor):
        """Keeps these prompts only."""
        self.prompt_keys = self.prompt_keys.index_select(0, indices)
        self.prompt_values = self.prompt_values.index_select(0, indices)

    def batch_select_indices(self, indices: torch.Tensor):
        """Keeps these rows only."""
        self.key_store = self.key_store.index_select(0, indices)
        self.value_store = self.value_store.index_select(0, indices)
        self.show(self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.Tensor):
        """The same, as a beam search calls it."""
        self.batch_select_indices(beam_idx)


def with_room(store: torch.Tensor, used: int, wanted: int) -> torch.Tensor:
    """The store itself if it has `wanted` places; else a larger one, of whole blocks, that holds its `used` places."""
    rows, heads, places, D = store.shape
    if wanted <= places:
        return store
    larger = store.new_empty(rows, heads, in_blocks(wanted), D)
    larger[:, :, :used] = store[:, :, :used]
    return larger


def in_blocks(places: int) -> int:
    """`places`, rounded up to whole blocks."""
    return math.ceil(places / BLOCK) * BLOCK


def block_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for the text model of `config`."""
    cache = DynamicCache(config=config.get_text_config())
    cache.layers = [BlockLayer() for _ in cache.layers]
    return cache


def bytes_of_answer(
    config: PreTrainedConfig, dtype: torch.dtype, *, prompt: int, answer: int, generations: int,
) -> int:
    """Bytes that one answer of `answer` tokens needs while it is sampled, in a group of `generations`.

    The larger of two needs: decoding it, and its share of reading the prompt, which a group does once, before decoding
    (activations of the vision tower and of the text model).
    """
    text = config.get_text_config()
    vision = config.vision_config
    token = 3 * text.intermediate_size + 8 * text.hidden_size
    patch = 3 * vision.intermediate_size + 8 * vision.hidden_size
    reading = prompt * (token + patch * vision.spatial_merge_size**2) * dtype.itemsize
    decoding = bytes_to_decode(config, dtype.itemsize, prompt=prompt, answer=answer, generations=generations)
    return max(decoding, reading // generations)


def bytes_to_decode(config: PreTrainedConfig, number: int, *, prompt: int, answer: int, generations: int) -> int:
    """Bytes of an answer that has been decoded to its last token; `number` is the bytes of a number in the cache.

    Its own cache in whole blocks, and its share of the prompt's; one layer's keys once more, because a store is copied
    when it grows or loses rows, and because scores are computed from keys in fp32; one layer's scores; and what a token
    is drawn from.
    """
    text = config.get_text_config()
    place = text.num_key_value_heads * text.hidden_size // text.num_attention_heads * number
    once_more = 4 // number  # in fp32, beside keys of `number` bytes
    own = place * in_blocks(answer) * (2 * text.num_hidden_layers + once_more)
    shared = place * in_blocks(prompt) * 2 * text.num_hidden_layers // generations
    scores = SCORES * text.num_attention_heads * (prompt + answer)
    return own + shared + scores + DRAW * text.vocab_size


def wave_size(policy: PreTrainedModel, rollout: Rollout, generations: int) -> int:
    """How many answers of a blank rollout may be decoded together. Asked when the weights are gathered already."""
    if policy.device.type == "cpu":
        return ON_A_CPU
    prompt = max((len(ids) for ids in rollout.prompts.ids), default=0)
    answer = rollout.tokens_BT.shape[1]
    need = bytes_of_answer(policy.config, policy.dtype, prompt=prompt, answer=answer, generations=generations)
    return answers_that_fit(need, policy.device)


def answers_that_fit(need: int, device: torch.device) -> int:
    """How many answers that need so many bytes each fit into the free memory of a GPU; one at least."""
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # the allocator's, but unused
    return max(1, int(SHARE * (free + kept) / need))


def waves(problems: int, generations: int, size: int) -> list[tuple[range, range]]:
    """Which answers are decoded together, at most `size`: (problems, numbers of their answers) of each wave.

    Whole groups go together; a group that is larger than a wave is cut into slices. A wave takes as long as its longest
    answer, a small one too: so they are as few as can be, and of equal size.
    """
    shares_of_problems = equal_shares(problems, max(1, size // generations))
    shares_of_answers = equal_shares(generations, size)
    return [(members, numbers) for members in shares_of_problems for numbers in shares_of_answers]


def equal_shares(count: int, most: int) -> list[range]:
    """range(count) in as few parts as can be of at most `most`, which differ by at most one."""
    parts = math.ceil(count / most)
    bounds = [*(count * part // parts for part in range(parts)), count]
    return [range(begin, end) for begin, end in itertools.pairwise(bounds)]

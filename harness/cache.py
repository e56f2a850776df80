"""A KV cache that grows a block of places at a time, and how many answers it has room for.

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
SHARE = 0.8  # of a GPU's free memory: what is left over is for what the arithmetic below does not know


class BlockLayer(DynamicLayer):
    """One layer's keys and values, (rows, heads, places, D) each: `keys` and `values` are views of larger stores."""

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

    def batch_repeat_interleave(self, repeats: int):
        """Repeats every row."""
        self.key_store = self.key_store.repeat_interleave(repeats, dim=0)
        self.value_store = self.value_store.repeat_interleave(repeats, dim=0)
        self.show(self.get_seq_length())

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

    Decoding: its cache, [prompt | answer] in whole blocks; one layer's keys once more, because a store is copied when
    it grows or loses rows; and the logits of a token, which exist in fp32 and fp64 at a time. Reading the prompt, which
    a group does once and before: activations of the vision tower and of the text. The larger of both counts.
    """
    text = config.get_text_config()
    vision = config.vision_config
    head = text.hidden_size // text.num_attention_heads
    keys = text.num_key_value_heads * head * dtype.itemsize * in_blocks(prompt + answer)
    decoding = keys * (2 * text.num_hidden_layers + 1) + 32 * text.vocab_size
    token = 3 * text.intermediate_size + 8 * text.hidden_size
    patch = 3 * vision.intermediate_size + 8 * vision.hidden_size
    reading = prompt * (token + patch * vision.spatial_merge_size**2) * dtype.itemsize
    return max(decoding, reading // generations)


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

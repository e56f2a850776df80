"""How the tokens of packed rows look at each other, without a mask of row length squared.

A packed row is a prompt followed by its answers. The rows of a forward pass lie one after the other, without
padding. An answer's token sees the prompt and its own answer, up to itself:

    prompt + first answer       an ordinary causal sequence
    every further answer        attends to [prompt | own answer]

Both are calls that a fast kernel can do, and what they cost grows with what is seen, not with the square of the row. A
row with one answer is the plain forward pass, and costs what that costs.

While answers are sampled, their group's prompt stands in the cache once. A token's scores against the prompt and
against its own answer are computed apart, the first for a whole group at a time, and share one softmax.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed_rows"


@dataclasses.dataclass
class PackedRow:
    """Tokens of one row: `prompt`, then `lead`, the prompt and its first answer together; `others` further answers.

    longest: tokens of the longest of the others, to which they are padded while they attend.
    """

    prompt: int
    lead: int
    others: int
    longest: int


@dataclasses.dataclass
class PackedRows:
    """All rows of a forward pass. The model is given it in the place of an attention mask.

    spread_M: where the tokens that attend stand among the pass's N tokens: all of them, padding too. gather_N: where
    the results of the N tokens stand among the M. Both are None where nothing is padded.
    """

    rows: list[PackedRow]
    spread_M: torch.Tensor | None
    gather_N: torch.Tensor | None


def pack_rows(prompts: Sequence[int], answers: Sequence[Sequence[int]], device: torch.device) -> PackedRows:
    """The rows of prompts of these lengths, in tokens, each with answers of these lengths after it (one at least)."""
    rows = []
    spread = []
    gather = []
    place = 0
    for prompt, (first, *others) in zip(prompts, answers, strict=True):
        lead = prompt + first
        longest = max(others, default=0)
        rows.append(PackedRow(prompt, lead, len(others), longest))
        gather += range(len(spread), len(spread) + lead)
        spread += range(place, place + lead)
        place += lead
        for length in others:
            gather += range(len(spread), len(spread) + length)
            spread += range(place, place + length)
            # Padding repeats the last token. It stands behind every key that a real token sees, and no result of it is
            # gathered: it is never NaN, and has no gradient.  # trap: masks
            spread += [place + length - 1] * (longest - length)
            place += length
    if len(spread) == place:
        return PackedRows(rows, None, None)
    return PackedRows(rows, torch.tensor(spread, device=device), torch.tensor(gather, device=device))


def packed_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: "PackedRows | SharedPrompts | torch.Tensor | None", scaling: float | None = None, **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of a pass of packed rows: query (1, H, N, D), key and value (1, H or fewer, N, D) → (1, N, H, D).

    SharedPrompts, passed while decoding, go to answers_attention; an ordinary mask goes to transformers' attention.
    """
    if isinstance(attention_mask, SharedPrompts):
        shared = attention_mask
        layer = shared.cache.layers[module.layer_idx]
        prompts = (layer.prompt_keys, layer.prompt_values)
        results_BHD = answers_attention(query.float() * scaling, (key, value), prompts, shared)
        return results_BHD[:, None].to(query.dtype), None
    if not isinstance(attention_mask, PackedRows):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask=attention_mask, scaling=scaling, **kwargs)
    packed = attention_mask
    settings = dict(scale=scaling, enable_gqa=key.shape[1] != query.shape[1])
    if len(packed.rows) == 1 and packed.rows[0].others == 0:  # one answer: an ordinary causal sequence, uncut
        results_1HND = scaled_dot_product_attention(query, key, value, is_causal=True, **settings)
        return results_1HND.transpose(1, 2), None
    parts = [by_row(states, packed) for states in (query, key, value)]
    results = []
    for row, q, k, v in zip(packed.rows, *parts, strict=True):
        results.append(scaled_dot_product_attention(q.lead, k.lead, v.lead, is_causal=True, **settings))
        if row.others == 0:
            continue
        # The queries are the last of [prompt | own answer]. By this mask's name CUDA's flash kernel knows that, in bf16
        # and with grouped heads: so it stands in torch's source, but it has not been seen on a GPU.
        mask = causal_lower_right(row.longest, row.prompt + row.longest)
        keys = behind_prompt(k, row)
        values = behind_prompt(v, row)
        results.append(scaled_dot_product_attention(q.others, keys, values, attn_mask=mask, **settings))
    results_MHD = torch.cat([result.transpose(1, 2).flatten(0, 1) for result in results])
    if packed.gather_N is not None:
        results_MHD = results_MHD.index_select(0, packed.gather_N)
    return results_MHD[None], None


@dataclasses.dataclass
class RowStates:
    """Queries, keys or values of one row: lead (1, H, prompt and first answer, D), others (answers, H, longest, D)."""

    lead: torch.Tensor
    others: torch.Tensor


def by_row(states_1HND: torch.Tensor, packed: PackedRows) -> list[RowStates]:
    """Queries, keys or values of all tokens, (1, H, N, D), as those of each row."""
    states_MHD = states_1HND[0].transpose(0, 1)
    if packed.spread_M is not None:
        states_MHD = states_MHD.index_select(0, packed.spread_M)
    sizes = [size for row in packed.rows for size in (row.lead, row.others * row.longest)]
    parts = states_MHD.split(sizes)
    found = []
    for row, lead, others in zip(packed.rows, parts[::2], parts[1::2], strict=True):
        answers = others.unflatten(0, (row.others, row.longest))
        found.append(RowStates(lead.transpose(0, 1)[None], answers.transpose(1, 2)))
    return found


def behind_prompt(states: RowStates, row: PackedRow) -> torch.Tensor:
    """(answers, H, prompt + longest, D): the states of the prompt, then those of each further answer."""
    prompt = states.lead[:, :, :row.prompt].expand(row.others, -1, -1, -1)
    return torch.cat([prompt, states.others], 2)


# --- while sampling ---------------------------------------------------------------------------------------------------


class SharedPrompts:
    """P prompts, kept once each, and B answers to them, in the order of the prompts. The model is given it in the place
    of an attention mask while it decodes; afterwards an answer that has ended leaves by `select`.

    To meet its prompt, a group's tokens stand in one row: spread_M says which answers stand in P rows of equally many,
    gather_B where each answer's result stands among the M.
    """

    def __init__(self, cache: DynamicCache, mask_PS: torch.Tensor, answers: int):
        """cache: what was read of the prompts. mask_PS: 1 at their tokens. answers: how many there are to each."""
        self.cache = cache
        self.padding_P11S = (mask_PS == 0)[:, None, None]
        self.group_B = torch.arange(len(mask_PS), device=mask_PS.device).repeat_interleave(answers)
        for layer in cache.layers:
            layer.begin_answers(len(self.group_B))
        self.line_up()

    def select(self, keep: torch.Tensor):
        """Keeps these answers only, in ascending order, and the prompts that still have some."""
        self.cache.batch_select_indices(keep)
        kept_P, self.group_B = self.group_B[keep].unique(return_inverse=True)
        if len(kept_P) < len(self.padding_P11S):
            self.padding_P11S = self.padding_P11S[kept_P]
            for layer in self.cache.layers:
                layer.select_prompts(kept_P)
        self.line_up()

    def line_up(self):
        """Finds spread_M and gather_B for the answers there are. A shorter group repeats its last answer."""
        counts_P = self.group_B.bincount()
        begins_P = counts_P.cumsum(0) - counts_P
        self.most = int(counts_P.max())
        numbers_G = torch.arange(self.most, device=counts_P.device)
        self.spread_M = (begins_P[:, None] + numbers_G.minimum(counts_P[:, None] - 1)).flatten()
        number_B = torch.arange(len(self.group_B), device=counts_P.device) - begins_P[self.group_B]
        self.gather_B = self.group_B * self.most + number_B

    def by_prompt(self, values_BHRD: torch.Tensor) -> torch.Tensor:
        """(B, H, R, D) of the answers as (P, H, most·R, D): a group's side by side."""
        values_MHRD = values_BHRD.index_select(0, self.spread_M)
        return values_MHRD.unflatten(0, (-1, self.most)).transpose(1, 2).flatten(2, 3)

    def by_answer(self, values_PHRD: torch.Tensor) -> torch.Tensor:
        """(P, H, most·R, D) as (B, H, R, D): the way back."""
        values_MHRD = values_PHRD.unflatten(2, (self.most, -1)).transpose(1, 2).flatten(0, 1)
        return values_MHRD.index_select(0, self.gather_B)


def answers_attention(
    query_BH1D: torch.Tensor, own: tuple[torch.Tensor, torch.Tensor], prompts: tuple[torch.Tensor, torch.Tensor],
    shared: SharedPrompts,
) -> torch.Tensor:
    """One new token of every answer looks at its prompt and its own answer: (B, H, D).

    The query is in fp32 and scaled already; scores and sums are fp32 too, as in a fast kernel: in bf16 they would move
    log-probs away from what is read later. own, prompts: keys and values, (B, K, T, D) and (P, K, S, D); H is a
    multiple of K.
    """
    keys, values = own
    prompt_keys, prompt_values = prompts
    query_BKRD = query_BH1D[:, :, 0].unflatten(1, (keys.shape[1], -1))
    scores_BKRT = query_BKRD @ keys.float().transpose(2, 3)
    prompt_scores_PKNS = shared.by_prompt(query_BKRD) @ prompt_keys.float().transpose(2, 3)
    prompt_scores_PKNS = prompt_scores_PKNS.masked_fill(shared.padding_P11S, -math.inf)  # trap: left padding
    weights = torch.cat([shared.by_answer(prompt_scores_PKNS), scores_BKRT], 3).softmax(3)
    of_prompt, of_answer = weights.split([prompt_keys.shape[2], keys.shape[2]], 3)
    seen_of_prompt = shared.by_answer(shared.by_prompt(of_prompt) @ prompt_values.float())
    return (seen_of_prompt + of_answer @ values.float()).flatten(1, 2)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # ordinary passes keep their mask of padding

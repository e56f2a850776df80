"""Texts as vectors: a sentence-embedding model, or bags of n-grams where no model is at hand (the tabletop)."""

import re
from collections.abc import Callable, Sequence

from harness.flags import UserError

import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer


def load_embedder(name: str, device: torch.device) -> Callable[[Sequence[str]], torch.Tensor]:
    """A function from a list of N texts to normalised embeddings (N, D) on the CPU. `name`: a model, or ngrams."""
    return ngrams if name == "ngrams" else Embedder(name, device)


def ngrams(texts: Sequence[str], most: int = 2) -> torch.Tensor:
    """Bags of word n-grams, n up to `most`, normalised: a list of N texts → (N, D)."""
    bags = []
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]", text)
        bag = []
        for n in range(1, most + 1):
            bag += [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
        bags.append(bag)
    every_gram = sorted({gram for bag in bags for gram in bag})
    place = {gram: d for d, gram in enumerate(every_gram)}
    counts_ND = torch.zeros(len(texts), max(1, len(place)))
    for row, bag in zip(counts_ND, bags, strict=True):
        row.index_add_(0, torch.tensor([place[gram] for gram in bag], dtype=torch.long), torch.ones(len(bag)))
    return normalize(counts_ND, dim=1)


class Embedder:
    """A sentence-embedding model: the last layer's state of the last token, normalised. Frozen, read without grad."""

    def __init__(self, name: str, device: torch.device):
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
            self.model = AutoModel.from_pretrained(name).to(device).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"--embedder {name} is no folder or name of a model, nor ngrams: {reason}") from None

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch: int = 32) -> torch.Tensor:
        """A list of N texts → (N, D) on the CPU. Padding stands on the left, so the last place is the last token."""
        states = []
        for start in range(0, len(texts), batch):
            some = list(texts[start:start + batch])
            inputs = self.tokenizer(some, padding=True, return_tensors="pt").to(self.model.device)
            states.append(self.model(**inputs).last_hidden_state[:, -1].float().cpu())
        return normalize(torch.cat(states), dim=1)


def spread(embeddings_GD: torch.Tensor) -> float:
    """Mean pairwise cosine distance of normalised embeddings, (G, D) with G above 1: the diversity of a group."""
    G = len(embeddings_GD)
    distance_GG = 1 - embeddings_GD @ embeddings_GD.T
    return float((distance_GG.sum() - distance_GG.trace()) / (G * (G - 1)))


def reasoning(text: str) -> str:
    """The part of an answer that argues: inside <think>, else what stands before the answer, else all of it."""
    block = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    if block and block.group(1).strip():
        return block.group(1).strip()
    opening = max(text.rfind("\\boxed"), text.rfind("<answer>"))
    before = text[:max(opening, 0)].strip()
    return before or text.strip()

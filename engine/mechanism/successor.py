"""Successor heads: those that write, of a word that stands in an order, the next one (Gould et al. 2023)."""

import string
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from ..checkpoints.model import ResidentModel
from .head_writing import HeadWriter, embedded

FEWEST_PAIRS = 8
"""Words with a successor, at least, of which each is one token."""

_LISTED = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty",
    "first second third fourth fifth sixth seventh eighth ninth tenth",
)
ORDERS = (*(tuple(words.split()) for words in _LISTED), tuple(string.ascii_uppercase), tuple(map(str, range(200))))
"""Words in their order: days, months, numbers in words, ordinals, letters and numbers, as in Gould et al. 2023."""


@dataclass(frozen=True)
class Succession:
    """The words of `ORDERS` that are one token each."""

    tokens: Int[np.ndarray, " word"]
    order: Int[np.ndarray, " word"]
    """Which of the orders a word is of."""

    pairs: Int[np.ndarray, "pair two"]
    """Indices of every word and of the one after it."""


def succession(tokenizer: Any) -> Succession:
    """The words that the tokenizer holds as one token, of those with a space before them or those without, whichever
    are more."""
    tokens: list[int] = []
    orders: list[int] = []
    pairs: list[tuple[int, int]] = []
    for number, words in enumerate(ORDERS):
        spelled = [[_single_token(tokenizer, before + word) for word in words] for before in (" ", "")]
        singles = max(spelled, key=lambda row: sum(token is not None for token in row))
        place: dict[int, int] = {}
        for at, token in enumerate(singles):
            if token is not None and token not in tokens:
                place[at] = len(tokens)
                tokens.append(token)
                orders.append(number)
        pairs += [(place[at], place[at + 1]) for at in place if at + 1 in place]
    return Succession(np.array(tokens, int), np.array(orders, int), np.array(pairs, int).reshape(-1, 2))


def _single_token(tokenizer: Any, text: str) -> int | None:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(tokens[0]) if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id else None


class SuccessorScores:
    """Computes, layer by layer, how often a head writes the next word most of all words of its order.

    The successor score of Gould et al. 2023 (arXiv:2312.09230): the share of words of which it does, when the head
    attends to the word's effective embedding, its embedding after the first layer's MLP.
    """

    def __init__(self, resident: ResidentModel, words: Succession) -> None:
        self.words = words
        self._tokens = torch.from_numpy(words.tokens).to(resident.device)
        self._writer = HeadWriter(resident, embedded(resident, self._tokens))
        self._same_order = torch.from_numpy(words.order[:, None] == words.order).to(resident.device)

    @torch.no_grad()
    def written_most(self, layer: int) -> Int[np.ndarray, "head word"]:
        """Index of the word that each head writes most, of those of the order of the word it attends to."""
        written = self._writer.written(layer)
        answers = self._tokens.expand(len(written), -1)
        logits = self._writer.resident.answer_logits(written, answers).float()
        return logits.masked_fill(~self._same_order, -torch.inf).argmax(-1).cpu().numpy()


def successor_score(
    written_most: Int[np.ndarray, "head word"], words: Succession, label: Int[np.ndarray, " word"] | None = None
) -> Float[np.ndarray, " head"]:
    """Share of words of which the next one is written most, 0 to 1; of shuffled words where `label` gives which word
    each stands for."""
    word, after = words.pairs.T
    expected = after if label is None else label[after]
    share: Float[np.ndarray, " head"] = (written_most[:, word] == expected).mean(1)
    return share


def shuffled_words(words: Succession, rng: np.random.Generator) -> Int[np.ndarray, " word"]:
    """A random relabelling of the words within each order."""
    label = np.arange(len(words.tokens))
    for number in np.unique(words.order):
        at = np.flatnonzero(words.order == number)
        label[at] = rng.permutation(at)
    return label

"""Induction: what followed a word before follows it again."""

import random
import re
from collections.abc import Iterator

from ...runtime.errors import UserError
from .contrast import Contrast, Tokenizer
from .sampling import MOST

LENGTH = 12
"""Words in the sequence that is repeated."""

REPEATED = 4
"""Words of the repetition, at least, by which it is known as one."""

SAMPLE = 4000
"""Tokens that are looked at in search of words."""


def induction(seed: int, tokenizer: Tokenizer) -> Iterator[Contrast]:
    """Random words, then the same ones again up to a word A: B follows, as it did before (Olsson et al. 2022,
    arXiv:2209.11895).

    Corrupt exchanges B with a word that comes later, which then is what followed A before.  Words and their frequencies
    stay the same, and so does the repetition, up to the last token.  Raises `UserError` where too few words are found.
    """
    draw = random.Random(seed)
    words = _words(tokenizer, draw)
    if len(words) < LENGTH:
        found = f"{LENGTH} words in small letters are needed, the tokenizer holds {len(words)}"
        raise UserError(f"--task induction: {found}; write a JSON Lines file of prompts that this tokenizer takes")
    for _ in range(MOST):
        clean = draw.sample(words, LENGTH)
        at, other = sorted(draw.sample(range(REPEATED, LENGTH), 2))
        corrupt = clean.copy()
        corrupt[at], corrupt[other] = clean[other], clean[at]
        again = clean[:at]
        asked, misled = (" ".join([*first, *again]) for first in (clean, corrupt))
        yield Contrast(asked, misled, f" {clean[at]}", f" {corrupt[at]}", "induction")


def _words(tokenizer: Tokenizer, draw: random.Random) -> list[str]:
    """Words of small letters that are one token in the middle of a text."""
    sample = draw.sample(range(len(tokenizer)), min(len(tokenizer), SAMPLE))
    pieces = tokenizer.batch_decode([[token] for token in sample], clean_up_tokenization_spaces=False)
    found = [(token, piece.strip()) for token, piece in zip(sample, pieces, strict=True)]
    found = [(token, word) for token, word in found if re.fullmatch("[a-z]{3,9}", word)]
    (before, *texts) = tokenizer(["a", *(f"a {word}" for _, word in found)], add_special_tokens=False)["input_ids"]
    return [word for (token, word), text in zip(found, texts, strict=True) if text == [*before, token]]

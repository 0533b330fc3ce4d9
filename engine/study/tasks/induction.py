"""Induction: a word is followed again by the word that followed it before."""

import random
import re
from collections.abc import Iterator

from ...runtime.errors import UserError
from .contrast import Contrast, Tokenizer
from .sampling import LIMIT

LENGTH = 12
"""Words in the repeated sequence."""

REPEATED = 4
"""Fewest words of the repetition before the answer: fewer would not show that it is one."""

SAMPLE = 4000
"""Tokens of the vocabulary in which words are searched for."""


def induction(seed: int, tokenizer: Tokenizer) -> Iterator[Contrast]:
    """Random words, then the same ones again up to a word A: B follows, as it did before (Olsson et al. 2022,
    arXiv:2209.11895).

    In the corrupt prompt B and a later word of the first sequence are exchanged, so that the other word follows A
    there.  The words, their frequencies and the repetition itself stay the same.  Raises `UserError` where the
    vocabulary has too few words.
    """
    draw = random.Random(seed)
    words = _words(tokenizer, draw)
    if len(words) < LENGTH:
        problem = f"{LENGTH} words in small letters are needed, the tokenizer holds {len(words)}"
        raise UserError(f"--task induction: {problem}; write a JSON Lines file of prompts that this tokenizer takes")
    for _ in range(LIMIT):
        clean = draw.sample(words, LENGTH)
        place, later = sorted(draw.sample(range(REPEATED, LENGTH), 2))
        corrupt = clean.copy()
        corrupt[place], corrupt[later] = clean[later], clean[place]
        repetition = clean[:place]
        clean_prompt, corrupt_prompt = (" ".join([*sequence, *repetition]) for sequence in (clean, corrupt))
        yield Contrast(clean_prompt, corrupt_prompt, f" {clean[place]}", f" {corrupt[place]}", "induction")


def _words(tokenizer: Tokenizer, draw: random.Random) -> list[str]:
    """Lower-case words that are a single token in the middle of a text."""
    sample = draw.sample(range(len(tokenizer)), min(len(tokenizer), SAMPLE))
    pieces = tokenizer.batch_decode([[token] for token in sample], clean_up_tokenization_spaces=False)
    candidates = [(token, piece.strip()) for token, piece in zip(sample, pieces, strict=True)]
    candidates = [(token, word) for token, word in candidates if re.fullmatch("[a-z]{3,9}", word)]
    # A piece that decodes to a word need not be what the tokenizer makes of that word: only a round trip shows it.
    texts = ["a", *(f"a {word}" for _, word in candidates)]
    before, *encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [word for (token, word), tokens in zip(candidates, encoded, strict=True) if tokens == [*before, token]]

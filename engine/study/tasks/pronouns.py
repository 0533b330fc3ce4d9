"""Gendered pronouns: the pronoun agrees with the name."""

from collections.abc import Iterator

from .contrast import Contrast, Tokenizer
from .names import MEN, WOMEN
from .sampling import combinations

OPENINGS = ("So", "Well,", "I think", "You know,")
QUALITIES = ("really great", "very good", "pretty reliable", "truly wonderful")
ROLES = ("friend", "cook", "dancer", "writer", "driver", "teacher", "student", "listener", "swimmer", "colleague")
VERBS = (("is", "isn't"), ("was", "wasn't"))


def pronouns(seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """`So Sarah is a really great friend, isn't` she, not he (Mathwin et al. 2023, "Identifying a preliminary circuit
    for predicting gendered pronouns in GPT-2 small"; after Vig et al. 2020, arXiv:2004.12265).

    Corrupt replaces the name by one of the other gender.  The clean prompt is about a woman in every other contrast.
    """
    pools = (WOMEN, MEN, OPENINGS, VERBS, QUALITIES, ROLES)
    for number, (woman, man, opening, (verb, tag), quality, role) in enumerate(combinations(seed, *pools)):
        she, he = ((f"{opening} {name} {verb} a {quality} {role}, {tag}") for name in (woman, man))
        if number % 2 == 0:
            yield Contrast(she, he, " she", " he", "pronouns")
        else:
            yield Contrast(he, she, " he", " she", "pronouns")

"""Subject-verb agreement: the verb agrees with the head noun, not with the nearest noun."""

from collections.abc import Iterator

from .contrast import Contrast, Tokenizer
from .sampling import combinations

HEADS = (
    *("author", "pilot", "teacher", "doctor", "student", "farmer", "singer", "officer", "lawyer", "manager"),
    *("writer", "driver", "soldier", "painter", "dancer", "actor", "player", "worker"),
)
THINGS = ("car", "tree", "house", "desk", "table", "bridge", "river", "tower", "door", "window", "wall", "boat")
PEOPLE = ("guard", "neighbor", "reporter", "judge", "visitor", "parent", "guest", "brother")

PLACINGS = ("near", "behind", "beside", "in front of")
DEEDS = ("liked", "saw", "admired", "knew", "remembered")
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
"""Singular and plural."""

MIDDLES = [
    *(f"{placing} the {thing}{ending}" for placing in PLACINGS for thing in THINGS for ending in ("", "s")),
    *(f"that the {person}{ending} {deed}" for person in PEOPLE for ending in ("", "s") for deed in DEEDS),
]
"""What stands between head noun and verb: a noun of either number (the attractor).  Its own verb, if it has one, is in
the past tense, which is the same for both numbers."""


def agreement(seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """`The pilots near the car` are, not is (Linzen et al. 2016, arXiv:1611.01368; Finlayson et al. 2021,
    arXiv:2106.06087; Marks et al. 2024, arXiv:2403.19647).

    Corrupt changes the number of the head noun and keeps the attractor, which is therefore misleading in one of the
    two prompts.  The clean prompt is singular in every other contrast.
    """
    for number, (head, middle, verbs) in enumerate(combinations(seed, HEADS, MIDDLES, VERBS)):
        forms = [(f"The {head}{ending} {middle}", f" {verb}") for ending, verb in zip(("", "s"), verbs, strict=True)]
        (clean, answer), (corrupt, wrong) = forms if number % 2 == 0 else forms[::-1]
        yield Contrast(clean, corrupt, answer, wrong, "agreement")

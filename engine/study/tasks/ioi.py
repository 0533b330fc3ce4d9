"""Indirect object identification: who is given something?"""

from collections.abc import Iterator
from itertools import permutations

from .contrast import Contrast, Tokenizer
from .names import MEN, WOMEN
from .sampling import combinations

SCENES = (
    "When {one} and {other} went to the {place}, {giver} gave a {thing} to",
    "Then {one} and {other} had a long talk at the {place}. Afterwards {giver} gave a {thing} to",
    "After {one} and {other} came back from the {place}, {giver} handed a {thing} to",
    "While {one} and {other} were waiting at the {place}, {giver} offered a {thing} to",
    "The {place} was empty when {one} and {other} arrived, so {giver} gave a {thing} to",
)
"""None begins with a name: the first token of a text is where idle heads look, and a poor carrier of a name."""

PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station", "beach", "museum")
THINGS = ("book", "drink", "ring", "gift", "letter", "ticket", "map", "present", "coin", "key")


def ioi(seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """Two people are named, then one of them gives: the other one receives (Wang et al. 2022, arXiv:2211.00593).

    Corrupt names the other one as the giver: one name replaced by the other, the symmetric token replacement of Zhang
    and Nanda 2023, arXiv:2309.16042.  The receiver of the clean prompt is named first in every other contrast.
    """
    couples = list(permutations((*WOMEN, *MEN), 2))
    for number, ((one, other), scene, place, thing) in enumerate(combinations(seed, couples, SCENES, PLACES, THINGS)):
        receiver, giver = (one, other) if number % 2 == 0 else (other, one)
        clean, corrupt = (
            scene.format(one=one, other=other, place=place, giver=acting, thing=thing) for acting in (giver, receiver)
        )
        yield Contrast(clean, corrupt, f" {receiver}", f" {giver}", "ioi")

"""Indirect object identification: who receives something?"""

from collections.abc import Iterator
from itertools import permutations

from .contrast import Contrast, Tokenizer
from .names import MEN, WOMEN
from .sampling import combinations

SCENES = (
    "When {first} and {second} went to the {place}, {giver} gave a {thing} to",
    "Then {first} and {second} had a long talk at the {place}. Afterwards {giver} gave a {thing} to",
    "After {first} and {second} came back from the {place}, {giver} handed a {thing} to",
    "While {first} and {second} were waiting at the {place}, {giver} offered a {thing} to",
    "The {place} was empty when {first} and {second} arrived, so {giver} gave a {thing} to",
)
"""None begins with a name: heads with nothing to do attend to the first token, which makes it a poor place for one."""

PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station", "beach", "museum")
THINGS = ("book", "drink", "ring", "gift", "letter", "ticket", "map", "present", "coin", "key")


def ioi(seed: int, _tokenizer: Tokenizer) -> Iterator[Contrast]:
    """Two people are named, then one of them gives: the other one receives (Wang et al. 2022, arXiv:2211.00593).

    Corrupt names the receiver as the giver: one name replaced by the other (symmetric token replacement: Zhang and
    Nanda 2023, arXiv:2309.16042).  The receiver of the clean prompt is named first in every other contrast.
    """
    couples = list(permutations((*WOMEN, *MEN), 2))
    for number, ((first, second), scene, place, thing) in enumerate(
        combinations(seed, couples, SCENES, PLACES, THINGS)
    ):
        receiver, giver = (first, second) if number % 2 == 0 else (second, first)
        clean, corrupt = (
            scene.format(first=first, second=second, place=place, giver=name, thing=thing) for name in (giver, receiver)
        )
        yield Contrast(clean, corrupt, f" {receiver}", f" {giver}", "ioi")

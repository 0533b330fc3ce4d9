"""Years that come later: does the model know that what lasts ends after it began?"""

from collections.abc import Iterator

from .contrast import Contrast, Tokenizer
from .sampling import combinations

EVENTS = (
    *("war", "siege", "expedition", "rebellion", "campaign", "dispute", "conflict", "voyage", "famine", "plague"),
    *("strike", "trial", "marriage", "project", "journey", "struggle", "reign", "alliance", "drought", "occupation"),
)
CENTURIES = range(11, 18)

EARLY = 1
"""The corrupt prompt's year in its century: nearly every ending is later."""

SPANS = [
    (start, distance)
    for start in range(100)
    for distance in (10, 20, 30, 40)
    if EARLY < start - distance < start + distance < 100
]
"""A beginning in its century, and how far above and below it the answers lie, in years.  Whole decades, so that digits
read one by one decide at the first."""


def greater_than(seed: int, tokenizer: Tokenizer) -> Iterator[Contrast]:
    """`The war lasted from the year 1732 to the year` 1752, not 1712 (Hanna et al. 2023, arXiv:2305.00586).

    Answers lie equally far above and below the beginning, so that being near to it favours neither.  Corrupt begins in
    the year 01, as in the paper.  A symmetric replacement does not exist: whatever begins so early that the smaller
    year is right makes the larger one right too.  Corrupt therefore calls for neither and has both right; being near
    to the beginning favours the smaller one.  As in the paper, years are left out that the tokenizer cuts otherwise
    than the century's first (1377 as 137 and 7 where 1301 is 13 and 01).
    """
    cuts = _cuts(tokenizer)
    for event, century, (start, distance) in combinations(seed, EVENTS, CENTURIES, SPANS):
        began, early, later, earlier = (
            century * 100 + year for year in (start, EARLY, start + distance, start - distance)
        )
        if cuts[began] == cuts[early] == cuts[later] == cuts[earlier]:
            clean, corrupt = (f"The {event} lasted from the year {year} to the year" for year in (began, early))
            yield Contrast(clean, corrupt, f" {later}", f" {earlier}", "greater-than")


def _cuts(tokenizer: Tokenizer) -> dict[int, tuple[int, ...]]:
    """The tokens' ends in each year, in characters from the right."""
    years = [century * 100 + year for century in CENTURIES for year in range(100)]
    texts = [f"the year {year}" for year in years]
    coded = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    return {
        year: tuple(len(text) - end for _, end in offsets if end > len(text) - len(str(year)))
        for year, text, offsets in zip(years, texts, coded, strict=True)
    }

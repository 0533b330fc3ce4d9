"""Greater-than on years: an event ends later than it began."""

from collections.abc import Iterator

from .contrast import Contrast, Tokenizer
from .sampling import combinations

EVENTS = (
    *("war", "siege", "expedition", "rebellion", "campaign", "dispute", "conflict", "voyage", "famine", "plague"),
    *("strike", "trial", "marriage", "project", "journey", "struggle", "reign", "alliance", "drought", "occupation"),
)
CENTURIES = range(11, 18)

EARLY = 1
"""The corrupt prompt's year within the century: nearly every year is later."""

SPANS = [
    (start, distance)
    for start in range(100)
    for distance in (10, 20, 30, 40)
    if EARLY < start - distance < start + distance < 100
]
"""The first year within its century, and the distance of both answers from it, in years.  Whole decades, so that
answers tokenized digit by digit differ at the digit that decides."""


def greater_than(seed: int, tokenizer: Tokenizer) -> Iterator[Contrast]:
    """`The war lasted from the year 1732 to the year` 1752, not 1712 (Hanna et al. 2023, arXiv:2305.00586).

    The answers lie equally far above and below the clean prompt's year, so that closeness favours neither.  The
    corrupt prompt begins in the year 01, as in the paper.  No symmetric replacement exists: a beginning early enough
    for the smaller year to be right makes the larger one right too.  After the corrupt prompt both answers are right,
    and closeness favours the smaller one.  As in the paper, years are left out that are tokenized otherwise than the
    year 01 of their century (1377 as 137 and 7 where 1301 is 13 and 01).
    """
    boundaries = _token_boundaries(tokenizer)
    for event, century, (start, distance) in combinations(seed, EVENTS, CENTURIES, SPANS):
        began, early, later, earlier = years = [
            century * 100 + year for year in (start, EARLY, start + distance, start - distance)
        ]
        if len({boundaries[year] for year in years}) == 1:
            clean, corrupt = (f"The {event} lasted from the year {year} to the year" for year in (began, early))
            yield Contrast(clean, corrupt, f" {later}", f" {earlier}", "greater-than")


def _token_boundaries(tokenizer: Tokenizer) -> dict[int, tuple[int, ...]]:
    """Where each year's tokens end, in characters from the right."""
    years = [century * 100 + year for century in CENTURIES for year in range(100)]
    texts = [f"the year {year}" for year in years]
    encoded = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    return {
        year: tuple(len(text) - end for _, end in offsets if end > len(text) - len(str(year)))
        for year, text, offsets in zip(years, texts, encoded, strict=True)
    }

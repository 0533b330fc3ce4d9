"""What the literature says of a public model's heads beside what was measured, as people read it."""

from collections.abc import Iterator, Sequence

import numpy as np

from ...mechanism.known_comparison import ComparedHeads, ComparedOnset
from ...runtime.format import format_count, format_head
from ...study.known_heads import Check

AGREES, DIFFERS = "as published", "NOT as published"


def comparison_lines(check: Check, heads: Sequence[ComparedHeads], onsets: Sequence[ComparedOnset]) -> Iterator[str]:
    """First how much agrees, then a line for each group of known heads and each known onset."""
    results = [compared.agrees for compared in heads] + [onset.agrees for onset in onsets]
    findings = format_count(len(results), "finding")
    yield f"{check.name} on {check.model}: {sum(results)} of {findings} of the literature found again"
    for compared in heads:
        yield f"  {compared.known.name:<20} {_heads(compared)}"
        yield f"  {'':<20} {compared.known.source}"
    for onset in onsets:
        yield f"  {onset.known.role:<20} {_onset(onset)}"
        yield f"  {'':<20} {onset.known.source}"


def _heads(compared: ComparedHeads) -> str:
    if np.isnan(compared.p):
        return "not scored, so not compared"
    of = "the largest effects" if compared.known.by == "effect" else f"the {_extreme(compared)} scores"
    places = sorted(zip(compared.places, compared.known.heads, strict=True))
    named = ", ".join(f"{format_head(*head)} {place}" for place, head in places)
    verdict = AGREES if compared.agrees else DIFFERS
    return f"{verdict} (p = {compared.p:.3f}); place among {of} of {compared.n_heads} heads: {named}"


def _extreme(compared: ComparedHeads) -> str:
    return "lowest" if compared.known.lowest else "highest"


def _onset(onset: ComparedOnset) -> str:
    published = f"published: between steps {onset.known.after:,} and {onset.known.by:,}"
    verdict = AGREES if onset.agrees else DIFFERS
    if onset.by is None:
        return f"{verdict}: no head takes it on; {published}"
    since = f"by step {onset.by:,}" if onset.after is None else f"between steps {onset.after:,} and {onset.by:,}"
    return f"{verdict}: the first head takes it on {since}; {published}"

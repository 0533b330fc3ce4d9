"""What a patched run says, in the order in which it is told."""

from collections.abc import Iterator
from typing import Any

import xarray as xr

from ...measures.logit_diff import format_timeline
from ...replay.published_protocol import format_texts
from ...statistics.hypotheses import tell_when
from ...statistics.multiple_testing import Correction
from ...statistics.permutation import tell_parity
from ...statistics.rates import tell_rates
from .finding import Told
from .measured import tell_measures
from .shares import tell_coalitions
from .texts import tell_answers


def tell(
    run: xr.Dataset, settings: dict[str, Any], study: dict[str, Any], correction: Correction = "bh"
) -> Iterator[str]:
    """Everything that a run of either protocol says."""
    if settings["protocol"] == "published":
        yield format_texts(run, study)
        return
    yield format_timeline(run, settings)
    yield from map(str, findings(run, settings, correction))


def findings(run: xr.Dataset, settings: dict[str, Any], correction: Correction = "bh") -> Iterator[Told]:
    """Tables with how to read them, each only where the run has what it takes; p are adjusted by `correction`."""
    if told := tell_measures(run, settings):
        yield told
    if "text" in run:
        yield tell_answers(run, settings)
    if {"even", "odd"} <= set(run.subset.values):
        yield tell_parity(run, correction)
        yield tell_rates(run, settings)
    yield from tell_coalitions(run, settings)
    yield from tell_when(run, settings)

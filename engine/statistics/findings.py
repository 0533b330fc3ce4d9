"""What a patched run says, in the order in which it is told."""

from collections.abc import Iterator
from typing import Any

import xarray as xr

from headlapse.engine.measures import format_timeline
from headlapse.engine.published import format_texts
from headlapse.engine.statistics.corrections import Correction
from headlapse.engine.statistics.hypotheses import tell_when
from headlapse.engine.statistics.measured import tell_measures
from headlapse.engine.statistics.rates import tell_rates
from headlapse.engine.statistics.shares import tell_coalitions
from headlapse.engine.statistics.splits import tell_parity
from headlapse.engine.statistics.texts import tell_answers
from headlapse.engine.statistics.told import Told


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

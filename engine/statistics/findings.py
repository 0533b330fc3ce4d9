"""What a patched run says, in the order in which it is printed."""

from collections.abc import Iterator
from typing import Any

import xarray as xr

from headlapse.engine.measures import format_timeline
from headlapse.engine.published import format_texts
from headlapse.engine.statistics.coalitions import format_coalitions
from headlapse.engine.statistics.corrections import Correction
from headlapse.engine.statistics.hypotheses import format_onsets
from headlapse.engine.statistics.rates import format_rates
from headlapse.engine.statistics.splits import format_parity


def tell(
    run: xr.Dataset, settings: dict[str, Any], study: dict[str, Any], correction: Correction = "bh"
) -> Iterator[str]:
    """Everything that a run of either protocol says."""
    if settings["protocol"] == "published":
        yield format_texts(run, study)
        return
    yield format_timeline(run, settings)
    yield from findings(run, settings, correction)


def findings(run: xr.Dataset, settings: dict[str, Any], correction: Correction = "bh") -> Iterator[str]:
    """Tables with how to read them, each only where the run has what it takes; p are adjusted by `correction`."""
    if {"even", "odd"} <= set(run.subset.values):
        yield format_parity(run, correction)
        yield format_rates(run, settings)
    if told := format_coalitions(run, settings):
        yield told
    if told := format_onsets(run, settings):
        yield told

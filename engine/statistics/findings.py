"""What a patched run says, beyond its timeline, in the order in which it is printed."""

from collections.abc import Iterator
from typing import Any

import xarray as xr

from headlapse.engine.statistics.coalitions import format_coalitions
from headlapse.engine.statistics.splits import format_parity


def findings(run: xr.Dataset, settings: dict[str, Any]) -> Iterator[str]:
    """Tables with how to read them, each only where the run has what it takes."""
    if {"even", "odd"} <= set(run.subset.values):
        yield format_parity(run)
    if told := format_coalitions(run, settings):
        yield told

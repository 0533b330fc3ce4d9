"""All tables of a patched run, in the order in which they are shown."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import xarray as xr

from ...study.patch_settings import PatchSettings
from ...study.reading import READING, Reading
from .finding import Finding
from .hypotheses import hypotheses_finding
from .measured import measures_finding
from .onsets import onsets_finding
from .parity import parity_finding
from .primary import primary_finding
from .published import format_texts
from .rates import rates_finding
from .shares import head_subset_findings
from .texts import answers_finding
from .timeline import format_timeline

EMPTY: Mapping[str, Any] = MappingProxyType({})


def tell(run: xr.Dataset, settings: PatchSettings, study: dict[str, Any], reading: Reading = READING) -> Iterator[str]:
    """All tables of a run of either protocol as text."""
    if settings.protocol == "published":
        yield format_texts(run, study)
        return
    yield format_timeline(run, settings)
    yield from map(str, findings(run, settings, reading, study))


def findings(
    run: xr.Dataset, settings: PatchSettings, reading: Reading = READING, study: Mapping[str, Any] = EMPTY
) -> Iterator[Finding]:
    """Tables with how to read them, each only where the run has what it takes."""
    if (primary := primary_finding(run, settings, study)) is not None:
        yield primary
    if measured := measures_finding(run, settings):
        yield measured
    if "text" in run:
        yield answers_finding(run, settings)
    if {"even", "odd"} <= set(run.subset.values):
        yield parity_finding(run, reading.correction)
        yield rates_finding(run, settings)
    yield from head_subset_findings(run, settings)
    for finding in (onsets_finding(run, settings), hypotheses_finding(run, settings)):
        if finding is not None:
            yield finding

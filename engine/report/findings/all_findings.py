"""What a patched run says, in the order in which it is told."""

from collections.abc import Iterator
from typing import Any

import xarray as xr

from ...measures.logit_diff import format_timeline
from ...replay.published_protocol import format_texts
from ...statistics.hypotheses import onset_findings
from ...statistics.multiple_testing import Correction
from ...statistics.permutation import parity_finding
from ...statistics.rates import rates_finding
from ...study.patch_settings import PatchSettings
from .finding import Finding
from .measured import measures_finding
from .shares import head_subset_findings
from .texts import answers_finding


def tell(
    run: xr.Dataset, settings: PatchSettings, study: dict[str, Any], correction: Correction = "bh"
) -> Iterator[str]:
    """Everything that a run of either protocol says."""
    if settings.protocol == "published":
        yield format_texts(run, study)
        return
    yield format_timeline(run, settings)
    yield from map(str, findings(run, settings, correction))


def findings(run: xr.Dataset, settings: PatchSettings, correction: Correction = "bh") -> Iterator[Finding]:
    """Tables with how to read them, each only where the run has what it takes; p are adjusted by `correction`."""
    if told := measures_finding(run, settings):
        yield told
    if "text" in run:
        yield answers_finding(run, settings)
    if {"even", "odd"} <= set(run.subset.values):
        yield parity_finding(run, correction)
        yield rates_finding(run, settings)
    yield from head_subset_findings(run, settings)
    yield from onset_findings(run, settings)

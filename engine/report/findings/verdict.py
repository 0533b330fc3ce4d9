"""The answer first: what a patched run shows, in a few lines."""

from collections.abc import Mapping
from typing import Any

import xarray as xr

from ...statistics.multiple_testing import Correction
from ...study.patch_settings import PatchSettings


def verdict(
    run: xr.Dataset,
    settings: PatchSettings,
    study: Mapping[str, Any],
    page: str | None = None,
    correction: Correction = "bh",
) -> list[str]:
    """At most 12 lines of at most 100 columns about a run; the table of the published protocol is as long as its run.

    `study` is the store's record of what was asked; `page` is where the report was written.
    """
    n = run.sizes["trial"]
    lines = [f"{study['model']} on {study['task']}: {n} prompt pair{'s' * (n != 1)}"]
    return [*lines, f"page       {page}"] if page else lines

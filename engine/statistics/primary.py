"""The test of a hypothesis that was named before anything was patched, at a level of its own.  Pure."""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from ..measures.logit_diff import effect, finished
from ..study.patch_settings import PatchSettings
from ..study.primary import LEVEL, Primary
from .means import interval, p_differs
from .permutation import find_equal_splits, permutation_p


@dataclass(frozen=True)
class PrimaryTest:
    """What came of one primary hypothesis."""

    primary: Primary
    effect: float
    """Nats: even minus odd heads, or what the head does towards the source run."""

    low: float
    high: float

    p: float
    """Of the permutation test, or of the test over prompts; NaN where it cannot be tested (one prompt)."""

    level: float
    """5 % shared by all primary hypotheses of the run."""

    @property
    def is_found(self) -> bool:
        return self.p <= self.level


def primary_test(run: xr.Dataset, settings: PatchSettings, primary: Primary, n_tests: int) -> PrimaryTest | None:
    """The test of one of `n_tests` hypotheses; None until its checkpoint is finished."""
    complete = finished(run)
    if primary.checkpoint not in complete.checkpoint.values:
        return None
    here = complete.sel(checkpoint=[primary.checkpoint])
    if primary.head is not None:
        nats = effect(here, settings.direction).sel(layer=primary.layer, subset=str(primary.head)).values[0]
        p = float(p_differs(nats.astype(float)[None])[0])
    else:
        logit_diff = here.logit_diff.isel(checkpoint=0).sel(layer=primary.layer)
        nats = (logit_diff.sel(subset="even") - logit_diff.sel(subset="odd")).values
        splits = find_equal_splits(complete)
        p = np.nan if splits is None else permutation_p(here, splits, primary.layer)
    (low,), (high,) = interval(nats.astype(float)[None])
    return PrimaryTest(primary, float(nats.mean()), float(low), float(high), p, LEVEL / n_tests)

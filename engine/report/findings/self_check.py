"""How exact a patched run was found to be, in a line.  Pure."""

import numpy as np
import xarray as xr

from ...study.study import Arithmetic, tolerance


def allowed_difference(run: xr.Dataset, *dtypes: Arithmetic) -> float:
    """The largest difference from stock transformers that the self-check took for rounding, in nats.

    Measured at each checkpoint; in runs from before it was, the bound that goes with the coarsest of `dtypes`.
    """
    if "self_check_bound" not in run or np.isnan(run.self_check_bound.values).all():
        return tolerance(*dtypes)
    return float(np.nanmax(run.self_check_bound.values))


def self_check_text(run: xr.Dataset) -> str:
    """The largest difference from stock transformers that the run saw of itself, in nats."""
    largest = float(run.self_check.max())
    return f"self-check against full hooked forwards of stock transformers: largest difference {largest:.1e} nats"

"""What was measured, summarised over heads and prompts: arrays and frames in, arrays and frames out, no text."""

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int

from ..study.mechanism_settings import MechanismSettings

HEADS = ["layer", "head"]


def approximation(run: xr.Dataset) -> xr.Dataset:
    """How well attribution patching estimates the exact effects, per checkpoint and `layer`, and of all layers.

    `correlation` is Pearson's (Pearson 1895) over heads and prompts, NaN where nothing varies; `mean_error` and
    `largest_error` are of the absolute difference, in nats.  `of_all_` prefixes what is pooled over layers.
    """
    summary = {}
    for prefix, dims in (("", ["head", "trial"]), ("of_all_", ["layer", "head", "trial"])):
        error = abs(run.estimate - run.effect)
        summary[f"{prefix}correlation"] = _correlation(run.estimate, run.effect, dims)
        summary[f"{prefix}mean_error"] = error.mean(dims)
        summary[f"{prefix}largest_error"] = error.max(dims)
    return xr.Dataset(summary)


def _correlation(left: xr.DataArray, right: xr.DataArray, dims: list[str]) -> xr.DataArray:
    left, right = (values.astype(float) - values.astype(float).mean(dims) for values in (left, right))
    spread = ((left**2).sum(dims) * (right**2).sum(dims)) ** 0.5
    covariance: xr.DataArray = (left * right).sum(dims)
    return covariance / spread.where(spread > 0)


def heads_by_attribution(run: xr.Dataset) -> Int[np.ndarray, "checkpoint place"]:
    """Per checkpoint all heads, as indices into (layer, head) stacked, by the size of their mean attribution.

    The head with the largest comes first; of the clean and the corrupt run, the one in which it is larger counts.
    """
    size = abs(run.attribution.mean("trial")).max("run").stack(at=HEADS).transpose("checkpoint", "at")
    # Stable, so that of tied heads the first is named whatever the library.
    return np.argsort(-size.values, axis=1, kind="stable")


def head_means(run: xr.Dataset, settings: MechanismSettings) -> pd.DataFrame:
    """Means over prompts of all that was measured, one row a checkpoint, layer and head.

    Attributions, effects and estimates in nats; attention as a share; of the weights norms, relative changes and
    cosines.
    """
    columns: dict[str, xr.DataArray] = {}
    if "attribution" in settings.parts:
        columns |= {f"attribution_{name}": run.attribution.sel(run=name).mean("trial") for name in run.run.values}
    if "attention" in settings.parts:
        share = run.attention.mean("trial")
        columns |= {f"to_{to}_{name}": share.sel(run=name, to=to) for name in run.run.values for to in run.to.values}
    if "weights" in settings.parts:
        for name in ("norm", "change", "to_previous", "to_last"):
            columns |= {f"{circuit}_{name}": run[name].sel(circuit=circuit) for circuit in run.circuit.values}
    if "patching" in settings.parts:
        columns |= {name: run[name].mean("trial") for name in ("effect", "estimate")}
    by_head = {name: values.drop_vars(["run", "to", "circuit"], errors="ignore") for name, values in columns.items()}
    return xr.Dataset(by_head).reset_coords(drop=True).to_dataframe(dim_order=["checkpoint", *HEADS])

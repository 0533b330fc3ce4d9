"""The mechanism as people read it: per checkpoint the head that matters most, where it looks, what changed.  Pure."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ...checkpoints.revisions import step_of
from ...measures.logit_diff import finished
from .finding import Finding

HEADS = ["layer", "head"]


def approximation(run: xr.Dataset) -> xr.Dataset:
    """How well attribution patching estimates the exact effects, per checkpoint and `layer`, and of all layers.

    `correlation` is Pearson's (Pearson 1895) over heads and trials, NaN where nothing varies; `mean_error` and
    `largest_error` are of the absolute difference, in nats.  `of_all` prefixes what is pooled over layers.
    """
    found = {}
    for prefix, dims in (("", ["head", "trial"]), ("of_all_", ["layer", "head", "trial"])):
        error = abs(run.estimate - run.effect)
        found[f"{prefix}correlation"] = _correlation(run.estimate, run.effect, dims)
        found[f"{prefix}mean_error"] = error.mean(dims)
        found[f"{prefix}largest_error"] = error.max(dims)
    return xr.Dataset(found)


def _correlation(one: xr.DataArray, other: xr.DataArray, dims: list[str]) -> xr.DataArray:
    one, other = (values.astype(float) - values.astype(float).mean(dims) for values in (one, other))
    spread = ((one**2).sum(dims) * (other**2).sum(dims)) ** 0.5
    return (one * other).sum(dims) / spread.where(spread > 0)


def mechanism_text(run: xr.Dataset, settings: Mapping[str, Any]) -> Finding:
    """One row a finished checkpoint, of the parts that were measured."""
    done = finished(run).load()
    table = pd.DataFrame(index=pd.Index(done.checkpoint.values, name=None))
    if any(step_of(str(label)) != step for label, step in zip(table.index, done.step.values, strict=True)):
        table["step"] = [str(step) if step >= 0 else "?" for step in done.step.values]
    notes = []
    for part, tell in _PARTS.items():
        if part in settings["parts"]:
            columns, note = tell(done, settings)
            notes.append(note)
            for name, values in columns.items():
                table[name] = values
    return Finding("Mechanism", table, tuple(notes), "mechanism", _numbers(done, settings))


Columns = tuple[dict[str, list[str]], str]


def _top(done: xr.Dataset) -> xr.DataArray:
    """Per checkpoint the (layer, head) with the largest mean attribution of either sign in either run."""
    size = abs(done.attribution.mean("trial")).max("run").stack(at=HEADS)
    return size.argmax("at")


def _tell_attribution(done: xr.Dataset, settings: Mapping[str, Any]) -> Columns:
    top, mean = _top(done), done.attribution.mean("trial").stack(at=HEADS)
    columns = {"top head": _names(mean, top)}
    for run in ("clean", "corrupt"):
        columns[run] = [f"{value:+.2f}" for value in mean.sel(run=run).isel(at=top).values]
    n = done.sizes["trial"]
    worst = float(done.self_check.max()) if done.sizes["checkpoint"] else 0.0
    return columns, (
        "top head: adds most to the logit difference by itself (direct logit attribution, final norm frozen);\n"
        f"nats in clean and corrupt run, mean over {n} distinct prompt{'s' * (n != 1)}; all shares sum to the\n"
        f"logit difference within {worst:.1e}"
    )


def _tell_attention(done: xr.Dataset, settings: Mapping[str, Any]) -> Columns:
    mean = done.attention.mean("trial").stack(at=HEADS)
    if "attribution" in settings["parts"]:
        top, who = _top(done), "it"
    else:
        top, who = mean.max(["run", "to"]).argmax("at"), "the most pointed head (named first)"
    seen = mean.isel(at=top)
    to = seen.max("run").argmax("to")
    shown = seen.isel(to=to)
    words = [
        f"{name} {100 * clean:.0f}/{100 * corrupt:.0f}%"
        for name, clean, corrupt in zip(
            done.to.values[to.values], shown.sel(run="clean").values, shown.sel(run="corrupt").values, strict=True
        )
    ]
    if "attribution" not in settings["parts"]:
        words = [f"{name} {word}" for name, word in zip(_names(mean, top), words, strict=True)]
    return {"looks at": words}, (
        f"looks at: where {who} attends most from the read position (clean/corrupt):\n"
        "first token, previous, itself, or all tokens that hold digits"
    )


def _tell_weights(done: xr.Dataset, settings: Mapping[str, Any]) -> Columns:
    change = done.change.stack(at=["circuit", *HEADS])
    known = change.notnull().any("at")
    most = change.fillna(-1).argmax("at")
    names = [
        f"{_head(*at[1:])} {at[0]} {value:.2g}" if is_known else "–"
        for at, value, is_known in zip(
            change["at"].values[most.values], change.isel(at=most).values, known.values, strict=True
        )
    ]
    to_last = done.to_last.mean(["layer", "head"])
    columns = {"most changed": names}
    for name, title in (("QK", "QK as last"), ("OV", "OV")):
        columns[title] = [_number(value, "+.2f") for value in to_last.sel(circuit=name).values.tolist()]
    return columns, (
        "most changed: the circuit (QK = W_Q W_K^T, OV = W_V W_O) that moved most since the checkpoint\n"
        "before, relative to its norm; as last: mean cosine of all heads' circuits with the last checkpoint's"
    )


def _tell_patching(done: xr.Dataset, settings: Mapping[str, Any]) -> Columns:
    found = approximation(done)
    columns = {
        "r": [_number(value, ".2f") for value in found.of_all_correlation.values.tolist()],
        "error": [f"{value:.2g}" for value in found.of_all_mean_error.values],
        "largest": [f"{value:.2g}" for value in found.of_all_largest_error.values],
    }
    return columns, (
        f"r, error, largest: attribution patching (gradient, {settings['direction']}) against patching "
        "each head\nexactly: correlation, mean and largest error in nats"
    )


_PARTS: dict[str, Callable[[xr.Dataset, Mapping[str, Any]], Columns]] = {
    "attribution": _tell_attribution,
    "attention": _tell_attention,
    "weights": _tell_weights,
    "patching": _tell_patching,
}


def _numbers(done: xr.Dataset, settings: Mapping[str, Any]) -> pd.DataFrame:
    """Means over trials by checkpoint, layer and head."""
    columns: dict[str, xr.DataArray] = {}
    if "attribution" in settings["parts"]:
        columns |= {f"attribution_{run}": done.attribution.sel(run=run).mean("trial") for run in done.run.values}
    if "attention" in settings["parts"]:
        seen = done.attention.mean("trial")
        columns |= {f"to_{to}_{run}": seen.sel(run=run, to=to) for run in done.run.values for to in done.to.values}
    if "weights" in settings["parts"]:
        for name in ("norm", "change", "to_previous", "to_last"):
            columns |= {f"{circuit}_{name}": done[name].sel(circuit=circuit) for circuit in done.circuit.values}
    if "patching" in settings["parts"]:
        columns |= {name: done[name].mean("trial") for name in ("effect", "estimate")}
    kept = {name: values.drop_vars(["run", "to", "circuit"], errors="ignore") for name, values in columns.items()}
    return xr.Dataset(kept).reset_coords(drop=True).to_dataframe(dim_order=["checkpoint", *HEADS])


def _names(values: xr.DataArray, at: xr.DataArray) -> list[str]:
    return [_head(layer, head) for layer, head in values["at"].values[at.values]]


def _head(layer: int, head: int) -> str:
    return f"L{layer}.H{head}"


def _number(value: float, form: str) -> str:
    return "–" if np.isnan(value) else format(value, form)

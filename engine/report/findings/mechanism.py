"""The mechanism as people read it: which heads write to the answer, what they attend to, how their weights change."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ...checkpoints.training_place import read_place
from ...measures.logit_diff import finished
from ...mechanism.summary import HEADS, approximation, head_means, heads_by_attribution
from ...runtime.format import format_count, format_head
from ...statistics.bootstrap import LEVEL
from ...statistics.means import interval
from ...study.mechanism_settings import MechanismSettings, Part
from ...study.study import RUNS
from .finding import Finding
from .roles import role_lines, roles_finding

SHOWN = 3
"""Heads that the summary names."""


def mechanism_summary(run: xr.Dataset, settings: MechanismSettings, study: Mapping[str, Any]) -> list[str]:
    """At most 8 lines of at most 100 columns about the final checkpoint, after those about roles; none where no
    checkpoint is finished.

    `study` is the store's record of model and task.
    """
    measured = finished(run)
    n_checkpoints, n = measured.sizes["checkpoint"], measured.sizes.get("trial")
    if not n_checkpoints:
        return []
    final = measured.isel(checkpoint=[-1]).load()
    label = str(final.checkpoint.values[0])
    which = f"the last of {n_checkpoints} checkpoints" if n_checkpoints > 1 else "the only checkpoint"
    prompts = "" if n is None else f": {format_count(n, 'prompt pair')}"
    # A store of a folder records its whole path; a name on the hub stays as it is.
    model = Path(study["model"]).name if Path(study["model"]).is_absolute() else study["model"]
    lines = [f"{model} on {study['task']} at {label}, {which}{prompts}"]
    if "roles" in settings.parts:
        lines += role_lines(measured, settings)
    if "attribution" in settings.parts:
        lines += _direct_heads(final, settings)
    elif "attention" in settings.parts:
        lines.append(_most_concentrated_head(final))
    if "weights" in settings.parts:
        lines.append(_weights_line(final))
    if "patching" in settings.parts:
        lines.append(_gradient_line(final, settings))
    if "attribution" in settings.parts:
        worst = float(measured.self_check.max())
        lines.append(
            f"checked    contributions sum to the logit difference within {worst:.1e} nats at "
            f"{format_count(n_checkpoints, 'checkpoint')}"
        )
    return lines


def _direct_heads(final: xr.Dataset, settings: MechanismSettings) -> Iterator[str]:
    """The heads with the largest direct contributions at the one checkpoint of `final`, a line each."""
    yield f"writes     directly to the logit difference, clean | corrupt run (nats, {100 * LEVEL:.0f} % interval)"
    contributions = final.attribution.isel(checkpoint=0).stack(at=HEADS).transpose("run", "at", "trial")
    low, high = interval(contributions.values.astype(float))
    mean = contributions.mean("trial").values
    for place in heads_by_attribution(final)[0][:SHOWN]:
        runs = " | ".join(
            f"{mean[index, place]:+.2f} {_interval(low[index, place], high[index, place])}"
            for index in range(len(RUNS))
        )
        layer, head = contributions["at"].values[place]
        attends = f"  attends to {_attended(final, layer, head)}" if "attention" in settings.parts else ""
        yield f"  {format_head(layer, head):<8} {runs}{attends}"


def _interval(low: float, high: float) -> str:
    """Empty for one prompt, which has no interval."""
    return "" if np.isnan(low) else f"[{low:+.2f}, {high:+.2f}]"


def _attended(final: xr.Dataset, layer: int, head: int) -> str:
    """`digits 62|60%`: what a head attends to most in either run, and its mean share in both."""
    share = final.attention.isel(checkpoint=0).sel(layer=layer, head=head).mean("trial")
    to = int(share.max("run").argmax("to"))
    clean, corrupt = (100 * float(share.sel(run=run).isel(to=to)) for run in RUNS)
    return f"{share.to.values[to]} {clean:.0f}|{corrupt:.0f}%"


def _most_concentrated_head(final: xr.Dataset) -> str:
    share = final.attention.isel(checkpoint=0).mean("trial").max(["run", "to"]).stack(at=HEADS)
    layer, head = share["at"].values[int(share.argmax("at"))]
    attended = _attended(final, layer, head)
    return f"attention  most concentrated: {format_head(layer, head)} attends to {attended} (clean|corrupt)"


def _weights_line(final: xr.Dataset) -> str:
    change = final.change.isel(checkpoint=0).stack(at=["circuit", *HEADS])
    previous = str(final.previous.values[0])
    if not previous or bool(change.isnull().all()):
        return "weights    no checkpoint before this one to compare the weights with"
    largest = int(change.fillna(-1).argmax("at"))
    circuit, layer, head = change["at"].values[largest]
    return (
        f"weights    largest change since {previous}: {circuit} of {format_head(layer, head)}, "
        f"{change.values[largest]:.2g} of its norm"
    )


def _gradient_line(final: xr.Dataset, settings: MechanismSettings) -> str:
    """How gradient estimates of single-head patches compare with the exact effects, of all heads and of the largest."""
    quality = approximation(final).isel(checkpoint=0)
    effect = final.effect.isel(checkpoint=0).mean("trial").stack(at=HEADS)
    place = int(abs(effect).argmax("at"))
    estimate = final.estimate.isel(checkpoint=0).mean("trial").stack(at=HEADS)
    layer, head = effect["at"].values[place]
    correlation = _number(float(quality.of_all_correlation), ".2f")
    return (
        f"gradient   r = {correlation} with exact effects ({settings.direction}), error ≤ "
        f"{float(quality.of_all_largest_error):.2g}; {format_head(layer, head)} {estimate.values[place]:+.2f}, exact "
        f"{effect.values[place]:+.2f} nats"
    )


def mechanism_findings(run: xr.Dataset, settings: MechanismSettings) -> Iterator[Finding]:
    """What was measured at every finished checkpoint, of which there is one at least: roles apart from the rest."""
    if settings.parts != ("roles",):
        yield mechanism_text(run, settings)
    if "roles" in settings.parts:
        yield roles_finding(run, settings)


def mechanism_text(run: xr.Dataset, settings: MechanismSettings) -> Finding:
    """One row a finished checkpoint, of the parts that were measured."""
    measured = finished(run).load()
    table = pd.DataFrame(index=pd.Index(measured.checkpoint.values, name=None))
    if any(read_place(str(label)).step != step for label, step in zip(table.index, measured.step.values, strict=True)):
        table["step"] = [str(step) if step >= 0 else "?" for step in measured.step.values]
    notes = []
    for part, columns_of in _PARTS.items():
        if part in settings.parts:
            columns, note = columns_of(measured, settings)
            notes.append(note)
            for name, values in columns.items():
                table[name] = values
    return Finding("Mechanism", table, tuple(notes), "mechanism", head_means(measured, settings))


Columns = tuple[dict[str, list[str]], str]
"""Columns of the table by name, and how to read them."""


def _top_head(measured: xr.Dataset) -> xr.DataArray:
    """Per checkpoint the index, into (layer, head) stacked, of the head with the largest mean attribution."""
    return xr.DataArray(heads_by_attribution(measured)[:, 0], dims="checkpoint")


def _attribution_columns(measured: xr.Dataset, settings: MechanismSettings) -> Columns:
    top, mean = _top_head(measured), measured.attribution.mean("trial").stack(at=HEADS)
    columns = {"top head": _names(mean, top)}
    for run in RUNS:
        columns[run] = [f"{value:+.2f}" for value in mean.sel(run=run).isel(at=top).values]
    n = measured.sizes["trial"]
    worst = float(measured.self_check.max()) if measured.sizes["checkpoint"] else 0.0
    return columns, (
        "top head: contributes most to the logit difference directly (direct logit attribution, final norm\n"
        f"frozen); nats in clean and corrupt run, mean over {format_count(n, 'distinct prompt')}; all contributions\n"
        f"sum to the logit difference within {worst:.1e}"
    )


def _attention_columns(measured: xr.Dataset, settings: MechanismSettings) -> Columns:
    mean = measured.attention.mean("trial").stack(at=HEADS)
    if "attribution" in settings.parts:
        top, who = _top_head(measured), "the top head"
    else:
        top, who = mean.max(["run", "to"]).argmax("at"), "the head with the most concentrated attention"
    share = mean.isel(at=top)
    to = share.max("run").argmax("to")
    shown = share.isel(to=to)
    cells = [
        f"{name} {100 * clean:.0f}/{100 * corrupt:.0f}%"
        for name, clean, corrupt in zip(
            measured.to.values[to.values], shown.sel(run="clean").values, shown.sel(run="corrupt").values, strict=True
        )
    ]
    if "attribution" not in settings.parts:
        cells = [f"{name} {cell}" for name, cell in zip(_names(mean, top), cells, strict=True)]
    return {"attends to": cells}, (
        f"attends to: where {who} attends most from the read position\n"
        "(clean/corrupt): first token, previous token, itself, or all tokens that hold digits"
    )


def _weights_columns(measured: xr.Dataset, settings: MechanismSettings) -> Columns:
    change = measured.change.stack(at=["circuit", *HEADS])
    is_compared = change.notnull().any("at")
    largest = change.fillna(-1).argmax("at")
    places = change["at"].values[largest.values]
    names = [
        f"{format_head(layer, head)} {circuit} {value:.2g}" if compared else "–"
        for (circuit, layer, head), value, compared in zip(
            places, change.isel(at=largest).values, is_compared.values, strict=True
        )
    ]
    to_final = measured.to_last.mean(["layer", "head"])
    columns = {"most changed": names}
    for circuit in ("QK", "OV"):
        columns[f"{circuit} cosine"] = [
            _number(value, "+.2f") for value in to_final.sel(circuit=circuit).values.tolist()
        ]
    return columns, (
        "most changed: circuit (QK = W_Q W_K^T, OV = W_V W_O) with the largest change since the checkpoint\n"
        "before, relative to its norm; cosine: to the final checkpoint's circuits, mean over all heads"
    )


def _patching_columns(measured: xr.Dataset, settings: MechanismSettings) -> Columns:
    quality = approximation(measured)
    columns = {
        "r": [_number(value, ".2f") for value in quality.of_all_correlation.values.tolist()],
        "error": [f"{value:.2g}" for value in quality.of_all_mean_error.values],
        "largest": [f"{value:.2g}" for value in quality.of_all_largest_error.values],
    }
    return columns, (
        f"r, error, largest: attribution patching (gradient, {settings.direction}) against patching "
        "each head\nexactly: correlation, mean and largest error in nats"
    )


_PARTS: dict[Part, Callable[[xr.Dataset, MechanismSettings], Columns]] = {
    "attribution": _attribution_columns,
    "attention": _attention_columns,
    "weights": _weights_columns,
    "patching": _patching_columns,
}


def _names(values: xr.DataArray, places: xr.DataArray) -> list[str]:
    """`L3.H1` of each place along the stacked (layer, head) axis `at` of `values`."""
    return [format_head(layer, head) for layer, head in values["at"].values[places.values]]


def _number(value: float, form: str) -> str:
    return "–" if np.isnan(value) else format(value, form)

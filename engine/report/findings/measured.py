"""The measures beside the logit difference, where a run kept some: their means, per checkpoint and layer."""

import pandas as pd
import xarray as xr

from ...measures.logit_diff import NAMED, best_layer, finished
from ...study.patch_settings import PatchSettings
from ...study.study import MEASURES
from .finding import Finding

CALLED = {
    "probability": "probability of the right answer's first token where the answers differ",
    "rank": "its rank among the tokenizer's tokens, 0 the first",
    "kl": "divergence of the run from the clean one, nats",
    "sequence": "log-probability of the whole right answer - that of the wrong one, nats (more tokens, more to lose)",
}
"""What each measure says; `headlapse.engine.measures` defines them and names their sources."""


def means(run: xr.Dataset) -> pd.DataFrame:
    """Means over prompts, one row a measure, checkpoint and layer: unpatched runs, and even, odd and all heads."""
    complete = finished(run)
    tables = {}
    for name in (name for name in MEASURES if name in complete):
        series = {"clean": complete[f"clean_{name}"], "corrupt": complete[f"corrupt_{name}"]}
        series |= {word: complete[name].sel(subset=word, drop=True) for word in NAMED if word in complete.subset.values}
        columns = [
            values.mean("trial").broadcast_like(complete.layer).rename(word).reset_coords(drop=True)
            for word, values in series.items()
        ]
        frame = xr.merge(columns).to_dataframe(dim_order=["checkpoint", "layer"])
        # xarray puts labels in alphabetical order where it merges.
        tables[name] = frame.reindex(complete.checkpoint.values, level="checkpoint")[list(series)]
    return pd.concat(tables, names=["measure"]) if tables else pd.DataFrame()


def measures_finding(run: xr.Dataset, settings: PatchSettings) -> Finding | None:
    """Every measure at each checkpoint's best layer, which the logit difference chooses; None where none was kept."""
    numbers = means(run)
    if numbers.empty:
        return None
    layer = best_layer(finished(run), settings.direction)
    best = dict(zip(layer.checkpoint.values, layer.values, strict=True))
    at_best = [best[checkpoint] == here for _, checkpoint, here in numbers.index]
    table = numbers[at_best].droplevel("layer").map("{:.3g}".format)
    measures = table.index.unique("measure")
    notes = [f"{name}: {CALLED[name]}" for name in measures]
    where = "at those layers" if settings.joint else "at the best layer by logit difference"
    notes.append(f"means over prompts; patched columns: {settings.direction} {where}")
    worst = ", ".join(f"{name} {float(run[f'self_check_{name}'].max()):.1e}" for name in measures)
    lines = ("; ".join(notes), f"self-check of these against full hooked forwards: largest differences {worst}")
    return Finding("Other measures", table, lines, "measures", numbers)

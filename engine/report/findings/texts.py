"""Generated answers of the corrected patch beside its logit differences.  Pure."""

from collections.abc import Sequence

import pandas as pd
import xarray as xr

from ...measures.logit_diff import NAMED, best_layer, finished, success
from ...study.patch_settings import PatchSettings
from ...study.study import RUNS
from .finding import Finding

SHOWN = 3
"""Subsets in the table where none of `NAMED` was patched: the first so many."""

EXCERPT = 60
"""Characters of a text that are shown."""


def answer_rates(run: xr.Dataset) -> pd.DataFrame:
    """One row a checkpoint, layer and subset: how many texts succeed, and how often the logit difference says the same.

    Columns: `n` (distinct prompts), `success` (share of texts that begin with the right answer), `ahead` (share of
    prompts with the right answer's logit above the wrong one's), `agree` (share in which the two say the same).
    """
    complete = finished(run)
    succeeds, ahead = complete.success.astype(bool), success(complete.logit_diff) == 1
    columns = {"success": succeeds, "ahead": ahead, "agree": succeeds == ahead}
    means = xr.Dataset({name: values.mean("trial") for name, values in columns.items()})
    frame = means.reset_coords(drop=True).to_dataframe(dim_order=["checkpoint", "layer", "subset"])
    frame.insert(0, "n", complete.sizes["trial"])
    return frame


def answers_finding(run: xr.Dataset, settings: PatchSettings) -> Finding:
    """Success of the texts at each checkpoint's best layer, and the first prompt's texts at the last checkpoint."""
    complete = finished(run)
    shown = [name for name in NAMED if name in complete.subset.values] or list(map(str, complete.subset.values[:SHOWN]))
    frame, layers = answer_rates(run), best_layer(complete, settings.direction)
    rows: dict[str, dict[str, str]] = {}
    for label, layer in zip(map(str, complete.checkpoint.values), layers.values.astype(int), strict=True):
        plain = {name: complete[f"{name}_success"].sel(checkpoint=label).values.mean() for name in RUNS}
        patched = frame.loc[label, layer]["success"]
        rows[label] = {name: f"{share:.0%}" for name, share in {**plain, **patched.loc[shown]}.items()}
        rows[label]["agree"] = f"{frame.loc[label]['agree'].mean():.0%}"
        rows[label] |= {} if settings.joint else {"layer": str(layer)}
    n, n_texts, n_near = complete.sizes["trial"], complete.success.size, int(complete.n_near.sum())
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "checkpoint"
    notes = (
        f"texts of {settings.generate} greedy tokens that begin with the right answer, over {n} distinct "
        f"prompt{'s' * (n != 1)}, patched while the prompt is read; the beginning that both answers share is given",
        f"agree: of all {n_texts // len(rows):,} patched texts of a checkpoint, those of which the logit difference "
        "says the same",
        *_examples(complete, shown, int(layers.values[-1])),
        "two texts of each checkpoint were generated again by transformers' own generate and are the same; "
        f"{n_near:,} of all texts had near-tied next tokens and come from it",
    )
    return Finding("What the model says", table, notes, "answers", frame)


def _examples(complete: xr.Dataset, shown: Sequence[str], layer: int) -> list[str]:
    """The first prompt's texts at the last checkpoint."""
    last = complete.isel(checkpoint=-1, trial=0)
    texts = {name: last[f"{name}_text"].item() for name in RUNS}
    texts |= {name: last.text.sel(layer=layer, subset=name).item() for name in shown}
    return [f"{complete.checkpoint.values[-1]}, {name}: {text[:EXCERPT]!r}" for name, text in texts.items()]

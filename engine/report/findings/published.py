"""A run by the published study's procedure beside the study's own numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ...measures.logit_diff import finished
from ...replay.published_protocol import LAYERS, N_TOKENS, SUBSETS

MODEL, TASK = "pythia-160m", "published"

PARTS = ("even", "odd")

RATES = {
    "step1000": (0.0, 0.0, 0.0), "step2000": (0.0, 0.0, 0.0), "step4000": (0.0, 0.0, 0.0),
    "step8000": (0.0, 0.0, 0.0), "step16000": (0.0, 0.0, 0.0), "step32000": (1.0, 1.0, 1.0),
    "step64000": (1.0, 1.0, 1.0), "step80000": (0.0, 0.0, 0.0), "step100000": (0.0, 0.0, 0.0),
    "step120000": (0.0, 0.0, 0.0), "step143000": (0.0, 1.0, 0.0), "main": (0.0, 1.0, 0.0),
}  # fmt: skip
"""Success rates the study gives for pythia-160m: unpatched, even, odd.  Its step143000 was loaded as `main`."""


def success_table(run: xr.Dataset, study: Mapping[str, Any]) -> pd.DataFrame:
    """Per checkpoint the success rates, at one layer, and the study's own where it has some; all of it as text."""
    complete = finished(run)
    question = Path(study["model"]).name, study["task"]
    rows = [
        _row(complete.isel(checkpoint=[index]), _shown(complete), question)
        for index in range(complete.sizes["checkpoint"])
    ]
    return pd.DataFrame(rows).set_index("checkpoint").fillna("")


def published_rates() -> pd.DataFrame:
    """The study's own success rates, a row a checkpoint; all of it as text."""
    rows = {label: row for label, row in RATES.items() if label != "main"}
    return _rates_as_text(pd.DataFrame.from_dict(rows, "index", columns=["unpatched", "even", "odd"]))


def rates_of(timeline: pd.DataFrame, target: str) -> pd.DataFrame:
    """The same of a patched run's timeline, whose unpatched run is `target`."""
    return _rates_as_text(
        pd.DataFrame({"unpatched": timeline[f"{target}_rate"], **{name: timeline[f"{name}_rate"] for name in PARTS}})
    )


def _rates_as_text(rates: pd.DataFrame) -> pd.DataFrame:
    """With the difference of even and odd."""
    text = rates.map("{:.0%}".format)
    return text.assign(**{"even - odd": (rates["even"] - rates["odd"]).map("{:+.2f}".format)}).rename_axis("checkpoint")


def format_texts(run: xr.Dataset, study: Mapping[str, Any]) -> str:
    """The success rates, how to read them, and one text of each condition."""
    complete, table = finished(run), success_table(run, study)
    chosen = "; each row shows the layer where even and odd are furthest apart" if complete.sizes["layer"] > 1 else ""
    n, n_near = complete.sizes["trial"], int(complete.n_near.sum())
    unknown = (
        f"the study gives no numbers for {Path(study['model']).name} on {study['task']}; "
        f"it asked {MODEL} the pair of --task {TASK}, at layer {LAYERS[0]}"
    )
    return "\n".join(
        [
            table.to_string(),
            "success by the published procedure (output slices, which are no heads, copied from the start and at every "
            f"decoding step; {N_TOKENS} greedy tokens) over {n} distinct prompt{'s' * (n != 1)}{chosen}",
            *(f"{complete.checkpoint.values[-1]}, {word}: {text[:80]!r}" for word, text in examples(complete).items()),
            *([] if "published" in table else [unknown]),
            "one text of each checkpoint was generated again by transformers' own generate and is the same; "
            f"{n_near:,} of all texts had near-tied next tokens and come from it",
        ]
    )


def examples(complete: xr.Dataset) -> dict[str, str]:
    """The first prompt's text under each condition, at the last checkpoint and the first layer."""
    first = complete.text.isel(checkpoint=-1, layer=0, trial=0)
    return {_called(word): str(first.sel(subset=word).item()) for word in _shown(complete)}


def _shown(complete: xr.Dataset) -> list[str]:
    return [word for word in SUBSETS if word in complete.subset.values] or list(map(str, complete.subset.values[:3]))


def _row(checkpoint: xr.Dataset, words: Sequence[str], question: tuple[str, str]) -> dict[str, str]:
    """One checkpoint's line: of several layers the one where the first two patched conditions are furthest apart."""
    rate = (
        checkpoint.success.isel(checkpoint=0).sel(subset=list(words)).mean("trial").transpose("layer", "subset").values
    )
    place = int(np.abs(rate[:, -1] - rate[:, -2]).argmax()) if len(words) > 2 else 0
    label, layer, here = (
        str(checkpoint.checkpoint.values[0]),
        int(checkpoint.layer.values[place]),
        tuple(rate[place].tolist()),
    )
    row = {"checkpoint": label, "layer": str(layer)}
    row |= {_called(word): f"{value:.0%}" for word, value in zip(words, here, strict=True)}
    if tuple(words) != SUBSETS:
        return row
    row["even - odd"] = f"{here[1] - here[2]:+.2f}"
    if (*question, str(layer)) == (MODEL, TASK, LAYERS[0]) and label in RATES:
        for column, rates in (("published", RATES[label]), ("here", here)):
            row[column] = " ".join(f"{value:.0%}" for value in rates)
        row["same?"] = "yes" if here == RATES[label] else "no"
    return row


def _called(word: str) -> str:
    return "baseline" if word == "none" else word

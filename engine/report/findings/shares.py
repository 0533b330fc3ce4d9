"""What the coalitions of a layer's heads say, in words: who does how much, how many it takes, who works with whom."""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import xarray as xr

from ...measures.logit_diff import best_layer, finished
from ...statistics.bootstrap import LEVEL
from ...statistics.head_subsets import SHARE, head_subset_statistics, sampled
from ...study.patch_settings import PatchSettings
from .finding import Finding

SHOWN = 3
"""Heads named in a row of the table, and pairs of them."""


def head_subset_findings(run: xr.Dataset, settings: PatchSettings) -> Iterator[Finding]:
    """Each head's share; from the whole lattice also how many heads it takes, and which pairs work together.

    Nothing where neither the lattice nor orders were run.
    """
    done = finished(run)
    exact = head_subset_statistics(done, settings.direction)
    found = sampled(done, settings) if exact is None else exact
    if found is None:
        return
    best = best_layer(done, settings.direction).astype(int)
    unit = f"nats towards the {'clean' if settings.direction == 'denoise' else 'corrupt'} run"
    yield _tell_shares(found, best, unit)
    if exact is not None:
        yield _tell_sizes(exact, best, unit)
        yield _tell_pairs(exact, best, unit)


def _tell_shares(found: xr.Dataset, best: xr.DataArray, unit: str) -> Finding:
    """Per checkpoint, at its best layer: the heads of the largest Shapley values, who is enough, who is needed."""
    rows = {}
    for label, one in _best(found, best):
        rows[label] = {"layer": str(int(one.layer)), "largest Shapley values (head, nats)": _largest(one)}
        if "shapley_error" in one:
            rows[label]["largest error"] = f"{float(one.shapley_error.max()):.2f}"
        else:
            rows[label] |= {"enough": _smallest(one, "sufficient"), "needed": _smallest(one, "necessary")}
            rows[label]["parity"] = _parity(one)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("checkpoint")
    by_head = found[[name for name, values in found.items() if values.dims[-1:] == ("head",)]].to_dataframe()
    return Finding("Each head's share", table, (_how_to_read("shapley_error" not in found, unit),), "shapley", by_head)


def _how_to_read(exact: bool, unit: str) -> str:
    half = f"({unit}) with half of their {LEVEL:.0%} interval over prompts"
    if not exact:
        return (
            f"Shapley values of the row's best layer, sampled from random orders of its heads, {half}; their largest "
            "standard error over the orders"
        )
    return (
        f"every coalition of the row's best layer: exact Shapley values {half}; fewest heads that do {SHARE:.0%} of "
        "what all do, fewest without which as much is lost (how many such sets there are); share of the effect's "
        "variance over coalitions that parity explains, and the share of halvings that explain as much"
    )


def _tell_sizes(found: xr.Dataset, best: xr.DataArray, unit: str) -> Finding:
    """At the last checkpoint's best layer: what so many heads do at least and at most; even ones at least."""
    numbers = found.curve.to_dataset("quantile").rename({0.0: "least", 0.5: "median", 1.0: "most"})
    numbers = numbers.assign(least_of_even=found.worst_even, place=found.worst_even_p)
    label, one = list(_best(numbers, best))[-1]
    nats = {"least": one.least, "median": one["median"], "most": one.most, "least of even": one.least_of_even}
    rows = {said: [_nats(value) for value in values.values] for said, values in nats.items()}
    rows["p"] = ["-" if math.isnan(value) else f"{value:.2f}" for value in one.place.values]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=one["size"].values.astype(str))
    note = (
        f"what patching so many heads of layer {int(one.layer)} does at {label} ({unit}): the least, the median and "
        "the most of all sets of that size, and the least of those of even heads alone, with the share of all halves "
        "whose least is as good: any k even heads do it only where that row says so, and parity has to do with it only "
        "where p is small"
    )
    return Finding(
        "How many heads it takes", table.rename_axis(columns="heads"), (note,), "sizes", numbers.to_dataframe()
    )


def _tell_pairs(found: xr.Dataset, best: xr.DataArray, unit: str) -> Finding:
    """At the last checkpoint's best layer: the pairs of heads that do most more, or less, than one by one."""
    label, one = list(_best(found, best))[-1]
    note = (
        f"pairs of heads of layer {int(one.layer)} that at {label} do most more, or less, together than one by one "
        f"(Shapley interaction, {unit}; below zero each does what the other does already): {_strongest(one)}"
    )
    numbers = found[["interaction"]].to_dataframe().query("head < other")
    return Finding("Which heads work together", None, (note,), "pairs", numbers)


def _best(found: xr.Dataset, best: xr.DataArray) -> Iterator[tuple[str, xr.Dataset]]:
    """Every checkpoint at its best layer."""
    for label, layer in zip(best.checkpoint.values, best.values, strict=True):
        yield str(label), found.sel(checkpoint=label, layer=layer)


def _largest(one: xr.Dataset) -> str:
    largest = np.argsort(-one.shapley.values, kind="stable")[:SHOWN]
    half = (one.shapley_high.values - one.shapley_low.values) / 2
    told = ["" if math.isnan(value) else f" ±{value:.2f}" for value in half]  # one prompt has no interval
    return ", ".join(f"{head} {one.shapley.values[head]:+.2f}{told[head]}" for head in largest)


def _strongest(one: xr.Dataset) -> str:
    heads, others = np.triu_indices(one.sizes["head"], 1)
    value = one.interaction.values[heads, others]
    most = np.argsort(-np.abs(value), kind="stable")[:SHOWN]
    return "; ".join(f"{heads[at]},{others[at]} {value[at]:+.2f}" for at in most) or "-"


def _parity(one: xr.Dataset) -> str:
    share, place = float(one.parity), float(one.parity_p)
    if math.isnan(share):
        return "-"
    return f"{share:.1%}" if math.isnan(place) else f"{share:.1%} p {place:.2f}"


def _smallest(one: xr.Dataset, name: str) -> str:
    size, count = int(one[name]), int(one[f"{name}_count"])
    return "-" if size < 0 else f"{one[f'{name}_set'].item()} ({count})"


def _nats(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"

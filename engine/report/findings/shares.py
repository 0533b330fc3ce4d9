"""Shapley values, sufficient and necessary sets, and interactions of a layer's heads, as tables."""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from ...measures.logit_diff import best_layer, finished
from ...statistics.bootstrap import LEVEL
from ...statistics.head_subsets import (
    DEGREES,
    SHARE,
    energy_interval,
    head_subset_statistics,
    sampled,
    strongest_interaction,
)
from ...study.patch_settings import PatchSettings
from .finding import Finding

ADDITIVE = 0.95
"""Share of the variance over subsets that single heads must surely explain for heads to be called additive."""

SHOWN = 3
"""Heads named in a row of the table, and pairs of them."""


def head_subset_findings(run: xr.Dataset, settings: PatchSettings) -> Iterator[Finding]:
    """Each head's share; where all subsets were run also how many heads it takes, and which pairs interact.

    Nothing where neither all subsets nor random orders were run.
    """
    complete = finished(run)
    exact = head_subset_statistics(complete, settings.direction)
    statistics = sampled(complete, settings) if exact is None else exact
    if statistics is None:
        return
    best = best_layer(complete, settings.direction).astype(int)
    unit = f"nats towards the {'clean' if settings.direction == 'denoise' else 'corrupt'} run"
    yield _shares_finding(statistics, best, unit)
    if exact is not None:
        yield _sizes_finding(exact, best, unit)
        yield _pairs_finding(exact, best, unit)
        yield _energy_finding(exact, best)


def _shares_finding(statistics: xr.Dataset, best: xr.DataArray, unit: str) -> Finding:
    """Per checkpoint, at its best layer: the heads of the largest Shapley values, sufficient and necessary sets."""
    rows = {}
    for label, at_best in _best(statistics, best):
        rows[label] = {"layer": str(int(at_best.layer)), "largest Shapley values (head, nats)": _largest(at_best)}
        if "shapley_error" in at_best:
            rows[label]["largest error"] = f"{float(at_best.shapley_error.max()):.2f}"
        else:
            rows[label] |= {
                "sufficient": _smallest(at_best, "sufficient"),
                "necessary": _smallest(at_best, "necessary"),
            }
            rows[label]["parity"] = _parity(at_best)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("checkpoint")
    by_head = statistics[[name for name, values in statistics.items() if values.dims[-1:] == ("head",)]].to_dataframe()
    return Finding(
        "Each head's share", table, (_how_to_read("shapley_error" not in statistics, unit),), "shapley", by_head
    )


def _how_to_read(exact: bool, unit: str) -> str:
    half = f"({unit}) with half of their {LEVEL:.0%} interval over prompts"
    if not exact:
        return (
            f"Shapley values of the best layer, sampled from random orders of its heads, {half}; their largest "
            "standard error over the orders"
        )
    return (
        f"all subsets of the best layer's heads: exact Shapley values {half}; smallest sufficient set ({SHARE:.0%} of "
        "the effect of all heads), smallest necessary set (without it as much is lost) and how many there are of that "
        "size; share of the effect's variance over subsets that parity explains, with its permutation p-value"
    )


def _sizes_finding(statistics: xr.Dataset, best: xr.DataArray, unit: str) -> Finding:
    """At the last checkpoint's best layer: smallest and largest effect of so many heads; smallest of even ones."""
    numbers = statistics.curve.to_dataset("quantile").rename({0.0: "smallest", 0.5: "median", 1.0: "largest"})
    numbers = numbers.assign(smallest_of_even=statistics.worst_even, p=statistics.worst_even_p)
    label, at_best = list(_best(numbers, best))[-1]
    nats = {"smallest": at_best.smallest, "median": at_best["median"], "largest": at_best.largest}
    nats["smallest of even"] = at_best.smallest_of_even
    rows = {name: [_nats(value) for value in values.values] for name, values in nats.items()}
    rows["p"] = ["-" if math.isnan(value) else f"{value:.2f}" for value in at_best.p.values]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=at_best["size"].values.astype(str))
    note = (
        f"effect of so many heads of layer {int(at_best.layer)} at {label} ({unit}): the smallest, the median and the "
        "largest of all sets of that size, and the smallest of those of even heads alone, with its permutation p-value "
        "over all halves of the heads: any k even heads suffice only if that row says so, and parity matters only if p "
        "is small"
    )
    return Finding(
        "How many heads it takes", table.rename_axis(columns="heads"), (note,), "sizes", numbers.to_dataframe()
    )


def _pairs_finding(statistics: xr.Dataset, best: xr.DataArray, unit: str) -> Finding:
    """At the last checkpoint's best layer: the pairs of heads with the largest interactions."""
    label, at_best = list(_best(statistics, best))[-1]
    note = (
        f"pairs of heads of layer {int(at_best.layer)} with the largest Shapley interactions at {label} ({unit}; below "
        f"zero the two are redundant, above it they need each other): {_strongest(at_best)}"
    )
    numbers = statistics[["interaction", "interaction_low", "interaction_high"]].to_dataframe().query("head < other")
    return Finding("Which heads interact", None, (note,), "pairs", numbers)


def _energy_finding(statistics: xr.Dataset, best: xr.DataArray) -> Finding:
    """Per checkpoint, at its best layer: how much of the variance over subsets single heads, pairs and more explain."""
    numbers = statistics[["energy", "energy_low", "energy_high"]]
    rows = {}
    for label, at_best in _best(numbers, best):
        columns = zip(DEGREES, *(at_best[name].values for name in numbers), strict=True)
        cells = {degree: _share(*values) for degree, *values in columns}
        rows[label] = {"layer": str(int(at_best.layer))} | cells
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("checkpoint")
    note = (
        "shares of the variance of the effect over all subsets of the best layer's heads (Walsh energy by degree), "
        f"with {LEVEL:.0%} intervals over prompts: heads act additively where single heads explain nearly all of it"
    )
    return Finding("How heads act together", table, (note,), "energy", numbers.to_dataframe())


def _share(share: float, low: float, high: float) -> str:
    if math.isnan(share):
        return "-"
    return f"{share:.1%}" if math.isnan(low) else f"{share:.1%} {low:.1%}..{high:.1%}"


def together_texts(values: Float[np.ndarray, "subset trial"], layer: int) -> tuple[str, ...]:
    """How a layer's heads act together, in words, the longest first; nothing where nothing varies.

    Additively where single heads surely explain `ADDITIVE` of the variance over subsets; else the surest pair, where
    its interaction is significant: below zero the two are redundant, above it they need each other.
    """
    share, low, _ = energy_interval(values)
    if math.isnan(share[0]):
        return ()
    percent = f"{100 * share[0]:.1f} %"
    if low[0] >= ADDITIVE:
        return f"heads act additively ({percent} of the variance over subsets)", f"additive: {percent}"
    pair = strongest_interaction(values)
    shares = f"{percent} additive, {100 * share[1]:.1f} % pairs"
    if pair is None or pair.p_adjusted > 1 - LEVEL:
        return shares, f"additive: {percent}"
    sign = -1 if values[-1].mean() < 0 else 1
    named = " and ".join(f"L{layer}.H{head}" for head in pair.heads)
    how = "are redundant" if sign * pair.nats < 0 else "need each other"
    return f"{shares}; {named} {how}", f"{named} {how}", f"additive: {percent}"


def _best(statistics: xr.Dataset, best: xr.DataArray) -> Iterator[tuple[str, xr.Dataset]]:
    """Every checkpoint at its best layer."""
    for label, layer in zip(best.checkpoint.values, best.values, strict=True):
        yield str(label), statistics.sel(checkpoint=label, layer=layer)


def _largest(at_best: xr.Dataset) -> str:
    largest = np.argsort(-at_best.shapley.values, kind="stable")[:SHOWN]
    half = (at_best.shapley_high.values - at_best.shapley_low.values) / 2
    margin = ["" if math.isnan(value) else f" ±{value:.2f}" for value in half]  # one prompt has no interval
    return ", ".join(
        f"L{int(at_best.layer)}.H{head} {at_best.shapley.values[head]:+.2f}{margin[head]}" for head in largest
    )


def _strongest(at_best: xr.Dataset) -> str:
    heads, others = np.triu_indices(at_best.sizes["head"], 1)
    value = at_best.interaction.values[heads, others]
    low, high = (at_best[name].values[heads, others] for name in ("interaction_low", "interaction_high"))
    order = np.argsort(-np.abs(value), kind="stable")[:SHOWN]
    texts = (
        f"{_pair(at_best, int(heads[pair]), int(others[pair]))} {value[pair]:+.2f}{_bounds(low[pair], high[pair])}"
        for pair in order
    )
    return "; ".join(texts) or "-"


def _bounds(low: float, high: float) -> str:
    return "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"  # one prompt has no interval


def _pair(at_best: xr.Dataset, head: int, other: int) -> str:
    return f"L{int(at_best.layer)}.H{head} and L{int(at_best.layer)}.H{other}"


def _parity(at_best: xr.Dataset) -> str:
    share, p = float(at_best.parity), float(at_best.parity_p)
    if math.isnan(share):
        return "-"
    return f"{share:.1%}" if math.isnan(p) else f"{share:.1%} p {p:.2f}"


def _smallest(at_best: xr.Dataset, name: str) -> str:
    size, count = int(at_best[name]), int(at_best[f"{name}_count"])
    return "-" if size < 0 else f"{at_best[f'{name}_set'].item()} ({count})"


def _nats(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"

"""What the lattice of head subsets tells: each head's share, who is enough, who is needed, and what parity has to do
with it.  Pure."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from ...kernels.walsh import subset_minima
from ..measures.logit_diff import CLEAR_OF_ZERO, each_checkpoint, effect, finished
from ..study.patch_settings import PatchSettings
from ..study.subsets import draw_orders, label_of
from . import shapley
from .bootstrap import interval

SHARE = 0.8
"""Of what all heads do: a coalition is sufficient when it does as much, necessary when without it as much is lost."""

MOST_WORK = 2**24
"""EqualSplits times coalitions above which the place of parity is not worked out."""


def all_subset_rows(mask: Bool[np.ndarray, "subset head"]) -> Int[np.ndarray, " coalition"] | None:
    """Where each coalition stands along the subset axis, in order of their bits; None unless all of them are there."""
    n_heads = mask.shape[1]
    if len(mask) < 2**n_heads:
        return None
    bits = mask @ (1 << np.arange(n_heads))
    found, rows = np.unique(bits, return_index=True)
    return rows if len(found) == 2**n_heads else None


def head_subset_statistics(run: xr.Dataset, direction: str) -> xr.Dataset | None:
    """Everything below, by checkpoint and layer, from the effect of every coalition in nats; None without the lattice.

    `shapley` (head) with `shapley_low` and `shapley_high`, the bootstrap interval over prompts; `banzhaf` (head);
    `interaction` (head, other), Shapley's; `sufficient` and `necessary` (heads, -1 for none), how many such sets there
    are (`_count`) and the best of them (`_set`); `curve` (size, quantile): smallest, median and largest effect of that
    many heads; `worst_even` (size): the least that so many even heads do; `worst_even_p`: its place among the worst of
    all halves; `parity`: share of the variance over coalitions that the numbers of even and of odd heads explain beyond
    the number of heads (`parity_p`: its place among all halvings).
    """
    done = finished(run)
    rows = all_subset_rows(done.mask.values)
    if rows is None or not done.sizes["checkpoint"]:
        return None
    found = []
    for one in each_checkpoint(done):
        values = effect(one, direction).isel(subset=rows).transpose("checkpoint", "layer", "subset", "trial")
        layers = [_of_layer(layer.astype(float)) for layer in values.values[0]]
        found.append(xr.concat(layers, pd.Index(done.layer.values, name="layer")))
    return xr.concat(found, pd.Index(done.checkpoint.values, name="checkpoint"))


def _of_layer(values: Float[np.ndarray, "coalition trial"]) -> xr.Dataset:
    n_heads, mean = len(values).bit_length() - 1, values.mean(1)
    by_trial = shapley.shapley(values)
    low, high = interval(by_trial)
    # Where all heads do next to nothing, there is nothing to be enough or needed for.
    whole = mean[-1] if mean[-1] >= CLEAR_OF_ZERO else np.inf
    sufficient = shapley.smallest_sufficient(mean, SHARE * whole)
    necessary = shapley.smallest_necessary(mean, (1 - SHARE) * whole if np.isfinite(whole) else -np.inf)
    worst, worst_p = worst_even(mean)
    share, share_p = parity_share(mean)
    held: dict[str, Any] = {
        "shapley": ("head", by_trial.mean(1)), "shapley_low": ("head", low), "shapley_high": ("head", high),
        "banzhaf": ("head", shapley.banzhaf(mean)),
        "interaction": (("head", "other"), shapley.shapley_interactions(mean)),
        "curve": (("size", "quantile"), _curve(mean)),
        "worst_even": ("size", worst), "worst_even_p": ("size", worst_p), "parity": share, "parity_p": share_p,
    }  # fmt: skip
    for name, smallest in (("sufficient", sufficient), ("necessary", necessary)):
        held[name], held[f"{name}_count"] = smallest.size, smallest.count
        held[f"{name}_set"] = label_of(smallest.heads, n_heads) if smallest.size >= 0 else ""
    return xr.Dataset(held, coords={"quantile": [0.0, 0.5, 1.0]})


def _curve(mean: Float[np.ndarray, " coalition"]) -> Float[np.ndarray, "size quantile"]:
    size = shapley.sizes(len(mean).bit_length() - 1)
    return np.array([np.quantile(mean[size == k], [0, 0.5, 1]) for k in range(size.max() + 1)])


def worst_even(mean: Float[np.ndarray, " coalition"]) -> tuple[Float[np.ndarray, " size"], Float[np.ndarray, " size"]]:
    """The least that k even heads do, for every k, and its place among the least that k heads of each half do.

    "Any k even heads do it" is a claim about the worst of them; with heads numbered at random it would be as likely for
    any half.  The place is one-sided: how many halves have a worst case at least as good.
    """
    n = len(mean).bit_length() - 1
    even, halves, size = _even(n), _halves(n), shapley.sizes(n)
    worst, places = np.full(n + 1, np.nan), np.full(n + 1, np.nan)
    for k in range(1, n - n // 2 + 1):
        least = subset_minima(np.where(size == k, mean, np.inf))
        worst[k] = least[even]
        places[k] = (least[halves] >= worst[k] - _slack(mean)).mean()
    return worst, places


def parity_share(mean: Float[np.ndarray, " coalition"]) -> tuple[float, float]:
    """Share of the variance over all coalitions that (number of even heads, number of odd heads) explains beyond the
    number of heads alone, and its one-sided place among all halvings: how many explain as much.

    A decomposition of variance by groups (Fisher 1925); the place is an exact permutation test over head numbers.  Both
    NaN where nothing varies, the place NaN where there are too many halvings.
    """
    n = len(mean).bit_length() - 1
    size, total = shapley.sizes(n), mean.var()
    if total <= _slack(mean) ** 2:
        return math.nan, math.nan
    by_number = _between(mean, size) / total

    def share(half: int) -> float:
        inside = shapley.members(n)[:, shapley.members(n)[half]].sum(1)
        return _between(mean, inside * (n + 1) + size) / total - by_number

    found = share(_even(n))
    halves = _halves(n)
    if len(halves) * len(mean) > MOST_WORK:
        return found, math.nan
    return found, float(np.mean([share(half) >= found - 1e-9 for half in halves.tolist()]))


def _between(mean: Float[np.ndarray, " coalition"], group: Int[np.ndarray, " coalition"]) -> float:
    """Variance of the groups' means."""
    n = np.bincount(group)
    kept = n > 0
    means = np.bincount(group, mean)[kept] / n[kept]
    return float((n[kept] * (means - mean.mean()) ** 2).sum() / len(mean))


def _even(n_heads: int) -> int:
    return shapley.index_of(range(0, n_heads, 2))


def _halves(n_heads: int) -> Int[np.ndarray, " half"]:
    """Every set of as many heads as there are even ones."""
    return np.array([shapley.index_of(heads) for heads in combinations(range(n_heads), n_heads - n_heads // 2)])


def _slack(mean: np.ndarray) -> float:
    """Differences up to this are roundings of float32."""
    return 1e-6 * float(np.abs(mean).max())


def sampled(run: xr.Dataset, settings: PatchSettings) -> xr.Dataset | None:
    """Shapley values from sampled orders, where the patched run has them (`orders:N`); None where it has not.

    `shapley` (head) with `shapley_low` and `shapley_high`, the interval over prompts given these orders, and
    `shapley_error`, the standard error over pairs of orders given these prompts; by checkpoint and layer.
    """
    done = finished(run)
    wanted = [int(word.partition(":")[2]) for word in settings.subsets if word.startswith("orders:")]
    if not wanted or not done.sizes["checkpoint"]:
        return None
    orders = np.array(draw_orders(max(wanted), done.sizes["head"]))
    row_of = {heads.tobytes(): row for row, heads in enumerate(done.mask.values)}
    # A head has joined once its place in the order is below the number of heads that have.
    begun = np.argsort(orders, axis=1)[:, None, :] < np.arange(done.sizes["head"] + 1)[None, :, None]
    rows = np.array([[row_of[heads.tobytes()] for heads in order] for order in begun])
    found = []
    for one in each_checkpoint(done):
        values = effect(one, settings.direction).transpose("checkpoint", "layer", "subset", "trial").values[0]
        layers = [_of_orders(layer.astype(float)[rows], orders) for layer in values]
        found.append(xr.concat(layers, pd.Index(done.layer.values, name="layer")))
    return xr.concat(found, pd.Index(done.checkpoint.values, name="checkpoint"))


def _of_orders(worth: Float[np.ndarray, "order step trial"], orders: Int[np.ndarray, "order head"]) -> xr.Dataset:
    by_trial, _ = shapley.sampled_shapley(worth, orders)
    low, high = interval(by_trial)
    mean, error = shapley.sampled_shapley(worth.mean(-1), orders)
    held = {"shapley": mean, "shapley_low": low, "shapley_high": high, "shapley_error": error}
    return xr.Dataset({name: ("head", values) for name, values in held.items()})

"""What all subsets of a layer's heads show: Shapley values, sufficient and necessary sets, whether parity matters.

Pure.
"""

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from ...kernels.walsh import subset_minima, walsh_hadamard
from ..measures.logit_diff import CLEAR_OF_ZERO, each_checkpoint, effect, finished
from ..study.patch_settings import PatchSettings
from ..study.subsets import draw_orders, label_of
from . import shapley
from .bootstrap import LEVEL
from .means import interval, p_differs
from .multiple_testing import adjust

SHARE = 0.8
"""Of the effect of all heads: a sufficient subset has as much alone, and without a necessary one as much is lost."""

MOST_WORK = 2**24
"""Equal splits times subsets above which the p-value of parity's share is not computed."""


def all_subset_rows(mask: Bool[np.ndarray, "subset head"]) -> Int[np.ndarray, " subset"] | None:
    """Row of each subset of the heads along the subset axis, in order of their bits; None unless all are there."""
    n_heads = mask.shape[1]
    if len(mask) < 2**n_heads:
        return None
    bits = mask @ (1 << np.arange(n_heads))
    distinct, rows = np.unique(bits, return_index=True)
    return rows if len(distinct) == 2**n_heads else None


def head_subset_statistics(run: xr.Dataset, direction: str) -> xr.Dataset | None:
    """Everything below, by checkpoint and layer, from the effect of every subset in nats; None unless all were run.

    `shapley` (head) with `shapley_low` and `shapley_high`, the interval over prompts; `banzhaf` (head);
    `interaction` (head, other), Shapley's, with `interaction_low` and `interaction_high`; `energy` (degree) with
    `energy_low` and `energy_high`, shares of the variance over subsets by how many heads they take; `sufficient` and
    `necessary` (heads, -1 for none), how many such sets there are (`_count`) and the best of them (`_set`); `curve`
    (size, quantile): smallest, median and largest effect of that many heads; `worst_even` (size): the smallest effect
    of so many even heads; `worst_even_p`: its permutation p-value over all halves; `parity`: share of the variance over
    subsets that the numbers of even and of odd heads explain beyond the number of heads (`parity_p`: its permutation
    p-value over all equal splits).
    """
    complete = finished(run)
    rows = all_subset_rows(complete.mask.values)
    if rows is None or not complete.sizes["checkpoint"]:
        return None
    by_checkpoint = []
    for checkpoint in each_checkpoint(complete):
        values = effect(checkpoint, direction).isel(subset=rows).transpose("checkpoint", "layer", "subset", "trial")
        layers = [_of_layer(layer.astype(float)) for layer in values.values[0]]
        by_checkpoint.append(xr.concat(layers, pd.Index(complete.layer.values, name="layer")))
    return xr.concat(by_checkpoint, pd.Index(complete.checkpoint.values, name="checkpoint"))


def _of_layer(values: Float[np.ndarray, "subset trial"]) -> xr.Dataset:
    n_heads, mean = len(values).bit_length() - 1, values.mean(1)
    by_trial = shapley.shapley(values)
    low, high = interval(by_trial)
    # Where the effect of all heads is near zero, no set is sufficient or necessary for it.
    whole = mean[-1] if mean[-1] >= CLEAR_OF_ZERO else np.inf
    sufficient = shapley.smallest_sufficient(mean, SHARE * whole)
    necessary = shapley.smallest_necessary(mean, (1 - SHARE) * whole if np.isfinite(whole) else -np.inf)
    worst, worst_p = worst_even(mean)
    share, share_p = parity_share(mean)
    interactions = shapley.shapley_interactions(values)
    interaction_low, interaction_high = interval(interactions)
    shares, shares_low, shares_high = energy_interval(values)
    variables: dict[str, Any] = {
        "energy": ("degree", shares), "energy_low": ("degree", shares_low), "energy_high": ("degree", shares_high),
        "interaction_low": (("head", "other"), interaction_low),
        "interaction_high": (("head", "other"), interaction_high),
        "shapley": ("head", by_trial.mean(1)), "shapley_low": ("head", low), "shapley_high": ("head", high),
        "banzhaf": ("head", shapley.banzhaf(mean)),
        "interaction": (("head", "other"), interactions.mean(-1)),
        "curve": (("size", "quantile"), _curve(mean)),
        "worst_even": ("size", worst), "worst_even_p": ("size", worst_p), "parity": share, "parity_p": share_p,
    }  # fmt: skip
    for name, smallest in (("sufficient", sufficient), ("necessary", necessary)):
        variables[name], variables[f"{name}_count"] = smallest.size, smallest.count
        variables[f"{name}_set"] = label_of(smallest.heads, n_heads) if smallest.size >= 0 else ""
    return xr.Dataset(variables, coords={"quantile": [0.0, 0.5, 1.0], "degree": list(DEGREES)})


def _curve(mean: Float[np.ndarray, " subset"]) -> Float[np.ndarray, "size quantile"]:
    size = shapley.sizes(len(mean).bit_length() - 1)
    return np.array([np.quantile(mean[size == k], [0, 0.5, 1]) for k in range(size.max() + 1)])


def worst_even(mean: Float[np.ndarray, " subset"]) -> tuple[Float[np.ndarray, " size"], Float[np.ndarray, " size"]]:
    """Smallest effect of k even heads, for every k, and its permutation p-value over all halves of the heads.

    "Any k even heads suffice" is a claim about the worst of them; with heads numbered at random it would be as likely
    for any half.  One-sided: the share of halves whose worst case is at least as good.
    """
    n = len(mean).bit_length() - 1
    even, halves, size = _even(n), _halves(n), shapley.sizes(n)
    worst, p_values = np.full(n + 1, np.nan), np.full(n + 1, np.nan)
    for k in range(1, n - n // 2 + 1):
        least = subset_minima(np.where(size == k, mean, np.inf))
        worst[k] = least[even]
        p_values[k] = (least[halves] >= worst[k] - _slack(mean)).mean()
    return worst, p_values


def parity_share(mean: Float[np.ndarray, " subset"]) -> tuple[float, float]:
    """Share of the variance over all subsets that (number of even heads, number of odd heads) explains beyond the
    number of heads alone, and its one-sided permutation p-value: the share of equal splits that explain as much.

    A decomposition of variance by groups (Fisher 1925); the test over head numbers is exact.  Both NaN where nothing
    varies, the p-value NaN where there are too many equal splits.
    """
    n = len(mean).bit_length() - 1
    size, total = shapley.sizes(n), mean.var()
    if total <= _slack(mean) ** 2:
        return math.nan, math.nan
    by_number = _between(mean, size) / total

    def share(half: int) -> float:
        inside = shapley.members(n)[:, shapley.members(n)[half]].sum(1)
        return float(_between(mean, inside * (n + 1) + size) / total - by_number)

    of_even = share(_even(n))
    halves = _halves(n)
    if len(halves) * len(mean) > MOST_WORK:
        return of_even, math.nan
    return of_even, float(np.mean([share(half) >= of_even - 1e-9 for half in halves.tolist()]))


DEGREES = ("single heads", "pairs", "three and more")
"""How many heads a part of the effect's variance over subsets takes at once."""


def energy(values: Float[np.ndarray, "subset *resample"]) -> Float[np.ndarray, "degree *resample"]:
    """Shares of the variance over all subsets: what single heads explain, each adding what it adds on average, what
    pairs explain beyond them, and what is left to three heads and more; NaN where nothing varies.

    The energy of the Walsh spectrum by degree (effects and interactions of a two-level factorial: Fisher 1935, Yates
    1937); the three add up to one.
    """
    n = len(values).bit_length() - 1
    spectrum = (walsh_hadamard(np.asarray(values, dtype=float)) / len(values)) ** 2
    degree = np.minimum(shapley.sizes(n), len(DEGREES))
    parts = np.stack([spectrum[degree == k].sum(0) for k in range(1, len(DEGREES) + 1)])
    total, least = parts.sum(0), (1e-6 * np.abs(values).max(0)) ** 2
    shares: Float[np.ndarray, degree * resample] = np.where(total > least, parts / np.maximum(total, 1e-300), np.nan)
    return shares


def energy_interval(
    values: Float[np.ndarray, "subset trial"],
) -> tuple[Float[np.ndarray, " degree"], Float[np.ndarray, " degree"], Float[np.ndarray, " degree"]]:
    """`energy` of the mean over prompts, and its 95 % interval: Student's from the jackknife over prompts (Tukey 1958),
    within 0 and 1; NaN for one prompt."""
    n = values.shape[1]
    share = energy(values.mean(1))
    if n < 2:
        unknown = np.full(len(DEGREES), np.nan)
        return share, unknown, unknown
    from scipy.special import stdtrit  # start-up counts

    without = energy((values.sum(1, keepdims=True) - values) / (n - 1))
    error = np.sqrt((n - 1) / n * ((without - without.mean(1, keepdims=True)) ** 2).sum(1))
    reach = stdtrit(n - 1, (1 + LEVEL) / 2) * error
    return share, np.maximum(share - reach, 0), np.minimum(share + reach, 1)


@dataclass(frozen=True)
class Interaction:
    """How much more two heads do together than one by one, averaged over all subsets of the others (Banzhaf)."""

    heads: tuple[int, int]
    nats: float
    low: float
    high: float

    p_adjusted: float
    """Over prompts, adjusted for all pairs (Holm 1979)."""


def strongest_interaction(values: Float[np.ndarray, "subset trial"]) -> Interaction | None:
    """Of the pair whose interaction is surest; None for one prompt or one head."""
    n = len(values).bit_length() - 1
    if values.shape[1] < 2 or n < 2:
        return None
    first, second = np.triu_indices(n, 1)
    by_prompt = shapley.banzhaf_interactions(values)[first, second]
    (low, high), p = interval(by_prompt), adjust(p_differs(by_prompt), "holm")
    nats = by_prompt.mean(1)
    best = int(np.lexsort((-np.abs(nats), p > 1 - LEVEL))[0])
    heads = (int(first[best]), int(second[best]))
    return Interaction(heads, float(nats[best]), float(low[best]), float(high[best]), float(p[best]))


def _between(mean: Float[np.ndarray, " subset"], group: Int[np.ndarray, " subset"]) -> float:
    """Variance of the groups' means."""
    n = np.bincount(group)
    present = n > 0
    means = np.bincount(group, mean)[present] / n[present]
    return float((n[present] * (means - mean.mean()) ** 2).sum() / len(mean))


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
    complete = finished(run)
    counts = [int(word.partition(":")[2]) for word in settings.subsets if word.startswith("orders:")]
    if not counts or not complete.sizes["checkpoint"]:
        return None
    orders = np.array(draw_orders(max(counts), complete.sizes["head"]))
    row_of = {heads.tobytes(): row for row, heads in enumerate(complete.mask.values)}
    # A head has joined once its place in the order is below the number of heads that have.
    begun = np.argsort(orders, axis=1)[:, None, :] < np.arange(complete.sizes["head"] + 1)[None, :, None]
    rows = np.array([[row_of[heads.tobytes()] for heads in order] for order in begun])
    by_checkpoint = []
    for checkpoint in each_checkpoint(complete):
        values = effect(checkpoint, settings.direction).transpose("checkpoint", "layer", "subset", "trial").values[0]
        layers = [_of_orders(layer.astype(float)[rows], orders) for layer in values]
        by_checkpoint.append(xr.concat(layers, pd.Index(complete.layer.values, name="layer")))
    return xr.concat(by_checkpoint, pd.Index(complete.checkpoint.values, name="checkpoint"))


def _of_orders(worth: Float[np.ndarray, "order step trial"], orders: Int[np.ndarray, "order head"]) -> xr.Dataset:
    by_trial, _ = shapley.sampled_shapley(worth, orders)
    low, high = interval(by_trial)
    mean, error = shapley.sampled_shapley(worth.mean(-1), orders)
    variables = {"shapley": mean, "shapley_low": low, "shapley_high": high, "shapley_error": error}
    return xr.Dataset({name: ("head", values) for name, values in variables.items()})

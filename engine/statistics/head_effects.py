"""What each head does when it is patched alone, at every checkpoint: effect, interval, p-value, share.  Pure."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from ..measures.logit_diff import CLEAR_OF_ZERO, each_checkpoint, effect, finished
from ..study.patch_settings import PatchSettings
from .bootstrap import LEVEL
from .multiple_testing import Correction, adjust
from .onset import first_sustained
from .permutation import ROUNDING

COLUMNS = ("effect", "low", "high", "p", "p_adjusted", "share")
LEVELS = ("checkpoint", "layer", "head")


def head_effects(run: xr.Dataset, settings: PatchSettings, correction: Correction = "bh") -> pd.DataFrame:
    """One row for each finished checkpoint, layer and head that was patched alone; empty where none was.

    Columns: `effect`, the mean over distinct prompts of the patched minus the unpatched target run's logit difference,
    towards the source run (nats); `low` and `high`, Student's 95 % interval over prompts, and `p`, his t-test of no
    effect (Student 1908), NaN for one prompt; `p_adjusted` over all rows; `share` of the effect of the whole layer
    (`all`) at that checkpoint, NaN where that was not run or is not clear of zero.

    The t-test and not sign flips over prompts: n prompts have 2^n flips, so that their p is never below 2^(1 - n), and
    five prompts could show nothing.  Without an effect it rejects 5 % of normal values at any number of prompts; of
    lognormal ones, about their mean, up to 17 % at five and 13 % at fifteen, the effect being underestimated.

    Heads of several layers patched at once (`joint`) are no single heads, and give no row.
    """
    complete = finished(run)
    alone = np.flatnonzero(complete.mask.values.sum(1) == 1)
    if (settings.joint and len(settings.layers) > 1) or not len(alone) or not complete.sizes["checkpoint"]:
        return _empty()
    alone = alone[np.argsort(complete.mask.values[alone].argmax(1), kind="stable")]
    heads, labels = complete.mask.values[alone].argmax(1), complete.subset.values.tolist()
    by_checkpoint = []
    for checkpoint in each_checkpoint(complete):
        values = effect(checkpoint, settings.direction).transpose("checkpoint", "layer", "subset", "trial")
        nats = values.values[0].astype(float)
        frame = _of_checkpoint(nats[:, alone], nats[:, labels.index("all")] if "all" in labels else None)
        levels = ([str(checkpoint.checkpoint.values[0])], complete.layer.values.tolist(), heads.tolist())
        frame.index = pd.MultiIndex.from_product(levels, names=LEVELS)
        by_checkpoint.append(frame)
    frame = pd.concat(by_checkpoint)
    p = frame["p"].to_numpy()
    frame.insert(4, "p_adjusted", np.full(len(p), np.nan) if np.isnan(p).any() else adjust(p, correction))
    return frame


def _empty() -> pd.DataFrame:
    index = pd.MultiIndex.from_product([[], [], []], names=LEVELS)
    return pd.DataFrame({name: np.empty(0) for name in COLUMNS}, index=index)


def _of_checkpoint(
    alone: Float[np.ndarray, "layer head trial"], whole: Float[np.ndarray, "layer trial"] | None
) -> pd.DataFrame:
    low, high, p = t_test(alone)
    mean = alone.mean(-1)
    share = np.full(mean.shape, np.nan)
    if whole is not None:
        of_layer = np.where(_is_clear(whole), whole.mean(-1), np.nan)
        share = mean / of_layer[:, None]
    columns = {"effect": mean, "low": low, "high": high, "p": p, "share": share}
    return pd.DataFrame({name: values.ravel() for name, values in columns.items()})


def _is_clear(whole: Float[np.ndarray, "layer trial"]) -> Bool[np.ndarray, " layer"]:
    """Whether the effect of a whole layer is large enough to be shared out, and surely of its sign."""
    low, high, _ = t_test(whole)
    one_sign = np.isnan(low) | (low > 0) | (high < 0)
    return (np.abs(whole.mean(-1)) >= CLEAR_OF_ZERO) & one_sign


def t_test(
    values: Float[np.ndarray, "*cell trial"],
) -> tuple[Float[np.ndarray, "*cell"], Float[np.ndarray, "*cell"], Float[np.ndarray, "*cell"]]:
    """Student's interval of the mean over prompts, and two-sided p of his test against zero; NaN for one prompt.

    A standard error below that of float32 replay's rounding is taken to be as large: what all prompts share to the
    last digit would otherwise be certain, rounding included.
    """
    from scipy.special import stdtr, stdtrit  # start-up counts

    n = values.shape[-1]
    mean = values.mean(-1)
    if n < 2:
        return tuple(np.full(mean.shape, np.nan) for _ in range(3))
    error = np.maximum(values.std(-1, ddof=1), ROUNDING) / np.sqrt(n)
    reach = error * stdtrit(n - 1, (1 + LEVEL) / 2)
    return mean - reach, mean + reach, 2 * stdtr(n - 1, -np.abs(mean) / error)


@dataclass(frozen=True)
class LeadingHead:
    """A head and since when its effect is significant, as labels of checkpoints."""

    layer: int
    head: int

    after: str | None
    """The checkpoint before `by`; None where it is significant from the first on."""

    by: str | None
    """The first of two consecutive significant checkpoints (the last may stand alone); None where there are none."""


def leading_heads(effects: pd.DataFrame, checkpoint: str, n: int) -> list[LeadingHead]:
    """At most `n` heads with the largest effects at a checkpoint among those that are significant there.

    Significant is `p_adjusted` at most 5 %; before the checkpoint it counts only on the same side of zero.
    """
    there = effects.xs(checkpoint, level="checkpoint")
    significant = there[there["p_adjusted"] <= 1 - LEVEL]
    order = significant["effect"].abs().sort_values(ascending=False, kind="stable").index[:n]
    labels = [str(label) for label in effects.index.unique("checkpoint")]
    leading = []
    for layer, head in order:
        over_training = effects.xs((layer, head), level=("layer", "head"))
        side = np.sign(over_training["effect"].to_numpy()) == np.sign(there.loc[(layer, head), "effect"])
        first = int(first_sustained(side & (over_training["p_adjusted"].to_numpy() <= 1 - LEVEL)))
        leading.append(
            LeadingHead(
                int(layer),
                int(head),
                after=labels[first - 1] if 0 < first < len(labels) else None,
                by=labels[first] if first < len(labels) else None,
            )
        )
    return leading

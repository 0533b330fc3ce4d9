"""What each head does when it is patched alone, at every checkpoint: effect, interval, p-value, share.  Pure."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float

from ..measures.logit_diff import CLEAR_OF_ZERO, effects_by_checkpoint, finished
from ..study.patch_settings import PatchSettings
from ..study.reading import MARGIN, Correction
from .bootstrap import LEVEL
from .means import interval, p_differs, p_equivalent
from .multiple_testing import adjust
from .onset import first_sustained

COLUMNS = ("effect", "low", "high", "low_joint", "high_joint", "p", "p_adjusted", "p_equivalent", "share")
LEVELS = ("checkpoint", "layer", "head")


def head_effects(
    run: xr.Dataset, settings: PatchSettings, correction: Correction = "bh", margin: float = MARGIN
) -> pd.DataFrame:
    """One row for each finished checkpoint, layer and head that was patched alone; empty where none was.

    Columns: `effect`, the mean over distinct prompts of the patched minus the unpatched target run's logit difference,
    towards the source run (nats); `low` and `high`, its 95 % interval over prompts (`means.interval`), `low_joint` and
    `high_joint`, wide enough for those of all heads to cover together in 95 %, and `p` of no effect
    (`means.p_differs`), NaN for one prompt; `p_adjusted` over all rows; `p_equivalent` of an effect of `margin` nats or
    more (`means.p_equivalent`), adjusted as well; `share` of the effect of the whole layer (`all`) at that checkpoint,
    NaN where that was not run or is not clear of zero.

    Joint are the intervals of all heads of the last checkpoint, for which of them are read depends on their effects;
    those of an earlier checkpoint are joint with all heads of all checkpoints, for it is read where its effects choose
    it.

    Not sign flips over prompts: n prompts have 2^n flips, so that their p is never below 2^(1 - n), and five prompts
    could show nothing.

    Heads of several layers patched at once (`joint`) are no single heads, and give no row.
    """
    complete = finished(run)
    alone = np.flatnonzero(complete.mask.values.sum(1) == 1)
    if (settings.joint and len(settings.layers) > 1) or not len(alone) or not complete.sizes["checkpoint"]:
        return _empty()
    alone = alone[np.argsort(complete.mask.values[alone].argmax(1), kind="stable")]
    heads, labels = complete.mask.values[alone].argmax(1), complete.subset.values.tolist()
    whole = labels.index("all") if "all" in labels else None
    levels = (list(map(str, complete.checkpoint.values)), complete.layer.values.tolist(), heads.tolist())
    index = pd.MultiIndex.from_product(levels, names=LEVELS)
    read_together = [len(index)] * (len(levels[0]) - 1) + [len(index) // len(levels[0])]
    by_checkpoint = [
        _of_checkpoint(nats[:, alone], None if whole is None else nats[:, whole], margin, together)
        for nats, together in zip(effects_by_checkpoint(complete, settings.direction), read_together, strict=True)
    ]
    frame = pd.DataFrame({name: np.concatenate([c[name] for c in by_checkpoint]) for name in by_checkpoint[0]}, index)
    for name, of in (("p_adjusted", "p"), ("p_equivalent", "p_equivalent")):
        p = frame[of].to_numpy()
        frame[name] = np.full(len(p), np.nan) if np.isnan(p).any() else adjust(p, correction)
    return frame[list(COLUMNS)]


def _empty() -> pd.DataFrame:
    index = pd.MultiIndex.from_product([[], [], []], names=LEVELS)
    return pd.DataFrame({name: np.empty(0) for name in COLUMNS}, index=index)


def _of_checkpoint(
    alone: Float[np.ndarray, "layer head trial"],
    whole: Float[np.ndarray, "layer trial"] | None,
    margin: float,
    read_together: int,
) -> dict[str, Float[np.ndarray, " row"]]:
    """Columns of one checkpoint, as `head_effects` has them."""
    (low, high), (low_joint, high_joint) = interval(alone), interval(alone, read_together)
    mean = alone.mean(-1)
    share = np.full(mean.shape, np.nan)
    if whole is not None:
        of_layer = np.where(_is_clear(whole), whole.mean(-1), np.nan)
        share = mean / of_layer[:, None]
    p, equivalent = p_differs(alone), p_equivalent(alone, margin)
    columns = {
        "effect": mean, "low": low, "high": high, "low_joint": low_joint, "high_joint": high_joint,
        "p": p, "p_equivalent": equivalent, "share": share,
    }  # fmt: skip
    return {name: values.ravel() for name, values in columns.items()}


def _is_clear(whole: Float[np.ndarray, "layer trial"]) -> Bool[np.ndarray, " layer"]:
    """Whether the effect of a whole layer is large enough to be shared out, and surely of its sign."""
    low, high = interval(whole)
    one_sign = np.isnan(low) | (low > 0) | (high < 0)
    is_clear: Bool[np.ndarray, " layer"] = (np.abs(whole.mean(-1)) >= CLEAR_OF_ZERO) & one_sign
    return is_clear


@dataclass(frozen=True)
class HeadEffect:
    """One head among all at one checkpoint, as in the columns of `head_effects`, and since when it has an effect."""

    layer: int
    head: int
    effect: float

    low: float
    """Of the joint interval: who reads of the head with the largest effect reads of the largest of many."""

    high: float
    p_adjusted: float
    p_equivalent: float
    share: float

    after: str | None
    """The checkpoint before `by`; None where it is significant from the first on."""

    by: str | None
    """The first of two consecutive checkpoints (the last may stand alone) where its effect is significant and of the
    margin's size or more; None where there are none."""

    @property
    def is_significant(self) -> bool:
        return self.p_adjusted <= 1 - LEVEL

    @property
    def has_none(self) -> bool:
        """Whether its effect is shown to be smaller than the margin."""
        return self.p_equivalent <= 1 - LEVEL and not self.is_significant

    def __str__(self) -> str:
        return f"L{self.layer}.H{self.head}"


def rank_heads(effects: pd.DataFrame, checkpoint: str, margin: float = MARGIN) -> list[HeadEffect]:
    """The heads at a checkpoint: those whose effect is significant there before the others, the largest effects first.

    Significant is `p_adjusted` at most 5 %.  An effect starts where it is significant, on the side of zero where it is
    at `checkpoint`, and `margin` nats or more: a few thousandths that all prompts share are significant too.
    """
    labels = [str(label) for label in effects.index.unique("checkpoint")]
    n, at = len(labels), labels.index(checkpoint)
    by_head = effects.to_numpy().reshape(n, -1, len(COLUMNS))  # rows are a product, checkpoints outermost
    nats, adjusted = by_head[..., COLUMNS.index("effect")], by_head[..., COLUMNS.index("p_adjusted")]
    significant = adjusted <= 1 - LEVEL
    first = first_sustained(significant & (nats * np.sign(nats[at]) >= margin))
    heads = []
    for place in np.lexsort((-np.abs(nats[at]), ~significant[at])):
        _, layer, head = effects.index[place]
        values = dict(zip(COLUMNS, by_head[at, place].tolist(), strict=True))
        by = labels[first[place]] if first[place] < n else None
        after = labels[first[place] - 1] if 0 < first[place] < n else None
        heads.append(
            HeadEffect(
                int(layer), int(head), values["effect"], values["low_joint"], values["high_joint"],
                values["p_adjusted"], values["p_equivalent"], values["share"], after=after, by=by,
            )
        )  # fmt: skip
    return heads


def telling_checkpoint(effects: pd.DataFrame) -> str | None:
    """The last checkpoint where a head is significant there, else that of the largest effect that is significant at two
    consecutive checkpoints; None without any."""
    labels = [str(label) for label in effects.index.unique("checkpoint")]
    by_head = effects.to_numpy().reshape(len(labels), -1, len(COLUMNS))
    significant = by_head[..., COLUMNS.index("p_adjusted")] <= 1 - LEVEL
    if significant[-1].any():
        return labels[-1]
    pairs = significant[1:] & significant[:-1]
    lasting = np.zeros_like(significant)
    lasting[1:] |= pairs
    lasting[:-1] |= pairs
    if not lasting.any():
        return None
    size = np.where(lasting, np.abs(by_head[..., COLUMNS.index("effect")]), -1).max(1)
    return labels[int(size.argmax())]

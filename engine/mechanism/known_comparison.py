"""How well the heads that the literature names stand out in what was measured.  Arrays in, numbers out, no text."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from ..measures.logit_diff import finished
from ..measures.training import positions_of
from ..runtime.errors import UserError
from ..statistics.bootstrap import LEVEL
from ..statistics.multiple_testing import adjust
from ..study.known_heads import Check, KnownHeads, KnownOnset
from ..study.role_settings import SEED
from .role_summary import roles_frame

DRAWS = 9999
"""Random sets of heads that the known ones are compared with."""


@dataclass(frozen=True)
class ComparedHeads:
    """Where the known heads stand among all heads."""

    known: KnownHeads
    places: tuple[int, ...]
    """Of each of `known.heads`: 1 where it has the highest value, or the lowest where those are known; ties get the
    last place of them.  Empty where nothing was scored."""

    n_heads: int
    p: float
    """How likely as many heads drawn at random stand so far out, adjusted over the check; NaN where not scored."""

    @property
    def agrees(self) -> bool:
        return bool(self.p <= 1 - LEVEL)


@dataclass(frozen=True)
class ComparedOnset:
    """When the first head took the role on, beside when it should."""

    known: KnownOnset
    after: int | None
    by: int | None
    """Steps of the checkpoints between which it did; None where it was there at the first, or never came."""

    @property
    def agrees(self) -> bool:
        """Whether what was measured and what is known can be the same step."""
        return self.by is not None and (self.after or 0) < self.known.by and self.by > self.known.after


def compare(check: Check, run: xr.Dataset) -> tuple[list[ComparedHeads], list[ComparedOnset]]:
    """What was measured of the last checkpoint, and of all, against what is known.

    Raises `UserError` for a model that has not all the heads.
    """
    final = run.isel(checkpoint=-1)
    shape = int(final.layer.max()) + 1, final.sizes["head"]
    for known in check.heads:
        if any(layer >= shape[0] or head >= shape[1] for layer, head in known.heads):
            raise UserError(
                f"{check.model} has {shape[0]} layers of {shape[1]} heads, the literature's has more: another model "
                "is served under that name"
            )
    compared = [compare_heads(known, _values(final, known)) for known in check.heads]
    scored = [at for at, heads in enumerate(compared) if not np.isnan(heads.p)]
    if scored:
        adjusted = adjust(np.array([compared[at].p for at in scored]), "holm")
        for at, p in zip(scored, adjusted.tolist(), strict=True):
            compared[at] = ComparedHeads(compared[at].known, compared[at].places, compared[at].n_heads, p)
    frame = roles_frame(run) if check.onsets else pd.DataFrame()
    placed = finished(run)
    steps = dict(zip(map(str, placed.checkpoint.values), positions_of(placed).tolist(), strict=True))
    return compared, [compare_onset(known, frame, steps) for known in check.onsets]


def _values(final: xr.Dataset, known: KnownHeads) -> Float[np.ndarray, "layer head"]:
    values = abs(final.effect.mean("trial")) if known.by == "effect" else final.role_score.sel(role=known.by)
    measured: Float[np.ndarray, "layer head"] = values.transpose("layer", "head").values.astype(float)
    return -measured if known.lowest else measured


def compare_heads(known: KnownHeads, values: Float[np.ndarray, "layer head"]) -> ComparedHeads:
    """The sum of the known heads' ranks (Wilcoxon 1945), ties sharing the mean of theirs, against that of as many heads
    drawn at random: with few heads and ties the normal approximation says far too much."""
    from scipy.stats import rankdata  # start-up counts

    is_known = np.zeros(values.shape, dtype=bool)
    for head in known.heads:
        is_known[head] = True
    if np.isnan(values).any():
        return ComparedHeads(known, (), values.size, np.nan)
    places = tuple(int((values >= values[head]).sum()) for head in known.heads)
    ranks = rankdata(values)
    drawn = np.random.default_rng(SEED).random((DRAWS, values.size)).argpartition(len(known.heads) - 1, axis=1)
    as_far_out = int((ranks[drawn[:, : len(known.heads)]].sum(1) >= ranks[is_known.ravel()].sum()).sum())
    return ComparedHeads(known, places, values.size, (1 + as_far_out) / (1 + DRAWS))


def compare_onset(known: KnownOnset, frame: pd.DataFrame, steps: Mapping[str, int]) -> ComparedOnset:
    """The earliest onset of the role in any head, of `roles_frame`; `steps` are those of its labels."""
    labels = [str(label) for label in frame.index.unique("checkpoint")]
    of_role = frame.loc[labels[-1]].xs(known.role, level="role")
    taken = of_role[of_role["by"].notna()]
    if not len(taken):
        return ComparedOnset(known, None, None)
    first = min(labels.index(str(by)) for by in taken["by"])
    return ComparedOnset(known, steps[labels[first - 1]] if first else None, steps[labels[first]])

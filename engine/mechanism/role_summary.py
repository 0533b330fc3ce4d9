"""Which heads have a role, since when, and whether the heads that matter are those.  Arrays and frames, no text."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import xarray as xr

from ..measures.logit_diff import finished
from ..measures.training import positions_of
from ..statistics.bootstrap import LEVEL
from ..statistics.means import t_test
from ..statistics.multiple_testing import adjust
from ..statistics.onset import first_sustained, known_steps
from ..study.role_settings import MARGIN, ROLES, SEED, Role

RELABELLINGS = 999

MOST = 0.75
"""Share of the largest fall of a loss that makes a bump."""


def in_role(run: xr.Dataset) -> xr.DataArray:
    """Whether a head has a role at a checkpoint (checkpoint, layer, head, role): its score is at least `MARGIN` above
    its null, and p, adjusted over the checkpoint's heads, at most 5 %.  Never where either is missing."""
    licensed: xr.DataArray = (run.role_score - run.role_null >= MARGIN) & (run.role_p <= 1 - LEVEL + 1e-6)
    return licensed


def heads_in_role(run: xr.Dataset, role: Role, checkpoint: str | None = None) -> list[tuple[int, int]]:
    """(layer, head) of the heads that have the role at a checkpoint, the highest score first.

    `run` is a store's mechanism; without a checkpoint the last finished one.  Heads of several training runs are
    matched by role so, since their numbers mean nothing from one to another.  Raises `KeyError` for a checkpoint that
    is not finished.
    """
    complete = finished(run)
    at = complete.sel(checkpoint=checkpoint) if checkpoint is not None else complete.isel(checkpoint=-1)
    score = at.role_score.sel(role=role).transpose("layer", "head")
    licensed = in_role(at).sel(role=role).transpose("layer", "head").values
    places = [tuple(place) for place in np.argwhere(licensed)]
    ordered = sorted(places, key=lambda place: -float(score.values[place]))
    return [(int(score.layer[layer]), int(score["head"][head])) for layer, head in ordered]


def roles_frame(run: xr.Dataset) -> pd.DataFrame:
    """One row for each finished checkpoint, role, layer and head (the index).

    Columns: `score` and `null`, `p` (adjusted over the checkpoint's heads), `has_role`, and `after` and `by`: labels of
    the checkpoints between which the head takes the role on, for good as far as two consecutive checkpoints (the last
    may stand alone); `after` is missing where it has it from the first on, both where it never does.
    """
    complete = finished(run)
    licensed = in_role(complete)
    first = np.asarray(first_sustained(licensed.transpose("checkpoint", ...).values))
    labels = np.array([*map(str, complete.checkpoint.values), None], dtype=object)
    dims = [dim for dim in licensed.dims if dim != "checkpoint"]
    by = xr.DataArray(labels[first], dims=dims)
    after = xr.DataArray(np.where((first > 0) & (first < len(labels) - 1), labels[first - 1], None), dims=dims)
    columns = {
        "score": complete.role_score, "null": complete.role_null, "p": complete.role_p, "has_role": licensed,
        "after": after.broadcast_like(licensed), "by": by.broadcast_like(licensed),
    }  # fmt: skip
    plain = {name: values.drop_vars("role_problem", errors="ignore") for name, values in columns.items()}
    frame = xr.Dataset(plain).reset_coords(drop=True).to_dataframe(dim_order=["checkpoint", "role", "layer", "head"])
    return frame[list(columns)]


@dataclass(frozen=True)
class RoleShare:
    """How much of the single-head effects the heads of one role have at a checkpoint."""

    role: Role
    share: float
    """Of the summed sizes of all heads' mean effects, 0 to 1."""

    p: float
    """How often as many heads of the same layers, drawn at random, have as much or more, adjusted over the roles (Holm
    1979); NaN where all heads of those layers have the role, and there are no others to draw."""


def role_shares(run: xr.Dataset) -> list[RoleShare]:
    """Of every role that a head has at the one checkpoint of `run`, which holds `effect`.

    The null draws each layer's heads anew, as many as have the role there, so that a layer that matters as a whole
    proves nothing about its heads (permutation test: Fisher 1935).
    """
    size = abs(run.effect.mean("trial")).isel(checkpoint=0).transpose("layer", "head").values.astype(float)
    licensed = in_role(run).isel(checkpoint=0).transpose("role", "layer", "head").values
    rng = np.random.default_rng(SEED)
    order = rng.permuted(np.broadcast_to(np.arange(size.shape[1]), (RELABELLINGS, *size.shape)), axis=2)
    relabelled = np.take_along_axis(np.broadcast_to(size, order.shape), order, axis=2)
    shares = []
    for role, has in zip(ROLES, licensed, strict=True):
        if has.any() and size.sum() > 0:
            borne, drawn = size[has].sum(), relabelled[:, has].sum(1)
            p = (1 + int((drawn >= borne - 1e-9).sum())) / (1 + RELABELLINGS)
            p = np.nan if (has.all(1) == has.any(1)).all() else p
            shares.append(RoleShare(role, float(borne / size.sum()), p))
    tested = [share.p for share in shares if not np.isnan(share.p)]
    adjusted = iter(adjust(np.array(tested), "holm").tolist() if tested else [])
    return [replace(share, p=share.p if np.isnan(share.p) else next(adjusted)) for share in shares]


@dataclass(frozen=True)
class CausalHead:
    """A head whose patch matters, and its roles."""

    layer: int
    head: int
    effect: float
    """Mean over prompts, in nats."""

    roles: tuple[Role, ...]


def causal_heads(run: xr.Dataset) -> list[CausalHead]:
    """The heads whose exact effect is significant at the one checkpoint of `run` (t-test over prompts, adjusted over
    heads: Benjamini and Hochberg 1995), the largest first; none for one prompt."""
    at = run.isel(checkpoint=0)
    effect = at.effect.transpose("layer", "head", "trial").values.astype(float)
    _, _, p = t_test(effect)
    if np.isnan(p).any():
        return []
    significant = adjust(p.ravel()).reshape(p.shape) <= 1 - LEVEL
    licensed = in_role(at).transpose("layer", "head", "role").values
    mean = effect.mean(-1)
    heads = [
        CausalHead(
            int(at.layer[layer]), int(at["head"][head]), float(mean[layer, head]),
            tuple(role for role, has in zip(ROLES, licensed[layer, head], strict=True) if has),
        )
        for layer, head in np.argwhere(significant)
    ]  # fmt: skip
    return sorted(heads, key=lambda head: -abs(head.effect))


@dataclass(frozen=True)
class LossBump:
    """The stretch of training over which the loss on repeated tokens falls most."""

    after: str
    by: str
    fall: float
    """Of the mean loss on repeated tokens between the two checkpoints, in nats."""


def loss_bump(run: xr.Dataset) -> LossBump | None:
    """Between which two checkpoints the model learns to use a repetition: the shortest stretch, in steps, over which
    the loss on repeated random tokens falls by at least `MOST` of its largest fall.

    Induction heads form over such a stretch, the bump in the loss curve of Olsson et al. 2022 (arXiv:2209.11895).  None
    where it falls by no more than sequences differ (paired t-test, adjusted over all stretches: Bonferroni), nor where
    steps are unknown.
    """
    complete = known_steps(run)
    loss = complete.loss_second.transpose("checkpoint", "sequence").values.astype(float)
    if len(loss) < 2 or np.isnan(loss).any():
        return None
    fall = loss.mean(1)[:, None] - loss.mean(1)
    steps, first, last = positions_of(complete), *np.triu_indices(len(loss), 1)
    if fall[first, last].max() <= 0:
        return None
    long_enough = fall[first, last] >= MOST * fall[first, last].max()
    n_stretches, first, last = len(first), first[long_enough], last[long_enough]
    at = np.lexsort((-fall[first, last], steps[last] - steps[first]))[0]
    after, by = int(first[at]), int(last[at])
    _, _, p = t_test((loss[after] - loss[by])[None])
    if n_stretches * p[0] > 1 - LEVEL:
        return None
    labels = complete.checkpoint.values
    return LossBump(str(labels[after]), str(labels[by]), float(fall[after, by]))

"""Rates that know their baseline: a repair counts only where there was a fault, a break only where there was none.

A fault is a prompt that the target run fails.  Pure.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from ..measures.logit_diff import CLEAR_OF_ZERO, NAMED, best_layer, finished, recovered, success
from ..report.findings.finding import Finding
from ..study.patch_settings import PatchSettings
from .bootstrap import LEVEL, interval

LISTED = 5
"""Checkpoints, at most, that are listed by name."""


LEADING = {"denoise": ("repaired", "repair_rate", "broken"), "noise": ("broken", "break_rate", "repaired")}
"""What a direction is about, its rate, and what is only counted."""


@functools.cache
def share(count: int, n: int) -> tuple[float, float, float]:
    """Share, and Wilson's interval (Wilson 1927; Brown, Cai and DasGupta 2001 for few observations); NaN of none."""
    if n == 0:
        return math.nan, math.nan, math.nan
    from scipy.stats import binomtest  # start-up counts

    found = binomtest(count, n).proportion_ci(LEVEL, method="wilson")
    return count / n, float(found.low), float(found.high)


def rates(run: xr.Dataset, direction: str) -> pd.DataFrame:
    """Even, odd and all heads (where run) at every checkpoint and layer, against the unpatched target run.

    Columns: `n` (distinct prompts), `faults` (of them the target run fails), `repaired` (faults that the patched run
    answers rightly), `broken` (other prompts that it answers wrongly); `repair_rate` of the faults and `break_rate` of
    the others, each with `_low` and `_high`; `recovered`, the mean share of the gap to the source run that is closed
    (Wang et al. 2022, arXiv:2211.00593), `_low` and `_high`, over the `n_clear` prompts whose gap is clear of zero.
    """
    done = finished(run)
    named = [name for name in NAMED if name in done.subset.values]
    patched = done.logit_diff.sel(subset=named).transpose("checkpoint", "layer", "subset", "trial")
    source, target = done.clean_logit_diff, done.corrupt_logit_diff
    if direction == "noise":
        source, target = target, source
    right, was_right = success(patched) == 1, success(target) == 1
    counts = {
        "n": xr.full_like(patched.isel(trial=0, drop=True), done.sizes["trial"], dtype=int),
        "faults": (~was_right).sum("trial"),
        "repaired": (right & ~was_right).sum("trial"),
        "broken": (~right & was_right).sum("trial"),
    }
    columns = {name: values.values.ravel() for name, values in zip(counts, xr.broadcast(*counts.values()), strict=True)}
    for name, count, of in (
        ("repair_rate", "repaired", columns["faults"]),
        ("break_rate", "broken", columns["n"] - columns["faults"]),
    ):
        found = [share(int(k), int(n)) for k, n in zip(columns[count], of, strict=True)]
        columns |= dict(zip(_with_interval(name), np.array(found).reshape(-1, 3).T, strict=True))
    recovery = recovered(patched, source, target).transpose(*patched.dims).values.astype(float)
    columns |= dict(zip(_with_interval("recovered"), (x.ravel() for x in _mean_and_interval(recovery)), strict=True))
    columns["n_clear"] = (~np.isnan(recovery)).sum(-1).ravel()
    levels = (done.checkpoint.values, done.layer.values, named)
    return pd.DataFrame(columns, index=pd.MultiIndex.from_product(levels, names=["checkpoint", "layer", "subset"]))


def _with_interval(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def _mean_and_interval(
    values: Float[np.ndarray, "checkpoint layer subset trial"],
) -> tuple[Float[np.ndarray, "checkpoint layer subset"], ...]:
    """Mean over the prompts that are not NaN, and its interval; a checkpoint's cells share those prompts."""
    found = tuple(np.full(values.shape[:-1], np.nan) for _ in range(3))
    clear = ~np.isnan(values).any((1, 2))
    for pattern in np.unique(clear, axis=0):
        if pattern.any():
            alike = (clear == pattern).all(1)
            kept = values[alike][..., pattern]
            for into, part in zip(found, (kept.mean(-1), *interval(kept)), strict=True):
                into[alike] = part
    return found


def rates_finding(run: xr.Dataset, settings: PatchSettings) -> Finding:
    """Per checkpoint the best layer's rates, and how to read them."""
    direction = settings.direction
    frame = rates(run, direction)
    best = best_layer(finished(run), direction)
    named = list(dict.fromkeys(frame.index.get_level_values("subset")))
    cells = dict(iter(frame.groupby(["checkpoint", "layer"], sort=False)))
    rows = [
        _row(cells[checkpoint, layer], direction, named)
        for checkpoint, layer in zip(best.checkpoint.values, best.values, strict=True)
    ]
    table = pd.DataFrame(
        [list(row.values()) for row in rows], best.checkpoint.values, pd.MultiIndex.from_tuples(list(rows[0]))
    )
    if not settings.joint:
        table.insert(0, ("", "layer"), best.values.astype(int).astype(str))
    notes = (*_vacuous(frame, direction), _legend(frame, direction, named))
    return Finding("What is repaired, and what is broken", table, notes, "rates", frame)


def _row(cells: pd.DataFrame, direction: str, named: Sequence[str]) -> dict[tuple[str, str], str]:
    """One checkpoint's line, by column."""
    leading, rate, other = LEADING[direction]
    n, faults = cells[["n", "faults"]].iloc[0]
    counts = " ".join(f"{count:.0f}" for count in cells[other])
    return {
        ("", "faults"): f"{faults:.0f} of {n:.0f}",
        **{(leading, name): told for name, told in zip(named, _told(cells, rate), strict=True)},
        ("", other): f"{counts} of {n - faults if direction == 'denoise' else faults:.0f}",
        **{("recovered", name): told for name, told in zip(named, _told(cells, "recovered"), strict=True)},
    }


def _told(cells: pd.DataFrame, name: str) -> list[str]:
    """Subset by subset `67% 42..85`, the mean alone where there is no interval, `-` where there is none either."""
    shares = 100 * cells[list(_with_interval(name))].to_numpy()
    return [
        "-" if np.isnan(mean) else f"{mean:.0f}%" if np.isnan(low) else f"{mean:.0f}% {low:.0f}..{high:.0f}"
        for mean, low, high in shares
    ]


def _vacuous(frame: pd.DataFrame, direction: str) -> list[str]:
    """A line where there was nothing to repair, or nothing to break."""
    by_checkpoint = frame.groupby("checkpoint", sort=False).first()
    nothing = by_checkpoint["faults"] == (0 if direction == "denoise" else by_checkpoint["n"])
    labels = [str(label) for label in by_checkpoint.index[nothing]]
    if not labels:
        return []
    more = f" and {len(labels) - LISTED} more" if len(labels) > LISTED else ""
    what = "fault to repair" if direction == "denoise" else "success to break"
    return [f"no {what}: {', '.join(labels[:LISTED])}{more}"]


def _legend(frame: pd.DataFrame, direction: str, named: Sequence[str]) -> str:
    target, source = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    n, fewest, most = frame["n"].iloc[0], frame["n_clear"].min(), frame["n_clear"].max()
    clear = f"{most} of {n}" if fewest == most else f"{fewest} to {most} of {n}"
    leading, _, other = LEADING[direction]
    meant = {"repaired": "faults that the patch mends", "broken": "other prompts that it breaks"}
    return (
        f"faults: of {n} distinct prompts those that the {target} run fails; {leading}: share of the {meant[leading]}, "
        f"{LEVEL:.0%} Wilson interval; {other}: number of {meant[other]} ({', '.join(named)}); recovered: mean share "
        f"of the gap to the {source} run, bootstrap interval, over prompts where it is at least {CLEAR_OF_ZERO} nats "
        f"({clear})"
    )

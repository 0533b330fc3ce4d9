"""Prompts restored and broken, as a table: counts and rates against the unpatched run."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from ...measures.logit_diff import CLEAR_OF_ZERO, best_layer, finished
from ...statistics.bootstrap import LEVEL
from ...statistics.rates import rates, with_interval
from ...study.patch_settings import PatchSettings
from .finding import Finding

LISTED = 5
"""Checkpoints that are listed by name; of more only the number is given."""

LEADING = {"denoise": ("restored", "restore_rate", "broken"), "noise": ("broken", "break_rate", "restored")}
"""What a direction is about, its rate, and what is only counted."""


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
    return Finding("Prompts restored and broken", table, notes, "rates", frame)


def _row(cells: pd.DataFrame, direction: str, named: Sequence[str]) -> dict[tuple[str, str], str]:
    """One checkpoint's line, by column."""
    leading, rate, other = LEADING[direction]
    n, failing = cells[["n", "failing"]].iloc[0]
    counts = " ".join(f"{count:.0f}" for count in cells[other])
    return {
        ("", "failing"): f"{failing:.0f} of {n:.0f}",
        **{(leading, name): cell for name, cell in zip(named, _cells(cells, rate), strict=True)},
        ("", other): f"{counts} of {n - failing if direction == 'denoise' else failing:.0f}",
        **{("recovery", name): cell for name, cell in zip(named, _cells(cells, "recovery"), strict=True)},
    }


def _cells(cells: pd.DataFrame, name: str) -> list[str]:
    """Subset by subset `67% 42..85`, the mean alone where there is no interval, `-` where there is none either."""
    shares = 100 * cells[list(with_interval(name))].to_numpy()
    return [
        "-" if np.isnan(mean) else f"{mean:.0f}%" if np.isnan(low) else f"{mean:.0f}% {low:.0f}..{high:.0f}"
        for mean, low, high in shares
    ]


def _vacuous(frame: pd.DataFrame, direction: str) -> list[str]:
    """A line where there was nothing to restore, or nothing to break."""
    by_checkpoint = frame.groupby("checkpoint", sort=False).first()
    nothing = by_checkpoint["failing"] == (0 if direction == "denoise" else by_checkpoint["n"])
    labels = [str(label) for label in by_checkpoint.index[nothing]]
    if not labels:
        return []
    more = f" and {len(labels) - LISTED} more" if len(labels) > LISTED else ""
    what = "prompt fails" if direction == "denoise" else "prompt succeeds"
    return [f"no {what} unpatched: {', '.join(labels[:LISTED])}{more}"]


def _legend(frame: pd.DataFrame, direction: str, named: Sequence[str]) -> str:
    target, source = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    n, fewest, most = frame["n"].iloc[0], frame["n_clear"].min(), frame["n_clear"].max()
    clear = f"{most} of {n}" if fewest == most else f"{fewest} to {most} of {n}"
    leading, _, other = LEADING[direction]
    meant = {"restored": "failing prompts that the patch restores", "broken": "other prompts that it breaks"}
    return (
        f"failing: of {n} distinct prompts those that the {target} run fails; {leading}: share of the "
        f"{meant[leading]}, {LEVEL:.0%} Wilson interval; {other}: number of {meant[other]} ({', '.join(named)}); "
        f"recovery: mean normalised recovery of the logit-difference gap to the {source} run, interval, "
        f"over prompts where it is at least {CLEAR_OF_ZERO} nats ({clear})"
    )

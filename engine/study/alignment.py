"""Which positions of the two runs are patched, and which position of the one corresponds to which of the other."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int

from ..runtime.errors import UserError
from .prompts import Trials
from .study import RUNS

COLUMNS, BLOCKS = 12, 3
"""An error shows token rows in blocks of so many columns, and so many blocks at most."""


@dataclass(frozen=True)
class Alignment:
    """The patched positions of both runs, pair by pair."""

    spec: str
    """As in `--positions`."""

    positions: Int[np.ndarray, "run trial patched"]
    """Ascending; where `valid` is False they point at padding."""

    valid: Bool[np.ndarray, "trial patched"]

    read: Int[np.ndarray, " trial"]
    """Index along `patched` of the last real token, whose logits are compared."""

    def only(self, chosen: Sequence[int]) -> "Alignment":
        """That of the trials at the indices `chosen`."""
        return replace(self, positions=self.positions[:, chosen], valid=self.valid[chosen], read=self.read[chosen])


def patched_positions(spec: str) -> int | None:
    """How many positions, counted from the end, a word of `--positions` names; None for all of them.

    Raises `UserError` for a word that names none.
    """
    if spec == "all":
        return None
    number = re.fullmatch("end:([0-9]{1,9})", "end:1" if spec == "last" else spec)
    k = int(number[1]) if number else 0
    if k < 1:
        raise UserError(f"--positions {spec}: not a choice; write last, end:K (the last K, at least 1) or all")
    return k


def align(trials: Trials, spec: str) -> Alignment:
    """Positions to patch: `last`, `end:K` (the last K, aligned from the end) or `all` (position p to position p).

    Raises `UserError` for any other `spec`, and, showing both token rows, where prompts are too short (`end:K`) or the
    clean and the corrupt one differ in length (`all`).
    """
    k = patched_positions(spec)
    if k is None:
        return _align_all(trials)
    trial = int(trials.length.min(axis=0).argmin())
    shortest = int(trials.length[:, trial].min())
    if shortest < k:
        problem = f"{trials.contrasts[trial].source} has only {shortest} tokens; take end:{shortest} or fewer"
        raise UserError(f"--positions {spec}: {problem}", _token_rows(trials, trial, from_end=True))
    return Alignment(
        spec=spec,
        positions=trials.length[..., None] - k + np.arange(k),
        valid=np.ones((trials.n_trials, k), dtype=bool),
        read=np.full(trials.n_trials, k - 1),
    )


def _align_all(trials: Trials) -> Alignment:
    clean, corrupt = trials.length
    if (clean != corrupt).any():
        trial = int((clean != corrupt).argmax())
        lengths = f"{trials.contrasts[trial].source} has {clean[trial]} and {corrupt[trial]} tokens"
        raise UserError(
            f"--positions all: clean and corrupt must be equally long; {lengths}; take last or end:K, or write prompts "
            "of equal length",
            _token_rows(trials, trial, from_end=False),
        )
    position = np.arange(clean.max())
    return Alignment(
        spec="all",
        # A copy: a broadcast view would give every run and trial the same memory.
        positions=np.broadcast_to(position, (len(RUNS), trials.n_trials, len(position))).copy(),
        valid=position < clean[:, None],
        read=clean - 1,
    )


def _token_rows(trials: Trials, trial: int, from_end: bool) -> str:
    """Both token rows in columns under their positions, which `from_end` counts back from -1."""
    longest = int(trials.length[:, trial].max())
    rows = [[str(p - longest if from_end else p) for p in range(longest)]]
    for text, n in zip(trials.token_text[:, trial], trials.length[:, trial], strict=True):
        cells, gap = [repr(str(piece)) for piece in text[:n]], [""] * (longest - n)
        rows.append(gap + cells if from_end else cells + gap)
    columns = list(zip(*rows, strict=True))
    shown = columns[-COLUMNS * BLOCKS :] if from_end else columns[: COLUMNS * BLOCKS]
    lines = [] if shown == columns else [f"({len(columns) - len(shown)} positions not shown)"]
    for first in range(0, len(shown), COLUMNS):
        block = [("position", *RUNS), *shown[first : first + COLUMNS]]
        widths = [max(map(len, column)) for column in block]
        for row in zip(*block, strict=True):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join(lines)

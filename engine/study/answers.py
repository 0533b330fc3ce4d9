"""Answers of more than one token: prompts with an answer appended, to be scored token by token (teacher forcing).

An answer's tokens are further rows of a replay behind the patched positions.  They attend to the prompt as it was
patched and to each other; they are not patched themselves.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Int

from ..runtime.errors import UserError
from .alignment import Alignment
from .prompts import Trials


def answer(trials: Trials, which: int) -> Int[np.ndarray, "trial token"]:
    """The right (0) or the wrong (1) answer of every trial from the branching token on, padded with -1."""
    assert trials.continuation is not None, "asked for before anything is computed"
    tokens = trials.continuation[:, which]
    return tokens[:, : int((tokens >= 0).sum(axis=1).max())]


def continued(trials: Trials, which: int, context: int) -> Trials:
    """The trials with all of an answer but its last token appended to either prompt, as tokens without their text.

    Raises `UserError` where the model takes no rows of that length (`context`, tokens).
    """
    tokens = answer(trials, which)
    further = (tokens >= 0).sum(axis=1) - 1
    length = trials.length + further
    if length.max() > context:
        raise UserError(
            f"--measures sequence: prompt and answer take {length.max()} tokens, the model's context is {context}; "
            "leave sequence out"
        )
    behind = ((0, 0), (0, 0), (0, max(0, int(length.max()) - trials.tokens.shape[2])))
    rows, text = np.pad(trials.tokens, behind), np.pad(trials.token_text, behind)
    for run, trial in np.ndindex(*length.shape):
        rows[run, trial, trials.length[run, trial] : length[run, trial]] = tokens[trial, : further[trial]]
    return replace(trials, tokens=rows, length=length, token_text=text)


def lengthened(alignment: Alignment, further: int, n_positions: int) -> Alignment:
    """As many positions more behind the aligned ones, which are not patched; none past `n_positions`."""
    if not further:
        return alignment
    n_patched = alignment.valid.shape[1] + further
    positions = np.minimum(alignment.positions[..., :1] + np.arange(n_patched), n_positions - 1)
    valid: Bool[np.ndarray, "trial patched"] = np.pad(alignment.valid, ((0, 0), (0, further)))
    return replace(alignment, positions=positions, valid=valid)

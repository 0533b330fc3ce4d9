"""Answers of more than one token: prompts with an answer appended, to be scored token by token (teacher forcing).

The appended tokens are further rows of a replay behind the patched positions.  They attend to the patched prompt and to
each other; they are not patched themselves.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Int

from ..runtime.errors import UserError
from .alignment import Alignment
from .prompts import Trials


def answer(trials: Trials, which: int) -> Int[np.ndarray, "trial token"]:
    """The right (0) or wrong (1) answer of every trial from the first differing token on, padded with -1."""
    assert trials.continuation is not None, "refused before anything is computed"
    tokens = trials.continuation[:, which]
    return tokens[:, : int((tokens >= 0).sum(axis=1).max())]


def continued(trials: Trials, which: int, context: int) -> Trials:
    """The trials with all of an answer but its last token appended to either prompt.

    The last token is predicted but never run.  The appended tokens have no `token_text`.
    Raises `UserError` where rows would be longer than `context` tokens.
    """
    tokens = answer(trials, which)
    n_further = (tokens >= 0).sum(axis=1) - 1
    length = trials.length + n_further
    if length.max() > context:
        raise UserError(
            f"--measures sequence: prompt and answer take {length.max()} tokens, the model's context is {context}; "
            "leave sequence out"
        )
    padding = ((0, 0), (0, 0), (0, max(0, int(length.max()) - trials.tokens.shape[2])))
    rows, text = np.pad(trials.tokens, padding), np.pad(trials.token_text, padding)
    for run, trial in np.ndindex(*length.shape):
        rows[run, trial, trials.length[run, trial] : length[run, trial]] = tokens[trial, : n_further[trial]]
    return replace(trials, tokens=rows, length=length, token_text=text)


def lengthened(alignment: Alignment, n_further: int, n_positions: int) -> Alignment:
    """The alignment with `n_further` unpatched positions behind the patched ones, none past `n_positions`."""
    if not n_further:
        return alignment
    n_patched = alignment.valid.shape[1] + n_further
    positions = np.minimum(alignment.positions[..., :1] + np.arange(n_patched), n_positions - 1)
    valid: Bool[np.ndarray, "trial patched"] = np.pad(alignment.valid, ((0, 0), (0, n_further)))
    return replace(alignment, positions=positions, valid=valid)

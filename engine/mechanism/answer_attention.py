"""Where the answers stand in the prompts, and how much heads attend to them from the read position."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from ..study.prompts import Trials
from ..study.study import RUNS

CLEAN, CORRUPT = RUNS.index("clean"), RUNS.index("corrupt")


@dataclass(frozen=True)
class Mentions:
    """Positions at which a prompt holds its answers before the read position; -1 for none."""

    answer: Int[np.ndarray, "run trial"]
    """The first mention of the right answer's token; in the IOI task's clean prompts the indirect object (IO)."""

    wrong: Int[np.ndarray, " trial"]
    """The clean prompt's first mention of the wrong answer's token; in the IOI task the subject's first one (S1)."""

    again: Int[np.ndarray, " trial"]
    """Its last one (S2); -1 where it is mentioned once."""

    @classmethod
    def of(cls, trials: Trials) -> "Mentions":
        n_positions = trials.tokens.shape[2]
        before_read = np.arange(n_positions) < trials.length[..., None] - 1
        right, wrong = trials.answer_tokens.T
        is_answer = (trials.tokens == right[:, None]) & before_read
        is_wrong = (trials.tokens[CLEAN] == wrong[:, None]) & before_read[CLEAN]
        last = n_positions - 1 - is_wrong[:, ::-1].argmax(-1)
        return cls(_first(is_answer), _first(is_wrong), np.where(is_wrong.sum(-1) > 1, last, -1))

    @property
    def has_answer(self) -> Bool[np.ndarray, " trial"]:
        """Trials whose clean prompt mentions both answers."""
        both: Bool[np.ndarray, " trial"] = (self.answer[CLEAN] >= 0) & (self.wrong >= 0)
        return both

    @property
    def has_duplicate(self) -> Bool[np.ndarray, " trial"]:
        """Of these, the trials that mention the wrong one twice."""
        twice: Bool[np.ndarray, " trial"] = self.has_answer & (self.again >= 0)
        return twice


def _first(marked: Bool[np.ndarray, "*trial position"]) -> Int[np.ndarray, "*trial"]:
    return np.where(marked.any(-1), marked.argmax(-1), -1)


Pattern = Float[np.ndarray, "run trial head position"]
"""Attention weights from the read position, both runs."""


def to_answer(
    pattern: Pattern, mentions: Mentions, length: Int[np.ndarray, "run trial"]
) -> tuple[Float[np.ndarray, "some_trial head"], Float[np.ndarray, "some_trial head"]]:
    """Attention of each head on the answer's mention in the clean run, and what it would be anyway: that on the same
    token in the corrupt run, where it is not the answer, or of even attention where it is not mentioned there.

    Of trials that mention both answers.
    """
    some = mentions.has_answer
    clean = _at(pattern[CLEAN][some], mentions.answer[CLEAN][some])
    corrupt = _at(pattern[CORRUPT][some], mentions.answer[CORRUPT][some])
    absent = mentions.answer[CORRUPT][some] < 0
    return clean, np.where(absent[:, None], 1 / length[CORRUPT][some, None], corrupt)


def to_second_mention(
    pattern: Pattern, mentions: Mentions, length: Int[np.ndarray, "run trial"]
) -> tuple[Float[np.ndarray, "some_trial head"], Float[np.ndarray, "some_trial head"]]:
    """Attention of each head, in the clean run, on the second mention of the wrong answer; and the largest of that on
    its first, on the right answer, and of even attention.

    Of trials that mention the wrong answer twice.
    """
    some = mentions.has_duplicate
    clean = pattern[CLEAN][some]
    second, first, answer = (_at(clean, at[some]) for at in (mentions.again, mentions.wrong, mentions.answer[CLEAN]))
    even = np.broadcast_to(1 / length[CLEAN][some, None], second.shape)
    return second, np.maximum.reduce([first, answer, even])


def _at(
    pattern: Float[np.ndarray, "trial head position"], at: Int[np.ndarray, " trial"]
) -> Float[np.ndarray, "trial head"]:
    return pattern[np.arange(len(at)), :, at]

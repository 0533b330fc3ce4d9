"""How the numbers of a patched run are read.  Nothing of it changes what is patched."""

from dataclasses import dataclass
from typing import Literal

from ..runtime.errors import UserError

Correction = Literal["bh", "holm"]

MARGIN = 0.5
"""Nats: an effect that is surely smaller is called none."""


@dataclass(frozen=True)
class Reading:
    """What is read from a patched run, and with which error rates."""

    correction: Correction = "bh"
    """Of p-values over layers, heads and checkpoints."""

    margin: float = MARGIN
    """Nats below which an effect counts as none, in tests of equivalence."""

    select_on: tuple[str, ...] = ()
    """Prompts, by number, on which the verdict chooses what it names."""

    test_on: tuple[str, ...] = ()
    """Prompts on which it is estimated and tested."""

    def prompts(self, n_prompts: int) -> tuple[list[int], list[int]] | None:
        """Numbers of the prompts to select on and to test on; of one that is not named, all the others.  None where
        neither is.

        Raises `UserError` where they overlap, name what is not there, or leave none.
        """
        if not self.select_on and not self.test_on:
            return None
        from .subsets import parse_layers  # imports numpy, which options are declared without

        every = range(n_prompts)
        select, test = (
            parse_layers(words, every, flag, "prompt") if words else None
            for words, flag in ((self.select_on, "--select-on"), (self.test_on, "--test-on"))
        )
        select = [prompt for prompt in every if prompt not in (test or ())] if select is None else select
        test = [prompt for prompt in every if prompt not in select] if test is None else test
        if both := sorted(set(select) & set(test)):
            raise UserError(f"--select-on and --test-on share prompt {both[0]}; what is tested must not have chosen")
        if not select or not test:
            raise UserError("--select-on and --test-on leave no prompt to the other; name fewer, e.g. --select-on 0-6")
        return select, test


READING = Reading()
"""How numbers are read where nothing else is said."""

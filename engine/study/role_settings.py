"""What heads are known to do: the names of roles, and what they are looked for with.  Imports no torch and no zarr."""

from typing import Literal, get_args

Role = Literal["previous token", "duplicate token", "induction", "successor", "copying", "name mover", "S-inhibition"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Labels of the axis `role`; what each is, docs/statistics.md and `mechanism.roles` say."""

MARGIN = 0.3
"""A head has a role where its score is above its null by at least so much, and by more than chance."""

N_SEQUENCES, N_TOKENS, FEWEST_TOKENS = 10, 25, 4
"""Sequences of random tokens, tokens in each before they are repeated (as Olsson et al. 2022), and the fewest in models
with a short context or few tokens."""

SEED = 0
"""Of the random tokens and of all shuffles."""

SHUFFLES = 19
"""Shuffles of labels: the most extreme of 20 is the least that 5 % can tell."""

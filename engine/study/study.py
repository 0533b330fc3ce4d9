"""One study, validated before anything is loaded, and the words that its fields are made of."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from ..runtime.errors import UserError
from ..runtime.format import format_whole

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

Arithmetic = Literal["float32", "float16", "bfloat16", "tf32"]
ARITHMETICS: tuple[Arithmetic, ...] = get_args(Arithmetic)
"""What can be computed in; `tf32` is float32 whose matrix products round to ten bits, on CUDA devices."""

ROUNDING: dict[Arithmetic, float] = {"float32": 2**-23, "tf32": 2**-10, "float16": 2**-10, "bfloat16": 2**-7}
"""Machine epsilon."""

TOLERANCE = 1e-4
"""Largest difference of a float32 logit difference between replay and a full hooked forward, in nats."""

Measure = Literal["probability", "rank", "kl", "sequence"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""What can be stored of a patched run beside its logit difference; `engine/measures` defines them."""

MOST_TRIALS = 100_000
"""More prompt pairs of one task are refused: intervals are far below any effect long before."""

RUNS = ("clean", "corrupt")
"""Order of every `run` axis."""


def tolerance(*dtypes: Arithmetic) -> float:
    """Largest difference allowed where the coarsest of `dtypes` rounds, in nats.

    `TOLERANCE` scaled by machine epsilon: as many rounding errors as are allowed in float32.
    """
    return TOLERANCE * max(ROUNDING[dtype] for dtype in dtypes) / ROUNDING["float32"]


@dataclass(frozen=True)
class Study:
    """One question, asked of every checkpoint with the same prompts."""

    model: str = "demo"
    """`demo`, a hub id, a directory, or a template of one of these for every checkpoint."""

    task: str = "decimal"
    """A built-in task or the path of a JSON Lines file."""

    trials: int | None = None
    """Prompt pairs to draw; None is the task's own number."""

    sites: tuple[str, ...] = ("all",)
    """What is stored of every checkpoint: `all`, the layers to be patched (`6`, `4-8`), or `z` alone."""

    dtype: Dtype = "float32"
    """Arithmetic of capture, and the stored precision."""

    revision: str | None = None
    """Of the hub repository, or a template of such; None for whatever suits the model."""

    subfolder: str | None = None
    """Where a checkpoint's files are in its repository or directory, or a template of that."""

    tokenizer: str | None = None
    """A hub id or a directory; None where each checkpoint brings its own."""

    def __post_init__(self) -> None:
        if self.trials is not None and not 1 <= self.trials <= MOST_TRIALS:
            least = "at least one trial is needed" if self.trials < 1 else f"take at most {MOST_TRIALS:,}"
            raise UserError(f"--trials {format_whole(self.trials)}: {least}")
        if self.sites != ("z",) and not all(re.fullmatch("all|[0-9]{1,9}(-[0-9]{1,9})?", word) for word in self.sites):
            raise UserError(f"--sites {' '.join(self.sites)}: write all, layers such as 6 or 4-8, or z alone")

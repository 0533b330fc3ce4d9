"""How far rounding moves the logit differences of a model in a coarse dtype: measured, not guessed from the dtype."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Float

from ..checkpoints.model import ResidentModel
from ..checkpoints.weights import TORCH_DTYPES
from ..runtime.resources import allow_tf32
from ..study.alignment import Alignment
from ..study.patch_settings import Direction
from ..study.prompts import Trials
from ..study.study import ROUNDING, TOLERANCE, Arithmetic
from .patch_inputs import Site
from .reference import hooked_logit_diff

MULTIPLE = 8
"""A replay may differ from a hooked forward by so many times the error seen between the dtype and float32.

Both are rounded, each in its own way, and the error is the largest of only a few runs: tests/test_rounding.py has how
the ratio is distributed.
"""


class RoundingError:
    """Measures, checkpoint by checkpoint, how far the coarsest of some dtypes rounds logit differences."""

    def __init__(self, *dtypes: Arithmetic) -> None:
        self.dtype = max(dtypes, key=ROUNDING.__getitem__)
        self._copies: dict[Arithmetic, ResidentModel] = {}

    def allowed(
        self,
        resident: ResidentModel,
        trials: Trials,
        alignment: Alignment,
        direction: Direction,
        patches: Sequence[tuple[Site, Bool[np.ndarray, " head"]]],
    ) -> float:
        """The largest difference that rounding explains, in nats: `TOLERANCE`, and `MULTIPLE` times the largest error
        of these patched runs in the coarse dtype.  In float32 it is `TOLERANCE` alone."""
        if self.dtype == "float32":
            return TOLERANCE
        runs = (trials, alignment, direction, patches)
        coarse, exact = (self._logit_diff(resident, dtype, *runs) for dtype in (self.dtype, "float32"))
        return TOLERANCE + MULTIPLE * float(np.abs(coarse - exact).max())

    def _logit_diff(
        self,
        resident: ResidentModel,
        dtype: Arithmetic,
        trials: Trials,
        alignment: Alignment,
        direction: Direction,
        patches: Sequence[tuple[Site, Bool[np.ndarray, " head"]]],
    ) -> Float[np.ndarray, "patch trial"]:
        with _arithmetic(dtype):
            return hooked_logit_diff(self._copy(resident, dtype), trials, alignment, direction, patches)

    def _copy(self, resident: ResidentModel, dtype: Arithmetic) -> ResidentModel:
        """The same weights in another dtype."""
        torch_dtype = TORCH_DTYPES[dtype]
        if resident.dtype == torch_dtype:
            return resident
        if dtype not in self._copies:
            self._copies[dtype] = ResidentModel(resident.model.config, torch_dtype, resident.device)
        weights = {name: tensor.to(torch_dtype) for name, tensor in resident.model.state_dict().items()}
        self._copies[dtype].load_weights(weights)
        return self._copies[dtype]


@contextmanager
def _arithmetic(dtype: Arithmetic) -> Iterator[None]:
    """Whether matrix products may round to TF32, while the body runs."""
    before = torch.get_float32_matmul_precision()
    allow_tf32(dtype == "tf32")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

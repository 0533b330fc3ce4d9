"""Choose heads per subset.  Shapes: T trials, S subsets, P positions, H heads, D head_dim."""

import torch
from torch import Tensor


def mix_heads(target_TSPHD: Tensor, source_TPHD: Tensor, subsets_SH: Tensor) -> Tensor:
    """Per subset, the named heads from source and the rest from target: TSPHD.  Target's S may be 1."""
    return torch.where(subsets_SH[None, :, None, :, None], source_TPHD[:, None], target_TSPHD)

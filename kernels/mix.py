"""Choose heads per subset.  Shapes: T trials, S subsets, P positions, H heads, D head_dim, M d_model."""

import torch
from torch import Tensor


def mix_heads(target_TSPHD: Tensor, source_TPHD: Tensor, subsets_SH: Tensor) -> Tensor:
    """Per subset, the named heads from source and the rest from target: TSPHD.  Target's S may be 1."""
    return torch.where(subsets_SH[None, :, None, :, None], source_TPHD[:, None], target_TSPHD)


def mix_deltas(deltas_TPHM: Tensor, subsets_SH: Tensor) -> Tensor:
    """Per subset, the sum of its heads' differences in the residual stream: TSPM."""
    T, P, H, M = deltas_TPHM.shape
    by_head_THR = deltas_TPHM.transpose(1, 2).reshape(T, H, P * M)
    return (subsets_SH.to(by_head_THR.dtype) @ by_head_THR).unflatten(2, (P, M))

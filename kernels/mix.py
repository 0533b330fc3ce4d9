"""Choose heads per subset.  Shapes: T trials, S subsets, P positions, H heads, V width of z, M d_model."""

import torch
from torch import Tensor


def mix_heads(target_TSPHV: Tensor, source_TPHV: Tensor, subsets_SH: Tensor) -> Tensor:
    """Per subset, the named heads from source and the rest from target: TSPHV.  Target's S may be 1."""
    return torch.where(subsets_SH[None, :, None, :, None], source_TPHV[:, None], target_TSPHV)


def head_deltas(source_TPHV: Tensor, target_TPHV: Tensor, weight_HVM: Tensor) -> Tensor:
    """(z_source - z_target) W_O, head by head: TPHM."""
    T, P, _H, _V = source_TPHV.shape
    by_head_HRV = (source_TPHV - target_TPHV).flatten(0, 1).transpose(0, 1)
    return torch.unflatten((by_head_HRV @ weight_HVM).transpose(0, 1), 0, (T, P))


def add_deltas(unpatched_TPM: Tensor, deltas_TPHM: Tensor, subsets_SH: Tensor) -> Tensor:
    """Per subset, the unpatched residual stream and its heads' differences: TSPM."""
    T, P, H, M = deltas_TPHM.shape
    by_head_THR = deltas_TPHM.transpose(1, 2).reshape(T, H, P * M)
    chosen_TSH = subsets_SH.to(by_head_THR.dtype).expand(T, -1, -1)
    sums_TSR = torch.baddbmm(unpatched_TPM.reshape(T, 1, P * M), chosen_TSH, by_head_THR)
    return torch.unflatten(sums_TSR, 2, (P, M))

"""Attention of many patched runs that share one unpatched prefix.

Shapes: T trials, S subsets, P patched positions, N prefix positions, H heads, K key/value heads, G = H/K, D width of
queries and keys, V width of values.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from .mix import mix_heads


def kernel_for(device: torch.device) -> str:
    """Which implementation computes there: `triton` on a CUDA device where Triton is installed, else `eager`."""
    return "triton" if device.type == "cuda" and find_spec("triton") else "eager"


def attend_shared_prefix(
    query_THSPD: Tensor,
    key_TKSPD: Tensor,
    value_TKSPV: Tensor,
    prefix_key_TKND: Tensor,
    prefix_value_TKNV: Tensor,
    prefix_length_T: Tensor,
    scaling: float,
    source_TPHV: Tensor | None = None,
    subsets_SH: Tensor | None = None,
) -> Tensor:
    """Every patched position attends to its trial's prefix and, causally, to its own run's patched positions: TSPHV.

    The prefix is read once for all subsets of a trial; both parts meet in one softmax, taken in float32.
    Prefix positions at or past `prefix_length_T` do not count, and must be finite.
    Where subsets are given, the heads they name take the source's z instead.
    """
    tensors = (query_THSPD, key_TKSPD, value_TKSPV, prefix_key_TKND, prefix_value_TKNV, prefix_length_T)
    if kernel_for(query_THSPD.device) == "triton":
        from . import attend_triton

        return attend_triton.attend_shared_prefix(*tensors, scaling, source_TPHV, subsets_SH)
    z_TSPHV = _attend_eagerly(*tensors, scaling)
    if source_TPHV is None or subsets_SH is None:
        return z_TSPHV
    return mix_heads(z_TSPHV, source_TPHV, subsets_SH)


def _attend_eagerly(
    query_THSPD: Tensor,
    key_TKSPD: Tensor,
    value_TKSPV: Tensor,
    prefix_key_TKND: Tensor,
    prefix_value_TKNV: Tensor,
    prefix_length_T: Tensor,
    scaling: float,
) -> Tensor:
    T, H, S, P, _D = query_THSPD.shape
    K, N = prefix_key_TKND.shape[1:3]
    query = query_THSPD.reshape(T * K, H // K * S * P, -1)
    absent = torch.arange(N, device=query.device) >= prefix_length_T[:, None]
    bias = query.new_zeros(T, 1, N).masked_fill_(absent[:, None], -torch.inf).repeat_interleave(K, 0)
    to_prefix = torch.baddbmm(bias, query, prefix_key_TKND.flatten(0, 1).transpose(1, 2), alpha=scaling)
    to_own = _own_scores(torch.unflatten(query_THSPD, 1, (K, H // K)), key_TKSPD[:, :, None]).mul_(scaling)
    scores = torch.cat([to_prefix.view(*to_own.shape[:-1], N), to_own], dim=-1)
    pattern = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    from_prefix = pattern[..., :N].reshape(T * K, H // K * S * P, N) @ prefix_value_TKNV.flatten(0, 1)
    z = _add_own(from_prefix.view(*to_own.shape[:-1], -1), pattern[..., N:], value_TKSPV[:, :, None])
    return z.flatten(1, 2).permute(0, 2, 3, 1, 4)


def _own_scores(query_TKGSPD: Tensor, key_TK1SPD: Tensor) -> Tensor:
    """Of every patched position for its own run's, -inf for those ahead: TKGSPP."""
    P = query_TKGSPD.shape[-2]
    if P == 1:  # far faster than products of one row
        return (query_TKGSPD * key_TK1SPD).sum(-1, keepdim=True)
    ahead = torch.ones(P, P, dtype=torch.bool, device=query_TKGSPD.device).triu(1)
    return (query_TKGSPD @ key_TK1SPD.transpose(-1, -2)).masked_fill_(ahead, -torch.inf)


def _add_own(z_TKGSPV: Tensor, pattern_TKGSPP: Tensor, value_TK1SPV: Tensor) -> Tensor:
    if pattern_TKGSPP.shape[-1] == 1:
        return z_TKGSPV.addcmul_(pattern_TKGSPP, value_TK1SPV)
    return z_TKGSPV.add_(pattern_TKGSPP @ value_TK1SPV)

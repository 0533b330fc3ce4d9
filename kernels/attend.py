"""Attention of many patched runs that share one unpatched prefix.

Shapes: T trials, S subsets, P patched positions, N prefix positions, H heads, K key/value heads, G = H/K, D head_dim.
"""

import torch
from torch import Tensor


def attend_shared_prefix(
    query_THSPD: Tensor,
    key_TKSPD: Tensor,
    value_TKSPD: Tensor,
    prefix_key_TKND: Tensor,
    prefix_value_TKND: Tensor,
    prefix_length_T: Tensor,
    scaling: float,
) -> Tensor:
    """Every patched position attends to its trial's prefix and, causally, to its own run's patched positions: TSPHD.

    The prefix is read once for all subsets of a trial; both parts meet in one softmax, taken in float32.
    Prefix positions at or past `prefix_length_T` do not count.
    """
    _T, H, S, P, _D = query_THSPD.shape
    K, N = prefix_key_TKND.shape[1:3]
    query = query_THSPD.unflatten(1, (K, H // K))

    to_prefix = query.flatten(2, 4) @ prefix_key_TKND.transpose(-1, -2)
    to_prefix = to_prefix.float().mul_(scaling).unflatten(2, (H // K, S, P))
    absent = torch.arange(N, device=query.device) >= prefix_length_T[:, None]
    to_prefix.masked_fill_(absent[:, None, None, None, None, :], -torch.inf)

    to_own = (query @ key_TKSPD[:, :, None].transpose(-1, -2)).float().mul_(scaling)
    ahead = torch.ones(P, P, dtype=torch.bool, device=query.device).triu(1)
    to_own.masked_fill_(ahead, -torch.inf)

    pattern = torch.cat([to_prefix, to_own], dim=-1).softmax(-1).to(query.dtype)
    from_prefix = pattern[..., :N].flatten(2, 4) @ prefix_value_TKND
    from_own = pattern[..., N:] @ value_TKSPD[:, :, None]
    z = from_prefix.reshape(from_own.shape) + from_own
    return z.flatten(1, 2).permute(0, 2, 3, 1, 4)

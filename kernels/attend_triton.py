"""`attend_shared_prefix` for CUDA: its definition is the eager twin in `attend`.

Shapes: T trials, S subsets, P patched positions, N prefix positions, H heads, K key/value heads, D width of a key,
V width of a value.  Within a program: R rows, each one patched position of one run, and B prefix positions at a time;
D and V are then padded to the powers of two that `tl.dot` asks for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
"""Folded into the scaling: the hardware's exponential has base 2."""

TILE = 2**14
"""Bytes: two tiles of keys and two of values in flight leave room for the queries' on small cards."""


# Triton's decorator has no types, and Triton reads a kernel's annotations as types of its own: hence the exceptions.
@triton.jit  # type: ignore[untyped-decorator]
def _vectors(  # type: ignore[no-untyped-def]
    first, offset_R, present_R, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """One vector per offset; the padding, and all of an absent vector, is zero and never read."""
    column = tl.arange(0, PADDED)
    inside = present_R[:, None] & (column < WIDTH)[None, :]
    return tl.load(first + offset_R[:, None] + column.to(tl.int64)[None, :] * stride, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    prefix_length,
    source,
    subsets,
    z,
    query_THSPD,
    key_TKSPD,
    value_TKSPV,
    prefix_key_TKND,
    prefix_value_TKNV,
    prefix_length_T,
    source_TPHV,
    subsets_SH,
    scaling,
    S,
    P,
    N,
    GROUP,
    D: tl.constexpr,
    V: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_V: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """One trial, one head, R rows.  Names with shapes hold strides; offsets pass 2^31, so they are int64."""
    h, t = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k = h // GROUP
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    p_R = row_R % P
    s_R = (row_R // P).to(tl.int64)
    present_R = row_R < S * P

    query += t * query_THSPD[0] + h * query_THSPD[1]
    key += t * key_TKSPD[0] + k * key_TKSPD[1]
    value += t * value_TKSPV[0] + k * value_TKSPV[1]
    prefix_key += t * prefix_key_TKND[0] + k * prefix_key_TKND[1]
    prefix_value += t * prefix_value_TKNV[0] + k * prefix_value_TKNV[1]

    of_row_R = s_R * query_THSPD[2] + p_R.to(tl.int64) * query_THSPD[3]
    query_RD = _vectors(query, of_row_R, present_R, query_THSPD[4], D, PADDED_D)
    top_R = tl.full([R], -float("inf"), tl.float32)
    total_R = tl.zeros([R], tl.float32)
    z_RV = tl.zeros([R, PADDED_V], tl.float32)

    # A row's own run comes first: every row sees its first position, so that `top_R` is finite ever after.
    for past in range(P):
        key_RD = _vectors(key, s_R * key_TKSPD[2], present_R, key_TKSPD[4], D, PADDED_D)
        value_RV = _vectors(value, s_R * value_TKSPV[2], present_R, value_TKSPV[4], V, PADDED_V)
        score_R = tl.sum(query_RD.to(tl.float32) * key_RD.to(tl.float32), 1) * scaling
        score_R = tl.where(past <= p_R, score_R, -float("inf"))
        higher_R = tl.maximum(top_R, score_R)
        fade_R, weight_R = tl.exp2(top_R - higher_R), tl.exp2(score_R - higher_R)
        total_R = total_R * fade_R + weight_R
        z_RV = z_RV * fade_R[:, None] + weight_R[:, None] * value_RV.to(tl.float32)
        top_R = higher_R
        key += key_TKSPD[3]
        value += value_TKSPV[3]

    length = tl.minimum(tl.load(prefix_length + t * prefix_length_T[0]), N).to(tl.int32)
    for start in range(0, length, B):
        n_B = start + tl.arange(0, B)
        seen_B = n_B < length
        n_B = n_B.to(tl.int64)
        key_BD = _vectors(prefix_key, n_B * prefix_key_TKND[2], seen_B, prefix_key_TKND[3], D, PADDED_D)
        value_BV = _vectors(prefix_value, n_B * prefix_value_TKNV[2], seen_B, prefix_value_TKNV[3], V, PADDED_V)
        score_RB = tl.dot(query_RD, tl.trans(key_BD), input_precision="ieee") * scaling
        score_RB = tl.where(seen_B[None, :], score_RB, -float("inf"))
        higher_R = tl.maximum(top_R, tl.max(score_RB, 1))
        fade_R, weight_RB = tl.exp2(top_R - higher_R), tl.exp2(score_RB - higher_R[:, None])
        total_R = total_R * fade_R + tl.sum(weight_RB, 1)
        z_RV = tl.dot(weight_RB.to(value_BV.dtype), value_BV, z_RV * fade_R[:, None], input_precision="ieee")
        top_R = higher_R

    z_RV = z_RV / total_R[:, None]
    if source is not None:
        named_R = tl.load(subsets + s_R * subsets_SH[0] + h * subsets_SH[1], mask=present_R, other=0) != 0
        source += t * source_TPHV[0] + h * source_TPHV[2]
        of_row_R = p_R.to(tl.int64) * source_TPHV[1]
        source_RV = _vectors(source, of_row_R, present_R & named_R, source_TPHV[3], V, PADDED_V)
        z_RV = tl.where(named_R[:, None], source_RV.to(tl.float32), z_RV)

    of_row_R = ((t * S * P + row_R) * tl.num_programs(1) + h) * V
    column = tl.arange(0, PADDED_V)
    inside = present_R[:, None] & (column < V)[None, :]
    tl.store(z + of_row_R[:, None] + column[None, :], z_RV.to(z.dtype.element_ty), mask=inside)


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
    """As the eager twin: TSPHV, contiguous.  No gradients."""
    T, H, S, P, D = query_THSPD.shape
    K, N, V = *prefix_key_TKND.shape[1:3], value_TKSPV.shape[-1]
    z_TSPHV = query_THSPD.new_empty(T, S, P, H, V)

    padded_D, padded_V = (max(16, triton.next_power_of_2(width)) for width in (D, V))
    vector = max(padded_D, padded_V) * query_THSPD.element_size()
    # Tensor cores do not compute in float32: there a product is unrolled, and large tiles run out of registers.
    widest = min(TILE // vector, 32 if query_THSPD.dtype == torch.float32 else 64)
    R, B = (max(16, min(widest, triton.next_power_of_2(n))) for n in (S * P, N))
    # Left to itself, Triton 3.9 fuses too, but warns.
    options = {"num_warps": 8 if R * vector >= TILE else 4, "num_stages": 2, "enable_fp_fusion": True}

    read = (query_THSPD, key_TKSPD, value_TKSPV, prefix_key_TKND, prefix_value_TKNV, prefix_length_T)
    tensors = (*read, source_TPHV, subsets_SH)
    strides = (None if tensor is None else tensor.stride() for tensor in tensors)
    sizes = (S, P, N, H // K, D, V, padded_D, padded_V, R, B)
    # Triton starts kernels on the current device, which need not be the tensors'.
    with torch.cuda.device_of(query_THSPD):  # type: ignore[no-untyped-call]  # torch has no types for it
        _attend[triton.cdiv(S * P, R), H, T](*tensors, z_TSPHV, *strides, scaling * LOG2_E, *sizes, **options)
    return z_TSPHV

"""Arrays of whole numbers as text that a page carries: small, exact, and quick to read in a browser.

Bytes of one significance lie together, which compresses better; zlib, then base64.  `stage.js` reads it.
"""

import base64
import zlib
from typing import Any

import numpy as np
from jaxtyping import Float, Int

MISSING = -32768
"""Stands for a number that there is none of."""


RATIO = 1.02
"""Between one power and the next: what is rounded to one is off by less than 1 %."""


def powers(sizes: Float[np.ndarray, "*cell"]) -> Int[np.ndarray, "*cell"]:
    """Sizes (0 or more) as powers of `RATIO`, of half a hundredth; 0 for whatever is smaller."""
    exponent = np.log(np.maximum(sizes, 0.005) / 0.005) / np.log(RATIO)
    rounded: Int[np.ndarray, "*cell"] = np.rint(exponent).astype(np.int64)
    return rounded


def hundredths(values: Float[np.ndarray, "*cell"]) -> Int[np.ndarray, "*cell"]:
    """Rounded to two decimals, as whole numbers; `MISSING` for NaN."""
    known = np.isfinite(values)
    rounded = np.rint(np.where(known, values, 0) * 100).astype(np.int64)
    return np.where(known, rounded, MISSING)


def pack(values: Int[np.ndarray, "*cell"], lattice: bool = False) -> dict[str, Any]:
    """`shape`, `bytes` in a number, `sums` and `data`.

    With `lattice` the last axis has all subsets of heads in order of their bits.  Where it is shorter, what is kept of
    a subset is how far it is from the sum of two that stand before it: itself without its first head, and that head.
    """
    apart = _from_sums(values) if lattice else values
    sums = lattice and int(np.abs(apart).sum()) < int(np.abs(values).sum())
    kept = apart if sums else values
    width = next(w for w in (1, 2, 4) if not kept.size or np.abs(kept).max() < 2 ** (8 * w - 1))
    whole = np.ascontiguousarray(kept, dtype=f"<i{width}")
    planes = whole.view(np.uint8).reshape(-1, width).T.tobytes()
    data = base64.b64encode(zlib.compress(planes, 6)).decode("ascii")
    return {"shape": list(values.shape), "bytes": width, "sums": sums, "data": data}


def _from_sums(values: Int[np.ndarray, "*cell"]) -> Int[np.ndarray, "*cell"]:
    """A set's value less those of its first head and of its other heads; single heads and no head as they are."""
    bits = np.arange(values.shape[-1])
    first, others = bits & -bits, bits & (bits - 1)
    several = others > 0
    apart: Int[np.ndarray, "*cell"] = values - np.where(several, values[..., first] + values[..., others], 0)
    return apart


def size_of(packed: Any) -> int:
    """Characters that arrays and texts take, however deep they lie."""
    if isinstance(packed, str):
        return len(packed)
    parts = packed.values() if isinstance(packed, dict) else packed if isinstance(packed, list) else ()
    return sum(map(size_of, parts))

"""Amounts of memory and time as people write and read them."""

import re

from .errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """Bytes of `8GB`, `500MB`, `1.5G`, as `--memory` takes them.  Raises `UserError` for anything else."""
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not amount or float(amount[1]) == 0:
        raise UserError(f"--memory {text}: not an amount of memory; write 8GB or 500MB")
    return int(float(amount[1]) * _UNITS[amount[2].upper()])


def format_bytes(n_bytes: float) -> str:
    """`1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit in ("B", "kB") else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def format_time(seconds: float) -> str:
    """`80 s`, `12 min`, `3.5 h`, `20 days`, `1,000 years`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    for unit, length, most in (("min", 60, 90), ("h", 3600, 48), ("days", 86_400, 730)):
        if seconds < most * length:
            return f"{seconds / length:.1f} {unit}" if unit == "h" else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 31_557_600:,.0f} years"

"""Amounts, counts, numbers and names as people write and read them.  One form for each, used everywhere."""

import json
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

from .errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

MINUS = "−"
"""U+2212, as wide as a plus sign; a hyphen is not."""

ABSENT = "–"
"""In place of a number that does not exist."""


def parse_bytes(text: str) -> int:
    """Bytes of `8GB`, `500MB`, `1.5G`, as `--memory` takes them.  Raises `UserError` for anything else."""
    amount = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    n_bytes = int(float(amount[1]) * _UNITS[amount[2].upper()]) if amount else 0
    if n_bytes < 1:
        raise UserError(f"--memory {text}: not an amount of memory; write 8GB or 500MB")
    return n_bytes


def format_bytes(n_bytes: float) -> str:
    """`1.5 GB`; a kilobyte is 1,000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit in ("B", "kB") else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def format_time(seconds: float) -> str:
    """`80 s`, `12 min`, `3.5 h`, `20 days`, `1,000 years`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    for unit, length, limit in (("min", 60, 90), ("h", 3600, 48), ("days", 86_400, 730)):
        if seconds < limit * length:
            return f"{seconds / length:.1f} {unit}" if unit == "h" else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 31_557_600:,.0f} years"


def format_count(n: int, noun: str) -> str:
    """`1 key`, `1,200 keys`; for nouns whose plural takes an s."""
    return f"{n:,} {noun}{'s' if n != 1 else ''}"


def format_names(names: Collection[str], limit: int = 5) -> str:
    """`a, b, c`; of more than `limit` the first ones and how many are left out: `a, b and 7 more`."""
    shown = ", ".join(list(names)[:limit]) or "nothing"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def format_ranges(numbers: Sequence[int]) -> str:
    """`4–8, 11`, ascending."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def format_number(value: float, digits: int) -> str:
    """`1.20`, `−1.20`; a dash for NaN."""
    return ABSENT if math.isnan(value) else f"{value:.{digits}f}".replace("-", MINUS)


def format_signed(value: float, digits: int) -> str:
    """`+1.2`, `−1.2`, zero without a sign; a dash for NaN."""
    if math.isnan(value):
        return ABSENT
    text = f"{value:+.{digits}f}".replace("-", MINUS)
    return text if text.strip(f"+{MINUS}0.") else text[1:]


def format_interval(low: float, high: float, digits: int) -> str:
    """`+0.12 to +0.34`; nothing where there is no interval, as for a single prompt."""
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"{format_signed(low, digits)} to {format_signed(high, digits)}"


def format_head(layer: int, head: int) -> str:
    """`L3.H1`, everywhere."""
    return f"L{layer}.H{head}"


def shorten(text: str, limit: int) -> str:
    """`text`, cut to `limit` characters with an ellipsis where it is longer."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def parse_whole(text: str) -> int | None:
    """The whole number that `text` is, of at most 18 digits, so that it fits into a store; None where it is none."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def parse_json(text: str | bytes) -> Any:
    """What `text` says in JSON.  Raises `ValueError` where it is none, or has a number of hundreds of digits."""

    def whole(digits: str) -> int:
        if len(digits) > 300:
            raise ValueError(f"a number of {len(digits):,} digits")
        return int(digits)

    try:
        return json.loads(text, parse_int=whole)
    except RecursionError:
        raise ValueError("brackets within brackets, thousands deep") from None


def format_whole(number: int) -> str:
    """A number that a user wrote: Python refuses to write out one of more than 4,300 digits."""
    return str(number) if abs(number) < 10**100 else f"of about {number.bit_length() * 3 // 10:,} digits"


def one_line(error: BaseException, limit: int = 200) -> str:
    """What an exception of a library says, in one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]

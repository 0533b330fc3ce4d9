"""Primary hypotheses: named before anything is patched, written into the run, and tested at a level of their own."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..runtime.errors import UserError
from ..runtime.format import format_head
from .subsets import Subsets, count_halves, is_symmetric

LEVEL = 0.05
"""Of all primary hypotheses of a run together."""


@dataclass(frozen=True)
class Primary:
    """One place where an effect is expected."""

    layer: int

    head: int | None
    """None for even against odd heads of the layer."""

    checkpoint: str

    def __str__(self) -> str:
        """As it is written on the command line."""
        where = f"layer:{self.layer}" if self.head is None else format_head(self.layer, self.head)
        return f"{where}@{self.checkpoint}"


def parse_primary(words: Sequence[str]) -> tuple[Primary, ...]:
    """The hypotheses of `layer:6@step143000` (even against odd heads) and `L3.H1@step512` (one head), each once.

    Raises `UserError` for a word that is neither.
    """
    return tuple(dict.fromkeys(map(_parse, words)))


def _parse(word: str) -> Primary:
    where, _, checkpoint = word.partition("@")
    match = re.fullmatch(r"layer:([0-9]{1,4})|L([0-9]{1,4})\.H([0-9]{1,4})", where, re.ASCII)
    if match is None or not checkpoint:
        raise UserError(
            f"--primary {word}: write layer:6@step143000 (even against odd heads) or L3.H1@step512 (a head)"
        )
    if match[1] is not None:
        return Primary(int(match[1]), None, checkpoint)
    return Primary(int(match[2]), int(match[3]), checkpoint)


def refuse_untestable(
    primaries: Sequence[Primary], layers: Sequence[int], subsets: Subsets, checkpoints: Sequence[str], n_groups: int = 1
) -> None:
    """Raise `UserError` for a hypothesis that the run could not test: another layer, head or checkpoint, or too few
    equal splits to give a p below its level."""
    for primary in primaries:
        if primary.layer not in layers:
            raise UserError(f"--primary {primary}: layer {primary.layer} is not patched; it is not among --layers")
        if primary.checkpoint not in checkpoints:
            raise UserError(f"--primary {primary}: the store has no checkpoint {primary.checkpoint}; headlapse info")
        if primary.head is not None and str(primary.head) not in subsets.labels:
            raise UserError(f"--primary {primary}: head {primary.head} is not patched alone; --subsets each patches it")
        if primary.head is None:
            _refuse_few_splits(primary, LEVEL / len(primaries), subsets, n_groups)


def _refuse_few_splits(primary: Primary, level: float, subsets: Subsets, n_groups: int) -> None:
    n_heads = subsets.mask.shape[1]
    is_half = (subsets.mask.sum(1) == n_heads - n_heads // 2) & is_symmetric(subsets.mask, n_groups)
    n_halves, n_all = int(is_half.sum()), count_halves(n_heads, n_groups)
    if "even" in subsets.labels and "odd" in subsets.labels and 2 / max(n_halves, 1) <= level:
        return
    every = "balanced" if n_heads % 2 == 0 else f"size:{n_heads // 2} size:{n_heads - n_heads // 2}"
    what = f"--primary {primary}: {n_halves} halves of the heads give no p below {2 / max(n_halves, 1):.2g}"
    if 2 / n_all > level:
        raise UserError(f"{what}, and all {n_all} none below {level:.2g}; name fewer hypotheses, or one of a head")
    raise UserError(f"{what}, and it is tested at {level:.2g}; add {every} or splits:200 to --subsets even odd")


def registered(
    primaries: Sequence[Primary], settings: Mapping[str, Any], study: Mapping[str, Any], runs_before: Sequence[str]
) -> dict[str, Any]:
    """What is written into a run before anything is patched: the hypotheses, when, what had been patched before in this
    store, and a hash of all that and of the settings and the study."""
    record = {
        "tests": [str(primary) for primary in primaries],
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs_before": list(runs_before),
    }
    return record | {"sha256": hash_of(record, settings, study)}


def hash_of(record: Mapping[str, Any], settings: Mapping[str, Any], study: Mapping[str, Any]) -> str:
    """sha256 of the record without its own hash, the settings of the run and the study of the store, as JSON."""
    kept = {name: value for name, value in record.items() if name != "sha256"}
    text = json.dumps({"primary": kept, "patch": dict(settings), "study": dict(study)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

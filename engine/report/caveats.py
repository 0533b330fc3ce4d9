"""Threats to validity, as far as the data themselves show them."""

import math

import numpy as np

from ..measures.logit_diff import CLEAR_OF_ZERO
from ..store.store import Store
from ..study.alignment import align
from ..study.prompts import Trials
from ..study.study import RUNS
from .findings.self_check import allowed_difference
from .result import Result, listed

GAP = 0.1
"""Share of the training between two checkpoints above which the gap is named."""


def threats(store: Store, result: Result) -> list[tuple[str, str]]:
    """What speaks against reading more into the numbers, each with the numbers it rests on: (subject, sentence)."""
    trials = store.trials()
    sentences = [
        ("Prompts", _prompts(trials)),
        ("Baseline", _baseline(result)),
        ("Alignment", _alignment(trials, result)),
        ("Checkpoints", _gaps(result)),
        ("Even and odd", _equal_splits(result)),
        ("Choice", _choice(result)),
        ("Arithmetic", _arithmetic(store, result)),
    ]
    return [(subject, sentence) for subject, sentence in sentences if sentence]


def _prompts(trials: Trials) -> str:
    n, n_drawn = trials.n_trials, sum(contrast.repeats for contrast in trials.contrasts)
    text = f"n = {n} distinct prompt{'s' * (n != 1)}"
    if n_drawn != n:
        text += f" ({n_drawn} were asked for; what is identical is one observation)"
    if n == 1:
        return f"{text}: every rate is 0 or 1, no interval can be given, and nothing is said of other prompts."
    return f"{text}: one of them is {1 / n:.1%} of a success rate. Intervals are over prompts of this task alone."


def _baseline(result: Result) -> str:
    table = result.table
    vacuous = list(table.index[table["corrupt_rate"] >= 0.5]) if result.target == "corrupt" else []
    clean, corrupt = (table[run].to_numpy() for run in RUNS)
    close = list(table.index[np.abs(clean - corrupt) < CLEAR_OF_ZERO])
    parts = []
    if vacuous:
        parts.append(
            "the unpatched corrupt run already succeeds on half of the prompts or more at "
            f"{listed(vacuous)}: a success there restores nothing"
        )
    if close:
        parts.append(
            f"clean and corrupt runs are less than {CLEAR_OF_ZERO} nats apart at {listed(close)}: "
            "no share of so small a gap means anything"
        )
    return _sentence(parts)


def _alignment(trials: Trials, result: Result) -> str:
    """How many of the aligned positions hold the same token in both runs."""
    alignment = align(trials, result.settings.positions)
    trial = np.arange(trials.n_trials)[:, None]
    source, target = (trials.tokens[run][trial, alignment.positions[run]] for run in range(len(RUNS)))
    n, same = int(alignment.valid.sum()), int((source == target)[alignment.valid].sum())
    clean, corrupt = trials.length
    apart = int((clean != corrupt).sum())
    text = f"{same} of {n} patched positions hold the same token in both runs"
    if apart:
        text += (
            f"; in {apart} of {trials.n_trials} pairs the prompts differ in length, so that aligned positions are not "
            "the same distance from the start"
        )
    return f"{text}."


def _gaps(result: Result) -> str:
    points, steps = result.points, np.sort(result.positions)
    steps = steps[steps >= 0]
    if len(steps) < 2:
        return "Fewer than two checkpoints of known steps: nothing can be said of when."
    gaps = np.diff(steps)
    widest = int(gaps.argmax())
    between = f"{points.name(int(steps[widest]))} and {points.name(int(steps[widest + 1]))}"
    text = f"{len(steps)} checkpoints; between {'' if points.labels else 'steps '}{between}"
    share = gaps[widest] / np.ptp(steps)
    if share < GAP:
        return f"{text}, the widest gap, lie {share:.0%} of the {points.unit} covered."
    return f"{text} lie {share:.0%} of the {points.unit} covered: whatever happens there may be sudden or gradual."


def _equal_splits(result: Result) -> str:
    if not {"even", "odd"} <= set(result.run.subset.values):
        return ""
    n_heads = result.run.sizes["head"]
    n = math.comb(n_heads, n_heads // 2)
    return (
        f"Head numbers are arbitrary. {n:,} equal splits of {n_heads} heads exist, so no p of even against odd can be "
        f"below {2 / n:.2g}."
    )


def _choice(result: Result) -> str:
    n = result.nats.sizes["layer"]
    if n < 2:
        return ""
    return f"Of {n} layers each checkpoint's best one is shown, chosen on the prompts it is shown on; that flatters it."


def _arithmetic(store: Store, result: Result) -> str:
    cached, patched = store.study["dtype"], result.settings.dtype
    allowed = allowed_difference(result.run, patched, cached)
    return f"Cached in {cached}, patched in {patched}: differences up to {allowed:.1g} nats are rounding."


def _sentence(parts: list[str]) -> str:
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""

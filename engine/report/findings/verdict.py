"""The answer first: what a patched run shows, in a few lines."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool

from ...measures.logit_diff import best_layer, effect, finished, success
from ...runtime.format import format_count
from ...statistics.bootstrap import LEVEL
from ...statistics.head_effects import HeadEffect, head_effects, rank_heads, t_test, telling_checkpoint
from ...statistics.head_subsets import additive_share
from ...statistics.multiple_testing import Correction
from ...statistics.onset import HALF, PATTERN, first_sustained, known_steps
from ...statistics.permutation import find_equal_splits, parity
from ...study.patch_settings import PatchSettings
from ...study.study import TOLERANCE
from .parity import how_to_test
from .published import success_table

WIDTH, LABEL = 100, 11
"""Columns of a line, and of the word that it begins with."""

SHOWN = 3
"""Heads that are named."""


@dataclass(frozen=True)
class Line:
    """One line of the verdict."""

    label: str
    """What it is about; two spaces and a head (`  L1.H0`) under `heads`; empty where the text stands alone."""

    text: str

    def __str__(self) -> str:
        return f"{self.label:<{LABEL}}{self.text}" if self.label else self.text


def fitting(*variants: str, width: int = WIDTH - LABEL) -> str:
    """The first variant that fits into a line, else the last one, cut."""
    fits = (text for text in variants if len(text) <= width)
    return next(fits, f"{variants[-1][: width - 1]}…")


def verdict(
    run: xr.Dataset,
    settings: PatchSettings,
    study: Mapping[str, Any],
    page: str | None = None,
    correction: Correction = "bh",
) -> list[str]:
    """At most 12 lines of at most 100 columns about a run; the table of the published protocol is as long as its run.

    `study` is the store's record of what was asked (`model` and `task` are read); `page` is where the report was
    written.
    """
    lines = [str(line) for line in verdict_lines(run, settings, study, correction)]
    # A path is typed or clicked: it is never cut.
    return [*lines, f"{'page':<{LABEL}}{page}"] if page else lines


def verdict_lines(
    run: xr.Dataset, settings: PatchSettings, study: Mapping[str, Any], correction: Correction = "bh"
) -> list[Line]:
    """The same by its parts, without the page."""
    complete = finished(run)
    question = Line("", _question(complete, settings, study))
    if not complete.sizes["checkpoint"]:
        return [question, Line("task", "no checkpoint is finished yet")]
    if settings.protocol == "published":
        return [question, *_published_lines(complete, study)]
    lines = [question, Line("task", _task(complete)), *_head_lines(complete, settings, correction)]
    lines += [*_layer_line(complete, settings), *_parity_line(complete, settings, correction)]
    lines.append(Line("seeds", "one training run: effects and onsets of another seed can differ (headlapse compare)"))
    return [*lines, *_check_line(complete)]


def _question(complete: xr.Dataset, settings: PatchSettings, study: Mapping[str, Any]) -> str:
    labels, n = _labels(complete), complete.sizes["trial"]
    what = f"{Path(study['model']).name} on {Path(study['task']).name}"
    between = f" ({labels[0]} to {labels[-1]})" if len(labels) > 1 else f" ({labels[0]})" if labels else ""
    pairs, checkpoints = format_count(n, "prompt pair"), format_count(len(labels), "checkpoint")
    how, where = _patch_in_words(settings)
    return fitting(
        f"{what}: {pairs}, {checkpoints}{between}, {how}{where}",
        f"{what}: {pairs}, {checkpoints} to {labels[-1] if labels else ''}, {how}{where}",
        f"{what}: {pairs}, {checkpoints}, {how}{where}",
        f"{what}: {pairs}, {checkpoints}, {how}",
        f"{what}: {pairs}, {checkpoints}",
        width=WIDTH,
    )


def _patch_in_words(settings: PatchSettings) -> tuple[str, str]:
    """Which run goes into which, and at which tokens."""
    if settings.protocol == "published":
        return "by the published procedure", ""
    last = re.fullmatch("end:([0-9]+)", settings.positions)
    tokens = {"last": "the last token", "all": "all tokens"}.get(settings.positions, settings.positions)
    how = "clean into corrupt" if settings.direction == "denoise" else "corrupt into clean"
    return how, f" at {f'the last {last[1]} tokens' if last else tokens}"


# --- the task ---


def _task(complete: xr.Dataset) -> str:
    """Whether the model can do the task, and from when.

    Judged by pairs: a model that answers both prompts of a pair alike gets one of them right without being able to do
    anything.
    """
    clean = complete.clean_logit_diff.transpose("checkpoint", "trial").values > 0
    wrong = complete.corrupt_logit_diff.transpose("checkpoint", "trial").values <= 0
    both, n, last = clean & wrong, clean.shape[1], _labels(complete)[-1]
    known = known_steps(complete)
    if known.sizes["checkpoint"] < 2:
        counts = [f"{values[-1].sum()} of {n}" for values in (clean, wrong, both)]
        return f"at {last} clean right in {counts[0]}, corrupt wrong in {counts[1]}, both in {counts[2]} pairs"
    largest_count = int(both.sum(1).max())
    if not (both.mean(1) > HALF).any():
        return f"not learnt: clean right and corrupt wrong in at most {largest_count} of {n} pairs, at any checkpoint"
    labels = _labels(known)
    rows = [_labels(complete).index(label) for label in labels]
    right, fails = (_since(values[rows], labels) for values in (clean, wrong))
    since, n_both = f"clean right {right}, corrupt wrong {fails}", f"{both[-1].sum()} of {n}"
    return fitting(f"{since}; both in {n_both} pairs at {last}", f"{since}; both at {last}: {n_both}", since)


def _since(holds: Bool[np.ndarray, "checkpoint trial"], labels: Sequence[str]) -> str:
    """From where on it holds for more than half of the prompts, at two consecutive checkpoints."""
    first = int(first_sustained(holds.mean(1) > HALF))
    if first == len(labels):
        return "at no two checkpoints running"
    return "from the start" if first == 0 else f"from {_between(labels[first - 1], labels[first])}"


def _between(after: str, by: str) -> str:
    """`step 48-56`: between which two checkpoints something starts."""
    if after.startswith("step") and by.startswith("step"):
        return f"step {after.removeprefix('step')}-{by.removeprefix('step')}"
    return f"{after} to {by}"


# --- the heads ---


def _head_lines(complete: xr.Dataset, settings: PatchSettings, correction: Correction) -> Iterator[Line]:
    """The heads with the largest effects at the last checkpoint, or where none is significant there, at the checkpoint
    of the largest significant effect."""
    effects = head_effects(complete, settings, correction)
    if effects.empty:
        yield Line("heads", _no_single_heads(settings))
        return
    last, at = _labels(complete)[-1], telling_checkpoint(effects)
    heads = rank_heads(effects, at or last)
    if complete.sizes["trial"] == 1:
        yield Line("heads", f"largest effects at {last} (nats); one prompt: no interval, no p-value")
        yield from (Line(f"  {head}", f"{head.effect:+.2f}") for head in heads[:SHOWN])
    elif at is None:
        largest = f"{heads[0]} {format_estimate(heads[0].effect, heads[0].low, heads[0].high)}"
        none = f"none of {format_count(len(heads), 'head')} has a lasting significant effect"
        yield Line("heads", fitting(f"{none}; largest at {last}: {largest}", f"{none}; largest: {largest}", none))
    else:
        significant = [head for head in heads if head.is_significant]
        counts = f"{len(significant)} of {len(heads)} significant at {at}{'' if at == last else f', none at {last}'}"
        yield Line(
            "heads",
            fitting(
                f"{counts}; mean effect (nats, 95 % interval), adjusted p",
                f"{counts}; nats [95 % interval], adjusted p",
                counts,
            ),
        )
        yield from _table(significant[:SHOWN], len(_labels(complete)))


def _no_single_heads(settings: PatchSettings) -> str:
    if settings.joint and len(settings.layers) > 1:
        return f"patched in {len(settings.layers)} layers at once; for the effects of single heads leave --joint out"
    return "not patched one by one; for the effects of single heads: --subsets each all"


def _table(heads: Sequence[HeadEffect], n_checkpoints: int) -> Iterator[Line]:
    """A line a head, in columns."""
    cells = [
        [
            format_estimate(head.effect, head.low, head.high),
            format_p(head.p_adjusted),
            "" if n_checkpoints == 1 else _significant_from(head),
            "" if math.isnan(head.share) else f"{100 * head.share:.0f} % of layer {head.layer}",
        ]
        for head in heads
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for head, row in zip(heads, cells, strict=True):
        columns = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True) if width]
        yield Line(f"  {head}", "  ".join(columns).rstrip())


def _significant_from(head: HeadEffect) -> str:
    if head.by is None:
        return "at single checkpoints only"
    return "from the start" if head.after is None else f"from {_between(head.after, head.by)}"


# --- the layer, even and odd ---


def _layer_line(complete: xr.Dataset, settings: PatchSettings) -> Iterator[Line]:
    """All heads of the layer where they have the largest effect at the last checkpoint."""
    if "all" not in complete.subset.values:
        return
    layer = _leading_layer(complete, settings)
    last = complete.isel(checkpoint=-1)
    nats = effect(last, settings.direction).sel(layer=layer, subset="all").values.astype(float)
    low, high, _ = (float(values[0]) for values in t_test(nats[None]))
    mean = f"all heads {format_estimate(float(nats.mean()), low, high)} nats"
    restored = _restored(last.sel(layer=layer, subset="all"), settings)
    text = f"{mean}, not clear of zero" if low <= 0 <= high else f"{mean}, {restored}"
    share = _additive_share(complete, settings, layer)
    if share is None:
        text = fitting(f"{text} at {_labels(complete)[-1]}", text)
    else:
        additive = f"{text}; single heads add up to {100 * share:.1f} % of the variance over subsets"
        text = fitting(additive, f"{text}; additive: {100 * share:.1f} %", text)
    where = f"layers {settings.layers[0]}-{settings.layers[-1]}" if settings.joint else f"layer {layer}"
    yield Line(where if len(where) < LABEL else "layers", text)


def _leading_layer(complete: xr.Dataset, settings: PatchSettings) -> int:
    """That of the largest effect of all heads at the last checkpoint: whatever the numbers of its heads, so that
    choosing it changes nothing in a permutation test over them."""
    return int(best_layer(complete.isel(checkpoint=[-1]), settings.direction).values[0])


def _restored(patched: xr.Dataset, settings: PatchSettings) -> str:
    right = success(patched.logit_diff).values == 1
    if settings.direction == "noise":
        was_right = success(patched.clean_logit_diff).values == 1
        return f"{int((~right & was_right).sum())} of {format_count(int(was_right.sum()), 'right prompt')} broken"
    failed = success(patched.corrupt_logit_diff).values != 1
    return f"{int((right & failed).sum())} of {format_count(int(failed.sum()), 'failing prompt')} restored"


def _additive_share(complete: xr.Dataset, settings: PatchSettings, layer: int) -> float | None:
    moved = effect(complete.isel(checkpoint=-1), settings.direction).sel(layer=layer).mean("trial")
    share = additive_share(moved.values.astype(float), complete.mask.values)
    return None if share is None or math.isnan(share) else share


def _parity_line(complete: xr.Dataset, settings: PatchSettings, correction: Correction) -> Iterator[Line]:
    """Even against odd heads at the leading layer of the last checkpoint, with what the permutation test allows to be
    said of it.

    One test at 5 %: the cell is chosen by the effect of all heads, which no relabelling changes.
    """
    if not {"even", "odd"} <= set(complete.subset.values):
        return
    layer = _leading_layer(complete, settings)
    logit_diff = complete.logit_diff.isel(checkpoint=-1).sel(layer=layer)
    nats = (logit_diff.sel(subset="even") - logit_diff.sel(subset="odd")).values.astype(float)
    low, high, _ = (float(values[0]) for values in t_test(nats[None]))
    difference = f"{format_estimate(float(nats.mean()), low, high)} nats"
    difference += "" if settings.joint else f" in layer {layer}"
    splits, frame = find_equal_splits(complete), parity(complete, correction)
    if splits is None or frame is None:
        words = how_to_test(complete.sizes["head"])[0]
        text = f"not tested: {difference}, no null was run"
        yield Line("even/odd", fitting(f"{text} (--subsets even odd all {words})", f"{text} (--subsets {words})", text))
        return
    p, least = float(frame["p"].loc[(complete.checkpoint.values[-1], layer)]), 2 / len(splits.halves)
    n_splits = f"{splits.n_splits - 1:,} random" if splits.sampled else f"{len(splits.halves):,}"
    test = f"permutation {format_p(p)} of {n_splits} splits"
    smallest = float(frame["p_adjusted"].min())
    if least > 1 - LEVEL:
        text = f"cannot tell: {difference}; of {n_splits} splits p is at least {least:.2f}"
    elif p <= 1 - LEVEL:
        text = f"yes: {difference}, {test}"
    elif smallest <= 1 - LEVEL:
        text = f"cannot tell: {difference}, {test}; adjusted {format_p(smallest)} elsewhere"
    else:
        text = f"no pattern: {difference}, {test}"
    yield Line("even/odd", fitting(text))


def _check_line(complete: xr.Dataset) -> Iterator[Line]:
    """How exact the replay was, where it was checked."""
    if "self_check" not in complete.coords:
        return
    differences = complete.self_check.values
    n, n_checked = len(differences), int((~np.isnan(differences)).sum())
    if n_checked:
        largest = float(np.nanmax(differences))
        where = f"random runs at {n_checked} of {format_count(n, 'checkpoint')}"
        bound = float(np.nanmax(complete.self_check_bound.values)) if "self_check_bound" in complete.coords else 0.0
        allowed = f" (rounding in this dtype explains {bound:.1e})" if bound > 2 * TOLERANCE else ""
        yield Line("checked", f"{where} equal stock transformers within {largest:.1e} nats{allowed}")


# --- the published protocol ---


def _published_lines(complete: xr.Dataset, study: Mapping[str, Any]) -> Iterator[Line]:
    """The study's table, and how many equal splits of the slices meet its rule."""
    table = success_table(complete, study)
    yield from (Line("", line) for line in table.to_string().splitlines())
    if not {"even", "odd"} <= set(complete.subset.values):
        return
    rate = complete.success.astype(float).mean("trial")
    differences = (rate.sel(subset="even") - rate.sel(subset="odd")).max("layer").values
    n_met = int((differences > PATTERN).sum())
    text = f"even − odd success rate > {PATTERN} at {n_met} of {format_count(len(differences), 'checkpoint')}"
    splits = find_equal_splits(complete)
    if splits is None:
        test = how_to_test(complete.sizes["head"])[0]
        how = f"not tested: no other equal split was run (--subsets none even odd {test})"
        yield Line(
            "rule",
            fitting(f"{text}; {how}", f"{text}; not tested (--subsets none even odd {test})", f"{text}; not tested"),
        )
        return
    values = rate.isel(checkpoint=-1).transpose("layer", "subset").values
    met = (values[:, splits.halves] - values[:, splits.rests] > PATTERN).any(0)
    n = f"{int(met.sum())} of {len(met):,} equal splits"
    yield Line("rule", fitting(f"{text}; at {_labels(complete)[-1]} {n} meet it", f"{text}; {n}"))


# --- numbers in words ---


def format_estimate(mean: float, low: float, high: float) -> str:
    """`+3.5 [+2.1, +4.8]`, with two digits of the interval's half-width and no more; the mean alone without one."""
    if math.isnan(low):
        return f"{mean:+.2f}"
    half = max((high - low) / 2, 1e-9)
    digits = min(max(1 - math.floor(math.log10(half)), 0), 3)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def format_p(p: float) -> str:
    """`p < .001`, `p = .004`, `p = .41`, `p = 1.00`."""
    if p < 0.001:
        return "p < .001"
    digits = 3 if p < 0.1 else 2
    return f"p = {p:.{digits}f}".replace("= 0.", "= .")


def _labels(complete: xr.Dataset) -> list[str]:
    return [str(label) for label in complete.checkpoint.values]

"""The answer first: what a patched run shows, in a few lines."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool

from ...measures.logit_diff import PATTERN, best_layer, effect, finished, success
from ...measures.training import TrainingPoints
from ...runtime.format import format_count
from ...statistics.bootstrap import LEVEL
from ...statistics.head_effects import HeadEffect, head_effects, rank_heads, telling_checkpoint
from ...statistics.head_subsets import all_subset_rows
from ...statistics.hypotheses import parity_onset
from ...statistics.joint import JointTest
from ...statistics.means import interval
from ...statistics.onset import HALF, first_sustained, known_steps
from ...statistics.parity_onset import ParityOnset
from ...statistics.permutation import (
    EqualSplits,
    find_equal_splits,
    joint_parity,
    meeting_the_rule,
    permutation_p,
)
from ...statistics.selection import held_out
from ...study.patch_settings import PatchSettings
from ...study.reading import READING, Reading
from ...study.study import TOLERANCE
from ...study.subsets import count_halves
from .parity import how_to_test
from .primary import CHANGED, answer, primary_tests, stamps
from .published import success_table
from .shares import together_texts

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
    reading: Reading = READING,
) -> list[str]:
    """At most 12 lines of at most 100 columns about a run; the table of the published protocol is as long as its run.

    `study` is the store's record of what was asked (`model` and `task` are read); `page` is where the report was
    written.
    """
    lines = [str(line) for line in verdict_lines(run, settings, study, reading)]
    # A path is typed or clicked: it is never cut.
    return [*lines, f"{'page':<{LABEL}}{page}"] if page else lines


def verdict_lines(
    run: xr.Dataset, settings: PatchSettings, study: Mapping[str, Any], reading: Reading = READING
) -> list[Line]:
    """The same by its parts, without the page."""
    complete = finished(run)
    question = Line("", _question(complete, settings, study))
    if not complete.sizes["checkpoint"]:
        return [question, Line("task", "no checkpoint is finished yet")]
    if settings.protocol == "published":
        return [question, *_published_lines(complete, study)]
    judges = None
    if (prompts := reading.prompts(complete.sizes["trial"])) is not None:
        question = Line("", _question(complete, settings, study, f"{len(prompts[1])} of "))
        judges, complete = (complete.isel(trial=chosen) for chosen in prompts)
    lines = [question, Line("task", _task(complete)), *_head_lines(complete, settings, reading, judges)]
    lines += [*_layer_line(complete, settings, judges), *_parity_line(complete, settings, judges)]
    lines += list(_primary_line(complete, settings, study)) or list(_rule_line(complete, settings, judges))
    lines.append(Line("seeds", "one training run: effects and onsets of another seed can differ (headlapse compare)"))
    return [*lines, *_check_line(complete)]


def _question(complete: xr.Dataset, settings: PatchSettings, study: Mapping[str, Any], some: str = "") -> str:
    """What was asked; `some` is how many of the prompt pairs are shown, where not all are."""
    labels, n = _labels(complete), complete.sizes["trial"]
    what = f"{Path(study['model']).name} on {Path(study['task']).name}"
    between = f" ({labels[0]} to {labels[-1]})" if len(labels) > 1 else f" ({labels[0]})" if labels else ""
    pairs, checkpoints = f"{some}{format_count(n, 'prompt pair')}", format_count(len(labels), "checkpoint")
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


def _head_lines(
    complete: xr.Dataset, settings: PatchSettings, reading: Reading, judges: xr.Dataset | None
) -> Iterator[Line]:
    """The heads with the largest effects at the last checkpoint, or where none is significant there, at the checkpoint
    of the largest significant effect.  `judges` are the prompts that chose them, None where these did themselves."""
    effects = head_effects(complete, settings, reading.correction, reading.margin)
    if effects.empty:
        yield Line("heads", _no_single_heads(settings))
        return
    last, at = _labels(complete)[-1], telling_checkpoint(effects)
    heads = rank_heads(effects, at or last, reading.margin)
    if judges is not None:
        heads = _in_order_of(heads, head_effects(judges, settings, reading.correction), at or last)
    if complete.sizes["trial"] == 1:
        yield Line("heads", f"largest effects at {last} (nats); one prompt: no interval, no p-value")
        yield from (Line(f"  {head}", f"{head.effect:+.2f}") for head in heads[:SHOWN])
    elif at is None:
        largest = f"{heads[0]} {format_estimate(heads[0].effect, heads[0].low, heads[0].high)}"
        none = f"none of {format_count(len(heads), 'head')} has a lasting significant effect"
        n_none = sum(head.has_none for head in heads)
        shown = f"; {n_none} surely within ±{reading.margin:g} nats" if n_none else ""
        texts = (f"{none}{shown}; largest at {last}: {largest}", f"{none}{shown}; largest: {largest}")
        yield Line("heads", fitting(*texts, f"{none}{shown}", none))
    else:
        significant = [head for head in heads if head.is_significant]
        counts = f"{len(significant)} of {len(heads)} significant at {at}{'' if at == last else f', none at {last}'}"
        n_none = sum(head.has_none for head in heads)
        shown = f", {n_none} none (±{reading.margin:g})" if n_none else ""
        chosen = "" if len(heads) <= SHOWN else ", inflated: --select-on" if judges is None else ", chosen on others"
        yield Line(
            "heads",
            fitting(
                f"{counts}{shown}; mean effect (nats, joint 95 % intervals){chosen}; adjusted p",
                f"{counts}{shown}; nats [joint 95 % interval]{chosen}; adjusted p",
                f"{counts}{shown}; nats [joint 95 %]{chosen.partition(':')[0]}; adjusted p",
                f"{counts}; nats [joint 95 %]{chosen.partition(':')[0]}; adjusted p",
                counts,
            ),
        )
        yield from _table(significant[:SHOWN], len(_labels(complete)), reading.margin)


def _in_order_of(heads: Sequence[HeadEffect], effects: pd.DataFrame, checkpoint: str) -> list[HeadEffect]:
    """The heads in the order of the size of their effects on other prompts."""
    size = effects["effect"].xs(checkpoint, level="checkpoint").abs()
    return sorted(heads, key=lambda head: -float(size[head.layer, head.head]))


def _no_single_heads(settings: PatchSettings) -> str:
    if settings.joint and len(settings.layers) > 1:
        return f"patched in {len(settings.layers)} layers at once; for the effects of single heads leave --joint out"
    return "not patched one by one; for the effects of single heads: --subsets each all"


def _table(heads: Sequence[HeadEffect], n_checkpoints: int, margin: float) -> Iterator[Line]:
    """A line a head, in columns."""
    cells = [
        [
            format_estimate(head.effect, head.low, head.high),
            format_p(head.p_adjusted),
            "" if n_checkpoints == 1 else _since_when(head, margin),
            "" if math.isnan(head.share) else f"{100 * head.share:.0f} % of layer {head.layer}",
        ]
        for head in heads
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for head, row in zip(heads, cells, strict=True):
        columns = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True) if width]
        yield Line(f"  {head}", "  ".join(columns).rstrip())


def _since_when(head: HeadEffect, margin: float) -> str:
    """From when on its effect is significant and of the margin's size: smaller ones have no onset worth a date."""
    if abs(head.effect) < margin:
        return f"below {margin:g} nats"
    if head.by is None:
        return "at single checkpoints only"
    return "from the start" if head.after is None else f"from {_between(head.after, head.by)}"


# --- the layer, even and odd ---


def _layer_line(complete: xr.Dataset, settings: PatchSettings, judges: xr.Dataset | None) -> Iterator[Line]:
    """All heads of the layer where they have the largest effect at the last checkpoint: chosen by `judges`, else on one
    half of the prompts and estimated on the other, both ways (`selection.held_out`)."""
    if "all" not in complete.subset.values:
        return
    layer = _leading_layer(complete if judges is None else judges, settings)
    last = complete.isel(checkpoint=-1)
    if judges is None and (apart := _held_out_apart(last, settings)) is not None:
        yield Line("layer", apart)
        return
    nats = effect(last, settings.direction).sel(layer=layer, subset="all").values.astype(float)
    low, high = (float(values[0]) for values in interval(nats[None]))
    mean = f"all heads {format_estimate(float(nats.mean()), low, high)} nats"
    restored = _restored(last.sel(layer=layer, subset="all"), settings)
    text = f"{mean}, not clear of zero" if low <= 0 <= high else f"{mean}, {restored}"
    together = _together(complete, settings, layer)
    text = fitting(*(f"{text}; {words}" for words in together), f"{text} at {_labels(complete)[-1]}", text)
    where = f"layers {settings.layers[0]}-{settings.layers[-1]}" if settings.joint else f"layer {layer}"
    yield Line(where if len(where) < LABEL else "layers", text)


def _held_out_apart(last: xr.Dataset, settings: PatchSettings) -> str | None:
    """The held-out effect where halves of the prompts choose different layers; None where they agree, for then it is
    that of all prompts at that layer."""
    moved = effect(last, settings.direction).sel(subset="all").transpose("layer", "trial")
    held = held_out(moved.values.astype(float))
    if held is None or held.agrees:
        return None
    layers = " and ".join(str(int(last.layer.values[place])) for place in held.layers)
    estimate = format_estimate(held.effect, held.low, held.high)
    text = f"halves of the prompts choose layers {layers}; all heads of the other half's choice {estimate} nats"
    return fitting(text, f"halves choose layers {layers}; all heads, held out {estimate} nats")


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


def _together(complete: xr.Dataset, settings: PatchSettings, layer: int) -> tuple[str, ...]:
    """How the layer's heads act together, the longest words first; nothing where not all subsets were run."""
    rows = all_subset_rows(complete.mask.values)
    if rows is None:
        return ()
    moved = effect(complete.isel(checkpoint=-1), settings.direction).sel(layer=layer).transpose("subset", "trial")
    return together_texts(moved.values[rows].astype(float), layer)


def _parity_line(complete: xr.Dataset, settings: PatchSettings, judges: xr.Dataset | None) -> Iterator[Line]:
    """Even against odd heads at the leading layer of the last checkpoint, with what the permutation test allows to be
    said of it.

    One test at 5 %, which depends on nothing but the splits that were run: the leading layer at the last checkpoint,
    chosen by the effect of all heads, which no relabelling changes; where so few splits can show nothing in one layer,
    the joint test of all layers and checkpoints.
    """
    if not {"even", "odd"} <= set(complete.subset.values):
        return
    layer = _leading_layer(complete if judges is None else judges, settings)
    logit_diff = complete.logit_diff.isel(checkpoint=-1).sel(layer=layer)
    nats = (logit_diff.sel(subset="even") - logit_diff.sel(subset="odd")).values.astype(float)
    low, high = (float(values[0]) for values in interval(nats[None]))
    difference = f"{format_estimate(float(nats.mean()), low, high)} nats"
    difference += "" if settings.joint else f" in layer {layer}"
    splits, joint = find_equal_splits(complete), joint_parity(complete)
    if splits is None or joint is None:
        words = how_to_test(complete.sizes["head"], settings.n_groups)[0]
        text = f"not tested: {difference}, no null was run"
        yield Line("even/odd", fitting(f"{text} (--subsets even odd all {words})", f"{text} (--subsets {words})", text))
        return
    yield Line("even/odd", fitting(*_parity_texts(complete, settings, layer, splits, joint, difference)))


def _parity_texts(
    complete: xr.Dataset, settings: PatchSettings, layer: int, splits: EqualSplits, joint: JointTest, difference: str
) -> Iterator[str]:
    """The answer, the longest wording first."""
    n_splits = f"{splits.n_splits - 1:,} random" if splits.sampled else f"{len(splits.halves):,}"
    joint_p = f"joint test {format_p(joint.p)}"
    if splits.least_p > 1 - LEVEL and joint.p <= 1 - LEVEL:
        yield f"yes, all layers together ({joint_p}): {difference}"
        yield f"yes, all layers together ({joint_p})"
    if splits.least_p > 1 - LEVEL:
        yield from _too_few_texts(complete.sizes["head"], settings.n_groups, splits, difference, joint_p)
        return
    onset = parity_onset(complete, settings.direction, layer)
    p = permutation_p(complete, splits, layer)
    answer, since = _parity_answer(p, joint, onset, TrainingPoints.of(known_steps(complete)))
    yield f"{answer}: {difference}{since}, permutation {format_p(p)} of {n_splits} splits; {joint_p}"
    yield f"{answer}: {difference}{since}, {format_p(p)} of {n_splits} splits; {joint_p}"
    yield f"{answer}: {difference}{since}, permutation {format_p(p)} of {n_splits} splits"
    yield f"{answer}: {difference}{since}, {format_p(p)} of {n_splits} splits"
    yield f"{answer}: {difference}, {format_p(p)} of {n_splits} splits"


def _too_few_texts(n_heads: int, n_groups: int, splits: EqualSplits, difference: str, joint_p: str) -> Iterator[str]:
    """That so few splits can show nothing in one layer, and which words of `--subsets` can, the longest first."""
    if 2 / count_halves(n_heads, n_groups) > 1 - LEVEL:
        few = f"{n_heads} heads have too few equal splits"
        yield f"cannot tell: {difference}, {few}; {joint_p}"
        yield f"cannot tell: {few}; {joint_p}"
        return
    few, word = f"{splits.n_splits - 1:,} splits are too few", how_to_test(n_heads, n_groups)[0]
    yield f"cannot tell: {difference}, {few} (--subsets even odd all {word}); {joint_p}"
    yield f"cannot tell: {difference}, {few} (--subsets {word}); {joint_p}"
    yield f"cannot tell: {difference}, {few}: --subsets {word}"
    yield f"cannot tell: {few}: --subsets {word}; {joint_p}"


def _parity_answer(p: float, joint: JointTest, onset: ParityOnset | None, points: TrainingPoints) -> tuple[str, str]:
    """Yes, no or that it cannot be told, and since when.  No only where a pattern is excluded (`ParityOnset.absent`) or
    at least one that carries the whole layer, and nothing elsewhere speaks for one."""
    if p <= 1 - LEVEL:
        if onset is None or onset.by is None or not onset.lasts:
            return "yes", ""
        return "yes", f" from {_between_points(onset.after, onset.by, points)}"
    if onset is None:
        return "cannot tell", ""
    if onset.by is None and onset.absent[-1] and joint.p > 1 - LEVEL:
        return "no pattern", ""
    if onset.by is None and onset.neither_carries and joint.p > 1 - LEVEL:
        return "no, neither carries the layer", ""
    return f"cannot tell (power {100 * onset.power:.0f} %)", ""


def _between_points(after: int | None, by: int, points: TrainingPoints) -> str:
    """`step 48-56`, or labels: between which two checkpoints something starts."""
    if points.labels:
        return points.name(by) if after is None else f"{points.name(after)} to {points.name(by)}"
    return f"step {by}" if after is None else f"step {after}-{by}"


def _rule_line(complete: xr.Dataset, settings: PatchSettings, judges: xr.Dataset | None) -> Iterator[Line]:
    """The study's rule, and how many of all equal splits of the leading layer meet it."""
    met = meeting_the_rule(complete, _leading_layer(complete if judges is None else judges, settings))
    if met is not None:
        rate, n_met, n = met
        splits = f"{n_met:,} of {n:,} equal splits differ by more than the study's {PATTERN}"
        yield Line("rule", fitting(f"even − odd success rate {rate:+.2f}; {splits}", splits))


def _primary_line(complete: xr.Dataset, settings: PatchSettings, study: Mapping[str, Any]) -> Iterator[Line]:
    """What was named before anything was patched, and what came of it; of several the first, and how many more."""
    record = complete.attrs.get("primary")
    if record is None:
        return
    tests = primary_tests(complete, settings, study)
    if not tests:
        yield Line("primary", CHANGED)
        return
    primary, test = tests[0]
    text = f"{primary}: not patched yet"
    if test is not None:
        p = "" if math.isnan(test.p) else f", {format_p(test.p)}"
        text = f"{primary}: {answer(test)}, {format_estimate(test.effect, test.low, test.high)} nats{p}"
    text += f"; {len(tests) - 1} more: --verbose" if len(tests) > 1 else ""
    yield Line("primary", fitting(*(f"{text} {written}" for written in stamps(record)), text))


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

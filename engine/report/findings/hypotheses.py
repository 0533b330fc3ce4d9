"""The published study's hypotheses, as a table of verdicts with the evidence for each."""

import pandas as pd
import xarray as xr

from ...measures.logit_diff import best_layer
from ...statistics.bootstrap import LEVEL
from ...statistics.changepoint import GAP, Shape
from ...statistics.hypotheses import FEWEST, SUPPORTED, THIRDS, Evaluation, hypotheses
from ...statistics.onset import Onset, known_steps
from ...study.patch_settings import PatchSettings
from .finding import Finding
from .onsets import format_interval

HOW_TO_TEST = "--subsets splits:200"
"""What samples a permutation null."""


def hypotheses_finding(run: xr.Dataset, settings: PatchSettings) -> Finding | None:
    """Verdicts at the layer with the largest effect of all heads at the last checkpoint, and beneath them each evidence
    once, with the hypotheses that it speaks to.

    None where even and odd heads were not patched, or fewer than three checkpoints of known steps are finished.
    """
    complete = known_steps(run)
    if complete.sizes["checkpoint"] < FEWEST:
        return None
    layer = int(best_layer(complete, settings.direction).values[-1])
    evaluation = hypotheses(complete, settings.direction, layer)
    if evaluation is None:
        return None
    numbers = hypotheses_table(evaluation)
    notes = [f"the study's hypotheses for even against odd heads of layer {layer}, by thirds of the steps to the last"]
    if evaluation.p is None:
        notes.append(f"cannot tell: no null was run ({HOW_TO_TEST})")
    for evidence, alike in numbers.groupby("evidence", sort=False):
        notes.append(f"{', '.join(str(name).split()[0] for name in alike.index)}: {evidence}")
    table = numbers[["verdict"]].rename_axis(None)
    return Finding("The study's hypotheses", table, tuple(notes), "hypotheses", numbers)


def hypotheses_table(evaluation: Evaluation) -> pd.DataFrame:
    """`verdict` and `evidence` in words, by `hypothesis`."""
    when, how = _onset_evidence(evaluation), _shape_evidence(evaluation.shape)
    rows = {}
    for name, verdict in evaluation.verdicts.items():
        evidence = when if name in THIRDS else how
        if evaluation.p is not None and evaluation.p > 1 - LEVEL and verdict != SUPPORTED:
            evidence += "; other equal splits differ as much"
        rows[name] = {"verdict": verdict, "evidence": evidence}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("hypothesis")


def _onset_evidence(evaluation: Evaluation) -> str:
    series = evaluation.series
    thirds = " or ".join(evaluation.log_thirds) or "in no third"
    text = (
        f"{series.name} ({series.unit}) starts {_format_onset(evaluation.onset, evaluation.one_prompt)}; "
        f"over log steps {thirds}"
    )
    return text if evaluation.p is None else f"{text}; permutation p = {evaluation.p:.2g}"


def _format_onset(onset: Onset, one_prompt: bool) -> str:
    if one_prompt:
        return f"{onset}, one prompt: no interval"
    never = onset.significant is None
    significant = "significant at no checkpoint" if never else f"significant from step {onset.significant:,}"
    return f"{onset}, interval {format_interval(onset.low, onset.high)}, {significant}"


def _shape_evidence(shape: Shape) -> str:
    if not shape.bic:
        return "too few checkpoints to tell shapes apart"
    least = min(shape.bic.values())
    above = ", ".join(f"{name} {value - least:.0f}" for name, value in shape.bic.items())
    hidden = f"; {shape.gap:.0%} of the steps lie unobserved where a step fits best" if shape.gap > GAP else ""
    noise = "" if shape.changes else "; other prompts might not show the change"
    return f"{shape.verdict}: BIC above the best: {above}{hidden}{noise}"

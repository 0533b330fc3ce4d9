"""The published study's hypotheses, as a table of verdicts with the evidence for each."""

import pandas as pd
import xarray as xr

from ...measures.logit_diff import best_layer
from ...measures.training import STEPS, TrainingPoints
from ...statistics.bootstrap import LEVEL
from ...statistics.changepoint import GAP, Shape
from ...statistics.hypotheses import FEWEST, THIRDS, Evaluation, hypotheses
from ...statistics.onset import known_steps
from ...statistics.parity_onset import ParityOnset
from ...study.patch_settings import PatchSettings
from .finding import Finding
from .parity import how_to_test


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
    points = TrainingPoints.of(complete)
    numbers = hypotheses_table(evaluation, points)
    whose = f"the study's hypotheses for even against odd heads of layer {layer}"
    notes = [f"{whose}, by thirds of the {points.unit} to the last"]
    if evaluation.onset is None:
        words = how_to_test(complete.sizes["head"], settings.n_groups)[0]
        notes.append(f"cannot tell: no null was run (--subsets even odd all {words})")
    for evidence, alike in numbers.groupby("evidence", sort=False):
        notes.append(f"{', '.join(str(name).split()[0] for name in alike.index)}: {evidence}")
    table = numbers[["verdict"]].rename_axis(None)
    return Finding("The study's hypotheses", table, tuple(notes), "hypotheses", numbers)


def hypotheses_table(evaluation: Evaluation, points: TrainingPoints = STEPS) -> pd.DataFrame:
    """`verdict` and `evidence` in words, by `hypothesis`."""
    when, how = _onset_evidence(evaluation, points), _shape_evidence(evaluation.shape)
    if evaluation.onset is not None and not evaluation.onset.lasts:
        how += "; without a pattern that lasts nothing is said of its shape"
    rows = {
        name: {"verdict": verdict, "evidence": when if name in THIRDS else how}
        for name, verdict in evaluation.verdicts.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("hypothesis")


def _onset_evidence(evaluation: Evaluation, points: TrainingPoints) -> str:
    onset = evaluation.onset
    if onset is None:
        return "among no other equal splits can even against odd stand out"
    thirds = " or ".join(evaluation.log_thirds) or "in no third"
    p = f"permutation p = {onset.p:.2g} at the last checkpoint"
    power = "" if onset.p <= 1 - LEVEL else f", power {onset.power:.0%}"
    return f"{parity_onset_text(onset, points)}; over log {points.unit} {thirds}; {p}{power}"


def parity_onset_text(onset: ParityOnset, points: TrainingPoints) -> str:
    """Between which checkpoints even against odd starts to stand out among the equal splits, and how sure that is."""
    size = f"a pattern of {onset.size:.2g} nats"
    until = f"{size} is nowhere excluded"
    if onset.after is not None:
        until = f"{size} is excluded up to {points.words(onset.after)}"
    if onset.by is None:
        if onset.is_absent:
            return f"even − odd stands out at no checkpoint, and {size} is excluded at each"
        few = f" (of so few splits p is at least {onset.least_p:.2g})" if onset.least_p > 1 - LEVEL else ""
        return f"even − odd stands out at no checkpoint{few}; {until}"
    until = until.replace("is nowhere excluded", "is excluded at none before")
    gone = "" if onset.lasts else ", not at the last"
    return f"even − odd stands out among the equal splits from {points.words(onset.by)} on{gone}; {until}"


def _shape_evidence(shape: Shape) -> str:
    if not shape.bic:
        return "too few checkpoints to tell shapes apart"
    least = min(shape.bic.values())
    above = ", ".join(f"{name} {value - least:.0f}" for name, value in shape.bic.items())
    hidden = f"; {shape.gap:.0%} of the steps lie unobserved where a step fits best" if shape.gap > GAP else ""
    noise = "" if shape.changes else "; other prompts might not show the change"
    return f"{shape.verdict}: BIC above the best: {above}{hidden}{noise}"

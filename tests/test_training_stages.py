"""A training of several stages is judged as one whose steps were counted on by hand, and told by labels."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from headlapse.engine.measures.logit_diff import finished
from headlapse.engine.measures.training import TrainingPoints, positions_of
from headlapse.engine.report.findings.hypotheses import hypotheses_finding
from headlapse.engine.report.findings.onsets import onsets_finding
from headlapse.engine.statistics import comparison
from headlapse.engine.statistics.hypotheses import hypotheses
from headlapse.engine.statistics.onset import known_steps, onsets
from headlapse.engine.study.patch_settings import PatchSettings
from tests.test_onset import run_of

STAGES = ["stage1"] * 4 + ["stage2-ingredient1"] * 3 + ["lc-4k-to-32k"] * 2
STEPS = np.array([10, 20, 30, 40, 0, 5, 25, 3, 9])
POSITIONS = np.array([10, 20, 30, 40, 40, 45, 65, 68, 74])
ORDER = [5, 0, 8, 3, 6, 1, 7, 2]
"""How checkpoints happen to lie on the axis; all but the first of stage 2, which is where stage 1 ends."""

JUMP = 4.0 * (POSITIONS >= 65)
SETTINGS = PatchSettings(layers=(3, 4))


@pytest.fixture(scope="module")
def staged() -> xr.Dataset:
    run = run_of(JUMP, JUMP, STEPS)
    labels = [f"{stage}-step{step}" for stage, step in zip(STAGES, STEPS, strict=True)]
    run = run.assign_coords(checkpoint=labels, stage=("checkpoint", STAGES), tokens_seen=("checkpoint", [-1] * 9))
    return run.isel(checkpoint=ORDER)


@pytest.fixture(scope="module")
def by_hand() -> xr.Dataset:
    """The same training, its steps counted on; nothing says that there were stages."""
    return run_of(JUMP, JUMP, POSITIONS).isel(checkpoint=sorted(ORDER))


def test_checkpoints_come_in_order_of_their_stages_with_positions_counted_on(staged: xr.Dataset) -> None:
    complete = finished(staged)
    assert positions_of(complete).tolist() == [POSITIONS[at] for at in sorted(ORDER)]
    assert complete.step.values.tolist() == [STEPS[at] for at in sorted(ORDER)]
    later = complete.isel(checkpoint=slice(4, None))
    assert positions_of(finished(later)).tolist() == [45, 65, 68, 74], "a part keeps the positions of the whole"


def test_it_is_dated_as_the_same_training_without_stages(staged: xr.Dataset, by_hand: xr.Dataset) -> None:
    numbers = [
        "measure",
        "layer",
        "unit",
        "after",
        "by",
        "low",
        "high",
        "significant",
        "censored",
        "shape",
        "shape_log",
    ]
    one, other = onsets(staged, "denoise"), onsets(by_hand, "denoise")
    pd.testing.assert_frame_equal(one[numbers], other[numbers])
    row = one.set_index(["measure", "layer", "unit"]).loc[("even − odd divergence", 4, "nats")]
    assert (row["after"], row["by"]) == (45, 65)
    assert row["onset"] == "stage2-ingredient1-step5 to stage2-ingredient1-step25"
    judged, same = hypotheses(staged, "denoise", 4), hypotheses(by_hand, "denoise", 4)
    assert judged is not None and same is not None
    assert (judged.end, judged.verdicts, judged.shape.verdict) == (74, same.verdicts, same.shape.verdict)


def test_it_is_compared_with_others_at_the_same_point_of_the_whole_training(
    staged: xr.Dataset, by_hand: xr.Dataset
) -> None:
    runs = [comparison.TrainingRun(name, name, run, SETTINGS) for name, run in (("a", staged), ("b", by_hand))]
    table = comparison.compare(runs).timeline.reset_index()
    positions = [table[table["training_run"] == name]["position"].tolist() for name in "ab"]
    assert positions[0] == positions[1] == [POSITIONS[at] for at in sorted(ORDER)]


def test_sentences_say_labels_where_steps_alone_do_not_tell(staged: xr.Dataset, by_hand: xr.Dataset) -> None:
    said, plain = (str(onsets_finding(run, SETTINGS)) for run in (staged, by_hand))
    assert "stage2-ingredient1-step5 to stage2-ingredient1-step25" in said and "checkpoints between which" in said
    assert "45 to 65" in plain and "steps between which" in plain
    assert "thirds of the steps" in str(hypotheses_finding(staged, SETTINGS))


def test_points_are_labels_only_where_steps_do_not_tell(staged: xr.Dataset, by_hand: xr.Dataset) -> None:
    assert TrainingPoints.of(by_hand) == TrainingPoints({})
    assert TrainingPoints.of(staged).words(74) == "lc-4k-to-32k-step9"
    tokens = by_hand.assign_coords(step=("checkpoint", [-1] * 8), tokens_seen=("checkpoint", np.arange(8) * 10**9))
    points = TrainingPoints.of(tokens)
    assert points.unit == "tokens" and points.name(10**9) == "c1"
    assert known_steps(tokens).sizes["checkpoint"] == 8


def test_branches_beside_each_other_are_not_dated(staged: xr.Dataset) -> None:
    """As a store from before they were refused may hold them."""
    stages = ["stage2-ingredient2" if stage == "lc-4k-to-32k" else stage for stage in staged.stage.values.tolist()]
    assert known_steps(staged.assign_coords(stage=("checkpoint", stages))).stage.values.tolist() == ["stage1"] * 4

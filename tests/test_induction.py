"""Roles in models in which induction grows: who has it, whose patch matters, when both begin, and over seeds."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import headlapse
from headlapse.engine.capture.run import cache_series
from headlapse.engine.checkpoints.resolve import resolve
from headlapse.engine.mechanism.role_summary import (
    causal_heads,
    heads_in_role,
    in_role,
    loss_bump,
    role_shares,
    roles_frame,
)
from headlapse.engine.mechanism.run import make_plan, measure_series, wanted
from headlapse.engine.mechanism.store import open_mechanism
from headlapse.engine.report.findings.mechanism import mechanism_summary
from headlapse.engine.runtime.resources import Machine
from headlapse.engine.store.store import Store
from headlapse.engine.study.study import Study
from tests.grown_induction import N_HEADS, STEPS, grow

MATTERS = 0.5
"""Nats."""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    """The checkpoints of seed 0, and the training loss before each; a dozen seconds."""
    folder = tmp_path_factory.mktemp("grown") / "grown-seed0"
    return folder, grow(folder, seed=0)


@pytest.mark.slow
def test_induction_heads_are_those_whose_patch_matters_and_they_form_at_the_loss_bump(
    tmp_path: Path, grown: tuple[Path, dict[int, float]]
) -> None:
    """The bump is the shortest stretch over which the loss on repeated tokens falls by three quarters of its fall; the
    training loss, on other documents, is steepest in it."""
    folder, losses = grown
    study = Study(str(folder), task="induction", trials=15)
    list(cache_series(study, resolve(study.model, [], tmp_path), tmp_path / "s.zarr", tmp_path, Machine()))
    store = Store(tmp_path / "s.zarr")
    plan = make_plan(store, ["patching", "roles"])
    measured = open_mechanism(store, plan.settings)
    labels = wanted(store, list(store.complete()))
    outcomes = list(measure_series(store, plan, measured, labels, tmp_path, Machine(), lambda _n: None))
    assert [outcome.problem for outcome in outcomes] == [None] * len(STEPS)
    run = measured.load()

    induction = set(heads_in_role(run, "induction"))
    effect = run.effect.isel(checkpoint=-1).mean("trial")
    assert induction and {layer for layer, _ in induction} == {1}
    assert induction == {tuple(place) for place in np.argwhere(np.abs(effect.values) > MATTERS).tolist()}
    final = run.isel(checkpoint=[-1])
    named = {(head.layer, head.head): head.roles for head in causal_heads(final) if abs(head.effect) > MATTERS}
    assert set(named) == induction and all("induction" in roles for roles in named.values())
    [share] = [share for share in role_shares(final) if share.role == "induction"]
    assert share.share > 0.95

    bump = loss_bump(run)
    assert bump is not None
    after, by = (int(label.removeprefix("step")) for label in (bump.after, bump.by))
    slopes = {(start, end): (losses[start] - losses[end]) / (end - start) for start, end in pairwise(STEPS)}
    steepest = max(slopes, key=lambda stretch: slopes[stretch])
    assert after <= steepest[0] and steepest[1] <= by and by - after <= 120
    frame = roles_frame(run).loc["step360"].xs("induction", level="role")
    onsets = {
        (int(row["after"].removeprefix("step")), int(row["by"].removeprefix("step")))
        for head, row in frame.iterrows()
        if head in induction
    }
    assert all(after <= start and end <= by for start, end in onsets), (onsets, bump)
    assert not in_role(run).sel(role="induction", checkpoint="step0").any()
    assert heads_in_role(run, "previous token") and len(heads_in_role(run, "previous token")) < N_HEADS

    text = "\n".join(mechanism_summary(run, plan.settings, store.study))
    assert "  induction, copying" in text and f"between {bump.after} and {bump.by}" in text


@pytest.mark.slow
def test_induction_is_found_in_each_of_three_seeds_whatever_the_numbers_of_its_heads(
    tmp_path: Path, grown: tuple[Path, dict[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, captured, patched and measured as a user would; no two seeds need have the role in the same heads."""
    monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path / "cache"))
    ends = [f"step{STEPS[0]}", f"step{STEPS[-1]}"]
    stores = []
    for folder in (grown[0], tmp_path / "grown-seed1", tmp_path / "grown-seed2"):
        if not folder.exists():
            grow(folder, int(folder.name[-1]), (STEPS[0], STEPS[-1]))
        store = headlapse.cache(folder, task="induction", trials=8, checkpoints=ends)
        store.patch(subsets=["each", "all"])
        store.mechanism(parts="roles")
        stores.append(store)
    found = headlapse.compare(*stores)
    induction = {name: set(heads["induction"]) for name, heads in found.roles.items()}
    assert len(induction) == 3 and all(induction.values())
    for name, row in found.table.iterrows():
        assert row["heads"][0] in induction[str(name)], "the head whose patch matters most has the role"
    [line] = [line for line in found.verdict() if line.startswith("roles")]
    assert re.search(r"induction in 3 of 3", line), line
    assert len(found.verdict()) <= 12
    assert "induction in 3 of 3" in found.report().read_text()

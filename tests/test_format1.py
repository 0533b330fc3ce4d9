"""Stores of format 1, written by headlapse 0.1.0 as it was first released, still open, answer and go on.

`data/format1-store.zip` holds two checkpoints of tests.models' tiny GPT-NeoX (layer 2 alone kept), the patched runs
`default` and `lattice`, and the mechanism's attribution.
"""

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from headlapse.engine.checkpoints.files import sha256
from headlapse.engine.mechanism.store import MechanismRun, mechanism_path
from headlapse.engine.replay.protocols import CORRECTED
from headlapse.engine.report.page import write_report
from headlapse.engine.runtime.resources import Machine
from headlapse.engine.store.store import Store
from headlapse.engine.study.patch_settings import PatchSettings
from tests.models import save, tiny, tiny_tokenizer

pytestmark = pytest.mark.thorough

LABELS = ("step0", "step10")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with zipfile.ZipFile(Path(__file__).parent / "data" / "format1-store.zip") as archive:
        archive.extractall(tmp_path)
    return Store(tmp_path / "store.zarr")


def test_its_runs_and_their_settings_are_read(store: Store) -> None:
    assert store.attrs["headlapse_format"] == 1
    assert list(store.complete()) == list(LABELS) and set(store.patch_names()) == {"default", "lattice"}
    run = store.patch("default")
    assert run.settings == PatchSettings(layers=(2,), subsets=("even", "odd", "all", "each"))
    values = run.dataset().logit_diff
    assert values.dims == ("checkpoint", "layer", "subset", "trial") and values.shape == (2, 1, 11, 2)
    np.testing.assert_array_equal(
        values[1, 0, :3],
        np.float32(
            [
                [-0.829822301864624, -0.7423679232597351],
                [-0.26468247175216675, -0.7480761408805847],
                [-0.6023200154304504, -0.5547220706939697],
            ]
        ),
    )
    assert float(values.astype(float).sum()) == pytest.approx(31.10210970044136, abs=1e-9)
    assert list(MechanismRun(mechanism_path(store)).complete()) == list(LABELS)


def test_its_activations_open_in_xarray(store: Store) -> None:
    opened = xr.open_zarr(store.path, consolidated=False)
    assert opened.z.dims == ("checkpoint", "layer", "run", "trial", "position", "head", "head_dim")
    assert np.isfinite(opened.z.sel(checkpoint="step10", layer=2, run="clean").values).any()


@pytest.mark.slow
def test_its_report_is_written(store: Store, tmp_path: Path) -> None:
    assert write_report(store, tmp_path / "report", "lattice")
    assert "L2.H" in (tmp_path / "report" / "index.html").read_text()


def test_it_is_patched_again_to_the_same_numbers(store: Store, tmp_path: Path) -> None:
    """With the very weights: made anew where this machine keeps them, since the store remembers another's folders."""
    checkpoints = {}
    for seed, label in enumerate(LABELS):
        directory = tmp_path / "series" / label
        save(tiny("neox-parallel", seed), directory, tokenizer=tiny_tokenizer())
        weights = directory / "model.safetensors"
        location = {"model": str(directory.parent), "location": str(directory)}
        checkpoints[label] = {**store.provenance(label), **location, "sha256": {weights.name: sha256(weights)}}
    zarr.open_group(store.path, mode="r+").attrs["checkpoints"] = checkpoints
    store = Store(store.path)
    as_then = replace(CORRECTED.default, subsets=("even", "odd", "all", "each"))
    plan = CORRECTED.make_plan(as_then, store)
    run = CORRECTED.open_run(store, plan, "again", False)
    outcomes = list(CORRECTED.patch_series(store, plan, run, list(LABELS), tmp_path, Machine(), lambda _runs: None))
    assert [outcome.problem for outcome in outcomes] == [None, None]
    again, before = (store.patch(name).dataset().logit_diff.values for name in ("again", "default"))
    assert np.abs(again - before).max() < 1e-5

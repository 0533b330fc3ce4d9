"""Laws of the self-check in coarse dtypes: its bound is a measured error's, which lets rounding pass and no more."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from headlapse.engine.capture.run import cache_series
from headlapse.engine.checkpoints.resolve import resolve
from headlapse.engine.replay import run as sweeps
from headlapse.engine.replay.rounding import MULTIPLE, RoundingError
from headlapse.engine.runtime.resources import Machine
from headlapse.engine.store.patched_run import PatchedRun
from headlapse.engine.store.store import Store
from headlapse.engine.study.patch_settings import PatchRequest
from headlapse.engine.study.study import TOLERANCE, Dtype, Study, tolerance
from tests.models import save, tiny, tiny_tokenizer

LABELS = [f"step{seed}" for seed in range(8)]
COARSE = ("float16", "bfloat16")


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    for seed, label in enumerate(LABELS):
        save(tiny("neox-parallel", seed), folder / label, tokenizer=tiny_tokenizer())
    return folder


@pytest.fixture(scope="module", params=COARSE)
def store(request: pytest.FixtureRequest, series: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    study, path = Study(str(series), trials=4, dtype=request.param), tmp_path_factory.mktemp(request.param) / "s.zarr"
    list(cache_series(study, resolve(study.model, [], path.parent), path, path.parent, Machine()))
    return Store(path)


def patched(store: Store, name: str, **request: Any) -> tuple[PatchedRun, list[str | None]]:
    """A patched run of the default subsets, and the problem of each checkpoint."""
    plan = sweeps.make_plan(PatchRequest(**request), store)
    run = sweeps.open_run(store, plan, name)
    labels = list(store.complete())
    outcomes = sweeps.patch_series(store, plan, run, labels, store.path.parent, Machine(), lambda _n: None)
    return run, [outcome.problem for outcome in outcomes]


@pytest.mark.slow
def test_the_bound_lets_rounding_pass_and_is_far_below_that_of_the_dtype(store: Store) -> None:
    run, problems = patched(store, "rounded")
    assert problems == [None] * len(LABELS)
    seen, bound = run.values("self_check"), run.values("self_check_bound")
    assert (seen < bound).all() and (seen > TOLERANCE / 100).all()
    assert bound.max() < tolerance(*{store.study["dtype"]}) / 4
    ratios = MULTIPLE * seen / (bound - TOLERANCE)
    assert ratios.max() < MULTIPLE / 2, f"of differences to measured errors: {np.sort(ratios)}"


@pytest.mark.slow
def test_a_drift_beyond_what_was_measured_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, bound = sweeps.replay, patched(store, "rounded")[0].values("self_check_bound").max()

    def off(*given: Any, **named: Any) -> np.ndarray:
        return exact(*given, **named) + np.float32(2 * bound)

    monkeypatch.setattr(sweeps, "replay", off)
    _, problems = patched(store, "drifted")
    assert all(problem and "nothing patched: replay differs" in problem for problem in problems)


@pytest.mark.slow
def test_values_stored_coarsely_and_computed_in_float32_are_bounded_by_the_coarse_error(store: Store) -> None:
    run, problems = patched(store, "finer", dtype="float32")
    assert problems == [None] * len(LABELS)
    assert (run.values("self_check_bound") > 2 * TOLERANCE).all()


def test_the_coarsest_dtype_counts() -> None:
    assert RoundingError("float32", "tf32").dtype == "tf32"
    assert RoundingError("float32", "bfloat16").dtype == "bfloat16" and set(COARSE) < set(get_args(Dtype))

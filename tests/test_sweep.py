"""Laws of a sweep: what it is called, what it patches where, and that nothing inexact is ever kept."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from headlapse.engine.capture.run import cache_series
from headlapse.engine.checkpoints import files
from headlapse.engine.checkpoints.resolve import resolve
from headlapse.engine.replay import run as room
from headlapse.engine.replay.reference import choose_pairs
from headlapse.engine.replay.run import VERIFIED_PAIRS, SweepPlan, make_plan, name_of, open_run, patch_series
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.runtime.format import format_time
from headlapse.engine.runtime.resources import Machine
from headlapse.engine.store.patched_run import PatchedRun
from headlapse.engine.store.store import Store
from headlapse.engine.study.patch_settings import PatchRequest
from headlapse.engine.study.study import TOLERANCE, Study, tolerance
from tests.conftest import SEED
from tests.models import D_MODEL, N_HEADS, N_LAYERS, save, tiny, tiny_tokenizer
from tests.test_scripts import messages, run, store_files

LABELS = ["step0", "step10", "step20"]
SMALL = PatchRequest(subsets=("even", "odd", "all"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("series")
    for seed, label in enumerate(LABELS):
        save(tiny("neox-parallel", seed), directory / label, tokenizer=tiny_tokenizer())
    return directory


def cached(model: Path, path: Path, wanted: Sequence[str] = (), **changes: Any) -> Store:
    study = Study(str(model), trials=3, **changes)
    list(cache_series(study, resolve(study.model, wanted, path.parent), path, path.parent, Machine()))
    return Store(path)


@pytest.fixture
def store(model: Path, tmp_path: Path) -> Store:
    return cached(model, tmp_path / "s.zarr")


@pytest.fixture(scope="module")
def kept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that no test writes to."""
    return cached(model, tmp_path_factory.mktemp("kept") / "s.zarr")


def opened(store: Store, sweep: PatchRequest = SMALL, name: str = "r") -> tuple[SweepPlan, PatchedRun]:
    plan = make_plan(sweep, store)
    return plan, open_run(store, plan, name)


def patched(
    store: Store, plan: SweepPlan, patch: PatchedRun, missing: Sequence[str], machine: Machine | None = None
) -> list[int]:
    """Patch `missing`; how many patched runs were finished by each pass."""
    finished: list[int] = []
    where = machine or Machine()
    outcomes = list(patch_series(store, plan, patch, missing, store.path.parent, where, finished.append))
    assert [(outcome.label, outcome.problem) for outcome in outcomes] == [(label, None) for label in missing]
    return finished


def problems_of(store: Store, plan: SweepPlan, patch: PatchedRun, missing: Sequence[str]) -> list[str | None]:
    """Why each checkpoint was not finished."""
    outcomes = patch_series(store, plan, patch, missing, store.path.parent, Machine(), lambda _n: None)
    return [outcome.problem for outcome in outcomes]


@pytest.fixture
def shifted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Replay is off by these amounts (nats), checkpoint by checkpoint; what is left over was not used up."""
    shifts: list[float] = []
    exact = room.replay

    def off(*given: Any, **named: Any) -> np.ndarray:
        return exact(*given, **named) + np.float32(shifts.pop(0))

    monkeypatch.setattr(room, "replay", off)
    yield shifts


# --- names ---

DISTINCT = [
    PatchRequest(),
    PatchRequest(direction="noise"),
    PatchRequest(positions="end:3"),
    PatchRequest(positions="all"),
    PatchRequest(subsets=("even",)),
    PatchRequest(subsets=("even", "odd")),
    PatchRequest(subsets=("odd", "even")),
    PatchRequest(subsets=("size:3",)),
    PatchRequest(subsets=("random:3",)),
    PatchRequest(subsets=("0,2",)),
    PatchRequest(subsets=("0", "2")),
    PatchRequest(subsets=("02",)),
    PatchRequest(layers=("1",)),
    PatchRequest(layers=("1", "2")),
    PatchRequest(layers=("1-2",)),
    PatchRequest(layers=("12",)),
    PatchRequest(joint=True),
    PatchRequest(layers=("1-2",), joint=True),
    PatchRequest(dtype="float16"),
    PatchRequest(dtype="bfloat16"),
]


def test_distinct_settings_have_distinct_names() -> None:
    assert len({name_of(sweep) for sweep in DISTINCT}) == len(DISTINCT)


def test_distinct_settings_have_distinct_names_however_many_subsets_are_listed() -> None:
    pairs = tuple(f"{one},{other}" for one in range(12) for other in range(one))
    sweeps = [
        PatchRequest(pairs),
        PatchRequest(pairs[:-1]),
        PatchRequest(pairs, joint=True),
        PatchRequest(pairs, ("3",)),
        PatchRequest(pairs, dtype="float16"),
    ]
    assert len({name_of(sweep) for sweep in sweeps}) == len(sweeps)


@pytest.mark.parametrize(
    ("sweep", "name"),
    [
        (PatchRequest(), "denoise-last-even+odd+all+each+splits"),
        (PatchRequest(("0,2", "size:3"), positions="end:3", direction="noise"), "noise-end3-0.2+size3"),
        (PatchRequest(("all",), ("4-8", "11"), True, dtype="float16"), "denoise-last-all-layers4-8+11-joint-float16"),
    ],
)
def test_a_name_stays_what_it_is(sweep: PatchRequest, name: str) -> None:
    assert name_of(sweep) == name


@pytest.mark.parametrize("sweep", [*DISTINCT, PatchRequest(("lattice",) * 60)])
def test_a_name_is_one_that_a_user_could_have_given(sweep: PatchRequest) -> None:
    assert re.fullmatch(r"[\w+.-]{1,120}", name_of(sweep)) and not name_of(sweep).startswith(".")


# --- what is patched where ---


def test_layers_are_sites_of_their_own_and_jointly_a_single_one(kept: Store) -> None:
    assert make_plan(PatchRequest(), kept).sites == ((0,), (1,), (2,))
    assert make_plan(PatchRequest(layers=("2", "0")), kept).sites == ((0,), (2,))
    assert make_plan(PatchRequest(joint=True), kept).sites == ((0, 1, 2),)
    assert make_plan(PatchRequest(layers=("2", "0"), joint=True), kept).sites == ((0, 2),)


def test_a_sweep_is_spelled_out_with_all_that_its_numbers_depend_on(kept: Store) -> None:
    plan = make_plan(PatchRequest(("even", "0,2"), ("1-2",), True, "end:2", "noise", "bfloat16"), kept)
    assert plan.settings.to_attributes() == {
        "protocol": "corrected", "direction": "noise", "positions": "end:2", "layers": [1, 2], "joint": True,
        "subsets": ["even", "0,2"], "dtype": "bfloat16",
    }  # fmt: skip
    assert (plan.direction, plan.dtype, plan.alignment.spec) == ("noise", "bfloat16", "end:2")
    assert plan.subsets.labels == ("even", "0,2") and plan.n_runs == 1 * 2 * 3
    assert make_plan(PatchRequest(), kept).n_runs == N_LAYERS * (3 + N_HEADS + 2 * 5) * 3
    assert make_plan(PatchRequest(), kept).dtype == "float32", "the store's, where nothing is said"


def test_a_store_that_kept_z_alone_is_refused_with_the_mend(model: Path, tmp_path: Path) -> None:
    store = cached(model, tmp_path / "s.zarr", ["step0"], sites=("z",))
    with pytest.raises(UserError, match=r"cached with --sites z and cannot be patched; .* --sites all --overwrite"):
        make_plan(PatchRequest(), store)


def test_a_layer_that_was_not_kept_is_refused(model: Path, tmp_path: Path) -> None:
    store = cached(model, tmp_path / "s.zarr", ["step0"], sites=("1",))
    assert make_plan(PatchRequest(), store).sites == ((1,), (2,))
    with pytest.raises(UserError, match="layer 0 is not there; the layers are 1 to 2"):
        make_plan(PatchRequest(layers=("0-1",)), store)


# --- the series ---


@pytest.mark.thorough
def test_only_the_missing_checkpoints_are_done_and_the_others_stay_as_they_are(store: Store) -> None:
    plan, patch = opened(store)
    patched(store, plan, patch, ["step10"])
    before = patch.values("logit_diff")[1]
    assert patch.complete() == {"step10": 1} and np.isnan(patch.values("logit_diff")[[0, 2]]).all()
    assert sum(patched(store, plan, patch, ["step0", "step20"])) == 2 * plan.n_runs
    assert list(patch.complete()) == LABELS
    assert (patch.values("logit_diff")[1] == before).all() and np.isfinite(patch.values("logit_diff")).all()


@pytest.mark.slow
def test_results_written_layer_by_layer_are_those_written_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, at_once = opened(store)
    patched(store, plan, at_once, LABELS)
    monkeypatch.setattr(room, "BLOCK_BYTES", 1)
    assert len(list(room._blocks(plan, "step0", SEED))) == len(plan.sites) > 1
    plan, streamed = opened(store, name="streamed")
    patched(store, plan, streamed, LABELS)
    np.testing.assert_allclose(streamed.values("logit_diff"), at_once.values("logit_diff"), rtol=0, atol=1e-5)
    assert (streamed.values("self_check") <= tolerance("float32")).all()
    for kind in ("clean_logit_diff", "corrupt_logit_diff"):
        assert (streamed.values(kind) == at_once.values(kind)).all()


@pytest.mark.slow
@pytest.mark.parametrize("n_sites", [1, 2])
def test_streaming_changes_no_bit_where_every_run_goes_alone(
    model: Path, store: Store, monkeypatch: pytest.MonkeyPatch, n_sites: int
) -> None:
    """Beside other runs a matrix product may round otherwise; so memory here has room for one run at a time."""
    barely = Machine(memory=(model / "step0" / "model.safetensors").stat().st_size)
    sweep = PatchRequest(("even", "odd", "random:9"), positions="end:2")
    plan, at_once = opened(store, sweep)
    finished = patched(store, plan, at_once, LABELS, barely)
    assert set(finished) - {0} == {plan.trials.n_trials}, "each alone"
    assert len(list(room._blocks(plan, "step0", SEED))) == 1
    monkeypatch.setattr(room, "BLOCK_BYTES", n_sites * len(plan.subsets) * plan.trials.n_trials * 4)
    assert len(list(room._blocks(plan, "step0", SEED))) == -(-len(plan.sites) // n_sites)
    plan, streamed = opened(store, sweep, name="streamed")
    patched(store, plan, streamed, LABELS, barely)
    assert store_files(streamed.path) == store_files(at_once.path)
    assert (streamed.values("self_check") > 0).all()


@pytest.mark.thorough
def test_a_drift_in_any_block_is_loud(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BLOCK_BYTES", 1)
    plan, patch = opened(store)
    verified = {site for site, _ in choose_pairs("step0", plan.sites, len(plan.subsets), VERIFIED_PAIRS, SEED)}
    exact = room.replay

    def off(*given: Any, **named: Any) -> np.ndarray:
        return exact(*given, **named) + np.float32(named["sites"] == (plan.sites[max(verified)],))

    monkeypatch.setattr(room, "replay", off)
    [problem] = problems_of(store, plan, patch, ["step0"])
    assert problem and "replay differs" in problem and not patch.complete()


@pytest.mark.thorough
def test_more_subsets_than_anyone_waits_for_are_refused_with_the_time_and_what_to_take(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "n_heads", 32)
    with pytest.raises(
        UserError, match=r"4,294,967,296 subsets .* take about [\d,.]+ (days|years|h) on .*random:100000"
    ):
        make_plan(PatchRequest(subsets=("lattice",)), store)


@pytest.mark.thorough
def test_the_time_told_is_that_of_the_rows_that_go_through_later_layers(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "n_heads", 24)
    monkeypatch.setattr(room, "matmul_rate", lambda *_: 1e10)
    per_layer = 24 * D_MODEL**2 * 2**24 * 3 * len(LABELS) / 1e10
    for layers, passed in ((("all",), 3), (("0",), 2), (("1",), 1)):
        with pytest.raises(UserError, match=r"^--subsets lattice: 16,777,216 subsets of 24 heads") as caught:
            make_plan(PatchRequest(("lattice",), layers), store)
        assert f"about {format_time(passed * per_layer)} on" in str(caught.value)


# --- files that were hashed before ---


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Checkpoints whose weights were hashed."""
    found: list[str] = []
    digest = files.sha256

    def count(path: Path) -> str:
        found.append(path.parent.name)
        return digest(path)

    monkeypatch.setattr(files, "sha256", count)
    return found


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    """A series that a test may change."""
    return Path(shutil.copytree(model, tmp_path / "own"))


def problems(store: Store, name: str) -> dict[str, str | None]:
    plan, patch = opened(store, name=name)
    outcomes = patch_series(store, plan, patch, LABELS, store.path.parent, Machine(), lambda _n: None)
    return {outcome.label: outcome.problem for outcome in outcomes}


@pytest.mark.slow
def test_patching_hashes_no_weights_but_those_that_were_touched(own: Path, tmp_path: Path, hashed: list[str]) -> None:
    store = cached(own, tmp_path / "s.zarr")
    assert hashed == LABELS
    hashed.clear()
    assert problems(store, "untouched") == dict.fromkeys(LABELS) and not hashed
    os.utime(own / "step10" / "model.safetensors", ns=(1, 1))
    assert problems(store, "touched") == dict.fromkeys(LABELS) and hashed == ["step10"]


@pytest.mark.thorough
def test_weights_exchanged_for_some_of_the_same_size_are_refused_and_only_they(
    own: Path, tmp_path: Path, hashed: list[str]
) -> None:
    store = cached(own, tmp_path / "s.zarr")
    hashed.clear()
    weights = own / "step10" / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes((own / "step20" / "model.safetensors").read_bytes())
    os.utime(weights, ns=(1, 1))
    assert weights.stat().st_size == size
    found = problems(store, "exchanged")
    assert "are not those that were cached" in (found.pop("step10") or "")
    assert found == {"step0": None, "step20": None} and hashed == ["step10"]
    assert store.patch("exchanged").complete() == {"step0": 0, "step20": 2}


@pytest.mark.slow
def test_a_store_from_before_there_were_stamps_is_patched_and_its_weights_hashed(
    own: Path, tmp_path: Path, hashed: list[str]
) -> None:
    store = cached(own, tmp_path / "s.zarr")
    for label, record in store.records().items():
        assert record["provenance"].pop("stamps")
        store.array("record")[store.index(label)] = json.dumps(record)
    hashed.clear()
    assert problems(Store(store.path), "old") == dict.fromkeys(LABELS) and hashed == LABELS


# --- nothing inexact is kept ---


@pytest.mark.slow
@pytest.mark.parametrize("shift", [float("nan"), 3e-4, -3e-4, float("inf")])
def test_replay_that_drifts_is_loud_and_leaves_its_checkpoint_incomplete(
    store: Store, shifted: list[float], shift: float
) -> None:
    plan, patch = opened(store)
    shifted += [0.0, shift, 0.0]
    first, second, third = problems_of(store, plan, patch, LABELS)
    assert first is third is None and second and "replay differs from a full hooked forward" in second
    assert shifted == [], "the others go on"
    assert patch.complete() == {"step0": 0, "step20": 2}
    assert np.isnan(patch.values("logit_diff")[1]).all() and np.isnan(patch.values("self_check")[1]).all()


@pytest.mark.thorough
def test_one_drifting_run_among_those_verified_is_enough(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, patch = opened(store)
    exact, (site, subset) = room.replay, choose_pairs("step0", plan.sites, len(plan.subsets), VERIFIED_PAIRS, SEED)[-1]

    def off(*given: Any, **named: Any) -> np.ndarray:
        logit_diff = exact(*given, **named)
        logit_diff[site, subset, -1] = np.nan
        return logit_diff

    monkeypatch.setattr(room, "replay", off)
    [problem] = problems_of(store, plan, patch, ["step0"])
    assert problem and "by nan" in problem


@pytest.mark.slow
def test_a_drift_within_the_tolerance_is_kept_as_the_self_check(store: Store, shifted: list[float]) -> None:
    plan, patch = opened(store)
    shifted += [0.0, 5e-5, -5e-5]
    patched(store, plan, patch, LABELS)
    np.testing.assert_allclose(patch.values("self_check"), [0, 5e-5, 5e-5], atol=1e-5)
    assert patch.values("self_check").max() <= tolerance("float32")
    assert np.allclose(patch.values("self_check_bound"), TOLERANCE)


@pytest.mark.slow
def test_the_printed_largest_difference_is_the_stored_one(model: Path, tmp_path: Path, shifted: list[float]) -> None:
    assert run("cache", "--model", model, "--trials", 3, cache=tmp_path).returncode == 0
    shifted += [0.0, 5e-5, 0.0]
    done = run("patch", "--subsets", "all", "--name", "r", "--verbose", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("*.zarr")
    checks = xr.open_zarr(path, group="patches/r", consolidated=False).self_check.values
    assert np.argmax(checks) == 1 and np.isfinite(checks).all()
    assert f"largest difference {checks.max():.1e} nats" in done.stdout


@pytest.mark.slow
def test_after_a_drift_the_same_command_does_what_is_missing(model: Path, tmp_path: Path, shifted: list[float]) -> None:
    assert run("cache", "--model", model, "--trials", 3, cache=tmp_path).returncode == 0
    shifted += [0.0, float("nan"), 0.0]
    failed = run("patch", "--subsets", "all", "--name", "r", cache=tmp_path)
    assert failed.returncode == 1
    [line] = messages(failed)
    assert line.startswith("error: step10: ") and "replay differs" in line
    shifted += [0.0, 9.0]
    done = run("patch", "--subsets", "all", "--name", "r", "--verbose", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert shifted == [9.0], "the others were not replayed again"
    assert [row.split()[0] for row in done.stdout.splitlines()[2:5]] == LABELS

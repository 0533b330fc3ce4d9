"""Laws of the store: what is written comes back, a checkpoint counts once it is complete, names appear whole."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from headlapse.engine.runtime.errors import UserError
from headlapse.engine.store import disk, integrity, locks, zarr_group
from headlapse.engine.store.activations import KINDS, Capture, to_numpy, to_tensor
from headlapse.engine.store.checkpoint_arrays import CheckpointArrays
from headlapse.engine.store.inventory import find_store
from headlapse.engine.store.store import Store, create_store
from headlapse.engine.store.zarr_group import CheckpointRow
from headlapse.engine.study.patch_settings import PatchSettings
from headlapse.engine.study.prompts import Trials
from headlapse.engine.study.subsets import parse_subsets
from headlapse.engine.study.tasks.contrast import Contrast

LAYERS, TRIALS, POSITIONS, HEADS, KV_HEADS, WIDTH = 3, 4, 5, 6, 2, 8
STUDY = {"model": "m", "task": "decimal", "trials": TRIALS, "sites": ["all"], "dtype": "float32"}
WIDTHS = {"z": (HEADS, WIDTH), "key": (KV_HEADS, WIDTH), "value": (KV_HEADS, WIDTH), "resid_pre": (HEADS * WIDTH,)}
ROWS = [CheckpointRow("step0", 0), CheckpointRow("step10", 10), CheckpointRow("main", -1)]


def some_trials() -> Trials:
    rng = np.random.default_rng(0)
    shape = (2, TRIALS, POSITIONS)
    return Trials(
        tokens=rng.integers(0, 9, shape),
        length=rng.integers(1, POSITIONS + 1, shape[:2]),
        answer_tokens=rng.integers(0, 9, (TRIALS, 2)),
        token_text=np.array([["a", " é", "\n", "", "%"]] * 2 * TRIALS).reshape(shape),
        contrasts=tuple(Contrast(f"c{i}", f"x{i}", " a", " b", "decimal", repeats=i + 1) for i in range(TRIALS)),
        notes=(),
    )


def some_capture(seed: int, dtype: torch.dtype = torch.float32, n_layers: int = LAYERS) -> Capture:
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        kind: [torch.randn(2, TRIALS, POSITIONS, *tail, generator=draw).to(dtype) for _ in range(n_layers)]
        for kind, tail in WIDTHS.items()
    }
    return Capture(tensors=tensors, answer_logits=torch.randn(2, TRIALS, 2, generator=draw))


def some_store(path: Path, **changes: Any) -> Store:
    fields: dict[str, Any] = {
        "study": STUDY, "rows": ROWS, "layers": range(LAYERS), "trials": some_trials(), "widths": WIDTHS,
    }  # fmt: skip
    return create_store(path, **{**fields, **changes})


def everything(path: Path) -> dict[str, bytes]:
    """Every file of every array, by its path."""
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def replace_values(arrays: CheckpointArrays, name: str, change: Callable[[np.ndarray, str], np.ndarray]) -> None:
    """Change what every complete checkpoint of a group holds, with the checksums that go with it."""
    for label, record in arrays.records().items():
        values = change(arrays.read(name, label), label).astype(arrays.array(name).dtype)
        arrays.array(name)[arrays.index(label)] = values
        by_row = len(record["crc32c"][name]) > 1 or (values.ndim > 1 and len(values) == 1)
        record["crc32c"][name] = integrity.checksums(values, by_row)
        arrays.array("record")[arrays.index(label)] = json.dumps(record)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return some_store(tmp_path / "s.zarr")


def test_the_layout_on_disk_is_the_specified_one(store: Store) -> None:
    dims = {name: zarr_group.dims_of(array) for name, array in store.group.arrays()}
    body = ("checkpoint", "layer", "run", "trial", "position")
    assert dims == {
        "checkpoint": ("checkpoint",), "step": ("checkpoint",), "complete": ("checkpoint",),
        "stage": ("checkpoint",), "tokens_seen": ("checkpoint",),
        "record": ("checkpoint",), "problem": ("checkpoint",),
        "run": ("run",), "answer": ("answer",), "layer": ("layer",),
        "tokens": ("run", "trial", "position"), "token_text": ("run", "trial", "position"),
        "length": ("run", "trial"), "answer_tokens": ("trial", "answer"), "repeats": ("trial",),
        "answer_logits": ("checkpoint", "run", "trial", "answer"),
        "z": (*body, "head", "head_dim"), "key": (*body, "kv_head", "head_dim"),
        "value": (*body, "kv_head", "head_dim"), "resid_pre": (*body, "d_model"),
    }  # fmt: skip
    z = store.array("z")
    assert z.shape == (3, LAYERS, 2, TRIALS, POSITIONS, HEADS, WIDTH)
    assert z.shards == (1, *z.shape[1:]) and z.chunks == (1, 1, *z.shape[2:])


def test_a_checkpoint_is_one_file_per_kind(store: Store) -> None:
    store.write("step10", some_capture(1), {})
    assert [
        p.relative_to(store.path / "z" / "c").parts[0] for p in (store.path / "z" / "c").rglob("*") if p.is_file()
    ] == ["1"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    captured = some_capture(1, getattr(torch, dtype))
    store = some_store(tmp_path / "s.zarr", study={**STUDY, "dtype": dtype})
    store.write("step10", captured, {"commit": "abc"})
    held = Store(store.path)
    for kind in KINDS:
        for layer in range(LAYERS):
            back = held.activations("step10").read(kind, layer)
            assert back.dtype == captured.read(kind, layer).dtype
            assert torch.equal(back, captured.read(kind, layer))
    assert (held.answer_logits("step10") == captured.answer_logits.numpy()).all()
    assert held.provenance("step10") == {"commit": "abc"}
    assert held.study["dtype"] == dtype


def test_bfloat16_keeps_its_raw_bits() -> None:
    tensor = torch.tensor([1.0, -3.5, float("inf")], dtype=torch.bfloat16)
    assert to_numpy(tensor).dtype == np.uint16
    assert torch.equal(to_tensor(to_numpy(tensor), "bfloat16"), tensor)


def test_the_prompts_come_back_as_they_were_run(store: Store) -> None:
    back, trials = Store(store.path).trials(), some_trials()
    for name in ("tokens", "length", "answer_tokens", "token_text"):
        assert (getattr(back, name) == getattr(trials, name)).all()
    assert back.contrasts == trials.contrasts


def test_it_opens_in_xarray_with_labelled_dimensions_and_coordinates(store: Store) -> None:
    captured = some_capture(1)
    store.write("step10", captured, {})
    opened = xr.open_zarr(store.path, consolidated=False)
    assert list(opened.checkpoint.values) == ["step0", "step10", "main"]
    assert {"step", "stage", "tokens_seen", "complete", "run", "answer", "layer", "length"} <= set(opened.coords)
    z = opened.z.sel(checkpoint="step10", layer=2, run="corrupt")
    assert z.dims == ("trial", "position", "head", "head_dim")
    assert (z.values == captured.read("z", 2)[1].numpy()).all()
    assert opened.complete.values.tolist() == [False, True, False]


def test_a_checkpoint_counts_only_once_its_mark_is_written(store: Store) -> None:
    assert store.complete() == {}
    store.write("main", some_capture(2), {})
    store.write("step10", some_capture(1), {})
    assert store.complete() == {"step10": 1, "main": 2}, "in order of training, an unknown step last"


def test_adding_checkpoints_leaves_the_others_as_they_are(store: Store) -> None:
    store.write("step0", some_capture(0), {})
    before = store.activations("step0").read("z", 1)
    store.add([CheckpointRow("step0", 0), CheckpointRow("step20", 20)])
    assert [row.label for row in store.rows()] == ["step0", "step10", "main", "step20"]
    assert store.complete() == {"step0": 0}
    store.write("step20", some_capture(3), {})
    held = Store(store.path)
    assert torch.equal(held.activations("step0").read("z", 1), before)
    assert torch.equal(held.activations("step20").read("z", 1), some_capture(3).read("z", 1))


def test_a_growth_cut_off_halfway_is_done_again(store: Store) -> None:
    store.array("z").resize((4, *store.array("z").shape[1:]))
    store.array("step").resize((4,))
    assert [row.label for row in store.rows()] == ["step0", "step10", "main"]
    store.add([CheckpointRow("step20", 20)])
    assert Store(store.path).rows()[3] == CheckpointRow("step20", 20)
    assert store.dataset().sizes["checkpoint"] == 4


def test_a_label_that_means_another_step_now_is_refused(store: Store) -> None:
    with pytest.raises(UserError, match="holds step10 as step 10, now it is step 11"):
        store.add([CheckpointRow("step10", 11)])


def test_a_checkpoint_of_another_shape_is_refused_and_not_marked(store: Store) -> None:
    with pytest.raises(UserError, match=r"z of step10 has shape \[2, .*has \[3, "):
        store.write("step10", some_capture(0, n_layers=2), {})
    assert store.complete() == {}


def test_only_the_layers_from_the_first_patched_one_on_are_kept(tmp_path: Path) -> None:
    store = some_store(tmp_path / "s.zarr", layers=[1, 2])
    captured = some_capture(5)
    store.write("step0", captured, {})
    assert store.layers == [1, 2]
    assert torch.equal(store.activations("step0").read("key", 2), captured.read("key", 2))


def test_a_store_appears_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    with pytest.raises(RuntimeError), disk.atomic_write(path, path) as partial:
        zarr_group.start(partial, ROWS)
        raise RuntimeError("killed")
    assert not path.exists()
    assert some_store(path).rows() == ROWS, "what was left behind does not stand in the way"


def test_writing_the_same_again_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        store = some_store(tmp_path / name)
        for seed, row in enumerate(ROWS):
            store.write(row.label, some_capture(seed), {})
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_no_two_processes_write_the_same_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    with locks.claimed(path, "cache", ["a", "b"]) as mine, locks.claimed(path, "cache", ["b", "c"]) as other:
        assert mine == ["a", "b"] and other == ["c"]
        with pytest.raises(UserError, match="another process is writing"), locks.alone(path):
            pass
    with locks.alone(path):
        pass
    assert list(tmp_path.iterdir()) == [], "no lock file is left"


def test_another_question_is_refused_with_the_difference() -> None:
    with pytest.raises(UserError, match="trials is 4 there, 15 asked; use --store"):
        zarr_group.refuse_difference(Path("s"), STUDY, {**STUDY, "trials": 15}, "use --store")
    zarr_group.refuse_difference(Path("s"), STUDY, STUDY, "")


def test_what_is_no_store_is_refused_and_never_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("years of work")
    with pytest.raises(UserError, match="is no store"):
        Store(tmp_path / "thesis")
    with pytest.raises(UserError, match="left alone"):
        disk.refuse_foreign(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1").exists()


def test_another_format_is_refused(store: Store) -> None:
    zarr_group.write_attributes(store.group, store.path, {**store.attrs, "headlapse_format": 99}, {}, 3)
    with pytest.raises(UserError, match="store format 99"):
        Store(store.path)


def test_the_newest_store_is_found_and_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no store"):
        find_store(tmp_path / "nowhere")
    first, second = some_store(tmp_path / "a.zarr"), some_store(tmp_path / "b.zarr")
    assert find_store(tmp_path) == second.path
    first.write("step0", some_capture(0), {})
    assert find_store(tmp_path) == first.path


# --- patched runs ---

SUBSETS = parse_subsets(["even", "none", "0,2"], HEADS)
SETTINGS = PatchSettings(direction="denoise", positions="last")


def test_a_patched_run_reads_back_by_label(store: Store) -> None:
    run = store.open_patch("parity", SETTINGS, [0, 2], SUBSETS.labels, SUBSETS.mask)
    values = np.random.default_rng(0).normal(size=(2, 3, TRIALS)).astype("float32")
    answers = np.random.default_rng(1).normal(size=(2, TRIALS, 2)).astype("float32")
    writer = run.write("step10")
    writer.put_layers(0, values[:1])
    writer.put_layers(1, values[1:])
    writer.finish(answers, 1e-6, 1e-4)
    data = Store(store.path).patch_dataset("parity")
    assert data.logit_diff.dims == ("checkpoint", "layer", "subset", "trial")
    assert data.logit_diff.dtype == "float32"
    assert (data.logit_diff.sel(checkpoint="step10", layer=2, subset="0,2").values == values[1, 2]).all()
    assert np.isnan(data.logit_diff.sel(checkpoint="step0").values).all()
    assert (data.clean_logit_diff.sel(checkpoint="step10").values == answers[0, :, 0] - answers[0, :, 1]).all()
    assert (data.corrupt_logit_diff.sel(checkpoint="step10").values == answers[1, :, 0] - answers[1, :, 1]).all()
    assert data.mask.dims == ("subset", "head") and data.mask.dtype == bool
    assert data.mask.sel(subset="0,2").values.tolist() == [True, False, True, False, False, False]
    assert run.complete() == {"step10": 1}


def test_a_patched_run_grows_with_its_store_and_keeps_what_it_has(store: Store) -> None:
    run = store.open_patch("parity", SETTINGS, [0], SUBSETS.labels, SUBSETS.mask)
    values = np.ones((1, 3, TRIALS), dtype="float32")
    writer = run.write("step0")
    writer.put_layers(0, values)
    writer.finish(np.zeros((2, TRIALS, 2), dtype="float32"), 0.0, 1e-4)
    store.add([CheckpointRow("step20", 20)])
    grown = Store(store.path).open_patch("parity", SETTINGS, [0], SUBSETS.labels, SUBSETS.mask)
    assert [row.label for row in grown.rows()] == ["step0", "step10", "main", "step20"]
    assert grown.complete() == {"step0": 0}
    assert (grown.dataset().logit_diff.sel(checkpoint="step0").values == values).all()


def test_a_run_of_the_same_name_with_other_settings_is_refused(store: Store) -> None:
    store.open_patch("parity", SETTINGS, [0], SUBSETS.labels, SUBSETS.mask)
    with pytest.raises(UserError, match='direction is "denoise" there, "noise" asked'):
        store.open_patch("parity", replace(SETTINGS, direction="noise"), [0], SUBSETS.labels, SUBSETS.mask)


def test_a_run_that_is_not_there_is_refused_with_those_that_are(store: Store) -> None:
    store.open_patch("parity", SETTINGS, [0], SUBSETS.labels, SUBSETS.mask)
    with pytest.raises(UserError, match="it has parity"):
        store.patch("lattice")


def test_a_store_with_patched_runs_still_opens_in_xarray(store: Store) -> None:
    store.open_patch("parity", SETTINGS, [0], SUBSETS.labels, SUBSETS.mask)
    assert "z" in xr.open_zarr(store.path, consolidated=False)
    assert "logit_diff" in xr.open_zarr(store.path, group="patches/parity", consolidated=False)


def test_a_store_cut_off_while_growing_is_refused_until_it_is_grown(store: Store) -> None:
    store.array("z").resize((4, *store.array("z").shape[1:]))
    with pytest.raises(UserError, match="cut off while checkpoints were added"):
        store.dataset()


def test_patching_makes_a_store_the_newest(tmp_path: Path) -> None:
    first, second = some_store(tmp_path / "a.zarr"), some_store(tmp_path / "b.zarr")
    assert find_store(tmp_path) == second.path
    first.open_patch("parity", SETTINGS, [0], SUBSETS.labels, SUBSETS.mask)
    assert find_store(tmp_path) == first.path


STAGED = (
    CheckpointRow("stage1-step10-tokens1B", 10, "stage1", 10**9),
    CheckpointRow("stage1-step40-tokens4B", 40, "stage1", 4 * 10**9),
    CheckpointRow("stage2-ingredient1-step5-tokens1B", 5, "stage2-ingredient1", 10**9),
)


def test_stages_and_tokens_are_kept_and_order_the_checkpoints(tmp_path: Path) -> None:
    store = some_store(tmp_path / "s.zarr", rows=STAGED[::2])
    store.add([STAGED[1], CheckpointRow("main", -1)])
    for row in store.rows():
        store.write(row.label, some_capture(1), {})
    held = Store(store.path)
    assert held.rows() == [STAGED[0], STAGED[2], STAGED[1], CheckpointRow("main", -1)]
    assert list(held.complete()) == [*(row.label for row in STAGED), "main"]
    opened = xr.open_zarr(store.path, consolidated=False, mask_and_scale=False)
    assert opened.stage.values.tolist() == ["stage1", "stage2-ingredient1", "stage1", ""]
    assert opened.tokens_seen.values.tolist() == [10**9, 10**9, 4 * 10**9, -1] and opened.tokens_seen.dtype == np.int64


def test_a_branch_beside_one_that_is_there_is_refused_and_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    store = some_store(tmp_path / "s.zarr", rows=STAGED)
    before = everything(store.path)
    with pytest.raises(UserError, match="branches beside each other"):
        store.add([CheckpointRow("stage2-ingredient2-step5", 5, "stage2-ingredient2")])
    with pytest.raises(UserError, match="as step 5, now it is step 6"):
        store.add([CheckpointRow(STAGED[2].label, 6, "stage2-ingredient1")])
    assert everything(store.path) == before


def test_a_store_from_before_stages_opens_grows_and_has_the_stages_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written as it was then: with labels and steps alone along the axis."""
    whole = zarr_group.axis_values
    monkeypatch.setattr(zarr_group, "ALONG_AXIS", ("checkpoint", "step"))
    monkeypatch.setattr(
        zarr_group, "axis_values", lambda rows: {name: whole_values(rows)[name] for name in ("checkpoint", "step")}
    )

    def whole_values(rows: Sequence[CheckpointRow]) -> dict[str, np.ndarray]:
        with monkeypatch.context() as patch:
            patch.setattr(zarr_group, "ALONG_AXIS", ("checkpoint", "step", "stage", "tokens_seen"))
            return whole(rows)

    some_store(tmp_path / "s.zarr", rows=STAGED[::2])
    monkeypatch.undo()
    store = Store(tmp_path / "s.zarr")
    assert not {"stage", "tokens_seen"} & set(store.array_names)
    store.add(STAGED)
    for row in STAGED:
        store.write(row.label, some_capture(1), {})
    held = Store(store.path)
    assert list(held.complete()) == [row.label for row in STAGED]
    assert {row.label: (row.stage, row.step) for row in held.rows()} == {r.label: (r.stage, r.step) for r in STAGED}
    assert held.dataset().tokens_seen.values.tolist() == [-1] * 3 and "stage" in held.dataset().coords

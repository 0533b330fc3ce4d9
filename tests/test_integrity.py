"""Laws of integrity: a store that is not as it was written is refused with the place, or gives the same numbers."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from headlapse.engine.mechanism.store import MechanismRun, mechanism_path, open_mechanism
from headlapse.engine.runtime.errors import DamageError, UserError
from headlapse.engine.store.store import Store
from headlapse.engine.study.mechanism_settings import MechanismSettings
from headlapse.engine.study.patch_settings import PatchSettings
from headlapse.engine.study.subsets import parse_subsets
from tests.test_store import HEADS, LAYERS, STUDY, TRIALS, some_capture, some_store

DTYPES = ("float32", "float16", "bfloat16")
FLIPS = int(os.environ.get("HEADLAPSE_FLIPS", "20"))
"""Of each dtype; with 667, 2,000 together, in ten minutes."""


def filled(path: Path, dtype: str) -> Path:
    """A store with two captured checkpoints of three, a patched run, generated texts and a mechanism."""
    store = some_store(path, study={**STUDY, "dtype": dtype})
    labels, rng = ("step0", "main"), np.random.default_rng(0)
    for seed, label in enumerate(labels):
        store.write(label, some_capture(seed, getattr(torch, dtype)), {"commit": "abc", "sha256": {"m": "0" * 64}})
    subsets = parse_subsets(["even", "none"], HEADS)
    run = store.open_patch("parity", PatchSettings(), [0, 2], subsets.labels, subsets.mask)
    texts = store.open_texts("texts", PatchSettings("published"), [0], subsets.labels, subsets.mask, n_tokens=2)
    settings = MechanismSettings.of_parts(("attribution", "weights"), "denoise", "float32")
    mechanism = open_mechanism(store, settings)
    for label in labels:
        writer = run.write(label)
        writer.put_layers(0, rng.normal(size=(2, 2, TRIALS)).astype("float32"))
        writer.finish(rng.normal(size=(2, TRIALS, 2)).astype("float32"), 1e-6, 1e-4, device="cpu")
        words = np.array([f"{label} {i}" for i in range(2 * TRIALS)], dtype=object).reshape(1, 2, TRIALS)
        tokens = rng.integers(0, 9, (1, 2, TRIALS, 2))
        texts.write_texts(label, words, tokens, rng.random((1, 2, TRIALS)) < 0.5, 1, device="cpu")
        arrays = {name: mechanism.array(name) for name in mechanism.array_names}
        values = {
            name: rng.normal(size=array.shape[1:]).astype("float32")
            for name, array in arrays.items()
            if array.dtype == "float32" and array.shape[:1] == (3,)
        }
        mechanism.write(label, values, {"previous": "step0", "last": "main"})
    return path


def everything_read(path: Path) -> dict[str, object]:
    """All that commands read of a store, in a form that can be compared."""
    store = Store(path)
    read: dict[str, object] = {"study": store.study, "rows": store.rows(), "records": store.records()}
    trials = store.trials()
    read |= {name: value.tolist() for name, value in vars(trials).items() if isinstance(value, np.ndarray)}
    read["contrasts"] = trials.contrasts
    for label in store.complete():
        activations = store.activations(label)
        for kind in store.kinds():
            for layer in store.layers:
                read[f"{label} {kind} {layer}"] = activations.read(kind, layer).view(torch.uint8).numpy().tobytes()
        read[f"{label} logits"] = store.answer_logits(label).tobytes()
    for name in store.patch_names():
        run = store.patch(name)
        read[name], read[f"{name} settings"] = contents(run.load()), run.settings
    run = MechanismRun(mechanism_path(store), store.path)
    return {**read, "mechanism": contents(run.load()), "mechanism settings": run.settings}


def contents(dataset: object) -> dict[str, object]:
    variables = dataset.variables  # type: ignore[attr-defined]
    return {name: (variable.dims, variable.values.tolist().__repr__()) for name, variable in variables.items()}


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def is_noticed(path: Path, before: dict[str, object]) -> bool:
    """Whether the store is refused, with a file of it named; where it is not, everything must be as it was."""
    try:
        after = everything_read(path)
    except UserError as error:
        assert path.name in str(error) and "\n" not in str(error), error
        return True
    assert after == before, "read without a word, and other than it was written"
    return False


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, dict[str, object]]]]:
    folder = tmp_path_factory.mktemp("filled")
    paths = {dtype: filled(folder / f"{dtype}.zarr", dtype) for dtype in DTYPES}
    yield {dtype: (path, everything_read(path)) for dtype, path in paths.items()}


def flip(path: Path, before: dict[str, object], draw: random.Random) -> bool:
    """Flip one bit: of a random file, or of a random byte of the whole store, so that large files count too."""
    files = files_of(path)
    sizes = [file.stat().st_size for file in files]
    file = draw.choice(files) if draw.random() < 0.5 else draw.choices(files, sizes)[0]
    whole = file.read_bytes()
    place, bit = draw.randrange(len(whole)), draw.randrange(8)
    changed = bytearray(whole)
    changed[place] ^= 1 << bit
    file.write_bytes(changed)
    try:
        return is_noticed(path, before)
    except AssertionError as error:
        raise AssertionError(f"bit {bit} of byte {place} of {file.relative_to(path)}: {error}") from error
    finally:
        file.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flipped_bit_is_noticed_or_changes_nothing(
    stores: dict[str, tuple[Path, dict[str, object]]], dtype: str
) -> None:
    noticed = sum(flip(*stores[dtype], random.Random(f"{dtype} {number}")) for number in range(FLIPS))
    assert noticed > FLIPS // 2, "most bits matter"


Damage = Callable[[list[Path]], None]


def remove(chunks: list[Path]) -> None:
    chunks[0].unlink()


def truncate(chunks: list[Path]) -> None:
    chunks[0].write_bytes(chunks[0].read_bytes()[:-5])


def swap(chunks: list[Path]) -> None:
    first, second = chunks[0].read_bytes(), chunks[1].read_bytes()
    chunks[0].write_bytes(second)
    chunks[1].write_bytes(first)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [remove, truncate, swap])
def test_removed_truncated_and_swapped_chunks_are_refused_with_the_place(
    stores: dict[str, tuple[Path, dict[str, object]]], tmp_path: Path, damage: Damage
) -> None:
    whole, before = stores["bfloat16"]
    path = shutil.copytree(whole, tmp_path / whole.name)
    names = sorted({chunks.parent for chunks in path.rglob("c") if chunks.is_dir()})
    assert len(names) > 30
    for name in names:
        chunks = files_of(name / "c")
        if name.name in ("complete", "problem") or (len(chunks) < 2 and damage is swap):
            continue
        held = {chunk: chunk.read_bytes() for chunk in chunks[:2]}
        is_same = len({*held.values()}) == 1
        damage(chunks)
        assert is_noticed(path, before) or is_same, f"{damage.__name__} {name.relative_to(path)}"
        for chunk, own in held.items():
            chunk.write_bytes(own)
    assert everything_read(path) == before, "what was damaged is whole again"


@pytest.mark.thorough
def test_a_checkpoint_whose_mark_is_gone_counts_as_unfinished(tmp_path: Path) -> None:
    store = Store(filled(tmp_path / "s.zarr", "float32"))
    [mark] = [file for file in files_of(store.path / "complete" / "c") if file.name == "0"]
    mark.unlink()
    assert list(store.complete()) == ["main"] and len(store.layers) == LAYERS


def test_a_folder_of_runs_whose_metadata_cannot_be_read_is_damage(tmp_path: Path) -> None:
    """It has no seal: what zarr raises of it is told with its place."""
    store = Store(filled(tmp_path / "s.zarr", "float32"))
    (store.path / "patches" / "zarr.json").write_text('{"zarr_format": {}, "node_type": "group"}')
    subsets = parse_subsets(["all"], HEADS)
    with pytest.raises(DamageError, match=r"patches/zarr\.json is damaged"):
        store.open_patch("another", PatchSettings(), [0, 2], subsets.labels, subsets.mask)

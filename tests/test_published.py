"""Laws of the study's procedure: its texts are those of transformers' own generate, and its numbers are its own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import AutoModelForCausalLM, AutoTokenizer

from headlapse.engine.replay import published_protocol as room
from headlapse.engine.replay.greedy_decoding import SlicePatch
from headlapse.engine.replay.published_protocol import (
    LAYERS,
    SUBSETS,
    make_plan,
    name_of,
    open_run,
    patch_series,
    succeeds,
)
from headlapse.engine.report.findings.published import format_texts
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.runtime.resources import Machine
from headlapse.engine.store.patched_run import TextRun
from headlapse.engine.store.store import Store
from headlapse.engine.study.patch_settings import PatchRequest
from headlapse.engine.study.tasks.contrast import Contrast
from tests.models import N_HEADS, N_LAYERS, save, tiny, tiny_tokenizer
from tests.test_generation import reference
from tests.test_scripts import run as script
from tests.test_sweep import cached

pytestmark = pytest.mark.thorough

LABELS = ["step0", "step10"]


def asked(*layers: str, subsets: tuple[str, ...] = SUBSETS, **changes: Any) -> PatchRequest:
    return PatchRequest(subsets, layers or ("1",), **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("series")
    for seed, label in enumerate(LABELS):
        save(tiny("neox-parallel", seed), directory / label, tokenizer=tiny_tokenizer())
    return directory


def generated(store: Store, sweep: PatchRequest, labels: list[str] = LABELS, name: str = "r") -> TextRun:
    plan = make_plan(sweep, store)
    run = open_run(store, plan, name)
    outcomes = list(patch_series(store, plan, run, labels, store.path.parent, Machine(), lambda _n: None))
    assert [outcome.problem for outcome in outcomes] == [None] * len(labels)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_text_is_that_of_stock_generate_with_the_studys_hook(model: Path, tmp_path: Path, dtype: Any) -> None:
    store = cached(model, tmp_path / "s.zarr", dtype=dtype)
    run = generated(store, asked("0", "2", subsets=("none", "even", "odd", "0,3,4"))).dataset()
    assert run.text.dims == run.success.dims == ("checkpoint", "layer", "subset", "trial")
    for label in LABELS:
        stock = AutoModelForCausalLM.from_pretrained(model / label, dtype=getattr(torch, dtype)).eval()
        tokenizer = AutoTokenizer.from_pretrained(model / label)
        for layer in (0, 2):
            for subset in run.subset.values:
                heads = run["mask"].sel(subset=subset).values.tolist()
                for trial, contrast in enumerate(store.trials().contrasts):
                    prompts = [tuple(tokenizer(text)["input_ids"]) for text in (contrast.clean, contrast.corrupt)]
                    with torch.inference_mode():
                        expected = reference(stock, SlicePatch(*prompts, layer, tuple(heads)), n_tokens=20)
                    at = {"checkpoint": label, "layer": layer, "subset": subset, "trial": trial}
                    assert run.token.sel(at).values.tolist() == expected + [-1] * (20 - len(expected))
                    text = tokenizer.decode(expected, skip_special_tokens=True)
                    assert run.text.sel(at).item() == text
                    assert run.success.sel(at).item() == succeeds(text, contrast)
    unpatched = run.text.sel(subset="none").values
    assert (unpatched[:, 0] == unpatched[:, 1]).all(), "where nothing is patched, layers do not differ"
    assert (run.text.sel(subset="even").values != unpatched).any()


def test_the_score_is_the_studys() -> None:
    contrast = Contrast("", "", " 9.8", " 9.11", "published")
    told = {" 9.8": True, "It is 9.8, of course": True, "9.11": False, "9.8 or 9.11": False, "nine": False, "": False}
    assert {text: succeeds(text, contrast) for text in told} == told
    assert succeeds("MARY", Contrast("", "", " Mary", " John", "mine"))


@pytest.mark.slow
def test_identical_trials_are_one(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert script("cache", "--model", model, "--task", "published", cache=cache).returncode == 0
    done = script("patch", "--protocol", "published", "--layers", "1", "--verbose", cache=cache)
    assert done.returncode == 0, done.stderr
    assert "over 1 distinct prompt\n" in done.stdout and "6 patched runs in" in done.stdout
    [path] = cache.glob("*.zarr")
    run = xr.open_zarr(path, group="patches/published-layers1", consolidated=False)
    assert run.sizes["trial"] == 1 and list(run.subset.values) == list(SUBSETS) and run.complete.all()
    assert run.attrs["patch"]["protocol"] == "published"
    again = script("patch", "--protocol", "published", "--layers", "1", cache=cache)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    report = script("report", cache=cache)
    assert report.returncode == 2 and "headlapse patch" in report.stderr, "a report needs a run of logit differences"


@pytest.mark.slow
def test_checkpoints_that_are_done_are_not_generated_again(model: Path, tmp_path: Path) -> None:
    store = cached(model, tmp_path / "s.zarr")
    generated(store, asked(), ["step0"])
    first = store.patch_dataset("r").text.sel(checkpoint="step0").values.tolist()
    run = generated(store, asked(), ["step10"])
    assert run.complete() == {"step0": 0, "step10": 1}
    assert run.dataset().text.sel(checkpoint="step0").values.tolist() == first


def test_a_text_that_differs_from_the_definition_is_a_problem_and_not_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = cached(model, tmp_path / "s.zarr")
    monkeypatch.setattr(room, "reference_generate", lambda *_: [1, 2, 3])
    with pytest.raises(AssertionError, match="by transformers' own generate"):
        generated(store, asked(), ["step0"])
    assert store.patch_names() == ["r"] and not TextRun(store.path / "patches" / "r").complete()


@pytest.fixture(scope="module")
def kept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    yield cached(model, tmp_path_factory.mktemp("kept") / "s.zarr")


def test_what_the_study_does_not_have_is_refused(kept: Store) -> None:
    with pytest.raises(UserError, match=f"patches layer 6, this model has layers 0 to {N_LAYERS - 1}; say --layers"):
        make_plan(asked(*LAYERS), kept)
    for flag, value in {"joint": True, "positions": "end:3", "direction": "noise"}.items():
        with pytest.raises(UserError, match=f"leave --{flag} out"):
            make_plan(asked(**{flag: value}), kept)
    assert make_plan(asked("1", "2"), kept).n_runs == 2 * 3 * 3


def test_other_settings_have_other_names() -> None:
    sweeps = [asked(), asked("6"), asked(subsets=("even",)), asked(dtype="float16"), asked("0", "1")]
    assert len({name_of(sweep) for sweep in sweeps}) == len(sweeps)
    assert name_of(asked("6")) == "published-layers6"


def texts(
    rates: dict[str, tuple[float, float, float]], layers: tuple[int, ...] = (6,), n_trials: int = 1
) -> xr.Dataset:
    success = np.array(list(rates.values()), dtype=bool)[:, None, :, None].repeat(len(layers), 1).repeat(n_trials, 3)
    dims = ("checkpoint", "layer", "subset", "trial")
    steps = [int(label.removeprefix("step")) for label in rates]
    return xr.Dataset(
        {"success": (dims, success), "text": (dims, np.full(success.shape, " 9.8 is", dtype=object))},
        coords={
            "checkpoint": list(rates), "step": ("checkpoint", steps), "complete": ("checkpoint", [True] * len(rates)),
            "n_near": ("checkpoint", [0] * len(rates)), "layer": list(layers), "subset": list(SUBSETS),
            "mask": (("subset", "head"), np.zeros((3, N_HEADS), bool)),
        },
    )  # fmt: skip


def test_the_studys_numbers_stand_beside_ours_for_its_own_model_and_prompts() -> None:
    run = texts({"step32000": (1, 1, 1), "step143000": (0, 0, 0), "step7": (0, 0, 0)})
    told = format_texts(run, {"model": "EleutherAI/pythia-160m", "task": "published"})
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line.startswith("step") and "%" in line}
    assert rows["step32000"] == ["6", *["100%"] * 3, "+0.00", *["100%"] * 3, *["100%"] * 3, "yes"]
    assert rows["step143000"] == ["6", *["0%"] * 3, "+0.00", "0%", "100%", "0%", *["0%"] * 3, "no"]
    assert rows["step7"] == ["6", "0%", "0%", "0%", "+0.00"], "the study has no such checkpoint"
    assert "the study gives no numbers for pythia-70m" in format_texts(
        run, {"model": "pythia-70m", "task": "published"}
    )


def test_of_several_layers_the_one_is_shown_where_even_and_odd_are_furthest_apart() -> None:
    run = texts({"step1": (0, 0, 0)}, layers=(0, 1, 2), n_trials=2)
    run.success.loc[{"layer": 1, "subset": "odd"}] = True
    row = next(line for line in format_texts(run, {"model": "m", "task": "decimal"}).splitlines() if "%" in line)
    assert row.split() == ["step1", "1", "0%", "0%", "100%", "-1.00"]

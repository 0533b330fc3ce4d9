"""Laws of generated answers: those of transformers' own generate with z patched in the prompt, and no later."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import PreTrainedModel

from headlapse.engine.capture.run import cache_series
from headlapse.engine.checkpoints.resolve import resolve
from headlapse.engine.replay import patched_generation as room
from headlapse.engine.replay.patched_generation import (
    MOST_TEXTS,
    PatchedGeneration,
    begins_with,
    generate_patched,
    reference_generate,
)
from headlapse.engine.replay.run import make_plan, name_of, open_run, patch_series
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.runtime.resources import Machine
from headlapse.engine.store.patched_run import PatchedRun
from headlapse.engine.store.store import Store
from headlapse.engine.study.patch_settings import PatchRequest
from headlapse.engine.study.study import Study
from tests.models import MAIN, N_HEADS, VOCAB, save, tiny, tiny_tokenizer
from tests.reference import OUTPUT_PROJECTION, aligned
from tests.test_capture import dressed
from tests.test_generation import ALL, EVEN, NONE, ODD, in_precision
from tests.test_scripts import messages
from tests.test_scripts import run as script

pytestmark = pytest.mark.thorough

N_TOKENS = 6
LABELS = ["step0", "step10"]


@contextmanager
def z_hooked(model: PreTrainedModel, layers: tuple[int, ...], see: Any) -> Iterator[None]:
    """`see` hears layer and z (position, head, head_dim) of the one prompt, and may change it in place."""
    path, handles = OUTPUT_PROJECTION[model.config.model_type], []
    for layer in layers:

        def hook(_module: Any, args: tuple[Any, ...], layer: int = layer) -> tuple[Any, ...]:
            z = args[0].clone().unflatten(-1, (model.config.num_attention_heads, -1))
            see(layer, z[0])
            return (z.flatten(-2), *args[1:])

        handles.append(model.get_submodule(path.format(layer)).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reference(model: PreTrainedModel, generation: PatchedGeneration, n_tokens: int = N_TOKENS) -> list[int]:
    """Spelled out.  Only the prompt has more than one position at a time."""
    kept: dict[int, Tensor] = {}
    with z_hooked(model, generation.site, kept.__setitem__):
        if generation.site:
            model(torch.tensor([generation.source]))

    def patch(layer: int, z: Tensor) -> None:
        if len(z) == 1:
            return
        for into, out_of in zip(generation.into, generation.out_of, strict=True):
            for head in np.flatnonzero(generation.heads):
                z[into, head] = kept[layer][out_of, head]

    generate_stock: Any = model.generate
    with z_hooked(model, generation.site, patch):
        texts = generate_stock(
            torch.tensor([generation.target]), attention_mask=torch.ones(1, len(generation.target), dtype=torch.long),
            max_new_tokens=n_tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return texts[0, len(generation.target) :].tolist()


def generations(n: int = 4, seed: int = 0) -> list[PatchedGeneration]:
    """Prompts of several lengths, one layer and joint ones, one position and several."""
    rng = np.random.default_rng(seed)
    some = (NONE, EVEN, ODD, ALL, tuple((rng.random(N_HEADS) < 0.5).tolist()))
    cases = []
    for index in range(n):
        source, target = (tuple(rng.integers(1, VOCAB, size).tolist()) for size in (5 + 2 * (index % 3), 6 + index % 2))
        for site in ((0,), (2,), (0, 1)):
            pairs = aligned(("last", "end:3")[index % 2], len(source), len(target))
            out_of, into = zip(*pairs, strict=True)
            cases += [PatchedGeneration(target, source, site, heads, into, out_of) for heads in some]
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", MAIN)
@torch.inference_mode()
def test_a_batch_gives_the_texts_of_stock_generate(name: str, dtype: torch.dtype) -> None:
    model, resident = in_precision(tiny(name), dtype)
    patched = generations()
    texts = generate_patched(resident, patched, N_TOKENS, batch_size=11)
    assert texts.tokens == [reference(model, generation) for generation in patched]
    assert texts.n_near < len(patched) / (10 if dtype == torch.float32 else 2), "the batch decides nearly all of them"
    assert any(a != b for a, b in zip(texts.tokens[0::5], texts.tokens[3::5], strict=True)), "patching tells"


@pytest.mark.parametrize("name", MAIN)
@torch.inference_mode()
def test_the_definition_is_the_reference(name: str) -> None:
    model, resident = in_precision(tiny(name), torch.float32)
    for generation in generations(1, seed=1)[::3]:
        assert reference_generate(resident, generation, N_TOKENS) == reference(model, generation)


@torch.inference_mode()
@pytest.mark.slow
def test_the_prompts_patch_is_gone_when_the_model_goes_on() -> None:
    """All heads from the prompt itself: nothing changes, though decoding steps have other z."""
    resident = dressed(tiny("neox-parallel"))
    for generation in generations(3):
        target = generation.target
        here = tuple(range(len(target)))
        own = PatchedGeneration(target, target, generation.site, ALL, here, here)
        texts = generate_patched(resident, [own, PatchedGeneration(target)], N_TOKENS, batch_size=2).tokens
        assert texts[0] == texts[1]


@torch.inference_mode()
def test_generation_leaves_no_hook_behind() -> None:
    resident = dressed(tiny("gpt2"))
    generate_patched(resident, generations(1), 3, batch_size=4)
    reference_generate(resident, generations(1)[1], 3)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in resident.model.modules())


@torch.inference_mode()
def test_texts_longer_than_the_context_are_refused() -> None:
    resident = dressed(tiny("gpt2"))
    with pytest.raises(UserError, match="60 tokens after a prompt of 7 are more than the model's context of 64 holds"):
        generate_patched(resident, generations(2), 60, batch_size=4)


@pytest.mark.parametrize(
    ("text", "right", "wrong", "begins"),
    [
        ("9.8 is", " 9.8", " 9.11", True),
        ("\n 9.8", " 9.8", " 9.11", True),
        ("It is 9.8", " 9.8", " 9.11", False),
        ("9.11", " 9.8", " 9.11", False),
        ("9.11", " 9.1", " 9.11", False),
        ("9.12", " 9.1", " 9.11", False),
        ("9.85", " 9.8", " 9.11", False),
        ("9.8.", " 9.8", " 9.11", True),
        ("9.11.", " 9.11", " 9.1", True),
        ("", " Mary", " John", False),
    ],
)
def test_a_text_succeeds_when_it_begins_with_the_right_answer(text: str, right: str, wrong: str, begins: bool) -> None:
    assert begins_with(text, right, wrong) == begins


# --- through the store ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("series")
    for seed, label in enumerate(LABELS):
        save(tiny("neox-parallel", seed), directory / label, tokenizer=tiny_tokenizer())
    return directory


@pytest.fixture(scope="module")
def cache(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with a store whose prompts differ in length between the runs."""
    cache = tmp_path_factory.mktemp("cache")
    study = Study(str(model), trials=3)
    path = cache / "s.zarr"
    list(cache_series(study, resolve(study.model, (), cache), path, cache, Machine()))
    return cache


def generated(cache: Path, sweep: PatchRequest, name: str, labels: list[str] = LABELS) -> PatchedRun:
    store = Store(cache / "s.zarr")
    plan = make_plan(sweep, store)
    run = open_run(store, plan, name)
    outcomes = list(patch_series(store, plan, run, labels, cache, Machine(), lambda _n: None))
    assert [outcome.problem for outcome in outcomes] == [None] * len(labels)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("joint", [False, True], ids=["single", "joint"])
def test_every_text_of_a_run_is_that_of_stock_generate(cache: Path, direction: Any, joint: bool) -> None:
    request = PatchRequest(("none", "even", "0,3"), ("0", "2"), joint, "end:2", direction, None, generate=N_TOKENS)
    run = generated(cache, request, f"all-{direction}-{joint}").dataset()
    store, tokenizer = Store(cache / "s.zarr"), tiny_tokenizer()
    trials = store.trials()
    assert run.text.dims == run.success.dims == run.logit_diff.dims
    source, target = (0, 1) if direction == "denoise" else (1, 0)
    for index, label in enumerate(LABELS):
        stock, _ = in_precision(tiny("neox-parallel", index), torch.float32)
        for trial, contrast in enumerate(trials.contrasts):
            rows = [tuple(trials.tokens[run, trial, : trials.length[run, trial]].tolist()) for run in (0, 1)]
            out_of, into = zip(*aligned("end:2", len(rows[source]), len(rows[target])), strict=True)
            prompt = (contrast.clean, contrast.corrupt)[target]
            given = len(tokenizer(prompt)["input_ids"])
            right = tokenizer.decode(tokenizer(prompt + contrast.answer)["input_ids"][given:])
            for layer in run.layer.values.tolist():
                for subset, heads in zip(run.subset.values.tolist(), run["mask"].values.tolist(), strict=True):
                    generation = PatchedGeneration(
                        rows[target], rows[source], (0, 2) if joint else (layer,), tuple(heads), into, out_of
                    )
                    with torch.inference_mode():
                        expected = reference(stock, generation)
                    at = run.sel(checkpoint=label, layer=layer, subset=subset).isel(trial=trial)
                    assert at.token.values.tolist() == expected + [-1] * (N_TOKENS - len(expected))
                    text = tokenizer.decode([*rows[target][given:], *expected], skip_special_tokens=True)
                    assert at.text.item() == text
                    assert at.success.item() == text.startswith(right)
    assert (run.text.sel(subset="none") == run[("corrupt", "clean")[source == 1] + "_text"]).all()
    assert (run.text.sel(subset="even") != run.text.sel(subset="none")).any()


@pytest.mark.slow
def test_a_text_that_begins_with_the_right_token_has_it_ahead(cache: Path) -> None:
    run = generated(cache, PatchRequest(("even", "odd", "all", "each"), generate=1), "first").load()
    trials = Store(cache / "s.zarr").trials()
    first = run.token.isel(token=0)
    right, wrong = (xr.DataArray(trials.answer_tokens[:, answer], dims="trial") for answer in (0, 1))
    assert (run.logit_diff.where(first == right) > 0).where(first == right, True).all()
    assert (run.logit_diff.where(first == wrong) < 0).where(first == wrong, True).all()


def test_a_text_that_differs_from_the_definition_is_a_problem_and_not_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "reference_generate", lambda *_: [1, 2, 3])
    with pytest.raises(AssertionError, match="by transformers' own generate"):
        generated(cache, PatchRequest(("even",), ("1",), generate=3), "wrong", ["step0"])
    assert not PatchedRun(cache / "s.zarr" / "patches" / "wrong").complete()


@pytest.mark.slow
def test_checkpoints_that_are_done_are_not_generated_again(cache: Path) -> None:
    request = PatchRequest(("even",), ("1",), generate=3)
    first = generated(cache, request, "grown", ["step0"]).dataset().text.values[0].tolist()
    run = generated(cache, request, "grown", ["step10"])
    assert run.complete() == {"step0": 0, "step10": 1}
    assert run.dataset().text.values[0].tolist() == first


def test_more_texts_than_anyone_waits_for_are_refused_with_the_count(cache: Path) -> None:
    store = Store(cache / "s.zarr")
    lattice = PatchRequest(("lattice",), generate=20)
    n_texts = len(store.layers) * 2**N_HEADS * 3
    assert n_texts < MOST_TEXTS and make_plan(lattice, store).n_tokens == 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "MOST_TEXTS", 1000)
        with pytest.raises(UserError, match=f"256 subsets x 3 prompts are {n_texts:,} texts a checkpoint, more than"):
            make_plan(lattice, store)
    with pytest.raises(UserError, match="--generate -1: give a number of tokens"):
        make_plan(PatchRequest(generate=-1), store)


def test_other_numbers_of_tokens_have_other_names() -> None:
    assert len({name_of(PatchRequest(generate=n)) for n in (0, 3, 20)}) == 3
    assert name_of(PatchRequest()) == name_of(PatchRequest(generate=0))


@pytest.mark.slow
def test_the_command_shows_texts_beside_the_logit_differences(cache: Path) -> None:
    words = ("patch", cache / "s.zarr", "--generate", "4", "--layers", "1", "--subsets", "even", "odd", "none")
    done = script(*words, "--verbose", cache=cache)
    assert done.returncode == 0, done.stderr
    assert "texts of 4 greedy tokens that begin with the right answer, over 3 distinct prompts" in done.stdout
    header = next(line for line in done.stdout.splitlines() if "agree" in line)
    assert header.split() == ["clean", "corrupt", "even", "odd", "agree", "layer"]
    assert "step10, corrupt: '" in done.stdout and "step10, even: '" in done.stdout
    run = xr.open_zarr(
        cache / "s.zarr", group="patches/denoise-last-even+odd+none-layers1-generate4", consolidated=False
    )
    assert run.sizes["token"] == 4 and run.complete.all() and run.attrs["patch"]["generate"] == 4
    assert "nothing to do" in script(*words, cache=cache).stdout
    report = script("report", cache / "s.zarr", "--out", cache / "report", cache=cache)
    assert report.returncode == 0, report.stderr
    assert "What the model says" in (cache / "report" / "index.html").read_text()
    assert (cache / "report" / "answers.csv").exists()
    refused = script(*words[:2], "--generate", "5", "--protocol", "published", "--layers", "1", cache=cache)
    assert refused.returncode == 2 and "leave --generate out" in messages(refused)[0]

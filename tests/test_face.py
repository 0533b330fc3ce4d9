"""The Python face: the same results as the command, nothing changed that belongs to the user."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import headlapse as hl
from headlapse.__main__ import main
from headlapse.engine.checkpoints.loaded_model import save_loaded_model
from tests.forked import exit_status
from tests.models import save, tiny, tiny_tokenizer
from tests.test_kills import STRIDE, Recorder, each_kill, empty_what_was_not_synced, files_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("face")
    for seed, label in enumerate(("step0", "step10")):
        save(tiny("neox-parallel", seed), folder / "series" / label, tokenizer=tiny_tokenizer())
    return folder


@pytest.fixture(autouse=True)
def cache_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADLAPSE_CACHE", str(folder / "cache"))


@pytest.fixture
def store(folder: Path) -> hl.Store:
    return hl.cache(folder / "series", task="decimal", trials=3)


def test_importing_loads_no_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import headlapse, time; headlapse.UserError, headlapse.__version__\n"
        "print(sorted({'torch', 'numpy', 'pandas', 'zarr', 'cyclopts'} & set(sys.modules)), time.process_time())"
    )
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    modules, _, seconds = asked.stdout.rpartition(" ")
    assert modules == "[]" and float(seconds) < 2 * 0.2, asked.stderr


def test_the_public_names_are_there_and_no_others() -> None:
    assert set(dir(hl)) >= {"cache", "open", "Store", "PatchedRun", "UserError", "__version__", "compare", "doctor"}
    assert all(hasattr(hl, name) for name in dir(hl))
    with pytest.raises(AttributeError, match="no attribute 'watch'"):
        _ = hl.watch  # type: ignore[attr-defined]


def test_a_store_is_what_the_command_makes_and_opens_by_path_or_as_the_newest(
    store: hl.Store, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "--model", str(folder / "series"), "--trials", "3"]) == 0
    assert "nothing to do: 2 of 2" in capsys.readouterr().out
    assert store.checkpoints == ["step0", "step10"] and store.study["trials"] == 3
    assert hl.open(store.path).path == hl.open().path == store.path
    assert store.dataset.sizes["trial"] == 3


@pytest.mark.slow
def test_a_patched_run_has_numbers_heads_verdict_and_page(
    store: hl.Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = store.patch(subsets=["each", "all"], layers="all", positions="last", name="heads")
    assert isinstance(run.dataset, xr.Dataset) and run.name in store.runs
    heads = run.heads()
    assert list(heads.index.names) == ["checkpoint", "layer", "head"] and len(heads) == 2 * 3 * 8
    assert {"effect", "low", "high", "p_adjusted", "share"} <= set(heads.columns)
    first = run.dataset.logit_diff.sel(checkpoint="step10", layer=1, subset="4") - run.dataset.corrupt_logit_diff.sel(
        checkpoint="step10"
    )
    assert heads.loc["step10", 1, 4].effect == pytest.approx(float(first.mean()), abs=1e-6)
    assert main(["patch", str(store.path), "--subsets", "each", "all", "--layers", "all", "--name", "heads"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("nothing to do") and printed[1:] == list(run.verdict())
    assert str(run.verdict()) == "\n".join(printed[1:])
    page = run.report(tmp_path / "out")
    assert page == tmp_path / "out" / "index.html" and re.search(r"heads\b.{0,40}\(this page\)", page.read_text())
    assert store["heads"].settings == run.settings and "heads" in repr(run)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_a_loaded_model_is_captured_as_it_is_and_left_as_it_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path))
    model, tokenizer = tiny(name, seed=3).train(), tiny_tokenizer()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    config, weights = model.config.to_dict(), {key: value.clone() for key, value in model.state_dict().items()}
    store = hl.cache(model, tokenizer=tokenizer, trials=3)
    assert model.training and model.config.to_dict() == config and model.config._attn_implementation == "eager"
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    tokens, length = store.dataset.tokens.values, store.dataset.length.values
    row = torch.from_numpy(tokens[0, 0, : length[0, 0]])[None]
    logits = model.eval()(row).logits[0, -1]
    right, wrong = store.dataset.answer_tokens.values[0]
    captured = store.dataset.answer_logits.values[0, 0, 0]
    np.testing.assert_allclose(captured, logits[[right, wrong]].detach().numpy(), rtol=0, atol=1e-4)
    again = hl.cache(model, tokenizer=tokenizer, trials=3)
    assert again.path == store.path and len(list((tmp_path / "models").iterdir())) == 1
    # In a later process there is nothing but the disk.
    run = hl.open(store.path).patch(subsets="each", layers=1)
    assert float(run.dataset.self_check.max()) <= 1e-4


@pytest.mark.slow
def test_other_weights_of_a_loaded_model_are_another_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path))
    stores = [hl.cache(tiny("gpt2", seed), tokenizer=tiny_tokenizer(), trials=2, sites="z") for seed in (0, 1)]
    assert stores[0].path != stores[1].path
    assert (stores[0].dataset.z.values != stores[1].dataset.z.values).any()


def save_until(place: Path, kill_at: int, log: Path) -> None:
    """Save a loaded model in this process, which dies at its file operation of that number."""
    model, tokenizer = tiny("gpt2"), tiny_tokenizer()
    Recorder(kill_at, place, log)
    save_loaded_model(model, tokenizer, place)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to see which file is made durable")
def test_a_loaded_model_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    """After a kill at a file operation and a power cut the next call ends at the same bytes, with nothing beside them;
    HEADLAPSE_KILLS=1 tries every operation."""
    place, log, stride = tmp_path / "place", tmp_path / "log", max(1, STRIDE // 24)
    assert exit_status(save_until, tmp_path / "whole", 10**6, log) == 0
    expected, n_kills = files_of(tmp_path / "whole"), 0
    [whole] = [files_of(model) for model in (tmp_path / "whole" / "models").iterdir()]

    def work(kill_at: int) -> int:
        return exit_status(save_until, place, kill_at, log)

    for kill_at in each_kill(work, place, log, stride):
        n_kills += 1
        empty_what_was_not_synced(log, place)
        assert [files_of(model) for model in (place / "models").glob("[!.]*")] in ([], [whole])
        assert exit_status(save_until, place, 10**6, log) == 0
        assert files_of(place) == expected, f"after a kill at file operation {kill_at}"
    assert n_kills * stride > 5


def test_errors_are_exceptions_with_the_commands_line(store: hl.Store, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(hl.UserError) as raised:
        store.patch(subsets="evens")
    assert main(["patch", str(store.path), "--subsets", "evens"]) == 2
    assert capsys.readouterr().err == f"error: {raised.value}\n"
    for wrong, complaint in (
        (lambda: store.patch(measures="kll"), "--measures kll"),
        (lambda: store.patch(direction="up"), "--direction up"),  # type: ignore[arg-type]
        (lambda: store["nothing"], "no patched run nothing"),
        (lambda: hl.open(store.path.parent / "nowhere.zarr"), "is no store"),
        (lambda: hl.cache(tiny("gpt2")), "needs its tokenizer"),
        (lambda: hl.cache(tiny("gpt2"), tokenizer=tiny_tokenizer(), checkpoints="all"), "is one checkpoint"),
        (lambda: hl.cache("demo", tokenizer=tiny_tokenizer()), "is a name; pass the tokenizer.s name"),
        (lambda: hl.cache(object()), "neither a name nor a transformers model"),  # type: ignore[arg-type]
    ):
        with pytest.raises(hl.UserError, match=complaint):
            wrong()


@pytest.mark.thorough
def test_a_checkpoint_that_cannot_be_had_is_a_warning_and_none_at_all_an_error(folder: Path, tmp_path: Path) -> None:
    for label in ("step0", "step10"):
        save(tiny("neox-parallel"), tmp_path / "series" / label, tokenizer=tiny_tokenizer())
    (tmp_path / "series" / "step10" / "model.safetensors").write_bytes(b"no weights")
    with pytest.warns(UserWarning, match="step10: "):
        store = hl.cache(tmp_path / "series", trials=2, store=tmp_path / "s.zarr")
    assert store.checkpoints == ["step0"]
    with pytest.raises(hl.UserError, match="step10: "):
        hl.cache(tmp_path / "series", trials=2, checkpoints="step10", store=tmp_path / "t.zarr")


@pytest.mark.thorough
def test_a_users_own_warning_filters_stay(store: hl.Store) -> None:
    with warnings.catch_warnings():
        before = list(warnings.filters)
        store.patch(subsets="none", name="filters")
        assert list(warnings.filters) == before


@pytest.mark.slow
def test_only_the_checkpoints_asked_for_are_patched(store: hl.Store) -> None:
    run = store.patch(subsets="none", name="some", checkpoints="step10")
    assert run.dataset.complete.to_series().to_dict() == {"step0": False, "step10": True}
    whole = store.patch(subsets="none", name="some")
    assert bool(whole.dataset.complete.all())


@pytest.mark.slow
def test_notebooks_see_tables(store: hl.Store) -> None:
    run = store.patch(subsets=["each"], name="notebook")
    assert "2 of 2" in store._repr_html_() and "notebook" in run._repr_html_() and "<pre>" in run._repr_html_()


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
    ours = [cell for cell in notebook.cells if cell.cell_type == "code" and "import" not in cell.source]
    texts = [str(output) for cell in ours for output in cell.outputs]
    assert any("effect" in text for text in texts)
    assert not any(word in text for text in texts for word in ("Warning", "warning", "note: "))

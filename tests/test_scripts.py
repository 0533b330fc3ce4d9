"""The commands as a user types them: what they print, what they leave behind, and what they exit with."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import xarray as xr

from headlapse.engine.store.store import Store
from tests.forked import exit_status, run_script
from tests.hub_server import HubServer
from tests.models import N_LAYERS, Form, legacy_buffers, save, tiny, tiny_tokenizer

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parent.parent
REPO = "someone/tiny-neox"
FORM_OF: dict[str, Form] = {"step0": "bin", "step10": "sharded-safetensors", "step20": "safetensors"}

Done = subprocess.CompletedProcess[str]


def run(script: str, *arguments: object, cache: Path, env: Mapping[str, str] | None = None, kill_at: int = -1) -> Done:
    """Run a script: in this process, unless it needs an environment of its own or has to die."""
    words = [f"scripts/{script}.py", *map(str, arguments)]
    if kill_at >= 0:
        done = run_to_the_death(words, cache, kill_at)
    elif env is None:
        done = run_here(words, cache)
    else:
        variables = {**env, "HEADLAPSE_CACHE": str(cache)}
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def run_to_the_death(words: list[str], cache: Path, kill_at: int) -> Done:
    """In a process that is killed with SIGKILL at its write number `kill_at` to a store."""
    with TemporaryDirectory() as directory:
        output = Path(directory) / "printed"
        env = {**os.environ, "HEADLAPSE_CACHE": str(cache)}
        status = exit_status(run_script, words, ROOT, env, output, kill_at)
        return Done(words, status, *(output.with_suffix(suffix).read_text() for suffix in (".out", ".err")))


def run_here(words: list[str], cache: Path) -> Done:
    """What a command does, without the seconds that a new process spends importing."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("HEADLAPSE_CACHE", str(cache))
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    return Done(words, int(end.value.code or 0), out.getvalue(), err.getvalue())


def messages(done: Done) -> list[str]:
    """The lines on stderr that are no progress bar."""
    lines = done.stderr.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith(("error", "warning", "note"))]


def store_files(cache: Path) -> dict[str, bytes]:
    """Every array of every store, file by file."""
    files = [f for f in sorted(cache.rglob("*")) if f.is_file() and f.suffix != ".lock" and f.name != "zarr.json"]
    return {str(f.relative_to(cache)): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random checkpoints, each in another form of weights."""
    directory = tmp_path_factory.mktemp("series")
    for seed, (label, form) in enumerate(FORM_OF.items()):
        model = tiny("neox-parallel", seed)
        extra = legacy_buffers(model) if form == "bin" else None
        save(model, directory / label, form, tokenizer=tiny_tokenizer(), extra=extra)
    return directory


@pytest.fixture(scope="module")
def cached(series: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed cache folder: the series captured, and one patched run."""
    cache = tmp_path_factory.mktemp("cache")
    assert run("cache", "--model", series, cache=cache).returncode == 0
    assert run("patch", "--name", "parity", cache=cache).returncode == 0
    return cache


@pytest.fixture
def copied(cached: Path, tmp_path: Path) -> Path:
    """A cache folder of one's own."""
    return Path(shutil.copytree(cached, tmp_path / "copied"))


def the_store(cache: Path) -> Path:
    [path] = cache.glob("*.zarr")
    return path


def test_a_series_is_captured_once_and_the_same_command_again_does_nothing(series: Path, cached: Path) -> None:
    before = store_files(cached)
    again = run("cache", "--model", series, cache=cached)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert store_files(cached) == before


def test_patching_prints_the_timeline_and_the_largest_difference(cached: Path) -> None:
    again = run("patch", "--name", "parity", "--verbose", cache=cached)
    assert again.returncode == 0
    header, _, *rows = again.stdout.splitlines()
    assert header.split() == [
        "step",
        "clean",
        "corrupt",
        "even",
        "odd",
        "all",
        "even",
        "-",
        "odd",
        "rate",
        "best",
        "layer",
    ]
    assert [row.split()[0] for row in rows[:3]] == ["step0", "step10", "step20"]
    assert "nothing to do" in again.stdout and "largest difference" in again.stdout
    assert "5 splits are too few: --subsets balanced" in again.stdout, "as many as double the runs"
    run_of = xr.open_zarr(the_store(cached), group="patches/parity", consolidated=False)
    assert list(run_of.subset.values[:11]) == ["even", "odd", "all", *map(str, range(8))]
    assert (run_of.mask.values[11:].sum(1) == 4).all() and run_of.sizes["subset"] == 11 + 2 * 5
    assert run_of.sizes["layer"] == N_LAYERS
    assert float(run_of.self_check.max()) <= 1e-4


@pytest.mark.slow
def test_even_against_odd_is_tested_against_every_equal_split_where_all_were_run(copied: Path) -> None:
    done = run("patch", the_store(copied), "--subsets", "balanced", "--direction", "noise", "--verbose", cache=copied)
    assert done.returncode == 0
    _, table = done.stdout.split("even - odd   95 % interval")
    assert [row.split()[0] for row in table.splitlines()[2:5]] == ["step0", "step10", "step20"]
    assert f"all 70 equal splits of 8 heads (two-sided, at least 0.029)), adjusted over {3 * N_LAYERS} layers" in table


@pytest.mark.slow
def test_none_is_the_corrupt_run_and_noise_mirrors_denoise(copied: Path) -> None:
    for direction, plain in (("denoise", "corrupt_logit_diff"), ("noise", "clean_logit_diff")):
        done = run("patch", "--subsets", "none", "0,2", "--direction", direction, "--name", direction, cache=copied)
        assert done.returncode == 0, done.stderr
        data = xr.open_zarr(the_store(copied), group=f"patches/{direction}", consolidated=False)
        difference = abs(data.logit_diff.sel(subset="none") - data[plain])
        assert float(difference.max()) <= 1e-4
        assert float(abs(data.logit_diff.sel(subset="0,2") - data[plain]).max()) > 1e-3


@pytest.mark.slow
def test_joint_layers_are_one_entry_on_the_layer_axis(copied: Path) -> None:
    done = run("patch", "--subsets", "lattice", "--layers", "1-2", "--joint", "--positions", "end:3", cache=copied)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if " is in " in line]
    name = line.split("; ")[1].split(" is in ")[0]
    data = xr.open_zarr(the_store(copied), group=f"patches/{name}", consolidated=False)
    assert data.sizes["layer"] == 1 and data.sizes["subset"] == 256
    assert int(data.layer[0]) == 1 and data.attrs["patch"]["layers"] == [1, 2]


@pytest.mark.slow
def test_added_checkpoints_are_the_only_ones_captured_and_patched(series: Path, tmp_path: Path, cached: Path) -> None:
    cache = tmp_path / "cache"
    assert run("cache", "--model", series, "--checkpoints", "step0", "step20", cache=cache).returncode == 0
    assert run("patch", "--name", "parity", cache=cache).returncode == 0
    before = store_files(cache)
    added = run("cache", "--model", series, "--checkpoints", "all", cache=cache)
    assert "cached 1 checkpoint " in added.stdout
    patched = run("patch", "--name", "parity", "--verbose", cache=cache)
    assert [row.split()[0] for row in patched.stdout.splitlines()[2:5]] == ["step0", "step10", "step20"]
    after = store_files(cache)
    data = "/c/"
    assert all(
        after[name] == before[name]
        for name in before
        if data in name and name.split(data)[0].split("/")[-1] in ("z", "logit_diff")
    )
    ours, theirs = (xr.open_zarr(the_store(c), group="patches/parity", consolidated=False) for c in (cache, cached))
    assert (ours.logit_diff.sel(checkpoint=theirs.checkpoint).values == theirs.logit_diff.values).all()


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [5, 36, 42, 49])
def test_a_killed_capture_finishes_with_the_same_command_bit_for_bit(
    series: Path, cached: Path, tmp_path: Path, kill_at: int
) -> None:
    killed = run("cache", "--model", series, cache=tmp_path, kill_at=kill_at)
    assert killed.returncode == -signal.SIGKILL, "the series is written in fewer steps than that"
    assert run("cache", "--model", series, cache=tmp_path).returncode == 0
    whole = {name: data for name, data in store_files(cached).items() if "/patches/" not in name}
    assert store_files(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [3, 30, 45])
def test_killed_patching_finishes_with_the_same_command_bit_for_bit(cached: Path, copied: Path, kill_at: int) -> None:
    shutil.rmtree(the_store(copied) / "patches")
    killed = run("patch", "--name", "parity", cache=copied, kill_at=kill_at)
    assert killed.returncode == -signal.SIGKILL
    assert run("patch", "--name", "parity", cache=copied).returncode == 0
    assert store_files(copied) == store_files(cached)


def test_another_question_is_refused_with_the_difference_and_the_store_is_untouched(series: Path, cached: Path) -> None:
    before = store_files(cached)
    for arguments, difference in (
        (("--trials", 4), "trials is 15 there, 4 asked"),
        (("--dtype", "float16"), 'dtype is "float32" there, "float16" asked'),
        (("--sites", "1"), 'sites is ["all"] there, ["1"] asked'),
    ):
        refused = run("cache", "--model", series, *arguments, cache=cached)
        assert refused.returncode == 2 and difference in refused.stderr
        assert len(messages(refused)) == 1
    assert store_files(cached) == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--subsets", "evens"), "not a subset"),
        (("--layers", "7"), "layer 7 is not there; the layers are 0 to 2"),
        (("--positions", "all"), "clean and corrupt must be equally long"),
        (("--positions", "first"), "end:K"),
        (("--direction", "sideways"), 'Invalid value "sideways" for --direction'),
        (("--device", "tpu9"), "--device tpu9"),
        (("--dtype", "int8"), 'Invalid value "int8" for --dtype'),
        (("--memory", "nonsense"), "--memory nonsense: not an amount of memory; write 8GB"),
        (("--memory", "-1GB"), "--memory requires an argument"),
        (("nowhere.zarr",), "no store"),
        (("--name", "../parity"), "--name"),
        (("--name", "parity", "--direction", "noise"), 'direction is "denoise" there, "noise" asked'),
    ],
)
def test_what_cannot_be_patched_is_refused_in_a_line(cached: Path, arguments: tuple[str, ...], complaint: str) -> None:
    refused = run("patch", *arguments, cache=cached)
    assert refused.returncode == 2
    [line] = messages(refused)
    assert complaint in line


@pytest.mark.slow
def test_one_bad_checkpoint_among_many_is_named_and_the_others_are_finished(series: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(series, tmp_path / "series"))
    [weights] = (copy / "step20").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    done = run("cache", "--model", copy, cache=tmp_path / "cache")
    assert done.returncode == 1 and "cached 2 checkpoints" in done.stdout
    [line] = messages(done)
    assert line.startswith("error: step20: ") and "model.safetensors" in line
    patched = run("patch", "--verbose", cache=tmp_path / "cache")
    assert patched.returncode == 0 and "step10" in patched.stdout


def test_a_step_of_another_shape_is_refused_by_name(series: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(series, tmp_path / "series"))
    shutil.rmtree(copy / "step10")
    save(tiny("neox-parallel", num_hidden_layers=2), copy / "step10", tokenizer=tiny_tokenizer())
    done = run("cache", "--model", copy, cache=tmp_path / "cache")
    assert done.returncode == 1
    [line] = messages(done)
    assert line.startswith("error: step10: ") and "shape" in line


def test_a_step_whose_tokenizer_cuts_the_prompts_otherwise_is_refused_by_name(series: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(series, tmp_path / "series"))
    vocabulary = copy / "step10" / "tokenizer.json"
    content = json.loads(vocabulary.read_text())
    words = content["model"]["vocab"]
    words["8"], words["9"] = words["9"], words["8"]
    vocabulary.write_text(json.dumps(content))
    done = run("cache", "--model", copy, cache=tmp_path / "cache")
    assert done.returncode == 1 and "cached 2 checkpoints" in done.stdout
    [line] = messages(done)
    assert line.startswith("error: step10: ") and "other tokens" in line


@pytest.mark.slow
def test_overwriting_keeps_the_old_store_until_the_new_one_is_whole(series: Path, copied: Path, tmp_path: Path) -> None:
    before, alike = store_files(copied), tmp_path / "alike.jsonl"
    alike.write_text('{"clean": "9", "corrupt": "8", "answer": " 1", "wrong": " 11"}\n')
    for wrong in (("--task", "nope"), ("--sites", "foo"), ("--task", alike), ("--sites", "9")):
        refused = run("cache", "--model", series, "--overwrite", *wrong, "--store", the_store(copied), cache=copied)
        assert refused.returncode == 2 and len(messages(refused)) == 1, refused.stderr
        assert store_files(copied) == before
    done = run("cache", "--model", series, "--overwrite", "--trials", 4, cache=copied)
    assert done.returncode == 0 and "x 8 prompts" in done.stdout
    assert xr.open_zarr(the_store(copied), consolidated=False).sizes["trial"] == 4


@pytest.mark.parametrize("place", [".", "/", "README.md", "README.md/x.zarr", "engine", ".hidden", "n" * 300])
def test_a_place_that_cannot_be_a_store_is_one_line_and_left_alone(series: Path, tmp_path: Path, place: str) -> None:
    refused = run("cache", "--model", series, "--store", place, cache=tmp_path)
    assert refused.returncode in (1, 2) and len(messages(refused)) == 1, refused.stderr


def test_no_checkpoint_at_all_is_a_refusal_and_leaves_no_store(tmp_path: Path) -> None:
    model = save(tiny("gpt2"), tmp_path / "model", tokenizer=tiny_tokenizer())
    (model / "model.safetensors").write_bytes(b"not weights")
    done = run("cache", "--model", model, cache=tmp_path / "cache")
    assert done.returncode == 2 and len(messages(done)) == 1
    assert not list((tmp_path / "cache").glob("*.zarr"))


def test_weights_that_were_exchanged_since_the_capture_are_refused(series: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(series, tmp_path / "series"))
    assert run("cache", "--model", copy, "--checkpoints", "step20", cache=tmp_path / "cache").returncode == 0
    save(tiny("neox-parallel", seed=99), copy / "step20")
    refused = run("patch", cache=tmp_path / "cache")
    assert refused.returncode == 2 and "are not those that were cached" in refused.stderr


@pytest.mark.slow
def test_checkpoints_with_the_same_weights_at_different_steps_are_noticed(series: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(series, tmp_path / "series"))
    shutil.copytree(copy / "step20", copy / "step30")
    done = run("cache", "--model", copy, cache=tmp_path / "cache")
    assert done.returncode == 0
    [line] = messages(done)
    assert line.startswith("warning: step20, step30 serve the same weights")


def test_memory_that_holds_no_checkpoint_is_refused_with_what_it_takes(series: Path, tmp_path: Path) -> None:
    refused = run("cache", "--model", series, "--memory", "1kB", cache=tmp_path)
    assert refused.returncode == 2 and not refused.stdout
    named = set[str]()
    for line in messages(refused):
        found = re.fullmatch(
            r"error: (.*): the weights take (\d+) kB in float32, the 1 kB allowed do not hold more; give .*--memory.*",
            line,
        )
        assert found, line
        labels = found[1].split(", ")
        assert all(abs(int(found[2]) * 1000 - weight_bytes(series / label)) < 20_000 for label in labels)
        named.update(labels)
    assert named == set(FORM_OF)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"], "no store, nor the beginning of one"


@pytest.mark.parametrize("memory", ["nonsense", "0", "8 GB GB"])
def test_what_is_no_amount_of_memory_is_one_line_and_exit_status_2(series: Path, tmp_path: Path, memory: str) -> None:
    refused = run("cache", "--model", series, "--memory", memory, cache=tmp_path)
    assert refused.returncode == 2 and not list(tmp_path.iterdir())
    assert messages(refused) == [f"error: --memory {memory}: not an amount of memory; write 8GB or 500MB"]


def weight_bytes(checkpoint: Path) -> int:
    """As float32, which is what the files hold."""
    return sum(path.stat().st_size for path in checkpoint.iterdir() if path.suffix in (".bin", ".safetensors"))


@pytest.mark.slow
def test_memory_for_one_checkpoint_gives_what_plenty_gives(series: Path, copied: Path) -> None:
    assert all(weight_bytes(series / label) < 700_000 < 2 * weight_bytes(series / label) for label in FORM_OF)
    path = the_store(copied)
    for name, memory in (("plenty", ()), ("little", ("--memory", "700kB"))):
        done = run("patch", path, "--name", name, *memory, cache=copied)
        assert done.returncode == 0 and "peak memory" in done.stdout, done.stderr
    plenty, little = (Store(path).patch(name).dataset() for name in ("plenty", "little"))
    assert plenty.complete.all() and set(little.data_vars) == set(plenty.data_vars) >= {"logit_diff"}
    for values in ("logit_diff", "clean_logit_diff", "corrupt_logit_diff", "self_check"):
        np.testing.assert_allclose(little[values], plenty[values], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_series_is_captured_in_memory_for_one_checkpoint_as_in_plenty(
    series: Path, cached: Path, tmp_path: Path
) -> None:
    done = run("cache", "--model", series, "--memory", "700kB", cache=tmp_path)
    assert done.returncode == 0 and "cached 3 checkpoints" in done.stdout, done.stderr
    little, plenty = (Store(the_store(cache)) for cache in (tmp_path, cached))
    assert list(little.complete()) == list(FORM_OF)
    for kind in (*plenty.kinds(), "answer_logits"):
        np.testing.assert_allclose(little.values(kind), plenty.values(kind), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lower_precisions_go_all_the_way(series: Path, tmp_path: Path, dtype: str) -> None:
    chosen = ("--checkpoints", "step20", "--dtype", dtype)
    assert run("cache", "--model", series, *chosen, cache=tmp_path).returncode == 0
    done = run("patch", cache=tmp_path)
    assert done.returncode == 0 and dtype in done.stdout


def test_only_z_can_be_kept_and_is_then_refused_for_patching(series: Path, tmp_path: Path) -> None:
    assert run("cache", "--model", series, "--sites", "z", "--checkpoints", "step0", cache=tmp_path).returncode == 0
    assert "key" not in xr.open_zarr(the_store(tmp_path), consolidated=False)
    refused = run("patch", cache=tmp_path)
    assert refused.returncode == 2 and "--sites z" in refused.stderr


@pytest.mark.slow
def test_sites_from_a_layer_on_give_the_same_patched_runs(series: Path, cached: Path, tmp_path: Path) -> None:
    assert run("cache", "--model", series, "--sites", "1", cache=tmp_path).returncode == 0
    assert run("patch", "--name", "parity", cache=tmp_path).returncode == 0
    ours, theirs = (xr.open_zarr(the_store(c), group="patches/parity", consolidated=False) for c in (tmp_path, cached))
    assert list(ours.layer.values) == [1, 2]
    # Not bit for bit: other runs stand beside them in the matrix products.
    np.testing.assert_allclose(ours.logit_diff.values, theirs.logit_diff.sel(layer=[1, 2]).values, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_users_own_task_of_equal_lengths_is_patched_at_all_positions(series: Path, tmp_path: Path) -> None:
    lines = [
        {
            "clean": f"Which is bigger: 9.{n}?",
            "corrupt": f"Which is bigger: 9.{n - 1}?",
            "answer": f" {n}",
            "wrong": f" {n - 1}",
        }
        for n in range(2, 7)
    ]
    task = tmp_path / "mine.jsonl"
    task.write_text("\n".join(map(json.dumps, lines)))
    done = run("cache", "--model", series, "--task", task, "--checkpoints", "step20", cache=tmp_path)
    assert done.returncode == 0 and "x 10 prompts" in done.stdout, done.stderr
    patched = run("patch", "--positions", "all", "--subsets", "all", "--layers", "all", "--joint", cache=tmp_path)
    assert patched.returncode == 0, patched.stderr


def test_a_bad_line_of_a_task_is_refused_with_its_number(series: Path, tmp_path: Path) -> None:
    task = tmp_path / "mine.jsonl"
    task.write_text('{"clean": "9", "corrupt": "8", "answer": " 1", "wrong": " 2"}\n{"clean": "9"}\n')
    refused = run("cache", "--model", series, "--task", task, cache=tmp_path / "cache")
    assert refused.returncode == 2
    [line] = messages(refused)
    assert "line 2" in line and "corrupt" in line
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("*.zarr"))


@pytest.mark.slow
def test_revisions_of_a_hub_are_captured_by_name_and_read_once(
    series: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revisions = {label: {f.name: f for f in (series / label).iterdir()} for label in FORM_OF}
    hub = HubServer({REPO: {**revisions, "main": revisions["step20"]}})
    with hub, hub.used_here(monkeypatch, tmp_path / "home"):
        env = hub.env(tmp_path / "home")
        first = run("cache", "--model", REPO, "--checkpoints", *FORM_OF, cache=tmp_path, env=env)
        assert first.returncode == 0, first.stderr
        n_downloads = len(hub.downloads())
        assert n_downloads > 3
        again = run("cache", "--model", REPO, "--checkpoints", *FORM_OF, cache=tmp_path)
        assert again.returncode == 0 and "nothing to do" in again.stdout
        patched = run("patch", "--name", "parity", cache=tmp_path)
        assert patched.returncode == 0, patched.stderr
        assert len(hub.downloads()) == n_downloads
        commits = {label: hub.commit(REPO, label) for label in FORM_OF}
    store = Store(the_store(tmp_path))
    for label, commit in commits.items():
        assert store.provenance(label)["commit"] == commit
        assert all(len(digest) == 64 for digest in store.provenance(label)["sha256"].values())
    ours, theirs = (xr.open_zarr(the_store(c), group="patches/parity", consolidated=False) for c in (tmp_path, cached))
    assert (ours.logit_diff.values == theirs.logit_diff.values).all()


def test_a_plan_says_what_would_be_fetched_and_stored_and_does_neither(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revisions = {label: {f.name: f for f in (series / label).iterdir()} for label in FORM_OF}
    with HubServer({REPO: revisions}) as hub, hub.used_here(monkeypatch, tmp_path / "home"):
        done = run("cache", "--model", REPO, "--checkpoints", "all", "--plan", cache=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not [name for name in hub.downloads() if name.endswith((".safetensors", ".bin"))]
    assert all(f"{label} " in done.stdout for label in FORM_OF)
    assert "to fetch:" in done.stdout and "to store:" in done.stdout
    assert not list(tmp_path.glob("*.zarr"))


@pytest.mark.parametrize(
    ("model", "checkpoint", "complaint"),
    [(REPO, "step11", "step11"), ("someone/nothing", "main", "someone/nothing"), ("./nowhere", "all", "./nowhere")],
)
def test_a_wrong_name_is_one_line_and_exit_status_2(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, checkpoint: str, complaint: str
) -> None:
    files = {f.name: f for f in (series / "step20").iterdir()}
    with HubServer({REPO: {"step20": files, "main": files}}) as hub, hub.used_here(monkeypatch, tmp_path / "home"):
        refused = run("cache", "--model", model, "--checkpoints", checkpoint, cache=tmp_path)
    assert refused.returncode == 2
    [line] = messages(refused)
    assert complaint in line


@pytest.mark.slow
def test_no_network_is_one_line_and_exit_status_2(tmp_path: Path) -> None:
    hub = HubServer({})
    with hub:
        env = hub.env(tmp_path / "home")
    refused = run("cache", "--model", REPO, "--checkpoints", "step0", cache=tmp_path, env=env)
    assert refused.returncode == 2
    [line] = messages(refused)
    assert "cannot be reached" in line


@pytest.mark.slow
def test_an_interrupt_ends_a_command_at_once_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """The embedded series is in training when the interrupt comes."""
    command = [sys.executable, "scripts/cache.py", "--checkpoints", "step0"]
    env = {**os.environ, "HEADLAPSE_CACHE": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "demo" / "step0").is_dir():
            assert process.poll() is None, "it ended before a step was there"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err and "terminate" not in err

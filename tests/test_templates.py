"""Series that one name does not name: templates of repositories, revisions, folders; a tokenizer from elsewhere."""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

import headlapse
from headlapse.__main__ import main
from headlapse.engine.capture.identity import store_name
from headlapse.engine.checkpoints.fetch import fetch
from headlapse.engine.checkpoints.resolve import Checkpoint, resolve
from headlapse.engine.checkpoints.template import Template, without_fields
from headlapse.engine.checkpoints.training_place import Place
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.runtime.format import format_bytes
from headlapse.engine.store.checkpoint_arrays import CheckpointArrays
from headlapse.engine.study.study import Study
from tests.hub_server import HubServer
from tests.models import save, tiny, tiny_tokenizer
from tests.test_sources import without_waiting

B = 10**9

READ: dict[tuple[str, str], Place | None] = {
    ("stage1-step{step}-*", "stage1-step1000-tokens5B"): Place("stage1", 1000, 5 * B),
    ("stage1-step{step}-*", "stage2-ingredient1-step1000-tokens5B"): None,
    ("{stage}-step{step}-tokens{tokens}", "stage1-step1000-tokens5B"): Place("stage1", 1000, 5 * B),
    ("step{step}", "step143000"): Place(step=143000),
    ("step{step}", "step143000-tokens5B"): None,
    ("hf_ckpt/{tokens}", "hf_ckpt/16.78B"): Place(tokens=16_780_000_000),
    ("hf_ckpt/{tokens}", "other/16.78B"): None,
    ("x/{step}", "x/12k"): Place(step=12_000),
    ("e{epoch}", "e12"): Place(step=12),
    ("part{stage}_at_{tokens}", "part2_at_3T"): Place("2", tokens=3000 * B),
    ("TinyLlama/TinyLlama-1.1B-*-step-{step}-{tokens}", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"): Place(
        step=1_431_000, tokens=3000 * B
    ),
    ("google/multiberts-seed_0-step_{step}", "google/multiberts-seed_0-step_100k"): Place(step=100_000, seed=0),
    ("a.b{step}", "aXb1"): None,
}
"""(template, name) → its place, or None where the template does not fit."""


@pytest.mark.parametrize(("template", "name"), READ)
def test_a_template_reads_the_names_that_fit_it(template: str, name: str) -> None:
    assert Template(template, "--revision").read(name) == READ[template, name]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("step{steps}", "{steps} is no field; there are {stage}"), ("{step}-{step}", "{step} comes twice")],
)
def test_a_template_with_other_fields_or_one_twice_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match="--revision") as refused:
        Template(text, "--revision")
    assert complaint in str(refused.value)


def test_what_is_left_of_a_template_is_a_name() -> None:
    texts = {
        "stage1-step{step}-*": "stage1-step",
        "hf_ckpt/{tokens}": "hf_ckpt",
        "TinyLlama-1.1B-*step-{step}-{tokens}": "TinyLlama-1.1B-step",
        "main": "main",
    }
    assert {text: without_fields(text) for text in texts} == texts
    study = Study("org/map-neo", "decimal", subfolder="hf_ckpt/{tokens}")
    assert store_name(study) == "map-neo-hf_ckpt-decimal.zarr"


# --- on disk ---


def labels(checkpoints: list[Checkpoint]) -> list[str]:
    return [each.label for each in checkpoints]


def test_folders_of_any_pattern_come_in_training_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("it_9", "it_10", "it_1k", "other"):
        (tmp_path / "runs" / name / "hf").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model in ("runs/it_{step}", "./runs/it_{step}", f"{tmp_path}/runs/it_{{step}}"):
        found = resolve(model, (), tmp_path / "cache", subfolder="hf")
        assert labels(found) == ["it_9", "it_10", "it_1k"] and [each.step for each in found] == [9, 10, 1000]
        assert [each.location for each in found] == [f"{tmp_path}/runs/{each.label}/hf" for each in found]
    below = resolve("runs", ("it_10", "1k"), tmp_path / "cache", subfolder="it_{step}/hf")
    assert [(each.label, each.location) for each in below] == [
        ("it_10", f"{tmp_path}/runs/it_10/hf"), ("it_1k", f"{tmp_path}/runs/it_1k/hf"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "options", "complaint"),
    [
        ("runs/x_{step}", {}, "no directory fits it; found there: it_1"),
        ("runs/it_{step}", {"subfolder": "{epoch}"}, "--model and --subfolder both have fields or *"),
        ("runs", {"revision": "main"}, "runs is a directory, which has none"),
        ("demo", {"revision": "main"}, "the embedded series has neither"),
        ("demo", {"subfolder": "x"}, "the embedded series has neither"),
    ],
)
def test_what_no_template_can_mean_is_refused(
    model: str, options: Mapping[str, str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "it_1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        resolve(model, (), tmp_path / "cache", **options)
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--model", "org/m-seed{seed}"], "give the seeds that {seed} stands for, e.g. --seeds 1-9"),
        (["--model", "org/m", "--revision", "seed{seed}-{step}"], "give the seeds that {seed} stands for"),
        (["--model", "org/m-{size}"], "give the sizes that {size} stands for, e.g. --sizes 70m,160m"),
        (["--model", "org/m", "--sizes", "70m"], "has no place for them; write {size} where they stand"),
        (["--model", "org/m-{size}", "--sizes", "70m,,1b"], "write words with commas between"),
        (["--model", "org/m-{size}", "--sizes", "70m", "--store", "x.zarr"], "each of --sizes has a store of its own"),
        (["--model", "org/m", "--subfolder", "../x"], "write a folder below"),
        (["--model", "org/m", "--subfolder", "/x"], "write a folder below"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_asked(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", *words]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err and printed.err.count("\n") == 1 and not printed.out


# --- on a hub ---

WORDS = json.dumps({"clean": "9", "corrupt": "8", "answer": " 1", "wrong": " 2"})

BRANCHES = ("stage1-step10-tokens1B", "stage1-step100-tokens9B", "stage2-step20-tokens2B", "main", "kestrel")
TOKENS = ("16.78B", "104.86B", "1.1T")
REPOSITORIES = ("Tiny-step-50k-105B", "Tiny-step-240k-503B", "Tiny-step-1431k-3T")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tiny model's files."""
    directory = tmp_path_factory.mktemp("model")
    save(tiny("neox-parallel"), directory, tokenizer=tiny_tokenizer())
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def hub(parts: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """Branches and tags, folders, and a repository each; what has no tokenizer of its own."""
    bare = {name: content for name, content in parts.items() if not name.startswith("tokenizer")}
    shuffled = random.Random(5)

    def in_disorder(names: tuple[str, ...]) -> list[str]:
        return shuffled.sample(names, len(names))

    repos = {"org/staged": dict.fromkeys(in_disorder(BRANCHES), parts)}
    inside = {f"hf_ckpt/{at}/{name}": content for at in in_disorder(TOKENS) for name, content in bare.items()}
    repos["org/neo"] = {"main": inside | {"README.md": b""}}
    repos |= {f"org/{name}": {"main": parts} for name in in_disorder(REPOSITORIES)}
    with HubServer(repos, tags=["stage2-step20-tokens2B"]) as server:
        server.use_here(monkeypatch, tmp_path / "home")
        without_waiting(monkeypatch)
        yield server
    huggingface_hub.close_session()


def cached(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """The name of the store that a command makes, of one pair of prompts."""
    monkeypatch.chdir(tmp_path)
    task = tmp_path / "words.jsonl"
    task.write_text(WORDS)
    assert main(["cache", *words, "--task", str(task)], tmp_path / "cache") == 0, capsys.readouterr().err
    [store] = (tmp_path / "cache").glob("*.zarr")
    return store.name


def test_branches_and_tags_that_a_template_fits_are_cached_in_training_order(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--model", "org/staged", "--revision", "stage*-step{step}-*", "--checkpoints", "all")
    name = cached(tmp_path, capsys, monkeypatch, *words)
    assert name == "staged-stage-step-words.zarr"
    arrays = CheckpointArrays(tmp_path / "cache" / name)
    assert list(arrays.complete()) == list(BRANCHES[:3])
    run = arrays.dataset()
    assert run.stage.values.tolist() == ["stage1", "stage1", "stage2"] and run.step.values.tolist() == [10, 100, 20]
    assert run.tokens_seen.values.tolist() == [B, 9 * B, 2 * B]
    assert arrays.attrs["study"]["revision"] == "stage*-step{step}-*"


def test_folders_of_a_repository_are_cached_with_a_tokenizer_from_elsewhere_and_patched(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--model", "org/neo", "--subfolder", "hf_ckpt/{tokens}", "--tokenizer", "org/staged")
    store = headlapse.open(tmp_path / "cache" / cached(tmp_path, capsys, monkeypatch, *words))
    assert store.checkpoints == list(TOKENS) and store.study["tokenizer"] == "org/staged"
    assert store.dataset.tokens_seen.values.tolist() == [16_780_000_000, 104_860_000_000, 1_100_000_000_000]
    assert store.dataset.step.values.tolist() == [-1, -1, -1]
    # Replay fetches the same folders again, by their commit, without asking the hub.
    hub.stop()
    run = store.patch(subsets="all", layers="0", generate=1)
    assert run.dataset.sizes["checkpoint"] == 3 and np.isfinite(run.dataset.logit_diff).all()


def test_without_its_tokenizer_a_repository_is_refused_and_with_a_folder_it_is_read(
    hub: HubServer, parts: dict[str, bytes], tmp_path: Path
) -> None:
    [first, *_] = resolve("org/neo", ("16.78B",), tmp_path, subfolder="hf_ckpt/{tokens}")
    with pytest.raises(UserError, match=r"holds no tokenizer"):
        _ = fetch(first, tmp_path).vocabulary
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(parts["tokenizer.json"])
    [first] = resolve("org/neo", ("16.78B",), tmp_path, subfolder="hf_ckpt/{tokens}", tokenizer=str(folder))
    found = fetch(first, tmp_path)
    assert found.vocabulary == folder / "tokenizer.json"
    assert found.directory.name == "16.78B" and found.commit == hub.commit("org/neo", "main")


def test_a_repository_for_each_checkpoint(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = cached(tmp_path, capsys, monkeypatch, "--model", "org/Tiny-step-{step}-{tokens}")
    assert name == "Tiny-step-words.zarr"
    run = CheckpointArrays(tmp_path / "cache" / name).dataset()
    assert run.checkpoint.values.tolist() == list(REPOSITORIES)
    assert run.step.values.tolist() == [50_000, 240_000, 1_431_000]


def test_ranges_and_numbers_go_by_what_templates_read(hub: HubServer, tmp_path: Path) -> None:
    neo = {"model": "org/neo", "cache": tmp_path, "subfolder": "hf_ckpt/{tokens}"}
    assert labels(resolve(words=("20B..2T",), **neo)) == ["104.86B", "1.1T"]
    assert labels(resolve("org/Tiny-step-{step}-{tokens}", ("100k..2000k",), tmp_path)) == list(REPOSITORIES[1:])
    assert labels(resolve("org/Tiny-step-{step}-{tokens}", ("240k",), tmp_path)) == [REPOSITORIES[1]]
    with pytest.raises(UserError, match="near it are Tiny-step-50k-105B, Tiny-step-240k-503B"):
        resolve("org/Tiny-step-{step}-{tokens}", ("60k",), tmp_path)


@pytest.mark.parametrize(
    ("model", "options", "complaint"),
    [
        ("org/staged", {"revision": "v{step}"}, "no branch or tag of org/staged fits it; found there: kestrel, main"),
        ("org/neo", {"subfolder": "ckpt/{tokens}"}, "no folder of checkpoints in org/neo revision main fits it"),
        ("org/neo", {"subfolder": "{step}", "revision": "v9"}, "org/neo has no such branch, tag or commit"),
        ("org/Huge-{step}", {}, "no repository of org fits it; found there: none"),
        ("{stage}/Tiny-{step}", {}, "their owner cannot vary"),
    ],
)
def test_what_the_hub_does_not_have_is_refused_with_what_it_has(
    model: str, options: Mapping[str, str], complaint: str, hub: HubServer, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        resolve(model, (), tmp_path, **options)
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


# --- what there is ---


def test_the_list_says_what_there_is_and_downloads_nothing(
    hub: HubServer, parts: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "--model", "org/staged", "--checkpoints", "list"], tmp_path) == 0
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("org/staged: 5 checkpoints, stage1-step10-tokens1B to main; weights ")
    once = sum(map(len, parts.values()))
    assert head.split() == ["checkpoint", "stage", "step", "tokens", "weights"]
    assert first.endswith(f", {format_bytes(once)} to fetch")  # all have the same files
    assert [row.split()[0] for row in rows] == [*BRANCHES[:3], "kestrel", "main"]
    assert rows[1].split()[1:4] == ["stage1", "100", "9B"]
    assert not hub.downloads()


def test_a_list_of_what_is_no_one_training_says_so(
    hub: HubServer, parts: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.push("org/staged", "stage2-ingredient2-step20", parts)
    hub.push("org/staged", "stage2-ingredient1-step20", parts)
    words = ["cache", "--model", "org/staged", "--checkpoints", "list", "stage2-ing*"]
    assert main(words, tmp_path) == 0
    second = capsys.readouterr().out.splitlines()[1]
    assert second.startswith("not one training: stage2-ingredient1 and stage2-ingredient2 are branches beside")


def test_the_table_of_checkpoints_in_python(hub: HubServer, parts: dict[str, bytes], tmp_path: Path) -> None:
    table = headlapse.checkpoints("org/neo", subfolder="hf_ckpt/{tokens}")
    assert table.index.tolist() == list(TOKENS) and table.tokens.tolist()[0] == 16_780_000_000
    size = len(parts["model.safetensors"])
    assert table.bytes.tolist() == [size] * 3 and (table.to_fetch >= 0).all() and table.problem.isna().all()
    with pytest.raises(UserError, match="nothing can be cached of a list"):
        headlapse.cache("org/neo", subfolder="hf_ckpt/{tokens}", checkpoints="list")

"""Laws of `headlapse doctor`: what was planted is named, all of it and nothing else; what is healthy is called so."""

import dataclasses
import itertools
import json
import logging
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import headlapse as hl
from headlapse.__main__ import main
from headlapse.engine.checkpoints import known_problems
from headlapse.engine.checkpoints.resolve import Checkpoint
from headlapse.engine.checkpoints.revisions import PYTHIA
from headlapse.engine.checkpoints.same_weights import compare
from headlapse.engine.checkpoints.training_place import read_place
from headlapse.engine.checkpoints.weight_changes import _hardly_moving
from headlapse.engine.checkpoints.weight_findings import Interval, NamedWeights, NotTheLast, SameWeights
from headlapse.engine.store.checkpoint_arrays import CheckpointArrays
from headlapse.engine.store.locks import claimed
from tests.hub_server import HubServer
from tests.models import save, tiny, tiny_tokenizer
from tests.test_integrity import everything_read, files_of, is_noticed
from tests.test_store import everything, replace_values

pytestmark = pytest.mark.slow

STEPS = (0, 10, 20, 30, 40, 50)
WEIGHTS = "model.safetensors"
FLIPS = 12
HASH = "0123456789abcdef" * 2


def moved(directory: Path, step: float, label: str | None = None) -> Path:
    """A checkpoint on a straight way from one random model to another: every step moves as far as the one before."""
    target = directory / (label or f"step{step}")
    shutil.copytree(directory.parent / "from", target)
    start, end = (load_file(directory.parent / name / WEIGHTS) for name in ("from", "to"))
    weights = {name: start[name] + step / 100 * (end[name] - start[name]) for name in start}
    save_file(weights, target / WEIGHTS, {"format": "pt"})
    return target


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor")
    for seed, name in enumerate(("from", "to")):
        save(tiny("neox-parallel", seed), root / name, tokenizer=tiny_tokenizer())
    for step in STEPS:
        moved(root / "series", step)
    return root


@pytest.fixture(scope="module")
def cached(root: Path) -> Path:
    """A store of the series, patched twice, with its mechanism."""
    path = root / "cache" / "s.zarr"
    store = hl.cache(root / "series", checkpoints=["step0", "step10", "step20"], trials=3, store=path)
    store.patch(subsets=["none", "all"], name="one")
    store.patch(subsets=["each"], name="two", direction="noise")
    store.mechanism(parts="attribution")
    return path


@pytest.fixture
def store(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path))
    shutil.copytree(cached, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


@pytest.fixture
def series(root: Path, tmp_path: Path) -> Path:
    """A folder of its own, in which a checkpoint may be planted with `moved`."""
    for name in ("series", "from", "to"):
        shutil.copytree(root / name, tmp_path / name)
    return tmp_path / "series"


def flip(path: Path, place: float = 0.5, bit: int = 4) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= bit
    path.write_bytes(content)


def only(lines: tuple[str, ...]) -> str:
    assert len(lines) == 1, "\n".join(lines)
    return lines[0]


# Stores


def test_a_healthy_store_says_so_and_is_left_as_it_is(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(store.parent)
    assert main(["doctor", str(store)]) == 0
    out = capsys.readouterr().out
    assert f"{store} is healthy: 2 patched runs" in out and "weights of 3 checkpoints compared" in out
    diagnosis = hl.doctor(store)
    assert diagnosis.problems == diagnosis.notes == diagnosis.removed == ()
    assert hl.doctor(hl.open(store)).problems == hl.doctor().problems == ()
    assert everything(store.parent) == before


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("z/c/1/0/0/0/0/0/0", "z (step10, layer"),
        ("resid_pre/c/2/0/0/0/0/0", "resid_pre (step20, layer"),
        ("answer_logits/c/0/0/0/0", "answer_logits (step0)"),
        ("tokens/c/0/0/0", "tokens is damaged"),
        ("record/c/1", "record (step10)"),
        ("complete/c/2", "complete (step20)"),
        ("patches/one/logit_diff/c/1/2/0/0", "patches/one/logit_diff (step10, layer 2)"),
        ("patches/two/clean_logit_diff/c/0/0", "patches/two/clean_logit_diff (step0)"),
        ("mechanism/attribution/c/2/0/0/0/0", "mechanism/attribution (step20)"),
    ],
)
def test_a_flipped_bit_is_named_with_its_array_and_checkpoint(store: Path, file: str, named: str) -> None:
    flip(store / file)
    assert named in only(hl.doctor(store).problems)


def test_whatever_reading_refuses_the_doctor_names_without_ending_early(store: Path) -> None:
    """Random bits of random files: of metadata, marks and records too."""
    before = everything_read(store)
    files = files_of(store)
    for number in range(FLIPS):
        draw = random.Random(number)
        file = draw.choice(files)
        whole = file.read_bytes()
        flip(file, draw.random(), 1 << draw.randrange(8))
        try:
            problems = hl.doctor(store).problems
            assert problems or not is_noticed(store, before), f"{number}: {file.relative_to(store)}"
            assert all("\n" not in line and str(store.parent) in line for line in problems)
        finally:
            file.write_bytes(whole)


def test_every_damage_is_named_not_only_the_first(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("z/c/1/0/0/0/0/0/0", "key/c/0/0/0/0/0/0/0", "patches/one/logit_diff/c/2/0/0/0"):
        flip(store / file)
    (store / "value/c/2/0/0/0/0/0/0").unlink()
    (store / "mechanism/zarr.json").unlink()
    for name in ("mask", "layer"):
        metadata = json.loads((store / f"patches/two/{name}/zarr.json").read_text())
        (store / f"patches/two/{name}/zarr.json").write_text(json.dumps({**metadata, "fill_value": 1}))
    assert main(["doctor", str(store)]) == 1
    lines = capsys.readouterr().out.splitlines()
    for named in (
        "/z (step10, layer", "/key (step0, layer", "/value (step20, layers 0–2)", "one/logit_diff (step20, layer 0)",
        "mechanism/zarr.json is damaged: it is missing", "two/mask/zarr.json", "two/layer/zarr.json",
        "two: nothing else of it could be checked",
    ):  # fmt: skip
        assert len([line for line in lines if named in line]) == 1, (named, lines)
    assert lines[-1] == f"{store}: 9 problems", "with what cannot be checked of two groups"


def test_patching_nothing_that_changed_something_is_named(store: Path) -> None:
    def plant(values, label):  # type: ignore[no-untyped-def]
        values[1, 0] += 0.01 * (label == "step10")
        return values

    replace_values(CheckpointArrays(store / "patches" / "one", store), "logit_diff", plant)
    line = only(hl.doctor(store).problems)
    assert "patches/one (step10, layer 1): patching nothing is not the corrupt run: 0.01 nats apart" in line


def test_a_record_without_a_mark_is_named_and_what_was_never_begun_is_not(store: Path) -> None:
    run = CheckpointArrays(store / "patches" / "two", store)
    run.array("complete")[1] = False
    assert "patches/two: step10 has a record and no completion mark" in only(hl.doctor(store).problems)
    run.array("record")[1] = ""
    assert hl.doctor(store).problems == ()


def planted_leftovers(store: Path) -> list[Path]:
    """What killed processes leave, and beside it what only looks alike."""
    left = [
        store.with_name(".s.zarr.one.partial") / "zarr.json",
        store / "patches" / ".one.gone" / "zarr.json",
        store / f"zarr.{HASH}.partial",
        store / "z" / "c" / "1" / f"0.{HASH}.partial",
        store.with_name(".s.zarr@cache.step0.lock"),
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return left


def test_leftovers_are_listed_and_removed_on_fix_and_nothing_else_is(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    looks_alike = [store.parent / ".t.zarr.one.partial", store.parent / ".s.zarr2@cache.step0.lock", store / "notes"]
    for path in looks_alike:
        path.write_bytes(b"mine")
    (store / "patches" / "two").rename(store / "patches" / "two.partial")
    healthy = everything(store.parent)
    planted_leftovers(store)
    before = everything(store.parent)
    assert main(["doctor", str(store)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{store}: 5 problems" and all("--fix removes it" in line for line in lines[:-1])
    assert everything(store.parent) == before, "nothing is removed before it is asked for"
    assert main(["doctor", str(store), "--fix"]) == 0
    assert capsys.readouterr().out.count("was left by a killed process; removed") == 5
    assert everything(store.parent) == healthy
    assert hl.doctor(store).removed == ()


def test_what_another_process_is_writing_is_no_leftover(store: Path) -> None:
    left = planted_leftovers(store)[:-1]
    with claimed(store, "cache", ["step10"]):
        diagnosis = hl.doctor(store)
        assert diagnosis.problems == () and "another process is writing" in only(diagnosis.notes)
        with pytest.raises(hl.UserError, match="another process is writing"):
            hl.doctor(store, fix=True)
    assert all(path.exists() for path in left)


def test_weights_that_were_changed_or_are_gone_are_named(store: Path, root: Path, tmp_path: Path) -> None:
    weights, away = root / "series" / "step10" / WEIGHTS, tmp_path / "away"
    original = weights.read_bytes()
    try:
        flip(weights, 0.9)
        line = only(hl.doctor(store).problems)
        assert line.startswith("step10:") and f"{WEIGHTS} in {weights.parent} is not what was cached" in line
        weights.unlink()
        assert "step10:" in only(hl.doctor(store).problems)
    finally:
        weights.write_bytes(original)
    (root / "series" / "step20").rename(away)
    try:
        assert f"step20: its weights are no longer at {root / 'series' / 'step20'}" in only(hl.doctor(store).problems)
    finally:
        away.rename(root / "series" / "step20")
    assert hl.doctor(store).problems == ()


def test_weights_that_were_moved_are_compared_where_they_lie_now(store: Path, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "series", tmp_path / "moved")
    assert hl.doctor(store, weights=tmp_path / "moved").problems == ()
    flip(tmp_path / "moved" / "step20" / WEIGHTS, 0.9)
    assert str(tmp_path / "moved" / "step20") in only(hl.doctor(store, weights=tmp_path / "moved").problems)


def test_a_store_whose_checkpoints_share_weights_is_told_from_what_it_recorded(store: Path) -> None:
    arrays = CheckpointArrays(store)
    record = arrays.record("step0")
    record["label"], record["provenance"]["label"] = "step20", "step20"
    array = arrays.array("record")
    other = {**arrays.record("step20"), "provenance": record["provenance"]}
    array[arrays.index("step20")] = json.dumps(other)
    assert "step0, step20 serve the same weights" in only(hl.doctor(store).problems)


@pytest.fixture
def format1(tmp_path: Path) -> Path:
    with zipfile.ZipFile(Path(__file__).parent / "data" / "format1-store.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path / "store.zarr"


def test_a_store_of_format_1_is_read_and_said_to_have_no_checksums(format1: Path) -> None:
    diagnosis = hl.doctor(format1)
    assert [line for line in diagnosis.notes if f"{format1} has format 1, which has no checksums" in line]
    assert all("its weights are no longer at" in line for line in diagnosis.problems), "they lay on another machine"
    chunks = sorted(path for path in (format1 / "z" / "c").rglob("*") if path.is_file())
    chunks[0].write_bytes(chunks[0].read_bytes()[:-40])
    chunks[-1].unlink()
    new = set(hl.doctor(format1).problems) - set(diagnosis.problems)
    assert {line.split(" is damaged")[0] for line in new} == {f"{format1}/z (step0)", f"{format1}/z (step10)"}


def test_options_that_exclude_one_another_and_places_that_are_no_store_are_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(store), "--model", "a/b"]) == 2
    assert main(["doctor", "--model", "a/b", "--fix"]) == 2
    assert main(["doctor", str(tmp_path / "nothing")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)


# Weights


def model_problems(series: Path) -> tuple[str, ...]:
    return hl.doctor(model=series).problems


def test_a_series_that_moves_evenly_has_nothing_wrong(series: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(series)]) == 0
    assert capsys.readouterr().out == f"{series}: nothing that cannot be true in 6 revisions\n"


def test_the_same_file_under_two_steps_is_named(series: Path) -> None:
    shutil.copy(series / "step10" / WEIGHTS, series / "step20" / WEIGHTS)
    line = only(model_problems(series))
    assert "step10, step20 serve the same weights (sha256 " in line and "final" not in line


def test_a_step_that_holds_the_final_tensors_in_another_file_is_named(series: Path) -> None:
    """No hash of a file can tell."""
    weights = load_file(series / "step50" / WEIGHTS)
    (series / "step20" / WEIGHTS).unlink()
    torch.save(weights, series / "step20" / "pytorch_model.bin")
    problems = [line for line in model_problems(series) if "hold the same" in line]
    line = only(tuple(problems))
    assert "step20, step50 hold the same all matrices" in line and "the final checkpoint's" in line


def test_some_tensors_of_another_step_are_named(series: Path) -> None:
    weights, final = load_file(series / "step20" / WEIGHTS), load_file(series / "step50" / WEIGHTS)
    name = next(name for name in weights if "embed_in" in name)
    save_file({**weights, name: final[name]}, series / "step20" / WEIGHTS, {"format": "pt"})
    line = only(model_problems(series))
    assert "step20, step50 hold the same 1 of" in line and name in line


def test_tensors_that_no_checkpoint_trains_are_nothing_to_speak_of(series: Path) -> None:
    start = load_file(series / "step0" / WEIGHTS)
    name = next(name for name in start if "embed_in" in name)
    for step in STEPS:
        file = series / f"step{step}" / WEIGHTS
        save_file({**load_file(file), name: start[name]}, file, {"format": "pt"})
    assert model_problems(series) == ()


def test_weights_that_hardly_move_where_those_around_do_are_named(series: Path) -> None:
    shutil.rmtree(series / "step30")
    moved(series, 20.01, "step30")
    lines = model_problems(series)
    assert "weights hardly move from step20 to step30" in only(lines)


def test_what_a_schedule_of_learning_rates_does_is_no_standstill() -> None:
    """Warm-up from nothing and decay to a tenth, as a random walk or straight on, whichever checkpoints are at hand."""
    rate = [min(step / 1430, 1.0) * (1 - 0.9 * step / 143000) for step in range(143001)]
    total, squares = np.cumsum(rate), np.cumsum(np.square(rate))
    for steps in (PYTHIA, (0, 1, 2, 1000, 143000), (0, 1, 512, 1000, 142000, 143000), PYTHIA[::7]):
        pairs = list(itertools.pairwise(steps))
        straight = [float(total[b] - total[a]) for a, b in pairs]
        walk = [float(np.sqrt(squares[b] - squares[a])) for a, b in pairs]
        for changes in (straight, walk):
            moving = [Interval(f"step{a}", f"step{b}", b - a, c) for (a, b), c in zip(pairs, changes, strict=True)]
            assert list(_hardly_moving(moving)) == []
            if len(moving) > 10:
                moving[7] = dataclasses.replace(moving[7], change=moving[7].change / 1000)
                assert [found.interval for found in _hardly_moving(moving)] == [moving[7]]


def test_weights_that_are_not_finite_are_named(series: Path) -> None:
    weights = load_file(series / "step20" / WEIGHTS)
    name = sorted(weights)[0]
    weights[name].view(-1)[3] = float("inf")
    save_file(weights, series / "step20" / WEIGHTS, {"format": "pt"})
    assert [
        line
        for line in model_problems(series)
        if line == f"step20 has weights that are infinite or no numbers, in {name}"
    ]


# Names and hashes


def named(label: str, *digests: str, step: int | None = None) -> NamedWeights:
    files = (WEIGHTS,) if len(digests) == 1 else tuple(
        f"model-{i + 1:05}-of-{len(digests):05}.safetensors" for i in range(len(digests))
    )  # fmt: skip
    return NamedWeights(label, read_place(label).step if step is None else step, dict(zip(files, digests, strict=True)))


def test_main_may_be_the_last_step_and_no_other() -> None:
    steps = [named("step1", "a"), named("step2", "b")]
    assert compare([*steps, named("main", "b")]) == []
    assert compare([*steps, named("main", "c")]) == []
    [finding] = compare([*steps, named("main", "a")])
    assert finding == SameWeights(("step1", "main"), "a", (), True)
    assert compare([*steps, named("main", "c", step=2)]) == [NotTheLast("step2")]


def test_one_shard_of_the_final_checkpoint_is_named() -> None:
    """As it was in pythia-12b."""
    final = ("f1", "f2", "f3")
    series = [
        named("step49", "a1", "a2", "a3"),
        named("step50", "f1", "b2", "b3"),
        named("step143", *final),
        named("main", *final, step=143),
    ]
    [finding] = compare(series)
    assert finding == SameWeights(
        ("step50", "step143", "main"), "f1", ("model-00001-of-00003.safetensors",), is_final=True
    )


def test_steps_of_stages_count_for_themselves_and_tags_may_be_other_names() -> None:
    series = [
        named("stage1-step100-tokens1B", "a"),
        named("stage1-step900-tokens9B", "b"),
        named("stage2-ingredient1-step50-tokens1B", "c"),
        named("v1.0", "a"),
    ]
    assert compare([*series, named("main", "c")]) == []
    [finding] = compare([*series, named("stage2-ingredient2-step50-tokens1B", "b")])
    assert finding.labels == ("stage1-step900-tokens9B", "stage2-ingredient2-step50-tokens1B")  # type: ignore[union-attr]


# The hub

SERIES = {"step0": b"0", "step1000": b"1", "step2000": b"2", "step3000": b"3", "main": b"3"}


def revision(weights: bytes | None) -> dict[str, bytes]:
    return {"config.json": b"{}"} | ({} if weights is None else {WEIGHTS: weights * 1000})


Serve = Callable[[str, Mapping[str, bytes | None]], HubServer]


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[str, Mapping[str, bytes | None]], HubServer]]:
    """Serves a repository from one file of weights a revision."""
    running: list[HubServer] = []

    def serve(repo: str, revisions: Mapping[str, bytes | None]) -> HubServer:
        server = HubServer({repo: {label: revision(weights) for label, weights in revisions.items()}})
        running.append(server)
        server.start()
        server.use_here(monkeypatch, tmp_path / "home")
        return server

    yield serve
    for server in running:
        server.stop()


def test_a_sound_repository_is_said_to_be_so_without_a_download(hub: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = hub("owner/series", SERIES)
    assert main(["doctor", "--model", "owner/series"]) == 0
    assert capsys.readouterr().out == "owner/series: nothing that cannot be true in 5 revisions\n"
    assert server.downloads() == []


def test_what_cannot_be_true_of_a_repository_is_named_without_a_download(
    hub: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = hub("owner/series", {**SERIES, "step1000": b"0", "step2000": b"3", "step2500": None})
    assert main(["doctor", "--model", "owner/series"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step0, step1000 serve the same weights (sha256 ")
    assert lines[1].startswith("step2000, step3000, main serve the same weights") and "final checkpoint's" in lines[1]
    assert lines[2:] == ["step2500 holds no weights; leave it out", "owner/series: 3 problems"]
    assert server.downloads() == []


def test_a_repository_that_is_not_there_is_refused(hub: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    hub("owner/series", SERIES)
    assert main(["doctor", "--model", "owner/other"]) == 2
    assert "owner/other is neither a directory here nor a model" in capsys.readouterr().err


def test_known_problems_are_said_of_a_repository(hub: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    hub("EleutherAI/pythia-12b", {"step49000": b"a", "step50000": b"b", "main": b"c"})
    assert main(["doctor", "--model", "EleutherAI/pythia-12b"]) == 0, "what is served today has nothing wrong"
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("note: known: EleutherAI/pythia-12b step50000: the first shard") and "issues/206" in line


def test_cache_warns_of_known_problems_before_it_fetches(
    hub: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path / "cache"))
    hub("EleutherAI/pythia-12b", {"step50000": None})
    assert main(["cache", "--model", "EleutherAI/pythia-12b", "--checkpoints", "step50000"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: EleutherAI/pythia-12b step50000: the first shard") and "leave these" in first
    assert second.startswith("error: ")


def test_the_list_of_known_problems_names_what_was_reported(caplog: pytest.LogCaptureFixture) -> None:
    [of_2_8b] = [known for known in known_problems.KNOWN if known.source.endswith("/205")]
    assert len(of_2_8b.labels) == 86 + 1, "steps, and main"
    assert of_2_8b.labels <= {"main", *(f"step{step}" for step in PYTHIA)}
    unique = [step for step in PYTHIA if f"step{step}" not in of_2_8b.labels]
    assert len(unique) == 68 and min(unique) == 66000 and max(unique) == 142000

    def said(repo: str, *labels: str) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            known_problems.warn([Checkpoint(label, read_place(label).step, repo, repo) for label in labels])
        return [record.getMessage() for record in caplog.records]

    assert said("EleutherAI/pythia-160m", "step1000", "main") == []
    assert [line.split(":")[0] for line in said("EleutherAI/pythia-160m", "step0", "step1", "step4")] == [
        "EleutherAI/pythia-160m step0, step1"
    ]
    assert len(said("EleutherAI/pythia-2.8b", "step0")) == 2 and said("someone/pythia-2.8b", "step0") == []
    assert len(said("allenai/OLMo-2-1124-7B", "stage1-step175000-tokens735B")) == 1
    assert all(known.source.startswith("https://") and known.remedy for known in known_problems.KNOWN)

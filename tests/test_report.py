"""Laws of the report: the page says what the store holds, needs nothing but itself, and appears whole or not at all."""

import runpy
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from headlapse.engine.measures.logit_diff import timeline
from headlapse.engine.report.caveats import threats
from headlapse.engine.report.findings.all_findings import findings
from headlapse.engine.report.findings.verdict import verdict
from headlapse.engine.report.page import _example, write_report
from headlapse.engine.report.plot_style import INK
from headlapse.engine.report.result import ranges, read_result, signed
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.store.activations import Capture
from headlapse.engine.store.patched_run import PatchedRun
from headlapse.engine.store.store import Store, create_store
from headlapse.engine.store.zarr_group import CheckpointRow
from headlapse.engine.study.patch_settings import Direction, PatchSettings
from headlapse.engine.study.prompts import Trials
from headlapse.engine.study.subsets import parse_subsets
from headlapse.engine.study.tasks.contrast import Contrast
from tests.test_store import replace_values

pytestmark = pytest.mark.thorough

SCRIPT = Path(__file__).parents[1] / "scripts" / "report.py"
TRIALS, LAYERS, HEADS, POSITIONS = 3, 3, 4, 6
STEPS = (0, 1, 10, 100, -1)
FIGURES = ("timeline", "heatmap", "heads", "training")
DEFAULT = ("even", "odd", "all", "each")


def some_trials(prompt: str) -> Trials:
    text = np.array([["Q", ":", " 9", "\n", " &", "<i>"]] * 2 * TRIALS).reshape(2, TRIALS, POSITIONS)
    contrasts = tuple(Contrast(prompt, f"x{i}", " a", " b", "mine.jsonl", repeats=1 + i % 2) for i in range(TRIALS))
    length = np.array([[POSITIONS] * TRIALS, [POSITIONS - 1] * TRIALS])
    return Trials(np.ones(text.shape, int), length, np.ones((TRIALS, 2), int), text, contrasts, notes=())


def some_store(
    path: Path, steps: Sequence[int] = STEPS, same_weights: bool = False, cached: bool = True,
    prompt: str = "<b>q</b>", model: str = "org/tiny", mark: str = "",
) -> Store:  # fmt: skip
    """A store without a single activation worth reading, of checkpoints `step{N}`, and `main` for an unknown step;
    `mark` ends every label."""
    z = [torch.zeros(2, TRIALS, POSITIONS, HEADS, 1)] * LAYERS
    captured = Capture(tensors={"z": z}, answer_logits=torch.zeros(2, TRIALS, 2))
    study = {"model": model, "task": "mine.jsonl", "trials": TRIALS, "sites": ["all"], "dtype": "float32"}
    rows = [CheckpointRow((f"step{step}" if step >= 0 else "main") + mark, step) for step in steps]
    store = create_store(path, study, rows, range(LAYERS), some_trials(prompt), {"z": (HEADS, 1)})
    for row in rows if cached else ():
        digest = "f" * 64 if same_weights else f"{row.step % 16:x}" * 64
        store.write(row.label, captured, {"commit": f"commit-{row.label}", "sha256": {"model.safetensors": digest}})
    return store


def some_run(
    store: Store, words: Sequence[str] = DEFAULT, name: str = "run", layers: Sequence[int] = range(LAYERS),
    joint: bool = False, direction: Direction = "denoise", positions: str = "last", seed: int = 0,
    done: Callable[[str], bool] = lambda label: True, values: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> PatchedRun:  # fmt: skip
    """A patched run of random numbers; `done` says which checkpoints are finished, `values` changes what they hold."""
    rng, subsets = np.random.default_rng(seed), parse_subsets(words, HEADS)
    settings = PatchSettings("corrected", direction, positions, tuple(layers), joint, tuple(words))
    sites = [layers[0]] if joint else list(layers)
    run = store.open_patch(name, settings, sites, subsets.labels, subsets.mask)
    for row in store.rows():
        patched = rng.normal(size=(len(sites), len(subsets), TRIALS)).astype("float32")
        answers = rng.normal(size=(2, TRIALS, 2)).astype("float32")
        if done(row.label):
            writer = run.write(row.label)
            writer.put_layers(0, values(patched))
            writer.finish(answers, 2.5e-6, 1e-4, device="cuda:3")
    return run


def text_of(page: Path) -> str:
    """The words of a page, without markup, styles and figures, single-spaced."""
    return Reader(page).text


class Reader(HTMLParser):
    """Collects a page's words, its links, what it fetches and its open elements; tags must nest."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.cited: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        links = [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        # What only a click opens may lie elsewhere.
        self.cited += [link for link in links if tag == "a" and link.startswith("https://")]
        self.links += [link for link in links if link not in self.cited]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg", "script"} & set(self.open):
            self.words.append(data)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return some_store(tmp_path / "tiny.zarr")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are empty, for laws of words and numbers."""
    empty = {stem: Figure(figsize=(1, 1)) for stem in ("timeline", "heatmap")}
    monkeypatch.setattr("headlapse.engine.report.page.draw", lambda *_: empty)


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn as SVG; as PNG they are the same, and empty files here."""
    monkeypatch.setattr("headlapse.engine.report.page.write_png", lambda _figure, path: path.touch())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """One store and the folder of its report, for all laws that only read."""
    folder = tmp_path_factory.mktemp("written")
    store = some_store(folder / "tiny.zarr")
    some_run(store)
    return store, write_report(store, folder / "out").parent


# --- the page ---


def test_the_page_needs_nothing_from_outside(written: tuple[Store, Path]) -> None:
    _, out = written
    page = Reader(out / "index.html")
    assert not page.open, "every element is closed"
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)
    assert set(page.cited) == {"https://github.com/GusSand/MATS", "https://arxiv.org/abs/2508.19414"}
    for link in page.links:
        assert link.startswith(("#", "data:image/png;base64,")) or (out / link).is_file(), link
    source = (out / "index.html").read_text()
    assert "@import" not in source and "url(http" not in source and "url(//" not in source
    assert len(page.ids) == len(set(page.ids)), "figures share no id"
    assert all(ord(letter) < 0x2600 for letter in source), "no emoji"


def test_the_page_links_to_every_file_beside_it(written: tuple[Store, Path]) -> None:
    _, out = written
    files = {path.name for path in out.iterdir()}
    figures = {f"{stem}.{suffix}" for stem in FIGURES for suffix in ("png", "svg")}
    numbers = {"rates.csv", "onsets.csv", "hypotheses.csv"}
    assert files == {"index.html", "timeline.csv", "patched.csv"} | figures | numbers
    assert files - {"index.html"} <= set(Reader(out / "index.html").links)


def test_the_page_says_what_was_asked_and_where_it_comes_from(written: tuple[Store, Path]) -> None:
    store, out = written
    text = text_of(out / "index.html")
    for said in (
        "org/tiny", "mine.jsonl, 3 distinct prompt pairs (asked 4 times", "denoise: heads’ outputs of the clean run",
        "positions: last", "cached in float32", "device cuda:3", "even odd all each (7 subsets of 4 heads)",
        f"torch {store.attrs['versions']['torch']}", "2.5e-06 nats", "up to 1.0e-04",
        "commit-step100", "f" * 64, "n = 3 distinct prompts", "5 of 5 checkpoints",
    ):  # fmt: skip
        assert said in text, said


def test_the_page_leads_with_the_verdict_that_the_terminal_prints(written: tuple[Store, Path]) -> None:
    store, out = written
    source, run = (out / "index.html").read_text(encoding="utf-8"), store.patch("run")
    lead = source.index('data-role="verdict"')
    assert source.index("</header>") < lead < source.index("<section"), "before every section"
    text = text_of(out / "index.html").replace("−", "-")
    for line in verdict(run.dataset(), run.settings, store.study):
        assert " ".join(line.split()) in text


def test_prompts_are_shown_as_they_are_and_never_read_as_markup(written: tuple[Store, Path]) -> None:
    _, out = written
    page = Reader(out / "index.html")
    assert "<b>q</b>" in page.text and "<i>" in page.text and "i" not in page.tags
    assert "\\n" in page.text


@pytest.mark.parametrize(("positions", "n_patched"), [("last", 1), ("end:3", 3)])
def test_the_patched_tokens_are_marked(store: Store, positions: str, n_patched: int) -> None:
    example = _example(store.trials(), positions)
    assert {run: sum(patched for _, patched in tokens) for run, tokens in example.items()} == dict.fromkeys(
        ("clean", "corrupt"), n_patched
    )
    assert [text for text, _ in example["corrupt"]] == ["Q", ":", " 9", "\\n", " &"], "padding is no token"
    assert example["clean"][-1] == ("<i>", True)


@pytest.mark.usefixtures("undrawn")
def test_the_table_shows_the_known_numbers_of_the_best_layer(store: Store, tmp_path: Path) -> None:
    run = store.open_patch(
        "known",
        PatchSettings(layers=(0, 1, 2), subsets=("even", "odd", "all")),
        [0, 1, 2], ("even", "odd", "all"), parse_subsets(["even", "odd", "all"], HEADS).mask,
    )  # fmt: skip
    patched = np.full((3, 3, TRIALS), -2, dtype="float32")
    patched[1] = [[1.5, -1.5, 0.75], [-1, -1, -1], [3, 3, 3]]
    answers = np.array([[[4, 0]] * 3, [[0, 2]] * 3], dtype="float32")
    writer = run.write("step10")
    writer.put_layers(0, patched)
    writer.finish(answers, 0.0, 1e-4, device="cpu")
    text = text_of(write_report(store, tmp_path / "out"))
    assert "step10 +4.00 100% −2.00 0% +0.25 67% −1.00 0% +3.00 100% +0.67 1" in text
    assert "At the last checkpoint, step 10: clean, unpatched 100% +4.00 nats corrupt, unpatched 0% −2.00 nats" in text
    assert "all heads of layer 1 100% +3.00 nats" in text
    change = read_result(store, "known").change
    assert change.sel(subset="all").values.tolist() == [[0, 5, 0]]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_newest_run_is_shown_and_every_run_is_listed(store: Store, tmp_path: Path) -> None:
    some_run(store, name="first")
    some_run(store, name="second", direction="noise")
    newest = text_of(write_report(store, tmp_path / "out"))
    assert "second (this page)" in newest and "first denoise last 0–2 even odd all each" in newest
    assert "first (this page)" in text_of(write_report(store, tmp_path / "out", "first"))


# --- tables ---


def test_patched_csv_holds_every_value_of_the_store_bit_for_bit(written: tuple[Store, Path]) -> None:
    store, out = written
    frame = pd.read_csv(out / "patched.csv", dtype={"subset": str})
    assert list(frame) == [
        "checkpoint", "step", "layer", "subset", "trial", "logit_diff", "clean_logit_diff", "corrupt_logit_diff",
    ]  # fmt: skip
    data = store.patch_dataset("run").load()
    assert len(frame) == data.logit_diff.size
    for name in ("logit_diff", "clean_logit_diff", "corrupt_logit_diff"):
        dims = [dim for dim in ("checkpoint", "layer", "subset", "trial") if dim in data[name].dims]
        for keys, rows in frame.groupby(dims):
            expected = data[name].sel({dim: key for dim, key in zip(dims, keys, strict=True) if dim != "trial"})
            assert (rows[name].astype("float32") == expected.isel(trial=keys[-1]).item()).all()
    assert (frame.step == frame.checkpoint.map({f"step{n}": n for n in STEPS} | {"main": -1})).all()


def test_timeline_csv_is_the_timeline(written: tuple[Store, Path]) -> None:
    store, out = written
    # As text: the parser of pandas 2 is not exact to the last bit, and the option that made it so is going.
    frame = pd.read_csv(out / "timeline.csv", index_col="checkpoint", dtype=str)
    expected = timeline(store.patch_dataset("run").load(), "denoise")
    assert list(frame.index) == list(map(str, expected.index))
    assert list(frame) == list(expected)
    for name in expected:
        assert (frame[name].astype(expected[name].dtype).to_numpy() == expected[name].to_numpy()).all()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_sweep_of_too_many_values_is_written_as_means_and_says_so(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_run(store)
    monkeypatch.setattr("headlapse.engine.report.page.TIDY_ROWS", 10)
    page = write_report(store, tmp_path / "out")
    assert "averaged over prompts: the 315 single values are in the store" in text_of(page)
    frame = pd.read_csv(page.with_name("patched.csv"), dtype={"subset": str})
    data = store.patch_dataset("run").load()
    assert len(frame) == 5 * 3 * 7
    for row in frame.to_dict("records"):
        at = data.sel(checkpoint=row["checkpoint"])
        patched = at.logit_diff.sel(layer=row["layer"], subset=row["subset"])
        assert np.float32(row["mean_logit_diff"]) == patched.mean("trial").item()
        assert row["success_rate"] == (patched > 0).mean("trial").item()
        for run in ("clean", "corrupt"):
            assert np.float32(row[f"mean_{run}_logit_diff"]) == at[f"{run}_logit_diff"].mean("trial").item()


# --- figures ---


def test_figures_come_as_png_and_svg_and_show_something(written: tuple[Store, Path]) -> None:
    _, out = written
    for stem in FIGURES:
        with Image.open(out / f"{stem}.png") as image:
            assert min(image.size) > 400
            colours = image.convert("RGB").getcolors(1 << 24)
        assert colours is not None and len(colours) > 50
        svg = ET.parse(out / f"{stem}.svg").getroot()
        assert svg.tag.endswith("svg") and len(list(svg.iter())) > 100


def test_every_figure_of_the_page_takes_its_ink_from_the_page(written: tuple[Store, Path]) -> None:
    _, out = written
    source = (out / "index.html").read_text()
    drawn = source.split("<svg")[1:]
    assert len(drawn) == len(FIGURES)
    for figure in drawn:
        svg = figure[: figure.index("</svg>")]
        assert 'role="img"' in svg and "currentColor" in svg and INK not in svg
    assert INK in (out / "timeline.svg").read_text()


def test_numbers_are_written_with_a_true_minus_and_zero_without_a_sign() -> None:
    assert [signed(value, 1) for value in (1.25, -1.26, 0.0, -0.04, 0.04)] == ["+1.2", "−1.3", "0.0", "0.0", "0.0"]
    assert ranges([4, 5, 6, 7, 8, 11]) == "4–8, 11" and ranges([2]) == "2"


def test_without_even_odd_and_all_the_strongest_subsets_are_shown_and_the_strongest_is_mapped(store: Store) -> None:
    strength = np.array([[1, 4, 2, 3], [1, 1, 1, 5], [0, 0, 0, 0]], dtype="float32")[..., None]
    some_run(store, ["each"], values=lambda patched: np.zeros_like(patched) + strength)
    some_run(store, ["each"], name="noise", direction="noise", values=lambda patched: np.zeros_like(patched) - strength)
    for name in ("run", "noise"):
        result = read_result(store, name)
        assert result.shown == ("3", "1", "2") and result.mapped == "3"
        assert (result.table["best_layer"] == 1).all() and (abs(result.table["3"]) == 5).all()


# --- every kind of run gives a readable page ---

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "one checkpoint": ({"steps": [5]}, {}, "At the last checkpoint, step 5"),
    "one checkpoint of an unknown step": ({"steps": [-1]}, {}, "At the last checkpoint, checkpoint main"),
    "two unfinished": ({}, {"done": lambda label: label in ("step1", "step10", "main")}, "cached but not patched yet"),
    "no even, odd and all": ({}, {"words": ["0,1", "2,3", "0,1,2", "1"]}, "the largest effects at the last checkpoint"),
    "no head": ({}, {"words": ["none"], "values": np.zeros_like}, "No head patched"),
    "the lattice": ({}, {"words": ["lattice"]}, "lattice (16 subsets of 4 heads)"),
    "joint layers": ({}, {"layers": [1, 2], "joint": True}, "of layers 1–2 together"),
    "one layer": ({}, {"layers": [2]}, "layer 2; positions: last"),
    "noise": ({}, {"direction": "noise"}, "of the corrupt run are put into the clean run"),
    "end:3": ({}, {"positions": "end:3"}, "positions: end:3"),
    "equal weights": ({"same_weights": True}, {}, "serve the same weights"),
    "a long series": ({"steps": range(0, 143001, 3250)}, {}, "143,000"),
}


DRAWN_ALIKE = {"two unfinished", "end:3", "equal weights"}
"""Cases whose figures are as in others."""


@pytest.mark.slow
@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("case", CASES)
def test_it_gives_a_readable_page(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    of_store, of_run, said = CASES[case]
    if case in DRAWN_ALIKE:
        request.getfixturevalue("undrawn")
    store = some_store(tmp_path / "tiny.zarr", **of_store)
    some_run(store, **of_run)
    page = write_report(store, tmp_path / "out")
    read = Reader(page)
    assert said in read.text and "nan" not in read.text.split()
    assert not read.open and read.tags.count("svg") == len(list(page.parent.glob("*.svg")))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_that_is_not_finite_is_left_out_by_name(store: Store, tmp_path: Path) -> None:
    some_run(store, values=lambda values: values)
    replace_values(
        store.patch("run"), "logit_diff", lambda values, label: values * (np.nan if label == "step10" else 1)
    )
    text = text_of(write_report(store, tmp_path / "out"))
    assert "left out because not all of their numbers are finite: step10" in text
    assert "step10" not in pd.read_csv(tmp_path / "out" / "patched.csv").checkpoint.unique()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_checkpoints_that_were_never_cached_are_named(tmp_path: Path) -> None:
    store = some_store(tmp_path / "tiny.zarr", steps=[1, 2])
    store.add([CheckpointRow("step3", 3)])
    some_run(store, done=lambda label: label != "step3")
    assert "not cached completely, so not here (run headlapse cache again): step3" in text_of(
        write_report(store, tmp_path / "out")
    )


# --- whole or not at all ---


@pytest.mark.slow
def test_the_same_run_gives_the_same_files(written: tuple[Store, Path], tmp_path: Path) -> None:
    store, out = written
    write_report(store, tmp_path / "again")
    for path in sorted(out.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_a_report_cut_off_leaves_no_half_file_under_its_name(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_run(store, ["all"], name="first")
    some_run(store, ["all"], name="second", seed=1)
    out = tmp_path / "out"
    write_report(store, out, "first")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def cut_off(_figure: Figure, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("headlapse.engine.report.page.write_png", cut_off)
        write_report(store, out, "second")
    assert (out / "timeline.csv").read_bytes() != before["timeline.csv"], "files appear one by one"
    for name in ("timeline.png", "index.html"):
        assert (out / name).read_bytes() == before[name]
    write_report(store, out, "second")
    assert {path.name for path in out.iterdir()} == set(before), "what was left behind is gone"


@pytest.mark.slow
@pytest.mark.usefixtures("unpainted")
def test_every_finding_is_on_the_page_and_its_numbers_beside_it(store: Store, tmp_path: Path) -> None:
    run = some_run(store, ["lattice"])
    text = text_of(write_report(store, tmp_path / "out")).replace("−", "-")
    for finding in findings(run.dataset(), run.settings):
        assert finding.title in text and finding.notes[0][1:] in text
        assert finding.numbers is not None
        assert len(pd.read_csv(tmp_path / "out" / f"{finding.name}.csv")) == len(finding.numbers)
    shapley = pd.read_csv(tmp_path / "out" / "shapley.csv")
    assert len(shapley) == len(STEPS) * LAYERS * HEADS


@pytest.mark.slow
@pytest.mark.usefixtures("unpainted")
def test_no_figure_of_another_run_stays_behind(store: Store, tmp_path: Path) -> None:
    some_run(store, ["lattice"], name="lattice")
    some_run(store, ["all"], name="all")
    mine = tmp_path / "out" / "notes.txt"
    some = {"heads.png", "training.svg", "splits.png", "shapley.svg", "parity.csv", "rates.csv", "sizes.csv"}
    write_report(store, tmp_path / "out", "lattice")
    assert some <= {path.name for path in (tmp_path / "out").iterdir()}
    mine.write_text("mine")
    write_report(store, tmp_path / "out", "all")
    assert not some & {path.name for path in (tmp_path / "out").iterdir()} and mine.exists()


# --- refused ---


def test_a_store_without_a_patched_run_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no patched run yet; make one with: headlapse patch"):
        write_report(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_run_without_a_finished_checkpoint_is_refused(store: Store, tmp_path: Path) -> None:
    some_run(store, done=lambda label: False)
    with pytest.raises(UserError, match=r"patched run run of .* has no finished checkpoint"):
        write_report(store, tmp_path / "out")
    some_run(store, name="earlier")
    some_run(store, name="run-b", done=lambda label: False)
    assert "run earlier" in text_of(write_report(store, tmp_path / "out")), "the newest that has something to show"
    some_run(store, name="broken", values=lambda values: values * np.float32("nan"))
    with pytest.raises(UserError, match="only numbers that are not finite"):
        write_report(store, tmp_path / "out", "broken")


def test_a_run_that_is_not_there_and_a_file_in_the_way_are_refused(store: Store, tmp_path: Path) -> None:
    some_run(store)
    with pytest.raises(UserError, match="has no patched run other; it has run"):
        write_report(store, tmp_path / "out", "other")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="a file in the way"):
            write_report(store, out)


# --- the script ---


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    monkeypatch.setenv("HEADLAPSE_CACHE", str(tmp_path))
    run: Callable[[list[str]], int] = runpy.run_path(str(SCRIPT))["main"]
    return lambda words: run(["report", *words])


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_script_takes_the_newest_store_and_prints_the_page(
    script: Callable[[list[str]], int], store: Store, tmp_path: Path, capsys: Any
) -> None:
    some_run(store)
    assert script([]) == 0
    page = tmp_path / "tiny-report" / "index.html"
    assert capsys.readouterr().out == f"{page}\n" and page.is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_script_writes_where_it_is_told(
    script: Callable[[list[str]], int], store: Store, tmp_path: Path, capsys: Any
) -> None:
    some_run(store, name="mine")
    some_run(store, name="newer")
    words = [str(store.path), "--out", str(tmp_path / "deep" / "out"), "--name", "mine"]
    assert script(words) == 0
    assert "mine (this page)" in text_of(Path(capsys.readouterr().out.strip()))


def test_the_script_refuses_in_one_line(script: Callable[[list[str]], int], store: Store, capsys: Any) -> None:
    for words in ([], [str(store.path / "nowhere")]):
        assert script(words) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1


# --- threats to validity, filled from the data ---


def said(store: Store) -> dict[str, str]:
    return dict(threats(store, read_result(store, "run")))


def test_every_threat_says_the_numbers_it_rests_on(store: Store) -> None:
    some_run(store, ["even", "odd", "all"])
    found = said(store)
    assert list(found) == ["Prompts", "Baseline", "Alignment", "Checkpoints", "Even and odd", "Choice", "Arithmetic"]
    assert found["Prompts"].startswith("n = 3 distinct prompts (4 were asked for") and "33.3%" in found["Prompts"]
    assert found["Alignment"].startswith("3 of 3 patched positions hold the same token")
    assert "in 3 of 3 pairs the prompts differ in length" in found["Alignment"]
    assert found["Checkpoints"].startswith("4 checkpoints; between steps 10 and 100 lie 90% of the steps covered")
    assert "6 equal splits of 4 heads exist" in found["Even and odd"] and "below 0.33" in found["Even and odd"]
    assert "Of 3 layers" in found["Choice"] and "0.0001 nats" in found["Arithmetic"]


def test_a_baseline_that_succeeds_already_is_named(store: Store) -> None:
    run = some_run(store)
    labels, corrupt = [row.label for row in store.rows()], [-3, 3, -3, -0.2, -3]
    replace_values(run, "clean_logit_diff", lambda values, label: 0 * values + (0.2 if label == labels[3] else 3))
    replace_values(run, "corrupt_logit_diff", lambda values, label: 0 * values + corrupt[labels.index(label)])
    assert said(store)["Baseline"] == (
        "The unpatched corrupt run already succeeds on half of the prompts or more at step1: a success there restores "
        "nothing; clean and corrupt runs are less than 0.5 nats apart at step1, step100: no share of so small a gap "
        "means anything."
    )


def test_what_the_data_do_not_threaten_is_not_said(tmp_path: Path) -> None:
    store = some_store(tmp_path / "tiny.zarr", steps=[0, 5, 10])
    run = some_run(store, ["each"], layers=[1])
    replace_values(run, "clean_logit_diff", lambda values, _label: 0 * values + 3)
    replace_values(run, "corrupt_logit_diff", lambda values, _label: 0 * values - 3)
    found = said(store)
    assert not {"Baseline", "Even and odd", "Choice"} & set(found)
    assert "sudden or gradual" in found["Checkpoints"], "half of the training lies between two checkpoints"

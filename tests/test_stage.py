"""Laws of the stage: what it shows is what the store holds, at every address, by mouse and by keyboard."""

import contextlib
import io
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page

import headlapse as hl
from headlapse.engine.report.packing import MISSING, RATIO, hundredths, pack, powers, size_of
from headlapse.engine.report.result import read_result
from headlapse.engine.report.stage import as_json, source, stage_html, stage_payload
from headlapse.engine.runtime.errors import UserError
from headlapse.engine.statistics.head_effects import head_effects
from headlapse.engine.statistics.head_subsets import head_subset_statistics
from headlapse.engine.statistics.means import interval
from headlapse.engine.store.store import Store
from headlapse.engine.store.zarr_group import dims_of
from headlapse.engine.study.study import MEASURES
from tests.browser import NARROW, WIDE, Open, browser, grave_findings, open_page, sideways_overflow
from tests.models import save, tiny, tiny_tokenizer
from tests.stages import (
    address_of,
    effect_in_store,
    effects_in_store,
    random_run,
    random_states,
    random_store,
    stage_page,
    unpacked,
    visit,
)

pytestmark = pytest.mark.thorough
__all__ = ["browser", "open_page"]

READY = "#stage[data-ready]"
SHAPES: dict[str, dict[str, Any]] = {
    "all subsets": {},
    "some subsets": {"words": ("even", "odd", "all", "each", "none", "splits")},
    "no single heads": {"words": ("even", "odd")},
    "corrupt into clean": {"direction": "noise"},
    "large effects": {"scale": 900.0},
    "no gap": {"gap": 0.0},
    "layers together": {"joint": True},
}


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """A store of three layers of six heads with three runs, and a page of the stage."""
    folder = tmp_path_factory.mktemp("stage")
    store = random_store(folder / "some.zarr", n_heads=6)
    measured = {"measures": MEASURES, "generate": 3}
    random_run(store, ("each", "all", "even", "odd", "none"), "few", positions="end:2", **measured)
    random_run(store, direction="noise", name="noise")
    random_run(store)
    return store, stage_page(store, folder / "some.html")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """All subsets of 12 heads in 12 layers at 11 checkpoints."""
    folder = tmp_path_factory.mktemp("large")
    store = random_store(folder / "large.zarr", [0, *(2**k for k in range(10))], n_layers=12, n_heads=12, n_trials=3)
    random_run(store)
    return store, stage_page(store, folder / "large.html")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """A model whose heads share keys, captured and patched, with every measure and with texts."""
    folder = tmp_path_factory.mktemp("grouped")
    for seed, label in enumerate(("step0", "step10")):
        save(tiny("llama-gqa", seed), folder / "series" / label, tokenizer=tiny_tokenizer())
    cached = hl.cache(folder / "series", task="decimal", trials=3, store=folder / "a.zarr")
    run = cached.patch(subsets=["each", "even", "odd", "splits:1"], measures=MEASURES, generate=3)
    store = Store(cached.path)
    return store, stage_page(store, folder / "grouped.html", run.name)


def opened(open_page: Open, page: Path, state: dict[str, Any] | None = None, **looks: Any) -> Page:
    tab = open_page(f"{page.resolve().as_uri()}{address_of(state) if state else ''}", **looks)
    tab.wait_for_selector(READY)
    return tab


def text(tab: Page, role: str) -> str:
    return tab.locator(f"[data-role={role}]").inner_text()


def pressed(tab: Page) -> list[str]:
    found: list[str] = tab.eval_on_selector_all(
        "[data-head][aria-pressed=true]", "all => all.map(one => one.dataset.head)"
    )
    return found


# --- the numbers that the page carries ---


@pytest.mark.parametrize("lattice", [False, True])
@pytest.mark.parametrize("size", [1, 100, 10_000, 2_000_000])
def test_what_is_packed_is_what_is_unpacked(size: int, lattice: bool) -> None:
    values = np.random.default_rng(0).integers(-size, size + 1, size=(2, 3, 16))
    assert (unpacked(pack(values, lattice)) == values).all()


def test_a_size_is_within_one_per_cent_of_its_power() -> None:
    sizes = np.exp(np.random.default_rng(0).uniform(np.log(0.005), 20, size=1000))
    assert (np.abs(0.005 * RATIO ** powers(sizes) / sizes - 1) < 0.01).all()
    assert powers(np.array([0.0, 1e-9])).tolist() == [0, 0]


def test_sets_of_heads_that_add_up_take_little_room() -> None:
    heads = np.random.default_rng(0).integers(-500, 500, size=10)
    sums = np.array([[heads[k] * (bits >> k & 1) for k in range(10)] for bits in range(1024)]).sum(1)
    assert 10 * size_of(pack(sums, lattice=True)) < size_of(pack(sums))
    assert hundredths(np.array([0.125, np.nan, -1e-4])).tolist() == [12, MISSING, 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_mean_and_interval_on_the_page_is_the_stores(shape: str, tmp_path: Path) -> None:
    store = random_store(tmp_path / "a.zarr")
    random_run(store, **SHAPES[shape])
    result = read_result(store, "run")
    [carried] = stage_payload(store, result)["runs"]
    run = result.run
    target = run.corrupt_logit_diff if carried["target"] == "corrupt" else run.clean_logit_diff
    order = np.argsort(run.mask.values @ (1 << np.arange(4))) if carried["lattice"] else np.arange(run.sizes["subset"])
    effect = (
        (run.logit_diff - target).transpose("checkpoint", "layer", "subset", "trial").values.astype(float)[:, :, order]
    )
    kept = carried["measures"]["logit_diff"]
    mean = unpacked(kept["mean"])
    assert np.abs(mean - effect.mean(-1) * 100).max() <= 0.5 + 1e-3
    width, lean = (unpacked(kept["spread"][name]) for name in ("width", "lean"))
    for found, end in zip(
        ((lean + 2 * mean - width) / 2, (lean + 2 * mean + width) / 2), interval(effect), strict=True
    ):
        assert np.abs(found - end * 100).max() <= 0.5 + 1e-3
    by_prompt = unpacked(kept["by_prompt"]["effect"]).transpose(0, 1, 3, 2)
    assert np.abs(by_prompt - effect * 100).max() <= 0.5 + 1e-2
    assert "</" not in as_json(stage_payload(store, result))


def test_single_heads_and_smallest_sets_are_those_of_the_tables(some: tuple[Store, Path]) -> None:
    store, _ = some
    result = read_result(store, "run")
    carried = stage_payload(store, result)["runs"][0]
    effects = head_effects(result.run, result.settings)
    assert (
        unpacked(carried["measures"]["logit_diff"]["significant"]["is"]).ravel() == (effects["p_adjusted"] <= 0.05)
    ).all()
    statistics = head_subset_statistics(result.run, "denoise")
    assert statistics is not None
    assert (unpacked(carried["sufficient"]["count"]) == statistics.sufficient_count.values).all()
    assert (unpacked(carried["necessary"]["count"]) == statistics.necessary_count.values).all()
    for name in ("shapley", "shapley_low", "shapley_high"):
        packed = carried["shapley"][{"shapley": "value"}.get(name, name.removeprefix("shapley_"))]
        assert np.abs(unpacked(packed) - 100 * statistics[name].values).max() <= 0.5 + 1e-6


def test_more_than_a_page_holds_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = random_store(tmp_path / "a.zarr")
    random_run(store)
    random_run(store, ("even", "odd"), "other")
    for module, limits in (("stage", ["DETAIL"]), ("stage_run", ["MOST", "DETAIL"])):
        for limit in limits:
            monkeypatch.setattr(f"headlapse.engine.report.{module}.{limit}_TEXT", 10)
    monkeypatch.setattr("headlapse.engine.report.stage_run.MOST_EFFECTS", 15 * 14)
    payload = stage_payload(store, read_result(store, "run"))
    carried = payload["runs"][0]
    masks = np.unpackbits(unpacked(carried["mask"]).astype(np.uint8), axis=1)[:, :4]
    assert sorted(masks.sum(1).tolist())[:5] == [0, 1, 1, 1, 1] and len(masks) == 14
    kept = carried["measures"]["logit_diff"]
    assert kept["by_prompt"] is None and len(kept["spread"]["rows"]) == 12
    assert list(carried["measures"]) == ["logit_diff"]
    assert "14 of the 16 subsets" in carried["notes"][0] and len(carried["notes"]) == 4
    assert payload["notes"] == ["no room on this page for the run other"] and len(payload["runs"]) == 1


@pytest.mark.parametrize(
    ("array", "dims", "why"),
    [
        ("logit_diff", ("checkpoint", "layer", "subset", "position", "trial"), "positions were patched one at a time"),
        ("logit_diff", ("checkpoint", "subset", "trial"), "its sets of heads lie in several layers"),
        ("mask", ("subset",), "what was patched has no heads"),
    ],
)
def test_a_run_that_the_stage_cannot_show_says_why(
    array: str, dims: tuple[str, ...], why: str, some: tuple[Store, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, result = some[0], read_result(some[0], "run")
    monkeypatch.setattr(
        "headlapse.engine.report.stage.dims_of",
        lambda one: dims if str(one.store_path).endswith(f"few/{array}") else dims_of(one),
    )
    assert stage_payload(store, result)["notes"] == [f"the run few is not here: {why}"]
    monkeypatch.undo()
    monkeypatch.setattr(
        "headlapse.engine.report.stage.dims_of",
        lambda one: dims if str(one.store_path).endswith(array) else dims_of(one),
    )
    place, scripts = stage_html(store, result)
    assert place.count("<p") == 1 and why in place and not scripts
    with pytest.raises(UserError, match=f"run run has no time-lapse: {why}"):
        stage_payload(store, result)


def test_all_subsets_of_a_small_model_fit_into_three_megabytes(large: tuple[Store, Path]) -> None:
    assert large[1].stat().st_size < 2.5e6


def test_the_script_ends_no_element_and_asks_for_nothing() -> None:
    for name in ("stage.js", "stage.css"):
        assert "</s" not in source(name) and "import " not in source(name).replace('"import headlapse', "")
    assert "innerHTML" not in source("stage.js") and "fetch(" not in source("stage.js")


# --- the page ---


@pytest.mark.parametrize("kind", ["some", "large"])
def test_effects_at_200_addresses_are_the_stores(kind: str, open_page: Open, request: pytest.FixtureRequest) -> None:
    store, page = request.getfixturevalue(kind)
    states = random_states(store, "run", 200)
    if kind == "some":
        few = [state | {"measure": MEASURES[at % 4]} for at, state in enumerate(random_states(store, "few", 20))]
        states[::5] = [*few, *random_states(store, "noise", 20)]
    runs = {name: store.patch(name).load().compute() for name in store.patch_names()}
    tab = opened(open_page, page)
    for state, (effect, range_, status) in zip(states, visit(tab, states), strict=True):
        true = effects_in_store(runs[state["run"]], store.patch(state["run"]).settings.direction, state)
        assert abs(float(effect) - true.mean()) <= 0.005 + 1e-5 and effect[0] in "+-", state
        ends, [low, high] = range_.strip("[]").split(", "), np.ravel(interval(true[None]))
        half = min(true.mean() - low, high - true.mean())
        [step] = {0.1 ** len(end.partition(".")[2]) for end in ends}
        allowed = step / 2 + (1e-5 if kind == "some" else 0.01 * max(true.mean() - low, high - true.mean()))
        assert np.abs(np.array(ends, float) - [low, high]).max() <= allowed, state
        assert step < 0.011 if kind == "some" else step <= max(0.0101, 0.11 * half), "two digits of the half-width"
        assert not status


def test_an_address_shows_the_same_in_a_fresh_browser(some: tuple[Store, Path], open_page: Open) -> None:
    store, page = some
    tab = opened(open_page, page)
    tab.select_option("[name=layer]", "2")
    tab.click("[data-set=none]")
    assert text(tab, "effect") == "+0.00" and pressed(tab) == []
    for head in (0, 2, 5):
        tab.click(f'[data-head="L2.H{head}"]')
    tab.fill("[name=checkpoint]", "1")
    state = {"run": "run", "checkpoint": "step1", "layer": 2, "heads": [0, 2, 5], "measure": "logit_diff"}
    assert tab.url.endswith(address_of(state)) and pressed(tab) == ["L2.H0", "L2.H2", "L2.H5"]
    assert abs(float(text(tab, "effect")) - effect_in_store(store, state)) <= 0.005 + 1e-5
    fresh = opened(open_page, page, state)
    for role in ("effect", "interval", "chosen", "checkpoint"):
        assert text(fresh, role) == text(tab, role)
    assert pressed(fresh) == pressed(tab) and fresh.input_value("[name=checkpoint]") == "1"


def test_every_measure_and_every_set_can_be_chosen(some: tuple[Store, Path], open_page: Open) -> None:
    store, page = some
    tab = opened(open_page, page, {"checkpoint": "step100", "layer": 1, "heads": "all"})
    run = store.patch("run").load().sel(checkpoint="step100", layer=1)
    whole = run.logit_diff.sel(subset="all").values
    tab.select_option("[name=measure]", "success")
    change = 100 * ((whole > 0).mean() - (run.corrupt_logit_diff.values > 0).mean())
    assert text(tab, "effect") == f"{change:+.0f} %" and "restores" in text(tab, "interval")
    tab.select_option("[name=measure]", "recovery")
    share = ((whole - run.corrupt_logit_diff.values) / 8).mean()
    assert text(tab, "effect") == f"{share:+.0%}".replace("%", " %")
    tab.select_option("[name=measure]", "logit_diff")
    for name in ("even", "odd", "none", "all", "complement", "random"):
        tab.click(f"[data-set={name}]")
        heads = [int(head.partition("H")[2]) for head in pressed(tab)]
        state = {"run": "run", "checkpoint": "step100", "layer": 1, "heads": heads}
        assert abs(float(text(tab, "effect")) - effect_in_store(store, state)) <= 0.005 + 1e-5


def test_what_was_generated_is_shown_and_counted(some: tuple[Store, Path], open_page: Open) -> None:
    store, page = some
    state = {"run": "few", "checkpoint": "step10", "layer": 1, "heads": [0, 2, 4], "measure": "answers"}
    tab = opened(open_page, page, state)
    at = store.patch("few").load().sel(checkpoint="step10", layer=1, subset="even")
    change = 100 * effect_in_store(store, state)
    assert text(tab, "effect") == f"{change:+.0f} %"
    restored = (at.success.values & ~at.corrupt_success.values).sum()
    assert text(tab, "interval").startswith(f"restores {restored} of {(~at.corrupt_success.values).sum()} failing")
    for trial, line in enumerate(tab.locator(".stage-prompt .stage-text").all_inner_texts()):
        written = [str(values.values[trial]).replace("\n", "\\n") for values in (at.text, at.corrupt_text)]
        assert line.split() == ["writes", *written[0].split(), "unpatched", *written[1].split()]


def test_what_was_not_patched_is_said_and_never_guessed(some: tuple[Store, Path], open_page: Open) -> None:
    store, page = some
    tab = opened(open_page, page, {"run": "few", "checkpoint": "step100", "layer": 1, "heads": [0, 1]})
    assert text(tab, "effect") == "–" and text(tab, "interval") == ""
    said = tab.locator(".stage-facts").inner_text()
    assert f"headlapse patch {store.path} --subsets 0,1 --layers 1 --positions end:2" in said
    assert "one by one add up to" in said
    tab = opened(open_page, page, {"run": "nowhere", "checkpoint": "step9", "layer": 7, "heads": [99]})
    assert all(word in text(tab, "status") for word in ("run nowhere", "checkpoint step9", "layer 7", "heads 99"))


def test_a_head_of_another_layer_begins_a_new_set(some: tuple[Store, Path], open_page: Open) -> None:
    tab = opened(open_page, some[1], {"layer": 1, "heads": [0, 1]})
    tab.click('[data-head="L2.H3"]')
    assert pressed(tab) == ["L2.H3"] and tab.input_value("[name=layer]") == "2"
    assert "begins anew with L2.H3" in text(tab, "status")


def test_it_plays_to_the_end_and_stops(some: tuple[Store, Path], open_page: Open) -> None:
    tab = opened(open_page, some[1], {"checkpoint": "step0", "layer": 0, "heads": [1]})
    tab.focus("[name=checkpoint]")
    tab.keyboard.press("Space")
    assert tab.locator(".stage-play").get_attribute("aria-pressed") == "true"
    tab.wait_for_selector(".stage-play[aria-pressed=false]", timeout=10_000)
    assert tab.input_value("[name=checkpoint]") == "4" and "checkpoint=a&" in tab.url


def test_the_keyboard_alone_reaches_everything(some: tuple[Store, Path], open_page: Open) -> None:
    tab = opened(open_page, some[1], {"checkpoint": "step1", "layer": 0, "heads": []})
    tab.focus("[name=checkpoint]")
    tab.keyboard.press("ArrowRight")
    assert text(tab, "checkpoint") == "step 10"
    for _ in range(4):
        tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.dataset.head") == "L0.H0"
    for key in ("ArrowUp", "ArrowRight", "Space", "End", "Enter"):
        tab.keyboard.press(key)
    assert pressed(tab) == ["L1.H1", "L1.H5"]
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.dataset.set") == "all"


def test_clicking_the_line_goes_there(some: tuple[Store, Path], open_page: Open) -> None:
    tab = opened(open_page, some[1])
    tab.wait_for_function("document.querySelector('.stage-plot').clientWidth > 650")
    tab.locator(".stage-plot").click(position={"x": 53, "y": 50})
    assert text(tab, "checkpoint") == "step 0"


def test_what_is_copied_gives_what_is_seen(some: tuple[Store, Path], open_page: Open) -> None:
    state = {"run": "few", "checkpoint": "step10", "layer": 1, "heads": [3], "measure": "logit_diff"}
    tab = opened(open_page, some[1], state)
    for measure in ("logit_diff", *MEASURES, "success", "recovery", "answers"):
        tab.select_option("[name=measure]", measure)
        tab.click("[data-copy=python]")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(text(tab, "copied"), {})
        shown = text(tab, "effect").replace(" %", "e-2")
        assert abs(float(shown) - float(printed.getvalue())) <= 0.005 + 1e-5, measure
    tab.click("[data-copy=link]")
    assert text(tab, "copied") == tab.url and tab.url.endswith("measure=answers")
    tab.click("[data-copy=command]")
    words = "--subsets 3 --layers 1 --positions end:2 --generate 3 --checkpoints step10"
    assert text(tab, "copied").endswith(words)
    tab.select_option("[name=measure]", "rank")
    tab.click("[data-copy=command]")
    assert text(tab, "copied").endswith(words.replace("--generate 3", "--measures rank"))


def test_what_is_saved_is_what_is_seen(some: tuple[Store, Path], open_page: Open, tmp_path: Path) -> None:
    tab = opened(open_page, some[1], {"checkpoint": "step10", "layer": 1, "heads": [1, 3]})
    for kind in ("csv", "svg", "png"):
        with tab.expect_download() as download:
            tab.click(f"[data-copy={kind}]")
        download.value.save_as(tmp_path / f"seen.{kind}")
    rows = (tmp_path / "seen.csv").read_text().splitlines()
    assert rows[0] == "run,checkpoint,step,layer,heads,measure,effect,low,high" and len(rows) == 1 + 18 + 5
    chosen = next(row.split(",") for row in rows if row.startswith("run,step10,10,1,1 3,"))
    assert float(chosen[6]) == float(text(tab, "effect"))
    assert len(ET.parse(tmp_path / "seen.svg").getroot()) > 20
    colours = Image.open(tmp_path / "seen.png").convert("RGB").getcolors(10**6)
    assert colours is not None and len(colours) > 20


def test_hostile_names_stay_text(tmp_path: Path, open_page: Open) -> None:
    name = "</script><img src=x onerror=alert(1)>{{7*7}}\"'&--><!--"
    store = random_store(tmp_path / "a.zarr", name=name, model=name)
    random_run(store)
    tab = opened(open_page, stage_page(store, tmp_path / "a.html"), {"heads": [0]})
    assert tab.locator("#stage img").count() == 0
    assert name in tab.locator(".stage-prompt").first.inner_text()
    tab.fill("[name=checkpoint]", "4")
    assert text(tab, "checkpoint") == name
    fresh = open_page(tab.url)
    fresh.wait_for_selector(READY)
    assert text(fresh, "checkpoint") == name and text(fresh, "effect") == text(tab, "effect")
    tab.click("[data-copy=python]")
    compile(text(tab, "copied"), "copied", "exec")


@pytest.mark.parametrize("n_trials", [1, 2])
def test_one_checkpoint_and_one_prompt_have_what_they_have(n_trials: int, tmp_path: Path, open_page: Open) -> None:
    store = random_store(tmp_path / "a.zarr", steps=(-1,), n_layers=1, n_heads=2, n_trials=n_trials)
    random_run(store)
    tab = opened(open_page, stage_page(store, tmp_path / "a.html"), {"heads": "all"})
    assert tab.locator("[name=checkpoint]").is_disabled() and text(tab, "effect")[0] in "+-"
    assert (text(tab, "interval") == "") == (n_trials == 1)
    assert ("One prompt has no interval" in text(tab, "notes")) == (n_trials == 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_run_can_be_shown(shape: str, tmp_path: Path, open_page: Open) -> None:
    store = random_store(tmp_path / "a.zarr")
    random_run(store, **SHAPES[shape])
    tab = opened(open_page, stage_page(store, tmp_path / "a.html"))
    tab.click("[data-set=even]")
    layer = int(tab.input_value("[name=layer]"))
    state = {"run": "run", "checkpoint": "a", "layer": layer, "heads": [0, 2]}
    tab.fill("[name=checkpoint]", "4")
    assert abs(float(text(tab, "effect")) - effect_in_store(store, state)) <= 0.005 + 1e-4
    for measure in tab.eval_on_selector_all("[name=measure] option", "all => all.map(one => one.value)"):
        tab.select_option("[name=measure]", measure)
        tab.fill("[name=checkpoint]", "2")
    assert sideways_overflow(tab) <= 0


def test_heads_that_are_not_significant_are_hatched(some: tuple[Store, Path], open_page: Open) -> None:
    tab = opened(open_page, some[1], {"checkpoint": "step100", "layer": 1, "heads": [0]})
    looks = tab.eval_on_selector_all(
        "[data-head]",
        "all => all.map((one) => [one.getAttribute('aria-label'), getComputedStyle(one).backgroundImage])",
    )
    assert {("not significant" in words) == (image != "none") for words, image in looks} == {True}
    assert [image for _, image in looks if image != "none"], "noise is not significant"


def test_grouped_queries_and_what_was_measured_of_them_are_on_the_stage(
    grouped: tuple[Store, Path], open_page: Open
) -> None:
    store, page = grouped
    state = {"run": store.patch_names()[0], "checkpoint": "step10", "layer": 1, "heads": [1, 3, 5, 7]}
    states = [state | {"measure": measure} for measure in ("logit_diff", *MEASURES, "answers")]
    tab = opened(open_page, page)
    for asked, (effect, _, status) in zip(states, visit(tab, states), strict=True):
        shown = float(effect.replace(" %", "e-2"))
        assert shown == pytest.approx(effect_in_store(store, asked), abs=0.005 + 1e-5) and not status
    run = store.patch(state["run"]).load()
    for measure in ("logit_diff", *MEASURES):
        tab.select_option("[name=measure]", measure)
        by_prompt = [float(one.replace("−", "-")) for one in tab.locator(".stage-prompt b").all_inner_texts()]
        true = effects_in_store(run, "denoise", state | {"measure": measure})
        assert by_prompt == pytest.approx(true, abs=0.005 + 1e-5), measure


def test_without_a_script_there_is_no_stage(some: tuple[Store, Path], open_page: Open) -> None:
    tab = open_page(some[1], script=False)
    assert not tab.locator("#stage").is_visible() and tab.locator("h1").is_visible()


@pytest.mark.parametrize(("scheme", "width"), [("dark", WIDE), ("light", NARROW)])  # tests/test_page.py has the others
def test_everyone_can_read_the_stage(some: tuple[Store, Path], scheme: str, width: int, open_page: Open) -> None:
    tab = opened(open_page, some[1], {"checkpoint": "step10", "layer": 1, "heads": [1, 3]}, scheme=scheme, width=width)
    assert not grave_findings(tab, "#stage")
    parts = tab.query_selector_all("#stage, #stage > *")
    assert not [part for part in parts if part.evaluate("one => one.scrollWidth > one.clientWidth + 1")]


def test_the_whole_lattice_paints_and_steps_fast(large: tuple[Store, Path], open_page: Open) -> None:
    tab = opened(open_page, large[1], {"checkpoint": "step0", "layer": 6, "heads": "even"})
    paint = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    step = """() => {
      const slider = document.querySelector("[name=checkpoint]"), times = [];
      for (let at = 0; at <= 10; at++) {
        const before = performance.now();
        slider.value = at;
        slider.dispatchEvent(new Event("input"));
        document.body.getBoundingClientRect();
        times.push(performance.now() - before);
      }
      return times.sort((a, b) => a - b)[5];
    }"""
    median = min(tab.evaluate(step) for _ in range(3))
    print(f"first paint {paint:.0f} ms, step {median:.1f} ms, page {large[1].stat().st_size / 1e6:.2f} MB")
    # The best of three, and twice what is aimed at: other work goes on beside tests.
    assert paint < 2000 and median < 100

"""Laws of the page of a comparison, in a browser: one slider moves every training run, to what its numbers are."""

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Locator, Page

from headlapse.engine.report.comparison_page import write_comparison
from headlapse.engine.statistics.comparison import Comparison, compare
from tests.browser import NARROW, WIDE, Open, browser, grave_findings, open_page, picture, sideways_overflow
from tests.test_comparison import BALANCED, in_tokens, training_run
from tests.test_page import HOSTILE
from tests.test_verdict import N_HEADS, STEPS

pytestmark = [pytest.mark.slow, pytest.mark.thorough]
__all__ = ["browser", "open_page"]

SHORT, LONG, PAIRS = "tiny-seed1", "tiny-seed2", "tiny-pairs"


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """Two seeds, the first cut short and with twice the tokens a step, and a training run without single heads."""
    runs = [
        training_run(SHORT, {(1, 0): 3.0, (2, 5): -1.0}, onset=48, steps=STEPS[:10], words=BALANCED, seed=1),
        training_run(LONG, {(3, 7): 3.4, (1, 2): 1.2}, onset=64, words=BALANCED, seed=2),
        training_run(PAIRS, {(0, 1): 2.0}, "other", words=("even", "odd", "all"), seed=3),
    ]
    return compare([in_tokens(run, 200 if run.name == SHORT else 100) for run in runs])


@pytest.fixture(scope="module")
def page(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_to(tmp_path_factory.mktemp("comparison"), comparison)


def write_to(folder: Path, comparison: Comparison) -> Path:
    return write_comparison(comparison, {}, {str(name): Path("x.zarr") for name in comparison.table.index}, folder)


def panel(tab: Page, name: str) -> Locator:
    return tab.get_by_role("region", name=name, exact=True)


def go(tab: Page, place: int) -> None:
    tab.locator("[name=checkpoint]").evaluate(
        "(slider, place) => { slider.value = place; slider.dispatchEvent(new Event('input')) }", place
    )


def test_every_cell_is_the_effect_at_the_last_checkpoint_of_its_run_by_then(
    open_page: Open, page: Path, comparison: Comparison
) -> None:
    tab = open_page(page)
    positions = sorted(set(comparison.timeline["position"]))
    assert len(positions) == int(tab.locator("[name=checkpoint]").get_attribute("max") or 0) + 1
    rng = np.random.default_rng(0)
    for _ in range(30):
        place, name = int(rng.integers(len(positions))), str(rng.choice([SHORT, LONG]))
        layer, head = int(rng.integers(4)), int(rng.integers(N_HEADS))
        go(tab, place)
        run = comparison.timeline.loc[name]
        label = run.index[run["position"] <= positions[place]][-1]
        row = comparison.heads.loc[(name, label, layer, head)]
        cell = panel(tab, name).locator(f"[id$='-{layer}-{head}']")
        cell.hover()
        said = (cell.get_attribute("aria-label") or "").replace("−", "-")
        shown = [float(number) for number in re.findall(r"[+-]\d+\.\d\d", said)]
        assert shown == pytest.approx([row["effect"], row["low"], row["high"]], abs=0.0051)
        assert ("not significant" in said) == (row["p_adjusted"] > 0.05)
        assert label in panel(tab, name).inner_text()
    tab.mouse.move(0, 0)
    go(tab, 0)
    row = comparison.heads.loc[(LONG, "step0", 2, 1)]
    name = f"L2.H1 {row['effect']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}] nats".replace("-", "−")
    panel(tab, LONG).get_by_role("gridcell", name=name).wait_for()


def test_a_run_that_has_ended_stays_at_its_last_checkpoint_and_says_so(open_page: Open, page: Path) -> None:
    tab = open_page(page)
    assert "its last, step96" in panel(tab, SHORT).inner_text()
    assert "its last" not in panel(tab, LONG).inner_text() and "step256" in panel(tab, LONG).inner_text()
    assert "not patched one by one" in panel(tab, PAIRS).inner_text()


def test_the_address_is_the_place_and_opens_there(open_page: Open, page: Path) -> None:
    tab = open_page(page)
    go(tab, 5)
    before = [panel(tab, name).inner_text() for name in (SHORT, LONG)]
    again = open_page(tab.url)
    assert "#at=" in tab.url and [panel(again, name).inner_text() for name in (SHORT, LONG)] == before
    strange = open_page(f"{page.resolve().as_uri()}#at=<b>")
    assert panel(strange, LONG).is_visible() and "step256" in panel(strange, LONG).inner_text()


def test_the_keyboard_moves_through_training_and_over_heads(open_page: Open, page: Path) -> None:
    tab = open_page(page)
    slider = tab.get_by_label("tokens seen")
    slider.focus()
    tab.keyboard.press("Home")
    assert "step0" in panel(tab, LONG).inner_text()
    tab.keyboard.press("End")
    grid = panel(tab, LONG).get_by_role("grid")
    grid.focus()
    words = panel(tab, LONG).locator(".multiples-words")
    assert words.inner_text().startswith("L3.H0 ")
    for key, head in {"ArrowRight": "L3.H1", "ArrowDown": "L2.H1", "ArrowLeft": "L2.H0", "ArrowUp": "L3.H0"}.items():
        tab.keyboard.press(key)
        assert words.inner_text().startswith(f"{head} ")
    tab.keyboard.press("Tab")
    assert words.inner_text().startswith("largest: L3.H7 ")


def test_play_goes_through_training_and_stops_at_its_end(open_page: Open, page: Path) -> None:
    tab = open_page(page)
    last = tab.locator("[name=checkpoint]").get_attribute("max")
    button = tab.get_by_role("button", name="Play through training")
    go(tab, int(last or 0) - 1)
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    tab.wait_for_function("() => document.querySelector('.multiples-bar button').textContent === 'Play'")
    assert tab.locator("[name=checkpoint]").input_value() == last


@pytest.mark.parametrize(("scheme", "width"), [("light", WIDE), ("dark", NARROW)], ids=["wide", "narrow"])
def test_everyone_can_use_it_in_any_window(open_page: Open, page: Path, scheme: str, width: int) -> None:
    tab = open_page(page, scheme=scheme, width=width)
    tab.get_by_role("grid").first.wait_for()
    assert not grave_findings(tab) and sideways_overflow(tab) == 0
    picture(tab, f"comparison-{scheme}-{'wide' if width == WIDE else 'narrow'}")


def test_without_scripts_it_is_an_article(open_page: Open, page: Path) -> None:
    tab = open_page(page, script=False)
    assert tab.locator("figure svg").is_visible() and tab.locator("main table").is_visible()
    assert not tab.locator("#stage").is_visible() and not tab.get_by_role("link", name="The time-lapse").is_visible()


def test_a_hostile_name_stays_text(open_page: Open, tmp_path: Path) -> None:
    runs = [training_run(name, {(1, 0): 3.0}, name, words=BALANCED) for name in (HOSTILE, f"{HOSTILE}2")]
    tab = open_page(write_to(tmp_path, compare(runs)))
    assert panel(tab, HOSTILE).get_by_role("heading").inner_text() == HOSTILE
    assert tab.locator("main img").count() == 0 and not tab.evaluate("window.mine")


def test_a_slider_step_is_quick_with_nine_training_runs(open_page: Open, tmp_path: Path) -> None:
    """Milliseconds of one step, script and layout, on whatever runs the tests: far below what an eye notices."""
    runs = [training_run(f"run{seed}", {(1, 0): 3.0}, words=BALANCED, seed=seed) for seed in range(9)]
    tab = open_page(write_to(tmp_path, compare(runs)))
    tab.get_by_role("grid").first.wait_for()
    took = tab.evaluate(
        """() => {
          const slider = document.querySelector("[name=checkpoint]");
          const times = [];
          for (let place = 0; place <= Number(slider.max); place++) {
            const start = performance.now();
            slider.value = place;
            slider.dispatchEvent(new Event("input"));
            document.body.getBoundingClientRect();
            times.push(performance.now() - start);
          }
          return times.sort((a, b) => a - b)[times.length >> 1];
        }"""
    )
    assert took < 50

"""Laws of the page in a browser: everyone can read it, it asks for nothing, and it keeps within its window.

Pictures of it go to build/screenshots.
"""

from pathlib import Path

import pytest
from playwright.sync_api import Page

from headlapse.engine.report.page import write_report
from headlapse.engine.report.sections import SECTIONS
from headlapse.engine.store.store import Store
from tests.browser import NARROW, WIDE, Open, browser, grave_findings, open_page, picture, sideways_overflow
from tests.test_report import some_run, some_store

pytestmark = [pytest.mark.slow, pytest.mark.thorough]
__all__ = ["browser", "open_page"]

SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])
WIDTHS = pytest.mark.parametrize("width", [WIDE, NARROW], ids=["wide", "narrow"])

HOSTILE = "$^$</script></style><script>mine = 1</script><img src=x onerror='mine = 1'>{{7*7}}&lt;"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = some_store(tmp_path_factory.mktemp("stores") / "tiny.zarr")
    some_run(store, ["lattice"])
    return store


@pytest.fixture(scope="module")
def page(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(store, tmp_path_factory.mktemp("page"))


@SCHEMES
@WIDTHS
def test_a_program_that_checks_access_finds_nothing_grave(open_page: Open, page: Path, scheme: str, width: int) -> None:
    tab = open_page(page, scheme=scheme, width=width)
    unfold(tab)
    assert not grave_findings(tab)
    picture(tab, f"page-{scheme}-{'wide' if width == WIDE else 'narrow'}")


@WIDTHS
def test_the_page_is_no_wider_than_its_window(open_page: Open, page: Path, width: int) -> None:
    tab = open_page(page, width=width)
    assert sideways_overflow(tab) == 0
    unfold(tab)
    assert sideways_overflow(tab) == 0


def test_what_scrolls_can_be_reached_and_scrolled_with_the_keyboard_and_has_a_name(open_page: Open, page: Path) -> None:
    tab = open_page(page, width=NARROW)
    unfold(tab)
    scrolling = tab.evaluate(
        """() => [...document.querySelectorAll("main *")]
             .filter(e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX))
             .filter(e => e.scrollWidth > e.clientWidth || e.scrollHeight > e.clientHeight)
             .map(e => [e.tabIndex, e.getAttribute("aria-label") ?? ""])"""
    )
    assert len(scrolling) > 5 and all(index == 0 and name for index, name in scrolling)
    names = [name for _, name in scrolling]
    assert len(names) == len(set(names))
    box = tab.get_by_role("region", name="Table: every checkpoint")
    box.focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("element => element.scrollLeft > 0", arg=box.element_handle())


def test_words_of_headers_and_tokens_stay_whole(open_page: Open, page: Path) -> None:
    tab = open_page(page, width=NARROW)
    unfold(tab)
    broken = tab.evaluate(
        """() => {
          const lines = (node, from, to) => {
            const range = document.createRange();
            range.setStart(node, from); range.setEnd(node, to);
            return new Set([...range.getClientRects()].map(r => Math.round(r.top))).size;
          };
          const broken = [];
          for (const element of document.querySelectorAll("th, .token")) {
            const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
            for (let node; (node = walker.nextNode()); )
              for (const word of node.data.matchAll(/\\S+/g))
                if (lines(node, word.index, word.index + word[0].length) > 1) broken.push(word[0]);
          }
          return broken;
        }"""
    )
    assert not broken
    tokens = tab.locator(".tokens").first
    assert tokens.bounding_box()["width"] <= NARROW


def test_the_contents_lead_to_every_section_in_order(open_page: Open, page: Path) -> None:
    tab = open_page(page)
    links = tab.get_by_role("navigation", name="Contents").get_by_role("link")
    targets = [link.get_attribute("href") for link in links.all()]
    sections = tab.locator("main > section[id]")
    shown = [f"#{section.get_attribute('id')}" for section in sections.all()]
    assert [target for target in targets if target in shown] == shown
    order = ["#stage", *(f"#{section.name}" for section in SECTIONS)]
    assert shown == [name for name in order if name in shown] and {"#stage", "#even-odd", "#threats"} < set(shown)
    for target in targets:
        assert tab.locator(str(target)).count() == 1
    links.last.focus()
    tab.keyboard.press("Enter")
    assert tab.url.endswith("#provenance") and tab.locator("#provenance h2").is_visible()


def test_the_keyboard_alone_gets_everywhere_and_is_never_caught(open_page: Open, page: Path) -> None:
    tab = open_page(page)
    wanted = tab.evaluate(
        """() => [...document.querySelectorAll("a[href], summary, button, input, select, [tabindex='0']")]
             .filter(e => e.checkVisibility({visibilityProperty: true}) && !e.disabled && e.tabIndex >= 0).length"""
    )
    seen: set[str] = set()
    for _ in range(3 * wanted):
        tab.keyboard.press("Tab")
        at = tab.evaluate(
            """() => { const e = document.activeElement;
                 return e === document.body ? "" : (e.dataset.at ??= String(Math.random())); }"""
        )
        if at == "" or (at in seen and len(seen) >= wanted):
            break
        seen.add(at)
        outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", "what has the focus shows it"
    assert len(seen) >= 10


def test_tables_say_what_their_rows_and_columns_are(open_page: Open, page: Path) -> None:
    tab = open_page(page)
    assert tab.locator("main table").count() >= 5
    assert tab.locator("main table:not(:has(caption))").count() == 0
    assert tab.locator("main th:not([scope])").count() == 0
    assert tab.locator("main [role=img]:not([aria-label])").count() == 0


@SCHEMES
def test_figures_and_maps_take_their_colours_from_the_scheme(open_page: Open, page: Path, scheme: str) -> None:
    tab = open_page(page, scheme=scheme)
    fills = tab.evaluate(
        """() => [...document.querySelectorAll("#heatmap-figure_1 use, #heatmap-figure_1 path")]
             .map(e => getComputedStyle(e).fill)"""
    )
    assert len(set(fills)) > 10
    paper, ink = (tab.evaluate(f"getComputedStyle(document.body).{what}") for what in ("backgroundColor", "color"))
    assert tab.evaluate("getComputedStyle(document.querySelector('figure svg')).color") == ink != paper
    assert not tab.evaluate(
        """() => [...document.querySelectorAll("figure svg [style]")].map(e => e.getAttribute("style"))
             .filter(style => /#[0-9a-f]{6}/.test(style))"""
    )


def test_without_scripts_the_article_is_there_with_its_figures(open_page: Open, page: Path) -> None:
    tab = open_page(page, script=False)
    assert tab.locator("[data-role=verdict]").is_visible()
    assert tab.locator("figure svg").count() >= 5
    for heading in tab.locator("main > section > h2").all():
        assert heading.is_visible()
    picture(tab, "page-no-script")


def test_print_gives_the_whole_article(open_page: Open, page: Path) -> None:
    tab = open_page(page, scheme="dark", width=NARROW)
    tab.emulate_media(media="print")
    hidden = tab.evaluate(
        """() => [...document.querySelectorAll("section:not(.stage) :is(td, th, p, figure svg)")]
             .filter(e => !e.checkVisibility({visibilityProperty: true}) || !e.getClientRects().length)
             .map(e => e.textContent.slice(0, 40))"""
    )
    assert not hidden
    cut = tab.evaluate(
        """() => [...document.querySelectorAll(".box")].filter(e => e.scrollHeight > e.clientHeight + 1
             && getComputedStyle(e).overflowY !== "visible").length"""
    )
    assert cut == 0 and not tab.get_by_role("navigation").is_visible()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(252, 252, 250)", "paper is light"
    paper = tab.pdf(format="A4")
    assert paper.startswith(b"%PDF") and paper.count(b"/Type /Page\n") > 3


def test_nothing_moves_unasked(open_page: Open, page: Path) -> None:
    tab = open_page(page, motion="reduce")
    assert tab.evaluate("document.getAnimations().length") == 0
    for kind in ("animation-duration", "transition-duration"):
        assert tab.evaluate(
            """kind => [...document.querySelectorAll("*")]
                 .every(e => parseFloat(getComputedStyle(e).getPropertyValue(kind)) === 0)""",
            kind,
        )


def test_hostile_names_stay_text(open_page: Open, tmp_path: Path) -> None:
    store = some_store(tmp_path / "tiny.zarr", [1, 2], prompt=HOSTILE, model=f"org\\{HOSTILE}", mark=HOSTILE)
    some_run(store, ["even", "odd", "all", "each"], name="run-{{7*7}}<b>")
    tab = open_page(write_report(store, tmp_path / "out"))
    unfold(tab)
    said = tab.locator("body").inner_text()
    assert "{{7*7}}" in tab.title() and "49" not in tab.title() + tab.locator("h1").inner_text()
    assert f"step2{HOSTILE}" in said and "run-{{7*7}}<b>" in said
    assert tab.locator("td", has_text=HOSTILE).count() > 0, "the prompts"
    assert tab.locator("main img").count() == 0 and not tab.evaluate("window.mine")
    assert tab.locator("#provenance").is_visible(), "nothing swallows the rest of the page"


def unfold(tab: Page) -> None:
    """Open everything that is folded."""
    tab.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")

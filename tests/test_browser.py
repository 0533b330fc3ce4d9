"""Laws of the browser that the laws of pages stand on: it sees what it has to see."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser import NARROW, Open, browser, grave_findings, is_local, open_page, sideways_overflow, watch

pytestmark = pytest.mark.thorough
__all__ = ["browser", "open_page"]

BROKEN = """<!DOCTYPE html><html lang="en"><title>t</title><body style="background: #fff"><main>
<p style="color: #bbb">faint</p><div style="width: 500px">wide</div><button></button>
<img src="http://127.0.0.1:9/pixel.png" alt=""></main>
<script>console.error("logged"); setTimeout(() => { throw new Error("thrown") })</script>"""


def test_what_is_wrong_with_a_page_is_noticed(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "broken.html").write_text(BROKEN)
    wrong: list[str] = []
    tab = browser.new_page(viewport={"width": NARROW, "height": 600})
    watch(tab, wrong)
    tab.goto((tmp_path / "broken.html").as_uri())
    tab.wait_for_timeout(50)
    assert "asked for http://127.0.0.1:9/pixel.png" in wrong and "error: logged" in wrong
    assert any("thrown" in line for line in wrong)
    assert {line.split(": ")[1] for line in grave_findings(tab)} == {"color-contrast", "button-name"}
    assert sideways_overflow(tab) > 100
    tab.close()


def test_a_page_may_lie_in_files_and_in_itself_only() -> None:
    assert all(map(is_local, ("file:///a.html", "data:,x", "blob:null/1")))
    assert not any(map(is_local, ("https://example.org", "http://localhost", "ws://x", "//example.org")))


def test_scheme_width_and_scripts_are_what_was_asked_for(open_page: Open, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><title>before</title><script>document.title = 'after'</script>")
    tab = open_page(page, scheme="dark", width=NARROW, motion="reduce")
    assert tab.title() == "after" and tab.evaluate("innerWidth") == NARROW
    for query in ("(prefers-color-scheme: dark)", "(prefers-reduced-motion)"):
        assert tab.evaluate("query => matchMedia(query).matches", query)
    assert open_page(page, script=False).title() == "before"

"""A browser for laws of pages: the Chromium that this machine has, driven by Playwright; nothing is downloaded.

A test module that imports `browser` and `open_page` has one browser, closed at the module's end: an open one keeps an
event loop running in this thread, where code of other modules wants to start its own.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

WIDE, NARROW = 1440, 390
"""Widths of windows in CSS pixels: a desk, a telephone."""

HEIGHT = 900

PICTURES = Path(__file__).parents[1] / "build" / "screenshots"

GRAVE = {"serious", "critical"}
"""Impacts of axe-core's findings that fail a test."""

Open = Callable[..., Page]
"""`open_page(path, ...)`."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window; skips where there is none."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open a file (or an address of one, with its fragment) in a fresh profile; fails where a page that was opened so
    logged an error, raised one, or asked for anything that is not in a file or in itself."""
    contexts, wrong = [], []

    def open_(
        page: Path | str, scheme: str = "light", width: int = WIDE, script: bool = True, motion: str = "no-preference"
    ) -> Page:
        looks: Any = {"color_scheme": scheme, "reduced_motion": motion, "viewport": {"width": width, "height": HEIGHT}}
        context = browser.new_context(**looks, java_script_enabled=script, accept_downloads=True)
        contexts.append(context)
        tab = context.new_page()
        watch(tab, wrong)
        tab.goto(page if isinstance(page, str) else page.resolve().as_uri())
        return tab

    yield open_
    for context in contexts:
        context.close()
    assert not wrong, "\n".join(wrong)


def watch(tab: Page, wrong: list[str]) -> None:
    """Note what goes wrong in a page: errors in the console or uncaught, and requests that leave the machine."""
    tab.on("console", lambda said: said.type in ("error", "warning") and wrong.append(f"{said.type}: {said.text}"))
    tab.on("pageerror", lambda error: wrong.append(f"uncaught: {error}"))
    tab.on("request", lambda asked: is_local(asked.url) or wrong.append(f"asked for {asked.url}"))


def is_local(address: str) -> bool:
    return address.startswith(("file:", "data:", "blob:", "about:"))


def grave_findings(tab: Page, within: str | None = None) -> list[str]:
    """What axe-core finds serious or critical in a page (`within` a selector's element), a line each."""
    found = Axe().run(tab, context=within, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        f"{finding['impact']}: {finding['id']}: {node['target']}: {node.get('failureSummary', '')} {node['html'][:200]}"
        for finding in found
        if finding["impact"] in GRAVE
        for node in finding["nodes"]
    ]


def picture(tab: Page, name: str) -> None:
    """Keep what the whole page looks like, for people to look at."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=PICTURES / f"{name}.png", full_page=True, animations="disabled")


def sideways_overflow(tab: Page) -> int:
    """Pixels by which the page is wider than its window."""
    return int(tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

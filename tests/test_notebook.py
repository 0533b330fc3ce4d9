"""Laws of the stage in a notebook: it is that of the page, and what is chosen in it comes back to Python."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import headlapse as hl
from tests.browser import Open, browser, open_page
from tests.stages import effect_in_store, random_run, random_store

pytest.importorskip("anywidget", reason="anywidget is not installed")
pytestmark = pytest.mark.thorough
__all__ = ["browser", "open_page"]

PAGE = """<!DOCTYPE html><html lang="en"><title>notebook</title><body><div id="cell"></div>"""

RENDER = """async ([script, style, payload, selected]) => {
  document.head.append(Object.assign(document.createElement("style"), {textContent: style}));
  const values = {payload, selected}, listeners = [];
  window.model = {
    get: name => values[name],
    set: (name, value) => { values[name] = value; },
    save_changes: () => {},
    on: (name, listener) => listeners.push(listener),
    fromPython: chosen => { values.selected = chosen; listeners.forEach(listener => listener()); },
  };
  const module = await import(URL.createObjectURL(new Blob([script], {type: "text/javascript"})));
  window.leave = await module.default.render({model: window.model, el: document.getElementById("cell")});
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> "hl.PatchedRun":
    store = random_store(tmp_path_factory.mktemp("notebook") / "a.zarr")
    random_run(store)
    return hl.open(store.path).run("run")


def test_a_widget_knows_what_is_selected(run: "hl.PatchedRun") -> None:
    widget = run.widget()
    assert {"run", "checkpoint", "layer", "heads", "measure"} == set(widget.selected)
    assert widget.selected["run"] == "run" and json.loads(widget.payload)["runs"][0]["name"] == "run"


def test_it_shows_the_stage_and_tells_python_what_is_chosen(
    run: "hl.PatchedRun", open_page: Open, tmp_path: Path
) -> None:
    from headlapse.engine.store.store import Store

    (tmp_path / "page.html").write_text(PAGE)
    tab, widget = open_page(tmp_path / "page.html"), run.widget()
    tab.evaluate(RENDER, [widget._esm, widget._css, widget.payload, widget.selected])
    effect = tab.locator("[data-role=effect]")

    def selected() -> dict[str, Any]:
        return dict(tab.evaluate("model.get('selected')"))

    tab.evaluate("model.fromPython({checkpoint: 'step10', layer: 2, heads: [0, 3]})")
    asked = {"run": "run", "checkpoint": "step10", "layer": 2, "heads": [0, 3]}
    assert selected() == {**asked, "measure": "logit_diff"}
    assert abs(float(effect.inner_text()) - effect_in_store(Store(run.store.path), asked)) <= 0.005 + 1e-5
    tab.click('[data-head="L2.H1"]')
    assert selected()["heads"] == [0, 1, 3] and "#" not in tab.url
    tab.focus("[name=checkpoint]")
    focused = tab.locator("[name=checkpoint]")
    assert focused.get_attribute("data-lm-suppress-shortcuts"), "JupyterLab would take the arrows for its own"
    tab.evaluate("leave()")


def test_a_notebook_shows_a_run_as_its_stage(run: "hl.PatchedRun", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert run._repr_mimebundle_() is None, "no kernel, no widget"
    monkeypatch.setattr("headlapse.face._is_notebook", lambda: True)
    bundle, _ = run._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and "<pre>" in bundle["text/html"]


def test_without_anywidget_it_says_what_to_install(run: "hl.PatchedRun", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "headlapse.notebook", raising=False)
    with pytest.raises(hl.UserError, match=r"pip install 'headlapse\[notebook\]'"):
        run.widget()
    monkeypatch.setattr("headlapse.face._is_notebook", lambda: True)
    bundle, _ = run._repr_mimebundle_()
    assert "<pre>" in bundle["text/html"] and "pip install &#x27;headlapse[notebook]&#x27;" in bundle["text/html"]

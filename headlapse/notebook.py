"""The stage of a patched run in a notebook; what is chosen there comes back to Python."""

import json
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from .engine.mechanism.store import read_mechanism
from .engine.report.colours import CELLS, PAGE, declared
from .engine.report.result import read_result
from .engine.report.stage import source, stage_payload
from .engine.store.store import Store

RENDER = """
async function render({ model, el }) {
  const root = document.createElement("section");
  root.className = "stage headlapse-stage";
  // JupyterLab takes arrows, space and letters for its own unless the element that has the focus says this.
  root.addEventListener("focusin", ({ target }) => target.setAttribute("data-lm-suppress-shortcuts", "true"));
  el.append(root);
  const texts = (chosen) => Object.fromEntries(Object.entries(chosen).map(([name, value]) => [name, String(value)]));
  let ours = "";
  const changed = (stage) => {
    ours = JSON.stringify(stage.selection());
    model.set("selected", stage.selection());
    model.save_changes();
  };
  const stage = await mount(root, JSON.parse(model.get("payload")), { address: false, changed });
  const follow = () => {
    const asked = model.get("selected");
    if (JSON.stringify(asked) === ours || !Object.keys(asked).length) return;
    stage.select(texts(asked), "Not in this run");
    changed(stage);
  };
  model.on("change:selected", follow);
  if (Object.keys(model.get("selected")).length) follow();
  else changed(stage);
  return () => stage.leave();
}
export default { render };
"""
"""What a notebook calls, beside the stage's own script: `selected` is what stands in a page's address."""


def _script() -> str:
    return f"{source('stage.js')}\n{RENDER}"


def _style() -> str:
    """The stage's looks, and the colours that a page has of its own."""
    light, dark = (declared(PAGE | CELLS, scheme) for scheme in (0, 1))
    frame = (
        "background: var(--page); color: var(--ink); padding: 1rem; color-scheme: light dark; box-sizing: border-box"
    )
    return (
        f".headlapse-stage {{ {light}; {frame} }}\n"
        f"@media (prefers-color-scheme: dark) {{ .headlapse-stage {{ {dark} }} }}\n{source('stage.css')}"
    )


class StageWidget(anywidget.AnyWidget):
    """The stage of the page, in a notebook.

    `selected` is what is shown: `run`, `checkpoint`, `layer`, `heads` and `measure`.  It can be set and observed.
    """

    _esm = _script()
    _css = _style()
    payload = traitlets.Unicode().tag(sync=True)
    selected = traitlets.Dict().tag(sync=True)


def stage_widget(store: Path, name: str) -> StageWidget:
    """The stage of a patched run.  Raises `UserError` where it has no finished checkpoint."""
    opened = Store(store)
    payload = stage_payload(opened, read_result(opened, name), read_mechanism(opened))
    first, start = payload["runs"][0], payload["start"]
    selected = {
        "run": name,
        "checkpoint": first["checkpoints"][start["checkpoint"]]["label"],
        "layer": start["layer"],
        "heads": start["heads"],
        "measure": "logit_diff",
    }
    return StageWidget(payload=json.dumps(payload), selected=selected)


def display(widget: StageWidget, **asked: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a notebook shows of a widget, with what it has of other kinds."""
    shown = widget._repr_mimebundle_(**asked)
    bundle, metadata = shown if isinstance(shown, tuple) else (shown or {}, {})
    return dict(bundle), dict(metadata)

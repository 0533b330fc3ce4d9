"""What the page carries for its stage: the numbers of a store's patched runs, made small enough for one file.

Means and intervals are those of the tables, rounded to hundredths of a nat.  The effect of the page's run is always
there; what else there is room for, is, and what is left out is named in `notes`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ..measures.logit_diff import CLEAR_OF_ZERO
from ..mechanism.role_summary import in_role
from ..mechanism.store import MechanismRun
from ..runtime.errors import UserError
from ..statistics.bootstrap import LEVEL
from ..store.store import Store
from ..store.zarr_group import dims_of
from ..study.prompts import Trials
from .packing import MISSING, hundredths, pack, size_of
from .result import Result, read_result
from .stage_run import DETAIL_EFFECTS, DETAIL_TEXT, StageRun

MOST_PROMPTS = 200
"""Prompts whose tokens are carried."""

MOST_SHARES = 500_000
"""Shares of attention in single prompts above which only their means are carried."""


def stage_payload(store: Store, result: Result, mechanism: MechanismRun | None = None) -> dict[str, Any]:
    """What `stage.js` shows: the runs of the corrected protocol, that of the page first, prompts and mechanism.

    Raises `UserError` where the page's run is of a kind that the stage cannot show.
    """
    if problem := not_for_the_stage(store, result.name):
        raise UserError(f"run {result.name} has no time-lapse: {problem}")
    first = StageRun(result)
    payload: dict[str, Any] = {
        "store": str(store.path),
        "model": Path(store.study["model"]).name,
        "task": Path(str(store.study["task"])).name,
        "level": round(100 * LEVEL),
        "missing": MISSING,
        "clear": CLEAR_OF_ZERO,
        "start": first.start(),
        "prompts": _prompts(store.trials()),
        "mechanism": None,
        "runs": [first.carried(0)],
        "notes": [],
    }
    if mechanism and (measured := _mechanism(mechanism)):
        _add_if_it_fits(payload, "mechanism", measured, "what heads attend to, and their roles")
    for name in reversed(store.patch_names("corrected")):
        if name != result.name:
            _add_run(payload, store, name)
    return payload


def as_json(payload: dict[str, Any]) -> Markup:
    """The text of a `script` element: names in it, whatever they are, cannot end the element."""
    text = json.dumps(payload, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def stage_html(store: Store, result: Result, mechanism: MechanismRun | None = None) -> tuple[Markup, Markup]:
    """The stage's place in the page, hidden until its script has run, and what the page ends in: numbers and script.

    Where the run has no stage, what there is in its place, and nothing at the end.
    """
    if problem := not_for_the_stage(store, result.name):
        line = Markup('<p class="soft" id="stage">No time-lapse: {}. Figures and tables below show this run.</p>')
        return line.format(problem), Markup("")
    payload = stage_payload(store, result, mechanism)
    return embedded("stage", source("stage.css"), source("stage.js"), "mount", payload)


def embedded(looks: str, style: str, script: str, begin: str, payload: dict[str, Any]) -> tuple[Markup, Markup]:
    """A place of the class `looks`, and what a page ends in: the numbers, and the script, whose function `begin` is
    called with both."""
    place = Markup(f'<style>{style}</style>\n<section class="{looks}" id="stage" hidden></section>')
    numbers = 'JSON.parse(document.getElementById("stage-numbers").textContent)'
    return place, Markup(
        f'<script type="application/json" id="stage-numbers">{as_json(payload)}</script>\n'
        f'<script type="module">\n{script}\n{begin}(document.getElementById("stage"), {numbers});\n</script>'
    )


def source(name: str) -> str:
    """A file beside this module, as it goes into a page."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    assert "</s" not in text and "<!--" not in text, f"{name} would end its element"
    return text


def _add_if_it_fits(payload: dict[str, Any], name: str, value: Any, words: str) -> None:
    if size_of([payload, value]) <= DETAIL_TEXT:
        payload[name] = value
    else:
        payload["notes"].append(f"no room on this page for {words}")


def _add_run(payload: dict[str, Any], store: Store, name: str) -> None:
    """Another run of the store, where there is room; else a note."""
    taken = size_of(payload)
    if problem := not_for_the_stage(store, name):
        payload["notes"].append(f"the run {name} is not here: {problem}")
        return
    if store.patch(name).array("logit_diff").size > DETAIL_EFFECTS or taken > DETAIL_TEXT:
        payload["notes"].append(f"no room on this page for the run {name}")
        return
    try:
        run = StageRun(read_result(store, name)).carried(taken)
    except UserError as problem:
        payload["notes"].append(str(problem))
        return
    if taken + size_of(run) > DETAIL_TEXT:
        payload["notes"].append(f"no room on this page for the run {name}")
    else:
        payload["runs"].append(run)


def not_for_the_stage(store: Store, name: str) -> str:
    """Why the stage cannot show a run; empty where each checkpoint, layer, set of heads and prompt has an effect."""
    group = store.patch(name).group
    dims = dims_of(group["logit_diff"])
    if "position" in dims:
        return "positions were patched one at a time"
    if "layer" not in dims:
        return "its sets of heads lie in several layers"
    if "mask" not in group or dims_of(group["mask"]) != ("subset", "head"):
        return "what was patched has no heads"
    return "" if dims == ("checkpoint", "layer", "subset", "trial") else f"it has an effect for each {', '.join(dims)}"


def _prompts(trials: Trials) -> dict[str, Any]:
    """Tokens of both prompts of each pair, and the answers."""
    shown = min(trials.n_trials, MOST_PROMPTS)
    tokens = [
        [[str(token) for token in trials.token_text[run, trial, : trials.length[run, trial]]] for run in range(2)]
        for trial in range(shown)
    ]
    answers = [[contrast.answer, contrast.wrong] for contrast in trials.contrasts[:shown]]
    return {"n": trials.n_trials, "tokens": tokens, "answers": answers}


def _mechanism(mechanism: MechanismRun) -> dict[str, Any] | None:
    """What heads attend to from the read position, and their roles; None where neither was measured."""
    run = mechanism.load()
    complete = run.isel(checkpoint=np.flatnonzero(run.complete.values))
    if not {"attention", "role_score"} & set(complete):
        return None
    found: dict[str, Any] = {
        "checkpoints": [str(label) for label in complete.checkpoint.values],
        "layers": [int(layer) for layer in complete.layer.values],
    }
    if "attention" in complete:
        shares = complete.attention.transpose("checkpoint", "layer", "head", "run", "trial", "to").values.astype(float)
        by_prompt = shares.size <= MOST_SHARES
        found["attention"] = {
            "to": [str(to) for to in complete.to.values],
            "mean": pack(hundredths(shares.mean(4))),
            "by_prompt": pack(hundredths(shares[:, :, :, 0])) if by_prompt else None,
        }
    if "role_score" in complete:
        dims = ("checkpoint", "layer", "head", "role")
        found["roles"] = {
            "names": [str(role) for role in complete.role.values],
            "score": pack(hundredths(complete.role_score.transpose(*dims).values.astype(float))),
            "null": pack(hundredths(complete.role_null.transpose(*dims).values.astype(float))),
            "has": pack(in_role(complete).transpose(*dims).values.astype(np.int64)),
        }
    return found

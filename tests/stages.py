"""Stores of random effects, written without a model, and what a page says of them: for the laws of the stage."""

import base64
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from playwright.sync_api import Page

from headlapse.engine.report.colours import CELLS, PAGE, declared
from headlapse.engine.report.result import read_result
from headlapse.engine.report.stage import stage_html
from headlapse.engine.store.activations import Capture
from headlapse.engine.store.patched_run import Answers
from headlapse.engine.store.store import Store, create_store
from headlapse.engine.store.zarr_group import CheckpointRow
from headlapse.engine.study.patch_settings import Direction, PatchSettings
from headlapse.engine.study.prompts import Trials
from headlapse.engine.study.study import Measure
from headlapse.engine.study.subsets import parse_subsets
from headlapse.engine.study.tasks.contrast import Contrast

MEASURED: dict[Measure, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "probability": lambda rng, shape: rng.uniform(size=shape).astype("float32"),
    "rank": lambda rng, shape: rng.integers(0, 50_000, size=shape).astype("float32"),
    "kl": lambda rng, shape: rng.exponential(size=shape).astype("float32"),
    "sequence": lambda rng, shape: rng.normal(0, 300, size=shape).astype("float32"),
}
"""Values of each measure."""

LOOKS = (
    f":root {{ {declared(PAGE | CELLS, 0)} }}"
    + """
body { margin: 0 auto; padding: 1rem; max-width: 60rem; font: 1rem/1.55 sans-serif; color: var(--ink) }
"""
)


def random_store(
    path: Path,
    steps: Sequence[int] = (0, 1, 10, 100, -1),
    n_layers: int = 3,
    n_heads: int = 4,
    n_trials: int = 5,
    name: str = "a",
    model: str = "org/tiny",
) -> Store:
    """A store without a single activation worth reading; `name` stands in every token, answer and label."""
    z = [torch.zeros(2, n_trials, 3, n_heads, 1)] * n_layers
    captured = Capture(tensors={"z": z}, answer_logits=torch.zeros(2, n_trials, 2))
    text = np.full((2, n_trials, 3), f" {name}1")
    contrasts = tuple(Contrast(name, f"{name}{i}", f" {name}", f" {name}", f"{name}.jsonl") for i in range(n_trials))
    length = np.array([[3] * n_trials, [2] * n_trials])
    trials = Trials(np.ones(text.shape, int), length, np.ones((n_trials, 2), int), text, contrasts, notes=())
    study = {"model": model, "task": f"{name}.jsonl", "trials": n_trials, "sites": ["all"], "dtype": "float32"}
    rows = [CheckpointRow(f"step{step}" if step >= 0 else name, step) for step in steps]
    store = create_store(path, study, rows, range(n_layers), trials, {"z": (n_heads, 1)})
    for row in rows:
        store.write(row.label, captured, {"commit": row.label, "sha256": {"model.safetensors": "f" * 64}})
    return store


def random_run(
    store: Store,
    words: Sequence[str] = ("lattice",),
    name: str = "run",
    direction: Direction = "denoise",
    joint: bool = False,
    positions: str = "last",
    scale: float = 2.0,
    gap: float = 8.0,
    measures: Sequence[Measure] = (),
    generate: int = 0,
) -> None:
    """A patched run: heads that nearly add up, and noise; `none` changes nothing.  `measures` and texts are noise."""
    rng, subsets, n_heads = np.random.default_rng(0), parse_subsets(words, store.n_heads), store.n_heads
    layers = store.layers
    settings = PatchSettings(
        "corrected", direction, positions, tuple(layers), joint, tuple(words), measures=tuple(measures)
    )
    settings = replace(settings, generate=generate)
    sites, n_trials = layers[:1] if joint else layers, store.trials().n_trials
    run = store.open_patch(name, settings, sites, subsets.labels, subsets.mask, measures, generate)
    for row in store.rows():
        heads = rng.normal(0, scale, size=(len(sites), n_heads, n_trials))
        noise = rng.normal(0, scale / 4, size=(len(sites), len(subsets), n_trials))
        target = rng.normal(-gap / 2, 1, size=n_trials)
        effect = np.einsum("sh,lht->lst", subsets.mask, heads) + noise * subsets.mask.any(1)[:, None]
        sign = 1 if direction == "denoise" else -1
        patched = (sign * (target + effect)).astype("float32")
        answers = np.zeros((2, n_trials, 2), dtype="float32")
        which = 1 if direction == "denoise" else 0
        answers[which, :, 0], answers[1 - which, :, 0] = sign * target, sign * (target + gap)
        writer = run.write(row.label)
        further = {name: MEASURED[name](rng, (*patched.shape[:2], n_trials)) for name in measures}
        writer.put_layers(0, patched, **further)
        unpatched = {name: MEASURED[name](rng, (2, n_trials)) for name in measures}
        writer.put_measures(unpatched, dict.fromkeys(measures, 1e-6))
        if generate:
            writer.put_answers(_random_answers(rng, patched.shape, generate))
        writer.finish(answers, 2.5e-6, 1e-4, device="cpu")


def _random_answers(rng: np.random.Generator, shape: tuple[int, ...], n_tokens: int) -> Answers:
    """A few texts, right every other time."""
    texts = np.array(["9.8", "9.11\n", "</script>", " 9.8 or"], dtype=object)
    patched, plain = rng.integers(0, 4, shape), rng.integers(0, 4, (2, shape[-1]))
    token = np.full((*shape, n_tokens), -1)
    return Answers(texts[patched], token, patched % 2 == 0, texts[plain], plain % 2 == 0, n_near=0)


def stage_page(store: Store, path: Path, run: str = "run") -> Path:
    """A page with nothing but a stage."""
    place, scripts = stage_html(store, read_result(store, run))
    head = f'<meta charset="utf-8"><title>t</title><style>{LOOKS}</style>'
    body = f"<main><h1>Stage</h1>{place}</main>{scripts}"
    page = f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{body}</body></html>'
    path.write_text(page, encoding="utf-8")
    return path


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    """What `packing.pack` packed."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), dtype=np.uint8)
    whole = np.ascontiguousarray(planes.reshape(packed["bytes"], -1).T).view(f"<i{packed['bytes']}")
    values = whole.reshape(packed["shape"]).astype(np.int64)
    if packed["sums"]:
        for bits in range(values.shape[-1]):
            first, others = bits & -bits, bits & (bits - 1)
            if others:
                values[..., bits] += values[..., first] + values[..., others]
    return values


def effects_in_store(run: xr.Dataset, direction: str, state: dict[str, Any]) -> np.ndarray:
    """Of every prompt, the patched minus the unpatched target run, in the measure that the state asks for."""
    at = run.sel(checkpoint=state["checkpoint"], layer=state["layer"])
    wanted = np.isin(np.arange(run.sizes["head"]), state["heads"])
    name = {"answers": "success"}.get(measure := state.get("measure", "logit_diff"), measure)
    target = at[f"{'corrupt' if direction == 'denoise' else 'clean'}_{name}"].values
    [difference] = at[name].values[(run.mask.values == wanted).all(1)].astype(float) - target.astype(float)
    return np.asarray(difference)


def effect_in_store(store: Store, state: dict[str, Any]) -> float:
    """Mean of `effects_in_store`: nats, unless the state asks for another measure."""
    patch = store.patch(state["run"])
    return float(effects_in_store(patch.load(), patch.settings.direction, state).mean())


def random_states(store: Store, run: str, n: int) -> list[dict[str, Any]]:
    """Some checkpoint, layer and set of heads that the run has, each."""
    draw, patched = random.Random(0), store.patch(run).load()
    masks = patched.mask.values
    return [
        {
            "run": run,
            "checkpoint": draw.choice(patched.checkpoint.values.tolist()),
            "layer": draw.choice(patched.layer.values.tolist()),
            "heads": np.flatnonzero(masks[draw.randrange(len(masks))]).tolist(),
        }
        for _ in range(n)
    ]


def address_of(state: dict[str, Any]) -> str:
    return "#" + "&".join(
        f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in state.items()
    )


VISIT = """async (addresses) => {
  const said = [];
  for (const address of addresses) {
    const done = new Promise(resolve => addEventListener("hashchange", () => setTimeout(resolve, 0), {once: true}));
    const differs = location.hash !== address;
    location.hash = address;
    if (differs) await done;
    const text = role => document.querySelector(`[data-role=${role}]`).textContent;
    said.push([text("effect"), text("interval"), text("status")]);
  }
  return said;
}"""


def visit(tab: Page, states: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Effect, interval and status that a page shows at each address, one after another."""
    said: list[list[str]] = tab.evaluate(VISIT, list(map(address_of, states)))
    return said

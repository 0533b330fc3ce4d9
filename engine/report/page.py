"""Page, tables and figures of one patched run, written to a folder; all of it is read from the store."""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ..measures.logit_diff import each_checkpoint, finished
from ..mechanism.store import MechanismRun, read_mechanism
from ..runtime.errors import UserError
from ..store.store import Store, duplicate_weights
from ..study.alignment import align
from ..study.prompts import Trials
from ..study.study import RUNS
from .caveats import threats
from .colours import declared, variables, with_variables
from .figures import SHOWS, draw
from .findings.all_findings import findings
from .findings.finding import Finding
from .findings.mechanism import mechanism_findings
from .findings.published import MODEL, examples, published_rates, rates_of, success_table
from .findings.self_check import allowed_difference
from .findings.verdict import verdict_lines
from .plot_style import PAPER, to_svg, write_png
from .result import Result, heads_of, listed, ranges, read_result, signed
from .sections import arrange
from .stage import stage_html

TIDY_ROWS = 1_000_000
"""More patched runs than this go into patched.csv as means over trials."""

OPTIONAL = {"heads", "training", "splits", "shapley"}
"""Figures that only some runs have."""

NUMBERS = {
    *("mechanism", "roles", "measures", "answers", "parity", "rates", "shapley", "sizes", "pairs", "onsets"),
    *("hypotheses", "primary", "energy"),
}
"""Tables that only some runs have."""

SHOWN_PROMPTS = 20
"""Prompt pairs that the page lists; all of them are in the store."""


def write_report(store: Store, out: Path, name: str | None = None, reload: float | None = None) -> Path:
    """Write page, figures and tables of a patched run (the newest with a finished checkpoint unless named) into `out`.

    Returns the page's path.  While a training is watched, the page loads itself anew after `reload` seconds.

    Every file appears whole, the page last.  Raises `UserError` where there is nothing to show.
    """
    names = store.patch_names("corrected")
    if not names:
        raise UserError(f"{store.path} has no patched run yet; make one with: headlapse patch {store.path}")
    begun = [name for name in names if store.patch(name).complete()]
    result = read_result(store, name or (begun or names)[-1])
    make_folder(out)
    with atomic_file(out / "timeline.csv") as partial:
        result.table.to_csv(partial)
    with atomic_file(out / "patched.csv") as partial:
        _write_patched(result, partial)
    mechanism = read_mechanism(store)
    measured = mechanism_findings(mechanism.load(), mechanism.settings) if mechanism else ()
    shown = [*findings(result.run, result.settings, study=store.study), *measured]
    drawn = _write_figures(result, _numbers(shown).get("shapley"), out)
    _write_numbers(shown, out)
    with atomic_file(out / "index.html") as partial:
        partial.write_text(_page(store, result, mechanism, drawn, shown, reload), encoding="utf-8")
    return out / "index.html"


def make_folder(out: Path) -> None:
    """A folder for a page.  Raises `UserError` where there is a store or a file in the way."""
    if (out / "zarr.json").exists():
        raise UserError(f"--out {out} is a store; name a directory of its own for the page")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out {out}: there is a file in the way; name a directory") from None


def _numbers(shown: Sequence[Finding]) -> dict[str, pd.DataFrame]:
    """What every finding rests on, by name."""
    return {finding.name: finding.numbers for finding in shown if finding.numbers is not None}


def _write_figures(result: Result, shares: pd.DataFrame | None, out: Path) -> dict[str, str]:
    """Every figure as SVG and PNG; returns the SVG by stem."""
    figures = draw(result, shares)
    drawn = {stem: to_svg(figure) for stem, figure in figures.items()}
    for stem, figure in figures.items():
        with atomic_file(out / f"{stem}.svg") as partial:
            partial.write_text(drawn[stem], encoding="utf-8")
        with atomic_file(out / f"{stem}.png") as partial:
            write_png(figure, partial)
    for stem in OPTIONAL - set(figures):  # left by a report of another run
        for suffix in ("png", "svg"):
            (out / f"{stem}.{suffix}").unlink(missing_ok=True)
    return drawn


def _write_numbers(shown: Sequence[Finding], out: Path) -> None:
    """What every finding rests on, as CSV."""
    named = _numbers(shown)
    for name, numbers in named.items():
        with atomic_file(out / f"{name}.csv") as partial:
            numbers.to_csv(partial)
    for name in NUMBERS - set(named):  # left by a report of another run
        (out / f"{name}.csv").unlink(missing_ok=True)


def _is_tidy(result: Result) -> bool:
    return bool(result.run.logit_diff.size <= TIDY_ROWS)


def _write_patched(result: Result, path: Path) -> None:
    """Every patched run of every trial, or means over trials where those would be too many."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        for index, checkpoint in enumerate(each_checkpoint(result.run)):
            keys = ["checkpoint", "layer", "subset"]
            if _is_tidy(result):
                keys, values = [*keys, "trial"], checkpoint[["logit_diff", "clean_logit_diff", "corrupt_logit_diff"]]
            else:
                values = _means(result, checkpoint, index)
            frame = values.reset_coords(drop=True).to_dataframe(dim_order=keys).reset_index()
            frame.insert(1, "step", int(checkpoint.step.values[0]))
            frame.to_csv(file, header=index == 0, index=False)


def _means(result: Result, checkpoint: xr.Dataset, index: int) -> xr.Dataset:
    """Means over trials of checkpoint `one`, the `index`-th."""
    patched = {"mean_logit_diff": result.nats, "success_rate": result.rate}
    plain = {f"mean_{run}_logit_diff": checkpoint[f"{run}_logit_diff"].mean("trial") for run in RUNS}
    return xr.Dataset({name: values.isel(checkpoint=[index]) for name, values in patched.items()} | plain)


def _page(
    store: Store,
    result: Result,
    mechanism: MechanismRun | None,
    drawn: dict[str, str],
    shown: Sequence[Finding],
    reload: float | None,
) -> str:
    trials, run = store.trials(), store.patch(result.name)
    published = _published(store, result)
    return template("page.html.j2").render(
        result=result,
        model=Path(store.study["model"]).name,
        study=store.study,
        store=store.path,
        n_trials=trials.n_trials,
        n_asked=sum(contrast.repeats for contrast in trials.contrasts),
        n_heads=result.run.sizes["head"],
        n_subsets=result.run.sizes["subset"],
        n_runs=result.run.logit_diff.size,
        n_rows=len(store.rows()),
        n_sites=result.run.sizes["layer"],
        prompts=trials.contrasts[:SHOWN_PROMPTS],
        example=_example(trials, result.settings.positions),
        figures={stem: inline_figure(svg, stem) for stem, svg in drawn.items()},
        shows=SHOWS,
        mapped=heads_of(result.mapped),
        judge="all heads" if "all" in result.run.subset.values else "the subset with the largest effect",
        is_tidy=_is_tidy(result),
        table=_display(result),
        columns=[*RUNS, *result.shown],
        has_rate_difference="even_minus_odd_rate" in result.table,
        has_steps=any(label != f"step{step}" for label, step in result.table["step"].items()),
        verdict=verdict_lines(result.run, result.settings, store.study),
        headline=_headline(result),
        self_check=_self_check(store, result),
        warnings=_warnings(store, result),
        threats=threats(store, result),
        provenance=[(label, store.provenance(label)) for label in store.complete()],
        stage=stage_html(store, result, mechanism),
        runs=[(name, store.patch(name).settings) for name in reversed(store.patch_names("corrected"))],
        published=published,
        sections=arrange(shown, ["study"] if published else []),
        versions=store.attrs["versions"] | run.attrs["versions"],
        device=", ".join(run.devices()),
        ranges=ranges,
        reload=reload,
    )


def template(name: str) -> Template:
    """One of the pages that lie beside this module."""
    return _templates().get_template(name)


@functools.cache
def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters["signs"] = with_minus_signs
    templates.globals |= {"colours": variables(), "declared": declared}
    return templates


def with_minus_signs(text: str) -> str:
    """Words with real minus signs, as the figures have them."""
    return re.sub(r"(?<![\w-])-(?=\d)|(?<=even )-(?= odd)", "−", text)


def inline_figure(svg: str, stem: str) -> Markup:
    """A figure as an element that takes its colours from the page and shares no id with another figure."""
    svg = with_variables(svg[svg.index("<svg") :].replace(PAPER, "none"))
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{stem}-", svg)
    width = float(svg.partition('width="')[2].partition('pt"')[0])
    looks = f'role="img" aria-label="{SHOWS[stem]}" style="max-width: {width}pt; min-width: {min(width, 350)}pt"'
    return Markup(svg.replace("<svg", f"<svg {looks}", 1))


def _example(trials: Trials, positions: str) -> dict[str, list[tuple[str, bool]]]:
    """The first prompt pair as tokens, each with whether it is patched."""
    alignment = align(trials, positions)
    rows = {}
    for index, run in enumerate(RUNS):
        patched = set(alignment.positions[index, 0][alignment.valid[0]].tolist())
        tokens = trials.token_text[index, 0, : trials.length[index, 0]]
        rows[run] = [(str(token).replace("\n", "\\n"), at in patched) for at, token in enumerate(tokens)]
    return rows


def _display(result: Result) -> list[dict[str, Any]]:
    """The timeline's rows as they are printed."""
    rows = []
    for label, row in zip(result.table.index, result.table.to_dict("records"), strict=True):
        cells = [(signed(row[name], 2), f"{row[f'{name}_rate']:.0%}") for name in (*RUNS, *result.shown)]
        difference = signed(row["even_minus_odd_rate"], 2) if "even_minus_odd_rate" in row else None
        step = f"{row['step']:,}" if row["step"] >= 0 else "unknown"
        site = result.site(row["best_layer"])
        rows.append({"label": label, "step": step, "cells": cells, "rate_difference": difference, "site": site})
    return rows


def _headline(result: Result) -> list[tuple[str, str, str]]:
    """The last checkpoint in words: who, nats, rate; of the patched runs the one closest to the source run."""
    row = result.table.iloc[-1]
    best = max(result.shown, key=lambda name: row[name] if result.target == "corrupt" else -row[name])
    site = result.site(int(row["best_layer"]))
    where = f"layers {site} together" if result.settings.joint else f"layer {site}"
    named = [("clean", "clean, unpatched"), ("corrupt", "corrupt, unpatched"), (best, f"{heads_of(best)} of {where}")]
    return [(words, signed(row[name], 2), f"{row[f'{name}_rate']:.0%}") for name, words in named]


def _published(store: Store, result: Result) -> dict[str, Any] | None:
    """The published study's numbers, beside them those of the newest run by its procedure and of this page.

    None where neither asks about even and odd heads.
    """
    own = _by_its_procedure(store)
    asks = {"even", "odd"} <= set(result.shown)
    if own is None and not asks:
        return None
    name = Path(store.study["model"]).name
    here = rates_of(result.table, result.target) if asks else None
    return {"rates": published_rates(), "own": own, "here": here, "same_model": name == MODEL}


def _by_its_procedure(store: Store) -> dict[str, Any] | None:
    """The newest run by the published procedure that has a finished checkpoint."""
    for name in reversed(store.patch_names("published")):
        run = finished(store.patch(name).load())
        if run.sizes["checkpoint"]:
            return {"name": name, "table": success_table(run, store.study), "texts": examples(run)}
    return None


def _self_check(store: Store, result: Result) -> dict[str, Any]:
    """Largest difference between replay and full hooked forwards, where it was seen, and what was allowed."""
    differences = result.run.self_check.values
    allowed = allowed_difference(result.run, result.settings.dtype, store.study["dtype"])
    if np.isnan(differences).all():
        return {"largest": None, "allowed": allowed}
    worst = int(np.nanargmax(differences))
    return {
        "largest": float(differences[worst]),
        "at": str(result.table.index[worst]),
        "allowed": allowed,
        "unchecked": int(np.isnan(differences).sum()),
    }


def _warnings(store: Store, result: Result) -> list[str]:
    """What a reader should know before believing the numbers."""
    cached, labels = store.complete(), [row.label for row in store.rows()]
    patched = {*result.table.index, *result.not_finite}
    right = {run: result.table[f"{run}_rate"].to_numpy() for run in RUNS}
    warnings = {
        "not cached completely, so not here (run headlapse cache again)": [
            label for label in labels if label not in cached
        ],
        "cached but not patched yet (run the same headlapse patch again)": [
            label for label in cached if label not in patched
        ],
        "left out because not all of their numbers are finite": list(result.not_finite),
        "the unpatched corrupt run already succeeds on half of the prompts or more, so there is little to restore": (
            list(result.table.index[right["corrupt"] >= 0.5])
        ),
        "the clean run itself fails on half of the prompts or more": list(result.table.index[right["clean"] <= 0.5]),
    }
    return duplicate_weights(store) + [f"{what}: {listed(where)}" for what, where in warnings.items() if where]


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A file to write that takes the name `path` once the body is through."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    os.replace(partial, path)

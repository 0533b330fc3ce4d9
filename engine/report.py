"""The page of one patched run: figures, tables and provenance, all of it read from the store."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headlapse.engine.measures import effect, finished, success, timeline
from headlapse.engine.store import Store, twins
from headlapse.engine.study import RUNS, Refusal
from headlapse.engine.tasks import Trials, align
from headlapse.engine.verify import tolerance

TIDY_ROWS = 1_000_000
"""More patched runs than this go into patched.csv as means over trials."""

SHOWN_PROMPTS = 20
"""Prompt pairs that the page lists; all of them are in the store."""

NAMED = ("even", "odd", "all")
STRONGEST = 3
"""So many of the strongest subsets stand in the timeline where none of `NAMED` was patched."""

INK, PAPER, FAINT = "#22262b", "#fefefe", "#8d949c"
"""Lines and words of a figure, its background, its grid.  On the page ink and paper become the page's own."""

COLOURS = {"clean": "#265cfc", "corrupt": "#fc6626", "even": "#9674d4", "odd": "#6e613c", "all": "#359696"}
MARKERS = {"clean": "^", "corrupt": "v", "even": "s", "odd": "D", "all": "o"}
SPARE = ("all", "even", "odd")
"""Whose looks other subsets take, strongest first.  The colours stay at least 30 apart (CIELAB) under simulated
protanopia and deuteranopia (Machado et al. 2009) and stand out from a light and a dark page."""

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    **dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK),
    # The same run gives the same file: no random ids, no date.
    "svg.hashsalt": "headlapse",
}

WIDTH, CHARACTER = 7.6, 0.075
"""Inches: a full figure, and about one digit of a tick label."""


@dataclass(frozen=True)
class Result:
    """One patched run, reduced to its means over trials; only finished checkpoints, in order of training."""

    name: str
    settings: dict[str, Any]

    run: xr.Dataset
    """Trial by trial, lazily."""

    nats: xr.DataArray
    """Mean logit difference (checkpoint, layer, subset)."""

    rate: xr.DataArray
    """Share of trials with the right answer ahead (checkpoint, layer, subset)."""

    table: pd.DataFrame
    """One row a checkpoint, as `measures.timeline` makes it, with the columns of `shown`."""

    shown: tuple[str, ...]
    """The subsets in the timeline."""

    not_finite: tuple[str, ...]
    """Checkpoints left out because they hold numbers that are none."""

    @property
    def target(self) -> str:
        """The run that was patched into."""
        return "corrupt" if self.settings["direction"] == "denoise" else "clean"

    @property
    def source(self) -> str:
        return "clean" if self.target == "corrupt" else "corrupt"

    @property
    def change(self) -> xr.DataArray:
        """Patched minus unpatched target run: mean logit difference in nats (checkpoint, layer, subset)."""
        return self.nats - xr.DataArray(self.table[self.target].to_numpy(), dims="checkpoint")

    def site(self, layer: int) -> str:
        """What a place on the layer axis is called: several layers where they were patched jointly."""
        return ranges(self.settings["layers"]) if self.settings["joint"] else str(layer)


def write_report(store: Store, out: Path, name: str | None = None) -> Path:
    """Write page, figures and tables of a patched run (the newest unless named) into `out`; returns the page's path.

    Every file appears whole, the page last.  Raises `Refusal` where there is nothing to show.
    """
    names = store.patch_names()
    if not names:
        raise Refusal(f"{store.path} has no patched run yet; make one with: python scripts/patch.py {store.path}")
    result = read_result(store, name or names[-1])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise Refusal(f"--out {out}: there is a file in the way; name a directory") from None
    with _appearing(out / "timeline.csv") as partial:
        result.table.to_csv(partial)
    with _appearing(out / "patched.csv") as partial:
        _write_patched(result, partial)
    figures = draw(result)
    drawn = {stem: _svg(figure) for stem, figure in figures.items()}
    for stem in ("timeline", "heatmap", "heads"):
        if stem not in figures:  # left by a report of another run
            for suffix in ("png", "svg"):
                (out / f"{stem}.{suffix}").unlink(missing_ok=True)
            continue
        with _appearing(out / f"{stem}.svg") as partial:
            partial.write_text(drawn[stem], encoding="utf-8")
        with _appearing(out / f"{stem}.png") as partial:
            figures[stem].savefig(partial, format="png", dpi=160, metadata={"Software": None})
    with _appearing(out / "index.html") as partial:
        partial.write_text(_page(store, result, drawn), encoding="utf-8")
    return out / "index.html"


def read_result(store: Store, name: str) -> Result:
    """A patched run's means and timeline, one checkpoint in memory at a time.

    Raises `Refusal` where it has no finished checkpoint.
    """
    patch = store.patch(name)
    run, direction = finished(patch.dataset()), patch.settings["direction"]
    finite, means, rates, rows = [], [], [], []
    for one in _checkpoints(run):
        held = [one[raw].values for raw in ("logit_diff", "clean_logit_diff", "corrupt_logit_diff")]
        finite.append(all(np.isfinite(values).all() for values in held))
        if finite[-1]:
            means.append(one.logit_diff.mean("trial").values)
            rates.append(success(one.logit_diff).mean("trial").values)
            rows.append(timeline(one, direction))
    if not rows:
        found = "only numbers that are not finite" if finite else "no finished checkpoint"
        raise Refusal(f"patched run {name} of {store.path} has {found}; run its scripts/patch.py command again")
    not_finite = tuple(map(str, run.checkpoint.values[~np.array(finite)]))
    run = run.isel(checkpoint=np.flatnonzero(finite))
    like = run.logit_diff.isel(trial=0).reset_coords(drop=True)
    nats, rate = (like.copy(data=np.concatenate(values)) for values in (means, rates))
    table = pd.concat(rows)
    shown = tuple(word for word in NAMED if word in run.subset.values)
    if not shown:
        shown = strongest(run.isel(checkpoint=[-1]), direction, STRONGEST)
        table = _with_subsets(table, shown, nats, rate)
    return Result(name, patch.settings, run, nats, rate, table, shown, not_finite)


def strongest(run: xr.Dataset, direction: str, n: int = 1) -> tuple[str, ...]:
    """The `n` subsets that move the mean logit difference most towards the source run, each at its best layer."""
    moved = effect(run, direction).mean(["checkpoint", "trial"]).max("layer")
    order = np.argsort(-moved.values, kind="stable")[:n]
    return tuple(map(str, moved.subset.values[order]))


def ranges(numbers: Sequence[int]) -> str:
    """`4–8, 11`"""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _checkpoints(run: xr.Dataset) -> Iterator[xr.Dataset]:
    for index in range(run.sizes["checkpoint"]):
        yield run.isel(checkpoint=[index]).load()


def _with_subsets(table: pd.DataFrame, shown: Sequence[str], nats: xr.DataArray, rate: xr.DataArray) -> pd.DataFrame:
    """The timeline with two more columns for every subset, at each checkpoint's best layer."""
    layer = xr.DataArray(table["best_layer"].to_numpy(), dims="checkpoint")
    more = {}
    for subset in shown:
        more[subset] = nats.sel(subset=subset, layer=layer).values
        more[f"{subset}_rate"] = rate.sel(subset=subset, layer=layer).values
    return table.drop(columns="best_layer").assign(**more, best_layer=table["best_layer"])


# --- tables ---


def _is_tidy(result: Result) -> bool:
    return result.run.logit_diff.size <= TIDY_ROWS


def _write_patched(result: Result, path: Path) -> None:
    """Every patched run of every trial, or means over trials where those would be too many."""
    keys = ["checkpoint", "step", "layer", "subset"]
    with open(path, "w", encoding="utf-8", newline="") as file:
        for index, one in enumerate(_checkpoints(result.run)):
            if _is_tidy(result):
                kept = one[["logit_diff", "clean_logit_diff", "corrupt_logit_diff"]]
                columns = [*keys, "trial", *kept.data_vars]
            else:
                at = result.nats.isel(checkpoint=[index])
                kept = xr.Dataset({"mean_logit_diff": at, "success_rate": result.rate.isel(checkpoint=[index])})
                for run in RUNS:
                    kept[f"mean_{run}_logit_diff"] = one[f"{run}_logit_diff"].mean("trial")
                columns = [*keys, *kept.data_vars]
            order = ["checkpoint", "layer", "subset", *(["trial"] if "trial" in kept.dims else [])]
            frame = kept.reset_coords(drop=True).to_dataframe(dim_order=order).reset_index()
            frame["step"] = int(one.step.values[0])
            frame[columns].to_csv(file, header=index == 0, index=False)


# --- figures ---


def draw(result: Result) -> dict[str, Figure]:
    """The figures by file stem; `heads` only where every single head was patched."""
    with matplotlib.rc_context(STYLE):
        figures = {"timeline": _draw_timeline(result), "heatmap": _draw_heatmap(result)}
        if single := _single_heads(result):
            figures["heads"] = _draw_heads(result, single)
        for figure in figures.values():  # laid out once, not for every format again
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
    return figures


def _draw_timeline(result: Result) -> Figure:
    figure = Figure(figsize=(WIDTH, 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = result.table["step"].to_numpy()
    x, is_log = place_steps(steps)
    known = steps >= 0
    for column, label, style in _lines(result):
        for axes, name in ((upper, column), (lower, f"{column}_rate")):
            y = result.table[name].to_numpy()
            axes.plot(x[known], y[known], label=label, **style)
            axes.plot(x[~known], y[~known], **{**style, "linestyle": "none"})
    upper.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    upper.set_ylabel("mean logit difference\nright − wrong (nats)")
    lower.set_ylabel("success rate\n(share of prompts)")
    lower.set_ylim(-0.05, 1.05)
    lower.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in (upper, lower):
        axes.grid(axis="y", color=FAINT, linewidth=0.3, alpha=0.5)
        if known.any() and not known.all():
            axes.axvline((x[known].max() + x[~known].min()) / 2, color=FAINT, linewidth=0.8, linestyle=":")
    labels = _step_labels(result)
    roundest = sorted(range(len(steps)), key=lambda index: len(str(steps[index]).rstrip("0")) - len(str(steps[index])))
    ticks = choose_ticks(x, labels, WIDTH - 1.1, roundest)
    lower.set_xticks(x[ticks], [labels[tick] for tick in ticks])
    lower.set_xlabel(f"training step{' (logarithmic)' if is_log else ''}")
    if len(result.nats.layer) > 1:
        _write_best_layers(upper, result, x, ticks)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _lines(result: Result) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Column, label and looks of every line: unpatched runs dashed, patched runs solid."""
    few = len(result.table) <= 40
    sizes = {"linewidth": 1.1 if few else 0.8, "markersize": 4.5 if few else 2.0}
    for run in RUNS:
        looks = {"color": COLOURS[run], "marker": MARKERS[run], "linestyle": (0, (4, 2))}
        yield run, f"{run}, unpatched", looks | sizes
    for subset, spare in zip(result.shown, SPARE, strict=False):
        like = subset if subset in NAMED else spare
        looks = {"color": COLOURS[like], "marker": MARKERS[like], "linestyle": "-"}
        yield subset, f"{heads_of(subset)} patched", looks | sizes


def heads_of(subset: str) -> str:
    """A subset in words: `even heads`, `head 3`, `heads 0,2,4`."""
    if subset == "none":
        return "no head"
    if subset in NAMED:
        return f"{subset} heads"
    short = subset if len(subset) <= 24 else f"{subset[:23]}…"
    return f"head{'s' * (',' in subset)} {short}"


def _write_best_layers(axes: Axes, result: Result, x: Float[np.ndarray, " checkpoint"], ticks: Sequence[int]) -> None:
    """A line of small numbers above the panel: the layer that the patched lines stand for."""
    above = axes.secondary_xaxis("top")
    above.set_xticks(x[ticks], [str(result.table["best_layer"].iloc[tick]) for tick in ticks])
    above.tick_params(length=0, labelsize=7.5, pad=1)
    above.set_xlabel("best layer", fontsize=7.5)
    above.spines[:].set_visible(False)


def place_steps(steps: Int[np.ndarray, " checkpoint"]) -> tuple[Float[np.ndarray, " checkpoint"], bool]:
    """Where checkpoints stand on the x axis, and whether that is logarithmic.

    Logarithmic once steps span a factor of ten; step 0 and unknown steps (-1) then stand apart at the ends.
    """
    x = steps.astype(float)
    positive = steps[steps > 0]
    is_log = len(positive) > 0 and bool(positive.max() >= 10 * positive.min())
    if is_log:
        x[steps > 0] = np.log10(positive)
        x[steps == 0] = x[steps > 0].min() - max(0.3, np.ptp(x[steps > 0]) / 16)
    known = x[steps >= 0]
    last, gap = (known.max(), np.ptp(known) / 12 or 1.0) if len(known) else (0.0, 1.0)
    x[steps < 0] = last + gap * np.arange(1, 1 + (steps < 0).sum())
    return x, is_log


def choose_ticks(
    x: Float[np.ndarray, " checkpoint"], labels: Sequence[str], inches: float, order: Sequence[int]
) -> list[int]:
    """Checkpoints whose labels fit side by side on an axis of that width: the ends first, then in the order given."""
    scale = inches / (np.ptp(x) or 1.0)
    widths = [len(label) * CHARACTER + 0.1 for label in labels]
    chosen: list[int] = []
    for index in dict.fromkeys([0, len(x) - 1, *order]):
        if all(abs(x[index] - x[other]) * scale > (widths[index] + widths[other]) / 2 for other in chosen):
            chosen.append(index)
    return sorted(chosen)


def _step_labels(result: Result) -> list[str]:
    """Steps as short as they can be written; an unknown step's place goes by its label."""
    labels = []
    for label, step in result.table["step"].items():
        short = str(label) if len(str(label)) <= 12 else f"{str(label)[:11]}…"
        labels.append(short if step < 0 else str(step) if step < 10_000 else f"{step / 1000:g}k")
    return labels


def _draw_heatmap(result: Result) -> Figure:
    subset = _mapped(result)
    figure = _draw_maps(
        result.change.sel(subset=subset).values.T,
        result.rate.sel(subset=subset).values.T,
        _step_labels(result),
        [result.site(layer) for layer in result.nats.layer.values.tolist()],
        f"{heads_of(subset)} patched, {_where(result)}",
    )
    figure.axes[1].set_xlabel("checkpoint (training step)")
    return figure


def _mapped(result: Result) -> str:
    """The subset that the heatmap shows."""
    last = result.run.isel(checkpoint=[-1])
    return "all" if "all" in result.run.subset.values else strongest(last, result.settings["direction"])[0]


def _single_heads(result: Result) -> list[int]:
    """Where the subset axis has every single head, in order of heads; empty unless all are there."""
    mask = result.run["mask"].values
    single = {int(mask[row].argmax()): int(row) for row in np.flatnonzero(mask.sum(1) == 1)}
    n_heads = mask.shape[1]
    return [single[head] for head in range(n_heads)] if len(single) == n_heads else []


def _draw_heads(result: Result, single: list[int]) -> Figure:
    at = {"checkpoint": -1, "subset": single}
    figure = _draw_maps(
        result.change.isel(at).values,
        result.rate.isel(at).values,
        [str(head) for head in range(len(single))],
        [result.site(layer) for layer in result.nats.layer.values.tolist()],
        f"each head patched alone, {_where(result)}, at {_last(result)}",
    )
    figure.axes[1].set_xlabel("head")
    return figure


def _where(result: Result) -> str:
    """Which layers a patched run patches, in words."""
    layers = result.settings["layers"]
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {ranges(layers)} together" if result.settings["joint"] else "one layer at a time"


def _last(result: Result) -> str:
    """The last checkpoint in words."""
    step = int(result.table["step"].iloc[-1])
    return f"step {step:,}" if step >= 0 else f"checkpoint {result.table.index[-1]}"


def _draw_maps(
    change: Float[np.ndarray, "layer column"],
    rate: Float[np.ndarray, "layer column"],
    columns: Sequence[str],
    layers: Sequence[str],
    what: str,
) -> Figure:
    """Two maps over the same cells: change of the logit difference, centred at zero, and success rate."""
    n_layers, n_columns = change.shape
    width = min(WIDTH, max(4.6, 3.2 + 0.5 * n_columns))
    height = min(4.2, 0.45 + 0.3 * n_layers)
    figure = Figure(figsize=(width, 2 * height + 1.7))
    figure.set_layout_engine("constrained", hspace=0.08)
    figure.suptitle(what[0].upper() + what[1:], x=0.01, ha="left", fontsize=9.5, weight="bold")
    upper, lower = figure.subplots(2, 1, sharex=True)
    # A map of nothing but zeros still needs a scale.
    limit = float(abs(change).max()) or 1.0
    _draw_map(figure, upper, change, ("RdBu", -limit, limit), "nats", lambda nats: signed(nats, 1))
    _draw_map(figure, lower, 100 * rate, ("Greens", 0.0, 100.0), "% of prompts", "{:.0f}".format)
    upper.set_title("change of mean logit difference")
    lower.set_title("success rate")
    ticks = choose_ticks(np.arange(n_columns, dtype=float), columns, width - 1.8, range(n_columns))
    lower.set_xticks(ticks, [columns[tick] for tick in ticks])
    for axes in (upper, lower):
        every = max(1, -(-n_layers // 16))
        axes.set_yticks(range(0, n_layers, every), layers[::every])
        axes.set_ylabel("layer")
    return figure


def _draw_map(
    figure: Figure,
    axes: Axes,
    values: Float[np.ndarray, "layer column"],
    colours: tuple[str, float, float],
    unit: str,
    write: Callable[[float], str],
) -> None:
    """One map in `colours` (name, lowest, highest), with its numbers written into the cells where there is room."""
    name, lowest, highest = colours
    image = axes.imshow(
        values, cmap=name, vmin=lowest, vmax=highest, aspect="auto", origin="lower", interpolation="none"
    )
    figure.colorbar(image, ax=axes, label=unit, pad=0.015, aspect=12).outline.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if values.shape[1] <= 16 and values.shape[0] <= 16:
        shades = image.to_rgba(values)
        for (layer, column), value in np.ndenumerate(values):
            colour = _readable(shades[layer, column])
            axes.text(column, layer, write(float(value)), ha="center", va="center", color=colour, fontsize=7)


def signed(value: float, digits: int) -> str:
    """`+1.2`, `−1.2`, and zero without a sign."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def _readable(shade: Float[np.ndarray, " rgba"]) -> str:
    """Black or white, whichever stands out more against a colour (relative luminance, WCAG 2)."""
    rgb = shade[:3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "#ffffff" if linear @ [0.2126, 0.7152, 0.0722] < 0.18 else "#111111"


# --- the page ---


def _page(store: Store, result: Result, drawn: dict[str, str]) -> str:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    trials, held, run = store.trials(), store.complete(), store.patch(result.name).attrs
    return templates.get_template("report.html.j2").render(
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
        example=_example(trials, result.settings["positions"]),
        figures={stem: _inline(svg, stem) for stem, svg in drawn.items()},
        mapped=heads_of(_mapped(result)),
        where=_where(result),
        judge="all heads" if "all" in result.run.subset.values else "the strongest subset",
        is_tidy=_is_tidy(result),
        table=_display(result),
        columns=[*RUNS, *result.shown],
        has_strength="strength" in result.table,
        has_steps=any(label != f"step{step}" for label, step in result.table["step"].items()),
        last=_last(result),
        headline=_headline(result),
        self_check=_self_check(store, result),
        warnings=_warnings(store, result),
        provenance=[(label, store.provenance(label)) for label in held],
        runs=[(name, store.patch(name).settings) for name in reversed(store.patch_names())],
        versions=store.attrs["versions"] | run["versions"],
        device=run.get("device"),
        ranges=ranges,
    )


def _svg(figure: Figure) -> str:
    text = StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    return text.getvalue()


def _inline(svg: str, stem: str) -> Markup:
    """A figure as an element that takes its ink and its paper from the page and shares no id with another figure."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "none")
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{stem}-", svg)
    width = float(svg.partition('width="')[2].partition('pt"')[0])
    looks = f'role="img" aria-label="{stem}" style="max-width: {width}pt; min-width: {min(width, 350)}pt"'
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
        strength = signed(row["strength"], 2) if "strength" in row else None
        step = f"{row['step']:,}" if row["step"] >= 0 else "unknown"
        site = result.site(row["best_layer"])
        rows.append({"label": label, "step": step, "cells": cells, "strength": strength, "site": site})
    return rows


def _headline(result: Result) -> list[tuple[str, str, str]]:
    """The last checkpoint in words: who, nats, rate; of the patched runs the one closest to the source run."""
    row = result.table.iloc[-1]
    best = max(result.shown, key=lambda name: row[name] if result.target == "corrupt" else -row[name])
    site = result.site(int(row["best_layer"]))
    where = f"layers {site} together" if result.settings["joint"] else f"layer {site}"
    named = [("clean", "clean, unpatched"), ("corrupt", "corrupt, unpatched"), (best, f"{heads_of(best)} of {where}")]
    return [(said, signed(row[name], 2), f"{row[f'{name}_rate']:.0%}") for name, said in named]


def _self_check(store: Store, result: Result) -> dict[str, Any]:
    """Largest difference between replay and full hooked forwards, where it was seen, and what was allowed."""
    differences = result.run.self_check.values
    allowed = tolerance(result.settings["dtype"], store.study["dtype"])
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
    held, rows = store.complete(), [row.label for row in store.rows()]
    done = {*result.table.index, *result.not_finite}
    right = {run: result.table[f"{run}_rate"].to_numpy() for run in RUNS}
    found = {
        "not cached completely, so not here (run scripts/cache.py again)": [r for r in rows if r not in held],
        "cached but not patched yet (run the same scripts/patch.py again)": [h for h in held if h not in done],
        "left out because not all of their numbers are finite": list(result.not_finite),
        "the unpatched corrupt run already succeeds on half of the prompts or more, so there is little to tell": (
            list(result.table.index[right["corrupt"] >= 0.5])
        ),
        "the clean run itself fails on half of the prompts or more": list(result.table.index[right["clean"] <= 0.5]),
    }
    return twins(store) + [f"{said}: {_list(labels)}" for said, labels in found.items() if labels]


def _list(labels: Sequence[str]) -> str:
    """Up to a dozen labels, or the first few, the last one and how many."""
    if len(labels) <= 12:
        return ", ".join(labels)
    return f"{', '.join(labels[:6])}, ... {labels[-1]} ({len(labels)} checkpoints)"


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A file to write that takes the name `path` once the body is through."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    os.replace(partial, path)

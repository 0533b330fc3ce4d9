"""The Python face: a store, its patched runs, and what they say.

    import headlapse as hl
    store = hl.cache("EleutherAI/pythia-160m", task="ioi", checkpoints="log")
    run = store.patch(subsets=["each"], layers="all")
    print(run.verdict())

Names and defaults are those of the command line; where several words are meant, one string or a list of them.  What
cannot be done raises `UserError`, whose message is the line that the command would print.
"""

import html
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import xarray as xr

from . import pipeline, results
from .engine.runtime.errors import UserError
from .engine.runtime.format import format_bytes, format_count
from .engine.store import inventory
from .engine.store.checkpoint_arrays import CheckpointArrays
from .engine.study.mechanism_settings import PARTS
from .engine.study.patch_settings import Direction, PatchSettings, Protocol
from .engine.study.reading import MARGIN, READING, Correction, Reading
from .engine.study.study import Arithmetic, Dtype
from .options import CacheOptions, CompareOptions, DoctorOptions, MechanismOptions, PatchOptions, ReportOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .comparing import Comparison
    from .diagnosis import Diagnosis
    from .notebook import StageWidget

Words = str | int | Iterable[str | int]
"""One word, or several."""


class Lines(list[str]):
    """Lines of text; printed, they stand one under another."""

    def __str__(self) -> str:
        return "\n".join(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def cache(
    model: "str | Path | PreTrainedModel" = "demo",
    *,
    task: str | Path = "decimal",
    checkpoints: Words = (),
    trials: int | None = None,
    sites: Words = "all",
    store: str | Path | None = None,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    revision: str | None = None,
    subfolder: str | None = None,
    device: str | None = None,
    dtype: Dtype = "float32",
    memory: str | None = None,
    shard: str | None = None,
    workers: str | None = None,
    overwrite: bool = False,
) -> "Store":
    """Capture every head's activations at every checkpoint, as `headlapse cache` does; what is there stays.

    `model` is a name, a directory, a template of one of these (as are `revision` and `subfolder`), or a loaded
    transformers model with its `tokenizer`; a `tokenizer`'s name is for checkpoints that do not bring their own.  A
    loaded model is one checkpoint: its weights as they are now are saved below the cache folder
    (`models/<name>-<hash>`), captured and later patched from there, in this process or another; the model itself is
    only read.

    Raises `UserError` where nothing can be captured; of single checkpoints that cannot be had it warns.
    """
    if not isinstance(model, str | Path):
        if isinstance(tokenizer, str | Path):
            raise UserError(f"tokenizer: {tokenizer} is a name; pass the loaded one that belongs to the model")
        model = _saved(model, tokenizer, _words(checkpoints))
        checkpoints, tokenizer = (), None
    elif not isinstance(tokenizer, str | Path | None):
        raise UserError(f"tokenizer: {model} is a name; pass the tokenizer's name or directory, if it brings none")
    options = CacheOptions(
        model=str(model),
        revision=revision,
        subfolder=subfolder,
        tokenizer=None if tokenizer is None else str(tokenizer),
        checkpoints=_words(checkpoints),
        task=str(task),
        trials=trials,
        sites=_words(sites),
        store=None if store is None else Path(store),
        device=device,
        dtype=dtype,
        memory=memory,
        shard=shard,
        workers=workers,
        overwrite=overwrite,
    )
    work = pipeline.cache(options, cache_folder())
    _raise_or_warn(work, nothing=work.n_missing > 0 and not work.n_finished)
    for warning in work.warnings:
        warnings.warn(warning, stacklevel=2)
    return Store(work.store)


def checkpoints(
    model: str | Path = "demo",
    *,
    checkpoints: Words = "all",
    revision: str | None = None,
    subfolder: str | None = None,
) -> pd.DataFrame:
    """What there is of a model: a row a checkpoint, in order of training; nothing is downloaded.

    Columns: `stage`, `step` and `tokens` (both counted from the start of the stage, -1 where not known), `bytes` of the
    weights and `to_fetch` of these (NA where not known), `problem` (why one cannot be had).  `model`, `revision`,
    `subfolder` and the words of `checkpoints` are as in `cache`.
    Raises `UserError` where there is no such model, or nothing of it can be had.
    """
    options = CacheOptions(model=str(model), checkpoints=_words(checkpoints), revision=revision, subfolder=subfolder)
    rows = [
        {
            "checkpoint": each.checkpoint.label,
            "stage": each.checkpoint.stage,
            "step": each.checkpoint.step,
            "tokens": each.checkpoint.tokens_seen,
            "bytes": each.n_bytes,
            "to_fetch": each.to_fetch if each.n_bytes is not None else None,
            "problem": each.problem,
        }
        for each in pipeline.list_checkpoints(options, cache_folder())
    ]
    return pd.DataFrame(rows).set_index("checkpoint").astype({"bytes": "Int64", "to_fetch": "Int64"})


def open_store(store: str | Path | None = None) -> "Store":
    """The store at a path, or the newest one in the cache folder.  Raises `UserError` where there is none."""
    return Store(pipeline.store_path(None if store is None else Path(store), cache_folder()))


def doctor(
    store: "Store | str | Path | None" = None,
    *,
    model: str | Path | None = None,
    weights: str | Path | None = None,
    fix: bool = False,
) -> "Diagnosis":
    """Whether a store is what was written, or what is served of a `model` can be true, as `headlapse doctor` says.

    The result's `problems` are lines, none where all is well; with `fix`, what killed processes left is removed.
    Raises `UserError` where there is no such store or model.
    """
    from .diagnosis import diagnose

    path = store.path if isinstance(store, Store) else None if store is None else Path(store)
    options = DoctorOptions(
        path,
        model=None if model is None else str(model),
        weights=None if weights is None else Path(weights),
        fix=fix,
    )
    return diagnose(options, cache_folder())


def compare(*stores: "Store | str | Path", name: str | None = None, out: str | Path | None = None) -> "Comparison":
    """The same question over seeds, sizes, architectures or tasks, as `headlapse compare` answers it.

    The result has a `table` (a row a training run), a `summary` (a row a group of seeds and quantity, with intervals
    over seeds), a `timeline` and a `verdict()`; its page is written where `out` is given, else by its `report()`.
    Raises `UserError` for stores that were not patched alike.
    """
    from .comparing import compare_stores

    paths = tuple(store.path if isinstance(store, Store) else Path(store) for store in stores)
    options = CompareOptions(paths, name=name, out=None if out is None else Path(out))
    comparison = compare_stores(options)
    if options.out is not None:
        comparison.report(options.out)
    return comparison


class Store:
    """A store of captured checkpoints."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        inventory.require_store(self.path)

    @property
    def study(self) -> dict[str, Any]:
        """What was asked: model, task, trials, sites, dtype."""
        return results.study_of(self.path)

    @property
    def checkpoints(self) -> list[str]:
        """Labels of the finished checkpoints, in order of training."""
        return list(CheckpointArrays(self.path).complete())

    @property
    def runs(self) -> list[str]:
        """Names of the patched runs, the one written to last at the end."""
        return [path.name for path in inventory.patch_paths(self.path)]

    @property
    def dataset(self) -> xr.Dataset:
        """Every captured array, lazily, with labelled dimensions."""
        return CheckpointArrays(self.path).dataset()

    def patch(
        self,
        *,
        subsets: Words = (),
        layers: Words = (),
        joint: bool = False,
        positions: str | int = "last",
        direction: Direction = "denoise",
        checkpoints: Words = "all",
        measures: Words = (),
        protocol: Protocol = "corrected",
        primary: Words = (),
        correction: Correction = "bh",
        margin: float = MARGIN,
        select_on: Words = (),
        test_on: Words = (),
        generate: int = 0,
        name: str | None = None,
        device: str | None = None,
        dtype: Arithmetic | None = None,
        memory: str | None = None,
        weights: str | Path | None = None,
        shard: str | None = None,
        workers: str | None = None,
        overwrite: bool = False,
    ) -> "PatchedRun":
        """Patch heads between clean and corrupt runs at every checkpoint, as `headlapse patch` does.

        `correction`, `margin`, `select_on` and `test_on` are how the run that is returned is read.  Raises `UserError`
        for what the store cannot answer, and `VerificationError` where replay differs from stock transformers.
        """
        options = PatchOptions(
            self.path,
            subsets=_words(subsets),
            layers=_words(layers),
            joint=joint,
            positions=str(positions),
            direction=direction,
            checkpoints=_words(checkpoints),
            measures=_words(measures),  # type: ignore[arg-type]  # checked just below, by refuse_impossible
            protocol=protocol,
            primary=_words(primary),
            correction=correction,
            margin=margin,
            select_on=_words(select_on),
            test_on=_words(test_on),
            generate=generate,
            name=name,
            device=device,
            dtype=dtype,
            memory=memory,
            weights=None if weights is None else Path(weights),
            shard=shard,
            workers=workers,
            overwrite=overwrite,
        )
        work = pipeline.patch(options, cache_folder())
        _raise_or_warn(work, nothing=not work.n_complete)
        return PatchedRun(self, work.name, options.reading)

    def run(self, name: str) -> "PatchedRun":
        """A patched run by its name.  Raises `UserError` where there is none of that name."""
        if name not in self.runs:
            names = ", ".join(self.runs) or "none"
            raise UserError(f"{self.path} has no patched run {name}; it has {names}; store.patch() makes one")
        return PatchedRun(self, name)

    def __getitem__(self, name: str) -> "PatchedRun":
        return self.run(name)

    def mechanism(
        self,
        *,
        checkpoints: Words = "all",
        parts: Words = PARTS,
        direction: Direction = "denoise",
        device: str | None = None,
        dtype: Arithmetic | None = None,
        memory: str | None = None,
        weights: str | Path | None = None,
        shard: str | None = None,
        workers: str | None = None,
        overwrite: bool = False,
    ) -> xr.Dataset:
        """Measure what heads do and how their weights change, as `headlapse mechanism` does; what was measured."""
        options = MechanismOptions(
            self.path,
            checkpoints=_words(checkpoints),
            parts=_words(parts),  # type: ignore[arg-type]  # checked just below, by refuse_impossible
            direction=direction,
            device=device,
            dtype=dtype,
            memory=memory,
            weights=None if weights is None else Path(weights),
            shard=shard,
            workers=workers,
            overwrite=overwrite,
        )
        work = pipeline.mechanism(options, cache_folder())
        _raise_or_warn(work, nothing=not work.n_complete)
        return CheckpointArrays(self.path / "mechanism", self.path).load()

    def roles(self) -> pd.DataFrame:
        """What heads are known to do, as `mechanism` measured it: one row for each checkpoint, role, layer and head.

        Columns: `score`, `null` (the same score where what the role goes by is taken away), `p` (adjusted over the
        heads of the checkpoint), `has_role`, and `after` and `by`, the checkpoints between which the head takes the
        role on.  Raises `UserError` where roles were not measured.
        """
        return results.roles(self.path)

    def report(self, out: str | Path | None = None, *, name: str | None = None) -> Path:
        """Write the page of a patched run, the newest unless named, into the folder `out`; where the page is."""
        options = ReportOptions(self.path, out=None if out is None else Path(out), name=name)
        return pipeline.report(options, cache_folder())

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def _repr_html_(self) -> str:
        summary = inventory.summarize(self.path)
        n = len(summary.complete)
        return _html_table(
            f"headlapse store {self.path}",
            {
                "model": str(summary.study["model"]),
                "task": f"{summary.study['task']}, {format_count(summary.n_trials, 'prompt pair')}",
                "checkpoints": f"{n} of {n + len(summary.missing)}",
                "runs": ", ".join(run.name for run in summary.runs) or "none; store.patch() makes one",
                "size": f"{format_bytes(summary.n_bytes)} in {summary.study['dtype']}",
            },
        )


class PatchedRun:
    """A patched run of a store."""

    def __init__(self, store: Store, name: str, reading: Reading = READING) -> None:
        self.store, self.name, self.reading = store, name, reading

    @property
    def correction(self) -> Correction:
        """How its p-values are adjusted."""
        return self.reading.correction

    @property
    def path(self) -> Path:
        """The run's zarr group."""
        return pipeline.run_path(self.store.path, self.name)

    @property
    def settings(self) -> PatchSettings:
        """What was patched and how."""
        return pipeline.open_run(self.store.path, self.name)[1]

    @property
    def dataset(self) -> xr.Dataset:
        """Everything that was measured, lazily, with labelled dimensions."""
        return pipeline.open_run(self.store.path, self.name)[0]

    def heads(self) -> pd.DataFrame:
        """What each head does when it is patched alone: one row for each checkpoint, layer and head.

        Columns: `effect` with its 95 % interval over prompts `low` to `high` (nats), and `low_joint` to `high_joint`
        for who reads of the largest of all heads; `p`, `p_adjusted`, `p_equivalent` (that the effect is as large as the
        margin; adjusted as well) and `share` of the whole layer's effect.  Empty where no head was patched alone.
        """
        return results.heads(self.store.path, self.name, self.reading)

    def verdict(self) -> Lines:
        """The lines that `headlapse patch` ends in."""
        return Lines(results.patch_lines(self.store.path, self.name, self.reading))

    def tables(self) -> Lines:
        """Every table that `headlapse patch --verbose` prints."""
        return Lines(results.patch_tables(self.store.path, self.name, self.reading))

    def report(self, out: str | Path | None = None) -> Path:
        """Write the page of this run into the folder `out`; where the page is."""
        return self.store.report(out, name=self.name)

    def widget(self) -> "StageWidget":
        """The stage of the page, in a notebook: a slider through training, and the effect of any heads that are chosen.

        `widget.selected` is what is chosen there: `run`, `checkpoint`, `layer`, `heads`, `measure`; setting it chooses.
        Raises `UserError` where anywidget is not installed (`pip install headlapse[notebook]`).
        """
        try:
            from .notebook import stage_widget
        except ModuleNotFoundError as missing:
            raise UserError(
                f"{missing.name} is not installed; pip install 'headlapse[notebook]' brings it"
            ) from missing
        return stage_widget(self.store.path, self.name)

    def _repr_mimebundle_(self, **asked: Any) -> Any:
        """In a notebook the stage, or why there is none; everywhere else `_repr_html_` serves."""
        if not _is_notebook() or self.settings.protocol == "published":
            return None
        try:
            widget = self.widget()
        except UserError as problem:
            said = f"<p>No time-lapse here: {html.escape(str(problem))}</p>"
            return {"text/plain": repr(self), "text/html": f"{self._repr_html_()}{said}"}, {}
        from .notebook import display

        bundle, metadata = display(widget, **asked)
        return {**bundle, "text/html": self._repr_html_()}, metadata

    def __repr__(self) -> str:
        return f"PatchedRun({self.name!r} of {str(self.store.path)!r})"

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(self.name)}</b> of {html.escape(str(self.store.path))}</p>" + (
            self.verdict()._repr_html_()
        )


def cache_folder() -> Path:
    """Where stores go and are looked for: HEADLAPSE_CACHE, or `cache/` in the current folder."""
    return Path(os.environ.get("HEADLAPSE_CACHE") or "cache")


def _saved(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", checkpoints: tuple[str, ...]) -> Path:
    from .engine.checkpoints.loaded_model import is_loaded_model, save_loaded_model

    if not is_loaded_model(model):
        raise UserError(f"model: {type(model).__name__} is neither a name nor a transformers model; pass one of these")
    if tokenizer is None:
        raise UserError(
            "tokenizer: a loaded model needs its tokenizer; pass tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    if checkpoints:
        raise UserError(f"checkpoints {' '.join(checkpoints)}: a loaded model is one checkpoint; leave checkpoints out")
    return save_loaded_model(model, tokenizer, cache_folder())


def _words(words: Words) -> tuple[str, ...]:
    return (str(words),) if isinstance(words, str | int) else tuple(map(str, words))


def _raise_or_warn(work: pipeline.Work, nothing: bool) -> None:
    """Raise `UserError` for the first problem where there is nothing to show, else warn of each."""
    problems: Mapping[str, str] = work.problems
    lines = [
        f"{', '.join(k for k in problems if problems[k] == text)}: {text}" for text in dict.fromkeys(problems.values())
    ]
    if lines and nothing:
        raise UserError(lines[0])
    for line in lines:
        warnings.warn(line, stacklevel=3)


def _is_notebook() -> bool:
    """Whether a kernel of Jupyter runs this."""
    return "ipykernel" in sys.modules


def _html_table(title: str, rows: Mapping[str, str]) -> str:
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
    return f"<table><caption>{html.escape(title)}</caption>{cells}</table>"

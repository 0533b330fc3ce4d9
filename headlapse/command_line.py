"""The command line: options in, one call of the pipeline, lines out.  Only here is anything printed."""

import inspect
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from .engine.runtime.errors import UserError
from .engine.runtime.exit_status import DONE, FAILED, REFUSED, print_problems
from .engine.runtime.format import format_bytes, format_count
from .engine.runtime.shortage import refuse_small_limits
from .help_text import HelpText
from .options import (
    CacheOptions,
    CompareOptions,
    DoctorOptions,
    MechanismOptions,
    PatchOptions,
    ReportOptions,
    VerifyKnownOptions,
    WatchOptions,
)

if TYPE_CHECKING:
    from . import pipeline
    from .watching import News, Watch

FLAT = Parameter(name="*")
"""The fields of a dataclass as options of their own."""

THEN = "--then"
"""Stands between `cache` or `watch` and the command that works on what it has cached."""

LONGEST_WORD = 10_000
"""Characters of one word of the command line; the numbers of all heads of the widest layer take 5,000."""

_CACHE, _PATCH, _MECHANISM, _REPORT = CacheOptions(), PatchOptions(), MechanismOptions(), ReportOptions()
_DOCTOR, _COMPARE, _VERIFY_KNOWN = DoctorOptions(), CompareOptions(), VerifyKnownOptions()

Folder = Annotated[Path, Parameter(parse=False)]
"""The cache folder: no option, handed in by whoever runs the command line."""

app = App(
    name="headlapse",
    help="A time-lapse of attention heads: which heads cause a behaviour, and when in training they start to.",
    help_format="plaintext",
    help_formatter=HelpText(),
    version=lambda: _version(),
    default_parameter=Parameter(consume_multiple=(1, None), negative=(), show_default=False),
)


def _examples(*commands: str) -> str:
    return "\n".join(["examples:", *(f"  {command}" for command in commands)])


app.register_install_completion_command()


def run(words: list[str], folder: str) -> int:
    """Run one command and return its exit status.  Raises `UserError`, of one line, for what it cannot do."""
    _refuse_unreadable(words)
    first, *others = _split(words)
    command, bound, injected = _parse(first)
    if others:
        if command not in (cache, watch):
            what = "only headlapse cache and headlapse watch are followed by another command"
            raise UserError(f"--then {' '.join(others[0])}: {what}")
        options = bound.arguments.get("options", _CACHE)
        bound.arguments["options"] = replace(options, then=tuple(map(_then, others)))
    if command in (cache, watch, patch, mechanism, report, verify_known):
        refuse_small_limits()
    given = {"folder": Path(folder)} if "folder" in injected else {}
    with _own_log():
        status = command(*bound.args, **bound.kwargs, **given)
    return status if isinstance(status, int) else DONE


def _split(words: list[str]) -> list[list[str]]:
    """The words of a command, and those of every command that stands after a `--then`."""
    commands: list[list[str]] = [[]]
    for word in words:
        if word == THEN:
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def _then(words: list[str]) -> PatchOptions | MechanismOptions:
    command, bound, _ = _parse(words)
    if command not in (patch, mechanism):
        raise UserError(f"--then {' '.join(words)}: write patch or mechanism, with its options, e.g. --then patch")
    default = _PATCH if command is patch else _MECHANISM
    options: PatchOptions | MechanismOptions = bound.arguments.get("options", default)
    return options


def _parse(words: list[str]) -> tuple[Any, inspect.BoundArguments, dict[str, Any]]:
    """The command that the words mean, and its arguments.  Raises `UserError` for words that mean none."""
    try:
        return app.parse_args(words, exit_on_error=False, print_error=False)
    except UnusedCliTokensError as error:
        left = " ".join(error.unused_tokens or ())
        raise UserError(f"{left}: more than this command takes; {_help(words)} shows what it does take") from None
    except CycloptsError as error:
        raise UserError(f"{' '.join(str(error).split())} ({_help(words)} shows what there is)") from None


@app.command(
    help_epilogue=_examples(
        "headlapse cache",
        "headlapse cache --model EleutherAI/pythia-160m --task ioi --checkpoints log",
        "headlapse cache --model someone/model --checkpoints main 1000..64000 --plan",
        "headlapse cache --checkpoints all --keep-weights 2 --then patch",
        "headlapse cache --model EleutherAI/pythia-160m-seed{seed} --seeds 1-9",
        "headlapse cache --model allenai/OLMo-2-0425-1B --checkpoints list",
    )
)
def cache(options: Annotated[CacheOptions, FLAT] = _CACHE, *, folder: Folder) -> int:
    """Run every checkpoint of a model once on a contrastive task and keep every head's activations in a zarr store."""
    options.refuse_impossible()
    return max(_cache_one(each, folder) for each in options.each_series())


def _cache_one(options: CacheOptions, folder: Path) -> int:
    from . import pipeline

    if options.lists:
        from .engine.report.findings.checkpoints import checkpoint_list

        for line in checkpoint_list(options.model, pipeline.list_checkpoints(options, folder)):
            print(line)
        return DONE
    if options.plan:
        print(pipeline.describe_cache(options, folder))
        return DONE
    work = pipeline.cache(options, folder)
    status = _say_cached(options, work)
    for command, done in zip(options.then, work.then, strict=False):  # nothing is done then where nothing was cached
        if isinstance(done, pipeline.PatchWork):
            assert isinstance(command, PatchOptions)
            status = max(status, _say_patched(command, done))
        else:
            assert isinstance(command, MechanismOptions)
            status = max(status, _say_measured(command, done))
    return status


def _say_cached(options: CacheOptions, work: "pipeline.CacheWork") -> int:
    if not work.n_missing:
        there = f"{work.n_asked} of {work.n_asked} checkpoints are in {work.store}"
        print(f"{there}, captured by {options.workers}" if options.n_workers > 1 else f"nothing to do: {there} already")
        return DONE
    _print_problems(work)
    if not work.n_finished:
        return REFUSED if work.by_input and len(work.problems) == work.n_asked else FAILED
    for warning in work.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    captured = f"{format_count(work.n_finished, 'checkpoint')} x {work.n_prompts} prompts in {work.store}"
    speed = f"{work.seconds:.1f} s on {work.device}, {work.dtype}, peak memory {format_bytes(work.peak_memory)}"
    print(f"cached {captured} ({speed})")
    return FAILED if work.problems else DONE


@app.command(
    help_epilogue=_examples(
        "headlapse watch --model out/ --task ioi --until checkpoint-10000",
        "headlapse watch --model owner/model --revision 'step{step}' --keep-weights 2 --then patch --then mechanism",
    )
)
def watch(options: Annotated[WatchOptions, FLAT], *, folder: Folder) -> int:
    """Follow a training that goes on: cache and patch each checkpoint once it is whole, and keep the page up to date.

    Ends with the checkpoint of --until, or with Ctrl-C, in the verdict.  Started again it goes on where it was.
    """
    options.refuse_impossible()
    from .watching import Watch

    follower = Watch(options, folder)
    end = f"until {options.until}" if options.until else "until Ctrl-C"
    print(f"watching {options.model} every {options.seconds:g} s {end}", file=sys.stderr, flush=True)
    try:
        for news in follower.follow():
            _say_news(follower, news)
    except KeyboardInterrupt:
        _say_end(follower)
        raise
    return _say_end(follower)


def _say_news(follower: "Watch", news: "News") -> None:
    for label, why in news.waiting.items():
        print(f"waiting for {label}: {why}" if label else f"waiting: {why}", file=sys.stderr, flush=True)
    print_problems(news.problems)
    for line in follower.lines(news):
        print(line, flush=True)


def _say_end(follower: "Watch") -> int:
    """The page as it stays, the verdict, and what is not finished."""
    follower.page()
    for line in follower.warnings():
        print(f"warning: {line}", file=sys.stderr)
    for line in follower.verdict():
        print(line)
    print_problems(follower.problems)
    return FAILED if follower.problems else DONE


@app.command(
    help_epilogue=_examples(
        "headlapse patch",
        "headlapse patch cache/demo-decimal.zarr --subsets lattice --layers 1",
        "headlapse patch --subsets 0,2,4 random:100 --direction noise --name mine",
    )
)
def patch(options: Annotated[PatchOptions, FLAT] = _PATCH, *, folder: Folder) -> int:
    """Patch heads between clean and corrupt runs at every checkpoint of a store: exact, and no prompt is run again.

    Ends in a verdict of at most 12 lines; --verbose prints every table.
    """
    from . import pipeline

    return _say_patched(options, pipeline.patch(options, folder))


def _say_patched(options: PatchOptions, work: "pipeline.PatchWork") -> int:
    from .results import patch_lines, patch_tables

    if work.n_complete:
        if options.verbose:
            for table in patch_tables(work.store, work.name, options.reading):
                print(table)
        speed = f"{work.n_runs / max(work.seconds, 1e-9):,.0f}/s, "
        print(f"{_amount(work, f'{work.n_runs:,} patched runs', speed)}; {work.name} is in {work.store}")
        for line in patch_lines(work.store, work.name, options.reading):
            print(line)
    _print_problems(work)
    return _status(work)


@app.command(
    help_epilogue=_examples(
        "headlapse mechanism", "headlapse mechanism --parts attribution weights --checkpoints step1000..main --verbose"
    )
)
def mechanism(options: Annotated[MechanismOptions, FLAT] = _MECHANISM, *, folder: Folder) -> int:
    """What heads do and how their weights change, at every checkpoint of a store; no prompt is run again."""
    from . import pipeline

    return _say_measured(options, pipeline.mechanism(options, folder))


def _say_measured(options: MechanismOptions, work: "pipeline.Work") -> int:
    from .results import mechanism_lines

    if work.n_complete:
        for line in mechanism_lines(work.store, options.verbose):
            print(line)
        print(f"{_amount(work, format_count(work.n_finished, 'checkpoint'))}; mechanism is in {work.store}")
    _print_problems(work)
    return _status(work)


@app.command(
    help_epilogue=_examples(
        "headlapse report", "headlapse report cache/demo-decimal.zarr --name parity --out parity-report"
    )
)
def report(options: Annotated[ReportOptions, FLAT] = _REPORT, *, folder: Folder) -> int:
    """Write a patched run as a page with figures and tables: index.html, PNG, SVG and CSV."""
    from . import pipeline

    print(pipeline.report(options, folder))
    return DONE


@app.command(
    help_epilogue=_examples(
        "headlapse compare cache/demo-decimal.zarr cache/demo-seed1-decimal.zarr cache/demo-seed2-decimal.zarr",
        "headlapse compare cache/pythia-160m-seed*-ioi.zarr --name each --verbose",
    )
)
def compare(options: Annotated[CompareOptions, FLAT] = _COMPARE) -> int:
    """The same question over seeds, sizes, architectures or tasks: effects and onsets with intervals over seeds.

    Training runs are compared at the last point of training that all of them reach, by tokens seen where those are
    known.  Writes a page as well.
    """
    from .comparing import compare_stores
    from .engine.runtime.quiet import quiet_libraries

    with quiet_libraries():
        comparison = compare_stores(options)
        page = comparison.report(options.out)
    for line in (*(comparison.tables if options.verbose else ()), *comparison.verdict()):
        print(line)
    print(f"{'page':<11}{page}")
    return DONE


@app.command(
    help_epilogue=_examples(
        "headlapse doctor",
        "headlapse doctor cache/demo-decimal.zarr --fix",
        "headlapse doctor --model EleutherAI/pythia-12b",
    )
)
def doctor(options: Annotated[DoctorOptions, FLAT] = _DOCTOR, *, folder: Folder) -> int:
    """Whether a store is what was written, and whether its checkpoints can be what their names say.

    Compares every chunk with its checksum, patched runs with what they must equal, weights on disk with those that were
    cached, and checkpoints with each other.  Exit status 1 where something is wrong.
    """
    from .diagnosis import diagnose

    diagnosis = diagnose(options, folder)
    for line in (*diagnosis.removed, *diagnosis.problems):
        print(line)
    for line in diagnosis.notes:
        print(f"note: {line}")
    print(diagnosis.summary)
    return FAILED if diagnosis.problems else DONE


@app.command(
    name="verify-known",
    help_epilogue=_examples("headlapse verify-known", "headlapse verify-known --only ioi --trials 100"),
)
def verify_known(options: Annotated[VerifyKnownOptions, FLAT] = _VERIFY_KNOWN, *, folder: Folder) -> int:
    """Whether public models' heads are found to be what the literature says: IOI, greater-than, induction.

    Caches GPT-2 small and Pythia-70m where the hub, or its cache on this machine, has them, measures roles and effects
    of their heads, and compares.  Exit status 1 where a model cannot be had, or a finding is not as published.
    """
    from .verification import verify_known

    verification = verify_known(options, folder)
    for line in verification.lines:
        print(line)
    if verification.lacking:
        print(f"error: {verification.problem}", file=sys.stderr)
    return FAILED if verification.lacking or not verification.all_agree else DONE


@app.command(name="ls", help_epilogue=_examples("headlapse ls"))
def list_stores(directory: Path | None = None, /, *, folder: Folder) -> int:
    """List the stores in a folder.

    Parameters
    ----------
    directory
        e.g. cache (default: cache/)
    """
    from .engine.report.findings.stores import store_list
    from .engine.store import inventory

    place = directory or folder
    if directory is not None and not place.is_dir():
        raise UserError(f"{place}: there is no such folder; name the folder that holds stores")
    stores = inventory.stores_in(place)
    if not stores:
        print(f"no store in {place}; headlapse cache makes one")
    for line in store_list([inventory.summarize(store) for store in stores], datetime.now()):
        print(line)
    return DONE


@app.command(help_epilogue=_examples("headlapse info cache/demo-decimal.zarr"))
def info(store: Path | None = None, *, folder: Folder) -> int:
    """What a store holds: model, task, checkpoints complete and missing, arrays, patched runs, versions.

    Parameters
    ----------
    store
        e.g. cache/demo-decimal.zarr (default: the newest under cache/)
    """
    from .engine.report.findings.stores import store_page
    from .engine.store import inventory

    path = store or inventory.find_store(folder)
    for line in store_page(inventory.summarize(path), inventory.arrays_of(path)):
        print(line)
    return DONE


@app.command(
    name="rm",
    help_epilogue=_examples(
        "headlapse rm cache/demo-decimal.zarr parity", "headlapse rm cache/demo-decimal.zarr --yes"
    ),
)
def remove_stored(store: Path, run_name: str | None = None, /, *, yes: bool = False) -> int:
    """Remove a store, or one patched run of it; asks first.

    Parameters
    ----------
    store
        e.g. cache/demo-decimal.zarr
    run_name
        the patched run to remove, e.g. parity (default: the whole store)
    yes
        do not ask
    """
    from .engine.store import inventory
    from .engine.store.disk import remove
    from .engine.store.locks import alone

    summary = inventory.summarize(store)
    target = store if run_name is None else store / "patches" / run_name
    if run_name is not None and target not in inventory.patch_paths(store):
        names = ", ".join(run.name for run in summary.runs) or "none"
        raise UserError(f"{store} has no patched run {run_name}; it has {names}")
    counts = format_count(len(summary.complete), "checkpoint"), format_count(len(summary.runs), "patched run")
    size = f"{', '.join(counts)}, {format_bytes(summary.n_bytes)}"
    what = f"{store} ({size})" if run_name is None else f"patched run {run_name} of {store}"
    if not yes and not _confirmed(what):
        print(f"kept {what}")
        return FAILED
    with alone(store):
        remove(target)
    print(f"removed {what}")
    return DONE


def _refuse_unreadable(words: list[str]) -> None:
    """Raise `UserError` for a word that no option can mean: too long, or with characters that nobody types."""
    for word in words:
        if len(word) > LONGEST_WORD:
            raise UserError(f"{word[:40]}...: a word of {len(word):,} characters, no option takes one so long")
        if control := re.search("[\x00-\x1f\x7f]", word):
            raise UserError(f"{word}: it holds the control character {control[0]!r}; leave it out, or rename the file")


def _confirmed(what: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError(f"{what} is removed only with --yes where nobody can be asked")
    return input(f"remove {what}? [y/N] ").strip().lower() in ("y", "yes")


def _amount(work: "pipeline.Work", amount: str, speed: str = "") -> str:
    """How much was done in how long, and on what."""
    if not work.n_missing:
        return "nothing to do"
    peak = format_bytes(work.peak_memory)
    return f"{amount} in {work.seconds:.1f} s ({speed}{work.device}, {work.dtype}), peak memory {peak}"


def _print_problems(work: "pipeline.Work") -> None:
    print_problems(work.problems)
    if work.kept_old and len(work.problems) < work.n_asked:
        print("note: the old one is kept until its replacement is whole; the same command goes on", file=sys.stderr)


def _status(work: "pipeline.Work") -> int:
    """2 where nothing is there and what was given is to blame, 1 for every other problem."""
    if not work.problems:
        return DONE
    return REFUSED if work.by_input and not work.n_complete else FAILED


def _help(words: list[str]) -> str:
    command = words[0] if words and words[0] in app else ""
    return " ".join(filter(None, ["headlapse", command, "--help"]))


def _version() -> str:
    from . import __version__

    return __version__


class _Lines(logging.Handler):
    """Log lines as the other lines of stderr: `warning: ...`."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextmanager
def _own_log() -> Iterator[None]:
    """Show what headlapse itself logs from warnings up, and nothing of any other library."""
    own, handler, last_resort = logging.getLogger("headlapse"), _Lines(logging.WARNING), logging.lastResort
    own.addHandler(handler)
    logging.lastResort = None
    try:
        yield
    finally:
        own.removeHandler(handler)
        logging.lastResort = last_resort

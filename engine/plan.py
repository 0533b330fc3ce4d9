"""What caching a series would take: revisions, bytes to fetch and to store, and about how long."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from headlapse.engine.activations import KINDS
from headlapse.engine.anatomy import Anatomy, dissect, read_config
from headlapse.engine.checkpoints import TORCH_DTYPES, load_tokenizer
from headlapse.engine.layout import vocabulary_file
from headlapse.engine.series import kept_layers, pending
from headlapse.engine.sources import DEMO, Checkpoint, Supply, description, plan
from headlapse.engine.study import Study
from headlapse.engine.tasks import Trials, draw_trials

NETWORK_RATE = 50e6
"""Bytes a second that a download is taken to reach."""

DISK_RATE = 500e6
"""Bytes a second that weights are read and activations written with."""


@dataclass(frozen=True)
class Load:
    """What one checkpoint asks of the machine."""

    stored: int
    """Bytes in the store."""

    flops: int
    """Floating-point operations of the forward over all prompts."""


def describe(study: Study, checkpoints: Sequence[Checkpoint], cache: Path, path: Path, device: str) -> str:
    """The plan as text.  Fetches at most the configuration and the tokenizer of one checkpoint."""
    missing = {checkpoint.label for checkpoint in pending(study, checkpoints, path)}
    supplies = plan(checkpoints, cache)
    lines = [f"{study.model}, task {study.task}, {study.dtype}: {len(checkpoints)} checkpoints, store {path}"]
    lines += [_line(supply, supply.checkpoint.label in missing) for supply in supplies]
    todo = [supply for supply in supplies if supply.checkpoint.label in missing and not supply.problem]
    if not missing:
        lines.append("nothing to do: all of them are in the store")
    elif todo:
        lines += _sums(study, todo, cache, path, device)
    return "\n".join(lines)


def load_of(study: Study, body: Anatomy, trials: Trials) -> Load:
    """Bytes and operations of one checkpoint, from its shapes alone."""
    layers, kinds = kept_layers(study, body.n_layers)
    widths = {
        "z": body.n_heads * body.value_dim,
        "key": body.n_kv_heads * body.head_dim,
        "value": body.n_kv_heads * body.value_dim,
        "resid_pre": body.d_model,
    }
    assert set(widths) == set(KINDS)
    width = sum(widths[kind] for kind in kinds)
    return Load(
        stored=trials.tokens.size * len(layers) * width * TORCH_DTYPES[study.dtype].itemsize,
        flops=2 * body.n_parameters * trials.tokens.size,
    )


def _sums(study: Study, todo: Sequence[Supply], cache: Path, path: Path, device: str) -> list[str]:
    to_fetch = [supply.to_fetch for supply in todo]
    fetched = sum(size or 0 for size in to_fetch)
    unknown = " and what the hub does not tell" if None in to_fetch else ""
    directory = description(todo[0].checkpoint, cache)
    if directory is None:
        assert study.model == DEMO
        return ["to fetch: nothing; the series is trained first, on the spot (a minute or two), and then takes seconds"]
    body = dissect(read_config(directory))
    trials = draw_trials(study.task, study.trials, load_tokenizer(vocabulary_file(directory).parent), body.context)
    load = load_of(study, body, trials)
    stored = load.stored * len(todo)
    weights = sum(supply.n_bytes or 0 for supply in todo)
    computing = (
        load.flops * len(todo) / _matmul_rate(device, TORCH_DTYPES[study.dtype]) + (weights + stored) / DISK_RATE
    )
    free = shutil.disk_usage(_existing(path)).free
    short = f"; NOT ENOUGH: {_size(free)} are free" if stored > free else f" ({_size(free)} are free)"
    return [
        f"to fetch: {_size(fetched)}{unknown}, about {_time(fetched / NETWORK_RATE)} at {_size(NETWORK_RATE)}/s",
        f"to store: {_size(stored)}{short}",
        f"to read, compute and write: about {_time(computing)} on {device}",
    ]


def _line(supply: Supply, is_missing: bool) -> str:
    checkpoint = supply.checkpoint
    step = str(checkpoint.step) if checkpoint.step >= 0 else "?"
    size = _size(supply.n_bytes) if supply.n_bytes is not None else "size unknown"
    if supply.problem:
        state = f"error: {supply.problem}"
    elif not is_missing:
        state = f"{size}, in the store"
    elif checkpoint.model == DEMO and supply.n_bytes is None:
        state = "to be trained"
    else:
        state = f"{size}, on disk" if supply.on_disk else f"{size}, to be fetched"
    commit = f" at {checkpoint.commit[:10]}" if checkpoint.commit else ""
    return f"  {checkpoint.label:<12} step {step:>7}  {state}{commit}"


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one matrix product of a forward's size, measured now."""
    left, right = (torch.ones(size, 1024, device=device, dtype=dtype) for size in (512, 1024))
    for _ in range(3):
        started = time.perf_counter()
        float((left @ right)[0, 0])
        seconds = time.perf_counter() - started
    return 2 * 512 * 1024 * 1024 / seconds


def _existing(path: Path) -> Path:
    """The nearest folder that exists: where the bytes will go."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit in ("B", "kB") else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""What caching a series would take: revisions, bytes to fetch and to store, and about how long."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.architecture import Architecture, inspect_architecture, read_config
from ..checkpoints.files import vocabulary_file
from ..checkpoints.model import load_tokenizer
from ..checkpoints.resolve import DEMO, Availability, Checkpoint, description, plan
from ..checkpoints.weights import TORCH_DTYPES
from ..runtime.format import format_bytes, format_time
from ..runtime.resources import matmul_rate
from ..store.activations import KINDS
from ..study.prompts import Trials, draw_trials
from ..study.study import Study
from .run import kept_layers, pending

NETWORK_RATE = 50e6
"""Bytes a second that a download is taken to reach."""

DISK_RATE = 500e6
"""Bytes a second that weights are read and activations written with."""


@dataclass(frozen=True)
class Cost:
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


def cost_of(study: Study, body: Architecture, trials: Trials) -> Cost:
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
    return Cost(
        stored=trials.tokens.size * len(layers) * width * TORCH_DTYPES[study.dtype].itemsize,
        flops=2 * body.n_parameters * trials.tokens.size,
    )


def _sums(study: Study, todo: Sequence[Availability], cache: Path, path: Path, device: str) -> list[str]:
    to_fetch = [supply.to_fetch for supply in todo]
    fetched = sum(size or 0 for size in to_fetch)
    unknown = " and what the hub does not tell" if None in to_fetch else ""
    directory = description(todo[0].checkpoint, cache)
    if directory is None:
        assert study.model == DEMO
        return ["to fetch: nothing; the series is trained first, on the spot (a minute or two), and then takes seconds"]
    body = inspect_architecture(read_config(directory))
    trials = draw_trials(study.task, study.trials, load_tokenizer(vocabulary_file(directory).parent), body.context)
    load = cost_of(study, body, trials)
    stored = load.stored * len(todo)
    weights = sum(supply.n_bytes or 0 for supply in todo)
    computing = load.flops * len(todo) / matmul_rate(device, TORCH_DTYPES[study.dtype]) + (weights + stored) / DISK_RATE
    free = shutil.disk_usage(_existing(path)).free
    short = f"; NOT ENOUGH: {format_bytes(free)} are free" if stored > free else f" ({format_bytes(free)} are free)"
    fetching = f"about {format_time(fetched / NETWORK_RATE)} at {format_bytes(NETWORK_RATE)}/s"
    return [
        f"to fetch: {format_bytes(fetched)}{unknown}, {fetching}",
        f"to store: {format_bytes(stored)}{short}",
        f"to read, compute and write: about {format_time(computing)} on {device}",
    ]


def _line(supply: Availability, is_missing: bool) -> str:
    checkpoint = supply.checkpoint
    step = str(checkpoint.step) if checkpoint.step >= 0 else "?"
    size = format_bytes(supply.n_bytes) if supply.n_bytes is not None else "size unknown"
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


def _existing(path: Path) -> Path:
    """The nearest folder that exists: where the bytes will go."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)

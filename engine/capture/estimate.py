"""What caching a series would take: revisions, bytes to download and to store, and about how long."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.architecture import Architecture, inspect_architecture, read_config
from ..checkpoints.availability import Availability, plan
from ..checkpoints.fetch import description
from ..checkpoints.hub import hub_cache
from ..checkpoints.resolve import Checkpoint
from ..checkpoints.series import demo_seed
from ..checkpoints.tokenizer import load_tokenizer
from ..checkpoints.weights import TORCH_DTYPES
from ..runtime.format import format_bytes, format_time
from ..runtime.resources import matmul_rate
from ..study.prompts import Trials, draw_trials
from ..study.study import Study
from .run import pending, stored_layers

NETWORK_RATE = 50e6
"""Bytes per second that a download is assumed to reach."""

DISK_RATE = 500e6
"""Bytes per second at which weights are assumed to be read and activations written."""


@dataclass(frozen=True)
class Cost:
    """What one checkpoint takes of the machine."""

    stored: int
    """Bytes in the store."""

    flops: int
    """Floating-point operations of the forward over all prompts."""


def describe(
    study: Study, checkpoints: Sequence[Checkpoint], cache: Path, path: Path, device: str, keep: int | None = None
) -> str:
    """The plan as text, where the weights of at most `keep` checkpoints are kept at a time, or all.

    Downloads at most the configuration and the tokenizer of one checkpoint.
    """
    missing = {checkpoint.label for checkpoint in pending(study, checkpoints, path)}
    availabilities = plan(checkpoints, cache)
    lines = [f"{study.model}, task {study.task}, {study.dtype}: {len(checkpoints)} checkpoints, store {path}"]
    lines += [_line(each, each.checkpoint.label in missing) for each in availabilities]
    todo = [each for each in availabilities if each.checkpoint.label in missing and not each.problem]
    if not missing:
        lines.append("nothing to do: all of them are in the store")
    elif todo:
        lines += _totals(study, todo, cache, path, device, keep)
    return "\n".join(lines)


def cost_of(study: Study, architecture: Architecture, trials: Trials) -> Cost:
    """Bytes and operations of one checkpoint, from its shapes alone."""
    layers, widths = stored_layers(study, architecture)
    width = sum(map(math.prod, widths.values()))
    return Cost(
        stored=trials.tokens.size * len(layers) * width * TORCH_DTYPES[study.dtype].itemsize,
        # One multiplication and one addition per parameter and token; attention itself is small beside them.
        flops=2 * architecture.n_parameters * trials.tokens.size,
    )


def at_once(sizes: Sequence[int], keep: int | None) -> int:
    """The most bytes that so many of these files one after another take; of all of them where `keep` is None."""
    window = len(sizes) if keep is None else min(keep, len(sizes))
    return max(sum(sizes[first : first + window]) for first in range(len(sizes) - window + 1))


def _totals(
    study: Study, todo: Sequence[Availability], cache: Path, path: Path, device: str, keep: int | None
) -> list[str]:
    sizes = [each.to_fetch for each in todo]
    to_fetch = sum(size or 0 for size in sizes)
    unknown = " and files whose size the hub does not give" if None in sizes else ""
    found = description(todo[0].checkpoint, cache)
    if found is None:
        assert demo_seed(study.model) is not None
        return ["to fetch: nothing; the series is trained first, on the spot (a minute or two), and then takes seconds"]
    architecture = inspect_architecture(read_config(found.directory))
    tokenizer = load_tokenizer(found.tokenizer)
    trials = draw_trials(study.task, study.trials, tokenizer, architecture.context)
    cost = cost_of(study, architecture, trials)
    stored = cost.stored * len(todo)
    weights = sum(each.n_bytes or 0 for each in todo)
    seconds = cost.flops * len(todo) / matmul_rate(device, TORCH_DTYPES[study.dtype]) + (weights + stored) / DISK_RATE
    fetching = f"about {format_time(to_fetch / NETWORK_RATE)} at {format_bytes(NETWORK_RATE)}/s"
    return [
        f"to fetch: {format_bytes(to_fetch)}{unknown}, {fetching}",
        f"to store: {format_bytes(stored)}",
        *_on_disk(at_once([size or 0 for size in sizes], keep), stored, path, keep),
        f"to read, compute and write: about {format_time(seconds)} on {device}",
    ]


def _on_disk(weights: int, stored: int, path: Path, keep: int | None) -> list[str]:
    """What the weights and the store take at once, a line for each disk, and whether there is room."""
    needed: dict[int, dict[str, int]] = {}
    places: dict[int, Path] = {}
    for what, n_bytes, place in (("weights", weights, _existing(hub_cache())), ("store", stored, _existing(path))):
        device = place.stat().st_dev
        needed.setdefault(device, {})[what] = n_bytes
        places[device] = place
    return [_room(needed[device], place, keep) for device, place in places.items() if sum(needed[device].values())]


def _room(needed: dict[str, int], place: Path, keep: int | None) -> str:
    free, most = shutil.disk_usage(place).free, sum(needed.values())
    parts = ", ".join(f"{what} {format_bytes(n_bytes)}" for what, n_bytes in needed.items() if n_bytes)
    line = f"on disk at most: {format_bytes(most)} ({parts})"
    if most <= free:
        return f"{line}, {format_bytes(free)} are free"
    hint = "; --keep-weights 2 keeps those of two checkpoints at a time" if keep is None and "weights" in needed else ""
    return f"{line}; NOT ENOUGH: {format_bytes(free)} are free in {place}{hint}"


def _line(availability: Availability, is_missing: bool) -> str:
    checkpoint = availability.checkpoint
    step = str(checkpoint.step) if checkpoint.step >= 0 else "?"
    size = format_bytes(availability.n_bytes) if availability.n_bytes is not None else "size unknown"
    if availability.problem:
        state = f"error: {availability.problem}"
    elif not is_missing:
        state = f"{size}, in the store"
    elif demo_seed(checkpoint.model) is not None and availability.n_bytes is None:
        state = "to be trained"
    else:
        state = f"{size}, on disk" if availability.on_disk else f"{size}, to be fetched"
    commit = f" at {checkpoint.commit[:10]}" if checkpoint.commit else ""
    return f"  {checkpoint.label:<12} step {step:>7}  {state}{commit}"


def _existing(path: Path) -> Path:
    """The nearest folder at or above `path` that exists: on its disk the store will be."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)

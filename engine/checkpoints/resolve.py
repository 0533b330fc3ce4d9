"""From a model name to its checkpoints: labels with their places in training.

A name is `demo` or `demo-seed2` (trained on the spot), a local directory, a hub id, or a template of either; no other
stage has to know which.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import NothingThereError
from .revisions import select
from .series import PYTHIA_TOKENS_PER_STEP, Series, find_series, is_pythia
from .training_place import MAIN, UNKNOWN, Place, read_place, refuse_unordered, training_order


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a model, on disk or not."""

    label: str
    """A hub revision or the name of a folder."""

    step: int
    """Training step from the start of its stage; -1 where it is not known."""

    model: str
    """As the user wrote it: `demo`, a hub id, a directory or a template."""

    location: str
    """The hub id, or the checkpoint's own directory."""

    commit: str | None = None
    """The commit to keep to.  None takes what the revision stands for now, and is the value outside the hub."""

    stage: str = ""
    """Of its training, as its name has it; empty where it has none."""

    tokens_seen: int = UNKNOWN
    """Since the start of its stage; -1 where not known."""

    revision: str | None = None
    """What the hub calls it; None where that is the label."""

    subfolder: str = ""
    """Of the hub repository, where the files lie in one."""

    tokenizer: str | None = None
    """A hub id or a directory, where the checkpoint does not bring its own."""

    @classmethod
    def recorded(cls, provenance: Mapping[str, Any]) -> "Checkpoint":
        """As a store records it, pinned to its commit."""
        return cls(**{name: value for name, value in provenance.items() if name not in ("sha256", "stamps")})

    @property
    def place(self) -> Place:
        """When in training it was saved; the seed as its label says."""
        return Place(self.stage, self.step, self.tokens_seen, read_place(self.label).seed)

    @property
    def is_remote(self) -> bool:
        """Whether it is kept by the hub."""
        return not os.path.isabs(self.location)

    @property
    def revision_name(self) -> str:
        """What the hub is asked for."""
        return self.commit or self.revision or self.label


def tokens_per_step(model: str) -> int | None:
    """Tokens that the model saw in each step of its training; None where that is not known."""
    return PYTHIA_TOKENS_PER_STEP if is_pythia(model) else None


def resolve(
    model: str,
    words: Sequence[str],
    cache: Path,
    revision: str | None = None,
    subfolder: str | None = None,
    tokenizer: str | None = None,
) -> list[Checkpoint]:
    """The checkpoints of one training of `model` that `words` name, in order, those without a place in it last.

    `words` are labels, globs, steps, tokens, ranges `A..B` and the sets `study`, `log` and `all`; without any, the
    model's default.  `model`, `revision` and `subfolder` may be templates (`template.Template`), one of them.  The
    network is used only for what cannot be known without it.  The embedded series lies in the folder `cache`.
    Raises `UserError` for a model or a checkpoint that does not exist, and for checkpoints that have no one order.
    """
    checkpoints = named(model, words, cache, revision, subfolder, tokenizer)
    places = {each.label: each.place for each in checkpoints}
    refuse_unordered(places, f"--checkpoints {' '.join(words)}" if words else f"--model {model}")
    return checkpoints


def named(
    model: str,
    words: Sequence[str],
    cache: Path,
    revision: str | None = None,
    subfolder: str | None = None,
    tokenizer: str | None = None,
) -> list[Checkpoint]:
    """As `resolve`, whether or not what is named is of one training."""
    series = find_series(model, cache, revision, subfolder)
    chosen: dict[str, Place] = {}
    for word in words or (series.index.default,):
        chosen |= select(series.index, word)
    return _in_order(series, chosen, tokenizer)


def there_by_now(
    model: str,
    words: Sequence[str],
    cache: Path,
    revision: str | None = None,
    subfolder: str | None = None,
    tokenizer: str | None = None,
) -> list[Checkpoint]:
    """As `resolve`, of a training that goes on: what `words` name and is not there yet is left out.

    Without words all that has come so far, but not the hub's `main`, which moves while the training goes on.
    Raises `NothingThereError` where the whole model is not there yet.
    """
    series = find_series(model, cache, revision, subfolder)
    chosen: dict[str, Place] = {}
    for word in words or ("all",):
        with suppress(NothingThereError):
            chosen |= select(series.index, word)
    if not words and revision is None:
        chosen.pop(MAIN, None)
    refuse_unordered(chosen, f"--checkpoints {' '.join(words)}" if words else f"--model {model}")
    return _in_order(series, chosen, tokenizer)


def _in_order(series: Series, chosen: Mapping[str, Place], tokenizer: str | None) -> list[Checkpoint]:
    if tokenizer is not None and os.path.isdir(path := os.path.expanduser(tokenizer)):
        tokenizer = str(Path(path).resolve())
    return [_checkpoint(series, label, chosen[label], tokenizer) for label in training_order(chosen)]


def _checkpoint(series: Series, label: str, place: Place, tokenizer: str | None) -> Checkpoint:
    at = series.whereabouts(label)
    return Checkpoint(
        label,
        place.step,
        series.index.model,
        at.location,
        stage=place.stage,
        tokens_seen=place.tokens,
        revision=at.revision,
        subfolder=at.subfolder,
        tokenizer=tokenizer,
    )

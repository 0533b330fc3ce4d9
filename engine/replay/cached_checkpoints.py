"""The checkpoints of a store, one after another, with exactly the weights that were cached."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.fetch import fetch
from ..checkpoints.files import Files
from ..checkpoints.loader import Loaded, ModelLoader
from ..checkpoints.model import ResidentModel
from ..checkpoints.prefetch import prefetch
from ..checkpoints.resolve import Checkpoint
from ..runtime.errors import UserError
from ..runtime.outcome import Outcome, failed
from ..store.store import Store, StoredActivations


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint of a store, ready to compute with."""

    resident: ResidentModel
    files: Files
    activations: StoredActivations | None

    memory: int
    """Bytes left beside the weights."""


def load_each(
    store: Store, labels: Sequence[str], cache: Path, loader: ModelLoader, first_layer: int | None
) -> Iterator[tuple[str, LoadedCheckpoint | Exception]]:
    """The resident model with each checkpoint's weights, one after another, or why they cannot be had.

    The next one's weights are prefetched; its activations from `first_layer` on, too, unless that is None.
    """

    def load(label: str) -> tuple[Loaded, StoredActivations | None]:
        stored = store.activations(label)
        provenance = stored.whereabouts
        files = fetch(Checkpoint.recorded(provenance), cache, provenance)
        weights = loader.prefetch(files)  # hashed meanwhile, on other threads
        _refuse_other_weights(provenance, files)
        if first_layer is None:
            return weights, None
        stored.read_all(first_layer)
        return weights, stored

    for label, loaded in prefetch(labels, load):
        try:
            if isinstance(loaded, Exception):
                raise loaded
            weights, activations = loaded
            resident, memory = loader.load_weights(weights)
        except Exception as error:  # whatever is wrong with one checkpoint, the others go on
            yield label, error
            continue
        yield label, LoadedCheckpoint(resident, weights[0], activations, memory)


def each_outcome(
    checkpoints: Iterable[tuple[str, LoadedCheckpoint | Exception]], work: Callable[[str, LoadedCheckpoint], object]
) -> Iterator[Outcome]:
    """Do the `work` at every checkpoint; one that cannot be loaded, or whose work fails, has a problem."""
    for label, checkpoint in checkpoints:
        try:
            if isinstance(checkpoint, Exception):
                raise checkpoint
            work(label, checkpoint)
        except Exception as error:
            yield failed(label, error)
            continue
        yield Outcome(label)


def _refuse_other_weights(provenance: Mapping[str, Any], files: Files) -> None:
    cached = provenance["sha256"]
    if files.sha256 != cached:
        raise UserError(
            f"the weights in {files.directory} are not those that were cached (sha256 {_digests(files.sha256)} now, "
            f"{_digests(cached)} then); put them back, say --weights where they lie, or cache again with --overwrite"
        )


def _digests(sha256: dict[str, str]) -> str:
    return ", ".join(digest[:12] for digest in sorted(sha256.values()))

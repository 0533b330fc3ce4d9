"""The checkpoints of a store, one after another, with exactly the weights that were cached."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.fetch import fetch
from ..checkpoints.files import Files
from ..checkpoints.loader import Loaded, ModelLoader
from ..checkpoints.model import ResidentModel
from ..checkpoints.prefetch import prefetch
from ..checkpoints.resolve import Checkpoint
from ..runtime.errors import UserError
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
) -> Iterator[tuple[str, LoadedCheckpoint | UserError]]:
    """The resident model with each checkpoint's weights, one after another, or why they cannot be had.

    The next one's weights are prefetched; its activations from `first_layer` on, too, unless that is None.
    """
    indices = store.complete()

    def load(label: str) -> tuple[Loaded, StoredActivations | None]:
        files = fetch(_recorded(store, label), cache, store.provenance(label))
        _refuse_other_weights(store, label, files)
        activations = None if first_layer is None else store.activations(indices[label])
        if activations is not None and first_layer is not None:
            activations.read_all(first_layer)
        return loader.prefetch(files), activations

    for label, loaded in prefetch(labels, load):
        try:
            if isinstance(loaded, Exception):
                raise loaded
            weights, activations = loaded
            resident, memory = loader.load_weights(weights)
        except UserError as error:
            yield label, error
            continue
        yield label, LoadedCheckpoint(resident, weights[0], activations, memory)


def _recorded(store: Store, label: str) -> Checkpoint:
    """The checkpoint as the store records it, pinned to its commit."""
    fields = {name: value for name, value in store.provenance(label).items() if name not in ("sha256", "stamps")}
    return Checkpoint(**fields)


def _refuse_other_weights(store: Store, label: str, files: Files) -> None:
    cached = store.provenance(label)["sha256"]
    if files.sha256 != cached:
        raise UserError(
            f"the weights in {files.directory} are not those that were cached (sha256 {_digests(files.sha256)} now, "
            f"{_digests(cached)} then); put them back, or cache again with --overwrite"
        )


def _digests(sha256: dict[str, str]) -> str:
    return ", ".join(digest[:12] for digest in sorted(sha256.values()))

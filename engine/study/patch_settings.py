"""One patch: as the user asks for it, in words, and as it was carried out and is stored with the results."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .study import Arithmetic, Measure

Direction = Literal["denoise", "noise"]
Protocol = Literal["corrected", "published"]


@dataclass(frozen=True)
class PatchRequest:
    """One patch to be run on every checkpoint of a store, in the words of the command line."""

    subsets: tuple[str, ...] = ("even", "odd", "all", "each", "splits")
    """Words of the subset language."""

    layers: tuple[str, ...] = ("all",)
    joint: bool = False
    """Patch all the layers at once, with the same heads, instead of one after another."""

    positions: str = "last"
    direction: Direction = "denoise"
    dtype: Arithmetic | None = None
    """Arithmetic of the replay; None is the store's."""

    measures: tuple[Measure, ...] = ()
    """What is stored beside the logit difference."""

    generate: int = 0
    """Greedy tokens to generate from every patched run; none by default."""

    primary: tuple[str, ...] = ()
    """Hypotheses that are written into the run before anything is patched (`study.primary`)."""


@dataclass(frozen=True)
class PatchSettings:
    """What was patched and how: stored with the results as JSON."""

    protocol: Protocol = "corrected"
    direction: Direction = "denoise"
    """`denoise` patches clean z into the corrupt run; `noise` does the reverse."""

    positions: str = "last"
    layers: tuple[int, ...] = ()
    """Ascending; patched one at a time, or all at once where `joint`."""

    joint: bool = False
    subsets: tuple[str, ...] = ()
    """Words of the subset language."""

    dtype: Arithmetic = "float32"
    """Arithmetic of the replay."""

    measures: tuple[Measure, ...] = ()
    generate: int = 0
    """Greedy tokens generated from every patched run of the corrected protocol."""

    n_tokens: int = 0
    """Greedy tokens of a text of the published protocol."""

    n_groups: int = 1
    """Key/value groups, within and between which heads can be exchanged; 1 where every head has keys of its own."""

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> "PatchSettings":
        """The settings that `to_attributes` wrote; a field that did not exist then has its default."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in attributes.items()
        }
        return cls(**fields)

    def to_attributes(self) -> dict[str, Any]:
        """As JSON, without the fields that the protocol does not have.

        Fields that were added later are left out where they are unused: a run from before still has the same settings.
        """
        published = {"protocol", "layers", "subsets", "dtype", "n_tokens"}
        absent = {"n_tokens"} | {name for name in ("measures", "generate") if not getattr(self, name)}
        absent |= {"n_groups"} if self.n_groups == 1 else set()
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        names = published if self.protocol == "published" else values.keys() - absent
        return {name: value for name, value in values.items() if name in names}

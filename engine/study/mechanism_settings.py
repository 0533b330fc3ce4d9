"""What of the mechanism is measured, as it is kept beside the results.  Imports no torch and no zarr."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from .patch_settings import Direction
from .study import Arithmetic

Part = Literal["attribution", "attention", "weights", "patching", "roles"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Direct logit attribution, attention from the read position, QK and OV circuits of the weights, attribution patching
beside the exact effects, and the roles of heads: in the order in which they are measured."""


@dataclass(frozen=True)
class MechanismSettings:
    """What was measured and how: one record, kept with the results as JSON."""

    parts: tuple[Part, ...] = PARTS
    """Some of `PARTS`, in that order."""

    direction: Direction = "denoise"
    """Of the effects in `patching`: `denoise` patches clean z into the corrupt run; `noise` does the reverse."""

    positions: str = "last"
    """The read position: the last of the prompt is the only one measured."""

    dtype: Arithmetic = "float32"
    """Arithmetic of everything that is computed."""

    @classmethod
    def of_parts(cls, parts: Sequence[str], direction: Direction, dtype: Arithmetic) -> "MechanismSettings":
        """The settings with `parts` in the order of `PARTS`, each once."""
        return cls(tuple(part for part in PARTS if part in parts), direction, dtype=dtype)

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> "MechanismSettings":
        """What `to_attributes` gave."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in attributes.items()
        }
        return cls(**fields)

    def to_attributes(self) -> dict[str, Any]:
        """As JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

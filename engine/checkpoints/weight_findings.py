"""What can be wrong with the weights of a series: names and numbers; `report.findings.doctor` has the sentences."""

from collections.abc import Mapping
from dataclasses import dataclass

from .training_place import Place, place_at


@dataclass(frozen=True)
class NamedWeights:
    """One checkpoint's weights, as far as hashes tell."""

    label: str

    step: int
    """-1 where it is not known."""

    sha256: Mapping[str, str]
    """Weight file -> hex digest."""

    @property
    def place(self) -> Place:
        return place_at(self.label, self.step)


@dataclass(frozen=True)
class SameWeights:
    """Checkpoints of different steps whose weights, or one file of them, are the same bytes."""

    labels: tuple[str, ...]

    sha256: str
    """Of the file, or of the first of them."""

    shards: tuple[str, ...] = ()
    """The files that are the same, where others differ."""

    is_final: bool = False
    """Whether the final checkpoint is among them."""


@dataclass(frozen=True)
class NotTheLast:
    """`main` has a step's number, and other weights than that step."""

    label: str
    """Of the step that it should equal."""


@dataclass(frozen=True)
class Interval:
    """From one checkpoint to the next."""

    before: str
    after: str
    n_steps: int

    change: float
    """Norm of the difference over the norm before; NaN where no tensor is in both."""


@dataclass(frozen=True)
class SameTensors:
    """Checkpoints of different steps that share tensors."""

    labels: tuple[str, ...]

    names: tuple[str, ...]
    """Of the tensors that are the same bytes."""

    n_tensors: int
    """Matrices of one of them."""

    is_final: bool
    """Whether the final checkpoint is among them."""


@dataclass(frozen=True)
class HardlyMoves:
    """Weights that hardly change over an interval whose neighbours change them."""

    interval: Interval

    times_less: float
    """Than the intervals before and after it let expect."""


@dataclass(frozen=True)
class NotFinite:
    """A checkpoint with infinite weights, or weights that are no numbers."""

    label: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class MainDiffers:
    """`main` is not the last step: it may have been trained on, or be another model, unless it has the same step."""

    label: str
    """Of the last step."""

    change: float
    """Norm of the difference over the norm of the last step."""

    is_same_step: bool


WeightFinding = SameWeights | NotTheLast | SameTensors | HardlyMoves | NotFinite | MainDiffers

"""Load one checkpoint's weights after another into one resident model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig

from ..runtime.errors import UserError
from ..runtime.format import format_bytes, one_line, shorten
from ..runtime.resources import Machine, allow_tf32
from ..study.study import Arithmetic
from .architecture import read_config
from .files import CONFIG, GENERATION, LARGEST_JSON, Files, refuse_large
from .model import ResidentModel
from .plausible import refuse_implausible
from .weights import TORCH_DTYPES, Weights, bytes_of, most_bytes, read_weights, weight_bytes

Loaded = tuple[Files, Weights | None]
"""A checkpoint's files, and its weights where they could be read ahead of time."""

_OTHER_FILES = b"configuration_files"
"""A config with this field names further files that stand in its place."""


@dataclass(frozen=True)
class _Settings:
    """What a checkpoint says besides its weights.  Transformers takes 20 ms to read it, and in most series it is the
    same in every checkpoint, byte for byte."""

    content: tuple[bytes | None, ...]
    """Of config.json and generation_config.json; None where there is no such file."""

    config: PreTrainedConfig
    generation: GenerationConfig

    @classmethod
    def read(cls, directory: Path, known: "_Settings | None" = None) -> "_Settings":
        """Of the checkpoint in `directory`; `known` where its files hold the same.

        Raises `UserError` for a config that transformers does not know, and for settings that cannot be read.
        """
        content = tuple(_content(directory / name) for name in (CONFIG, GENERATION))
        if known is not None and content == known.content and _OTHER_FILES not in (content[0] or b""):
            return known
        config = read_config(directory)
        return cls(content, config, _greedy_generation(directory, config))


def _content(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    refuse_large(path, LARGEST_JSON)
    return path.read_bytes()


class ModelLoader:
    """Owns the resident model and the memory that weights are read into.

    Weights that are cast or moved are read into two sets of buffers in turn, one of which the model uses; into one set
    where memory has no room for two.
    """

    def __init__(self, dtype: Arithmetic, machine: Machine) -> None:
        allow_tf32(dtype == "tf32")
        self.dtype, self.machine = dtype, machine
        self._resident: ResidentModel | None = None
        self._settings: _Settings | None = None
        """Those of the resident model."""

        self._buffers: tuple[Weights, Weights] = ({}, {})

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    def prefetch(self, files: Files) -> Loaded:
        """Read weights while another checkpoint computes, where memory has room for both.

        Raises `UserError` for files that cannot be read.
        """
        memory = self.machine.memory
        if 2 * most_bytes(files, self.torch_dtype) > memory and 2 * weight_bytes(files, self.torch_dtype) > memory:
            return files, None
        self._buffers = self._buffers[::-1]
        return files, self._read(files)

    def load_weights(self, loaded: Loaded) -> tuple[ResidentModel, int]:
        """The resident model with the checkpoint's weights, and the memory that is left beside them, in bytes.

        Raises `UserError` where the weights do not fit into the memory or the architecture.
        """
        files, weights = loaded
        n_bytes = weight_bytes(files, self.torch_dtype) if weights is None else bytes_of(weights)
        if n_bytes >= self.machine.memory:
            raise UserError(
                f"the weights take {format_bytes(n_bytes)} in {self.dtype}, the {format_bytes(self.machine.memory)} "
                "allowed do not hold more; give more --memory, or a smaller --dtype"
            )
        settings = _Settings.read(files.config.parent, self._settings)
        refuse_implausible(files, settings.config, self.torch_dtype.itemsize, self.machine.memory)
        if self._resident is None or settings is not self._settings:
            self._settings = None  # until the resident is theirs
            self._resident = _resident(files, settings, self.dtype, self.machine.device, self._resident)
            self._settings = settings
        self._resident.load_weights(weights if weights is not None else self._read(files))
        return self._resident, self.machine.memory - n_bytes

    def _read(self, files: Files) -> Weights:
        return read_weights(files, self.torch_dtype, self.machine.device, self._buffers[0])


def open_resident_model(
    files: Files, dtype: Arithmetic, device: str, current: ResidentModel | None = None
) -> ResidentModel:
    """The `current` model where it has the architecture of the checkpoint's config, else a new one without weights.

    Raises `UserError` for a config that transformers does not know or a model that cannot be patched.
    """
    return _resident(files, _Settings.read(files.config.parent), dtype, device, current)


def _resident(
    files: Files, settings: _Settings, dtype: Arithmetic, device: str, current: ResidentModel | None
) -> ResidentModel:
    resident = current if current is not None and current.fits(settings.config) else None
    try:
        resident = resident or ResidentModel(settings.config, TORCH_DTYPES[dtype], device)
    except UserError as error:
        raise UserError(f"{files.config}: {error}") from error
    resident.model.generation_config = settings.generation
    return resident


def _greedy_generation(directory: Path, config: PreTrainedConfig) -> GenerationConfig:
    """Plain greedy decoding: of the checkpoint's own generation settings only the tokens that end a text are used."""
    path, end_tokens = directory / CONFIG, config.eos_token_id
    if (directory / GENERATION).is_file():
        path = directory / GENERATION
        refuse_large(path, LARGEST_JSON)
        try:
            end_tokens = GenerationConfig.from_pretrained(directory).eos_token_id
        except MemoryError:
            raise
        except Exception as error:  # transformers' own checks, on whatever values the file holds
            raise UserError(f"{path}: it cannot be read ({one_line(error)}); fetch it again, or remove it") from error
    tokens = end_tokens if isinstance(end_tokens, list) else [] if end_tokens is None else [end_tokens]
    if not all(type(token) is int and abs(token) < 2**31 for token in tokens):
        raise UserError(f"{path}: eos_token_id is {shorten(str(end_tokens), 40)}, where a token is a whole number")
    return GenerationConfig(eos_token_id=end_tokens)  # type: ignore[no-untyped-call]  # transformers leaves it untyped

"""Load one checkpoint's weights after another into one resident model."""

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
from .weights import TORCH_DTYPES, Weights, read_weights, weight_bytes

Loaded = tuple[Files, Weights | None]
"""A checkpoint's files, and its weights where they could be read ahead of time."""


class ModelLoader:
    """Owns the resident model and the memory that weights are read into.

    Weights that are cast or moved are read into two sets of buffers in turn, one of which the model uses; into one set
    where memory has no room for two.
    """

    def __init__(self, dtype: Arithmetic, machine: Machine) -> None:
        allow_tf32(dtype == "tf32")
        self.dtype, self.machine = dtype, machine
        self._resident: ResidentModel | None = None
        self._buffers: tuple[Weights, Weights] = ({}, {})

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    def prefetch(self, files: Files) -> Loaded:
        """Read weights while another checkpoint computes, where memory has room for both.

        Raises `UserError` for files that cannot be read.
        """
        if 2 * weight_bytes(files, self.torch_dtype) > self.machine.memory:
            return files, None
        self._buffers = self._buffers[::-1]
        return files, self._read(files)

    def load_weights(self, loaded: Loaded) -> tuple[ResidentModel, int]:
        """The resident model with the checkpoint's weights, and the memory that is left beside them, in bytes.

        Raises `UserError` where the weights do not fit into the memory or the architecture.
        """
        files, weights = loaded
        n_bytes = weight_bytes(files, self.torch_dtype)
        if n_bytes >= self.machine.memory:
            raise UserError(
                f"the weights take {format_bytes(n_bytes)} in {self.dtype}, the {format_bytes(self.machine.memory)} "
                "allowed do not hold more; give more --memory, or a smaller --dtype"
            )
        refuse_implausible(files, read_config(files.config.parent), self.torch_dtype.itemsize, self.machine.memory)
        self._resident = open_resident_model(files, self.dtype, self.machine.device, self._resident)
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
    config = read_config(files.config.parent)
    resident = current if current is not None and current.fits(config) else None
    try:
        resident = resident or ResidentModel(config, TORCH_DTYPES[dtype], device)
    except UserError as error:
        raise UserError(f"{files.config}: {error}") from error
    resident.model.generation_config = _greedy_generation(files.config.parent, config)
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

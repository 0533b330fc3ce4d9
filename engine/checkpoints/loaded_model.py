"""A model that is loaded already, as a checkpoint on disk: what replay needs again, also in a later process."""

import copy
import hashlib
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..runtime.durable import rename, sync
from ..runtime.errors import UserError
from ..runtime.file_lock import hold
from .files import CONFIG, VOCABULARY, sha256

FOLDER = "models"
"""Where such checkpoints are kept, below the cache folder."""


def save_loaded_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Path) -> Path:
    """Write the weights that `model` holds now, and what goes with them, as a checkpoint; returns its directory.

    The directory is called after the model and the hash of its weights: the same weights are written once, others
    elsewhere.  It is there whole or not at all, whatever happens meanwhile.  The model is only read; its hooks,
    attention implementation and training mode play no part.
    Raises `UserError` for a tokenizer that tells no character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("tokenizer: it tells no character offsets; pass a fast one, of AutoTokenizer.from_pretrained")
    folder = cache / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:  # one process after another: what lies there half written is a killed one's
        hold(stack, cache / f".{FOLDER}.lock", patience=-1)
        for leftover in folder.glob(".*.partial"):
            shutil.rmtree(leftover)
        partial = folder / ".saving.partial"
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        partial.mkdir()
        weights = partial / "model.safetensors"
        save_file(_distinct_tensors(model), weights, metadata={"format": "pt"})
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = model.dtype
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not any((partial / name).is_file() for name in VOCABULARY):
            raise UserError(
                "tokenizer: it cannot be saved as tokenizer.json; pass one that transformers can load again"
            )
        directory = folder / f"{_name(model)}-{_digest(partial)}"
        if not directory.exists():
            sync(partial)
            rename(partial, directory)
    return directory


def _distinct_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every parameter and buffer once, on the CPU: what is tied is found again by the configuration."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def _name(model: PreTrainedModel) -> str:
    """`pythia-160m`, or the kind of model where it was made here."""
    return Path(model.name_or_path or "").name or str(model.config.model_type)


def _digest(directory: Path) -> str:
    """Of weights and configuration, shortened: other numbers or another architecture are another checkpoint."""
    both = sha256(directory / "model.safetensors") + sha256(directory / CONFIG)
    return hashlib.sha256(both.encode()).hexdigest()[:12]


def is_loaded_model(model: Any) -> bool:
    """Whether `model` is a loaded model rather than a name."""
    return isinstance(model, PreTrainedModel)

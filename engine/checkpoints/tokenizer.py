"""A checkpoint's own tokenizer."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..runtime.errors import UserError
from ..runtime.format import one_line


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in `directory`.  Raises `UserError` when transformers cannot load it."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(
            f"the tokenizer in {directory} cannot be loaded ({one_line(error)}); put another there"
        ) from error

"""A checkpoint's own tokenizer."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..runtime.errors import UserError
from ..runtime.format import one_line
from .files import BESIDE_WEIGHTS, LARGEST_VOCABULARY, refuse_large


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in `directory`.  Raises `UserError` when transformers cannot load it.

    Python code that the directory brings along is never run.
    """
    for name in BESIDE_WEIGHTS:
        if (directory / name).is_file():
            refuse_large(directory / name, LARGEST_VOCABULARY)
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    # Whatever the files hold, it is read by transformers and tokenizers, which raise anything: bare Exception,
    # AttributeError, IndexError, and for a panic in Rust a BaseException of its own.
    except Exception as error:
        raise _load_error(directory, error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise _load_error(directory, error) from error


def _load_error(directory: Path, error: BaseException) -> UserError:
    reason = f"{type(error).__name__}: {one_line(error)}"
    if "trust_remote_code" in str(error):
        reason = "it comes with Python code of its own, which is never run"
    return UserError(f"the tokenizer in {directory} cannot be loaded ({reason}); put another there")

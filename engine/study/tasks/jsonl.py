"""A task of the user's own: a JSON Lines file with one contrast per line."""

import difflib
import hashlib
import json
import re
from pathlib import Path

from ...runtime.errors import UserError
from .contrast import FIELDS, FORM, Contrast
from .registry import TASKS


def read_contrasts(task: str) -> list[Contrast]:
    """The contrasts of a JSON Lines file, in order.  Raises `UserError` naming line, problem and remedy."""
    try:
        lines = _read(task).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"line {line} of {task}: not UTF-8 text; save the file as UTF-8") from None
    contrasts = [_parse(line, f"line {n} of {task}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not contrasts:
        raise UserError(f"--task {task}: the file is empty; write one {FORM} a line")
    return contrasts


def file_digest(task: str) -> str:
    """sha256 of the file's bytes in hex."""
    return hashlib.sha256(_read(task)).hexdigest()


def _read(task: str) -> bytes:
    try:
        return Path(task).read_bytes()
    except IsADirectoryError:
        raise UserError(f"--task {task}: a directory; name the JSON Lines file in it") from None
    except (FileNotFoundError, NotADirectoryError):
        similar = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"did you mean {similar[0]}? " if similar else ""
        choice = f"built in are {', '.join(TASKS)}; a file holds one {FORM} a line"
        raise UserError(f"--task {task}: no built-in task and no such file; {hint}{choice}") from None
    except OSError as error:
        raise UserError(f"--task {task}: cannot be read ({error.strerror}); name a readable JSON Lines file") from None


def _parse(line: str, source: str) -> Contrast:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        detail = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{source}: not JSON ({detail}); write one {FORM} a line") from None
    if not isinstance(fields, dict):
        raise UserError(f"{source}: not a JSON object; write one {FORM} a line")
    if missing := [name for name in FIELDS if name not in fields]:
        raise UserError(f"{source}: {', '.join(missing)} missing; write all of {', '.join(FIELDS)}")
    if unknown := [name for name in fields if name not in FIELDS]:
        raise UserError(f"{source}: unknown field {', '.join(map(repr, unknown))}; known are {', '.join(FIELDS)}")
    for name in FIELDS:
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        if not isinstance(fields[name], str) or not fields[name] or re.search("[\ud800-\udfff]", fields[name]):
            raise UserError(f"{source}: {name} is {json.dumps(fields[name]):.60}; write some text, in quotes")
    if fields["answer"] == fields["wrong"]:
        raise UserError(f"{source}: answer and wrong are both {fields['answer']!r}; write two different ones")
    return Contrast(**fields, source=source)

"""A task of the user's own: a JSON Lines file with one contrast per line."""

import difflib
import hashlib
import json
import os
import re
import stat
from pathlib import Path

from ...runtime.errors import UserError
from ...runtime.format import format_bytes, format_names, parse_json, shorten
from .contrast import FIELDS, FORM, Contrast
from .registry import TASKS

LARGEST_FILE, MOST_LINES, LONGEST_LINE = 64_000_000, 100_000, 1_000_000
"""Bytes, lines and bytes of one line; beyond them a file is refused before it is read into memory or parsed."""


def read_contrasts(task: str) -> list[Contrast]:
    """The contrasts of a JSON Lines file, in order.  Raises `UserError` naming line, problem and remedy."""
    content = _read(task)
    if (n_lines := content.count(b"\n")) > MOST_LINES:
        raise UserError(f"--task {task}: {n_lines:,} lines, the most are {MOST_LINES:,}; take a sample of them")
    try:
        lines = content.decode("utf-8-sig").split("\n")
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
    if "\0" in task:
        raise UserError(f"--task {task!r}: no file can have that name; name a JSON Lines file")
    try:
        _refuse_endless(task, os.stat(task))
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


def _refuse_endless(task: str, status: os.stat_result) -> None:
    # A pipe or a device would be read for ever, or only once.
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise UserError(f"--task {task}: neither a built-in task nor a file; write the pairs into a file")
    if status.st_size > LARGEST_FILE:
        sizes = f"{format_bytes(status.st_size)}, the most are {format_bytes(LARGEST_FILE)}"
        raise UserError(f"--task {task}: {sizes}; take fewer or shorter prompt pairs")


def _parse(line: str, source: str) -> Contrast:
    if len(line) > LONGEST_LINE:
        raise UserError(f"{source}: {len(line):,} characters, the most are {LONGEST_LINE:,}; write shorter prompts")
    try:
        fields = parse_json(line)
    except ValueError as error:
        detail = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{source}: not JSON ({detail}); write one {FORM} a line") from None
    if not isinstance(fields, dict):
        raise UserError(f"{source}: not a JSON object; write one {FORM} a line")
    if missing := [name for name in FIELDS if name not in fields]:
        raise UserError(f"{source}: {', '.join(missing)} missing; write all of {', '.join(FIELDS)}")
    if unknown := [name for name in fields if name not in FIELDS]:
        names = format_names([shorten(repr(name), 40) for name in unknown])
        raise UserError(f"{source}: unknown field {names}; known are {', '.join(FIELDS)}")
    for name in FIELDS:
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        if not isinstance(fields[name], str) or not fields[name] or re.search("[\ud800-\udfff]", fields[name]):
            raise UserError(f"{source}: {name} is {json.dumps(fields[name]):.60}; write some text, in quotes")
    if fields["answer"] == fields["wrong"]:
        raise UserError(
            f"{source}: answer and wrong are both {shorten(repr(fields['answer']), 60)}; write two different ones"
        )
    return Contrast(**fields, source=source)

"""`--help` as plain text: a name, then what it does, in two columns; the same on a terminal and in a pipe."""

import re
import textwrap
from typing import Any

from cyclopts.help import HelpEntry, HelpPanel
from rich.console import Console, ConsoleOptions

WIDTH = 100
"""Columns, or as many as a narrower terminal has."""

COLUMN = 26
"""Where descriptions start."""


class HelpText:
    """The formatter that cyclopts calls for every group of commands or options."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        if not panel.entries:
            return
        lines = [f"{panel.title}:"]
        for entry in panel.entries:
            lines += _entry(entry, _width(console))
        _print(console, [*lines, ""])

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        _print(console, [f"usage: {_plain(usage).strip()}", ""])

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        if text := _plain(description):
            _print(console, [*_wrapped(text, _width(console)), ""])


def _entry(entry: HelpEntry, width: int) -> list[str]:
    name = "  " + " ".join(entry.display_labels_with_metavar or entry.all_options)
    text = _plain(entry.description)
    if entry.choices and not all(choice in text for choice in entry.choices):
        text += f" [{', '.join(entry.choices)}]"
    first, *others = _wrapped(text, width - COLUMN) or [""]
    beside = len(name) < COLUMN - 1
    lines = [f"{name:<{COLUMN}}{first}"] if beside else [name, " " * COLUMN + first]
    return [line.rstrip() for line in [*lines, *(" " * COLUMN + line for line in others)]]


def _wrapped(text: str, width: int) -> list[str]:
    """Paragraphs of a docstring, each reflowed; what stands indented is left as it is."""
    lines = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if paragraph.startswith("    "):
            lines += ["", *paragraph.splitlines()]
        else:
            lines += textwrap.wrap(" ".join(paragraph.split()), width, break_on_hyphens=False, break_long_words=False)
    return lines


def _width(console: Console) -> int:
    return WIDTH if not console.is_terminal else min(WIDTH, console.width)


def _plain(text: Any) -> str:
    """What cyclopts wraps in rich's classes."""
    text = getattr(text, "primary_renderable", text)
    return str(getattr(text, "plain", text if text is not None else ""))


def _print(console: Console, lines: list[str]) -> None:
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)

"""Templates of checkpoints' names: `stage1-step{step}-*`, `hf_ckpt/{tokens}`, `TinyLlama-1.1B-step-{step}-{tokens}`.

A field stands for what differs between the checkpoints of one training, `*` for anything else.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from ..runtime.errors import UserError
from .training_place import AMOUNT, Place, number_of, read_place

FIELDS = {"stage": r"[^/]+?", "step": AMOUNT, "epoch": AMOUNT, "tokens": AMOUNT}
"""What a field of a template stands for."""

_FIELD = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True)
class Template:
    """A name with fields in it.  Raises `UserError` for a field that there is not, or that comes twice."""

    text: str

    option: str
    """Where it was given, for errors: `--model`."""

    def __post_init__(self) -> None:
        names = _FIELD.findall(self.text)
        if unknown := [name for name in names if name not in FIELDS]:
            known = ", ".join(f"{{{name}}}" for name in FIELDS)
            raise UserError(f"{self.option} {self.text}: {{{unknown[0]}}} is no field; there are {known}")
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{self.option} {self.text}: {{{twice[0]}}} comes twice; write * for one of them")

    @property
    def is_fixed(self) -> bool:
        """Whether it names one place alone."""
        return not _FIELD.search(self.text) and "*" not in self.text

    @property
    def fixed_start(self) -> str:
        """What every name begins with."""
        return re.split(r"[{*]", self.text)[0]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pieces = re.split(r"(\{\w+\}|\*)", self.text)
        return re.compile("".join(map(_piece, pieces)), re.IGNORECASE)

    def read(self, name: str) -> Place | None:
        """The place in training that a name has by this template; None for a name that it does not fit.

        What the template has no field for is read as in any name.
        """
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        fields, place = match.groupdict(), read_place(name)
        step, tokens = fields.get("step") or fields.get("epoch"), fields.get("tokens")
        return Place(
            stage=fields.get("stage", place.stage),
            step=place.step if step is None else number_of(step),
            tokens=place.tokens if tokens is None else number_of(tokens),
            seed=place.seed,
        )

    def short(self, name: str) -> str:
        """The folders of a name that differ between checkpoints: `16.78B` of `hf_ckpt/16.78B`."""
        folders = zip(self.text.split("/"), name.split("/"), strict=True)
        return "/".join(folder for template, folder in folders if not Template(template, self.option).is_fixed)


def without_fields(text: str) -> str:
    """What is left of a template without its fields, for a file's name: `stage1-step` of `stage1-step{step}-*`."""
    return re.sub(r"[-_./ ]{2,}", "-", _FIELD.sub("", text).replace("*", "").replace("/", "-")).strip("-_. ")


def _piece(text: str) -> str:
    if text == "*":
        return "[^/]*"
    field = _FIELD.fullmatch(text)
    return f"(?P<{field[1]}>{FIELDS[field[1]]})" if field else re.escape(text)

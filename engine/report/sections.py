"""What stands on the page, in its order: sections, and the findings that each of them shows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .findings.finding import Finding

TEMPLATES = Path(__file__).parent / "sections"
"""What a section shows besides findings: `NAME.html.j2`, where there is one."""

ALWAYS = {"timeline", "threats", "method", "provenance"}
"""Sections that have something to say of every run."""


@dataclass(frozen=True)
class Section:
    """One section of the page."""

    name: str
    """Its anchor."""

    short: str
    """Its title in the list of contents."""

    takes: tuple[str, ...] = ()
    """Names of the findings that it shows, in this order."""

    title: str = ""
    """Its heading; where empty, that of its only finding."""

    findings: tuple[Finding, ...] = ()

    @property
    def heading(self) -> str:
        return self.title or self.findings[0].title

    @property
    def template(self) -> str | None:
        """The file of what it shows besides its findings."""
        file = f"{self.name}.html.j2"
        return f"{TEMPLATES.name}/{file}" if (TEMPLATES / file).exists() else None


SECTIONS = (
    Section("beforehand", "Named beforehand", ("primary",)),
    Section("timeline", "Timeline", ("onsets", "rates", "measures", "answers"), "Timeline"),
    Section("even-odd", "Even and odd", ("parity",)),
    Section("together", "Heads together", ("shapley", "sizes", "pairs", "energy"), "Heads together"),
    Section("mechanism", "Mechanism and roles", ("mechanism", "roles"), "Mechanism and roles"),
    Section("study", "Published study", ("hypotheses",), "The published study"),
    Section("threats", "Threats to validity", (), "Threats to validity"),
    Section("method", "Method", (), "Method"),
    Section("provenance", "Provenance", (), "Provenance"),
)


def arrange(shown: Sequence[Finding], besides: Sequence[str] = ()) -> list[Section]:
    """The sections of a page with these findings; those named in `besides` have something to show without any."""
    by_name = {finding.name: finding for finding in shown}
    taken = {name for section in SECTIONS for name in section.takes}
    assert set(by_name) <= taken, f"no section shows {set(by_name) - taken}"
    filled = [
        replace(section, findings=tuple(by_name[name] for name in section.takes if name in by_name))
        for section in SECTIONS
    ]
    return [section for section in filled if section.findings or section.name in ALWAYS.union(besides)]

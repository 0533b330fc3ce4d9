"""What is publicly known to be wrong with checkpoints on the hub, so that it is said before they are fetched.

Each entry has its source.  They were reported, and may have been repaired since: `headlapse doctor --model` asks the
hub what it serves today.
"""

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..runtime.format import format_names
from .resolve import Checkpoint

logger = logging.getLogger(__name__)

_PYTHIA_ISSUES = "https://github.com/EleutherAI/pythia/issues"
_LATE_STEPS_OF_2_8B = (
    *range(54000, 60000, 1000), *range(60000, 66000, 1000), 70000, 80000, 90000, 100000, 103000, 110000, 120000,
    130000, 140000, 143000,
)  # fmt: skip
_EARLY_STEPS = (0, *(2**k for k in range(10)))


@dataclass(frozen=True)
class KnownProblem:
    """Something reported of some revisions of a repository."""

    repos: str
    """Names of the repositories, as a regular expression."""

    labels: frozenset[str]
    """The revisions concerned."""

    what: str
    remedy: str
    source: str

    def concerns(self, repo: str, labels: Collection[str]) -> list[str]:
        """Those of the revisions `labels` of a repository that are concerned, in their order."""
        return [label for label in labels if label in self.labels] if re.fullmatch(self.repos, repo) else []


def _steps(*steps: int) -> frozenset[str]:
    return frozenset(f"step{step}" for step in steps)


KNOWN = (
    KnownProblem(
        r"EleutherAI/pythia-2\.8b",
        _steps(*_EARLY_STEPS, *range(1000, 54000, 1000), *_LATE_STEPS_OF_2_8B) | {"main"},
        "86 of the 154 steps serve weights from the end of training, 76 of them those of main, which are not those of "
        "step143000",
        "use another size for the course of training, or only the steps that are not concerned",
        f"{_PYTHIA_ISSUES}/205",
    ),
    KnownProblem(
        r"EleutherAI/pythia-12b",
        _steps(50000, 58000),
        "the first shard (embeddings and early layers) is the final checkpoint's",
        "leave these steps out",
        f"{_PYTHIA_ISSUES}/206",
    ),
    KnownProblem(
        r"EleutherAI/pythia-.*",
        _steps(0, 1, 2),
        "step0, step1 and step2 have the same weights in all Pythia models",
        "keep one of them, or read no change into them",
        f"{_PYTHIA_ISSUES}/83 and {_PYTHIA_ISSUES}/198",
    ),
    KnownProblem(
        r"EleutherAI/pythia-160m-weight-seed[12]",
        _steps(0),
        "the later steps do not continue from step0, whose initial weights are others",
        "leave step0 out",
        f"{_PYTHIA_ISSUES}/203",
    ),
    *(
        KnownProblem(
            f"EleutherAI/pythia-410m-seed{seed}",
            _steps(step),
            "the revision has no weights",
            "leave it out",
            f"{_PYTHIA_ISSUES}/202",
        )
        for seed, step in ((2, 111000), (6, 88000), (9, 40000))
    ),
    KnownProblem(
        r"allenai/OLMo-2-1124-7B",
        frozenset({"stage1-step101000-tokens424B", "stage1-step175000-tokens735B", "stage1-step300000-tokens1259B"}),
        "these three revisions have the same weights",
        "leave them out",
        "https://github.com/allenai/OLMo/issues/915",
    ),
)
"""In the order in which they are said."""


@dataclass(frozen=True)
class Concern:
    """A known problem of revisions that are wanted."""

    problem: KnownProblem
    repo: str
    labels: tuple[str, ...]

    def __str__(self) -> str:
        """In one line: what is known of which revisions, what to do, and where it was reported."""
        which = f"{self.repo} {format_names(self.labels)}"
        return f"{which}: {self.problem.what}; {self.problem.remedy} (reported in {self.problem.source})"


def concerns(repo: str, labels: Sequence[str]) -> list[Concern]:
    """Known problems of the revisions `labels` of a repository."""
    found = [(problem, problem.concerns(repo, labels)) for problem in KNOWN]
    return [Concern(problem, repo, tuple(concerned)) for problem, concerned in found if concerned]


def warn(checkpoints: Sequence[Checkpoint]) -> None:
    """Log a line for each known problem of checkpoints that are about to be fetched."""
    for model in dict.fromkeys(checkpoint.location for checkpoint in checkpoints):
        for concern in concerns(model, [each.label for each in checkpoints if each.location == model]):
            logger.warning("%s", concern)

"""What the hub serves under each revision of a repository: hashes of all weight files, asked for without a download."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..runtime.errors import UserError
from ..runtime.format import one_line
from . import hub
from .same_weights import by_form
from .series import published
from .weight_findings import NamedWeights

_REQUESTS_AT_ONCE = 8


@dataclass(frozen=True)
class Served:
    """What a repository serves."""

    weights: tuple[NamedWeights, ...]
    """Of every revision that has any."""

    without_weights: tuple[str, ...]
    """Revisions that are named after a step and hold no weights."""

    unanswered: dict[str, str]
    """Revision -> why the hub did not say what it holds."""


def ask(repo: str, begin: Callable[[int], Callable[[int], object]]) -> Served:
    """What the hub says of every branch and tag of a repository.

    `begin` is told how many there are, and gives what is then called with 1 after each.  Raises `UserError` where the
    repository cannot be had, or nothing is said of any revision.
    """
    places = published(repo)
    advance = begin(len(places))

    def look_up(label: str) -> hub.Revision | str:
        try:
            return hub.look_up(repo, label)
        except hub.NoRevision:
            return "it was removed meanwhile"
        except UserError as error:
            return one_line(error)
        finally:
            advance(1)

    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        answers = dict(zip(places, pool.map(look_up, places), strict=True))
    unanswered = {label: answer for label, answer in answers.items() if isinstance(answer, str)}
    if len(unanswered) == len(answers) > 0:
        raise UserError(next(iter(unanswered.values())))
    weights = {
        label: _weights(label, places[label].step, answer)
        for label, answer in answers.items()
        if isinstance(answer, hub.Revision)
    }
    return Served(
        tuple(each for each in weights.values() if each.sha256),
        tuple(label for label, each in weights.items() if not each.sha256 and each.step >= 0),
        unanswered,
    )


def _weights(label: str, step: int, revision: hub.Revision) -> NamedWeights:
    """The hashes of a revision's weight files in every form; the hub knows those of large files only."""
    sha256 = {name: file.sha256 for name, file in revision.files.items() if file.sha256}
    return NamedWeights(
        label, step, {name: digest for form in by_form(sha256).values() for name, digest in form.items()}
    )

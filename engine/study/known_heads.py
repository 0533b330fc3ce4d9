"""Heads that the literature found in public models, as facts to compare with.  Imports no torch and no zarr.

A head is (layer, head), both from 0, as the papers and their models count.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from .role_settings import Role

CheckName = Literal["ioi", "greater-than", "induction"]
CHECKS: tuple[CheckName, ...] = get_args(CheckName)

GPT2 = "openai-community/gpt2"
PYTHIA = "EleutherAI/pythia-70m"


@dataclass(frozen=True)
class KnownHeads:
    """Heads that a paper found, and by which of our numbers they should stand out from all others."""

    name: str
    heads: tuple[tuple[int, int], ...]
    by: Role | Literal["effect"]
    """The score of a role, or the size of the effect of patching the head alone at the last position, in nats."""

    source: str
    lowest: bool = False
    """Whether their scores should be the lowest."""


@dataclass(frozen=True)
class KnownOnset:
    """When in training the first head takes a role on."""

    role: Role
    after: int
    by: int
    """Steps."""

    source: str


@dataclass(frozen=True)
class Check:
    """One question to one public model, and what the literature says of the answer."""

    name: CheckName
    model: str
    task: str
    checkpoints: tuple[str, ...]
    heads: tuple[KnownHeads, ...] = ()
    onsets: tuple[KnownOnset, ...] = ()


WANG = "Wang et al. 2023, arXiv:2211.00593"
HANNA = "Hanna et al. 2023, arXiv:2305.00586"
OLSSON = "Olsson et al. 2022, arXiv:2209.11895"
GOULD = "Gould et al. 2023, arXiv:2312.09230"

NAME_MOVERS = ((9, 9), (10, 0), (9, 6))
NEGATIVE_NAME_MOVERS = ((10, 7), (11, 10))
S_INHIBITION = ((7, 3), (7, 9), (8, 6), (8, 10))

KNOWN: dict[CheckName, Check] = {
    "ioi": Check(
        "ioi",
        GPT2,
        "ioi",
        ("main",),
        (
            KnownHeads("name mover", NAME_MOVERS, "name mover", WANG),
            KnownHeads("negative name mover", NEGATIVE_NAME_MOVERS, "name mover", WANG, lowest=True),
            KnownHeads("S-inhibition", S_INHIBITION, "S-inhibition", WANG),
            KnownHeads("induction", ((5, 5), (5, 8), (5, 9), (6, 9)), "induction", WANG),
            KnownHeads("duplicate token", ((0, 1), (0, 10), (3, 0)), "duplicate token", WANG),
            KnownHeads("previous token", ((2, 2), (4, 11)), "previous token", WANG),
            KnownHeads("successor", ((9, 1),), "successor", GOULD),
            KnownHeads("effect", NAME_MOVERS + NEGATIVE_NAME_MOVERS + S_INHIBITION, "effect", WANG),
        ),
    ),
    "greater-than": Check(
        "greater-than",
        GPT2,
        "greater-than",
        ("main",),
        (KnownHeads("effect", ((5, 5), (6, 1), (6, 9), (7, 10), (8, 11), (9, 1)), "effect", HANNA),),
    ),
    "induction": Check(
        "induction",
        PYTHIA,
        "induction",
        ("step256", "step512", "step1000", "step2000", "step3000", "step4000", "step8000", "step143000"),
        # Between 2.5e9 and 5e9 tokens, of which Pythia sees 2,097,152 a step.
        onsets=(KnownOnset("induction", 1192, 2384, OLSSON),),
    ),
}

"""Sudden, gradual or neither: which curve a mean over training follows.  Pure."""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .bootstrap import LEVEL, noise_of_means
from .drops import turns

MARGIN, POSITIVE = 6.0, 2.0
"""Of BIC, strong and positive evidence (Kass and Raftery 1995): the first between sudden and gradual, the second for or
against a constant, which cannot lead by more than its fewer parameters."""

GAP = 0.1
"""Share of the range covered within which a change is sudden, and above which an unobserved stretch hides which."""

NON_MONOTONE = "non-monotone"

STEEPEST, WIDEST = 0.005, 0.5
"""Widths of a logistic rise that are tried, as shares of the range covered."""

DIVIDE = GAP / (2 * np.log(9))
"""The width at which a logistic curve takes `GAP` of the range from a tenth to nine tenths of its rise."""

SCANS = 999
"""Resamples by which a change is distinguished from noise."""


@dataclass(frozen=True)
class Shape:
    """How a mean changes over training."""

    verdict: str
    """`sudden`, `gradual`, `non-monotone`, `none` or `undecided`."""

    bic: dict[str, float]
    """Of the best constant, of a step and a steep logistic curve (sudden), of a line and a slow logistic curve
    (gradual); the smaller, the better."""

    gap: float
    """Share of the range covered in which the best step lies, unobserved."""

    changes: bool = True
    """Whether it changes by more than other prompts would (`changes`)."""


@dataclass(frozen=True, eq=False)
class Family:
    """Curves over given places, each centred and of length one, so that a fit is one product."""

    steps: Float[np.ndarray, "step checkpoint"]
    steep: Float[np.ndarray, "steep checkpoint"]
    line: Float[np.ndarray, "one checkpoint"]
    slow: Float[np.ndarray, "slow checkpoint"]


def evaluate_shape(x: Float[np.ndarray, " checkpoint"], values: Float[np.ndarray, "checkpoint trial"]) -> Shape:
    """Compare a constant with sudden and with gradual changes by BIC (Schwarz 1978), fitted to the means.

    Sudden are a step and logistic curves that rise within `GAP` of the range covered, gradual a line and slower
    logistic curves.  Residuals are normal, of a variance that is at least the sampling variance of the means, so that
    no curve is praised for following noise.  `none`: the constant is better than all others by `POSITIVE`.  `sudden`,
    `gradual`: better than the other by `MARGIN`, and than the constant by `POSITIVE`; a sudden change lies between
    checkpoints that are close as well, for where they are not, nobody looked.  Everything else is `undecided`, and so
    is a change that other prompts might not show (`changes`).  `non-monotone`: whatever fits best, the mean surely goes
    up and surely goes down (`drops.turns`), which no curve that is tried does.
    """
    n = len(x)
    if n < 4 or np.ptp(x) == 0:
        return Shape("undecided", {}, 1.0)
    y, family = values.mean(1), _family(tuple(x.tolist()))
    floor = max(sampling_variance(values), float(1e-9 + 1e-6 * np.abs(y).max()) ** 2)
    around = y - y.mean()
    total = float((around**2).sum())

    def bic(explained: float, n_parameters: int) -> float:
        residual = max(total - explained, 0.0)
        variance = max(residual / n, floor)
        return float(n * np.log(variance) + residual / variance + n_parameters * np.log(n))

    steps = (family.steps @ around) ** 2
    jump = int(steps.argmax()) + 1
    bics = {
        "constant": bic(0.0, 1),
        "step": bic(float(steps.max()), 3),
        "steep": bic(float(((family.steep @ around) ** 2).max()), 4),
        "line": bic(float(((family.line @ around) ** 2)[0]), 2),
        "slow": bic(float(((family.slow @ around) ** 2).max()), 4),
    }
    gap = float((x[jump] - x[jump - 1]) / np.ptp(x))
    if turns(values):
        return Shape(NON_MONOTONE, bics, gap)
    verdict, surely = _verdict(bics, gap), True
    if verdict in ("sudden", "gradual"):
        surely = changes(x, values)
    return Shape(verdict if surely else "undecided", bics, gap, surely)


def sampling_variance(values: Float[np.ndarray, "checkpoint trial"]) -> float:
    """Of the mean at a checkpoint beside the others, averaged over checkpoints; zero for one prompt.

    Prompts that differ by as much at every checkpoint move all means alike and change no shape, so that only the
    interaction of prompt and checkpoint counts (two-way analysis of variance: Fisher 1925).
    """
    n_checkpoints, n = values.shape
    if n < 2 or n_checkpoints < 2:
        return 0.0
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    return float((rest**2).sum() / ((n - 1) * (n_checkpoints - 1)) / n)


def changes(x: Float[np.ndarray, " checkpoint"], values: Float[np.ndarray, "checkpoint trial"]) -> bool:
    """Whether a step anywhere, or a line, fits better than it fits 95 % of the noise over prompts.

    A maximum over contrasts compared with its own bootstrap (Westfall and Young 1993, chapter 2), which keeps the
    prompts' own ways through training, however correlated; certain for one prompt, of which there is no noise.
    """
    family = _family(tuple(x.tolist()))
    contrasts = np.concatenate([family.steps, family.line])
    by_chance = np.abs(contrasts @ noise_of_means(values, SCANS)).max(0)
    return bool(np.abs(contrasts @ values.mean(1)).max() > np.quantile(by_chance, LEVEL))


def _verdict(bic: dict[str, float], gap: float) -> str:
    sudden, gradual = min(bic["step"], bic["steep"]), min(bic["line"], bic["slow"])
    lead = min(sudden, gradual) - bic["constant"]
    if abs(lead) < POSITIVE:
        return "undecided"
    if lead > 0:
        return "none"
    if gradual <= sudden - MARGIN:
        return "gradual"
    return "sudden" if sudden <= gradual - MARGIN and gap <= GAP else "undecided"


@functools.lru_cache(maxsize=4)
def _family(places: tuple[float, ...]) -> Family:
    x = np.array(places)
    steep, slow = _logistic(x, np.geomspace(STEEPEST, DIVIDE, 4)), _logistic(x, np.geomspace(DIVIDE, WIDEST, 10)[1:])
    return Family(_unit((x >= x[1:, None]).astype(float)), _unit(steep), _unit(x[None]), _unit(slow))


def _unit(curves: Float[np.ndarray, "curve checkpoint"]) -> Float[np.ndarray, "curve checkpoint"]:
    """Centred and of length one; a constant becomes zero and explains nothing."""
    centred = curves - curves.mean(1, keepdims=True)
    length = np.sqrt((centred**2).sum(1, keepdims=True))
    return np.where(length > 1e-9, centred, 0) / np.where(length > 1e-9, length, 1)


def _logistic(
    x: Float[np.ndarray, " checkpoint"], widths: Float[np.ndarray, " width"]
) -> Float[np.ndarray, "curve checkpoint"]:
    """Rises about every place between and at checkpoints."""
    middles = np.union1d(x, (x[1:] + x[:-1]) / 2)
    slopes = (x - middles[:, None])[None] / (np.ptp(x) * widths[:, None, None])
    curves: Float[np.ndarray, "curve checkpoint"] = (1 / (1 + np.exp(-np.clip(slopes, -50, 50)))).reshape(-1, len(x))
    return curves

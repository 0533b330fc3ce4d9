"""Sudden, gradual or neither: which curve a mean over training follows.  Pure."""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from headlapse.engine.statistics.intervals import LEVEL, noise_of_means

MARGIN = 6.0
"""Of BIC between verdicts: strong evidence (Kass and Raftery 1995)."""

GAP = 0.1
"""Share of the range covered above which an unobserved stretch may hide anything."""

WIDTHS = 12
"""Widths of a logistic rise that are tried."""

SCANS = 999
"""Resamples by which a change is told from noise."""


@dataclass(frozen=True)
class Shape:
    """How a mean changes over training."""

    verdict: str
    """`sudden`, `gradual`, `none` or `undecided`."""

    bic: dict[str, float]
    """Of the best constant, step, line and logistic curve; the smaller, the better."""

    gap: float
    """Share of the range covered in which the best step lies, unobserved."""

    changes: bool = True
    """Whether it changes by more than other prompts would (`changes`)."""


@dataclass(frozen=True, eq=False)
class Family:
    """Curves over given places, each centred and of length one, so that a fit is one product."""

    steps: Float[np.ndarray, "step checkpoint"]
    line: Float[np.ndarray, "one checkpoint"]
    logistic: Float[np.ndarray, "curve checkpoint"]


def judge_shape(x: Float[np.ndarray, " checkpoint"], values: Float[np.ndarray, "checkpoint trial"]) -> Shape:
    """Compare a constant, a step, a line and a logistic curve by BIC (Schwarz 1978), fitted to the means.

    Residuals are normal, of a variance that is at least the sampling variance of the means, so that no curve is praised
    for following noise.  `none`: the constant is best.  `gradual`: a line or logistic curve is better than the step by
    `MARGIN`.  `sudden`: the step is best, and it lies between checkpoints that are close; where they are not, nobody
    looked.  Everything else is `undecided`, and so is a change that other prompts might not show (`changes`).
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
    found = {
        "constant": bic(0.0, 1),
        "step": bic(float(steps.max()), 3),
        "line": bic(float(((family.line @ around) ** 2)[0]), 2),
        "logistic": bic(float(((family.logistic @ around) ** 2).max()), 4),
    }
    gap = float((x[jump] - x[jump - 1]) / np.ptp(x))
    verdict, surely = _verdict(found, gap), True
    if verdict in ("sudden", "gradual"):
        surely = changes(x, values)
    return Shape(verdict if surely else "undecided", found, gap, surely)


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

    A maximum over contrasts held against its own bootstrap (Westfall and Young 1993, chapter 2), which keeps the
    prompts' own ways through training, however correlated; certain for one prompt, of which there is no noise.
    """
    family = _family(tuple(x.tolist()))
    contrasts = np.concatenate([family.steps, family.line])
    by_chance = np.abs(contrasts @ noise_of_means(values, SCANS)).max(0)
    return bool(np.abs(contrasts @ values.mean(1)).max() > np.quantile(by_chance, LEVEL))


def _verdict(bic: dict[str, float], gap: float) -> str:
    gradual = min(bic["line"], bic["logistic"])
    if bic["constant"] <= min(bic["step"], gradual):
        return "none"
    if bic["constant"] < min(bic["step"], gradual) + MARGIN / 3:
        return "undecided"
    if gradual <= bic["step"] - MARGIN:
        return "gradual"
    if bic["step"] <= gradual and gap <= GAP:
        return "sudden"
    return "undecided"


@functools.lru_cache(maxsize=4)
def _family(places: tuple[float, ...]) -> Family:
    x = np.array(places)
    return Family(_unit((x >= x[1:, None]).astype(float)), _unit(x[None]), _unit(_logistic(x)))


def _unit(curves: Float[np.ndarray, "curve checkpoint"]) -> Float[np.ndarray, "curve checkpoint"]:
    """Centred and of length one; a constant becomes zero and explains nothing."""
    centred = curves - curves.mean(1, keepdims=True)
    length = np.sqrt((centred**2).sum(1, keepdims=True))
    return np.where(length > 1e-9, centred, 0) / np.where(length > 1e-9, length, 1)


def _logistic(x: Float[np.ndarray, " checkpoint"]) -> Float[np.ndarray, "curve checkpoint"]:
    """Rises about every place between and at checkpoints, of widths from half the range down to hundredths of it."""
    middles = np.union1d(x, (x[1:] + x[:-1]) / 2)
    widths = np.ptp(x) * np.geomspace(0.005, 0.5, WIDTHS)
    slopes = (x - middles[:, None])[None] / widths[:, None, None]
    return (1 / (1 + np.exp(-np.clip(slopes, -50, 50)))).reshape(-1, len(x))

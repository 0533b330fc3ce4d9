"""Sudden, gradual or neither: which curve a mean over training follows.  Pure."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

MARGIN = 6.0
"""Of BIC between verdicts: strong evidence (Kass and Raftery 1995)."""

GAP = 0.1
"""Share of the range covered above which an unobserved stretch may hide anything."""

WIDTHS = 12
"""Widths of a logistic rise that are tried."""


@dataclass(frozen=True)
class Shape:
    """How a mean changes over training."""

    verdict: str
    """`sudden`, `gradual`, `none` or `undecided`."""

    bic: dict[str, float]
    """Of the best constant, step, line and logistic curve; the smaller, the better."""

    gap: float
    """Share of the range covered in which the best step lies, unobserved."""


def judge_shape(x: Float[np.ndarray, " checkpoint"], values: Float[np.ndarray, "checkpoint trial"]) -> Shape:
    """Compare a constant, a step, a line and a logistic curve by BIC (Schwarz 1978), fitted to the means.

    Residuals are normal, of a variance that is at least the sampling variance of the means, so that no curve is praised
    for following noise.  `none`: the constant is best.  `gradual`: a line or logistic curve is better than the step by
    `MARGIN`.  `sudden`: the step is best, and it lies between checkpoints that are close; where they are not, nobody
    looked.  Everything else is `undecided`.
    """
    y = values.mean(1)
    n = len(y)
    if n < 4 or np.ptp(x) == 0:
        return Shape("undecided", {}, 1.0)
    noise = float((values.var(1, ddof=1) / values.shape[1]).mean()) if values.shape[1] > 1 else 0.0
    floor = max(noise, (1e-9 + 1e-6 * np.abs(y).max()) ** 2)

    def bic(residual: float, n_parameters: int) -> float:
        variance = max(residual / n, floor)
        return n * np.log(variance) + residual / variance + n_parameters * np.log(n)

    found = {"constant": bic(float(((y - y.mean()) ** 2).sum()), 1)}
    steps = _residuals(y, (x >= x[1:, None]).astype(float))
    jump = int(steps.argmin()) + 1
    found["step"] = bic(float(steps.min()), 3)
    found["line"] = bic(float(_residuals(y, x[None])[0]), 2)
    found["logistic"] = bic(float(_residuals(y, _logistic(x)).min()), 4)
    gap = float((x[jump] - x[jump - 1]) / np.ptp(x))
    return Shape(_verdict(found, gap), found, gap)


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


def _residuals(
    y: Float[np.ndarray, " checkpoint"], curves: Float[np.ndarray, "curve checkpoint"]
) -> Float[np.ndarray, " curve"]:
    """Sums of squares that the best a + b * curve leaves."""
    centred, around = curves - curves.mean(1, keepdims=True), y - y.mean()
    power = (centred**2).sum(1)
    slope = (centred @ around) / np.where(power > 0, power, 1)
    return ((around - slope[:, None] * centred) ** 2).sum(1)


def _logistic(x: Float[np.ndarray, " checkpoint"]) -> Float[np.ndarray, "curve checkpoint"]:
    """Rises about every place between and at checkpoints, of widths from half the range down to hundredths of it."""
    middles = np.union1d(x, (x[1:] + x[:-1]) / 2)
    widths = np.ptp(x) * np.geomspace(0.005, 0.5, WIDTHS)
    slopes = (x - middles[:, None])[None] / widths[:, None, None]
    return (1 / (1 + np.exp(-np.clip(slopes, -50, 50)))).reshape(-1, len(x))

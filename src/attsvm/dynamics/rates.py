"""Power laws of curves: how fast a quantity falls or grows with the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attsvm.errors import InvalidInputError

__all__ = ["Rate", "fit_rate"]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A power law ``y ~ C x^-a`` fitted to the curves of several trials.

    Attributes
    ----------
    exponent
        a, the mean over the trials; negative for a quantity that grows. NaN if no trial could be fitted.
    low, high
        Confidence interval of the exponent; NaN with fewer than two trials.
    factor
        C, the geometric mean over the trials; inf beyond float64.
    level
        Of the confidence interval.
    trials
        How many trials have two positive points or more in the window.
    points
        How many points of them were used.
    """

    exponent: float
    low: float
    high: float
    factor: float
    level: float
    trials: int
    points: int


def fit_rate(
    steps: Any,
    values: Any,
    *,
    window: tuple[float, float] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Rate:
    r"""Fit a power law to curves by least squares on logarithmic axes.

    Each trial b has its own line: $(c_b, a_b)$ minimise

    $$\sum_{k} \bigl(\log y_{bk} - c_b + a_b \log x_k\bigr)^2$$

    over the points $x_k$ in the window with $y_{bk} > 0$. The exponent is $a = \frac1B \sum_b a_b$ and the factor
    $C = \exp(\frac1B \sum_b c_b)$; where all trials have the same points this is the least-squares line through all
    of them. Its confidence interval is the percentile bootstrap over trials: the trials are drawn B times with
    replacement, ``resamples`` times over, and the interval lies between the quantiles of the mean exponents. Points of
    one trial are not independent, trials are.

    Parameters
    ----------
    steps
        (K,), the x of the points.
    values
        (K,) or (B, K). Points that are NaN, infinite or not positive are left out.
    window
        Smallest and largest x to use; default: every x > 0.
    level
        In (0, 1).
    resamples
        >= 1.
    seed
        Of the bootstrap.

    Returns
    -------
    Rate
        With NaN for what cannot be estimated.

    Raises
    ------
    InvalidInputError
        If shapes do not fit, or an argument is out of range.

    References
    ----------
    Efron, Tibshirani. "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval).

    Examples
    --------
    >>> round(fit_rate([1, 10, 100], [2.0, 0.2, 0.02]).exponent, 12)
    1.0
    """
    x, y = np.asarray(steps, dtype=np.float64), np.atleast_2d(np.asarray(values, dtype=np.float64))
    _check(x, y, window, level, resamples)
    low, high = (0.0, math.inf) if window is None else window
    used = (x > 0) & (x >= low) & (x <= high)
    lines = [line for row in y if (line := _line(x[used], row[used])) is not None]
    if not lines:
        nan = math.nan
        return Rate(exponent=nan, low=nan, high=nan, factor=nan, level=level, trials=0, points=0)
    exponents = np.array([line[0] for line in lines])
    bottom, top = _interval(exponents, level, resamples, seed)
    return Rate(
        exponent=float(exponents.mean()),
        low=bottom,
        high=top,
        factor=_exp(math.fsum(line[1] for line in lines) / len(lines)),
        level=level,
        trials=len(lines),
        points=sum(line[2] for line in lines),
    )


def _check(x: np.ndarray, y: np.ndarray, window: Sequence[float] | None, level: float, resamples: int) -> None:
    if x.ndim != 1 or y.ndim != 2 or y.shape[1] != len(x):
        raise InvalidInputError(f"fit_rate: values must be (K,) or (B, K) for steps (K,), got {y.shape} and {x.shape}.")
    if window is not None and not window[0] < window[1]:
        raise InvalidInputError(f"fit_rate: window must be a smaller and a larger number, got {window!r}.")
    if not 0 < level < 1:
        raise InvalidInputError(f"fit_rate: level must be in (0, 1), got {level!r}.")
    if resamples < 1:
        raise InvalidInputError(f"fit_rate: resamples must be >= 1, got {resamples!r}.")


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, int] | None:
    """Exponent, logarithm of the factor, and number of points; None with fewer than two points."""
    fits = np.isfinite(y) & (y > 0)
    if fits.sum() < 2:
        return None
    a, b = np.log(x[fits]), np.log(y[fits])
    centred = a - a.mean()
    slope = float(centred @ (b - b.mean()) / (centred @ centred))
    return -slope, float(b.mean() - slope * a.mean()), int(fits.sum())


def _exp(value: float) -> float:
    """The exponential, inf where it is beyond float64: a curve that is no power law may have any factor."""
    return math.exp(value) if value < 709.0 else math.inf


def _interval(exponents: np.ndarray, level: float, resamples: int, seed: int) -> tuple[float, float]:
    if len(exponents) < 2:
        return math.nan, math.nan
    draws = np.random.default_rng(seed).integers(len(exponents), size=(resamples, len(exponents)))
    low, high = np.quantile(exponents[draws].mean(-1), ((1.0 - level) / 2.0, (1.0 + level) / 2.0))
    return float(low), float(high)

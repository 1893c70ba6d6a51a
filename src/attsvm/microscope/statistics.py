r"""Means over a corpus with intervals, from sums that do not grow with it.

Queries of one text are not independent, so texts and not queries are what is sampled. With $y_t$ the sum of a measure
over the queries of text t, $n_t$ their number and K texts with $n_t > 0$,

$$\hat\mu = \frac{\sum_t y_t}{\sum_t n_t}, \qquad
\widehat{\mathrm{var}}(\hat\mu) = \frac{K}{K - 1} \frac{\sum_t (y_t - \hat\mu n_t)^2}{(\sum_t n_t)^2} ,$$

and the interval is $\hat\mu \pm t_{K-1} \widehat{\mathrm{var}}^{1/2}$ with the quantile of Student's distribution.

References
----------
Cochran. "Sampling Techniques", third edition, 1977, section 6 (ratio estimators) and 9A (clusters).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["Estimate", "RatioMoments", "student_quantile"]

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over the queries of a corpus.

    Attributes
    ----------
    mean
        Over all queries for which the measure is defined.
    low, high
        Ends of its 95 % interval over texts like these, None where one text does not tell.
    n
        Number of queries.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


class RatioMoments:
    """Running sums for ratios of any shape.

    Parameters
    ----------
    sums
        (6, ...): sums over texts of y, n, y², y n, n² and of [n > 0].
    """

    def __init__(self, sums: Array) -> None:
        self.sums = sums

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> RatioMoments:
        """No text yet."""
        return cls(np.zeros((6, *shape)))

    def add(self, y: Array, n: Array) -> None:
        """Add texts: y and n are (texts, ...)."""
        self.sums += np.stack([y.sum(0), n.sum(0), (y * y).sum(0), (y * n).sum(0), (n * n).sum(0), (n > 0).sum(0)])

    def estimates(self, largest: Array | None = None) -> tuple[Array, Array, Array, Array]:
        """Mean, low, high and number of queries of each ratio.

        Parameters
        ----------
        largest
            Upper ends of the ranges of the measures, infinite for none; intervals end there, and at 0.

        Returns
        -------
        tuple
            Four arrays. The mean is NaN without queries, the ends are NaN with fewer than two texts.
        """
        y, n, yy, yn, nn, texts = self.sums
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = y / n
            squares = np.maximum(yy - 2 * mean * yn + mean * mean * nn, 0.0)
            half = np.sqrt(squares * texts / (texts - 1)) / n
        half = np.where(texts >= 2, half, np.nan)
        half = half * np.vectorize(_quantile_or_nan, otypes=[float])(texts)
        high = mean + half if largest is None else np.minimum(mean + half, largest)
        return mean, np.maximum(mean - half, 0.0), high, n


def _quantile_or_nan(texts: float) -> float:
    return student_quantile(int(texts) - 1) if texts >= 2 else math.nan


@lru_cache(maxsize=4096)
def student_quantile(freedom: int, probability: float = 0.975) -> float:
    """The point that a variable of Student's distribution stays below with a probability above one half.

    Found by bisection of the distribution's closed form for whole degrees of freedom; beyond 200 from the normal
    distribution's quantile by the first terms of Cornish and Fisher's series, good to 1e-8 there.

    Parameters
    ----------
    freedom
        Degrees of freedom, at least 1.
    probability
        Between one half and 1.

    Returns
    -------
    float
        The quantile.

    References
    ----------
    Abramowitz and Stegun. "Handbook of Mathematical Functions", 1964, equations 26.7.3, 26.7.4 and 26.7.5.
    """
    if freedom > 200:
        from statistics import NormalDist

        x = NormalDist().inv_cdf(probability)
        terms = (
            x,
            (x**3 + x) / 4,
            (5 * x**5 + 16 * x**3 + 3 * x) / 96,
            (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        )
        return sum((term / float(freedom) ** power for power, term in enumerate(terms)), start=0.0)
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return 0.5 * (low + high)


def _student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0 and whole degrees of freedom: a finite sum of powers of a cosine."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    total, term = 0.0, 1.0 if freedom % 2 == 0 else cosine
    for k in range(1 + freedom % 2, freedom, 2):
        total += term
        term *= k / (k + 1) * cosine**2
    if freedom % 2 == 0:
        return 0.5 + 0.5 * math.sin(angle) * total
    return 0.5 + (angle + math.sin(angle) * total) / math.pi

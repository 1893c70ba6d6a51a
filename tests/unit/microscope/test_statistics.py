"""Intervals: the formula against loops, Student's quantile against tables, and how often intervals hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from attsvm.microscope.statistics import RatioMoments, student_quantile


# scipy.stats.t.ppf(0.975, n); the first three digits are in every table.
@pytest.mark.parametrize(
    "freedom, expected",
    [
        (1, 12.706204736175),
        (2, 4.302652729749),
        (3, 3.182446305284),
        (4, 2.776445105198),
        (10, 2.228138851986),
        (49, 2.009575237129),
        (200, 1.971896223634),
        (201, 1.971836506780),
        (1000, 1.962339080826),
        (10**7, 1.959964221767),
    ],
)
def test_student_quantile(freedom: int, expected: float) -> None:
    assert student_quantile(freedom) == pytest.approx(expected, abs=2e-9)


def test_quantile_of_other_probabilities() -> None:
    assert student_quantile(5, 0.95) == pytest.approx(2.015048373333, abs=1e-10)


def test_formula_against_a_loop() -> None:
    y, n = [3.0, 0.0, 5.0, 2.5], [4, 0, 9, 2]
    moments = RatioMoments.zeros(())
    for value, count in zip(y, n, strict=True):
        moments.add(np.array([value]), np.array([float(count)]))
    mean, low, high, total = (float(part) for part in moments.estimates())
    expected = sum(y) / sum(n)
    squares = sum((value - expected * count) ** 2 for value, count in zip(y, n, strict=True))
    half = 4.302652729749462 * math.sqrt(3 / 2 * squares) / sum(n)  # three texts have queries
    assert (mean, total) == (pytest.approx(expected), 15)
    assert high == pytest.approx(expected + half)
    assert low == pytest.approx(expected - half)


def test_intervals_stay_in_the_range_of_the_measure() -> None:
    moments = RatioMoments.zeros((2,))
    moments.add(np.array([[1.0, 1.0], [1.9, 1.9]]), np.array([[1.0, 1.0], [2.0, 2.0]]))
    _, low, high, _ = moments.estimates(np.array([1.0, np.inf]))
    assert high[0] == 1
    assert high[1] > 1
    assert (low >= 0).all()


def test_equal_texts_have_an_interval_of_no_width() -> None:
    moments = RatioMoments.zeros(())
    moments.add(np.full(7, 0.3 * 11), np.full(7, 11.0))
    mean, low, high, _ = moments.estimates()
    assert low == pytest.approx(mean, abs=1e-7)
    assert high == pytest.approx(mean, abs=1e-7)


def test_one_text_and_none_have_no_interval() -> None:
    moments = RatioMoments.zeros((2,))
    moments.add(np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[2.0, 0.0], [0.0, 0.0]]))
    mean, low, high, n = moments.estimates()
    assert mean[0] == 0.5
    assert np.isnan(mean[1])
    assert np.isnan(low).all()
    assert np.isnan(high).all()
    assert n.tolist() == [2, 0]


@pytest.mark.parametrize("n_texts", [5, 20, 100])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_intervals_hold_the_truth_as_often_as_they_say(n_texts: int, spread: float) -> None:
    """Simulated corpora: texts of different lengths with a level of their own, queries scattered about it.

    With spread, long texts have higher levels, so that a mean over texts instead of queries would be off.
    """
    generator = np.random.default_rng(20231)
    corpora = 4000
    n = generator.integers(5, 40, size=(n_texts, corpora)).astype(float)
    level = 0.5 + 0.1 * generator.normal(size=n.shape) + spread * 0.004 * (n - 22)
    y = n * level + 0.2 * np.sqrt(n) * generator.normal(size=n.shape)
    lengths = np.arange(5, 40)
    truth = 0.5 + spread * 0.004 * float((lengths * (lengths - 22)).mean() / lengths.mean())
    moments = RatioMoments.zeros((corpora,))
    moments.add(y, n)
    _, low, high, _ = moments.estimates()
    coverage = float(((low <= truth) & (truth <= high)).mean())
    # 4000 trials scatter by 0.0034; the ratio of few texts of unequal lengths loses a little more.
    assert 0.95 - (0.035 if n_texts < 10 else 0.015) < coverage < 0.965


def test_queries_of_one_text_are_not_taken_for_independent() -> None:
    """Each query counted as a sample of its own would give an interval several times too narrow here."""
    generator = np.random.default_rng(7)
    level = generator.normal(size=50)
    n = np.full(50, 30.0)
    moments = RatioMoments.zeros(())
    moments.add(n * level + 10, n)
    mean, _, high, _ = moments.estimates()
    independent = 1.96 * level.std() / math.sqrt(1500)
    assert high - mean > 4 * independent

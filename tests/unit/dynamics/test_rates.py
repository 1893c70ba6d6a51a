"""Fitted power laws: exact on exact ones, and a confidence interval that covers at its level."""

import math

import numpy as np
import pytest

from attsvm.dynamics.rates import fit_rate
from attsvm.errors import InvalidInputError

STEPS = np.geomspace(1, 1000, 13)


def test_exact_power_laws() -> None:
    rate = fit_rate(STEPS, [3.0 * STEPS**-0.5, 12.0 * STEPS**-1.5])
    assert rate.exponent == pytest.approx(1.0, abs=1e-12)
    assert rate.factor == pytest.approx(6.0, rel=1e-12)  # geometric mean of 3 and 12
    assert (rate.trials, rate.points) == (2, 26)
    assert (rate.low, rate.high) == pytest.approx((0.5, 1.5), abs=1e-12)


def test_growth_has_a_negative_exponent() -> None:
    assert fit_rate(STEPS, 2.0 * STEPS**0.25).exponent == pytest.approx(-0.25, abs=1e-12)


def test_same_line_as_least_squares_through_all_points() -> None:
    y = np.exp(np.random.default_rng(0).normal(size=(5, len(STEPS)))) * STEPS**-0.7
    slope, offset = np.polyfit(np.tile(np.log(STEPS), 5), np.log(y).ravel(), 1)
    rate = fit_rate(STEPS, y)
    assert rate.exponent == pytest.approx(-slope, rel=1e-9)
    assert rate.factor == pytest.approx(math.exp(offset), rel=1e-9)


def test_window_leaves_the_rest_out() -> None:
    y = np.where(STEPS < 50, 1.0, STEPS**-2.0)
    assert fit_rate(STEPS, y, window=(50, 1000)).exponent == pytest.approx(2.0, abs=1e-12)
    assert fit_rate(STEPS, y).exponent > 2.1  # bent by the step at 50


def test_points_without_a_logarithm_are_left_out() -> None:
    x = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    rate = fit_rate(x, [[7.0, 1.0, 0.5, np.nan, 0.125, 0.0], [np.inf, 0.0, -1.0, 0.0, np.nan, 1.0]])
    assert rate.exponent == pytest.approx(1.0, abs=1e-12)
    assert (rate.trials, rate.points) == (1, 3)
    assert math.isnan(rate.low)
    assert math.isnan(rate.high)


def test_nothing_to_fit() -> None:
    rate = fit_rate([1, 2], [[0.0, 0.0]])
    assert rate.trials == 0
    assert math.isnan(rate.exponent)


def test_interval_covers_at_its_level() -> None:
    generator, covered, runs = np.random.default_rng(1), 0, 400
    for _ in range(runs):
        exponents = 1.0 + 0.3 * generator.normal(size=(40, 1))
        rate = fit_rate(STEPS, STEPS**-exponents, level=0.9, resamples=400)
        covered += rate.low <= 1.0 <= rate.high
    # Standard error 0.015; the percentile interval of 40 trials is narrow by about 2 %.
    assert 0.83 < covered / runs < 0.95


def test_interval_depends_on_the_seed_alone() -> None:
    y = STEPS ** -np.random.default_rng(2).uniform(0.5, 1.5, size=(10, 1))
    assert fit_rate(STEPS, y, seed=3) == fit_rate(STEPS, y, seed=3)
    assert fit_rate(STEPS, y, seed=3).low != fit_rate(STEPS, y, seed=4).low


@pytest.mark.parametrize(
    ("values", "options", "named"),
    [
        ([1.0, 2.0], {}, "values"),
        ([1.0, 2.0, 3.0], {"window": (5, 5)}, "window"),
        ([1.0, 2.0, 3.0], {"level": 1.0}, "level"),
        ([1.0, 2.0, 3.0], {"resamples": 0}, "resamples"),
    ],
)
def test_bad_input_is_named(values: list[float], options: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidInputError, match=named):
        fit_rate([1, 2, 3], values, **options)


def test_factor_beyond_float64_is_inf() -> None:
    # An exponential seen late looks like a power law with a huge factor.
    x = np.linspace(1000, 1100, 5)
    rate = fit_rate(x, np.exp(600.0 - 0.6 * x))
    assert rate.factor == math.inf
    assert rate.exponent == pytest.approx(0.6 * 1050, rel=0.01)

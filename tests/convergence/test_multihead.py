"""Rates of several heads on the tokenized mixture."""

from __future__ import annotations

import pytest

from unit.experiments.recipes.trials import full, number

pytestmark = pytest.mark.slow


def test_training_loss_falls_as_one_over_steps_and_the_gap_as_one_over_samples() -> None:
    """arXiv:2310.12680: training loss O(1/K) up to logarithms, generalisation gap O(1/n)."""
    _, summary = full("multihead")
    for H in (1, 2, 4, 8):
        assert number(summary, f"H={H}: exponent of the training loss").verdict == "met"
    assert number(summary, "H=4: exponent of test loss").verdict == "met"
    assert number(summary, "test accuracy").ours == pytest.approx(1.0, abs=1e-3)
    exponent, low, high = summary.tables[2].rows[0]
    assert isinstance(exponent, float)
    assert isinstance(low, float)
    assert isinstance(high, float)
    assert low < exponent < high
    assert high - low < 0.5

"""Single-location regression with the published settings and 30 starts each."""

from __future__ import annotations

import pytest

from unit.experiments.recipes.trials import full, number

pytestmark = pytest.mark.slow


def test_claims_with_thirty_starts() -> None:
    """arXiv:2410.01537: convergence on the invariant manifold, SGD from the sphere, and what a fixed lambda does."""
    _, summary = full("single-location")
    assert {one.verdict for one in summary.numbers} == {"met", "not published"}
    falling, small, large = (
        number(summary, f"{name}: share").ours
        for name in ("(d) spheres, falling λ", "(c) spheres, λ=0.1", "(b) spheres, λ=0.9")
    )
    assert falling is not None
    assert small is not None
    # 28 and 14 of 30: binomial ranges of three standard deviations.
    assert falling >= 0.79
    assert 0.19 <= small <= 0.74
    assert large == 0.0

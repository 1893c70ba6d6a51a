"""What "the same numbers" means on real weights.

In float64 the two must agree to 1e-10. In float32 they must agree to 1e-5 where float32 allows it: logits reach 99,
where neighbouring numbers are 8e-6 apart, after thirty layers of rounding. There ours may be as far from the numbers of
float64 as theirs are, times three, as two orders of the same sums differ in luck.
"""

from __future__ import annotations

from torch import Tensor

DOUBLE, SINGLE, LUCK = 1e-10, 1e-5, 3.0


def distance(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one.double() - other.double()).abs().max())


def check_double(found: Tensor, expected: Tensor) -> None:
    assert distance(found, expected) <= DOUBLE, f"{distance(found, expected):.1e} exceeds {DOUBLE}"


def check_single(found: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """``exact`` is theirs in float64."""
    limit = max(SINGLE, LUCK * distance(theirs, exact))
    assert distance(found, exact) <= limit, f"{distance(found, exact):.1e} exceeds {limit:.1e}"

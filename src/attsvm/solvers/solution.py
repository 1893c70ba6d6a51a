"""What a solve returns: a plain record with its certificate."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attsvm.selection.arrays import as_float
from attsvm.selection.norms import Norm

__all__ = ["Ray", "Solution", "Status"]


class Status(enum.Enum):
    """How a solve ended; ``status.sentence`` says it in words."""

    OPTIMAL = "optimal"
    INFEASIBLE = "infeasible"
    LOCAL = "local"
    ITERATION_LIMIT = "iteration_limit"
    TIME_LIMIT = "time_limit"
    INTERRUPTED = "interrupted"

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.OPTIMAL: "The gap between the upper and the lower bound is below the tolerance.",
    Status.INFEASIBLE: "No matrix separates the selected tokens; the ray proves it.",
    Status.LOCAL: "The rank bound makes the problem non-convex; this is the best solution found.",
    Status.ITERATION_LIMIT: (
        "The iterations ended, or stopped making progress, before the tolerance; this is the best solution found."
    ),
    Status.TIME_LIMIT: "The time limit came before the tolerance; this is the best solution found.",
    Status.INTERRUPTED: "The solve was interrupted; this is the best solution found so far.",
}


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Proof that a problem is infeasible: a combination of its rows that is zero and promises more than zero.

    Attributes
    ----------
    weights
        (n, Q, T) >= 0 on the margin rows, largest magnitude 1, not all 0.
    equality_weights
        (n, Q, T) on the ties inside selected sets, of either sign.
    sequences
        The sequences that the proof uses.
    residual
        Size of the combination relative to the sum of the sizes of its terms; at most 1e-9.
    """

    weights: Any
    equality_weights: Any
    sequences: tuple[int, ...]
    residual: float

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """The weights, so that ``np.asarray(solution.ray)`` is what the formula needs."""
        return np.asarray(self.weights, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The answer to ``solve``, with the bounds that prove it.

    Arrays are of the problem's kind (NumPy or torch), dtype and device; in a batch they, and the numbers as
    tuples, have a leading B.

    Attributes
    ----------
    W
        (d, d) the matrix found, scaled so that the smallest margin is met with equality (not with offsets).
    status
        How the solve ended.
    upper_bound, lower_bound
        Norm of a matrix whose rows all hold in float64 (inf if none is known), and the dual bound. With a centre, of
        ``W - center``; for the soft margin of ``||W||^2 / 2 + penalty * sum(slack)``.
    duals
        (n, Q, T) >= 0, scaled to fit W: for ``"fro"`` at the optimum, W = sum(duals x (x_selected - x_t) z^T), with a
        dual norm of 1 for the other norms. At most ``penalty`` for the soft margin.
    equality_duals
        (n, Q, T), multipliers of the ties inside selected sets.
    support
        (n, Q, T) booleans, rows with a positive dual.
    margin
        Smallest margin under W, in logits.
    norm, penalty
        The norm that was minimised, and the price of a unit of slack (inf for the hard margin).
    iterations, seconds, method
        What it took.
    ray
        The proof of infeasibility, or None.
    """

    W: Any
    status: Any
    upper_bound: Any
    lower_bound: Any
    duals: Any
    equality_duals: Any
    support: Any
    margin: Any
    norm: Norm
    iterations: Any
    seconds: float
    method: str
    penalty: float = math.inf
    ray: Any = None
    history: tuple[tuple[int, float, float, float], ...] = field(default=(), repr=False)
    """(iteration, gap, upper bound, lower bound) at each check."""

    @property
    def gap(self) -> Any:
        """``(upper_bound - lower_bound) / upper_bound``; 0 when both are 0, inf when the upper bound is."""
        if isinstance(self.upper_bound, tuple):
            return tuple(map(relative_gap, self.upper_bound, self.lower_bound))
        return relative_gap(self.upper_bound, self.lower_bound)

    @property
    def singular_values(self) -> Any:
        """Singular values of W (d,), largest first, in float64."""
        return np.linalg.svd(as_float(self.W, "W", where="Solution").cpu().double().numpy(), compute_uv=False)

    def rank(self, tol: float = 1e-6) -> int:
        """Number of singular values of W above ``tol`` times the largest one."""
        values = self.singular_values
        return int((values > tol * values.max()).sum()) if values.size and values.max() > 0 else 0

    def __repr__(self) -> str:
        if isinstance(self.status, tuple):
            done = sum(status is Status.OPTIMAL for status in self.status)
            return f"Solution(norm={self.norm!r}, {done} of {len(self.status)} optimal, {self.seconds:.2f} s)"
        return (
            f"Solution(norm={self.norm!r}, status={self.status.value}, upper_bound={self.upper_bound:.6g}, "
            f"gap={self.gap:.1e}, method={self.method!r}, iterations={self.iterations}, {self.seconds:.2f} s)"
        )


def relative_gap(upper: float, lower: float) -> float:
    """The relative gap of two bounds on a norm."""
    if upper == lower == 0.0:
        return 0.0
    return (upper - lower) / upper if np.isfinite(upper) else float("inf")

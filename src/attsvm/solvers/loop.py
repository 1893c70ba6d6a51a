"""The one loop that every solver runs in: it keeps the best bounds, and decides when to stop and why.

A solver is an iterator of :class:`Iterate`, mostly without end; it knows nothing of tolerances, clocks or Ctrl-C.
Whatever happens, the loop returns the best matrix and the best multipliers seen. It also ends when the bounds have
stopped moving: below some tolerance they only show the rounding of float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from attsvm.selection.certificate import RAY_TOLERANCE, believable
from attsvm.selection.norms import Norm, dual_norm, matrix_norm
from attsvm.solvers import coordinate
from attsvm.solvers.repair import holds, repaired, rigid, tolerant
from attsvm.solvers.rows import Floats, Rows
from attsvm.solvers.solution import Status, relative_gap

__all__ = ["Iterate", "Outcome", "Progress", "run_loop"]

Progress = Callable[[int, float], None]
"""Called with (iterations, gap) at every check."""

PATIENCE = 4
"""The loop ends when this many times the iterations (and 1,000 more) that led to the last progress brought none."""


@dataclass(frozen=True, kw_only=True)
class Iterate:
    """What a solver offers: a matrix (p, q) and multipliers (R,), either of which may be None."""

    W: Floats | None
    dual: Floats | None
    step: int


@dataclass(kw_only=True)
class Outcome:
    """The best found so far, in the reduced basis."""

    W: Floats
    dual: Floats
    upper: float = math.inf
    lower: float = 0.0
    status: Status = Status.ITERATION_LIMIT
    iterations: int = 0
    ray: Floats | None = None
    history: list[tuple[int, float]] = field(default_factory=list)

    @property
    def gap(self) -> float:
        """The relative gap of the best bounds."""
        return relative_gap(self.upper, self.lower)


def run_loop(
    rows: Rows,
    iterates: Iterator[Iterate],
    *,
    norm: Norm,
    tol: float,
    max_seconds: float | None,
    max_iterations: int | None,
    progress: Progress | None = None,
) -> Outcome:
    """Drive a solver until the gap is below ``tol``, a ray is found, or a limit or Ctrl-C comes.

    Parameters
    ----------
    rows
        The problem.
    iterates
        The solver.
    norm
        The norm of the bounds.
    tol
        Relative gap to reach.
    max_seconds, max_iterations
        Limits, or None.
    progress
        Called at every check.
    """
    best = Outcome(W=np.zeros((rows.tokens.shape[2], rows.queries.shape[1])), dual=np.zeros(rows.n_rows))
    began = time.monotonic()
    last = _Progress()
    try:
        for iterate in iterates:
            best.iterations = iterate.step
            if iterate.dual is not None and _take_dual(rows, iterate.dual, norm, best):
                best.status, best.ray = Status.INFEASIBLE, iterate.dual
                break
            if iterate.W is not None:
                _take_matrix(rows, iterate.W, norm, best)
            best.history.append((iterate.step, best.gap))
            if progress is not None:
                progress(iterate.step, best.gap)
            if best.gap <= tol:
                best.status = Status.OPTIMAL
                break
            if max_seconds is not None and time.monotonic() - began > max_seconds:
                best.status = Status.TIME_LIMIT
                break
            if max_iterations is not None and iterate.step >= max_iterations:
                break
            if last.stalled(best):
                break
    except KeyboardInterrupt:
        best.status = Status.INTERRUPTED
    return best


@dataclass(kw_only=True)
class _Progress:
    """The bounds when they last moved by a hundredth, of the gap or of the lower bound, and when that was."""

    gap: float = math.inf
    lower: float = 0.0
    step: int = 0

    def stalled(self, best: Outcome) -> bool:
        """Whether the bounds have not moved for long; takes note if they have."""
        if best.gap < 0.99 * self.gap or best.lower > 1.01 * self.lower:
            self.gap, self.lower, self.step = best.gap, best.lower, best.iterations
        return best.iterations > 1000 + (1 + PATIENCE) * self.step


def _take_dual(rows: Rows, dual: Floats, norm: Norm, best: Outcome) -> bool:
    """Keep the multipliers if their bound is the best; True if they are a ray that proves infeasibility."""
    combination = coordinate.combine(rows, dual)
    promised = float(dual @ rows.rhs)
    if promised <= 0:
        return False
    terms = float(np.abs(dual) @ rows.size)
    if float(np.linalg.norm(combination)) <= 0.5 * RAY_TOLERANCE * terms:
        return promised > 2.0 * RAY_TOLERANCE * float(np.abs(dual) @ np.abs(rows.rhs))
    if not np.any(combination):
        return False
    bound = promised / dual_norm(torch.from_numpy(combination), norm)
    if bound > best.lower:
        best.lower, best.dual = bound, dual
    return False


def _take_matrix(rows: Rows, W: Floats, norm: Norm, best: Outcome) -> None:
    """Keep the matrix if, scaled or repaired to satisfy every row, it is the best."""
    values = coordinate.values(rows, W)
    if rigid(rows).any():
        W = repaired(rows, W, values)
        values = coordinate.values(rows, W)
        if not holds(rows, W, values):
            return
    factor = 1.0 if rows.has_offsets else scale_to_fit(rows, values)
    size = factor * float(np.linalg.norm(W))
    if not (math.isfinite(factor) and believable(size, rows.size.max(), rows.rhs.max(), tolerant=tolerant(rows))):
        return
    upper = factor * matrix_norm(torch.from_numpy(W), norm)
    if upper < best.upper:
        best.upper, best.W = upper, factor * W


def scale_to_fit(rows: Rows, values: Floats) -> float:
    """The smallest factor that makes every margin row hold, without offsets; inf if none does."""
    asking = ~rows.tie & (rows.rhs > 0)
    if not asking.any():
        return 0.0
    if bool((values[asking] <= 0).any()):
        return math.inf
    return float((rows.rhs[asking] / values[asking]).max())

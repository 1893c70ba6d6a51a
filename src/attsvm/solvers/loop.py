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
from attsvm.solvers.repair import holds, repaired, rigid, tolerant
from attsvm.solvers.rows import Floats, Rows
from attsvm.solvers.solution import Status, relative_gap
from attsvm.solvers.view import RowView

__all__ = ["Iterate", "Limits", "Outcome", "Progress", "drive"]

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
    history: list[tuple[int, float, float, float]] = field(default_factory=list)

    @property
    def gap(self) -> float:
        """The relative gap of the best bounds."""
        return relative_gap(self.upper, self.lower)


LARGEST = 1e140
"""Multipliers from which squares of their sums leave the range of float64."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to stop before the tolerance, and whom to tell.

    Attributes
    ----------
    seconds, iterations
        Limits, or None.
    began
        The clock (``time.monotonic()``) at which the seconds began.
    progress
        Called at every check.
    keep
        Called with the best so far at every check.
    """

    seconds: float | None = None
    iterations: int | None = None
    began: float = field(default_factory=time.monotonic)
    progress: Progress | None = None
    keep: Callable[[Outcome], None] | None = None


def drive(view: RowView, iterates: Iterator[Iterate], *, norm: Norm, tol: float, limits: Limits) -> Outcome:
    """Drive a solver until the gap is below ``tol``, a ray is found, or a limit or Ctrl-C comes.

    Parameters
    ----------
    view
        The problem.
    iterates
        The solver.
    norm
        The norm of the bounds.
    tol
        Relative gap to reach.
    limits
        When to stop before.
    """
    rows = view.rows
    best = Outcome(W=np.zeros((rows.tokens.shape[2], rows.queries.shape[1])), dual=np.zeros(rows.n_rows))
    last = _Progress()
    try:
        for iterate in iterates:
            best.iterations = iterate.step
            if iterate.dual is not None and not view.most(float(np.abs(iterate.dual).max(initial=0.0))) < LARGEST:
                break  # tokens so close that no matrix and no ray can be told from rounding
            if iterate.dual is not None and _take_dual(view, iterate.dual, norm, best):
                best.status = Status.INFEASIBLE
                break
            if iterate.W is not None:
                _take_matrix(view, iterate.W, norm, best)
            best.history.append((iterate.step, best.gap, best.upper, best.lower))
            if limits.progress is not None:
                limits.progress(iterate.step, best.gap)
            if best.gap <= tol:
                best.status = Status.OPTIMAL
                break
            if limits.keep is not None:
                limits.keep(best)
            # Of several processes the slowest clock decides for all.
            if limits.seconds is not None and view.most(time.monotonic() - limits.began) > limits.seconds:
                best.status = Status.TIME_LIMIT
                break
            offered = iterate.W is not None or iterate.dual is not None
            # A step that only counts is followed by what it led to.
            if limits.iterations is not None and iterate.step >= limits.iterations + (not offered):
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


def _take_dual(view: RowView, dual: Floats, norm: Norm, best: Outcome) -> bool:
    """Keep the multipliers if their bound is the best; True if they are a ray that proves infeasibility."""
    if math.isfinite(view.rows.penalty):
        return _take_soft_dual(view, dual, norm, best)
    combination = view.combine(dual)
    promised = view.total(float(dual @ view.rows.rhs))
    if promised <= 0 or not math.isfinite(promised):
        return False
    if _is_ray(view, dual, combination, promised):
        best.ray = dual
        return True
    slope = dual_norm(torch.from_numpy(combination), norm)
    if slope > 0.0 and promised / slope > best.lower:
        best.lower, best.dual = promised / slope, dual
    return False


def _is_ray(view: RowView, dual: Floats, combination: Floats, promised: float) -> bool:
    """Whether multipliers with a positive promise prove infeasibility, with room to spare for the judge."""
    rows = view.rows
    terms = view.total(float(np.abs(dual) @ rows.size))
    if float(np.linalg.norm(combination)) > 0.5 * RAY_TOLERANCE * terms:
        return False
    return promised > 2.0 * RAY_TOLERANCE * view.total(float(np.abs(dual) @ np.abs(rows.rhs)))


def _take_soft_dual(view: RowView, dual: Floats, norm: Norm, best: Outcome) -> bool:
    """The same with slack: multipliers up to the penalty, and only ties can prove infeasibility."""
    rows = view.rows
    dual = np.where(rows.tie, dual, dual.clip(0.0, rows.penalty))
    combination = view.combine(dual)
    promised = view.total(float(dual @ rows.rhs))
    slope = dual_norm(torch.from_numpy(combination), norm)
    most = view.most(float(np.where(rows.tie, 0.0, dual).max(initial=0.0)))
    if promised > 0.0 and (slope > 0.0 or most > 0.0):
        # Of all multiples of the multipliers, the one that promises most.
        factor = min(promised / slope**2 if slope > 0.0 else math.inf, rows.penalty / most if most > 0.0 else math.inf)
        bound = factor * promised - 0.5 * (factor * slope) ** 2
        if bound > best.lower:
            best.lower, best.dual = bound, factor * dual
    if view.total(float(rows.tie.sum())) > 0:
        ties = np.where(rows.tie, dual, 0.0)
        promised = view.total(float(ties @ rows.rhs))
        if promised > 0.0 and _is_ray(view, ties, view.combine(ties), promised):
            best.ray = ties
            return True
    return False


def _take_matrix(view: RowView, W: Floats, norm: Norm, best: Outcome) -> None:
    """Keep the matrix if, scaled or repaired to satisfy every row, it is the best."""
    rows = view.rows
    if not np.isfinite(W).all():
        return
    values = view.values(W)
    if view.total(float(rigid(rows).any())) > 0:
        W = repaired(view, W, values)
        values = view.values(W)
        if view.total(float(not holds(rows, W, values))) > 0:
            return
    if math.isfinite(rows.penalty):
        slack = view.total(float(np.where(rows.tie, 0.0, (rows.rhs - values).clip(min=0.0)).sum()))
        factor, upper = 1.0, 0.5 * matrix_norm(torch.from_numpy(W), norm) ** 2 + rows.penalty * slack
    else:
        factor = 1.0 if rows.has_offsets else view.most(scale_to_fit(rows, values))
        largest_row, largest_asked = view.most(rows.size.max(initial=0.0)), view.most(rows.rhs.max(initial=0.0))
        loose = view.most(float(tolerant(rows))) > 0
        size = factor * float(np.linalg.norm(W))
        if not (math.isfinite(factor) and believable(size, largest_row, largest_asked, tolerant=loose)):
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

"""The finish for the Frobenius norm: a proximal Newton method on the Gram matrix of a working set of rows.

The Gram matrix of rows factorises, ``<A_r, A_s> = (D_r . D_s)(z_r . z_s)``, so the dual on a working set F is a
small quadratic program with matrix ``K = (D D^T) * (Z Z^T)``. Each proximal step
``min l^T K l / 2 - c^T l + eps ||l - l_k||^2 / 2`` is solved exactly by block principal pivoting (guess which
multipliers are at a bound, solve, exchange the wrong ones), which takes a handful of Cholesky factorisations. Rows
that the new W violates enter the working set; the dual value rises in every round, so the method ends. The bounds are
0 and, where slack has a price, that price.

If no W exists the proximal steps run away along the ray that proves it: their relative residual is of size eps.

References
----------
Portugal, Judice, Vicente. "A comparison of block pivoting and interior-point algorithms for linear least squares
problems with nonnegative variables", 1994.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from attsvm.solvers import coordinate
from attsvm.solvers.rows import Bools, Floats, Ints, Rows

__all__ = ["MAX_WORKING_SET", "Projection", "WorkingSet", "project", "proximal_step", "worst"]

MAX_WORKING_SET = 5000
"""Rows in a Gram matrix at most: 200 MB in float64, and as much for its factor."""

PROXIMAL = 1e-11
"""eps, relative to the unit diagonal of the scaled Gram matrix."""

LOWER, FREE, UPPER = -1, 0, 1
"""Where a multiplier is: at its lower bound, between, at its upper bound."""


@dataclass(frozen=True, kw_only=True)
class WorkingSet:
    """Rows scaled to unit size, and their Gram matrix (k, k) with unit diagonal."""

    rows: Ints
    gram: torch.Tensor
    rhs: torch.Tensor
    size: torch.Tensor
    tie: torch.Tensor
    penalty: float = math.inf
    """Upper bound of the multipliers that are no ties'; in the scale of the problem."""
    factors: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, repr=False)
    """The last free rows that were solved for, and the Cholesky factor: near a solution they stay the same."""

    @property
    def lower(self) -> torch.Tensor:
        """(k,) least scaled multipliers."""
        return torch.where(self.tie, -math.inf, torch.zeros((), dtype=torch.float64))

    @property
    def upper(self) -> torch.Tensor:
        """(k,) greatest scaled multipliers."""
        return torch.where(self.tie, math.inf, self.penalty * self.size)

    @classmethod
    def of(cls, problem: Rows, rows: Ints, *, penalty: float | None = None) -> WorkingSet:
        """Collect the given rows; ``penalty`` stands in for that of the problem."""
        D = torch.from_numpy(problem.differences(rows))
        Z = torch.from_numpy(problem.queries[problem.block[rows]])
        D = D / torch.linalg.vector_norm(D, dim=1, keepdim=True)
        Z = Z / torch.linalg.vector_norm(Z, dim=1, keepdim=True)
        gram = (D @ D.T).mul_(Z @ Z.T)
        gram.diagonal().fill_(1.0)
        size = torch.from_numpy(problem.size[rows])
        return cls(
            rows=rows,
            gram=gram,
            rhs=torch.from_numpy(problem.rhs[rows]) / size,
            size=size,
            tie=torch.from_numpy(problem.tie[rows]),
            penalty=problem.penalty if penalty is None else penalty,
        )


def proximal_step(work: WorkingSet, dual: Floats, *, rhs: Floats | None = None) -> Floats:
    """The multipliers of ``work`` (k,) after one proximal step from ``dual`` (k,).

    Parameters
    ----------
    work
        The working set.
    dual
        Multipliers of its rows.
    rhs
        Right-hand sides of its rows; default those of the problem.
    """
    scaled = torch.from_numpy(dual) * work.size
    target = (work.rhs if rhs is None else torch.from_numpy(rhs) / work.size) + PROXIMAL * scaled
    state = torch.zeros(len(target), dtype=torch.int8)
    state[(scaled <= 0) & ~work.tie] = LOWER
    state[scaled >= work.upper] = UPPER
    answer = _block_pivoting(work, target, state)
    return np.asarray((answer / work.size).clamp(max=torch.where(work.tie, math.inf, work.penalty)).numpy())


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The nearest matrix that satisfies every row (or pays), with what the next projection can use again."""

    W: Floats  # (p, q)
    dual: Floats  # (R,)
    member: Bools  # (R,)
    work: WorkingSet


def project(
    rows: Rows,
    V: Floats,
    dual: Floats,
    member: Bools,
    work: WorkingSet | None,
    *,
    rounds: int = 30,
    penalty: float | None = None,
) -> Projection:
    """Project ``V`` (p, q) on the polyhedron of all rows, with a working set that takes in the rows that fail.

    With a finite penalty C the minimiser of ``||W - V||^2 / 2 + C sum(slack)``.

    Parameters
    ----------
    rows
        The problem.
    V
        The matrix to project.
    dual
        Multipliers (R,) to begin with.
    member
        (R,) the first working set; must hold all rows with a multiplier.
    work
        Its Gram matrix, if known.
    rounds
        Times that rows may enter.
    penalty
        Price of a unit of slack here; default that of the problem.
    """
    penalty = rows.penalty if penalty is None else penalty
    values = coordinate.values(rows, np.ascontiguousarray(V))
    for _ in range(rounds):
        index = member.nonzero()[0]
        if work is None or len(index) != len(work.rows):
            work = WorkingSet.of(rows, index)
        if work.penalty != penalty:
            work = replace(work, penalty=penalty)
        fresh = np.zeros(rows.n_rows)
        fresh[index] = proximal_step(work, dual[index], rhs=(rows.rhs - values)[index])
        dual = fresh
        W = V + coordinate.combine(rows, dual)
        shortfall = (rows.rhs - coordinate.values(rows, W)) / rows.size
        entering = ~member & (shortfall > 1e-9 * np.abs(rows.rhs / rows.size))
        if not entering.any() or member.sum() > MAX_WORKING_SET:
            break
        member = member | worst(entering, shortfall, limit=max(100, len(index) // 2))
    assert work is not None
    return Projection(W=W, dual=dual, member=member, work=work)


def worst(entering: Bools, shortfall: Floats, *, limit: int) -> Bools:
    """At most about ``limit`` of the entering rows, the most violated ones."""
    if entering.sum() <= limit:
        return entering
    bar = np.partition(shortfall[entering], -limit)[-limit]
    return np.asarray(entering & (shortfall >= bar))


def _block_pivoting(work: WorkingSet, target: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """``argmin x^T (K + eps) x / 2 - target^T x`` within the bounds, from a guess which of them hold with equality."""
    size, gram, lower, upper = len(target), work.gram, work.lower, work.upper
    patience, fewest = 5, size + 1
    tolerance = 1e-14 * float(target.abs().amax())
    for _ in range(20 + 10 * size):
        x = _solve(work, target, state)
        slope = gram @ x + PROXIMAL * x - target
        wanted = torch.where(state == FREE, UPPER * (x > upper) + LOWER * (x < lower), state)
        wanted = torch.where((state == LOWER) & (slope < -tolerance), FREE, wanted)
        wanted = torch.where((state == UPPER) & (slope > tolerance), FREE, wanted)
        wrong = wanted != state
        count = int(wrong.sum())
        if count == 0:
            break
        if count < fewest:
            patience, fewest = 5, count
        elif patience > 0:
            patience -= 1
        else:  # exchanging one variable at a time cannot cycle
            last = wrong.nonzero()[-1]
            wrong = torch.zeros_like(wrong)
            wrong[last] = True
        state = torch.where(wrong, wanted, state).to(torch.int8)
    return x.clamp(lower, upper)


def _solve(work: WorkingSet, target: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Solve (K + eps) x = target on the free variables, the others at their bounds."""
    x = torch.zeros_like(target)
    full = (state == UPPER).nonzero().flatten()
    if len(full) > 0:
        x[full] = work.upper[full]
        target = target - work.gram[:, full] @ x[full]
    index = (state == FREE).nonzero().flatten()
    if len(index) > 0:
        x[index] = torch.cholesky_solve(target[index, None], _factor(work, index))[:, 0]
    return x


def _factor(work: WorkingSet, index: torch.Tensor) -> torch.Tensor:
    """Cholesky factor of K + eps on the rows ``index`` of the working set."""
    if work.factors and torch.equal(work.factors[0][0], index):
        return work.factors[0][1]
    system = work.gram[index][:, index]
    ridge = PROXIMAL
    factor: torch.Tensor
    while True:
        system.diagonal().fill_(1.0 + ridge)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info) == 0:
            break
        ridge *= 10.0  # rounding made K indefinite beyond eps; a larger eps only slows the outer iteration
    work.factors[:] = [(index, factor)]
    return factor

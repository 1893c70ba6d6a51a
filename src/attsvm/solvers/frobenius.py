"""The Frobenius-norm solver: coordinate descent finds the rows that matter, Newton finishes on them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from attsvm.solvers import coordinate
from attsvm.solvers.loop import Iterate
from attsvm.solvers.newton import MAX_WORKING_SET, WorkingSet, proximal_step, worst
from attsvm.solvers.rows import Bools, Floats, Ints, Rows

__all__ = ["frobenius_iterates"]


def frobenius_iterates(rows: Rows, *, start: Floats | None = None, method: str = "auto") -> Iterator[Iterate]:
    """Iterates of the dual method, without end; the caller stops on the gap.

    Parameters
    ----------
    rows
        The problem.
    start
        Multipliers (R,) to begin with.
    method
        ``"coordinate"`` for coordinate descent alone, ``"auto"`` to finish with Newton.
    """
    dual = np.zeros(rows.n_rows) if start is None else start.copy()
    W = coordinate.combine(rows, dual)
    generator = np.random.default_rng(0)
    sweeps, chunk = 0, 4
    while True:
        for _ in range(chunk):
            coordinate.sweep(rows, W, dual, generator.permutation(len(rows.sequence)))
            sweeps += 1
        # W is kept by rank-one updates; rebuilding it stops their rounding from adding up.
        W = coordinate.combine(rows, dual)
        yield Iterate(W=W, dual=dual.copy(), step=sweeps)
        if method == "auto" and _newton_pays(rows, dual, sweeps):
            for newton_W, newton_dual in _newton_rounds(rows, W, dual):
                sweeps += 1
                yield Iterate(W=newton_W, dual=newton_dual.copy(), step=sweeps)
                # Where no W exists the steps soon repeat, and their difference is the ray long before the sum is.
                change = newton_dual - dual
                yield Iterate(W=None, dual=np.where(rows.tie, change, change.clip(min=0.0)), step=sweeps)
                W, dual = newton_W, newton_dual
        chunk = max(4, sweeps // 4)


def _newton_pays(rows: Rows, dual: Floats, sweeps: int) -> bool:
    """Whether coordinate descent has by now cost as much as the factorisations that would end it.

    Operations are counted, not seconds, so that the same problem is always solved in the same way.
    """
    p, q, k = rows.tokens.shape[2], rows.queries.shape[1], float((dual > 0).sum())
    sweep = 4.0 * p * (q * len(rows.sequence) + 2.0 * rows.n_rows)
    # Coordinate descent runs at about a quarter of the speed of dense factorisations.
    newton = 4.0 * (k**3 / 3.0 + k * k * (p + q))
    return bool(4.0 * sweeps * sweep >= newton)


def _newton_rounds(rows: Rows, W: Floats, dual: Floats) -> Iterator[tuple[Floats, Floats]]:
    """Proximal Newton steps on a working set that takes in the rows each W violates."""
    member = (dual > 0) | rows.tie | _near(rows, coordinate.values(rows, W))
    work: WorkingSet | None = None
    quiet = 0
    while quiet < 4:
        index: Ints = member.nonzero()[0]
        if len(index) > MAX_WORKING_SET:
            return
        if work is None or len(index) != len(work.rows):
            work = WorkingSet.of(rows, index)
        dual = dual.copy()
        dual[index] = proximal_step(work, dual[index])
        W = coordinate.combine(rows, dual)
        yield W, dual
        shortfall = (rows.rhs - coordinate.values(rows, W)) / rows.size
        entering = ~member & (shortfall > 1e-13 * np.abs(shortfall).max())
        quiet = 0 if entering.any() else quiet + 1
        member = member | worst(entering, shortfall, limit=max(100, len(index) // 2))


def _near(rows: Rows, values: Floats) -> Bools:
    """Rows that the present W violates or barely satisfies."""
    return np.asarray(values < rows.rhs + 0.01 * np.abs(rows.rhs))

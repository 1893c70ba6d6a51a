"""Proofs of infeasibility that a few sequences make by themselves.

Where a few sequences among many cannot be separated, their multipliers grow without end while those of all others
settle, but only when these have settled to the last digit is the growth a ray. So from time to time the sequences that
grow most are solved alone, which takes next to no time: a ray of some rows is a ray of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from attsvm.solvers.loop import Iterate, Limits, drive
from attsvm.solvers.rows import Floats, Ints, Rows
from attsvm.solvers.view import RowView

__all__ = ["watched"]

FIRST = 64
"""Steps before the first look; the next ones come whenever the steps have doubled."""

SIZES = (1, 8, 64)
"""Numbers of sequences that are solved alone."""

STEPS = 60
"""Steps that they get."""


def watched(iterates: Iterator[Iterate], rows: Rows, solver: Callable[[Rows], Iterator[Iterate]]) -> Iterator[Iterate]:
    """The iterates of a Frobenius-norm solver, and rays of the sequences whose multipliers grow most.

    Where sequences are spread over processes every one looks at its own; all offer at the same steps, so that sums over
    processes meet.

    Parameters
    ----------
    iterates
        The solver's.
    rows
        The rows of this process.
    solver
        Makes the iterates for some of the rows.
    """
    due, before = FIRST, np.zeros(rows.n_rows)
    for iterate in iterates:
        yield iterate
        if iterate.dual is None or iterate.W is None or iterate.step < due:
            continue
        due = 2 * iterate.step
        yield Iterate(W=None, dual=_ray(rows, iterate.dual - before, solver), step=iterate.step)
        before = iterate.dual


def _ray(rows: Rows, growth: Floats, solver: Callable[[Rows], Iterator[Iterate]]) -> Floats:
    """A ray (R,) of the sequences that grow most, or zeros."""
    ray = np.zeros(rows.n_rows)
    weight = np.bincount(rows.sequence[rows.block], np.abs(growth) * rows.size, minlength=rows.shape[0])
    order = np.argsort(-weight, kind="stable")
    for count in SIZES:
        chosen: Ints = np.sort(order[:count])
        index, some = rows.of_sequences(chosen)
        if len(index) == rows.n_rows or not weight[chosen].all():
            break
        outcome = drive(RowView(rows=some), solver(some), norm="fro", tol=0.5, limits=Limits(iterations=STEPS))
        if outcome.ray is not None:
            ray[index] = outcome.ray
            break
    return ray

"""The Frobenius-norm solver: coordinate descent comes near, a semismooth Newton method finishes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from attsvm.solvers import coordinate
from attsvm.solvers.gram import gram_operations, normal_operations
from attsvm.solvers.loop import Iterate
from attsvm.solvers.operator import CompiledOperator, RowOperator
from attsvm.solvers.rows import Floats, Rows
from attsvm.solvers.semismooth import MAX_BYTES, multiplier_iterates

__all__ = ["frobenius_iterates"]

ALONE = 1.0
"""eps to begin with where coordinate descent has not come near."""


def frobenius_iterates(
    rows: Rows,
    *,
    start: Floats | None = None,
    method: str = "auto",
    max_bytes: float | None = None,
    device: Any = "cpu",
    group: Any = None,
) -> Iterator[Iterate]:
    """Iterates of the dual method, without end; the caller stops on the gap.

    Parameters
    ----------
    rows
        The problem, or this process's part of it.
    start
        Multipliers (R,) to begin with.
    method
        ``"coordinate"`` for coordinate descent alone, ``"newton"`` for Newton steps alone, ``"auto"`` for both.
    max_bytes
        Size of a Gram matrix at most.
    device
        Where the work is done. Coordinate descent is compiled for the CPU, elsewhere Newton works alone.
    group
        The ``torch.distributed`` group that shares the problem; here too Newton works alone.
    """
    memory = MAX_BYTES if max_bytes is None else max_bytes
    if group is not None or str(device) != "cpu":
        operator = RowOperator.of(rows, device=device, group=group)
        yield from multiplier_iterates(rows, operator, dual=start, first=ALONE, max_bytes=memory)
        return
    descent = coordinate.Descent(rows, np.zeros(rows.n_rows) if start is None else start.copy())
    turns = 1
    while method != "newton":
        for _ in range(turns):
            descent.advance()
        yield Iterate(W=descent.W, dual=descent.dual.copy(), step=descent.sweeps)
        if method == "auto" and _newton_pays(rows, descent.dual, descent.sweeps):
            break
        turns = max(1, descent.sweeps // 16)
    yield from multiplier_iterates(
        rows, CompiledOperator.of(rows), dual=descent.dual, step=descent.sweeps, max_bytes=memory
    )


def _newton_pays(rows: Rows, dual: Floats, sweeps: int) -> bool:
    """Whether coordinate descent has by now cost as much as the factorisations that would end it.

    Operations are counted, not seconds, so that the same problem is always solved in the same way.
    """
    p, q, k = rows.tokens.shape[2], rows.queries.shape[1], float((dual > 0).sum())
    sweep = 4.0 * p * (q * len(rows.sequence) + 2.0 * rows.n_rows)
    # Some twenty factorisations, each five to ten times faster than coordinate descent for as many operations.
    newton = 6.0 * min(gram_operations(k, p, q), normal_operations(k, p, q))
    return bool(sweeps * sweep >= newton)

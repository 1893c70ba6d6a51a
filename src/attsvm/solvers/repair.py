"""The last 1e-9: a small correction that makes a nearly feasible matrix satisfy every row exactly.

Without offsets a matrix is made feasible by scaling. With offsets, or with ties, scaling would break other rows;
then the smallest Frobenius correction on the rows that fail, and on those that just hold, is added.
"""

from __future__ import annotations

import numpy as np
import torch

from attsvm.solvers import coordinate
from attsvm.solvers.newton import PROXIMAL, WorkingSet
from attsvm.solvers.rows import Floats, Rows

__all__ = ["repaired"]

_ROOM = 1e-12
"""How far beyond its bound a corrected row is put, relative to its size and the norm of W."""


def repaired(rows: Rows, W: Floats, values: Floats, *, rounds: int = 3, limit: int = 5000) -> Floats:
    """``W`` plus the smallest correction that makes failing rows hold; ``W`` itself if too many rows fail.

    Parameters
    ----------
    rows
        The problem.
    W
        (p, q).
    values
        (R,) of ``W``.
    rounds
        Corrections to try; each also takes in the rows that the previous one broke.
    limit
        Rows that a correction may involve.
    """
    unit = rows.size * max(float(np.linalg.norm(W)), 1e-300)
    member = np.zeros(rows.n_rows, dtype=bool)
    for _ in range(rounds):
        short = rows.rhs - values
        failing = np.where(rows.tie, np.abs(short) > _ROOM * unit, short > 0)
        if not failing.any():
            break
        member |= failing | rows.tie | (short > -1e-6 * unit)
        index = member.nonzero()[0]
        if len(index) > limit:
            break
        work = WorkingSet.of(rows, index)
        # Rows that hold with room to spare keep their value; the others are put just beyond their bound.
        wanted = np.where(rows.tie, short, np.maximum(short, 0.0) + _ROOM * unit)[index] / rows.size[index]
        system = work.gram.clone()
        system.diagonal().add_(PROXIMAL)
        step = torch.linalg.lstsq(system, torch.from_numpy(wanted)[:, None]).solution[:, 0].numpy()
        correction = np.zeros(rows.n_rows)
        correction[index] = step / rows.size[index]
        W = W + coordinate.combine(rows, correction)
        values = coordinate.values(rows, W)
    return W

"""The last 1e-9: a small correction that makes a nearly feasible matrix satisfy every row exactly.

Without offsets, rows with a positive right-hand side are made to hold by scaling. Scaling does nothing for ties and
rows that ask for 0, and with offsets it would break other rows; there the smallest Frobenius correction on the rows
that fail, and on those that just hold, is added.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from attsvm.selection.certificate import TIE_TOLERANCE
from attsvm.solvers.newton import PROXIMAL
from attsvm.solvers.rows import Bools, Floats, Ints, Rows
from attsvm.solvers.view import RowView

__all__ = ["holds", "repaired", "rigid", "tolerant"]

_ROOM = 1e-12
"""How far beyond its bound a corrected row is put, relative to its size and the norm of W."""

_ANCHORED = 1e-3
"""The same, as a part of _ROOM, relative to the norm of the centre: ten times the rounding of the sum."""


def rigid(rows: Rows) -> Bools:
    """Rows (R,) that no scaling of W brings into force: ties, rows that ask for 0, and with offsets all.

    With slack only ties must hold.
    """
    if math.isfinite(rows.penalty):
        return rows.tie
    return np.asarray(rows.tie | (rows.rhs == 0.0) | rows.has_offsets)


def tolerant(rows: Rows) -> bool:
    """Whether some rows hold to a tolerance only: ties and rows that ask for 0."""
    return bool((rows.tie | (rows.rhs == 0.0)).any())


def holds(rows: Rows, W: Floats, values: Floats) -> bool:
    """Whether every rigid row holds under ``W`` (p, q), with the tolerances of the certificate."""
    short = np.where(rows.tie, np.abs(rows.rhs - values), rows.rhs - values)
    allowance = 0.5 * TIE_TOLERANCE * rows.size * float(np.linalg.norm(W))
    return not np.any(rigid(rows) & (short > np.where(rows.tie | (rows.rhs == 0.0), allowance, 0.0)))


def repaired(view: RowView, W: Floats, values: Floats, *, rounds: int = 3, limit: int = 5000) -> Floats:
    """``W`` plus the smallest correction that makes failing rows hold; ``W`` itself if too many rows fail.

    Parameters
    ----------
    view
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
    rows = view.rows
    unit = rows.size * max(float(np.linalg.norm(W)), _ANCHORED * rows.anchor, 1e-300)
    stiff = rigid(rows)
    member = np.zeros(rows.n_rows, dtype=bool)
    for _ in range(rounds):
        short = rows.rhs - values
        failing = np.where(rows.tie, np.abs(short) > _ROOM * unit, short > -0.5 * _ROOM * unit) & stiff
        if view.total(float(failing.any())) == 0:
            break
        member |= failing | rows.tie | (stiff & (short > -1e-6 * unit))
        if view.total(float(member.sum())) > limit:
            break
        index = member.nonzero()[0]
        # Rows that hold with room to spare keep their value; the others are put just beyond their bound.
        wanted = np.where(rows.tie, short, np.maximum(short, 0.0) + _ROOM * unit)[index] / rows.size[index]
        W = W + _least_correction(view, index, wanted)
        values = view.values(W)
    return W


def _least_correction(view: RowView, index: Ints, wanted: Floats) -> Floats:
    """The smallest matrix (p, q) that changes the rows ``index``, scaled to unit size, by ``wanted``."""
    rows = view.rows
    D, Z = rows.differences(index), rows.queries[rows.block[index]]
    D, Z, wanted = (view.gathered(part) for part in (_unit(D), _unit(Z), wanted))
    left, right = torch.from_numpy(D), torch.from_numpy(Z)
    system = (left @ left.T).mul_(right @ right.T)
    system.diagonal().fill_(1.0 + PROXIMAL)
    step = torch.linalg.lstsq(system, torch.from_numpy(wanted)[:, None]).solution
    return np.asarray(((left * step).T @ right).numpy())


def _unit(vectors: Floats) -> Floats:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

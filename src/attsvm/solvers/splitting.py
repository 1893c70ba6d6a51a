r"""Douglas-Rachford splitting for every norm: exact projections on the rows, and the norm's proximal map.

With f the norm, or half its square for the soft margin, one step takes from a matrix V

* W, the proximal map of what the rows ask: for the hard margin the projection of V on the polyhedron of all rows,
  ``W = V + sum(l A)``, where the multipliers l solve the same kind of dual as the Frobenius norm, on the Gram matrix
  of a working set that hardly changes between steps; for the soft margin the same with l at most tau times the price;
* Y = prox(2 W - V), the proximal map of ``tau f``;
* V + Y - W.

At the fixed point W = Y is the minimiser and ``l / tau`` are its multipliers; before that W satisfies every row (or
pays its slack), so every step gives both bounds. Unlike :mod:`attsvm.solvers.primal_dual` the speed does not depend on
how nearly parallel the rows are, which on embeddings of real text decides; its price is one factorisation of the
active rows.

References
----------
Eckstein, Bertsekas. "On the Douglas-Rachford splitting method and the proximal point algorithm", 1992.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from attsvm.selection.norms import Norm, matrix_norm
from attsvm.solvers.loop import Iterate
from attsvm.solvers.newton import MAX_WORKING_SET, WorkingSet, project
from attsvm.solvers.proximal import proximal
from attsvm.solvers.rows import Floats, Rows

__all__ = ["splitting_iterates"]


def splitting_iterates(
    rows: Rows, norm: Norm = "nuc", *, W: Floats, dual: Floats, check_every: int = 5
) -> Iterator[Iterate]:
    """Iterates of the splitting; ends if the working set outgrows memory.

    Parameters
    ----------
    rows
        A feasible problem.
    norm
        The norm.
    W
        (p, q) to begin with.
    dual
        Multipliers (R,) whose positive rows are the first working set.
    check_every
        Steps between two offers.
    """
    soft = math.isfinite(rows.penalty)
    V = torch.from_numpy(W).clone()
    # A step moves W by about tau times the slope of f, which is 1 for a norm, in its dual, and W for half a square.
    tau = _tau(V, norm, soft) * (1.0 if soft else 0.1) or 1.0
    member = (dual > 0) | rows.tie
    multiplier = np.zeros(rows.n_rows)
    work: WorkingSet | None = None
    step = 0
    while member.sum() <= MAX_WORKING_SET:
        bound = tau * rows.penalty
        projection = project(rows, V.numpy(), np.minimum(multiplier, bound), member, work, penalty=bound)
        work, member, multiplier = projection.work, projection.member, projection.dual
        found = torch.from_numpy(projection.W)
        Y = proximal(2.0 * found - V, norm, tau, squared=soft)
        step += 1
        if step % check_every == 0:
            # The loop scales the multipliers of the hard margin itself.
            yield Iterate(W=projection.W, dual=multiplier / tau if soft else multiplier, step=step)
            yield Iterate(W=Y.numpy(), dual=None, step=step)
        V = V + Y - found
        if step in (5, 15, 45):
            factor = (_tau(Y, norm, soft) or 0.25 * tau) / tau
            V, tau, multiplier = found - factor * (found - V), factor * tau, factor * multiplier


def _tau(W: torch.Tensor, norm: Norm, soft: bool) -> float:
    """A step of the size of W: ``tau G`` is as large as W, for G the slope of f at W."""
    value = matrix_norm(W, norm)
    if value == 0.0:
        return 0.0
    return float((W * W).sum()) / value ** (2 if soft else 1)

r"""Douglas-Rachford splitting for the nuclear norm: exact projections on the rows, thresholds on the spectrum.

From a matrix V, one step takes

* W, the projection of V on the polyhedron of all rows: ``W = V + sum(l A)``, where the multipliers l solve the same
  kind of dual as the Frobenius norm, on the Gram matrix of a working set that hardly changes between steps;
* Y = shrink(2 W - V, tau), the proximal map of ``tau ||.||_*``;
* V + Y - W.

At the fixed point W = Y is the minimiser and ``l / tau`` are its multipliers; before that, W satisfies every row, so
every step gives both bounds. Unlike :mod:`attsvm.solvers.primal_dual` the speed does not depend on how nearly
parallel the rows are, which on embeddings of real text decides; its price is one factorisation of the active rows.

References
----------
Eckstein, Bertsekas. "On the Douglas-Rachford splitting method and the proximal point algorithm", 1992.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from attsvm.solvers.loop import Iterate
from attsvm.solvers.newton import MAX_WORKING_SET, WorkingSet, project
from attsvm.solvers.primal_dual import shrink
from attsvm.solvers.rows import Floats, Rows

__all__ = ["splitting_iterates"]


def splitting_iterates(rows: Rows, *, W: Floats, dual: Floats, check_every: int = 5) -> Iterator[Iterate]:
    """Iterates of the splitting; ends if the working set outgrows memory.

    Parameters
    ----------
    rows
        A feasible problem.
    W
        (p, q) to begin with, not 0.
    dual
        Multipliers (R,) whose positive rows are the first working set.
    check_every
        Steps between two offers.
    """
    V = torch.from_numpy(W).clone()
    tau = 0.1 * float(torch.linalg.svdvals(V).sum())
    member = (dual > 0) | rows.tie
    multiplier = np.zeros(rows.n_rows)
    work: WorkingSet | None = None
    step = 0
    while member.sum() <= MAX_WORKING_SET:
        projection = project(rows, V.numpy(), multiplier, member, work)
        work, member, multiplier = projection.work, projection.member, projection.dual
        found = torch.from_numpy(projection.W)
        Y = shrink(2.0 * found - V, tau)
        step += 1
        if step % check_every == 0:
            yield Iterate(W=projection.W, dual=multiplier, step=step)
            yield Iterate(W=Y.numpy(), dual=None, step=step)
        V = V + Y - found
        if step in (5, 15, 45):
            # The best tau is about the size of the singular values of the solution.
            nuclear = float(torch.linalg.svdvals(Y).sum())
            factor = float((Y * Y).sum()) / nuclear / tau if nuclear > 0 else 0.25
            V, tau, multiplier = found - factor * (found - V), factor * tau, factor * multiplier

"""The solvers of the norms other than Frobenius, and which of them pays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from attsvm.selection.norms import Norm
from attsvm.solvers.loop import Iterate
from attsvm.solvers.newton import MAX_WORKING_SET
from attsvm.solvers.primal_dual import primal_dual_iterates
from attsvm.solvers.proximal import is_spectral
from attsvm.solvers.proximal_newton import fits, newton_iterates
from attsvm.solvers.rows import Floats, Rows
from attsvm.solvers.splitting import splitting_iterates

__all__ = ["method_for", "norm_iterates", "step_cost"]


def norm_iterates(
    rows: Rows, norm: Norm, *, W: Floats, dual: Floats, method: str = "auto", group: Any = None
) -> Iterator[Iterate]:
    """Iterates that approach the problem in any norm, with hard or soft margin; the caller stops on the gap.

    Parameters
    ----------
    rows
        A feasible problem.
    norm
        The norm.
    W, dual
        (p, q) and (R,) to begin with.
    method
        ``"newton"``, ``"splitting"``, ``"primal-dual"``, or ``"auto"`` for the one of :func:`method_for`.
    group
        The ``torch.distributed`` group that shares the problem: then only ``"primal-dual"``.
    """
    chosen = method_for(rows, dual, norm) if method == "auto" else method
    step = 0
    if chosen in ("newton", "splitting"):
        solver = newton_iterates if chosen == "newton" else splitting_iterates
        for iterate in solver(rows, norm, W=W, dual=dual):
            step = iterate.step
            W = W if iterate.W is None else iterate.W
            dual = dual if iterate.dual is None else iterate.dual
            yield iterate
    # The other two end where memory does; this one never ends.
    for iterate in primal_dual_iterates(rows, norm, W=W, dual=dual, group=group):
        yield Iterate(W=iterate.W, dual=iterate.dual, step=step + iterate.step)


def method_for(rows: Rows, dual: Floats, norm: Norm) -> str:
    """The method that pays, by counted operations; ``dual`` (R,) says how many rows matter."""
    p, q = rows.tokens.shape[2], rows.queries.shape[1]
    members = 1.5 * float(((dual > 0) | rows.tie).sum())
    spectrum = 20.0 * p * q * min(p, q)
    # A proximal map of entries costs about as much as 500 operations on each.
    proximal = spectrum if is_spectral(norm) else 500.0 * p * q
    primal_dual = 8.0 * rows.n_rows * p + proximal
    if norm != "nuc":
        newton = 5.0 * members**3 / 3.0 + members**2 * max(p, q) ** 2 + proximal
        # Newton's method needs some 40 steps; the other, at about a tenth of the speed, some 500 iterations, and many
        # more where vertices have to be found.
        vertices = norm in (1.0, math.inf)
        pays = newton <= (5000.0 if vertices else 500.0) * primal_dual
        return "newton" if fits(rows, members) and pays else "primal-dual"
    splitting = members**3 / 3.0 + spectrum
    return "splitting" if members <= MAX_WORKING_SET and splitting <= 40.0 * primal_dual else "primal-dual"


def step_cost(rows: Rows, dual: Floats, method: str) -> float:
    """Operations of a step of a first-order method for the nuclear norm, as the finish counts its own."""
    p, q = rows.tokens.shape[2], rows.queries.shape[1]
    members = 1.5 * float((dual != 0).sum())
    # A singular-value decomposition runs at about a fifth of the speed of factorisations.
    return float(100.0 * p * q * min(p, q) + (members**3 / 3.0 if method == "splitting" else 8.0 * rows.n_rows * p))

r"""Restarted primal-dual hybrid gradient, for every norm.

The saddle problem is $\min_W \max_l f(W) + \langle l, c - A(W)\rangle$ with rows of unit size and l in a box: for the
hard margin f is the norm and l >= 0; for the soft margin f is half the square of the norm and l is at most the price
of the slack. One step maps z = (W, l) to T(z):

* W+ = prox(W + tau A*(l)), the proximal map of tau f (for the nuclear norm W+ is exactly low-rank);
* l+ = the point of the box nearest to l + sigma (c - A(2 W+ - W)).

The iteration is Halpern's, $z_{k+1} = \frac{k+1}{k+2} (2 T(z_k) - z_k) + \frac{1}{k+2} z_0$, whose fixed-point
residual falls like 1/k from any anchor z_0; it is restarted, with a new anchor, whenever the residual has fallen
enough, and at each restart the balance of primal and dual steps follows the distance that each has moved.
Cost of an iteration: two products with the tokens and one proximal map (p, q).

References
----------
Applegate et al. "Practical large-scale linear programming using primal-dual hybrid gradient", 2021, arXiv:2106.04756.
Lu, Yang. "Restarted Halpern PDHG for linear programming", 2024, arXiv:2407.16144.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attsvm.selection.norms import Norm, dual_norm
from attsvm.solvers.loop import Iterate
from attsvm.solvers.operator import RowOperator
from attsvm.solvers.proximal import proximal
from attsvm.solvers.rows import Floats, Rows

__all__ = ["primal_dual_iterates"]


def primal_dual_iterates(
    rows: Rows, norm: Norm, *, W: Floats, dual: Floats, check_every: int = 20, group: Any = None
) -> Iterator[Iterate]:
    """Iterates of the primal-dual method, without end; the caller stops on the gap.

    Parameters
    ----------
    rows
        A feasible problem.
    norm
        The norm.
    W
        (p, q) to begin with.
    dual
        Multipliers (R,) to begin with; they are scaled to fit.
    check_every
        Iterations between two offers.
    group
        The ``torch.distributed`` group that shares the problem, of which ``rows`` are this process's part.
    """
    operator = RowOperator.of(rows, group=group)
    rhs = torch.from_numpy(rows.rhs) / operator.size
    soft = math.isfinite(rows.penalty)
    free = torch.from_numpy(rows.tie)
    lowest = torch.where(free, -math.inf, torch.zeros_like(rhs))
    highest = torch.where(free, math.inf, rows.penalty * operator.size)
    primal = torch.from_numpy(W).clone()
    multiplier = torch.from_numpy(dual) * operator.size
    slope = dual_norm(operator.adjoint(multiplier), norm)
    if slope > 0:
        multiplier = multiplier * (_total(operator, multiplier * rhs) / slope**2 if soft else 1.0 / slope)
    multiplier = multiplier.clamp(lowest, highest) if slope > 0 else torch.zeros_like(rhs)
    eta = 0.99 / (1.01 * operator.norm())
    balance = _ratio(operator, multiplier, primal, 1.0)
    step = 0
    while True:
        anchor_W, anchor_l = primal.clone(), multiplier.clone()
        first = last = math.inf
        k = 0
        while True:
            tau, sigma = eta / balance, eta * balance
            new_W = proximal(primal + tau * operator.adjoint(multiplier), norm, tau, squared=soft)
            raw = multiplier + sigma * (rhs - operator.forward(2.0 * new_W - primal))
            new_l = raw.clamp(lowest, highest)
            move_W, move_l = new_W - primal, new_l - multiplier
            step += 1
            if step % check_every == 0:
                yield Iterate(W=new_W.numpy(), dual=(new_l / operator.size).numpy(), step=step)
            residual = _distance(operator, move_W, move_l, eta, balance)
            if k == 0:
                first = residual
            enough = residual <= 0.2 * first or (residual <= 0.8 * first and residual > last)
            if k > 0 and (enough or k >= 0.36 * step + check_every):
                primal, multiplier = new_W, new_l
                break
            last = residual
            w = (k + 1) / (k + 2)
            primal = w * (primal + 2.0 * move_W) + (1.0 - w) * anchor_W
            multiplier = w * (multiplier + 2.0 * move_l) + (1.0 - w) * anchor_l
            k += 1
        moved = _ratio(operator, multiplier - anchor_l, primal - anchor_W, balance)
        balance = math.exp(0.5 * math.log(moved) + 0.5 * math.log(balance))


def _total(operator: RowOperator, values: Tensor) -> float:
    """The sum of numbers (R,) of the rows of all processes."""
    return float(operator.total(values.sum()))


def _ratio(operator: RowOperator, dual: Tensor, primal: Tensor, default: float) -> float:
    """``||dual|| / ||primal||``, or the default where that is of no use."""
    above, below = math.sqrt(_total(operator, dual * dual)), float(torch.linalg.vector_norm(primal))
    return above / below if above > 1e-10 and below > 1e-10 else default


def _distance(operator: RowOperator, W: Tensor, dual: Tensor, eta: float, balance: float) -> float:
    """Length of a move in the metric in which the step is non-expansive."""
    cross, square_dual = operator.total(torch.stack([dual @ operator.forward(W), dual @ dual])).tolist()
    square = balance * float((W * W).sum()) + square_dual / balance - 2.0 * eta * cross
    return math.sqrt(max(square, 0.0))

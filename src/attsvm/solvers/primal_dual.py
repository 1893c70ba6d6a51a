r"""Restarted primal-dual hybrid gradient for the nuclear norm.

The saddle problem is $\min_W \max_{l \ge 0} \|W\|_* + \langle l, c - A(W)\rangle$ with rows of unit size. One step
maps z = (W, l) to T(z):

* W+ = shrink(W + tau A*(l), tau), the soft threshold of the singular values, which makes W+ exactly low-rank;
* l+ = max(0, l + sigma (c - A(2 W+ - W))).

The iteration is Halpern's, $z_{k+1} = \frac{k+1}{k+2} (2 T(z_k) - z_k) + \frac{1}{k+2} z_0$, whose fixed-point
residual falls like 1/k from any anchor z_0; it is restarted, with a new anchor, whenever the residual has fallen
enough, and at each restart the balance of primal and dual steps follows the distance that each has moved.
Cost of an iteration: two products with the tokens and one singular-value decomposition (p, q).

References
----------
Applegate et al. "Practical large-scale linear programming using primal-dual hybrid gradient", 2021, arXiv:2106.04756.
Lu, Yang. "Restarted Halpern PDHG for linear programming", 2024, arXiv:2407.16144.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from attsvm.solvers.loop import Iterate
from attsvm.solvers.operator import RowOperator
from attsvm.solvers.rows import Floats, Rows

__all__ = ["nuclear_iterates", "shrink"]


def shrink(M: Tensor, threshold: float) -> Tensor:
    """Soft threshold of the singular values of ``M`` (p, q): the proximal map of the nuclear norm."""
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    kept = int((s > threshold).sum())
    shrunk: Tensor = (U[:, :kept] * (s[:kept] - threshold)) @ Vh[:kept]
    return shrunk


def nuclear_iterates(rows: Rows, *, W: Floats, dual: Floats, check_every: int = 20) -> Iterator[Iterate]:
    """Iterates of the primal-dual method, without end; the caller stops on the gap.

    Parameters
    ----------
    rows
        A feasible problem.
    W
        (p, q) to begin with.
    dual
        Multipliers (R,) to begin with; they are scaled to be feasible.
    check_every
        Iterations between two offers.
    """
    operator = RowOperator.of(rows)
    rhs = torch.from_numpy(rows.rhs) / operator.size
    free = torch.from_numpy(rows.tie)
    primal = torch.from_numpy(W).clone()
    multiplier = torch.from_numpy(dual) * operator.size
    slope = float(torch.linalg.matrix_norm(operator.adjoint(multiplier), 2))
    multiplier = multiplier / slope if slope > 0 else torch.zeros_like(rhs)
    eta = 0.99 / (1.01 * operator.norm())
    balance = _ratio(multiplier, primal, 1.0)
    step = 0
    while True:
        anchor_W, anchor_l = primal.clone(), multiplier.clone()
        first = last = math.inf
        k = 0
        while True:
            tau, sigma = eta / balance, eta * balance
            new_W = shrink(primal + tau * operator.adjoint(multiplier), tau)
            raw = multiplier + sigma * (rhs - operator.forward(2.0 * new_W - primal))
            new_l = torch.where(free, raw, raw.clamp(min=0.0))
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
        moved = _ratio(multiplier - anchor_l, primal - anchor_W, balance)
        balance = math.exp(0.5 * math.log(moved) + 0.5 * math.log(balance))


def _ratio(dual: Tensor, primal: Tensor, default: float) -> float:
    """``||dual|| / ||primal||``, or the default where that is of no use."""
    above, below = float(torch.linalg.vector_norm(dual)), float(torch.linalg.vector_norm(primal))
    return above / below if above > 1e-10 and below > 1e-10 else default


def _distance(operator: RowOperator, W: Tensor, dual: Tensor, eta: float, balance: float) -> float:
    """Length of a move in the metric in which the step is non-expansive."""
    cross = float(dual @ operator.forward(W))
    square = balance * float((W * W).sum()) + float(dual @ dual) / balance - 2.0 * eta * cross
    return math.sqrt(max(square, 0.0))

r"""Small dense quadratic programs in a box, ``min g^T x + x^T H x / 2`` over ``lower <= x <= upper``, H definite.

Block principal pivoting guesses which variables are at which bound, solves for the others and exchanges all the wrong
ones: a handful of factorisations, when it ends. Where it cycles, an interior-point method finds a better guess in some
twenty factorisations, whatever the conditioning.

References
----------
Portugal, Judice, Vicente. "A comparison of block pivoting and interior-point algorithms for linear least squares
problems with nonnegative variables", 1994.
Mehrotra. "On the implementation of a primal-dual interior point method", 1992.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["solve_in_box"]

LOWER, FREE, UPPER = -1, 0, 1
"""Where a variable is: at its lower bound, between, at its upper bound."""


def solve_in_box(H: Tensor, g: Tensor, lower: Tensor, upper: Tensor) -> Tensor | None:
    """The minimiser (k,), or a point near it; None where H is not definite in float64.

    Parameters
    ----------
    H
        (k, k), symmetric.
    g
        (k,).
    lower, upper
        (k,) bounds <= 0 and >= 0, infinite ones included, lower < upper.
    """
    guess = torch.where(lower == 0, LOWER, torch.where(upper == 0, UPPER, FREE))
    x, found = _block_pivoting(H, g, lower, upper, guess)
    if found or x is None:
        return x
    inner, guess = _interior_point(H, g, lower, upper)
    x, found = _block_pivoting(H, g, lower, upper, guess)
    return x if found else inner


def _block_pivoting(H: Tensor, g: Tensor, lower: Tensor, upper: Tensor, at: Tensor) -> tuple[Tensor | None, bool]:
    """The minimiser and True, if the method ends; None where H is not definite."""
    tolerance = 1e-13 * float(g.abs().amax())
    fewest, patience = len(g) + 1, 5
    while patience >= 0:
        x = torch.where(at == LOWER, lower, torch.where(at == UPPER, upper, 0.0))
        inside = (at == FREE).nonzero().flatten()
        factor, info = torch.linalg.cholesky_ex(H[inside][:, inside])
        if int(info) != 0:
            return None, False
        x[inside] = torch.cholesky_solve(-(g + H @ x)[inside, None], factor)[:, 0]
        slope = g + H @ x
        wanted = torch.where(at == FREE, UPPER * (x > upper).int() + LOWER * (x < lower).int(), at)
        leaves = ((at == LOWER) & (slope < -tolerance)) | ((at == UPPER) & (slope > tolerance))
        wanted = torch.where(leaves, FREE, wanted)
        wrong = int((wanted != at).sum())
        if wrong == 0:
            return x.clamp(lower, upper), True
        patience = 5 if wrong < fewest else patience - 1
        fewest, at = min(fewest, wrong), wanted
    return x, False


def _interior_point(H: Tensor, g: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """A point near the minimiser, and which bounds hold there with equality, by predictor and corrector steps."""
    steepest = float(g.abs().amax())
    unit = steepest / float(H.diagonal().amax())
    width = (upper - lower).clamp(max=4.0 * unit)
    x = torch.where(lower.isfinite(), lower + 0.5 * width, torch.where(upper.isfinite(), upper - 0.5 * width, 0.0))
    signs = torch.stack([torch.ones_like(x), -torch.ones_like(x)])
    bound = torch.stack([lower, -upper])
    real = bound.isfinite()
    count = max(1, int(real.sum()))
    # Row 0 is for the lower bounds and row 1 for the upper ones; where there is none, the room is 1 and the force 0.
    force = torch.where(real, steepest, 0.0)
    room = torch.where(real, signs * x - bound, 1.0)
    for _ in range(60):
        residual = g + H @ x - (signs * force).sum(0)
        gap = float((room * force).sum()) / count
        if gap <= 1e-14 * unit * steepest and float(residual.abs().amax()) <= 1e-12 * steepest:
            break
        factor, info = torch.linalg.cholesky_ex(H + torch.diag((force / room).sum(0)))
        if int(info) != 0:
            break
        target = torch.zeros_like(force)
        for _ in range(2):
            # force * room -> target, linearised.
            pull = torch.where(real, target / room, 0.0) - force
            step = torch.cholesky_solve(((signs * pull).sum(0) - residual)[:, None], factor)[:, 0]
            change = torch.where(real, signs * step, 0.0)
            push = pull - force * change / room
            length = min(1.0, 0.995 * _longest(room, change)), min(1.0, 0.995 * _longest(force, push))
            after = float(((room + length[0] * change) * (force + length[1] * push)).sum()) / count
            target = torch.where(real, gap * (after / gap) ** 3 - change * push, 0.0) if gap > 0.0 else target
        x, force = x + length[0] * step, force + length[1] * push
        room = torch.where(real, room + length[0] * change, 1.0)
    # A bound holds with equality where its force outweighs its room, each in its unit.
    tight = real & (room * float(H.diagonal().amax()) < force)
    return x.clamp(lower, upper), torch.where(tight[0], LOWER, torch.where(tight[1], UPPER, FREE))


def _longest(values: Tensor, change: Tensor) -> float:
    """The longest step that keeps ``values`` >= 0."""
    falling = change < 0
    return float((-values[falling] / change[falling]).amin()) if bool(falling.any()) else float("inf")

r"""A proximal Newton method for every norm: few steps, to the last digits, each with a matrix of the active rows.

With h half the square of the norm, whose minimiser under the rows is that of the norm, and rows of unit size, an outer
step goes from $(W_k, l_k)$ to the saddle point of

$$\max_l \min_W\; h(W) + \langle l, c - A(W) \rangle + \frac{1}{2\sigma}\|W - W_k\|_F^2 - \frac{\rho}{2}\|l - l_k\|^2$$

over l in the box [0, C] (hard margin: $C = \infty$; ties are free). The inner minimiser is the proximal map P of
$\sigma h$ at ``W_k + sigma A*(l)``, which leaves a smooth concave function of l with the gradient
``c - A(P) - rho (l - l_k)`` and, J being a derivative of P, the second derivative ``-(sigma A J A* + rho)``. Each
Newton step maximises that model over the box exactly, and a line search makes it safe. For l_1 and l_inf the function
is piecewise quadratic, so that the method ends at a vertex; for the others steps converge quadratically. Between outer
steps sigma grows and rho falls, as long as Newton's method keeps up.

Cost of a step with k rows near their bounds: ``k^2 p q`` for ``A J A*``, and a few factorisations of it.

References
----------
Li, Sun, Toh. "A highly efficient semismooth Newton augmented Lagrangian method for solving Lasso problems", 2018,
arXiv:1607.05428.
Rockafellar. "Augmented Lagrangians and applications of the proximal point algorithm in convex programming", 1976.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from attsvm.selection.norms import Norm, dual_norm, matrix_norm
from attsvm.solvers import coordinate
from attsvm.solvers.box_program import solve_in_box
from attsvm.solvers.loop import Iterate
from attsvm.solvers.proximal import is_spectral, magnitude_power, response, shrunken
from attsvm.solvers.rows import Bools, Floats, Rows

__all__ = ["fits", "newton_iterates"]

MAX_ROWS = 4000
"""Rows in a Newton system at most."""

MAX_ENTRIES = 2**25
"""Numbers in the expanded rows of a Newton system at most: 256 MB, and as much for their images."""

NEAR = 0.05
"""Rows whose slack is below this part of the largest right-hand side take part in a step."""

INNER = 30
"""Newton steps at most between two outer steps."""

DAMPING = 0.01
"""What is added to a Newton system where the residual is as large as the right-hand sides, in the unit of rho."""

LARGEST = 1e4
"""sigma at most, in the unit of the first one: rounding of l counts in W so many times."""

PATIENCE = 8
"""Outer steps in a row that may fail."""

QUICK, EASY, HARD = 2, 8, 16
"""An outer step of at most EASY inner steps is followed by a longer one, of more than HARD by a shorter one."""


def fits(rows: Rows, members: float) -> bool:
    """Whether a Newton system of so many rows is small enough."""
    side = max(rows.tokens.shape[2], rows.queries.shape[1])
    return members <= MAX_ROWS and members * side * side <= MAX_ENTRIES


def newton_iterates(rows: Rows, norm: Norm, *, W: Floats, dual: Floats) -> Iterator[Iterate]:
    """Iterates of the method; ends when it can go no further, or if the active rows outgrow memory.

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
    """
    start = torch.from_numpy(W)
    square = float((start * start).sum())
    # Half the square of the norm is about 1 / unit times that of the Frobenius norm.
    unit = square / matrix_norm(start, norm) ** 2 if square > 0.0 else 1.0
    fitted = _fitted(rows, norm, dual)
    # The more parallel the rows, the larger the multipliers for the same W.
    ruler = min(unit, float(np.abs(rows.rhs / rows.size).max()) / max(float(fitted.abs().amax()), 1e-300))
    stage: _Stage | None = _Stage(
        rows=rows,
        norm=norm,
        W=start,
        dual=fitted,
        sigma=unit,
        rho=1e-3 * ruler,
        damping=DAMPING * ruler,
        ceiling=LARGEST * unit,
        largest=LARGEST * unit,
    )
    count = 0
    while stage is not None:
        point, steps = stage.at(stage.dual), 0
        yield Iterate(W=point.W.numpy(), dual=(point.dual / stage.size).numpy(), step=count)
        while steps < INNER and point.residual > stage.tolerance(point):
            new = stage.newton_step(point)
            if new is None:
                break
            point, steps, count = new, steps + 1, count + 1
            yield Iterate(W=point.W.numpy(), dual=(point.dual / stage.size).numpy(), step=count)
        if not fits(rows, float(stage.members(point).sum())):
            return
        if math.isfinite(rows.penalty):
            yield Iterate(W=stage.lifted(point).numpy(), dual=None, step=count)
        failed = point.residual > 1e4 * stage.tolerance(point)
        stage = stage.following(point, steps, failed=failed)


def _fitted(rows: Rows, norm: Norm, dual: Floats) -> Tensor:
    """Of the multiples of the multipliers the one that promises most, for rows of unit size, in the box."""
    slope = dual_norm(torch.from_numpy(coordinate.combine(rows, dual)), norm)
    factor = max(0.0, float(dual @ rows.rhs)) / slope**2 if slope > 0.0 else 0.0
    fitted = np.where(rows.tie, factor * dual, (factor * dual).clip(0.0, rows.penalty))
    return torch.from_numpy(fitted * rows.size)


@dataclass(frozen=True, kw_only=True)
class _Point:
    """Multipliers of unit rows, and what they lead to."""

    dual: Tensor  # (R,)
    answer: _Answer
    value: float  # of the negated function of l
    noise: float  # rounding of the value
    slope: Tensor  # (R,) its gradient
    residual: float  # largest move that the gradient asks for inside the box

    @property
    def W(self) -> Tensor:  # noqa: N802
        return self.answer.W


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One outer step."""

    rows: Rows
    norm: Norm
    W: Tensor
    dual: Tensor
    sigma: float
    rho: float
    damping: float
    ceiling: float
    """Largest sigma that may be tried now."""
    largest: float
    """Largest sigma that may ever be tried."""
    left: int = 200
    """Outer steps that may follow."""
    failures: int = 0
    """How many of the last outer steps were not solved."""

    @cached_property
    def size(self) -> Tensor:
        return torch.from_numpy(self.rows.size)

    @cached_property
    def rhs(self) -> Tensor:
        return torch.from_numpy(self.rows.rhs / self.rows.size)

    @cached_property
    def lower(self) -> Tensor:
        return torch.from_numpy(np.where(self.rows.tie, -math.inf, 0.0))

    @cached_property
    def upper(self) -> Tensor:
        return torch.from_numpy(np.where(self.rows.tie, math.inf, self.rows.penalty * self.rows.size))

    def at(self, dual: Tensor) -> _Point:
        """The function of l, negated, at ``dual``."""
        combination = coordinate.combine(self.rows, (dual / self.size).numpy())
        answer = _answer(self.W + self.sigma * torch.from_numpy(combination), self.norm, self.sigma)
        values = torch.from_numpy(coordinate.values(self.rows, answer.W.contiguous().numpy())) / self.size
        moved = dual - self.dual
        slope = values - self.rhs + self.rho * moved
        terms = [
            float((answer.W * answer.W).sum()) / (2.0 * self.sigma),
            answer.half_square,
            0.5 * self.rho * float(moved @ moved),
            -float(self.rhs @ dual),
        ]
        residual = float((dual - (dual - slope).clamp(self.lower, self.upper)).abs().amax())
        noise = 1e-14 * sum(map(abs, terms))
        return _Point(dual=dual, answer=answer, value=sum(terms), noise=noise, slope=slope, residual=residual)

    def tolerance(self, point: _Point) -> float:
        """The residual at which the inner problem is solved: little more than rounding, which slack multiplies."""
        return 1e-13 * float(self.rhs.abs().amax()) + 1e-15 * float(torch.linalg.vector_norm(point.W))

    def lifted(self, point: _Point) -> Tensor:
        """W, scaled such that rows which need no slack have none: even that of rounding counts, times the price."""
        free = (point.dual < self.upper) & (self.rhs > 0.0) & ~torch.from_numpy(self.rows.tie)
        slack = (self.rho * (point.dual - self.dual) - point.slope)[free] / self.rhs[free]
        return point.W * (1.0 + min(float(slack.amax()), 1e-6)) if len(slack) > 0 else point.W

    def members(self, point: _Point) -> Bools:
        """Rows (R,) of the Newton system: those that have a multiplier or may get one."""
        near = (point.dual > 0) | (point.slope < NEAR * float(self.rhs.abs().amax()))
        return np.asarray(near.numpy() | self.rows.tie)

    def newton_step(self, point: _Point) -> _Point | None:
        """A point with a lower value, or None where rounding leaves none."""
        member = self.members(point)
        if not fits(self.rows, float(member.sum())):
            member &= (point.dual.numpy() > 0) | (point.slope.numpy() < 0)
            if not fits(self.rows, float(member.sum())):
                return None
        index = torch.from_numpy(member.nonzero()[0])
        D, Z = (_unit(part) for part in self._parts(index))
        H = self.sigma * point.answer.gram(D, Z)
        # Far from the solution the model may be flat where the function is not: that keeps steps to a sensible size.
        H.diagonal().add_(self.rho + self.damping * min(1.0, point.residual / float(self.rhs.abs().amax())))
        dual, slope = point.dual[index], point.slope[index]
        part = solve_in_box(H, slope, self.lower[index] - dual, self.upper[index] - dual)
        if part is None:
            return None
        direction = torch.zeros_like(point.dual)
        direction[index] = part
        fall, length = float(slope @ part), 1.0
        while length > 1e-6:
            new = self.at((point.dual + length * direction).clamp(self.lower, self.upper))
            if new.value <= point.value + 1e-4 * length * fall + point.noise:
                # Within the rounding of values only a smaller residual is progress.
                return new if -length * fall > point.noise or new.residual < 0.5 * point.residual else None
            length *= 0.5
        return None

    def _parts(self, index: Tensor) -> tuple[Tensor, Tensor]:
        chosen = index.numpy()
        return (
            torch.from_numpy(self.rows.differences(chosen)),
            torch.from_numpy(self.rows.queries[self.rows.block[chosen]]),
        )

    def following(self, point: _Point, steps: int, *, failed: bool) -> _Stage | None:
        """The next outer step, longer or shorter; None after the last one."""
        failures = self.failures + 1 if failed else 0
        moved = float(torch.linalg.vector_norm(point.W - self.W)) > 1e-13 * float(torch.linalg.vector_norm(point.W))
        if self.left == 0 or failures > PATIENCE or not (steps > 0 or moved):
            return None
        # What has failed is not tried again at once.
        ceiling = 0.5 * self.sigma if failed else min((1.2 if steps > QUICK else 2.0) * self.ceiling, self.largest)
        factor = 0.25 if failed else 4.0 if steps <= EASY else 0.5 if steps > HARD else 1.0
        factor = min(factor, ceiling / self.sigma)
        return replace(
            self,
            W=self.W if failed else point.W,
            dual=point.dual,
            sigma=self.sigma * factor,
            rho=self.rho / factor,
            ceiling=ceiling,
            left=self.left - 1,
            failures=failures,
        )


def _unit(vectors: Tensor) -> Tensor:
    unit: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return unit


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """The proximal map of ``sigma h`` at a matrix, with what its derivative needs.

    Attributes
    ----------
    W
        (p, q) the image.
    half_square
        h(W).
    before, after
        (k,) magnitudes, of the entries or the singular values.
    signs
        (p * q,) signs of the entries; None for singular values.
    left, right
        (p, p) and (q, q) the singular vectors, in columns; None for entries.
    """

    W: Tensor
    half_square: float
    before: Tensor
    after: Tensor
    power: float
    sigma: float
    signs: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def gram(self, D: Tensor, Z: Tensor) -> Tensor:
        """``<A_r, J(A_s)>`` (k, k) of rows ``A_r = D_r Z_r^T``, J the derivative of the map."""
        d, u, c = response(self.before, self.after, self.power, self.sigma)
        if self.signs is not None:
            rows = (D[:, :, None] * Z[:, None, :]).flatten(1)
            seen = d > 0
            flat = rows[:, seen]
            along = rows @ (u * self.signs)
            return ((flat * d[seen]) @ flat.T).add_(torch.outer(along, along), alpha=c)
        assert self.left is not None
        assert self.right is not None
        D, Z = D @ self.left, Z @ self.right
        straight, crossed = self._spectral_weights(d)
        rows = D[:, :, None] * Z[:, None, :]
        images = rows * straight[: D.shape[1], : Z.shape[1]]
        small = len(d)
        # Entry (j, i) answers to entry (i, j) wherever both exist.
        images[:, :small, :small] += rows[:, :small, :small].mT * crossed[:small, :small]
        along = (D[:, :small] * Z[:, :small]) @ u
        return (rows.flatten(1) @ images.flatten(1).T).add_(torch.outer(along, along), alpha=c)

    def _spectral_weights(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (m, m) of entry (i, j) of ``U^T E V`` in the derivative along E, and of its mirror image (j, i)."""
        assert self.left is not None
        assert self.right is not None
        padding = max(len(self.left), len(self.right)) - len(d)
        before, after, own = (torch.nn.functional.pad(value, (0, padding)) for value in (self.before, self.after, d))
        same = 0.5 * (own[:, None] + own)
        even = _quotient(after[:, None] - after, before[:, None] - before, same, before)
        odd = _quotient(after[:, None] + after, before[:, None] + before, same, before)
        straight, crossed = 0.5 * (even + odd), 0.5 * (even - odd)
        straight.diagonal().copy_(own)
        crossed.diagonal().zero_()
        return straight, crossed


def _quotient(above: Tensor, below: Tensor, otherwise: Tensor, scale: Tensor) -> Tensor:
    """``above / below``, and what stands for 0 / 0."""
    void = below.abs() <= 1e-12 * scale.amax()
    return torch.where(void, otherwise, above / torch.where(void, 1.0, below))


def _answer(M: Tensor, norm: Norm, sigma: float) -> _Answer:
    """The proximal map of ``sigma ||.||^2 / 2`` at ``M``."""
    power = magnitude_power(norm)
    if is_spectral(norm):
        U, before, Vh = torch.linalg.svd(M)
        after = shrunken(before, power, sigma, squared=True)
        k = len(before)
        W, frame = (U[:, :k] * after) @ Vh[:k], {"left": U, "right": Vh.T}
    else:
        before = M.abs().flatten()
        after = shrunken(before, power, sigma, squared=True)
        W, frame = after.view_as(M).copysign(M), {"signs": M.sign().flatten()}
    peak = float(after.amax())
    norm_value = peak * float(torch.linalg.vector_norm(after / peak, ord=power)) if peak > 0.0 else 0.0
    return _Answer(W=W, half_square=0.5 * norm_value**2, before=before, after=after, power=power, sigma=sigma, **frame)

r"""The method of multipliers for the Frobenius norm, its inner problems solved by a semismooth Newton method.

With unit rows, $A W \ge b$, multipliers l in [0, C] (free for ties; C = inf for the hard margin) and a centre y, each
outer step minimises the smooth convex function

$$\tfrac12 \|W\|^2 + \sum_r h_r(u_r), \qquad u = y + (b - A W)/\varepsilon, \qquad h_r' \propto \mathrm{clip}(u_r) ,$$

whose multipliers clip(u) become the next centre: a proximal step of the dual. Its second derivative sees the free rows
F only, those with u strictly between the bounds, and a Newton step solves

$$(\varepsilon + A_F A_F^\top)\, \delta = r, \qquad \Delta W = A_F^\top \delta - (W - A^\top \mathrm{clip}(u)) ,$$

by Cholesky factorisation of the Gram matrix ``(D D^T) * (Z Z^T)``, or for ``Delta W`` by that of the normal matrix
(p q, p q) where it is cheaper, or by conjugate gradients where neither fits into memory or rows are spread over
processes: then only matrices (p, q) and a few numbers are summed. The step length is exact. All rows take part in every
step, so no working set has to be guessed.

If no W exists the centres run away along the ray that proves it.

References
----------
Li, Sun, Toh. "A highly efficient semismooth Newton augmented Lagrangian method for solving Lasso problems", 2018.
arXiv:1607.05428.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attsvm.solvers.gram import Gram, Normal, gram_bytes, gram_operations, normal_operations
from attsvm.solvers.loop import Iterate
from attsvm.solvers.operator import LinearRows
from attsvm.solvers.rows import Floats, Rows

__all__ = ["MAX_BYTES", "multiplier_iterates"]

MAX_BYTES = 3 * 2**29
"""Size of a Gram matrix at most, unless told otherwise: 1.5 GiB."""

FIRST, SHRINK, LEAST = 1e-2, 0.2, 1e-10
"""eps of the first step, its factor from step to step, and the last one; the Gram matrix has a unit diagonal."""

CONTRACTING = 0.3
"""While the multipliers move by less than so much of their last move, eps stays where a smaller one costs more."""

SHARE, RAY_SHARE = 0.1, 1e-10
"""What may be left of the gradient, relative to the change of the multipliers: times the root of eps, and for a ray."""

INNER = 40
"""Newton steps for one centre at most."""


def multiplier_iterates(
    rows: Rows,
    operator: LinearRows,
    *,
    dual: Floats | None = None,
    step: int = 0,
    first: float = FIRST,
    max_bytes: float = MAX_BYTES,
) -> Iterator[Iterate]:
    """Iterates of the method, without end; one Newton step each.

    Parameters
    ----------
    rows
        The rows of this process.
    operator
        The same on the device where the work is done.
    dual
        Multipliers (R,) to begin with.
    step
        Number of the last step so far.
    first
        eps to begin with.
    max_bytes
        Size of a Gram matrix at most.
    """
    bounds = _Bounds.of(rows, operator.size)
    center = torch.zeros_like(operator.size) if dual is None else _like(dual, operator.size) * operator.size
    center = bounds.clip(center)
    W = operator.adjoint(center)
    newton = _Newton(operator=operator, max_bytes=max_bytes)
    eps, solved, moved = first, False, math.inf
    while True:
        inner = _Inner(operator=operator, bounds=bounds, newton=newton, center=center, eps=eps, W=W, follows=solved)
        before = step
        solved = False
        for _ in range(INNER):
            solved = inner.converged()
            if solved or not inner.advance():
                break
            step += 1
            yield Iterate(W=None, dual=None, step=step)
        step = max(step, before + 1)  # a centre counts, so that a method that stands still comes to an end
        yield Iterate(W=inner.G.cpu().numpy(), dual=_back(inner.dual, operator), step=step)
        # Where no W exists the steps soon repeat, and their difference is the ray long before the sum is.
        change = inner.dual - center
        yield Iterate(W=None, dual=_back(torch.where(bounds.tie, change, change.clamp(min=0)), operator), step=step)
        center, W = inner.dual, inner.G
        last, moved = moved, math.sqrt(float(operator.total((change**2).sum()[None])))
        if not (solved and moved <= CONTRACTING * last and newton.holds):
            eps = max(SHRINK * eps, LEAST)


def _like(values: Floats, model: Tensor) -> Tensor:
    return torch.from_numpy(values).to(model.device)


def _back(dual: Tensor, operator: LinearRows) -> Floats:
    """Scaled multipliers as those of the rows."""
    found: Floats = (dual / operator.size).cpu().numpy()
    return found


@dataclass(frozen=True, kw_only=True)
class _Bounds:
    """Right-hand sides and bounds (R,) of the multipliers, in the scale of unit rows."""

    rhs: Tensor
    lower: Tensor
    upper: Tensor
    tie: Tensor

    @classmethod
    def of(cls, rows: Rows, size: Tensor) -> _Bounds:
        tie = torch.from_numpy(rows.tie).to(size.device)
        infinity = torch.full_like(size, math.inf)
        return cls(
            rhs=_like(rows.rhs, size) / size,
            lower=torch.where(tie, -infinity, 0.0),
            upper=torch.where(tie, infinity, rows.penalty * size),
            tie=tie,
        )

    def clip(self, u: Tensor) -> Tensor:
        return u.clamp(self.lower, self.upper)

    def free(self, u: Tensor) -> Tensor:
        return (u > self.lower) & (u < self.upper)


class _Inner:
    """The minimisation for one centre: W, and ``u`` kept up along with it."""

    def __init__(
        self,
        *,
        operator: LinearRows,
        bounds: _Bounds,
        newton: _Newton,
        center: Tensor,
        eps: float,
        W: Tensor,
        follows: bool,
    ) -> None:
        self.operator, self.bounds, self.newton = operator, bounds, newton
        self.center, self.eps, self.W = center, eps, W
        self.u = center + (bounds.rhs - operator.forward(W)) / eps
        # The rows that were free so far, for the first step: a smaller eps would let many of them go for a moment.
        self.kept: Tensor | None = bounds.free(center)
        self.follows = follows
        self._refresh()

    def _refresh(self) -> None:
        self.dual = self.bounds.clip(self.u)
        self.G = self.operator.adjoint(self.dual)
        self.residual = self.W - self.G

    def converged(self) -> bool:
        """Whether the multipliers are near enough to those of the exact proximal step."""
        squares = torch.stack([((self.dual - self.center) ** 2).sum(), (self.dual**2).sum()])
        moved, size = self.operator.total(squares).sqrt().tolist()
        # Multipliers that still run away may be on a ray, and a ray is proved by how well it cancels.
        share = RAY_SHARE if self.eps < 1e-4 and moved > 0.5 * size else SHARE * math.sqrt(self.eps)
        allowed = max(share * moved, 1e-14 * float(torch.linalg.vector_norm(self.G)))
        return bool(torch.linalg.vector_norm(self.residual) <= allowed)

    def advance(self) -> bool:
        """One Newton step; False if rounding leaves no way down."""
        if self.kept is not None:
            kept, self.kept = self.kept, None
            # After a solved problem this leads to about the right rows, and a shorter step far from them.
            if self._move(self.bounds.free(self.u) | kept, whole=self.follows):
                return True
        return self._move(self.bounds.free(self.u))

    def _move(self, free: Tensor, *, whole: bool = False) -> bool:
        """A step for these free rows, of the best length or in whole; False if they show no way down."""
        direction, index, change = self.newton.step(free, self.dual - self.u, self.residual, self.eps)
        slope = float((self.residual * direction).sum())
        if not slope < 0.0:
            return False
        du = self.operator.forward(direction).div_(-self.eps)
        if change is not None:
            # Where rows are free it is known without dividing rounding by eps.
            du[index] = change
        t = 1.0 if whole else self._length(direction, du, slope)
        if t <= 0.0:
            return False
        self.W = self.W + t * direction
        self.u += t * du
        self._refresh()
        return True

    def _length(self, direction: Tensor, du: Tensor, start: float) -> float:
        """The zero of the derivative along the direction: increasing, and linear between breakpoints."""
        ahead, square = float((self.W * direction).sum()), float((direction * direction).sum())
        low, high, t = 0.0, math.inf, 1.0
        for _ in range(60):
            at = self.u + t * du
            pull = self.bounds.clip(at) * du
            bend = torch.where(self.bounds.free(at), du * du, 0.0)
            pulled, bent = self.operator.total(torch.stack([pull.sum(), bend.sum()])).tolist()
            slope = ahead + t * square + self.eps * pulled
            if abs(slope) <= 1e-3 * abs(start):
                return t
            low, high = (t, high) if slope < 0 else (low, t)
            t = t - slope / (square + self.eps * bent)
            if not low < t < high:
                t = 0.5 * (low + high) if math.isfinite(high) else 2.0 * low
        return low


@dataclass(kw_only=True)
class _Newton:
    """Newton steps by the Gram matrix, or by conjugate gradients where that is too large."""

    operator: LinearRows
    max_bytes: float
    gram: Gram | None = None

    def step(self, free: Tensor, excess: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """The change of W, the free rows, and the change of their u (None where it is not known).

        ``excess`` is clip(u) - u, not 0 where a row is taken as free that is not.
        """
        index = free.nonzero().flatten()
        if len(index) == 0 and not self.operator.shared:
            return -residual, index, excess[index]
        p, q = residual.shape
        few = gram_operations(len(index), p, q) <= normal_operations(len(index), p, q)
        small = (gram_bytes(len(index), eps) if few else 16.0 * (p * q) ** 2) <= self.max_bytes
        if self.operator.shared or not small:
            return self._gradients(free, excess, residual, eps), index, None
        if not few:
            aim = -residual - self.operator.adjoint(torch.where(free, excess, 0.0))
            return Normal.of(self.operator, index, eps).solve(eps * aim), index, None
        # What does not serve any more goes first: its memory is wanted.
        self.gram = None if self.gram is None else self.gram.adapted(index, eps)
        if self.gram is None:
            self.gram = Gram.of(self.operator, index, eps)
        # What is left of this residual comes back divided by eps.
        wanted = 1e-3 * eps * float(torch.linalg.vector_norm(residual))
        delta = self.gram.solve(self.operator.forward(residual)[index] - eps * excess[index], wanted=wanted)
        weights = torch.zeros_like(excess)
        weights[index] = delta
        known = delta + excess[index] if self.gram.is_exact else None
        return self.operator.adjoint(weights) - residual, index, known

    @property
    def holds(self) -> bool:
        """Whether a large factor serves as long as eps stays."""
        return self.gram is not None and not self.gram.is_exact

    def _gradients(self, free: Tensor, excess: Tensor, residual: Tensor, eps: float) -> Tensor:
        """Conjugate gradients on ``(1 + A_F^T A_F / eps) X = - A_F^T excess_F - residual``."""
        operator = self.operator

        def product(X: Tensor) -> Tensor:
            return X + operator.adjoint(torch.where(free, operator.forward(X), 0.0)) / eps

        aim = -residual - operator.adjoint(torch.where(free, excess, 0.0))
        precondition = _Kronecker.of(operator, free.nonzero().flatten(), eps)
        X, rest = torch.zeros_like(aim), aim
        ready = precondition.solve(rest)
        way, fall = ready, float((rest * ready).sum())
        wanted = 1e-3 * float(torch.linalg.vector_norm(rest))
        for _ in range(500):
            image = product(way)
            length = fall / float((way * image).sum())
            X, rest = X + length * way, rest - length * image
            if float(torch.linalg.vector_norm(rest)) <= wanted:
                break
            ready = precondition.solve(rest)
            last, fall = fall, float((rest * ready).sum())
            way = ready + (fall / last) * way
        return X


@dataclass(frozen=True, kw_only=True)
class _Kronecker:
    """``1 + A_F^T A_F / eps`` with the sum over rows of Kronecker products replaced by the product of the sums."""

    left: Tensor
    right: Tensor
    values: Tensor  # (p, q)

    @classmethod
    def of(cls, operator: LinearRows, index: Tensor, eps: float) -> _Kronecker:
        D, Z = operator.factors(index)
        count = operator.total(torch.tensor([float(len(index))], dtype=torch.float64, device=D.device))
        a, left = torch.linalg.eigh(operator.total(D.T @ D))
        b, right = torch.linalg.eigh(operator.total(Z.T @ Z))
        scale = eps * count.clamp(min=1.0)
        return cls(left=left, right=right, values=1.0 + a.clamp(min=0)[:, None] * b.clamp(min=0) / scale)

    def solve(self, X: Tensor) -> Tensor:
        return self.left @ ((self.left.T @ X @ self.right) / self.values) @ self.right.T

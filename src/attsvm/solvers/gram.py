"""The linear systems of a Newton step on some rows: their Gram matrix, or the normal matrix where that is smaller."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attsvm.solvers.operator import LinearRows

__all__ = ["Gram", "Normal", "gram_bytes", "gram_operations", "normal_operations"]

PART = 512
"""Rows of the matrix that are computed at a time."""

NORMAL_BYTES = 2**25
"""Size of the rows that are written out at a time, p q numbers each."""

LARGE = 1500
"""From so many rows a factor preconditions conjugate gradients, which lets it serve while the rows hardly change."""

SINGLE_EPS = 2e-4
"""Down to this eps a large factor is in float32, in half the time and memory: below it the rounding shows."""

MOST_CHANGED = 10
"""Share of the rows that may change, one in so many, before a new factor is cheaper."""


def _is_single(rows: float, eps: float) -> bool:
    """Whether the factor is in float32."""
    return rows >= LARGE and eps >= SINGLE_EPS


def gram_bytes(rows: int, eps: float) -> int:
    """Memory of the matrix."""
    return rows * rows * (4 if _is_single(rows, eps) else 8)


def gram_operations(rows: float, p: int, q: int) -> float:
    """Operations to make and to factorise the Gram matrix of so many rows of p x q matrices; float32 counts half."""
    return (rows**2 * (p + q) + rows**3 / 3.0) * (0.5 if rows >= LARGE else 1.0)


def normal_operations(rows: float, p: int, q: int) -> float:
    """The same for the normal matrix."""
    return rows * float(p * q) ** 2 + float(p * q) ** 3 / 3.0


@dataclass(frozen=True, kw_only=True)
class Gram:
    """``eps + (D D^T) * (Z Z^T)`` for unit rows, by its Cholesky factor.

    Attributes
    ----------
    operator
        All rows.
    index
        (k,) the rows of the matrix.
    eps
        What is added to the unit diagonal.
    factor
        (k, k) lower triangular, in the memory of the matrix itself.
    ridge
        What was added to the diagonal before it was factorised.
    border
        What turns the factor into that of ``index``, if it was made for other rows.
    """

    operator: LinearRows
    index: Tensor
    eps: float
    factor: Tensor
    ridge: float
    border: _Border | None = None

    @classmethod
    def of(cls, operator: LinearRows, index: Tensor, eps: float) -> Gram:
        """Factorise."""
        D, Z = operator.factors(index)
        ridge = eps
        if _is_single(len(index), eps):
            D, Z = D.float(), Z.float()
        lower = D.new_empty(len(index), len(index))
        while True:
            _fill(lower, D, Z, 1.0 + ridge)
            # The lower triangle of a matrix in rows is the upper one of its transpose, which LAPACK overwrites.
            info = torch.empty((), dtype=torch.int32, device=lower.device)
            torch.linalg.cholesky_ex(lower.mT, upper=True, out=(lower.mT, info))
            if int(info) == 0:
                return cls(operator=operator, index=index, eps=eps, factor=lower, ridge=ridge)
            ridge *= 10.0  # rounding made the matrix indefinite; a larger eps only slows the outer iteration

    @property
    def is_exact(self) -> bool:
        """Whether the factor itself solves the system."""
        return len(self.index) < LARGE and self.border is None

    def adapted(self, index: Tensor, eps: float) -> Gram | None:
        """The matrix of other rows by the same factor, or None where a new one is better."""
        if torch.equal(self.index, index) and self.eps == eps:
            return self
        if self.is_exact or eps != self.eps:
            return None
        base = self.index if self.border is None else self.border.base
        stays, known = torch.isin(base, index), torch.isin(index, base)
        changed = len(base) + len(index) - 2 * int(known.sum())
        if changed * MOST_CHANGED > len(base):
            return None
        border = _Border.of(self, base, index, stays=stays, known=known) if changed else None
        return replace(self, index=index, eps=eps, border=border)

    def solve(self, rhs: Tensor, *, wanted: float) -> Tensor:
        """Solve for one right-hand side (k,); a large system until the residual is ``wanted`` or as small as may be."""
        ready = self._roughly(rhs)
        if self.is_exact:
            return ready
        x, rest, way, fall = torch.zeros_like(rhs), rhs, ready, float(rhs @ ready)
        least = max(wanted, 1e-13 * float(torch.linalg.vector_norm(rhs)))
        for _ in range(50):
            image = self._product(way)
            length = fall / float(way @ image)
            x, rest = x + length * way, rest - length * image
            if float(torch.linalg.vector_norm(rest)) <= least:
                break
            ready = self._roughly(rest)
            last, fall = fall, float(rest @ ready)
            way = ready + (fall / last) * way
        return x

    def _roughly(self, rhs: Tensor) -> Tensor:
        """The solution in the precision of the factor."""
        right = rhs.to(self.factor.dtype)
        found = self.by_factor(right[:, None])[:, 0] if self.border is None else self.border.solve(self, right)
        return found.to(rhs.dtype)

    def by_factor(self, right: Tensor) -> Tensor:
        """Solve with the factor alone, for right-hand sides (k, c)."""
        half = torch.linalg.solve_triangular(self.factor, right, upper=False)
        solution: Tensor = torch.linalg.solve_triangular(self.factor.mT, half, upper=True)
        return solution

    def _product(self, x: Tensor) -> Tensor:
        """The matrix times ``x`` in full precision, by the rows themselves."""
        weights = torch.zeros_like(self.operator.size)
        weights[self.index] = x
        return self.operator.forward(self.operator.adjoint(weights))[self.index] + self.eps * x


@dataclass(frozen=True, kw_only=True)
class _Border:
    """Rows that left the factorised matrix, as unknowns held at 0, and rows that joined it.

    With M the factorised matrix, B (k, c) the columns of the new rows and the unit vectors of those that left, and
    ``V = M^-1 B``, what remains is a system of size c.
    """

    base: Tensor  # rows of the factor
    stays: Tensor  # booleans over the base
    known: Tensor  # booleans over the present rows: those of the base
    columns: Tensor  # B
    solved: Tensor  # V
    lu: Tensor
    pivots: Tensor

    @classmethod
    def of(cls, gram: Gram, base: Tensor, index: Tensor, *, stays: Tensor, known: Tensor) -> _Border:
        """Solve for the columns."""
        dtype = gram.factor.dtype
        D, Z = (part.to(dtype) for part in gram.operator.factors(base))
        new_D, new_Z = (part.to(dtype) for part in gram.operator.factors(index[~known]))
        gone = (~stays).nonzero().flatten()
        joined, size = len(new_D), len(new_D) + len(gone)
        columns = D.new_zeros(len(base), size)
        columns[:, :joined] = (D @ new_D.T).mul_(Z @ new_Z.T)
        columns[gone, torch.arange(joined, size, device=gone.device)] = 1.0
        solved = gram.by_factor(columns)
        rest = -(columns.T @ solved).double()
        corner = (new_D @ new_D.T).mul_(new_Z @ new_Z.T).double()
        corner.diagonal().fill_(1.0 + gram.ridge)
        rest[:joined, :joined] += corner
        lu, pivots = torch.linalg.lu_factor(rest)
        return cls(base=base, stays=stays, known=known, columns=columns, solved=solved, lu=lu, pivots=pivots)

    def solve(self, gram: Gram, rhs: Tensor) -> Tensor:
        """The solution (k,) for the present rows."""
        right = rhs.new_zeros(len(self.base))
        right[self.stays] = rhs[self.known]
        first = gram.by_factor(right[:, None])[:, 0]
        wanted = -(self.columns.T @ first)
        joined = len(self.known) - int(self.known.sum())
        wanted[:joined] += rhs[~self.known]
        others = torch.linalg.lu_solve(self.lu, self.pivots, wanted.double()[:, None])[:, 0].to(rhs.dtype)
        x = torch.empty_like(rhs)
        x[self.known] = (first - self.solved @ others)[self.stays]
        x[~self.known] = others[:joined]
        return x


def _fill(matrix: Tensor, D: Tensor, Z: Tensor, diagonal: float) -> None:
    """Write the lower triangle of the Gram matrix; what is above it is of no use."""
    for begin in range(0, len(D), PART):
        end = min(begin + PART, len(D))
        part = matrix[begin:end, :end]
        torch.mm(D[begin:end], D[:end].T, out=part)
        part *= Z[begin:end] @ Z[:end].T
    matrix.diagonal().fill_(diagonal)


@dataclass(frozen=True, kw_only=True)
class Normal:
    """``eps + sum(A_r A_r^T)`` (p q, p q) over some unit rows, by its Cholesky factor."""

    factor: Tensor

    @classmethod
    def of(cls, operator: LinearRows, index: Tensor, eps: float) -> Normal:
        """Factorise."""
        D, Z = operator.factors(index)
        size = D.shape[1] * Z.shape[1]
        matrix = D.new_zeros(size, size)
        step = max(1, NORMAL_BYTES // (8 * size))
        for begin in range(0, len(D), step):
            rows = (D[begin : begin + step, :, None] * Z[begin : begin + step, None, :]).flatten(1)
            matrix.addmm_(rows.T, rows)
        ridge = eps
        while True:
            shifted = matrix.clone()
            shifted.diagonal().add_(ridge)
            factor, info = torch.linalg.cholesky_ex(shifted)
            if int(info) == 0:
                return cls(factor=factor)
            ridge = max(10.0 * ridge, 1e-15 * float(matrix.diagonal().sum()))

    def solve(self, right: Tensor) -> Tensor:
        """Solve for one matrix (p, q)."""
        return torch.cholesky_solve(right.reshape(-1, 1), self.factor).reshape(right.shape)

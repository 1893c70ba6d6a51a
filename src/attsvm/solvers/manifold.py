r"""A second-order finish for the nuclear norm, on the manifold of the rank that a first-order solver has found.

At the solution ``G = sum(l A)`` has r singular values 1, whose vectors U, V are those of W, and others
$g_j < 1$. Newton's method on ``W = shrink(W + tau G, tau)`` says, to first order in those bases, how W answers to
multipliers l: for $i \le r < j$, with $s_i$ the singular values of W,

* $W_{ij} + W_{ji} = s_i / (1 - g_j) \; (G_{ij} + G_{ji})$ and $W_{ij} - W_{ji} = s_i / (1 + g_j) \; (G_{ij} - G_{ji})$;
* among the first r, $W_{ij} - W_{ji} = (s_i + s_j) / 2 \; (G_{ij} - G_{ji})$, while the symmetric part S of W is free
  and in return that of G is the identity; outside, W is 0.

With T the matrix of these answers, seen through the rows, a step is the quadratic program

$$\max_{l \ge 0} \; c^T l - \tfrac12 l^T T l \quad \text{s.t.} \quad \mathrm{sym}(U^T G(l) V) = I$$

whose constraint has the multiplier S, found by the method of multipliers with the matrix $T + N^T N / \delta$. The
program itself decides which rows are active, and the singular values of ``W + tau G`` decide the rank, so a wrong
guess of either is corrected. As the rows are of rank one, T and N are sums of elementwise products of matrices
``(k, r) @ (r, k)``: a step with k rows costs a few products ``k^2 (p + q)`` and factorisations ``k^3 / 3``.

Convergence is quadratic near a solution with unique multipliers; far from it nothing is promised, so the steps are
offered beside those of a solver that converges from everywhere.

References
----------
Jiang, Sun, Toh. "A partial proximal point algorithm for nuclear norm regularized matrix least squares problems", 2014.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attsvm.solvers import coordinate
from attsvm.solvers.loop import Iterate
from attsvm.solvers.newton import MAX_WORKING_SET, WorkingSet, proximal_step, worst
from attsvm.solvers.rows import Bools, Floats, Ints, Rows

__all__ = ["finished", "manifold_iterates"]

NEAR = 0.05
"""Rows whose slack is below this part of their right-hand side take part in the quadratic program."""

PATIENCE = 4
"""Steps without a smaller residual after which an attempt ends."""

FREE_STEPS = 5
"""Where this many of the first-order solver's steps cost more than one of Newton's, the latter is tried first."""

BLOCK = 128
"""Rows of the quadratic program's matrix that are computed at a time, so that they stay in the cache."""


def finished(
    iterates: Iterator[Iterate],
    rows: Rows,
    *,
    step_cost: float,
    W: Floats | None = None,
    dual: Floats | None = None,
) -> Iterator[Iterate]:
    """The iterates of a first-order solver, and from time to time those of Newton's method from where it stands.

    Parameters
    ----------
    iterates
        A solver for the nuclear norm with hard margin (with soft margin its iterates pass through untouched).
    rows
        The problem.
    step_cost
        Operations of one of the solver's steps.
    W, dual
        The solver's start, (p, q) and (R,): where Newton's method is cheap it is tried from there.

    Notes
    -----
    The first attempt is made when the solver has worked for about as long as one step of Newton's method takes, the
    next ones whenever its steps have doubled. Operations are counted, not seconds, so that the same problem is always
    solved in the same way.
    """
    extra, due = 0, 0
    start = Iterate(W=W, dual=dual, step=0)
    for iterate in itertools.chain([start], iterates):
        if iterate is not start:
            yield Iterate(W=iterate.W, dual=iterate.dual, step=iterate.step + extra)
        if iterate.W is None or iterate.dual is None or iterate.step < due or math.isfinite(rows.penalty):
            continue
        if step_cost * (iterate.step + FREE_STEPS) < _cost(rows, iterate.dual):
            continue
        for found in manifold_iterates(rows, W=iterate.W, dual=iterate.dual):
            extra += 1
            yield Iterate(W=found.W, dual=found.dual, step=iterate.step + extra)
        due = max(2 * iterate.step, FREE_STEPS)


def _cost(rows: Rows, dual: Floats) -> float:
    """Operations of one step of Newton's method: three factorisations, and products."""
    members = float((dual != 0).sum())
    return float(members * members * (members + 5.0 * (rows.tokens.shape[2] + rows.queries.shape[1])))


def manifold_iterates(rows: Rows, *, W: Floats, dual: Floats) -> Iterator[Iterate]:
    """Newton steps from a matrix and multipliers; ends when they stop converging.

    Parameters
    ----------
    rows
        A feasible problem with hard margin.
    W
        (p, q).
    dual
        Multipliers (R,).
    """
    slope = float(np.linalg.norm(coordinate.combine(rows, dual), 2))
    sizes = torch.linalg.svdvals(torch.from_numpy(W))
    if slope == 0.0 or not float(sizes[0]) > 0.0:
        return
    dual, tau = dual / slope, float(sizes @ sizes) / float(sizes.sum())
    values = coordinate.values(rows, np.ascontiguousarray(W))
    member = (dual != 0) | rows.tie | _near(rows, W, values)
    stays = np.zeros_like(member)
    members: _Members | None = None
    best, step, quiet = math.inf, 0, 0
    while 0 < member.sum() <= MAX_WORKING_SET:
        if members is None or not np.array_equal(members.rows, member.nonzero()[0]):
            members = _Members.of(rows, member.nonzero()[0])
        frame = _Frame.of(W, coordinate.combine(rows, dual), tau, violation=_violation(rows, W, values))
        if frame is None:
            return
        if step > 0:  # the residual of the start has another meaning: it may have no right rank or no right rows
            quiet = 0 if frame.residual < 0.7 * best else quiet + 1
            best = min(best, frame.residual)
        if quiet == PATIENCE:
            return
        W, dual, tau = _newton_step(rows, members, frame, dual)
        if not (np.isfinite(W).all() and np.isfinite(dual).all() and tau > 0.0):
            return
        step += 1
        yield Iterate(W=W, dual=dual, step=step)
        values = coordinate.values(rows, W)
        short = rows.rhs - values
        entering = worst(
            ~member & (short > 1e-9 * _unit(rows, W)), short / rows.size, limit=max(100, len(members.rows) // 2)
        )
        # A row that was violated once stays, so that no row comes and goes for ever.
        stays |= entering
        member = entering | stays | rows.tie | (member & ((dual != 0) | _near(rows, W, values)))


def _unit(rows: Rows, W: Floats) -> Floats:
    """The size (R,) by which slacks are measured."""
    return np.maximum(np.abs(rows.rhs), 1e-3 * float(np.linalg.norm(W)) * rows.size)


def _near(rows: Rows, W: Floats, values: Floats) -> Bools:
    return np.asarray(values < rows.rhs + NEAR * _unit(rows, W))


def _violation(rows: Rows, W: Floats, values: Floats) -> float:
    short = rows.rhs - values
    return float(np.max(np.where(rows.tie, np.abs(short), short) / _unit(rows, W)))


@dataclass(frozen=True, kw_only=True)
class _Members:
    """The rows of the quadratic program."""

    rows: Ints  # (k,)
    differences: Tensor  # (k, p)
    queries: Tensor  # (k, q)
    rhs: Tensor  # (k,)
    tie: Tensor  # (k,)
    size: Tensor  # (k,)

    @classmethod
    def of(cls, problem: Rows, rows: Ints) -> _Members:
        """Collect the given rows."""
        return cls(
            rows=rows,
            differences=torch.from_numpy(problem.differences(rows)),
            queries=torch.from_numpy(problem.queries[problem.block[rows]]),
            rhs=torch.from_numpy(problem.rhs[rows]),
            tie=torch.from_numpy(problem.tie[rows]),
            size=torch.from_numpy(problem.size[rows]),
        )


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The bases in which a step is taken, and how W answers to G in them."""

    U: Tensor  # (p, k), k = min(p, q)
    V: Tensor  # (q, k)
    s: Tensor  # (r,) singular values of W
    even: Tensor  # (k - r,) 1 / (1 - g^2)
    odd: Tensor  # (k - r,) g / (1 - g^2)
    delta: float
    residual: float
    damping: float

    @classmethod
    def of(cls, W: Floats, G: Floats, tau: float, *, violation: float) -> _Frame | None:
        """Bases of ``W + tau G``, whose singular values above tau are those of W; None if there are none.

        The residual is the largest violation of a row or the square of the distance of W from
        ``shrink(W + tau G, tau)``, whichever is more: to first order in it the objectives agree.
        """
        X = torch.from_numpy(W)
        U, sigma, Vh = torch.linalg.svd(X + tau * torch.from_numpy(G), full_matrices=False)
        r = int((sigma > tau).sum())
        if r == 0:
            return (
                cls.of(W, G, 0.5 * tau, violation=violation)
                if tau > 1e-6 * float(torch.linalg.vector_norm(X))
                else None
            )
        s = sigma[:r] - tau
        distance = float(torch.linalg.vector_norm(X - (U[:, :r] * s) @ Vh[:r]) / torch.linalg.vector_norm(X))
        residual = max(violation, distance * distance)
        damping = min(1e-2, max(0.1 * residual, 1e-9))
        g = (sigma[r:] / tau).clamp(max=1.0 - damping)
        even = 1.0 / (1.0 - g * g)
        # Far from the solution S is held back, which is what makes the steps converge from there.
        delta = min(max(residual, 1e-2), 1e-1) / float(s.mean())
        return cls(U=U, V=Vh.T, s=s, even=even, odd=g * even, delta=delta, residual=residual, damping=damping)

    @property
    def rank(self) -> int:
        """The r of the manifold."""
        return len(self.s)

    def answer(self, G: Tensor) -> Tensor:
        """The part of W (p, q) that answers to ``G`` (p, q): all but the free symmetric part."""
        r, s = self.rank, self.s
        left, right = self.U[:, :r].T @ G, G @ self.V[:, :r]  # (r, q), (p, r)
        inner = left @ self.V  # (r, k)
        outer = (self.U.T @ right).T  # (r, k): entry (i, j) is G_ji
        core = inner[:, :r]
        skew = 0.25 * (s[:, None] + s) * (core - core.T)
        above = (self.even - 1.0) * inner[:, r:] + self.odd * outer[:, r:]
        below = (self.even - 1.0) * outer[:, r:] + self.odd * inner[:, r:]
        # What lies outside both bases, or has g = 0, answers with s alone: even = 1 and odd = 0.
        rows = s[:, None] * (left - core @ self.V[:, :r].T + above @ self.V[:, r:].T) + skew @ self.V[:, :r].T
        columns = s * (right - self.U[:, :r] @ core + self.U[:, r:] @ below.T)
        return self.U[:, :r] @ rows + columns @ self.V[:, :r].T


def _newton_step(rows: Rows, members: _Members, frame: _Frame, dual: Floats) -> tuple[Floats, Floats, float]:
    """Matrix and multipliers after one step, and the mean size of the singular values of the matrix."""
    r, delta = frame.rank, frame.delta
    a, b = members.differences @ frame.U, members.queries @ frame.V
    matrix = _matrix(members, frame, a, b)
    # Multipliers that W does not answer to, those of G outside the bases, stay where they are.
    held = frame.damping * float(frame.s.mean()) * members.size**2
    matrix.diagonal().add_(held)
    scale = matrix.diagonal().clamp(min=1e-12 * float(matrix.diagonal().amax())).sqrt()
    matrix.div_(scale).div_(scale[:, None])
    matrix.diagonal().fill_(1.0)
    work = WorkingSet(rows=members.rows, gram=matrix, rhs=members.rhs / scale, size=scale, tie=members.tie)
    top_a, top_b = a[:, :r], b[:, :r]
    identity = torch.eye(r, dtype=a.dtype)
    free = torch.diag(frame.s)
    small = dual[members.rows]
    before = torch.from_numpy(small)
    for _ in range(1 if frame.residual > 1e-2 else 4):
        target = members.rhs + held * before - ((top_a @ (free - identity / delta)) * top_b).sum(1)
        small = proximal_step(work, small, rhs=target.numpy())
        core = top_a.T @ (torch.from_numpy(small)[:, None] * top_b)
        error = 0.5 * (core + core.T) - identity
        free = free + error / delta
        if float(error.abs().amax()) < 1e-13:
            break
    full = np.zeros_like(dual)
    full[members.rows] = small
    G = torch.from_numpy(coordinate.combine(rows, full))
    W = frame.U[:, :r] @ free @ frame.V[:, :r].T + frame.answer(G)
    return np.ascontiguousarray(W.numpy()), full, float((W * W).sum() / free.diagonal().abs().sum())


def _matrix(members: _Members, frame: _Frame, a: Tensor, b: Tensor) -> Tensor:
    """``T + N^T N / delta`` (k, k), in blocks of rows of its lower triangle.

    With a = D U and b = Z V, every term is a sum over i <= r times a sum over j > r (or i, j <= r).
    """
    r = frame.rank
    top_a, top_b, low_a, low_b = a[:, :r], b[:, :r], a[:, r:], b[:, r:]
    scaled_a, scaled_b, odd = top_a * frame.s, top_b * frame.s, low_a * frame.odd
    even_a, even_b = _beyond(members.differences, a, frame), _beyond(members.queries, b, frame)
    matrix = torch.empty(len(a), len(a), dtype=a.dtype)
    for begin in range(0, len(a), BLOCK):
        one, end = slice(begin, begin + BLOCK), min(begin + BLOCK, len(a))
        aa, bb = top_a[one] @ top_a[:end].T, top_b[one] @ top_b[:end].T
        ab, ba = top_a[one] @ top_b[:end].T, top_b[one] @ top_a[:end].T
        out = matrix[one, :end]
        torch.mul(aa, bb, out=out).addcmul_(ab, ba).mul_(0.5 / frame.delta)  # N^T N / delta
        out.addcmul_(scaled_a[one] @ top_a[:end].T, bb.mul_(0.25).addmm_(even_b[0][one], even_b[1][:end].T))
        out.addcmul_(scaled_b[one] @ top_b[:end].T, aa.mul_(0.25).addmm_(even_a[0][one], even_a[1][:end].T))
        out.addcmul_(scaled_a[one] @ top_b[:end].T, ba.mul_(-0.25).addmm_(low_b[one], odd[:end].T))
        out.addcmul_(scaled_b[one] @ top_a[:end].T, ab.mul_(-0.25).addmm_(odd[one], low_b[:end].T))
    return matrix.tril_().add_(matrix.tril(-1).T)


def _beyond(vectors: Tensor, coordinates: Tensor, frame: _Frame) -> tuple[Tensor, Tensor]:
    """Two factors of the inner products of ``vectors`` beyond the first r coordinates, weighted by ``even``."""
    r = frame.rank
    low = coordinates[:, r:]
    if vectors.shape[1] == coordinates.shape[1]:
        return low * frame.even, low
    # Outside the basis the weight is 1: all inner products, less those of the basis, which have other weights.
    weights = torch.cat([-torch.ones(r, dtype=low.dtype), frame.even - 1.0])
    return torch.cat([vectors, coordinates * weights], dim=1), torch.cat([vectors, coordinates], dim=1)

r"""The nuclear norm with a bound on the rank: a local method from several starts.

With ``W = K Q^T``, K (p, m) and Q (q, m), $\|W\|_* \le (\|K\|^2 + \|Q\|^2) / 2$ with equality when both factors come
from one singular-value decomposition, so the problem is

$$\min_{K, Q} \; \tfrac12 \|K\|^2 + \tfrac12 \|Q\|^2 \quad \text{s.t.} \quad \langle A_r, K Q^T \rangle \ge c_r .$$

It is not convex. A step linearises the rows in (K, Q) together and stays near:

$$\min \; \tfrac12 \|K'\|^2 + \tfrac12 \|Q'\|^2 + \tfrac{\mu}{2} (\|K' - K\|^2 + \|Q' - Q\|^2)
\quad \text{s.t.} \quad \langle A_r, K' Q^T + K Q'^T - K Q^T \rangle \ge c_r ,$$

a quadratic program whose Gram matrix is a sum of two elementwise products, as rows have rank one. Unlike turns of K
alone and Q alone, which can stop where neither moves without the other, its fixed points are stationary. The pair
is then scaled to satisfy every row (or K is solved for again, where scaling does not help), and taken if the norm
fell. Before a start satisfies the rows, slack has a price that rises.

References
----------
Drusvyatskiy, Paquette. "Efficiency of minimizing compositions of convex functions and smooth maps", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

import torch

from attsvm.solvers import coordinate
from attsvm.solvers.frobenius import frobenius_iterates
from attsvm.solvers.loop import Iterate, Outcome, Progress, run_loop, scale_to_fit
from attsvm.solvers.newton import MAX_WORKING_SET, WorkingSet, proximal_step, worst
from attsvm.solvers.repair import rigid
from attsvm.solvers.rows import Floats, Rows
from attsvm.solvers.solution import Status

__all__ = ["low_rank", "low_rank_iterates", "truncated"]

STARTS = 6
"""The truncated convex solution, perturbations of it, and random factors."""

STEPS = 200
"""Steps from one start at most."""

ROOM = 4e-12
"""How far beyond its bound a row is put that scaling cannot help, relative to its size and the norm of W."""


def low_rank(
    rows: Rows,
    *,
    W: Floats,
    dual: Floats,
    rank: int,
    tol: float,
    max_seconds: float | None = None,
    max_iterations: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """The best matrix of at most the given rank that several starts lead to.

    Parameters
    ----------
    rows
        A feasible problem with hard margin.
    W, dual
        Solution (p, q) and multipliers (R,) of the problem without the bound.
    rank
        The bound, >= 1.
    tol, max_seconds, max_iterations, progress
        As in :func:`run_loop`.

    Returns
    -------
    Outcome
        ``lower`` is the bound of the convex problem. Status OPTIMAL if it is met, else LOCAL (or what stopped the
        search). If no start led to a matrix that satisfies the rows, ``upper`` is inf and W is the matrix of this
        rank, of the norm of the convex solution, whose worst violation is smallest.
    """
    nearest = _Nearest(rows=rows, W=truncated(W, rank))
    outcome = run_loop(
        rows,
        nearest.watching(low_rank_iterates(rows, W=W, dual=dual, rank=rank)),
        norm="nuc",
        tol=tol,
        max_seconds=max_seconds,
        max_iterations=max_iterations,
        progress=progress,
    )
    if not math.isfinite(outcome.upper):
        outcome.W = nearest.W
    outcome.W = truncated(outcome.W, rank)  # what rounding added
    if outcome.status is Status.ITERATION_LIMIT:
        outcome.status = Status.LOCAL
    return outcome


@dataclass(kw_only=True)
class _Nearest:
    """The matrix with the smallest worst violation, for the case that none satisfies the rows."""

    rows: Rows
    W: Floats
    shortfall: float = math.inf

    def watching(self, iterates: Iterator[Iterate]) -> Iterator[Iterate]:
        """Pass iterates through and remember the nearest."""
        for iterate in iterates:
            if iterate.W is not None:
                short = _shortfall(self.rows, iterate.W)
                if short < self.shortfall:
                    self.W, self.shortfall = iterate.W, short
            yield iterate


def truncated(W: Floats, rank: int) -> Floats:
    """The nearest matrix to ``W`` (p, q) of at most this rank."""
    K, Q = _factors(W, rank)
    return K @ Q.T


def _factors(W: Floats, rank: int) -> tuple[Floats, Floats]:
    """Balanced factors (p, m) and (q, m) of the truncated ``W``."""
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    root = np.sqrt(s[:rank])
    return U[:, :rank] * root, Vh[:rank].T * root


def _shortfall(rows: Rows, W: Floats) -> float:
    """Largest violation of a row, relative to its size and the norm of W."""
    short = rows.rhs - coordinate.values(rows, np.ascontiguousarray(W))
    short = np.where(rows.tie, np.abs(short), short)
    return float((short / (rows.size * max(float(np.linalg.norm(W)), 1e-300))).max())


def low_rank_iterates(rows: Rows, *, W: Floats, dual: Floats, rank: int) -> Iterator[Iterate]:
    """Iterates from all starts, one after the other; each satisfies the rank bound.

    Parameters
    ----------
    rows
        A feasible problem with hard margin.
    W, dual
        Solution (p, q) and multipliers (R,) of the problem without the bound.
    rank
        The bound.
    """
    yield Iterate(W=truncated(W, rank), dual=dual, step=0)
    generator = np.random.default_rng(0)
    K0, Q0 = _factors(W, rank)
    step = 0
    for start in range(STARTS):
        # Half of the starts are near the convex solution, the others of its size but anywhere.
        near, spread = (1.0, 0.5 * start) if 2 * start <= STARTS else (0.0, 1.0)
        K, Q = (
            near * factor + spread * float(np.linalg.norm(factor)) / math.sqrt(factor.size) * noise
            for factor in (K0, Q0)
            for noise in (generator.standard_normal(factor.shape),)
        )
        for found in _descend(rows, K, Q):
            step += 1
            yield Iterate(W=found, dual=None, step=step)


def _descend(rows: Rows, K: Floats, Q: Floats) -> Iterator[Floats]:
    """Matrices from one start: first towards the rows, then along them with a norm that falls."""
    rank = K.shape[1]
    price = 1.0 * float(np.linalg.norm(K @ Q.T)) ** 2
    W = _restored(rows, K @ Q.T, rank)
    for _ in range(30):
        if W is not None:
            break
        K, Q = _step(rows, K, Q, mu=0.1, price=price)
        yield K @ Q.T
        W = _restored(rows, K @ Q.T, rank)
        K, Q = _factors(K @ Q.T, rank)
        price *= 4.0
    if W is None:
        return
    size, mu, quiet = _nuclear(W), 0.1, 0
    for _ in range(STEPS):
        yield W
        K, Q = _factors(W, rank)
        K, Q = _step(rows, K, Q, mu=mu)
        found = _restored(rows, K @ Q.T, rank)
        new = math.inf if found is None else _nuclear(found)
        if found is not None and new < size:
            quiet = 0 if new < (1.0 - 1e-8) * size else quiet + 1
            W, size, mu = found, new, max(0.5 * mu, 1e-3)
        else:
            quiet, mu = quiet + 1, 8.0 * mu
        if quiet == 5 or mu > 1e6:
            break


def _nuclear(W: Floats) -> float:
    return float(np.linalg.svd(W, compute_uv=False).sum())


def _step(rows: Rows, K: Floats, Q: Floats, *, mu: float, price: float = math.inf) -> tuple[Floats, Floats]:
    """The solution (K', Q') of the linearised problem; a finite price allows squared slack of rows of unit size."""
    W = np.ascontiguousarray(K @ Q.T)
    values = coordinate.values(rows, W)
    unit = np.maximum(np.abs(rows.rhs), 1e-3 * float(np.linalg.norm(W)) * rows.size)
    member = rows.tie | (values < rows.rhs + 0.3 * unit)
    dual = np.zeros(rows.n_rows)
    for _ in range(20):
        index = member.nonzero()[0]
        if len(index) > MAX_WORKING_SET:
            break
        D = rows.differences(index)
        Z = rows.queries[rows.block[index]]
        Y, X = Z @ Q, D @ K
        matrix = torch.from_numpy((D @ D.T) * (Y @ Y.T) + (X @ X.T) * (Z @ Z.T))
        size = torch.from_numpy(rows.size[index])
        slack = (1.0 + mu) / price * size**2
        matrix.diagonal().add_(slack)
        scale = matrix.diagonal().clamp(min=1e-12 * float(matrix.diagonal().amax())).sqrt()
        matrix.div_(scale).div_(scale[:, None]).diagonal().fill_(1.0)
        rhs = torch.from_numpy(rows.rhs[index])
        tie = torch.from_numpy(rows.tie[index])
        work = WorkingSet(rows=index, gram=matrix, rhs=rhs / scale, size=scale, tie=tie)
        target = (1.0 + mu) * rows.rhs[index] + (1.0 - mu) * values[index]
        small = proximal_step(work, dual[index], rhs=target)
        dual = np.zeros(rows.n_rows)
        dual[index] = small
        G = coordinate.combine(rows, dual)
        new_K, new_Q = (G @ Q + mu * K) / (1.0 + mu), (G.T @ K + mu * Q) / (1.0 + mu)
        linear = coordinate.values(rows, np.ascontiguousarray(new_K @ Q.T + K @ new_Q.T - W))
        entering = ~member & (rows.rhs - linear > 1e-6 * unit)
        if not entering.any():
            break
        member |= worst(entering, (rows.rhs - linear) / rows.size, limit=max(100, len(index) // 2))
    return new_K, new_Q


def _restored(rows: Rows, W: Floats, rank: int) -> Floats | None:
    """A matrix with the same rows' space that satisfies every row, or None: scaled, or K solved for again."""
    W = np.ascontiguousarray(W)
    if not rigid(rows).any():
        factor = scale_to_fit(rows, coordinate.values(rows, W))
        return factor * W if math.isfinite(factor) else None
    _, _, Vh = np.linalg.svd(W, full_matrices=False)
    V = Vh[:rank].T
    inner = _seen_through(rows, V, room=ROOM * float(np.linalg.norm(W)))
    if inner is None:
        return None
    outcome = run_loop(
        inner, frobenius_iterates(inner), norm="fro", tol=1e-6, max_seconds=None, max_iterations=2000
    )
    return outcome.W @ V.T if math.isfinite(outcome.upper) else None


def _seen_through(rows: Rows, V: Floats, *, room: float) -> Rows | None:
    """The rows of M in ``W = M V^T``, for V (q, m) with orthonormal columns; None if some row cannot hold."""
    queries = rows.queries @ V
    share = np.linalg.norm(queries, axis=1) / np.linalg.norm(rows.queries, axis=1)
    size = rows.size * share[rows.block]
    rhs = np.where(rows.tie, rows.rhs, rows.rhs + room * rows.size)
    lost = size <= 1e-12 * rows.size
    if np.any(lost & np.where(rows.tie, rhs != 0.0, rows.rhs > 0.0)):
        return None
    # Rows that see nothing hold by themselves; a tiny size keeps divisions finite.
    rhs = np.where(lost, np.minimum(rhs, 0.0), rhs)
    return replace(rows, queries=np.ascontiguousarray(queries), size=np.where(lost, 1e-12 * rows.size, size), rhs=rhs)

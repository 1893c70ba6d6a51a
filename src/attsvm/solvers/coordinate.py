"""Block dual coordinate descent for the Frobenius norm, compiled with numba.

The dual of ``min ||W||_F^2 / 2  s.t.  <A_r, W> >= c_r`` is ``max sum(l c) - ||sum(l A)||_F^2 / 2`` over l >= 0
(free for ties, and at most the penalty where there is slack), and ``W = sum(l A)``. The rows of one query z share
``u = W z``, so a block costs one product W z, cheap updates of u, and one rank-one update of W:
``4 p q + 4 p k`` operations for k rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numba import njit

from attsvm.solvers.rows import Floats, Ints, Rows

__all__ = ["Descent", "combine", "sweep", "values"]

MEMORY = 4
"""Sweeps between two extrapolations, each of which is a combination of so many iterates."""

GROUP, CACHE_BYTES = 8, 2**15
"""Blocks for which a W larger than the cache is read once; what the first of them change is added for the others."""

PART_BYTES = 8 * 2**20
"""Size of the vectors ``W z`` that are alive at a time."""

# Sums may be reordered (that is what lets them run on vector units); NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract"}


@njit(cache=True, fastmath=_FAST, nogil=True)
def _sweep(X, Z, sequence, first, start, token, tie, rhs, square, limit, W, dual, order, settled, passes, U, G):  # type: ignore[no-untyped-def]
    p, q = W.shape
    group, m = len(U), len(order)
    touched, near = np.zeros(group, np.bool_), np.empty((group, q))
    for begin in range(0, m, group):
        count = min(group, m - begin)
        for c in range(count):
            near[c] = Z[order[begin + c]]
        for k in range(p):
            for c in range(count):
                total = 0.0
                for j in range(q):
                    total += W[k, j] * near[c, j]
                U[c, k] = total
        for c in range(count):
            for e in range(c):
                if touched[e]:
                    zz = 0.0
                    for j in range(q):
                        zz += near[e, j] * near[c, j]
                    for k in range(p):
                        U[c, k] += zz * G[e, k]
            b = order[begin + c]
            lo, hi = start[b], start[b + 1]
            X_b, rows = X[sequence[b]], (token[lo:hi], tie[lo:hi], rhs[lo:hi], square[lo:hi], limit)
            touched[c] = _block(X_b, X_b[first[b]], near[c], rows, dual[lo:hi], settled, passes, U[c], G[c])
        for k in range(p):
            for c in range(count):
                if touched[c]:
                    for j in range(q):
                        W[k, j] += G[c, k] * near[c, j]


@njit(cache=True, fastmath=_FAST, nogil=True)
def _block(X, own, z, rows, dual, settled, passes, u, g):  # type: ignore[no-untyped-def]
    """Change the multipliers of one query, given ``u = W z``; their sum goes to ``g``. True if any changed."""
    token, tie, rhs, square, limit = rows
    p = len(u)
    zz = 0.0
    for j in range(len(z)):
        zz += z[j] * z[j]
    g[:] = 0.0
    touched = False
    for turn in range(passes):
        moved = False
        for r in range(len(token)):
            # Later passes only refine the rows that the first one left with a multiplier.
            if (settled or turn > 0) and dual[r] == 0.0:
                continue
            other = X[token[r]]
            value = 0.0
            for k in range(p):
                value += (own[k] - other[k]) * u[k]
            new = dual[r] + (rhs[r] - value) / square[r]
            if not tie[r]:
                new = min(max(new, 0.0), limit)
            change = new - dual[r]
            if change != 0.0:
                dual[r] = new
                moved = True
                for k in range(p):
                    step = change * (own[k] - other[k])
                    g[k] += step
                    u[k] += step * zz
        if not moved:
            break
        touched = True
    return touched


@njit(cache=True, fastmath=_FAST, nogil=True)
def _values(X, sequence, first, start, token, begin, U, out):  # type: ignore[no-untyped-def]
    p = U.shape[1]
    for b in range(begin, begin + len(U)):
        own, u = X[sequence[b], first[b]], U[b - begin]
        for r in range(start[b], start[b + 1]):
            other = X[sequence[b], token[r]]
            value = 0.0
            for k in range(p):
                value += (own[k] - other[k]) * u[k]
            out[r] = value


@njit(cache=True, fastmath=_FAST, nogil=True)
def _pooled(X, sequence, first, start, token, begin, dual, G):  # type: ignore[no-untyped-def]
    p = G.shape[1]
    for b in range(begin, begin + len(G)):
        own, g = X[sequence[b], first[b]], G[b - begin]
        g[:] = 0.0
        for r in range(start[b], start[b + 1]):
            if dual[r] != 0.0:
                other = X[sequence[b], token[r]]
                for k in range(p):
                    g[k] += dual[r] * (own[k] - other[k])


def sweep(rows: Rows, W: Floats, dual: Floats, *, order: Ints | None = None, passes: int = 5) -> None:
    """One pass over all blocks; changes ``W`` (p, q) and ``dual`` (R,) in place.

    With an ``order``, a pass over those blocks that changes only the multipliers that are not 0.
    """
    p = W.shape[0]
    group = GROUP if W.nbytes > CACHE_BYTES else 1
    _sweep(
        rows.tokens,
        rows.queries,
        rows.sequence,
        rows.first,
        rows.start,
        rows.token,
        rows.tie,
        rows.rhs,
        rows.size * rows.size,
        rows.penalty,
        W,
        dual,
        np.arange(len(rows.sequence)) if order is None else order,
        order is not None,
        passes,
        np.empty((group, p)),
        np.empty((group, p)),
    )


class Descent:
    """Sweeps in a fixed order, extrapolated after every few (Anderson), which about halves their number.

    Parameters
    ----------
    rows
        The problem.
    dual
        Multipliers (R,) to begin with; changed in place.
    """

    def __init__(self, rows: Rows, dual: Floats) -> None:
        self.rows, self.dual = rows, dual
        self.W = combine(rows, dual)
        self.sweeps = 0

    def advance(self) -> None:
        """Some sweeps and an extrapolation, kept if it raises the dual value."""
        active: Ints | None = None
        if 0 < len(self._active()) <= len(self.rows.sequence) // 2:
            # Where few blocks have multipliers one sweep looks at all, and the others only at those.
            sweep(self.rows, self.W, self.dual)
            self.sweeps += 1
            active = self._active()
        iterates = np.empty((MEMORY + 1, len(self.dual)))
        iterates[0] = self.dual
        for k in range(MEMORY):
            sweep(self.rows, self.W, self.dual, order=active)
            iterates[k + 1] = self.dual
        self.sweeps += MEMORY
        # W is kept by rank-one updates; rebuilding it stops their rounding from adding up.
        self.W = combine(self.rows, self.dual)
        steps = np.diff(iterates, axis=0)
        # The weights do not depend on the size of the steps, whose squares may be out of range.
        steps /= np.abs(steps).max(initial=np.finfo(float).tiny)
        gram = steps @ steps.T
        gram += 1e-10 * max(np.trace(gram), 1.0) * np.eye(MEMORY)
        weights = np.linalg.solve(gram, np.ones(MEMORY))
        guess = (weights / weights.sum()) @ iterates[1:]
        guess = np.where(self.rows.tie, guess, guess.clip(0.0, self.rows.penalty))
        W = combine(self.rows, guess)
        if self._value(guess, W) > self._value(self.dual, self.W):
            self.dual[:] = guess
            self.W = W

    def _active(self) -> Ints:
        """Blocks with a multiplier that is not 0."""
        return np.flatnonzero(np.logical_or.reduceat(self.dual != 0.0, self.rows.start[:-1]))

    def _value(self, dual: Floats, W: Floats) -> float:
        return float(dual @ self.rows.rhs - 0.5 * np.vdot(W, W))


def values(rows: Rows, W: Floats) -> Floats:
    """``<A_r, W>`` (R,) for all rows."""
    out = np.empty(rows.n_rows)
    for begin, queries in _parts(rows):
        _values(rows.tokens, rows.sequence, rows.first, rows.start, rows.token, begin, queries @ W.T, out)
    return out


def combine(rows: Rows, dual: Floats) -> Floats:
    """``sum(dual_r A_r)`` (p, q)."""
    p, q = rows.tokens.shape[2], rows.queries.shape[1]
    W = np.zeros((p, q))
    for begin, queries in _parts(rows):
        G = np.empty((len(queries), p))
        _pooled(rows.tokens, rows.sequence, rows.first, rows.start, rows.token, begin, dual, G)
        W += G.T @ queries
    return W


def _parts(rows: Rows) -> Iterator[tuple[int, Floats]]:
    """The first block and the queries of some blocks at a time."""
    step = max(1, PART_BYTES // (8 * rows.tokens.shape[2]))
    for begin in range(0, len(rows.queries), step):
        yield begin, rows.queries[begin : begin + step]

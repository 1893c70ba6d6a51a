"""Block dual coordinate descent for the Frobenius norm, compiled with numba.

The dual of ``min ||W||_F^2 / 2  s.t.  <A_r, W> >= c_r`` is ``max sum(l c) - ||sum(l A)||_F^2 / 2`` over l >= 0
(free for ties), and ``W = sum(l A)``. The rows of one query z share ``u = W z``, so a block costs one product
W z, cheap updates of u, and one rank-one update of W: ``4 p q + 4 p k`` operations for k rows.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from attsvm.solvers.rows import Floats, Ints, Rows

__all__ = ["combine", "sweep", "values"]

# Sums may be reordered (that is what lets them run on vector units); NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract"}


@njit(cache=True, fastmath=_FAST, nogil=True)
def _sweep(X, Z, sequence, first, start, token, tie, rhs, square, W, dual, order, passes, u, g):  # type: ignore[no-untyped-def]
    p, q = W.shape
    for b in order:
        zz = 0.0
        for j in range(q):
            zz += Z[b, j] * Z[b, j]
        for k in range(p):
            total = 0.0
            for j in range(q):
                total += W[k, j] * Z[b, j]
            u[k] = total
            g[k] = 0.0
        own = X[sequence[b], first[b]]
        touched = False
        for turn in range(passes):
            moved = False
            for r in range(start[b], start[b + 1]):
                # Later passes only refine the rows that the first one left with a multiplier.
                if turn > 0 and dual[r] == 0.0:
                    continue
                other = X[sequence[b], token[r]]
                value = 0.0
                for k in range(p):
                    value += (own[k] - other[k]) * u[k]
                new = dual[r] + (rhs[r] - value) / square[r]
                if new < 0.0 and not tie[r]:
                    new = 0.0
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
        if touched:
            for k in range(p):
                for j in range(q):
                    W[k, j] += g[k] * Z[b, j]


@njit(cache=True, fastmath=_FAST, nogil=True)
def _values(X, Z, sequence, first, start, token, W, out, u):  # type: ignore[no-untyped-def]
    p, q = W.shape
    for b in range(len(sequence)):
        for k in range(p):
            total = 0.0
            for j in range(q):
                total += W[k, j] * Z[b, j]
            u[k] = total
        own = X[sequence[b], first[b]]
        for r in range(start[b], start[b + 1]):
            other = X[sequence[b], token[r]]
            value = 0.0
            for k in range(p):
                value += (own[k] - other[k]) * u[k]
            out[r] = value


@njit(cache=True, fastmath=_FAST, nogil=True)
def _combine(X, Z, sequence, first, start, token, dual, W, g):  # type: ignore[no-untyped-def]
    p, q = W.shape
    W[:] = 0.0
    for b in range(len(sequence)):
        own = X[sequence[b], first[b]]
        g[:] = 0.0
        touched = False
        for r in range(start[b], start[b + 1]):
            if dual[r] != 0.0:
                touched = True
                other = X[sequence[b], token[r]]
                for k in range(p):
                    g[k] += dual[r] * (own[k] - other[k])
        if touched:
            for k in range(p):
                for j in range(q):
                    W[k, j] += g[k] * Z[b, j]


def sweep(rows: Rows, W: Floats, dual: Floats, order: Ints, *, passes: int = 3) -> None:
    """One pass over all blocks in ``order``; changes ``W`` (p, q) and ``dual`` (R,) in place."""
    square = rows.size * rows.size
    p = W.shape[0]
    _sweep(
        rows.tokens,
        rows.queries,
        rows.sequence,
        rows.first,
        rows.start,
        rows.token,
        rows.tie,
        rows.rhs,
        square,
        W,
        dual,
        order,
        passes,
        np.empty(p),
        np.empty(p),
    )


def values(rows: Rows, W: Floats) -> Floats:
    """``<A_r, W>`` (R,) for all rows."""
    out = np.empty(rows.n_rows)
    p = W.shape[0]
    _values(rows.tokens, rows.queries, rows.sequence, rows.first, rows.start, rows.token, W, out, np.empty(p))
    return out


def combine(rows: Rows, dual: Floats) -> Floats:
    """``sum(dual_r A_r)`` (p, q)."""
    p, q = rows.tokens.shape[2], rows.queries.shape[1]
    W = np.zeros((p, q))
    _combine(rows.tokens, rows.queries, rows.sequence, rows.first, rows.start, rows.token, dual, W, np.empty(p))
    return W

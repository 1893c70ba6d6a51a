"""Compiled kernels for many small problems: rows, their Gram matrix, and its quadratic program.

A problem is treated from beginning to end while it stays in the cache. Rows are scaled to unit size,
``A_r = D_r z^T`` with ``||D_r|| = ||z|| = 1``, and their Gram matrix is ``K = (D D^T) * (Z Z^T)``. Arrays are padded
with zeros to a multiple of LANE, so that inner loops fill the vector units; products with zero cost less than the
loop over what remains.

The quadratic program is solved by block principal pivoting, as in :mod:`attsvm.solvers.newton`; between two rounds,
and between two programs with the same K, the part of the Cholesky factor that stays valid is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from attsvm.solvers.rows import Bools, Floats, Ints

__all__ = [
    "FREE",
    "LANE",
    "LOWER",
    "RIDGE",
    "UPPER",
    "Small",
    "combine",
    "gather",
    "inner_products",
    "padded",
    "pivoting",
    "sweeps",
    "weighted_by_queries",
    "workspace",
]

LANE = 8
"""Arrays are padded to a multiple of this."""

RIDGE = 1e-11
"""Weight of the proximal term, relative to the unit diagonal of the Gram matrix."""

LOWER, FREE, UPPER = 0, 1, 2
"""Where a multiplier is: at 0, in between, or at the price of slack."""

_KEPT = 3
"""State of a free row while the factor is brought up to date: it is in the factor already."""

# Sums may be reordered (that is what lets them run on vector units); NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract"}


class Small(NamedTuple):
    """Room for one problem; R is the number of rows that it may have, p and R are padded."""

    D: Floats  # (R, p) unit differences
    Dt: Floats  # (p, R) the same, transposed
    Z: Floats  # (m, q) unit queries
    size: Floats  # (R,) size of the row before scaling
    rhs: Floats  # (R,) right-hand side over size
    bound: Floats  # (R,) largest multiplier: price of slack times size
    tie: Bools  # (R,)
    place: Ints  # (R,) flat index in (n, Q, T)
    begin: Ints  # (m + 1,) where the rows of each query begin
    K: Floats  # (R, R) Gram matrix
    ready: Bools  # (R,) rows of K that have been computed; the others must not be needed
    U: Floats  # (R, R) Cholesky factor of the free rows in their order; its diagonal is kept apart, as inverses
    inverse: Floats  # (R,)
    order: Ints  # (R,) the free rows in the order in which they entered the factor
    held: Ints  # (1,) number of rows in the factor
    state: Ints  # (R,)
    wrong: Ints  # (R,) rows whose state must change
    dual: Floats  # (R,)
    before: Floats  # (R,) multipliers at which a proximal step is centred
    slope: Floats  # (R,) K dual - target
    target: Floats  # (R,)
    x: Floats  # (R,) scratch
    g: Floats  # (p,) scratch


def padded(count: int) -> int:
    """The next multiple of LANE."""
    return -(-max(count, 1) // LANE) * LANE


def workspace(rows: int, queries: int, d: int) -> Small:
    """Room for problems of up to so many rows and queries in dimension d."""
    R, p = padded(rows), padded(d)

    def floats(*shape: int) -> Floats:
        return np.zeros(shape)

    def ints(size: int) -> Ints:
        return np.zeros(size, dtype=np.int64)

    return Small(
        D=floats(R, p),
        Dt=floats(p, R),
        Z=floats(queries, d),
        size=floats(R),
        rhs=floats(R),
        bound=floats(R),
        tie=np.zeros(R, dtype=np.bool_),
        place=ints(R),
        begin=ints(queries + 1),
        K=floats(R, R),
        ready=np.ones(R, dtype=np.bool_),
        U=floats(R, R),
        inverse=floats(R),
        order=ints(R),
        held=ints(1),
        state=ints(R),
        wrong=ints(R),
        dual=floats(R),
        before=floats(R),
        slope=floats(R),
        target=floats(R),
        x=floats(R),
        g=floats(p),
    )


@njit(cache=True, fastmath=_FAST, nogil=True)
def gather(X, Z, asked, tie, first, rhs, penalty, dual, s):  # type: ignore[no-untyped-def]
    """Read the rows of a problem: their number, that of their queries, and a row of zero size that settles it, or -1.

    ``X`` (n, T, d), ``Z`` (n, Q, d), ``asked``, ``tie`` and ``rhs`` (n, Q, T), ``first`` (n, Q). In ``dual`` (n Q T,)
    rows of zero size that ask for something pay for their whole slack, where there is a price.
    """
    n, T, d = X.shape
    Q = Z.shape[1]
    R, m, broken = 0, 0, -1
    s.begin[0] = 0
    for i in range(n):
        for b in range(Q):
            length = 0.0
            for k in range(d):
                length += Z[i, b, k] * Z[i, b, k]
            length = np.sqrt(length)
            a = first[i, b]
            for t in range(T):
                if not (asked[i, b, t] or tie[i, b, t]):
                    continue
                place = (i * Q + b) * T + t
                square = 0.0
                for k in range(d):
                    value = X[i, a, k] - X[i, t, k]
                    s.D[R, k] = value
                    square += value * value
                size = np.sqrt(square)
                if size * length == 0.0:
                    c = rhs[i, b, t]
                    if tie[i, b, t]:
                        broken = place if c != 0.0 else broken
                    elif c > 0.0 and np.isinf(penalty):
                        broken = place
                    elif c > 0.0:
                        dual[place] = penalty
                    continue
                for k in range(d):
                    s.D[R, k] /= size
                s.size[R] = size * length
                s.rhs[R] = rhs[i, b, t] / (size * length)
                s.tie[R] = tie[i, b, t]
                s.bound[R] = np.inf if tie[i, b, t] else penalty * (size * length)
                s.place[R] = place
                R += 1
            if s.begin[m] < R:
                for k in range(d):
                    s.Z[m, k] = Z[i, b, k] / length
                m += 1
                s.begin[m] = R
    P = (R + LANE - 1) // LANE * LANE
    s.D[R:P] = 0.0
    s.rhs[R:P] = 0.0
    s.bound[R:P] = 0.0
    s.tie[R:P] = False
    return R, m, broken


@njit(cache=True, fastmath=_FAST, nogil=True)
def inner_products(P, s):  # type: ignore[no-untyped-def]
    """``K`` becomes the inner products of the differences of the first P (padded) rows."""
    p, q = s.D.shape[1], s.Z.shape[1]
    K, D, Dt = s.K, s.D, s.Dt
    for r in range(P):
        for k in range(p):
            Dt[k, r] = D[r, k]
    # Two rows and two dimensions at a time: what is loaded once is used twice.
    for r in range(0, P, 2):
        K[r : r + 2, :P] = 0.0
        for k in range(0, q, 2):
            a, b, c, d = D[r, k], D[r, k + 1], D[r + 1, k], D[r + 1, k + 1]
            for j in range(P):
                u, w = Dt[k, j], Dt[k + 1, j]
                K[r, j] += a * u + b * w
                K[r + 1, j] += c * u + d * w


@njit(cache=True, fastmath=_FAST, nogil=True)
def weighted_by_queries(P, m, s):  # type: ignore[no-untyped-def]
    """``K``, the inner products of the differences, becomes the Gram matrix of the rows, of m queries."""
    K, z = s.K, s.x
    z[:P] = 0.0
    for b in range(m):
        for c in range(m):
            zz = 0.0
            for k in range(s.Z.shape[1]):
                zz += s.Z[b, k] * s.Z[c, k]
            for r in range(s.begin[c], s.begin[c + 1]):
                z[r] = zz
        for r in range(s.begin[b], s.begin[b + 1]):
            for j in range(P):
                K[r, j] *= z[j]
            K[r, r] = 1.0


@njit(cache=True, fastmath=_FAST, nogil=True)
def sweeps(R, P, passes, s):  # type: ignore[no-untyped-def]
    """Projected Gauss-Seidel from 0: a first guess of which multipliers are where."""
    K, dual, slope, bound = s.K, s.dual, s.slope, s.bound
    for j in range(P):
        slope[j] = -s.rhs[j]
        dual[j] = 0.0
    for turn in range(passes):
        for r in range(R):
            # Between the first and the last pass only multipliers that are not 0 are refined.
            if 0 < turn < passes - 1 and dual[r] == 0.0:
                continue
            new = dual[r] - slope[r]
            if not s.tie[r]:
                new = min(max(new, 0.0), bound[r])
            change = new - dual[r]
            if change != 0.0:
                dual[r] = new
                for j in range(P):
                    slope[j] += change * K[r, j]
    for r in range(R):
        s.state[r] = FREE
        if not s.tie[r]:
            if dual[r] <= 0.0:
                s.state[r] = LOWER
            elif dual[r] >= bound[r]:
                s.state[r] = UPPER
    s.held[0] = 0


@njit(cache=True, fastmath=_FAST, nogil=True)
def _append(r, s):  # type: ignore[no-untyped-def]
    """Add row r to the factor."""
    k = s.held[0]
    U, y = s.U, s.x
    end = (k + LANE - 1) // LANE * LANE
    for i in range(k):
        y[i] = s.K[r, s.order[i]]
    square = 1.0 + RIDGE
    for j in range(k):
        f = y[j] * s.inverse[j]
        # Zeros up to the diagonal make it right to begin at a multiple of LANE.
        for c in range(j // LANE * LANE, end):
            y[c] -= f * U[j, c]
        U[j, k] = f
        square -= f * f
    for c in range(k // LANE * LANE, k + 1):
        U[k, c] = 0.0
    # Where rounding took more than the ridge, this is a larger ridge, which only slows the proximal steps.
    s.inverse[k] = 1.0 / np.sqrt(max(square, 0.5 * RIDGE))
    s.order[k] = r
    s.held[0] = k + 1


@njit(cache=True, fastmath=_FAST, nogil=True)
def _refactor(R, s):  # type: ignore[no-untyped-def]
    """Bring the factor in line with the states: it stays valid up to the first row that is no longer free."""
    k, valid = s.held[0], 0
    while valid < k and s.state[s.order[valid]] == FREE:
        s.state[s.order[valid]] = _KEPT
        valid += 1
    s.held[0] = valid
    for i in range(valid, k):
        r = s.order[i]
        if s.state[r] == FREE:
            _append(r, s)
            s.state[r] = _KEPT
    for r in range(R):
        if s.state[r] == FREE:
            _append(r, s)
        elif s.state[r] == _KEPT:
            s.state[r] = FREE


@njit(cache=True, fastmath=_FAST, nogil=True)
def _solve(s):  # type: ignore[no-untyped-def]
    """Solve with the factor, in place: x is the right-hand side in the factor's order, then the solution."""
    k, U, x = s.held[0], s.U, s.x
    end = (k + LANE - 1) // LANE * LANE
    for j in range(k):
        f = x[j] * s.inverse[j]
        for c in range(j // LANE * LANE, end):
            x[c] -= f * U[j, c]
        x[j] = f
    for j in range(k, end):
        x[j] = 0.0
    for j in range(k - 1, -1, -1):
        total = 0.0
        for c in range(j // LANE * LANE, end):
            total += x[c] * U[j, c]
        x[j] = (x[j] - total) * s.inverse[j]


@njit(cache=True, fastmath=_FAST, nogil=True)
def _minimise_on_free(R, P, s):  # type: ignore[no-untyped-def]
    """Multipliers and slope for the present states; the sum of the free multipliers' sizes."""
    K, dual, slope, x = s.K, s.dual, s.slope, s.x
    for j in range(P):
        slope[j] = -s.target[j]
    for r in range(R):
        dual[r] = 0.0
        if s.state[r] == UPPER:
            dual[r] = s.bound[r]
            for j in range(P):
                slope[j] += s.bound[r] * K[r, j]
    for i in range(s.held[0]):
        x[i] = -slope[s.order[i]]
    _solve(s)
    total = 0.0
    for i in range(s.held[0]):
        r, f = s.order[i], x[i]
        dual[r] = f
        total += abs(f)
        for j in range(P):
            slope[j] += f * K[r, j]
    return total


@njit(cache=True, fastmath=_FAST, nogil=True)
def pivoting(R, P, limit, s):  # type: ignore[no-untyped-def]
    """``argmin l^T (K + RIDGE) l / 2 - target^T l``, ``0 <= l <= bound`` (ties free), from the present states.

    Returns the rounds that it took, -1 beyond the limit, or 0 where it needs rows of K that are not ``ready``: to be
    called again when they are.
    """
    dual, slope, state, wrong = s.dual, s.slope, s.state, s.wrong
    largest = 0.0
    for j in range(P):
        largest = max(largest, abs(s.target[j]))
    patience, fewest = 5, R + 1
    for turn in range(limit):
        for r in range(R):
            if state[r] != LOWER and not s.ready[r]:
                return 0
        _refactor(R, s)
        total = _minimise_on_free(R, P, s)
        tolerance = 1e-14 * largest + 1e-15 * total
        count = 0
        for r in range(R):
            if state[r] == FREE:
                bad = not s.tie[r] and (dual[r] < 0.0 or dual[r] > s.bound[r])
            elif state[r] == LOWER:
                bad = slope[r] < -tolerance
            else:
                bad = slope[r] + RIDGE * dual[r] > tolerance
            wrong[count] = r
            count += bad
        if count == 0:
            return turn + 1
        # All wrong ones are exchanged while their number falls; exchanging one at a time cannot cycle.
        since = 0
        if count < fewest:
            patience, fewest = 5, count
        elif patience > 0:
            patience -= 1
        else:
            since = count - 1
        for i in range(since, count):
            r = wrong[i]
            if state[r] != FREE:
                state[r] = FREE
            else:
                state[r] = LOWER if dual[r] < 0.0 else UPPER
    return -1


@njit(cache=True, fastmath=_FAST, nogil=True)
def combine(m, weights, Wt, s):  # type: ignore[no-untyped-def]
    """``Wt`` (q, p) becomes the transpose of ``sum(weight_r D_r z^T)``."""
    p, q = Wt.shape[1], Wt.shape[0]
    g = s.g
    Wt[:] = 0.0
    for b in range(m):
        touched = False
        g[:] = 0.0
        for r in range(s.begin[b], s.begin[b + 1]):
            f = weights[r]
            if f != 0.0:
                touched = True
                for k in range(p):
                    g[k] += f * s.D[r, k]
        if touched:
            for j in range(q):
                f = s.Z[b, j]
                for k in range(p):
                    Wt[j, k] += f * g[k]

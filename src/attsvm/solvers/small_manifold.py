"""Compiled Newton's method for a small problem with the nuclear norm, on the manifold of the rank at hand.

The method is that of :mod:`attsvm.solvers.manifold`, here on all rows of a problem: rows of the quadratic program's
matrix are computed when pivoting needs them. Rows have unit size, W is kept transposed and in the span of the queries:
(q, p).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from attsvm.solvers.rows import Floats
from attsvm.solvers.small_kernels import LOWER, RIDGE, combine, padded, pivoting
from attsvm.solvers.small_spectrum import decompose, sizes

__all__ = ["Spectral", "newton", "spectral_workspace", "values"]

PATIENCE = 4
"""Steps without a smaller residual after which an attempt ends."""

_FAST = {"reassoc", "contract"}


class Spectral(NamedTuple):
    """Room for the spectral part of one problem: p and R are padded, k is the dimension, and what q may be."""

    inner: Floats  # (R, R) inner products of the differences
    E: Floats  # (k + 1, k) orthonormal basis of the queries, and scratch
    W: Floats  # (k, p) the matrix
    G: Floats  # (k, p) the combination of the rows
    X: Floats  # (k, p) W + tau G
    Y: Floats  # (k, p) scratch
    point: Floats  # (k, p) the point of the splitting
    U: Floats  # (k, p) left vectors
    V: Floats  # (k, k) right vectors
    T: Floats  # (k, k) scratch
    sigma: Floats  # (k,) singular values of X
    s: Floats  # (k,) those of W
    even: Floats  # (k,) 1 / (1 - g^2)
    odd: Floats  # (k,) g / (1 - g^2)
    scratch: Floats  # (k,)
    a: Floats  # (k, R) differences in the basis of left vectors
    b: Floats  # (k, R) queries in that of right vectors
    queries: Floats  # (m, 6, R) what a row of the program's matrix is made of: the part that its query decides
    lines: Floats  # (6, R) the rest
    dual: Floats  # (R,)
    values: Floats  # (R,) of the rows under W
    scale: Floats  # (R,) root of the diagonal of the program's matrix
    inverse: Floats  # (R,) 1 / scale, 0 in the padding
    inside: Floats  # (k, k) the free symmetric part S
    core: Floats  # (k, k) U^T G V
    right: Floats  # (k, k) coefficients of the right vectors in the answer
    left: Floats  # (k, p) columns of the answer
    outer: Floats  # (k, k)


def spectral_workspace(rows: int, queries: int, d: int) -> Spectral:
    """Room for problems of up to so many rows and queries in dimension d."""
    R, p = padded(rows), padded(d)
    shapes: dict[str, tuple[int, ...]] = {"inner": (R, R), "E": (d + 1, d), "lines": (6, R), "queries": (queries, 6, R)}
    shapes |= dict.fromkeys(("W", "G", "X", "Y", "point", "U", "left"), (d, p))
    shapes |= dict.fromkeys(("V", "T", "inside", "core", "right", "outer"), (d, d))
    shapes |= dict.fromkeys(("a", "b"), (d, R))
    vectors = {"sigma": d, "s": d, "even": d, "odd": d, "scratch": d, "dual": R, "values": R, "scale": R, "inverse": R}
    return Spectral(
        **{name: np.zeros(shape) for name, shape in shapes.items()},
        **{name: np.zeros(size) for name, size in vectors.items()},
    )


@njit(cache=True, fastmath=_FAST, nogil=True)
def values(P, m, q, W, s, out):  # type: ignore[no-untyped-def]
    """Values of the rows under ``W`` (q, p), in ``out``."""
    y = s.g
    out[:P] = 0.0
    for b in range(m):
        y[:] = 0.0
        for j in range(q):
            f = s.Z[b, j]
            for k in range(y.shape[0]):
                y[k] += f * W[j, k]
        for r in range(s.begin[b], s.begin[b + 1]):
            total = 0.0
            for k in range(y.shape[0]):
                total += s.D[r, k] * y[k]
            out[r] = total


@njit(cache=True, fastmath=_FAST, nogil=True)
def _violation(R, norm, n, s):  # type: ignore[no-untyped-def]
    """Largest shortfall of a row, by the larger of its right-hand side and a thousandth of the norm of W."""
    most = 0.0
    for r in range(R):
        short = s.rhs[r] - n.values[r]
        short = abs(short) if s.tie[r] else short
        most = max(most, short / max(abs(s.rhs[r]), 1e-3 * norm))
    return most


@njit(cache=True, fastmath=_FAST, nogil=True)
def _frame(R, q, tau, n, s):  # type: ignore[no-untyped-def]
    """Bases of ``W + tau G`` and how W answers to G in them: rank, tau, residual, damping and delta; rank 0: none."""
    p = n.W.shape[1]
    square = 0.0
    for j in range(q):
        for k in range(p):
            square += n.W[j, k] * n.W[j, k]
    norm = np.sqrt(square)
    rank = 0
    while True:
        for j in range(q):
            for k in range(p):
                n.X[j, k] = n.W[j, k] + tau * n.G[j, k]
        decompose(q, n.X, n.V, n.Y, n.U, n.sigma)
        while rank < q and n.sigma[rank] > tau:
            rank += 1
        if rank > 0 or not tau > 1e-6 * norm:
            break
        tau *= 0.5
    mean = 0.0
    for i in range(rank):
        n.s[i] = n.sigma[i] - tau
        mean += n.s[i] / rank
    distance = 0.0
    for j in range(q):
        for k in range(p):
            n.Y[j, k] = n.W[j, k]
        for i in range(rank):
            f = n.s[i] * n.V[i, j]
            for k in range(p):
                n.Y[j, k] -= f * n.U[i, k]
        for k in range(p):
            distance += n.Y[j, k] * n.Y[j, k]
    residual = max(_violation(R, norm, n, s), distance / max(square, 1e-300))
    damping = min(1e-2, max(0.1 * residual, 1e-9))
    for i in range(rank, q):
        g = min(n.sigma[i] / tau, 1.0 - damping)
        n.even[i] = 1.0 / (1.0 - g * g)
        n.odd[i] = g * n.even[i]
    # Far from the solution S is held back, which is what makes the steps converge from there.
    delta = min(max(residual, 1e-3), 1e-1) / max(mean, 1e-300)
    return rank, tau, residual, damping, delta, mean


@njit(cache=True, fastmath=_FAST, nogil=True)
def _coordinates(P, m, q, n, s):  # type: ignore[no-untyped-def]
    """Differences and queries of the rows in the bases."""
    for i in range(q):
        a, b = n.a[i], n.b[i]
        a[:P] = 0.0
        b[:P] = 0.0
        for k in range(s.D.shape[1]):
            f = n.U[i, k]
            for r in range(P):
                a[r] += f * s.Dt[k, r]
        for c in range(m):
            f = 0.0
            for k in range(q):
                f += n.V[i, k] * s.Z[c, k]
            for r in range(s.begin[c], s.begin[c + 1]):
                b[r] = f


@njit(cache=True, fastmath=_FAST, nogil=True)
def _add(weight, vector, out, P):  # type: ignore[no-untyped-def]
    """``out += weight * vector``: loops that write one array run on vector units."""
    for j in range(P):
        out[j] += weight * vector[j]


@njit(cache=True, fastmath=_FAST, nogil=True)
def _program(R, P, m, q, rank, delta, held, n, s):  # type: ignore[no-untyped-def]
    """Begin the quadratic program: its diagonal, whose root is ``scale``, and what its matrix has for each query.

    No row of ``K`` is ready.
    """
    a, b = n.a, n.b
    for c in range(m):
        lines, first = n.queries[c], s.begin[c]
        bb, sbb, low_b, ba, sba, odd_ba = lines[0], lines[1], lines[2], lines[3], lines[4], lines[5]
        lines[:, :P] = 0.0
        for i in range(rank):
            f = b[i, first]
            _add(f, b[i], bb, P)
            _add(n.s[i] * f, b[i], sbb, P)
            _add(f, a[i], ba, P)
            _add(n.s[i] * f, a[i], sba, P)
        for i in range(rank, q):
            f = b[i, first]
            _add(n.even[i] * f, b[i], low_b, P)
            _add(n.odd[i] * f, a[i], odd_ba, P)
    most, half = 0.0, 0.5 / delta
    for c in range(m):
        lines = n.queries[c]
        for r in range(s.begin[c], s.begin[c + 1]):
            aa, saa, low = 0.0, 0.0, 1.0
            for i in range(rank):
                aa += a[i, r] * a[i, r]
                saa += n.s[i] * a[i, r] * a[i, r]
            for i in range(rank, q):
                low += (n.even[i] - 1.0) * a[i, r] * a[i, r]
            n.scale[r] = (
                half * (aa * lines[0, r] + lines[3, r] ** 2)
                + saa * (0.25 * lines[0, r] + lines[2, r])
                + lines[1, r] * (low - 0.75 * aa)
                + 2.0 * lines[4, r] * (lines[5, r] - 0.25 * lines[3, r])
                + held
            )
            most = max(most, n.scale[r])
            s.ready[r] = False
    for r in range(R):
        n.scale[r] = np.sqrt(max(n.scale[r], 1e-12 * most))
        n.inverse[r] = 1.0 / n.scale[r]
    s.held[0] = 0


@njit(cache=True, fastmath=_FAST, nogil=True)
def _row(r, c, P, q, rank, delta, n, s):  # type: ignore[no-untyped-def]
    """Row r, of query c, of the program's matrix, scaled to unit diagonal."""
    a, b, out, inner = n.a, n.b, s.K[r], n.inner[r]
    aa, saa, low_a, ab, sab, odd_ab = n.lines[0], n.lines[1], n.lines[2], n.lines[3], n.lines[4], n.lines[5]
    bb, sbb, low_b = n.queries[c, 0], n.queries[c, 1], n.queries[c, 2]
    ba, sba, odd_ba = n.queries[c, 3], n.queries[c, 4], n.queries[c, 5]
    n.lines[:, :P] = 0.0
    for i in range(rank):
        f = a[i, r]
        _add(f, a[i], aa, P)
        _add(n.s[i] * f, a[i], saa, P)
        _add(f, b[i], ab, P)
        _add(n.s[i] * f, b[i], sab, P)
    for i in range(rank, q):
        f = a[i, r]
        _add((n.even[i] - 1.0) * f, a[i], low_a, P)
        _add(n.odd[i] * f, b[i], odd_ab, P)
    half = 0.5 / delta
    for j in range(P):
        out[j] = half * (aa[j] * bb[j] + ab[j] * ba[j])
    for j in range(P):
        out[j] += saa[j] * (0.25 * bb[j] + low_b[j])
    for j in range(P):
        out[j] += sbb[j] * (inner[j] - 0.75 * aa[j] + low_a[j])
    for j in range(P):
        out[j] += sab[j] * (odd_ba[j] - 0.25 * ba[j])
    for j in range(P):
        out[j] += sba[j] * (odd_ab[j] - 0.25 * ab[j])
    f = n.inverse[r]
    for j in range(P):
        out[j] *= f * n.inverse[j]
    out[r] = 1.0
    s.ready[r] = True


@njit(cache=True, nogil=True)
def _pivot(R, P, m, q, rank, delta, n, s):  # type: ignore[no-untyped-def]
    """Solve the quadratic program for ``s.target``, computing rows of its matrix as they are needed."""
    for _ in range(R + 1):
        for c in range(m):
            for r in range(s.begin[c], s.begin[c + 1]):
                if s.state[r] != LOWER and not s.ready[r]:
                    _row(r, c, P, q, rank, delta, n, s)
        took = pivoting(R, P, 50 + R, s)
        if took != 0:
            return took > 0
    return False


@njit(cache=True, fastmath=_FAST, nogil=True)
def _solve_program(R, P, m, q, rank, delta, held, times, tol, n, s):  # type: ignore[no-untyped-def]
    """Multipliers ``dual`` and S (``inside``) of the step, by the method of multipliers; whether that worked."""
    a, b, F = n.a, n.b, n.inside
    for i in range(rank):
        for j in range(rank):
            F[i, j] = n.s[i] if i == j else 0.0
    for r in range(R):
        s.before[r] = n.dual[r]
    for _ in range(times):
        for r in range(P):
            n.values[r] = s.rhs[r]
        for i in range(rank):
            for j in range(rank):
                f = F[i, j] - (1.0 / delta if i == j else 0.0)
                for r in range(P):
                    n.values[r] -= f * a[i, r] * b[j, r]
        for r in range(R):
            f = n.scale[r]
            s.target[r] = (n.values[r] + held * s.before[r]) / f + RIDGE * f * n.dual[r]
        for r in range(R, P):
            s.target[r] = 0.0
        if not _pivot(R, P, m, q, rank, delta, n, s):
            return False
        for r in range(R):
            n.dual[r] = s.dual[r] * n.inverse[r]
        worst = 0.0
        for i in range(rank):
            for j in range(rank):
                total = 0.0
                for r in range(R):
                    total += a[i, r] * b[j, r] * n.dual[r]
                n.core[i, j] = total
        for i in range(rank):
            for j in range(rank):
                error = 0.5 * (n.core[i, j] + n.core[j, i]) - (1.0 if i == j else 0.0)
                F[i, j] += error / delta
                worst = max(worst, abs(error))
        if worst < max(0.01 * tol, 1e-13):
            break
    return True


@njit(cache=True, fastmath=_FAST, nogil=True)
def _answer(q, rank, n):  # type: ignore[no-untyped-def]
    """``W`` becomes what answers to ``G``, with S; the mean size of its singular values, squares by sizes."""
    p, U, V = n.W.shape[1], n.U, n.V
    for i in range(rank):
        for j in range(q):
            n.right[i, j] = 0.0
            for k in range(p):
                n.right[i, j] += n.G[j, k] * U[i, k]
        n.left[i] = 0.0
        for j in range(q):
            for k in range(p):
                n.left[i, k] += V[i, j] * n.G[j, k]
    for i in range(rank):
        for j in range(q):
            inner, outer = 0.0, 0.0
            for k in range(q):
                inner += n.right[i, k] * V[j, k]
            for k in range(p):
                outer += n.left[i, k] * U[j, k]
            n.core[i, j] = inner
            n.outer[i, j] = outer
    for j in range(q):
        n.W[j] = 0.0
    for i in range(rank):
        row, column = n.right[i], n.left[i]
        for k in range(q):
            row[k] *= n.s[i]
        for k in range(p):
            column[k] *= n.s[i]
        for j in range(q):
            if j < rank:
                skew = 0.25 * (n.s[i] + n.s[j]) * (n.core[i, j] - n.core[j, i])
                f, g = n.inside[i, j] + skew - n.s[i] * n.core[i, j], -n.s[i] * n.core[j, i]
            else:
                f = n.s[i] * ((n.even[j] - 1.0) * n.core[i, j] + n.odd[j] * n.outer[i, j])
                g = n.s[i] * ((n.even[j] - 1.0) * n.outer[i, j] + n.odd[j] * n.core[i, j])
            for k in range(q):
                row[k] += f * V[j, k]
            for k in range(p):
                column[k] += g * U[j, k]
        for j in range(q):
            for k in range(p):
                n.W[j, k] += row[j] * U[i, k] + V[i, j] * column[k]
    square, size = 0.0, 0.0
    for j in range(q):
        for k in range(p):
            square += n.W[j, k] * n.W[j, k]
    for i in range(rank):
        size += abs(n.inside[i, i])
    return square / max(size, 1e-300)


@njit(cache=True, fastmath=_FAST, nogil=True)
def _gap(R, q, fixed, n, s):  # type: ignore[no-untyped-def]
    """Relative gap of the bounds from W, scaled where that is allowed, and the multipliers."""
    nuclear, _ = sizes(q, n.W, n.V, n.Y, n.T, n.scratch)
    _, slope = sizes(q, n.G, n.V, n.Y, n.T, n.scratch)
    promised, factor = 0.0, 0.0
    for r in range(R):
        promised += n.dual[r] * s.rhs[r]
        if not s.tie[r] and s.rhs[r] > 0.0:
            factor = max(factor, s.rhs[r] / n.values[r]) if n.values[r] > 0.0 else np.inf
    upper = nuclear * (1.0 if fixed else factor)
    if not (slope > 0.0 and np.isfinite(upper) and upper > 0.0):
        return np.inf
    return 1.0 - promised / slope / upper


@njit(cache=True, nogil=True)
def newton(R, P, m, q, fixed, tol, limit, n, s):  # type: ignore[no-untyped-def]
    """Newton's method from W and the multipliers: whether the gap was reached, and steps."""
    _, slope = sizes(q, n.G, n.V, n.Y, n.T, n.scratch)
    nuclear, _ = sizes(q, n.W, n.V, n.Y, n.T, n.scratch)
    if not (slope > 0.0 and nuclear > 0.0):
        return False, 0
    square = 0.0
    for j in range(q):
        for k in range(n.W.shape[1]):
            square += n.W[j, k] * n.W[j, k]
    for r in range(R):
        n.dual[r] /= slope
    for j in range(q):
        for k in range(n.W.shape[1]):
            n.G[j, k] /= slope
    tau = square / nuclear
    best, quiet = np.inf, 0
    for step in range(limit):
        rank, tau, residual, damping, delta, mean = _frame(R, q, tau, n, s)
        if rank == 0 or not np.isfinite(residual):
            return False, step
        if residual < 1e-2 and residual < 1e3 * tol and _gap(R, q, fixed, n, s) <= tol:
            return True, step
        if step > 0:  # the residual of the start has another meaning
            quiet = 0 if residual < 0.7 * best else quiet + 1
            best = min(best, residual)
        if quiet == PATIENCE:
            return False, step
        held = damping * mean
        _coordinates(P, m, q, n, s)
        _program(R, P, m, q, rank, delta, held, n, s)
        times = 1 if residual > 1e-2 else 4
        if not _solve_program(R, P, m, q, rank, delta, held, times, tol, n, s):
            return False, step
        combine(m, n.dual, n.G[:q], s)
        tau = _answer(q, rank, n)
        if not (np.isfinite(tau) and tau > 0.0):
            return False, step + 1
        values(P, m, q, n.W, s, n.values)
    return False, limit

"""Compiled solver of many small problems with the nuclear norm and hard margin, one after the other.

Newton's method (:mod:`attsvm.solvers.small_manifold`) begins at the Frobenius solution. Where it does not converge,
steps of Douglas-Rachford splitting (:mod:`attsvm.solvers.splitting`) come first, more and more of them.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from attsvm.solvers.small_frobenius import FAILED, LIMIT, ROOM, SOLVED, least_norm, read, write
from attsvm.solvers.small_kernels import FREE, LOWER, RIDGE, combine, inner_products, pivoting, weighted_by_queries
from attsvm.solvers.small_manifold import newton, values
from attsvm.solvers.small_spectrum import decompose, orthonormal, sizes

__all__ = ["solve_nuclear"]

STEPS = 40
"""Largest number of steps of an attempt of Newton's method."""

ATTEMPTS = 6
"""Attempts; before each but the first, three times as many steps of splitting are made as before the last one."""


@njit(cache=True, nogil=True)
def _copy(q, X, Y):  # type: ignore[no-untyped-def]
    for j in range(q):
        for k in range(X.shape[1]):
            Y[j, k] = X[j, k]


@njit(cache=True, nogil=True)
def _identity(q, V):  # type: ignore[no-untyped-def]
    for i in range(q):
        for j in range(q):
            V[i, j] = 1.0 if i == j else 0.0


@njit(cache=True, nogil=True)
def _frobenius_gram(P, m, n, s):  # type: ignore[no-untyped-def]
    """``K`` becomes the Gram matrix of the rows again."""
    for r in range(P):
        s.ready[r] = True
        for j in range(P):
            s.K[r, j] = n.inner[r, j]
    weighted_by_queries(P, m, s)
    s.held[0] = 0


@njit(cache=True, nogil=True)
def _project(R, P, m, q, V, out, n, s):  # type: ignore[no-untyped-def]
    """``out`` becomes the projection of ``V`` on the rows, with multipliers ``s.dual``; False if pivoting fails."""
    values(P, m, q, V, s, n.values)
    for r in range(R):
        s.target[r] = s.rhs[r] - n.values[r] + RIDGE * s.dual[r]
    if pivoting(R, P, 50 + R, s) < 0:
        return False
    combine(m, s.dual, out[:q], s)
    for j in range(q):
        for k in range(V.shape[1]):
            out[j, k] += V[j, k]
    return True


@njit(cache=True, nogil=True)
def _split(R, P, m, q, begin, end, tau, n, s):  # type: ignore[no-untyped-def]
    """Steps of Douglas-Rachford splitting from ``point`` to W and multipliers: the new tau, or 0 if they fail."""
    p = n.W.shape[1]
    for step in range(begin, end):
        if not _project(R, P, m, q, n.point, n.G, n, s):
            return 0.0
        for j in range(q):
            for k in range(p):
                n.X[j, k] = 2.0 * n.G[j, k] - n.point[j, k]
        decompose(q, n.X, n.V, n.Y, n.U, n.sigma)
        nuclear, square = 0.0, 0.0
        for j in range(q):
            n.W[j] = 0.0
        for i in range(q):
            f = max(n.sigma[i] - tau, 0.0)
            nuclear += f
            square += f * f
            for j in range(q):
                for k in range(p):
                    n.W[j, k] += f * n.V[i, j] * n.U[i, k]
        for j in range(q):
            for k in range(p):
                n.point[j, k] += n.W[j, k] - n.G[j, k]
        if not np.isfinite(square):
            return 0.0
        if step in (4, 14, 44):
            # The best tau is about the size of the singular values of the solution.
            factor = square / nuclear / tau if nuclear > 0.0 else 0.25
            for j in range(q):
                for k in range(p):
                    n.point[j, k] = n.G[j, k] - factor * (n.G[j, k] - n.point[j, k])
            tau *= factor
            for r in range(R):
                s.dual[r] *= factor
    return tau


@njit(cache=True, nogil=True)
def _repair(R, P, m, q, n, s):  # type: ignore[no-untyped-def]
    """The smallest correction of W that makes rows hold as they are; False if that fails."""
    _frobenius_gram(P, m, n, s)
    norm = 0.0
    for j in range(q):
        for k in range(n.W.shape[1]):
            norm += n.W[j, k] * n.W[j, k]
    norm = np.sqrt(norm)
    kept = n.scale  # no longer needed
    for r in range(R):
        kept[r] = s.rhs[r]
        s.rhs[r] += 0.0 if s.tie[r] else ROOM * norm
        s.dual[r] = 0.0
        s.state[r] = FREE if s.tie[r] else LOWER
    done = True
    for _ in range(2):
        done = done and _project(R, P, m, q, n.W, n.X, n, s)
        if done:
            _copy(q, n.X, n.W)
        for r in range(R):
            s.dual[r] = 0.0
    for r in range(R):
        s.rhs[r] = kept[r]
    return done


@njit(cache=True, nogil=True)
def _least_nuclear(R, P, m, q, fixed, tol, limit, n, s):  # type: ignore[no-untyped-def]
    """From the Frobenius solution in ``s.dual``: how it ended, and steps. W and its multipliers are in ``n``."""
    combine(m, s.dual, n.W[:q], s)
    _copy(q, n.W, n.G)
    _copy(q, n.W, n.point)
    _identity(q, n.V)
    for r in range(R):
        n.dual[r] = s.dual[r]
    values(P, m, q, n.W, s, n.values)
    nuclear, _ = sizes(q, n.W, n.V, n.Y, n.T, n.scratch)
    tau, steps, made, wanted = 0.1 * nuclear, 0, 0, 5
    for attempt in range(ATTEMPTS):
        if steps >= limit:
            return LIMIT, steps
        reached, took = newton(R, P, m, q, fixed, tol, min(STEPS, limit - steps), n, s)
        steps += took
        if reached:
            return SOLVED, steps
        if steps >= limit or attempt == ATTEMPTS - 1:
            break
        _frobenius_gram(P, m, n, s)
        _identity(q, n.V)
        for r in range(R):
            s.state[r] = FREE if s.tie[r] else LOWER
            s.dual[r] = 0.0
        tau = _split(R, P, m, q, made, wanted, tau, n, s)
        if tau == 0.0:
            return FAILED, steps
        steps += wanted - made
        made, wanted = wanted, 3 * wanted
        for r in range(R):
            n.dual[r] = s.dual[r]
        combine(m, n.dual, n.G[:q], s)
        values(P, m, q, n.W, s, n.values)
    return (LIMIT if steps >= limit else FAILED), steps


@njit(cache=True, nogil=True)
def _normalise(R, m, q, n, s):  # type: ignore[no-untyped-def]
    """Put the multipliers, with a dual norm of 1, in their place."""
    combine(m, n.dual, n.G[:q], s)
    _, slope = sizes(q, n.G, n.V, n.Y, n.T, n.scratch)
    for r in range(R):
        s.dual[r] = n.dual[r] / slope if slope > 0.0 else n.dual[r]


@njit(cache=True, nogil=True)
def solve_nuclear(problems, fixed, exact, tol, limit, n, s, W, dual, ties, code, rounds):  # type: ignore[no-untyped-def]
    """Solve problem after problem, as :func:`solve_frobenius` does.

    ``exact``: some rows must hold as they are, because they are ties, ask for 0, or ``fixed`` forbids to scale W.
    """
    X, Z, asked, tie, first, rhs = problems
    d = X.shape[3]
    for b in range(X.shape[0]):
        R, P, m, ended = read(X[b], Z[b], asked[b], tie[b], first[b], rhs[b], np.inf, dual[b], ties[b], s)
        if ended < 0:
            q = orthonormal(m, s.Z, n.E)
            inner_products(P, s)
            for r in range(P):
                n.inverse[r] = 0.0
                for j in range(P):
                    n.inner[r, j] = s.K[r, j]
            _frobenius_gram(P, m, n, s)
            ended, rounds[b] = least_norm(R, P, m, fixed, 1e-4, False, limit, n.X, s)
            largest = 0.0
            for r in range(R):
                largest = max(largest, abs(s.dual[r]))
            if ended == SOLVED and largest > 0.0:
                ended, rounds[b] = _least_nuclear(R, P, m, q, fixed, tol, limit, n, s)
                if ended == SOLVED and exact and not _repair(R, P, m, q, n, s):
                    ended = FAILED
                _normalise(R, m, q, n, s)
            else:
                n.W[:q] = 0.0
            if ended != FAILED:
                write(R, dual[b], ties[b], s)
            if ended in (SOLVED, LIMIT):
                for i in range(d):
                    for j in range(q):
                        for k in range(d):
                            W[b, i, k] += n.W[j, i] * n.E[j, k]
            else:
                s.U[:] = 0.0  # what is left there may be infinite
        code[b] = ended

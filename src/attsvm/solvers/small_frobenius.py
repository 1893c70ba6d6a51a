"""Compiled solver of many small problems with the Frobenius norm, hard or soft margin, one after the other.

Each is a quadratic program on the Gram matrix of its rows: a guess by a few sweeps of coordinate descent, block
principal pivoting from there, and proximal steps until the rows hold. Nothing is allocated; several threads may work
on parts of a batch, each in a workspace of its own.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from attsvm.selection.certificate import RAY_TOLERANCE
from attsvm.solvers.small_kernels import (
    LANE,
    RIDGE,
    UPPER,
    combine,
    gather,
    inner_products,
    pivoting,
    sweeps,
    weighted_by_queries,
)

__all__ = ["FAILED", "LIMIT", "RAY", "SOLVED", "least_norm", "read", "solve_frobenius", "write"]

SOLVED, RAY, LIMIT, FAILED = 0, 1, 2, 3
"""How a problem ended: with multipliers of the solution, with a ray, at the limit of iterations, or with nothing."""

PASSES = 6
"""Sweeps of coordinate descent for the first guess."""

STEPS = 30
"""Proximal steps after which a problem that still does not hold is given up."""

ROOM = 1e-12
"""How far beyond its bound a row is put where W cannot be scaled, relative to ``||W||_F`` and the row."""

EXACT = 1e-12
"""How far a tie, or a row that asks for 0, may be off, likewise: a hundredth of what the certificate allows."""


@njit(cache=True, nogil=True)
def read(X, Z, asked, tie, first, rhs, penalty, dual, ties, s):  # type: ignore[no-untyped-def]
    """Rows of a problem and their padded number, number of queries, and how it ended if nothing is left to do, or -1.

    A row that cannot hold is a ray, in ``dual`` or ``ties`` (n Q T,).
    """
    R, m, broken = gather(X, Z, asked, tie, first, rhs, penalty, dual, s)
    P = (R + LANE - 1) // LANE * LANE
    ended = -1
    if broken >= 0:
        T = X.shape[1]
        Q = Z.shape[1]
        i, q, t = broken // (Q * T), broken // T % Q, broken % T
        dual[:] = 0.0
        if tie[i, q, t]:
            ties[broken] = np.sign(rhs[i, q, t])
        else:
            dual[broken] = 1.0
        ended = RAY
    elif R == 0:
        ended = SOLVED
    return R, P, m, ended


@njit(cache=True, nogil=True)
def _is_ray(R, m, total, Wt, s):  # type: ignore[no-untyped-def]
    """Whether the multipliers combine to 0 and promise more, with room to spare for the judge."""
    promised, demanded = 0.0, 0.0
    for r in range(R):
        promised += s.dual[r] * s.rhs[r]
        demanded += abs(s.dual[r] * s.rhs[r])
    if promised <= 2.0 * RAY_TOLERANCE * demanded:
        return False
    combine(m, s.dual, Wt, s)
    square = 0.0
    for j in range(Wt.shape[0]):
        for k in range(Wt.shape[1]):
            square += Wt[j, k] * Wt[j, k]
    return np.sqrt(square) <= 0.5 * RAY_TOLERANCE * total


@njit(cache=True, nogil=True)
def _holds(R, norm, fixed, tol, soft, s):  # type: ignore[no-untyped-def]
    """Whether the rows hold well enough for the tolerance, with multipliers whose W has this norm."""
    price, value = 0.0, -0.5 * norm * norm
    for r in range(R):
        short = -s.slope[r] - RIDGE * s.before[r]
        value += s.dual[r] * s.rhs[r]
        if s.tie[r]:
            if abs(short) > EXACT * norm:
                return False
        elif soft:
            if s.state[r] != UPPER:
                price += s.bound[r] * max(short, 0.0)
        elif s.rhs[r] == 0.0:
            if short > EXACT * norm:
                return False
        elif fixed:
            if short > 0.5 * ROOM * norm:
                return False
        elif short > 0.01 * tol * s.rhs[r]:
            return False
    return price <= 0.01 * tol * value or price == 0.0


@njit(cache=True, nogil=True)
def least_norm(R, P, m, fixed, tol, soft, limit, Wt, s):  # type: ignore[no-untyped-def]
    """Multipliers of the matrix of smallest Frobenius norm, from K and the right-hand sides: how it ended, and rounds.

    ``fixed``: W must hold as it is, without being scaled.
    """
    rounds = 0
    sweeps(R, P, PASSES, s)
    for r in range(P):
        s.target[r] = s.rhs[r]
        s.before[r] = 0.0
    for step in range(STEPS):
        took = pivoting(R, P, limit - rounds, s)
        if took < 0:
            return LIMIT, limit
        rounds += took
        square, total = 0.0, 0.0
        for r in range(R):
            square += s.dual[r] * (s.slope[r] + s.target[r])
            total += abs(s.dual[r])
        if not np.isfinite(square):
            return FAILED, rounds
        if square <= (1e-6 * total) ** 2 and _is_ray(R, m, total, Wt, s):
            return RAY if not soft else FAILED, rounds
        norm = np.sqrt(max(square, 0.0))
        # The first step gives the size of W that the room is measured by.
        if (step > 0 or not fixed) and _holds(R, norm, fixed, tol, soft, s):
            return SOLVED, rounds
        for r in range(R):
            s.before[r] = s.dual[r]
            room = ROOM * norm if fixed and not s.tie[r] and s.rhs[r] != 0.0 else 0.0
            s.target[r] = s.rhs[r] + room + RIDGE * s.dual[r]
    return FAILED, rounds


@njit(cache=True, nogil=True)
def write(R, dual, ties, s):  # type: ignore[no-untyped-def]
    """Put the multipliers at their places (n Q T,)."""
    for r in range(R):
        if s.tie[r]:
            ties[s.place[r]] = s.dual[r] / s.size[r]
        else:
            dual[s.place[r]] = min(max(s.dual[r], 0.0), s.bound[r]) / s.size[r]


@njit(cache=True, nogil=True)
def solve_frobenius(problems, penalty, fixed, tol, limit, s, W, dual, ties, code, rounds):  # type: ignore[no-untyped-def]
    """Solve problem after problem; ``problems`` is (X, Z, asked, tie, first, rhs), with a leading B as all arrays.

    ``W`` (B, d, d); ``dual`` and ``ties`` (B, n Q T), which are the ray where there is one; ``code`` and ``rounds``
    (B,). All must be 0 before.
    """
    X, Z, asked, tie, first, rhs = problems
    d = X.shape[3]
    Wt = np.zeros((d, s.D.shape[1]))
    soft = not np.isinf(penalty)
    for b in range(X.shape[0]):
        R, P, m, ended = read(X[b], Z[b], asked[b], tie[b], first[b], rhs[b], penalty, dual[b], ties[b], s)
        if ended < 0:
            inner_products(P, s)
            weighted_by_queries(P, m, s)
            ended, rounds[b] = least_norm(R, P, m, fixed and not soft, tol, soft, limit, Wt, s)
            if ended != FAILED:
                write(R, dual[b], ties[b], s)
            if ended in (SOLVED, LIMIT):
                for r in range(R):
                    if not s.tie[r]:
                        s.dual[r] = min(max(s.dual[r], 0.0), s.bound[r])
                combine(m, s.dual, Wt, s)
                for i in range(d):
                    for j in range(d):
                        W[b, i, j] = Wt[j, i]
            else:
                s.U[:] = 0.0  # what is left there may be infinite
        code[b] = ended

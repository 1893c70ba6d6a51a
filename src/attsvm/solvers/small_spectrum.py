"""Compiled kernels for the singular values of small matrices, kept transposed: (q, p), q <= p.

A matrix X (p, q) is held as its columns, so that the rotations of a one-sided Jacobi method work on contiguous rows.
It starts from the right singular vectors of the matrix before, which makes one or two sweeps enough when it has
changed little.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["decompose", "orthonormal", "sizes"]

SWEEPS = 30
"""More than Jacobi's method ever takes on matrices of this size."""

_FAST = {"reassoc", "contract"}


@njit(cache=True, fastmath=_FAST, nogil=True)
def orthonormal(m, Z, E):  # type: ignore[no-untyped-def]
    """Orthonormal rows in ``E`` that span the first m rows of ``Z`` (m, d), which become coordinates; their number."""
    d = Z.shape[1]
    count = 0
    for b in range(m):
        if count == d:
            break
        v = E[count]
        for k in range(d):
            v[k] = Z[b, k]
        for _ in range(2):
            for i in range(count):
                f = 0.0
                for k in range(d):
                    f += E[i, k] * v[k]
                for k in range(d):
                    v[k] -= f * E[i, k]
        size = 0.0
        for k in range(d):
            size += v[k] * v[k]
        size = np.sqrt(size)
        if size > 1e-13:
            for k in range(d):
                v[k] /= size
            count += 1
    for b in range(m):
        for i in range(count):
            f = 0.0
            for k in range(d):
                f += E[i, k] * Z[b, k]
            E[d, i] = f
        for k in range(d):
            Z[b, k] = E[d, k] if k < count else 0.0
    return count


@njit(cache=True, fastmath=_FAST, nogil=True)
def _rotate(A, i, j, c, s):  # type: ignore[no-untyped-def]
    for k in range(A.shape[1]):
        x, y = A[i, k], A[j, k]
        A[i, k] = c * x - s * y
        A[j, k] = s * x + c * y


@njit(cache=True, fastmath=_FAST, nogil=True)
def _jacobi(q, Y, V, square):  # type: ignore[no-untyped-def]
    """Rotate the first q rows of ``Y``, and of ``V`` with them, until they are orthogonal; ``square``: their sizes."""
    p = Y.shape[1]
    for _ in range(SWEEPS):
        largest = 0.0
        for i in range(q):
            total = 0.0
            for k in range(p):
                total += Y[i, k] * Y[i, k]
            square[i] = total
            largest = max(largest, total)
        turned = False
        for i in range(q - 1):
            for j in range(i + 1, q):
                g = 0.0
                for k in range(p):
                    g += Y[i, k] * Y[j, k]
                if abs(g) <= 1e-15 * np.sqrt(square[i] * square[j]) + 1e-20 * largest:
                    continue
                turned = turned or abs(g) > 1e-9 * np.sqrt(square[i] * square[j]) + 1e-20 * largest
                half = 0.5 * (square[j] - square[i]) / g
                t = 1.0 / (abs(half) + np.sqrt(1.0 + half * half))
                t = t if half >= 0.0 else -t
                c = 1.0 / np.sqrt(1.0 + t * t)
                _rotate(Y, i, j, c, c * t)
                _rotate(V, i, j, c, c * t)
                square[i] = max(square[i] - t * g, 0.0)
                square[j] = max(square[j] + t * g, 0.0)
        # Convergence is quadratic: a sweep of rotations below 1e-9 leaves nothing.
        if not turned:
            break
    for i in range(q):
        total = 0.0
        for k in range(p):
            total += Y[i, k] * Y[i, k]
        square[i] = total


@njit(cache=True, fastmath=_FAST, nogil=True)
def _turned(q, X, V, Y):  # type: ignore[no-untyped-def]
    """``Y = V X`` for the first q rows."""
    for i in range(q):
        for k in range(X.shape[1]):
            Y[i, k] = 0.0
        for j in range(q):
            f = V[i, j]
            for k in range(X.shape[1]):
                Y[i, k] += f * X[j, k]


@njit(cache=True, fastmath=_FAST, nogil=True)
def sizes(q, X, V, Y, T, sigma):  # type: ignore[no-untyped-def]
    """Sum and largest of the singular values of the first q rows of ``X``; ``V`` (orthogonal) is where it begins."""
    _turned(q, X, V, Y)
    for i in range(q):
        for j in range(q):
            T[i, j] = V[i, j]
    _jacobi(q, Y, T, sigma)
    total, largest = 0.0, 0.0
    for i in range(q):
        size = np.sqrt(sigma[i])
        total += size
        largest = max(largest, size)
    return total, largest


@njit(cache=True, fastmath=_FAST, nogil=True)
def decompose(q, X, V, Y, U, sigma):  # type: ignore[no-untyped-def]
    """Singular values of ``X`` (q, p), largest first, left vectors in ``U`` (q, p) and right ones in ``V`` (q, q).

    ``V`` must be orthogonal before. Left vectors of zero singular values are 0.
    """
    _turned(q, X, V, Y)
    _jacobi(q, Y, V, sigma)
    for i in range(q):
        best = i
        for j in range(i + 1, q):
            if sigma[j] > sigma[best]:
                best = j
        if best != i:
            sigma[i], sigma[best] = sigma[best], sigma[i]
            _rotate(Y, i, best, 0.0, 1.0)
            _rotate(V, i, best, 0.0, 1.0)
        sigma[i] = np.sqrt(sigma[i])
        f = 1.0 / sigma[i] if sigma[i] > 0.0 else 0.0
        for k in range(X.shape[1]):
            U[i, k] = f * Y[i, k]

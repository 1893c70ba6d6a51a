"""The training step of the published code of 2308.16898, with its machine epsilons.

The step divides the gradient by its norm plus 2.2e-16, so that W comes to rest once the gradient is smaller than that.
(K, Q) have the penalty 2.2e-16 (||K||^2 + ||Q||^2) as well, which keeps their norms finite: from there on the run
follows the minimiser of the penalised loss instead of growing. :func:`attsvm.dynamics.descend` does neither; recipes
run both where the difference shows.

Near rest the step amplifies rounding errors, and products of matrices round differently in batches of different sizes.
So every run is computed on its own, by loops in one fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from attsvm.experiments.recipes.draws import Draws

__all__ = ["EPSILON", "PublishedRun", "attend", "gradient", "published_descent"]

Floats = npt.NDArray[np.float64]

EPSILON = 2.0**-52


class PublishedRun(NamedTuple):
    """What a batch of runs leaves."""

    path: Tensor  # (B, records, d, d): W, or K Q^T
    mass: Tensor  # (B, records): mean probability of the most probable token
    selected: Tensor  # (B, n)


def published_descent(
    draws: Draws, start: Sequence[Tensor], *, record_steps: Sequence[int], rate: float = 0.1
) -> PublishedRun:
    """Train W, or K and Q, from ``start`` (one or two tensors (B, d, d)) for ``record_steps[-1]`` steps."""
    B, n, _, d = draws.tokens.shape
    due = np.asarray(record_steps, dtype=np.int64)
    path, mass = np.zeros((B, len(due), d, d)), np.zeros((B, len(due)))
    selected = np.zeros((B, n), dtype=np.int64)
    left, right = start[0].numpy(), start[-1].numpy()
    for b in range(B):
        data = draws.tokens[b].numpy(), draws.queries[b].numpy(), draws.scores[b].numpy()
        factors = np.array(left[b]), np.array(right[b])
        _run(*data, *factors, len(start) == 2, rate, due, path[b], mass[b], selected[b])
    return PublishedRun(torch.from_numpy(path), torch.from_numpy(mass), torch.from_numpy(selected))


def _compiled(function: Any) -> Any:
    return njit(cache=True, nogil=True)(function)


@_compiled
def _run(
    X: Floats,
    Z: Floats,
    scores: Floats,
    left: Floats,
    right: Floats,
    factored: bool,
    rate: float,
    due: npt.NDArray[np.int64],
    path: Floats,
    mass: Floats,
    selected: npt.NDArray[np.int64],
) -> None:
    """One run; ``left`` is W, or ``left`` and ``right`` are K and Q. Fills path, mass and selected."""
    n, T, d = X.shape
    W, G, s = np.zeros((d, d)), np.zeros((d, d)), np.zeros((n, T))
    slope, other = np.zeros((d, d)), np.zeros((d, d))
    place = 0
    for step in range(due[-1] + 1):
        if factored:
            _multiply(left, right, False, True, W)
        else:
            W[:] = left
        attend(X, Z, W, s)
        if step == due[place]:
            path[place] = W
            for i in range(n):
                mass[place] += s[i].max() / n
            place += 1
        if step < due[-1]:
            gradient(X, Z, scores, s, G)
            if factored:
                _multiply(G, right, False, False, slope)
                _multiply(G, left, True, False, other)
                slope += 2.0 * EPSILON * left
                other += 2.0 * EPSILON * right
                _move(left, slope, rate)
                _move(right, other, rate)
            else:
                _move(left, G, rate)
    for i in range(n):
        selected[i] = s[i].argmax()


@_compiled
def _multiply(A: Floats, B: Floats, turn_first: bool, turn_second: bool, out: Floats) -> None:
    """``A B`` with either factor transposed, for square matrices."""
    d = len(A)
    for i in range(d):
        for j in range(d):
            total = 0.0
            for k in range(d):
                total += (A[k, i] if turn_first else A[i, k]) * (B[j, k] if turn_second else B[k, j])
            out[i, j] = total


@_compiled
def attend(X: Floats, Z: Floats, W: Floats, s: Floats) -> None:
    """Softmax ``s`` (n, T) of ``x^T W z``."""
    n, T, d = X.shape
    key = np.zeros(d)
    for i in range(n):
        for a in range(d):
            key[a] = 0.0
            for b in range(d):
                key[a] += W[a, b] * Z[i, b]
        for t in range(T):
            s[i, t] = 0.0
            for a in range(d):
                s[i, t] += X[i, t, a] * key[a]
        top, total = s[i].max(), 0.0
        for t in range(T):
            s[i, t] = math.exp(s[i, t] - top)
            total += s[i, t]
        for t in range(T):
            s[i, t] /= total


@_compiled
def gradient(X: Floats, Z: Floats, scores: Floats, s: Floats, G: Floats) -> None:
    """Gradient ``G`` (d, d) of the mean logistic loss in W, without the care that keeps it from vanishing."""
    n, T, d = X.shape
    G[:] = 0.0
    pooled = np.zeros(d)
    for i in range(n):
        output = 0.0
        for t in range(T):
            output += scores[i, t] * s[i, t]
        slope = -1.0 / (1.0 + math.exp(output)) / n
        pooled[:] = 0.0
        for t in range(T):
            weight = slope * s[i, t] * (scores[i, t] - output)
            for a in range(d):
                pooled[a] += weight * X[i, t, a]
        for a in range(d):
            for b in range(d):
                G[a, b] += pooled[a] * Z[i, b]


@_compiled
def _move(P: Floats, slope: Floats, rate: float) -> None:
    """``P`` goes by ``rate`` along its slope, divided by its norm plus epsilon."""
    total = 0.0
    for a in range(slope.shape[0]):
        for b in range(slope.shape[1]):
            total += slope[a, b] * slope[a, b]
    size = math.sqrt(total) + EPSILON
    for a in range(slope.shape[0]):
        for b in range(slope.shape[1]):
            P[a, b] -= rate * slope[a, b] / size

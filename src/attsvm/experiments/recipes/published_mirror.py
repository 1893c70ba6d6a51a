"""The training step of the published code of 2410.14581: mirror descent, with machine epsilon added to the norm.

The gradient is divided by its l_{p/(p-1)} norm plus 2.2e-16, so that W comes to rest once the gradient is smaller than
that; :class:`attsvm.dynamics.MirrorDescent` goes on. As in :mod:`attsvm.experiments.recipes.published_step` every run
is computed on its own, because the step amplifies rounding near rest.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from attsvm.experiments.recipes.draws import Draws
from attsvm.experiments.recipes.published_step import EPSILON, attend, gradient

__all__ = ["MirrorEnds", "published_mirror"]

Floats = npt.NDArray[np.float64]


class MirrorEnds(NamedTuple):
    """Where a batch of runs ends."""

    W: Tensor  # (B, d, d)
    selected: Tensor  # (B, n)


def published_mirror(draws: Draws, start: Tensor, *, p: float, steps: int, rate: float = 0.1) -> MirrorEnds:
    """Train W from ``start`` (B, d, d)."""
    W, selected = start.numpy().copy(), np.zeros(draws.tokens.shape[:2], dtype=np.int64)
    for b in range(len(W)):
        data = draws.tokens[b].numpy(), draws.queries[b].numpy(), draws.scores[b].numpy()
        _run(*data, W[b], p, rate, steps, selected[b])
    return MirrorEnds(torch.from_numpy(W), torch.from_numpy(selected))


def _compiled(function: Any) -> Any:
    return njit(cache=True, nogil=True)(function)


@_compiled
def _run(
    X: Floats,
    Z: Floats,
    scores: Floats,
    W: Floats,
    p: float,
    rate: float,
    steps: int,
    selected: npt.NDArray[np.int64],
) -> None:
    """One run; moves W and fills selected."""
    n, T, d = X.shape
    s, G = np.zeros((n, T)), np.zeros((d, d))
    for _ in range(steps):
        attend(X, Z, W, s)
        gradient(X, Z, scores, s, G)
        total = 0.0
        for a in range(d):
            for b in range(d):
                total += abs(G[a, b]) ** (p / (p - 1.0))
        size = total ** ((p - 1.0) / p) + EPSILON
        for a in range(d):
            for b in range(d):
                mirror = math.copysign(abs(W[a, b]) ** (p - 1.0), W[a, b]) - rate * G[a, b] / size
                W[a, b] = math.copysign(abs(mirror) ** (1.0 / (p - 1.0)), mirror)
    # The tokens of the last step, as in the published code: before W moved for the last time.
    for i in range(n):
        selected[i] = s[i].argmax()

r"""Normalised descent of an attention layer with the head 1^T ReLU(V^T x), by the published step, compiled.

The gradient in W is $\sum_{it} c_{it}\, x_{it} z_i^\top$. A step needs no more of W than the logits of the n T tokens,
and these move by the Gram matrix K of the matrices $x_{it} z_i^\top$:
$l \leftarrow l - \eta\, K c / (\sqrt{c^\top K c} + \epsilon)$. The sum of all $c$ gives W back.

The published step has $\epsilon = 2.2 \cdot 10^{-16}$, so that a run freezes where its gradient is smaller than that;
:func:`attsvm.dynamics.descend` has none. With this head the difference matters, see the recipe ``tfsvm-fig7``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from attsvm.experiments.recipes.published_step import EPSILON

__all__ = ["ReLUData", "draw_relu_data", "published_descent"]


class ReLUData(NamedTuple):
    """A batch of B data sets in float64."""

    V: Tensor  # (B, d, d)
    tokens: Tensor  # (B, n, T, d)
    labels: Tensor  # (B, n)
    queries: Tensor  # (B, n, d)

    def members(self, index: Tensor) -> ReLUData:
        """Some of them."""
        return ReLUData(*(part[index] for part in self))


def draw_relu_data(seeds: Sequence[int], *, n: int, T: int, d: int) -> ReLUData:
    """First layer of the head, tokens, labels and queries, drawn in this order, one generator a seed."""
    members = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        V = torch.randn(d, d, generator=generator)
        tokens = torch.nn.functional.normalize(torch.randn(n, T, d, generator=generator), dim=-1)
        labels = 2.0 * (torch.randn(n, generator=generator) > 0) - 1.0
        queries = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)
        members.append((V / torch.linalg.vector_norm(V), tokens, labels, queries))
    return ReLUData(*(torch.stack(parts).double() for parts in zip(*members, strict=True)))


def published_descent(
    data: ReLUData, start: Tensor, *, steps: int, record_every: int, rate: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Train W from ``start`` (B, d, d) with the mean logistic loss.

    Returns
    -------
    tuple
        The path (B, records, d, d) at the steps 0, record_every, ..., and the attention (B, n, T) at the last step.
    """
    X, Z = data.tokens, data.queries
    B, n, T = X.shape[:3]
    prepared = zip(*map(_prepared, data.V, X, Z, start), strict=True)
    XV, gram, logits = (np.stack([part.numpy() for part in parts]) for parts in prepared)
    moved, attention = np.zeros((B, steps // record_every + 1, n, T)), np.zeros((B, n, T))
    _train(XV, data.labels.numpy(), gram, logits, rate, steps, record_every, moved, attention)
    way = torch.einsum("brit,bitd,bie->brde", torch.from_numpy(moved), X, Z)
    return start.unsqueeze(1) - way, torch.from_numpy(attention)


def _prepared(V: Tensor, X: Tensor, Z: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X V (n, T, d), the Gram matrix (n T, n T), and logits (n, T) at W, of one member.

    A product over a batch may round by its size, and a ReLU that switches makes a new run out of a last bit.
    """
    rows = (X.unsqueeze(-1) * Z[:, None, None, :]).flatten(0, 1).flatten(1)
    return X @ V, rows @ rows.T, (rows @ W.flatten()).view(X.shape[:2])


# Sums may be reordered, which lets them run on vector units.
_FAST = {"reassoc", "contract"}


@njit(cache=True, nogil=True, error_model="numpy")
def _train(XV, labels, gram, logits, rate, steps, record_every, moved, attention):  # type: ignore[no-untyped-def]
    """Run every member: ``moved`` (B, records, n, T) gets the sums of steps along each x z^T."""
    B, n, T, d = XV.shape
    c, change, total, s = np.zeros((n, T)), np.zeros(n * T), np.zeros((n, T)), np.zeros((n, T))
    hidden = np.zeros(d)
    weights, sums = c.ravel(), total.ravel()
    for b in range(B):
        total[:] = 0.0
        place = logits[b].ravel()
        for step in range(steps + 1):
            for i in range(n):
                _softmax(logits[b, i], s[i])
            if step % record_every == 0:
                moved[b, step // record_every] = total
            if step == steps:
                break
            for i in range(n):
                _pull(XV[b, i], labels[b, i], s[i], n, hidden, c[i])
            square = _product(gram[b], weights, change)
            factor = rate / (math.sqrt(max(square, 0.0)) + EPSILON)
            for k in range(n * T):
                place[k] -= factor * change[k]
                sums[k] += factor * weights[k]
        attention[b] = s


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _softmax(logits, s):  # type: ignore[no-untyped-def]
    top, total = logits[0], 0.0
    for t in range(1, len(logits)):
        top = max(top, logits[t])
    for t in range(len(logits)):
        s[t] = math.exp(logits[t] - top)
        total += s[t]
    for t in range(len(logits)):
        s[t] /= total


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _pull(xv, label, s, n, hidden, c):  # type: ignore[no-untyped-def]
    """Weights ``c`` (T,) of the tokens of one sequence in the gradient, from xv = X V (T, d)."""
    T, d = xv.shape
    hidden[:] = 0.0
    for t in range(T):
        for k in range(d):
            hidden[k] += s[t] * xv[t, k]
    value, a = 0.0, 0
    for k in range(d):
        value += max(hidden[k], 0.0)
    for t in range(T):
        score = 0.0
        for k in range(d):
            score += xv[t, k] if hidden[k] > 0.0 else 0.0
        c[t] = score
        a = t if s[t] > s[a] else a
    # Scores relative to the most probable token: what is small then comes from small numbers, not from a difference.
    own, lead = c[a], 0.0
    for t in range(T):
        c[t] -= own
        lead -= s[t] * c[t]
    outer = -label / (1.0 + math.exp(label * value)) / n
    for t in range(T):
        c[t] = outer * s[t] * (c[t] + lead)


@njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)
def _product(gram, c, out):  # type: ignore[no-untyped-def]
    """``out = gram c`` for a symmetric matrix, and ``c^T gram c``."""
    out[:] = 0.0
    for m in range(len(c)):
        for k in range(len(c)):
            out[k] += c[m] * gram[m, k]
    square = 0.0
    for k in range(len(c)):
        square += out[k] * c[k]
    return square

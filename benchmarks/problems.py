"""The data that benchmarks run on."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from attsvm.selection import TokenSelection

__all__ = ["expanded_rows", "unit_sphere"]


def unit_sphere(n: int, T: int, d: int, seed: int) -> TokenSelection:
    """Random tokens and queries on the unit sphere; the best token for a random head and random labels is selected.

    Drawn in float32 in this order: head (d,), labels (n,), tokens (n, T, d), queries (n, d); then float64.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(d, generator=generator)
    v = v / v.norm()
    labels = 2.0 * (torch.randn(n, generator=generator) > 0).float() - 1.0
    X = torch.randn(n, T, d, generator=generator)
    X = X / X.norm(dim=-1, keepdim=True)
    Z = torch.randn(n, d, generator=generator)
    Z = Z / Z.norm(dim=-1, keepdim=True)
    scores = (X.double() @ v.double()) * labels.double()[:, None]
    return TokenSelection.from_scores(X.double(), Z.double(), scores)


def expanded_rows(problem: TokenSelection) -> NDArray[np.float64]:
    """The rows ``(x_selected - x_t) z^T`` of a problem with one selected token a query, as (R, d * d) features."""
    t = problem.tensors
    X, Z = t.tokens.numpy(), t.queries.numpy()
    i, q, token = t.asked.numpy().nonzero()
    own = t.selected.numpy().argmax(-1)[i, q]
    rows = (X[i, own] - X[i, token])[:, :, None] * Z[i, q][:, None, :]
    return np.ascontiguousarray(rows.reshape(len(i), -1))

"""The rows of a problem as a linear map in torch, on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attsvm.solvers.rows import Rows

__all__ = ["RowOperator"]


@dataclass(frozen=True, kw_only=True)
class RowOperator:
    """The rows as a linear map in torch: ``A`` from (p, q) to (R,), each row scaled to unit size."""

    tokens: Tensor  # (n, T, p)
    queries: Tensor  # (n, Q, q)
    own: Tensor  # (R,) flat index in (n, Q, T) of each row's selected token
    other: Tensor  # (R,) flat index of its token t
    size: Tensor  # (R,)

    @classmethod
    def of(cls, rows: Rows, *, device: str = "cpu") -> RowOperator:
        """Read the rows."""
        n, Q, T = rows.shape
        i, q, t = torch.from_numpy(rows.place)
        queries = torch.zeros(n, Q, rows.queries.shape[1], dtype=torch.float64)
        block = torch.from_numpy(rows.block)
        queries[i, q] = torch.from_numpy(rows.queries)[block]
        first = torch.from_numpy(rows.first)[block]
        return cls(
            tokens=torch.from_numpy(rows.tokens).to(device),
            queries=queries.to(device),
            own=((i * Q + q) * T + first).to(device),
            other=((i * Q + q) * T + t).to(device),
            size=torch.from_numpy(rows.size).to(device),
        )

    def forward(self, W: Tensor) -> Tensor:
        """``<A_r, W> / size_r`` (R,)."""
        logits = ((self.queries @ W.T) @ self.tokens.mT).flatten()
        return (logits[self.own] - logits[self.other]) / self.size

    def adjoint(self, dual: Tensor) -> Tensor:
        """``sum(dual_r A_r / size_r)`` (p, q)."""
        n, T, p = self.tokens.shape
        weights = dual / self.size
        flat = torch.zeros(n * self.queries.shape[1] * T, dtype=dual.dtype, device=dual.device)
        flat.index_add_(0, self.own, weights)
        flat.index_add_(0, self.other, -weights)
        pooled = flat.view(n, -1, T) @ self.tokens
        return pooled.reshape(-1, p).T @ self.queries.reshape(-1, self.queries.shape[2])

    def norm(self, *, steps: int = 30) -> float:
        """Largest singular value of A, by the power method from a fixed start."""
        generator = torch.Generator().manual_seed(0)
        dual = torch.rand(len(self.size), generator=generator, dtype=torch.float64).to(self.size.device)
        value = 1.0
        for _ in range(steps):
            dual = self.forward(self.adjoint(dual))
            value = float(torch.linalg.vector_norm(dual))
            dual = dual / value
        return math.sqrt(value)

"""The rows of a problem as a linear map in torch: on any device, in one process or spread over several.

Rows are scaled to unit size. With a group every process holds the rows of its own sequences; matrices (p, q) are the
same everywhere, and whatever is summed over rows is summed over all processes, so that all of them decide alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from attsvm.solvers import coordinate
from attsvm.solvers.rows import Rows
from attsvm.solvers.view import RowView

__all__ = ["CompiledOperator", "LinearRows", "RowOperator"]


class LinearRows(Protocol):
    """What a solver in torch asks of the rows."""

    @property
    def size(self) -> Tensor:
        """(R,) sizes of the rows."""

    def forward(self, W: Tensor) -> Tensor:
        """``<A_r, W> / size_r`` (R,)."""

    def adjoint(self, dual: Tensor) -> Tensor:
        """``sum(dual_r A_r / size_r)`` (p, q) over the rows of all processes."""

    def factors(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors D (k, p) and Z (k, q) with ``A_r / size_r = D_r Z_r^T`` for some rows of this process."""

    def total(self, values: Tensor) -> Tensor:
        """The sum of each number of ``values`` over all processes."""

    @property
    def shared(self) -> bool:
        """Whether there are other processes."""


@dataclass(frozen=True, kw_only=True)
class RowOperator:
    """The rows as a linear map in torch: ``A`` from (p, q) to (R,), each row scaled to unit size."""

    tokens: Tensor  # (n, T, p)
    queries: Tensor  # (n, Q, q)
    own: Tensor  # (R,) flat index in (n, Q, T) of each row's selected token
    other: Tensor  # (R,) flat index of its token t
    size: Tensor  # (R,)
    view: RowView | None = None  # of a problem that is spread over processes

    @classmethod
    def of(cls, rows: Rows, *, device: str | torch.device = "cpu", group: Any = None) -> RowOperator:
        """Read the rows of this process; ``group`` is the ``torch.distributed`` group that shares the problem."""
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
            view=None if group is None else RowView(rows=rows, group=group),
        )

    @property
    def shared(self) -> bool:
        """Whether there are other processes."""
        return self.view is not None

    def forward(self, W: Tensor) -> Tensor:
        """``<A_r, W> / size_r`` (R,)."""
        logits = ((self.queries @ W.T) @ self.tokens.mT).flatten()
        return (logits[self.own] - logits[self.other]) / self.size

    def adjoint(self, dual: Tensor) -> Tensor:
        """``sum(dual_r A_r / size_r)`` (p, q) over the rows of all processes."""
        n, T, p = self.tokens.shape
        weights = dual / self.size
        flat = torch.zeros(n * self.queries.shape[1] * T, dtype=dual.dtype, device=dual.device)
        flat.index_add_(0, self.own, weights)
        flat.index_add_(0, self.other, -weights)
        pooled = flat.view(n, -1, T) @ self.tokens
        return self.total(pooled.reshape(-1, p).T @ self.queries.reshape(-1, self.queries.shape[2]))

    def factors(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors D (k, p) and Z (k, q) with ``A_r / size_r = D_r Z_r^T`` for some rows of this process."""
        n, T = self.tokens.shape[:2]
        Q = self.queries.shape[1]
        query, sequence = self.own[index] // T, self.own[index] // (Q * T)
        D = self.tokens[sequence, self.own[index] % T] - self.tokens[sequence, self.other[index] % T]
        Z = self.queries.reshape(n * Q, -1)[query]
        return _unit(D), _unit(Z)

    def total(self, values: Tensor) -> Tensor:
        """The sum of each number of ``values`` over all processes."""
        return values if self.view is None else self.view.shared(values.contiguous())

    def norm(self, *, steps: int = 30) -> float:
        """Largest singular value of A, by the power method from a fixed start."""
        generator = torch.Generator().manual_seed(0)
        dual = torch.rand(len(self.size), generator=generator, dtype=torch.float64).to(self.size.device)
        value = 1.0
        for _ in range(steps):
            dual = self.forward(self.adjoint(dual))
            value = math.sqrt(float(self.total((dual * dual).sum())))
            dual = dual / value
        return math.sqrt(value)


@dataclass(frozen=True, kw_only=True)
class CompiledOperator:
    """The same by the compiled loops of one process on the CPU, which read the tokens of the rows only."""

    rows: Rows
    size: Tensor  # (R,)
    shared: bool = False

    @classmethod
    def of(cls, rows: Rows) -> CompiledOperator:
        """Read the rows."""
        return cls(rows=rows, size=torch.from_numpy(rows.size))

    def forward(self, W: Tensor) -> Tensor:
        """``<A_r, W> / size_r`` (R,)."""
        return torch.from_numpy(coordinate.values(self.rows, W.numpy())).div_(self.size)

    def adjoint(self, dual: Tensor) -> Tensor:
        """``sum(dual_r A_r / size_r)`` (p, q)."""
        return torch.from_numpy(coordinate.combine(self.rows, (dual / self.size).numpy()))

    def factors(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors D (k, p) and Z (k, q) with ``A_r / size_r = D_r Z_r^T``."""
        chosen = index.numpy()
        D = torch.from_numpy(self.rows.differences(chosen))
        return _unit(D), _unit(torch.from_numpy(self.rows.queries[self.rows.block[chosen]]))

    def total(self, values: Tensor) -> Tensor:
        """The numbers themselves: there are no other processes."""
        return values


def _unit(vectors: Tensor) -> Tensor:
    unit: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return unit

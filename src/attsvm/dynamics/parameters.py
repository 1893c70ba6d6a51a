"""The two parameterisations of the key-query matrix: W itself, and W = K Q^T.

Queries enter in an orthonormal basis of their span when that is smaller than d: gradients in W, and in Q, never leave
that span, so what the initial matrix has outside it stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attsvm.dynamics.layer import Gradient
from attsvm.errors import InvalidInputError
from attsvm.selection.arrays import as_float
from attsvm.selection.reading import require_finite

__all__ = ["Parameters", "initial_parameters", "query_basis"]


def query_basis(queries: Tensor) -> Tensor | None:
    """Orthonormal columns (B, d, r) that span the queries (B, n, Q, d), or None when that would not be smaller."""
    flat = queries.flatten(1, 2)
    if flat.shape[1] >= flat.shape[2]:
        return None
    basis: Tensor = torch.linalg.qr(flat.mT)[0]
    return basis


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The trained matrices: ``left`` (B, d, m) and ``right`` (B, r, m) for K and Q, or ``left`` (B, d, r) = W alone.

    ``outside`` is what the basis does not see: for W (B, d, d), for (K, Q) the part of Q (B, d, m); 0 if there is none.
    """

    left: Tensor
    right: Tensor | None
    basis: Tensor | None
    outside: Tensor

    def keys(self, queries: Tensor) -> Tensor:
        """``W z`` (B, n, Q, d) for queries (B, n, Q, r) in the basis."""
        # One product for all queries of a problem: a broadcast product per sequence is four times slower.
        flat = queries.flatten(1, 2)
        if self.right is not None:
            flat = flat @ self.right
        return (flat @ self.left.mT).view(*queries.shape[:-1], -1)

    def slopes(self, g: Gradient, queries: Tensor) -> tuple[Tensor, ...]:
        """Gradients of left (and right), without the factor ``exp(log_scale)``."""
        P, Z = g.pooled.flatten(1, 2), queries.flatten(1, 2)
        if self.right is None:
            return (P.mT @ Z,)
        return P.mT @ (Z @ self.right), Z.mT @ (P @ self.left)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The matrices that are trained."""
        return (self.left,) if self.right is None else (self.left, self.right)

    def replaced(self, tensors: tuple[Tensor, ...]) -> Parameters:
        """The same parameterisation with other values."""
        right = tensors[1] if self.right is not None else None
        return Parameters(left=tensors[0], right=right, basis=self.basis, outside=self.outside)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """K (B, d, m) and Q (B, d, m), or None for W."""
        if self.right is None:
            return None
        right = self.right if self.basis is None else self.basis @ self.right + self.outside
        return self.left, right

    def matrix(self) -> Tensor:
        """W (B, d, d)."""
        both = self.factors()
        if both is not None:
            return both[0] @ both[1].mT
        return self.left if self.basis is None else self.left @ self.basis.mT + self.outside


def initial_parameters(
    init: Any,
    *,
    parameterization: str,
    batch: int,
    d: int,
    rank: int,
    basis: Tensor | None,
    generator: torch.Generator,
    device: torch.device,
) -> Parameters:
    """Start values, the same for every member of a batch unless given.

    ``"zeros"`` is W = 0; for (K, Q) it is Q = 0 with K ~ 0.01 N(0, 1), because K = Q = 0 is a stationary point.
    ``"normal"`` draws W, or K and Q, with entries N(0, 1/d). An array (d, d) or (B, d, d) is W; a pair of arrays
    (d, m) is (K, Q).
    """

    def draw(columns: int, scale: float) -> Tensor:
        values = torch.randn(d, columns, generator=generator, dtype=torch.float64)
        return (scale * values).to(device).expand(batch, d, columns).clone()

    where = "descend"
    if isinstance(init, str):
        if init not in ("zeros", "normal"):
            raise InvalidInputError(f'{where}: init must be "zeros", "normal" or an array, got {init!r}.')
        zeros = init == "zeros"
        if parameterization == "W":
            start = torch.zeros(batch, d, d, dtype=torch.float64, device=device) if zeros else draw(d, d**-0.5)
            return _in_basis(start, None, basis)
        K = draw(rank, 0.01 if zeros else d**-0.5)
        return _in_basis(K, torch.zeros_like(K) if zeros else draw(rank, d**-0.5), basis)
    given = init if isinstance(init, (tuple, list)) and parameterization == "KQ" else (init,)
    expected = (d, rank) if parameterization == "KQ" else (d, d)
    tensors = [as_float(value, "init", where=where, device=device).to(torch.float64) for value in given]
    if len(tensors) != (2 if parameterization == "KQ" else 1):
        raise InvalidInputError(f'{where}: init must be a pair (K, Q) of arrays for parameterization="KQ".')
    for tensor in tensors:
        if tuple(tensor.shape) not in (expected, (batch, *expected)):
            shapes = f"{expected} or {(batch, *expected)}"
            raise InvalidInputError(f"{where}: init must have shape {shapes}, got {tuple(tensor.shape)}.")
        require_finite(tensor, "init", where)
    full = [tensor.expand(batch, *expected).clone() for tensor in tensors]
    return _in_basis(full[0], full[1] if len(full) == 2 else None, basis)


def _in_basis(left: Tensor, right: Tensor | None, basis: Tensor | None) -> Parameters:
    seen = left if right is None else right
    if basis is None:
        return Parameters(left=left, right=right, basis=None, outside=torch.zeros(()))
    if right is None:
        inside = seen @ basis
        return Parameters(left=inside, right=None, basis=basis, outside=seen - inside @ basis.mT)
    inside = basis.mT @ seen
    return Parameters(left=left, right=inside, basis=basis, outside=seen - basis @ inside)

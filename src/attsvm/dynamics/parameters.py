"""The parameterisations of the key-query matrix: W itself, W = K Q^T, W = diag(k q), and the prompt vector p = W z.

Queries enter in an orthonormal basis of their span when that is smaller than d: gradients in W, and in Q, never leave
that span, so what the initial matrix has outside it stays as it is. Optimisers whose steps depend on the coordinates
do without that basis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attsvm.dynamics.layer import Gradient
from attsvm.errors import InvalidInputError
from attsvm.selection.arrays import as_float
from attsvm.selection.reading import require_finite

__all__ = [
    "Diagonal",
    "Parameters",
    "based_queries",
    "each",
    "initial_diagonal",
    "initial_parameters",
    "initial_prompt",
    "prompt_basis",
    "query_basis",
]


def query_basis(queries: Tensor) -> Tensor | None:
    """Orthonormal columns (B, d, r) that span the queries (B, n, Q, d), or None when that would not be smaller."""
    return based_queries(queries)[1]


def based_queries(queries: Tensor) -> tuple[Tensor, Tensor | None]:
    """The queries (B, n, Q, r) in the basis (B, d, r) of their span; as they are where that would not be smaller."""
    flat = queries.flatten(1, 2)
    if flat.shape[1] >= flat.shape[2]:
        return queries, None
    # The triangular factor holds them. A product would be rounded in another way in a batch than alone.
    basis, triangle = torch.linalg.qr(flat.mT)
    return triangle.mT.reshape(*queries.shape[:-1], -1), basis


def each(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function`` of each member by itself, stacked.

    Products of a whole batch are rounded in another way than those of one member, and some runs (normalised descent on
    (K, Q) at large norms) turn a difference of 1e-16 into one of order 1 within a hundred steps.
    """
    return torch.stack([function(*members) for members in zip(*tensors, strict=True)])


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


@dataclass(frozen=True, kw_only=True)
class Diagonal:
    """W = diag(k q) with trained vectors ``left`` = k and ``right`` = q (B, d)."""

    left: Tensor
    right: Tensor
    basis: Tensor | None = None
    outside: Tensor | None = None

    def keys(self, queries: Tensor) -> Tensor:
        """``W z`` (B, n, Q, d) for queries (B, n, Q, d)."""
        return queries * (self.left * self.right).unsqueeze(1).unsqueeze(1)

    def slopes(self, g: Gradient, queries: Tensor) -> tuple[Tensor, ...]:
        """Gradients of k and q, without the factor ``exp(log_scale)``."""
        both = (g.pooled * queries).sum((1, 2))
        return both * self.right, both * self.left

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The vectors that are trained."""
        return self.left, self.right

    def replaced(self, tensors: tuple[Tensor, ...]) -> Diagonal:
        """The same with other values."""
        return Diagonal(left=tensors[0], right=tensors[1])

    def factors(self) -> tuple[Tensor, Tensor]:
        """The vectors k and q (B, d)."""
        return self.left, self.right

    def matrix(self) -> Tensor:
        """W (B, d, d)."""
        return torch.diag_embed(self.left * self.right)


def prompt_basis(queries: Tensor, active: Tensor) -> Tensor:
    """``z / ||z||^2`` (B, d, 1), so that ``W = p z^T / ||z||^2`` gives W z = p.

    Parameters
    ----------
    queries
        (B, n, Q, d), the same vector for all active queries of a problem.
    active
        (B, n, Q).

    Raises
    ------
    InvalidInputError
        If a problem has different queries, or its query is 0.
    """
    flat, counts = queries.flatten(1, 2), active.flatten(1)
    first = counts.to(torch.int64).argmax(-1)
    z = flat.gather(1, first.view(-1, 1, 1).expand(-1, 1, flat.shape[-1]))
    size = torch.linalg.vector_norm(z, dim=-1)
    apart = torch.linalg.vector_norm(flat - z, dim=-1).masked_fill(~counts, 0.0)
    for bad, what in (
        ((apart > 1e-6 * size).any(-1), "the same vector everywhere in a problem"),
        ((size == 0).any(-1), "a vector other than 0"),
    ):
        if bool(bad.any()):
            b = int(bad.nonzero()[0])
            raise InvalidInputError(
                f'descend: queries must hold {what} for parameterization="p", whose logits are x^T p; '
                f"problem {b} does not."
            )
    basis: Tensor = (z / size.unsqueeze(-1).square()).mT
    return basis


def initial_prompt(init: Any, *, z: Tensor, generator: torch.Generator) -> Parameters:
    """Start values of the prompt vector p, as :func:`initial_parameters` gives them for W.

    Parameters
    ----------
    init
        ``"zeros"``, ``"normal"`` (entries N(0, 1/d)), p (d,) or (B, d), or a matrix W (d, d) or (B, d, d) of which
        p = W z is kept. (d, d) is read as (B, d) where B = d.
    z
        ``z / ||z||^2`` (B, d, 1).
    generator
        For the random start.
    """
    batch, d, _ = z.shape
    if isinstance(init, str):
        p = _drawn(init, generator, d, 1, batch, z.device)
    else:
        given = as_float(init, "init", where="descend", device=z.device).to(torch.float64)
        shapes = ((d,), (batch, d), (d, d), (batch, d, d))
        if tuple(given.shape) not in shapes:
            listed = ", ".join(map(str, dict.fromkeys(shapes)))
            raise InvalidInputError(f"descend: init must have one of the shapes {listed}, got {tuple(given.shape)}.")
        require_finite(given, "init", "descend")
        if tuple(given.shape) in ((d,), (batch, d)):
            p = given.expand(batch, d).unsqueeze(-1).clone()
        else:
            p = each(torch.matmul, given.expand(batch, d, d), z / z.square().sum(1, keepdim=True))
    return Parameters(left=p, right=None, basis=z, outside=torch.zeros((), dtype=torch.float64, device=z.device))


def initial_diagonal(init: Any, *, batch: int, d: int, generator: torch.Generator, device: torch.device) -> Diagonal:
    """Start values of k and q: as for (K, Q), with vectors (d,) or (B, d) in the place of matrices."""
    if isinstance(init, str):
        k = _drawn(init, generator, d, 1, batch, device, zero_scale=0.01)
        q = torch.zeros_like(k) if init == "zeros" else _drawn(init, generator, d, 1, batch, device)
        return Diagonal(left=k.squeeze(-1), right=q.squeeze(-1))
    if not isinstance(init, (tuple, list)) or len(init) != 2:
        raise InvalidInputError('descend: init must be a pair (k, q) of vectors for parameterization="diagonal".')
    left, right = (_read(value, (d,), batch, device) for value in init)
    return Diagonal(left=left, right=right)


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
    both = parameterization == "KQ"
    if isinstance(init, str):
        if not both:
            return _in_basis(_drawn(init, generator, d, d, batch, device), None, basis)
        K = _drawn(init, generator, d, rank, batch, device, zero_scale=0.01)
        Q = torch.zeros_like(K) if init == "zeros" else _drawn(init, generator, d, rank, batch, device)
        return _in_basis(K, Q, basis)
    given = init if isinstance(init, (tuple, list)) and both else (init,)
    if len(given) != (2 if both else 1):
        raise InvalidInputError('descend: init must be a pair (K, Q) of arrays for parameterization="KQ".')
    full = [_read(value, (d, rank) if both else (d, d), batch, device) for value in given]
    return _in_basis(full[0], full[1] if both else None, basis)


def _drawn(
    init: str,
    generator: torch.Generator,
    d: int,
    columns: int,
    batch: int,
    device: torch.device,
    zero_scale: float = 0.0,
) -> Tensor:
    """The start (B, d, columns) of that name."""
    if init not in ("zeros", "normal"):
        raise InvalidInputError(f'descend: init must be "zeros", "normal" or an array, got {init!r}.')
    scale = zero_scale if init == "zeros" else d**-0.5
    if scale == 0.0:
        return torch.zeros(batch, d, columns, dtype=torch.float64, device=device)
    values = torch.randn(d, columns, generator=generator, dtype=torch.float64)
    return (scale * values).to(device).expand(batch, d, columns).clone()


def _read(value: Any, expected: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """A start that was given, (B, *expected)."""
    tensor = as_float(value, "init", where="descend", device=device).to(torch.float64)
    if tuple(tensor.shape) not in (expected, (batch, *expected)):
        shapes = f"{expected} or {(batch, *expected)}"
        raise InvalidInputError(f"descend: init must have shape {shapes}, got {tuple(tensor.shape)}.")
    require_finite(tensor, "init", "descend")
    return tensor.expand(batch, *expected).clone()


def _in_basis(left: Tensor, right: Tensor | None, basis: Tensor | None) -> Parameters:
    seen = left if right is None else right
    if basis is None:
        return Parameters(left=left, right=right, basis=None, outside=torch.zeros(()))
    if right is None:
        inside = each(torch.matmul, seen, basis)
        return Parameters(left=inside, right=None, basis=basis, outside=seen - inside @ basis.mT)
    inside = each(torch.matmul, basis.mT, seen)
    return Parameters(left=left, right=inside, basis=basis, outside=seen - basis @ inside)

"""The norms of a key-query matrix and their duals.

========  =======================================  ==================
name      norm of W                                dual norm
========  =======================================  ==================
``fro``   root of the sum of squared entries       ``fro``
``nuc``   sum of the singular values               ``op``
``op``    largest singular value                   ``nuc``
``p``     entrywise l_p, p in [1, inf]             entrywise p/(p-1)
========  =======================================  ==================
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError

__all__ = ["Norm", "check_norm", "dual_norm", "dual_norms", "matrix_norm", "matrix_norms"]

Norm: TypeAlias = Literal["fro", "nuc", "op"] | float


def check_norm(norm: Norm, *, where: str) -> Norm:
    """Return ``norm``, with 2 as ``"fro"``; raise InvalidInputError unless it is in the table above."""
    if isinstance(norm, str):
        if norm in ("fro", "nuc", "op"):
            return norm
    elif isinstance(norm, (int, float)) and not isinstance(norm, bool) and norm >= 1:
        return "fro" if norm == 2 else float(norm)
    raise InvalidInputError(f'{where}: norm must be "fro", "nuc", "op" or a number p >= 1, got {norm!r}.')


def matrix_norms(matrices: Tensor, norm: Norm) -> Tensor:
    """Norms (…) of matrices (…, d, d), computed in float64."""
    matrices = matrices.to(torch.float64)
    if matrices.numel() == 0:
        return matrices.new_zeros(matrices.shape[:-2])
    if norm in ("nuc", "op"):
        values: Tensor = torch.linalg.svdvals(matrices)
        return values.sum(-1) if norm == "nuc" else values.amax(-1)
    # Of size 1, so that no power of an entry leaves the range of float64.
    peak = matrices.abs().amax((-2, -1), keepdim=True)
    unit = matrices / torch.where(peak > 0, peak, 1.0)
    order = 2.0 if norm == "fro" else float(norm)
    sizes: Tensor = peak[..., 0, 0] * torch.linalg.vector_norm(unit, ord=order, dim=(-2, -1))
    return sizes


def dual_norms(matrices: Tensor, norm: Norm) -> Tensor:
    """Norms (…) of matrices (…, d, d) in the dual of ``norm``, computed in float64."""
    if isinstance(norm, str):
        duals: dict[str, Norm] = {"fro": "fro", "nuc": "op", "op": "nuc"}
        return matrix_norms(matrices, duals[norm])
    if norm == 1:
        return matrix_norms(matrices, math.inf)
    return matrix_norms(matrices, 1.0 if math.isinf(norm) else norm / (norm - 1.0))


def matrix_norm(matrix: Tensor, norm: Norm) -> float:
    """Norm of one matrix (d, d), computed in float64."""
    return float(matrix_norms(matrix, norm))


def dual_norm(matrix: Tensor, norm: Norm) -> float:
    """Norm of one matrix in the dual of ``norm``, computed in float64."""
    return float(dual_norms(matrix, norm))

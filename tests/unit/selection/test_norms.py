from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from attsvm.errors import InvalidInputError
from attsvm.selection.norms import check_norm, dual_norm, matrix_norm

NORMS: list[Any] = ["fro", "nuc", "op", 1.0, 1.5, 3.0, math.inf]


def test_norms_of_a_matrix_with_known_singular_values(generator: torch.Generator) -> None:
    U, V = (torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    W = U @ torch.diag(torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)) @ V.T
    assert matrix_norm(W, "fro") == pytest.approx(5.0, rel=1e-14)
    assert matrix_norm(W, "nuc") == pytest.approx(7.0, rel=1e-14)
    assert matrix_norm(W, "op") == pytest.approx(4.0, rel=1e-14)


def test_entrywise_norms() -> None:
    W = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    assert [matrix_norm(W, p) for p in (1.0, 3.0, math.inf)] == pytest.approx([7.0, 91.0 ** (1 / 3), 4.0])
    assert matrix_norm(torch.zeros(0, 3), "nuc") == 0.0


@pytest.mark.parametrize("norm", NORMS)
def test_dual_norms_are_dual(norm: Any, generator: torch.Generator) -> None:
    """<A, B> <= ||A|| ||B||_* for all A, with equality for the best one."""
    for _ in range(20):
        A, B = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
        assert float((A * B).sum()) <= matrix_norm(A, norm) * dual_norm(B, norm) * (1 + 1e-12)
        best = alignment(B, norm)
        assert float((best * B).sum()) == pytest.approx(matrix_norm(best, norm) * dual_norm(B, norm), rel=1e-12)


def alignment(B: torch.Tensor, norm: Any) -> torch.Tensor:
    """A matrix A with <A, B> = ||A|| ||B||_*."""
    U, _, Vh = torch.linalg.svd(B)
    if norm == "fro":
        return B
    if norm == "nuc":
        return U[:, :1] @ Vh[:1]
    if norm == "op":
        return U @ Vh
    if norm == 1:
        return torch.where(B.abs() == B.abs().max(), B.sign(), 0.0)
    q = 1.0 if math.isinf(norm) else norm / (norm - 1)
    return B.sign() * B.abs() ** (q - 1)


def test_norm_names_are_checked() -> None:
    assert check_norm(2, where="x") == "fro"
    assert check_norm(1, where="x") == 1.0
    for bad in ("l2", 0.5, -1, np.nan, None, True, [2]):
        with pytest.raises(InvalidInputError, match='x: norm must be "fro", "nuc", "op" or a number p >= 1, got'):
            check_norm(bad, where="x")  # type: ignore[arg-type]

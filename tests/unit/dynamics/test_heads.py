"""Heads fitted on pooled tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attsvm.dynamics.fit_head import fit_head, pool
from attsvm.errors import InvalidInputError


def drawn(
    n: int, d: int, seed: int, *, scale: float = 1.0, shift: float = 0.0, tilt: float = 0.0
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    P = scale * (torch.randn(n, d, generator=g, dtype=torch.float64) + shift)
    return P, torch.sign(torch.randn(n, generator=g, dtype=torch.float64) + tilt)


def penalty(P: Tensor, strength: float) -> float:
    n, d = P.shape
    return strength * float(P.square().sum(1).mean()) / (d * n**0.5)


@pytest.mark.parametrize(("n", "d"), [(30, 4), (5, 12)])  # the second has more unknowns than rows
@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_ridge_solves_the_normal_equations(n: int, d: int, strength: float) -> None:
    P, Y = drawn(n, d, 1)
    # The same as least squares with a row sqrt(n * penalty) for each coordinate, solved by another method.
    rows = np.vstack([P.numpy(), (n * penalty(P, strength)) ** 0.5 * np.eye(d)])
    expected = np.linalg.lstsq(rows, np.concatenate([Y.numpy(), np.zeros(d)]))[0]
    found = fit_head(P, Y, strength=strength)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("strength", [1e-6, 1e-3, 1.0, 10.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2])
@pytest.mark.parametrize(("n", "d"), [(6, 3), (50, 10), (12, 40)])  # separable and not
@pytest.mark.parametrize(("shift", "tilt"), [(0.0, 0.0), (5.0, 1.5)])  # centred and balanced, and neither
def test_the_slope_is_zero_at_the_logistic_head(
    n: int, d: int, shift: float, tilt: float, scale: float, strength: float
) -> None:
    P, Y = drawn(n, d, 2, scale=scale, shift=shift, tilt=tilt)
    v = fit_head(P, Y, method="logistic", strength=strength)
    slope = -(P.T @ (Y * torch.sigmoid(-Y * (P @ v)))) / n + 2.0 * penalty(P, strength) * v
    assert float(slope.norm()) < 1e-10 * float(P.norm()) / n


@pytest.mark.parametrize("method", ["ridge", "logistic"])
def test_the_strength_has_no_unit(method: str) -> None:
    """Tokens ten times as long have a head a tenth as long: the same outputs."""
    P, Y = drawn(20, 4, 3)
    torch.testing.assert_close(10.0 * fit_head(10.0 * P, Y, method=method), fit_head(P, Y, method=method))


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan")])
def test_the_strength_must_be_positive(strength: float) -> None:
    with pytest.raises(InvalidInputError, match="fit_head: strength must be > 0"):
        fit_head(*drawn(5, 2, 4), strength=strength)


def test_pooling_is_the_mean_of_what_is_allowed(rng: np.random.Generator) -> None:
    tokens, allowed = torch.from_numpy(rng.normal(size=(6, 5, 3))), torch.from_numpy(rng.random((6, 5)) < 0.5)
    allowed[0], allowed[1] = True, False
    expected = torch.stack([X[may].mean(0) if may.any() else torch.zeros(3) for X, may in zip(tokens, allowed)])
    torch.testing.assert_close(pool(tokens, allowed), expected.double())
    other = torch.where(allowed[..., None], tokens, torch.full_like(tokens, 1e6))
    torch.testing.assert_close(pool(other, allowed), pool(tokens, allowed), rtol=0, atol=0)

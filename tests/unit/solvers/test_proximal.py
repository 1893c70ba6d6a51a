"""Proximal maps and their derivatives, and the quadratic programs in a box: against their optimality conditions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attsvm.solvers import box_program
from attsvm.solvers.box_program import solve_in_box
from attsvm.solvers.proximal import magnitude_power, proximal, response, shrunken

NORMS: list[Any] = ["fro", "nuc", "op", 1.0, 1.001, 1.05, 1.5, 1.999, 2.001, 3.0, 10.0, 50.0, 300.0, math.inf]
EPS = 2.0**-52

every_norm = pytest.mark.parametrize("norm", NORMS, ids=str)
both_kinds = pytest.mark.parametrize("squared", [False, True], ids=["norm", "half square"])


def size(W: Tensor, norm: Any, *, dual: bool = False) -> float:
    """A norm or its dual from the definition, with the largest magnitude taken out so that no power underflows."""
    v = torch.linalg.svdvals(W) if norm in ("nuc", "op") else W.abs().flatten()
    p = magnitude_power(norm)
    if dual:
        p = math.inf if p == 1.0 else 1.0 if math.isinf(p) else p / (p - 1.0)
    peak = float(v.max())
    if peak == 0.0 or math.isinf(p):
        return peak
    return peak * float(((v / peak) ** p).sum()) ** (1.0 / p)


def matrices(rng: np.random.Generator) -> list[Tensor]:
    """Dense, sparse, with ties, of very different entries, of rank one; large and small."""
    dense = rng.normal(size=(5, 7))
    kinds = [
        dense,
        dense * (rng.random((5, 7)) < 0.3),
        dense.round(),
        dense**5,
        np.outer(dense[:, 0], dense[0]),
        np.ones((3, 3)),
    ]
    return [torch.from_numpy(scale * kind) for kind in kinds for scale in (1e-4, 1.0, 1e5)]


@every_norm
@both_kinds
def test_the_rest_is_a_multiple_of_a_subgradient(norm: Any, squared: bool, rng: np.random.Generator) -> None:
    """W = prox(M) if and only if <W, M - W> = s ||W|| and ||M - W||_* <= s, with s = tau, or tau ||W||."""
    # Powers multiply the relative error of a logarithm, which is what limits p close to 1 and large p.
    p = magnitude_power(norm)
    power = 1.0 if math.isinf(p) or p == 1.0 else max(p, 1.0 / (p - 1.0))
    budget = 1e-13 + 10.0 * power * EPS
    for M in matrices(rng):
        for part in (1e-6, 0.01, 0.3, 0.99, 10.0):
            tau = part if squared else part * size(M, norm, dual=True)
            W = proximal(M, norm, tau, squared=squared)
            rest, value = M - W, size(W, norm)
            s = tau * value if squared else tau
            assert abs(float((W * rest).sum()) - s * value) <= budget * float((M * M).sum())
            assert size(rest, norm, dual=True) <= s + budget * max(1.0, tau if squared else 0.0) * size(
                M, norm, dual=True
            )
            if not squared and part > 1.0:
                assert not W.any()


@pytest.mark.parametrize("norm, dual", [("nuc", "op"), ("op", "nuc"), (1.0, math.inf), (math.inf, 1.0), (1.5, 3.0)])
def test_moreau(norm: Any, dual: Any, rng: np.random.Generator) -> None:
    """prox of h^2 / 2 and of the dual's half square, its conjugate, add up to the identity."""
    for M in matrices(rng):
        for tau in (0.01, 1.0, 30.0):
            other = tau * proximal(M / tau, dual, 1.0 / tau, squared=True)
            both = proximal(M, norm, tau, squared=True) + other
            torch.testing.assert_close(both, M, rtol=0.0, atol=1e-13 * float(M.abs().max()))


@every_norm
def test_zero_stays_zero(norm: Any) -> None:
    for squared in (False, True):
        assert not proximal(torch.zeros(3, 2, dtype=torch.float64), norm, 0.5, squared=squared).any()


@pytest.mark.reference
@both_kinds
@pytest.mark.parametrize("norm", ["fro", "nuc", "op", 1.0, 1.5, 3.0, math.inf])
def test_against_cvxpy(norm: Any, squared: bool, rng: np.random.Generator) -> None:
    cvxpy = pytest.importorskip("cvxpy", reason="extra [reference] is not installed")
    M = rng.normal(size=(3, 4))
    W = cvxpy.Variable((3, 4))
    named = {"fro": cvxpy.norm(W, "fro"), "nuc": cvxpy.normNuc(W), "op": cvxpy.sigma_max(W)}
    value = named[norm] if norm in named else cvxpy.pnorm(cvxpy.vec(W, order="C"), norm)
    term = 0.35 * cvxpy.square(value) if squared else 0.7 * value
    cvxpy.Problem(cvxpy.Minimize(term + 0.5 * cvxpy.sum_squares(W - M))).solve(solver="CLARABEL")
    found = proximal(torch.from_numpy(M), norm, 0.7, squared=squared)
    np.testing.assert_allclose(found.numpy(), W.value, atol=1e-4)


@pytest.mark.parametrize("p", [1.0, 1.05, 1.5, 2.0, 3.0, 10.0, math.inf])
def test_the_response_is_the_derivative(p: float, rng: np.random.Generator) -> None:
    v = torch.from_numpy(rng.random(8) + 0.1)
    for tau in (0.1, 2.0):
        d, u, c = response(v, shrunken(v, p, tau, squared=True), p, tau)
        derivative = torch.diag(d) + c * torch.outer(u, u)
        h = 1e-6
        columns = [
            (shrunken(v + h * e, p, tau, squared=True) - shrunken(v - h * e, p, tau, squared=True)) / (2.0 * h)
            for e in torch.eye(8, dtype=torch.float64)
        ]
        torch.testing.assert_close(derivative, torch.stack(columns, 1), rtol=0.0, atol=1e-6)
        spectrum = torch.linalg.eigvalsh(derivative)
        assert float(spectrum[0]) >= -1e-12
        assert float(spectrum[-1]) <= 1.0 + 1e-12


# ------------------------------------------------------------------------------------------- programs in a box


def program(rng: np.random.Generator, *, ridge: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A quadratic program of low rank, with bounds of every kind."""
    n = int(rng.integers(1, 50))
    A = rng.normal(size=(n, int(rng.integers(1, n + 1))))
    H = A @ A.T
    H = H / H.diagonal().max() + ridge * np.eye(n)
    lower = np.where(rng.random(n) < 0.5, 0.0, -np.abs(rng.normal(size=n)))
    lower[rng.random(n) < 0.1] = -math.inf
    upper = np.where(rng.random(n) < 0.5, math.inf, 3.0 * np.abs(rng.normal(size=n)))
    H, g, lower, upper = (torch.from_numpy(np.asarray(value)) for value in (H, rng.normal(size=n), lower, upper))
    return H, g, lower, upper


def violation(H: Tensor, g: Tensor, lower: Tensor, upper: Tensor, x: Tensor) -> float:
    """How far a gradient step inside the box would move x: 0 at the minimiser."""
    assert bool(((lower <= x) & (x <= upper)).all())
    return float((x - (x - g - H @ x).clamp(lower, upper)).abs().max())


@pytest.mark.parametrize("ridge", [1e-2, 1e-6])
def test_programs_in_a_box(ridge: float, rng: np.random.Generator) -> None:
    for _ in range(60):
        parts = program(rng, ridge=ridge)
        x = solve_in_box(*parts)
        assert x is not None
        assert violation(*parts, x) <= 1e-13 / ridge


def test_the_interior_point_method_alone(rng: np.random.Generator) -> None:
    for _ in range(60):
        parts = program(rng, ridge=1e-6)
        x, _ = box_program._interior_point(*parts)
        assert violation(*parts, x) <= 1e-6


def test_where_pivoting_gives_up_the_interior_point_method_helps(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pivoting, guesses = box_program._block_pivoting, []

    def gives_up_once(H: Tensor, g: Tensor, lower: Tensor, upper: Tensor, at: Tensor) -> tuple[Tensor | None, bool]:
        guesses.append(at)
        return (torch.zeros_like(g), False) if len(guesses) == 1 else pivoting(H, g, lower, upper, at)

    monkeypatch.setattr(box_program, "_block_pivoting", gives_up_once)
    parts = program(rng, ridge=1e-3)
    x = solve_in_box(*parts)
    assert len(guesses) == 2
    assert x is not None
    assert violation(*parts, x) <= 1e-10


def test_an_indefinite_program_is_refused() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert solve_in_box(-one[:, None], one, -one, one) is None

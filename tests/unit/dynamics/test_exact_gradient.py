"""The gradient at norms where probabilities leave the range of float64, against decimal arithmetic."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from attsvm import TokenSelection, descend
from attsvm.dynamics.layer import Data, Gradient, TokenStore, gradient
from attsvm.dynamics.losses import LOSSES

n, T, d = 3, 4, 2
TOKENS = np.random.default_rng(11).normal(size=(n, T, d))
QUERIES = np.random.default_rng(12).normal(size=(n, d))
SCORES = np.random.default_rng(13).normal(size=(n, T))
DIRECTIONS = {
    "random": np.random.default_rng(14).normal(size=(d, d)),
    "another": np.random.default_rng(15).normal(size=(d, d)),
    "rank one": np.outer(np.random.default_rng(16).normal(size=d), np.random.default_rng(17).normal(size=d)),
}


def found(W: np.ndarray, loss: str) -> tuple[Gradient, np.ndarray]:
    """The gradient, and its matrix without the factor exp(log_scale)."""
    X, Z, scores = (torch.from_numpy(part)[None] for part in (TOKENS, QUERIES[:, None], SCORES[:, None]))
    allowed = torch.ones(1, n, 1, T, dtype=torch.bool)
    data = Data(TokenStore(X, allowed), Z, allowed, allowed.any(-1), None, scores)
    g = gradient(data, Z @ torch.from_numpy(W).T, LOSSES[loss])
    return g, torch.einsum("bnqd,bnqe->de", g.pooled, Z).numpy()


def exact(W: np.ndarray, loss: str) -> list[list[Decimal]]:
    """The textbook formula, in decimals of the precision that is set: no pairs, no logarithms, no scaling."""

    def dot(a: list[Decimal], b: list[Decimal]) -> Decimal:
        return sum((x * y for x, y in zip(a, b, strict=True)), Decimal(0))

    matrix = [[Decimal(float(w)) for w in row] for row in W]
    G = [[Decimal(0)] * d for _ in range(d)]
    for i in range(n):
        X, z = [[Decimal(float(x)) for x in row] for row in TOKENS[i]], [Decimal(float(x)) for x in QUERIES[i]]
        gamma = [Decimal(float(x)) for x in SCORES[i]]
        key = [dot(row, z) for row in matrix]
        powers = [dot(x, key).exp() for x in X]
        s = [power / sum(powers) for power in powers]
        f = dot(gamma, s)
        slope = {"logistic": -1 / (1 + f.exp()), "exponential": -(-f).exp(), "correlation": Decimal(-1)}[loss]
        for t in range(T):
            c = slope * s[t] * (gamma[t] - f) / n
            for a in range(d):
                for b in range(d):
                    G[a][b] += c * X[t][a] * z[b]
    return G


CASES = [
    *((size, direction, "logistic") for size in (1.0, 30.0, 300.0, 1000.0) for direction in DIRECTIONS),
    (300.0, "random", "exponential"),
    (300.0, "random", "correlation"),
    (3000.0, "random", "logistic"),
]


@pytest.mark.parametrize(("size", "direction", "loss"), CASES)
def test_direction_and_size_are_exact_at_any_norm(size: float, direction: str, loss: str) -> None:
    W = size * DIRECTIONS[direction] / np.linalg.norm(DIRECTIONS[direction])
    logits = np.einsum("ntd,de,ne->nt", TOKENS, W, QUERIES)
    g, G = found(W, loss)
    with localcontext() as context:
        # gamma_a - f is as small as the probabilities that are left: that many digits cancel.
        context.prec = 50 + int(np.ptp(logits, axis=1).max() / np.log(10))
        reference = exact(W, loss)
        context.prec = 40
        top = max(abs(entry) for row in reference for entry in row)
        scaled = np.array([[float(entry / top) for entry in row] for row in reference])
        log_top = float(top.ln())
    assert np.isfinite(G).all()
    assert np.abs(G).max() > 0
    # A logit of size L is rounded by L * 1e-16, which is the relative error of its exponential.
    budget = 1e-13 * max(1.0, size)
    np.testing.assert_allclose(G / np.abs(G).max(), scaled, rtol=0, atol=budget)
    assert float(g.log_scale) + np.log(np.abs(G).max()) == pytest.approx(log_top, rel=1e-14, abs=10 * budget)


def test_plain_descent_underflows_where_the_normalised_one_goes_on() -> None:
    """At a norm of 3000 the gradient is about exp(-800): 0 in float64."""
    W = 3000.0 * DIRECTIONS["random"] / np.linalg.norm(DIRECTIONS["random"])
    g, G = found(W, "logistic")
    assert float(g.log_scale) < -800
    assert (np.exp(float(g.log_scale)) * G == 0).all()
    problem = TokenSelection.from_scores(TOKENS, QUERIES, SCORES)
    plain = descend(problem, SCORES, optimizer="gd", init=W, steps=3, learning_rate=1.0)
    assert plain.stalled
    np.testing.assert_array_equal(plain.W[-1], W)
    normalised = descend(problem, SCORES, optimizer="ngd", init=W, steps=1, learning_rate=0.25)
    assert not normalised.stalled
    np.testing.assert_allclose(normalised.W[-1] - W, -0.25 * G / np.linalg.norm(G), atol=1e-10)

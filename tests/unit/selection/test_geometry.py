from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from attsvm.errors import InvalidInputError
from attsvm.selection import (
    TokenSelection,
    correlation,
    in_cone,
    is_locally_optimal,
    score_cone_margin,
    support_tokens,
    token_scores,
)
from attsvm.selection.geometry import best_tokens
from attsvm.solvers import solve
from contract.problems import unit_sphere

# ------------------------------------------------------------------------------- correlation


def test_correlation_is_the_cosine(rng: np.random.Generator) -> None:
    A, B = rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
    expected = (A * B).sum() / np.linalg.norm(A) / np.linalg.norm(B)
    assert correlation(A, B) == pytest.approx(expected, rel=1e-14)
    assert correlation(A, A) == pytest.approx(1.0, abs=1e-15)
    assert correlation(A, -3 * A) == pytest.approx(-1.0, abs=1e-15)
    assert isinstance(correlation(A, B), float)


def test_correlation_of_many_matrices_broadcasts(rng: np.random.Generator) -> None:
    A, B = rng.normal(size=(5, 3, 3)), rng.normal(size=(3, 3))
    np.testing.assert_allclose(correlation(A, B), [correlation(a, B) for a in A])
    tensor = correlation(torch.from_numpy(A).float(), torch.from_numpy(B))
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor, correlation(A, B), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_correlation_does_not_overflow(scale: float, rng: np.random.Generator) -> None:
    A = rng.normal(size=(3, 3))
    assert correlation(scale * A, A) == pytest.approx(1.0, abs=1e-14)


def test_correlation_with_zero_is_not_a_number() -> None:
    assert math.isnan(correlation(np.zeros((2, 2)), np.eye(2)))


@pytest.mark.parametrize("A, B", [(np.eye(2), np.eye(3)), (np.ones(4), np.ones(4)), (np.eye(2), np.ones((2, 3)))])
def test_correlation_checks_shapes(A: Any, B: Any) -> None:
    with pytest.raises(InvalidInputError, match="A and B must be matrices of one shape"):
        correlation(A, B)


# ------------------------------------------------------------------------------- scores


def test_token_scores_carry_the_label(rng: np.random.Generator) -> None:
    X, v, Y = rng.normal(size=(3, 5, 4)), rng.normal(size=4), np.array([1.0, -1.0, 1.0])
    np.testing.assert_allclose(token_scores(X, v, Y), np.einsum("ntd,d,n->nt", X, v, Y))
    np.testing.assert_allclose(token_scores(X, v), X @ v)
    with pytest.raises(InvalidInputError, match=r"v must have shape \(4,\), got \(3,\)"):
        token_scores(X, v[:3])
    for bad in (np.array([1.0, 0.0, 1.0]), Y[:2]):
        with pytest.raises(InvalidInputError, match="labels must be -1 or"):
            token_scores(X, v, bad)


def test_best_tokens_skip_the_masked_and_take_the_first_of_equals() -> None:
    scores = torch.tensor([[[3.0, 9.0, 3.0], [1.0, 1.0, 2.0]]])
    allowed = torch.tensor([[[True, False, True], [False, False, False]]])
    assert best_tokens(scores, allowed).tolist() == [[0, -1]]


# ------------------------------------------------------------------------------- support, local optimality


def solved(seed: int, *, n: int = 3, T: int = 4, d: int = 6) -> tuple[TokenSelection, torch.Tensor, torch.Tensor]:
    """A random selection on the unit sphere, its scores and its max-margin matrix."""
    data = unit_sphere(n, T, d, seed)
    chosen = torch.randint(T, (n,), generator=torch.Generator().manual_seed(seed))
    problem = TokenSelection(data.tokens, data.queries, chosen)
    return problem, data.scores[:, None], solve(problem, tol=1e-10).W


def test_support_tokens_have_the_margin_asked_for() -> None:
    problem, _, W = solved(0)
    support = support_tokens(problem.tensors, W)
    margins = problem.margins(W)
    assert 0 < support.sum() < problem.n_constraints
    torch.testing.assert_close(margins[support], torch.ones(int(support.sum()), dtype=torch.float64), atol=1e-6, rtol=0)
    assert (margins[~support] > 1 + 1e-4).all()
    np.testing.assert_array_equal(support, solve(problem, tol=1e-10).support)


def test_locally_optimal_means_better_than_every_support_token() -> None:
    problem, _, W = solved(0)
    support, own = support_tokens(problem.tensors, W), problem.selected
    above = torch.zeros(own.shape, dtype=torch.float64) - own.double()
    assert not is_locally_optimal(problem.tensors, above, W)
    # The highest scores on the selected tokens; and then higher ones where no support token is.
    best = own.double()
    assert is_locally_optimal(problem.tensors, best, W)
    assert is_locally_optimal(problem.tensors, best + 5.0 * (~support & ~own), W)
    for place in support.nonzero().tolist():
        tie = best.clone()
        tie[tuple(place)] = 1.0
        assert not is_locally_optimal(problem.tensors, tie, W)


def test_the_global_optimum_is_locally_optimal() -> None:
    for seed in range(10):
        data = unit_sphere(3, 4, 6, seed)
        problem = TokenSelection.from_scores(data.tokens, data.queries, data.scores)
        W = solve(problem).W
        assert is_locally_optimal(problem.tensors, data.scores[:, None], W)
        assert score_cone_margin(problem.tensors, data.scores[:, None], W) == math.inf


def test_few_random_selections_are_locally_optimal() -> None:
    """Three sequences of three tokens in ten dimensions: 7 of 200 in an independent run, 1/27 for pure chance."""
    outcomes = []
    for seed in range(100):
        problem, scores, W = solved(seed, n=3, T=3, d=10)
        outcomes.append(bool(is_locally_optimal(problem.tensors, scores, W)))
    assert 1 <= sum(outcomes) <= 12


def test_local_optimality_in_a_batch() -> None:
    parts = [solved(seed) for seed in range(4)]
    batch = TokenSelection(
        torch.stack([p.tokens for p, _, _ in parts]),
        torch.stack([p.queries for p, _, _ in parts]),
        torch.stack([p.selected for p, _, _ in parts]),
    )
    scores, W = (torch.stack([part[k] for part in parts]) for k in (1, 2))
    together = is_locally_optimal(batch.tensors, scores, W)
    assert together.tolist() == [bool(is_locally_optimal(p.tensors, s, w)) for p, s, w in parts]
    depth = score_cone_margin(batch.tensors, scores, W)
    torch.testing.assert_close(depth, torch.stack([score_cone_margin(p.tensors, s, w) for p, s, w in parts]))


# ------------------------------------------------------------------------------- cones


def test_cones_open_by_correlation_and_begin_at_a_radius(rng: np.random.Generator) -> None:
    D = rng.normal(size=(3, 3))
    side = rng.normal(size=(3, 3))
    side -= (side * D).sum() / (D * D).sum() * D
    for angle in (0.1, 0.7, 2.0):
        W = np.cos(angle) * D / np.linalg.norm(D) + np.sin(angle) * side / np.linalg.norm(side)
        mu = 1 - np.cos(angle)
        assert in_cone(W, D, mu=mu + 1e-9)
        assert not in_cone(W, D, mu=mu - 1e-9)
        assert in_cone(3 * W, D, mu=mu + 1e-9, radius=2.999)
        assert not in_cone(3 * W, D, mu=mu + 1e-9, radius=3.001)
    for bad in (-0.1, 2.1, math.nan):
        with pytest.raises(InvalidInputError, match=r"mu must be in \[0, 2\]"):
            in_cone(D, D, mu=bad)


@pytest.mark.parametrize("seed", range(5))
def test_in_the_narrow_cone_support_tokens_stay_the_closest(seed: int, generator: torch.Generator) -> None:
    """Scaled to the norm of W_mm, margins of support tokens stay within delta / 2 of 1, others above 1 + 1.5 delta."""
    problem, _, best = solved(seed, T=8)
    support, margins = support_tokens(problem.tensors, best), problem.margins(best)
    others = torch.isfinite(margins) & ~support
    delta = 0.5 * float(margins[others].min() - 1)
    norm = float(best.norm())
    largest = float((problem.tokens.norm(dim=-1) * problem.queries.norm(dim=-1)).max())
    A = norm * largest * max(1.0, 1.0 / delta)
    mu = (min(0.5, delta) / A) ** 2 / 8
    for _ in range(50):
        side = torch.randn(best.shape, generator=generator, dtype=torch.float64)
        side -= (side * best).sum() / norm**2 * best
        W = 7.0 * (best / norm + math.sqrt(2 * mu - mu**2) / (1 - mu) * side / side.norm())
        assert in_cone(W, best, mu=mu + 1e-15)
        scaled = problem.margins(W * norm / W.norm())
        assert ((scaled[support] - 1).abs() <= delta / 2).all()
        assert (scaled[others] >= 1 + 1.5 * delta).all()


def test_score_cone_keeps_better_tokens_below_all_that_are_no_better() -> None:
    # Logits under W = identity and z = e1 are the first coordinates: 5 selected, 3 lower score, 1 higher score.
    X = torch.tensor([[[5.0, 0.0], [3.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    Z = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    problem = TokenSelection(X, Z, [0]).tensors
    scores = torch.tensor([[[0.5, 0.2, 0.9]]], dtype=torch.float64)
    W = torch.eye(2, dtype=torch.float64)
    # The smallest of (5, 3) less the largest of (1), over the norm of the identity.
    assert float(score_cone_margin(problem, scores, W)) == pytest.approx(2 / math.sqrt(2))
    assert float(score_cone_margin(problem, scores, -W)) == pytest.approx(-4 / math.sqrt(2))
    equal = torch.tensor([[[0.5, 0.5, 0.2]]], dtype=torch.float64)  # an equal score counts as higher
    assert float(score_cone_margin(problem, equal, W)) == pytest.approx(-2 / math.sqrt(2))

"""What the theory says of the solutions, with the numbers of an independent computation."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from attsvm.selection import TokenSelection, certify, correlation
from attsvm.selection.constraints import combine_rows
from attsvm.solvers import Status, solve
from contract.problems import figure_one, sphere_problem, unit_sphere

TIGHT = 1e-9


def close(value: Any, expected: Any, tol: float) -> None:
    np.testing.assert_allclose(np.asarray(value), np.asarray(expected), rtol=0, atol=tol)


# ------------------------------------------------------------------------------- figure 1


def test_figure_one_data() -> None:
    problem, scores = figure_one()
    assert problem.selected.int().argmax(-1).flatten().tolist() == [0, 0]
    close(scores, [[1.0835, -0.3552, -0.7144, -0.6092, -1.0931], [0.8708, -0.7183, -0.6679, -0.7932, -0.6108]], 5e-5)


def test_figure_one_frobenius() -> None:
    solution = solve(figure_one()[0], "fro", tol=TIGHT)
    close(solution.W, [[0.79255, -1.08647], [-0.63303, -0.34711]], 1e-5)
    close(solution.upper_bound, 1.52636, 1e-5)
    close(solution.singular_values, [1.34926, 0.71363], 1e-5)


def test_figure_one_nuclear() -> None:
    solution = solve(figure_one()[0], "nuc", tol=1e-10)
    close(solution.W, [[0.99375, -1.25966], [-0.13324, -0.25784]], 1e-5)
    close(solution.upper_bound, 1.87260, 1e-5)
    close(solution.singular_values, [1.609, 0.2636], 1e-4)


def test_figure_one_correlation_of_the_two() -> None:
    problem, _ = figure_one()
    both = correlation(solve(problem, "fro", tol=TIGHT).W, solve(problem, "nuc", tol=1e-10).W)
    assert both == pytest.approx(0.93624, abs=1e-5)


# ------------------------------------------------------------------------------- KKT


def test_seed_zero_numbers() -> None:
    problem = sphere_problem(6, 8, 10, 0)
    fro, nuc = solve(problem, "fro", tol=TIGHT), solve(problem, "nuc", tol=TIGHT)
    assert fro.upper_bound == pytest.approx(2.90737, abs=5e-6)
    assert float(fro.duals.sum()) == pytest.approx(8.452823, abs=5e-7)
    assert (int(fro.support.sum()), problem.n_constraints) == (18, 42)
    margins = problem.margins(fro.W)
    assert int((margins <= 1 + 1e-6).sum()) == 18  # the next one is 1.002
    assert nuc.upper_bound == pytest.approx(4.34879, abs=5e-6)
    assert float(nuc.duals.sum()) == pytest.approx(nuc.upper_bound, rel=1e-8)
    assert correlation(fro.W, nuc.W) == pytest.approx(0.83076, abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_sum_of_duals_is_the_squared_norm_and_W_their_combination(seed: int) -> None:
    problem = sphere_problem(6, 8, 10, seed)
    solution = solve(problem, tol=TIGHT)
    assert float(solution.duals.sum()) == pytest.approx(solution.upper_bound**2, rel=1e-6)
    X, Z = problem.tokens, problem.queries[:, 0]
    own = X[torch.arange(6), problem.selected.int().argmax(-1)[:, 0]]
    W = torch.einsum("it,itd,ie->de", solution.duals[:, 0], own[:, None] - X, Z)
    close(W, solution.W, 1e-7 * solution.upper_bound)
    proof = certify(problem, solution.W, solution.duals)
    assert proof.stationarity < 1e-7
    assert abs(proof.complementarity) < 1e-7


@pytest.mark.parametrize("seed", range(5))
def test_nuclear_multipliers_have_operator_norm_one_and_are_aligned(seed: int) -> None:
    problem = sphere_problem(5, 6, 8, seed)
    solution = solve(problem, "nuc", tol=TIGHT)
    G = combine_rows(problem.tensors, solution.duals)
    assert float(torch.linalg.matrix_norm(G, 2)) == pytest.approx(1.0, rel=1e-9)
    assert float((G * solution.W).sum()) == pytest.approx(solution.upper_bound, rel=1e-7)
    assert float(solution.duals.sum()) == pytest.approx(solution.upper_bound, rel=1e-7)


# ------------------------------------------------------------------------------- rank and norms


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("norm, tol", [("fro", 1e-10), ("nuc", 1e-10)])
def test_rows_of_W_lie_in_the_span_of_the_queries(norm: Any, tol: float, seed: int) -> None:
    problem = sphere_problem(4, 6, 10, seed)
    solution = solve(problem, norm)
    Q = torch.linalg.qr(problem.queries[:, 0].T)[0]
    residual = torch.linalg.norm(solution.W - solution.W @ Q @ Q.T) / torch.linalg.norm(solution.W)
    assert residual < tol
    assert solution.rank() <= 4
    if norm == "fro":
        assert solution.rank() == 4


def test_nuclear_solutions_have_low_rank() -> None:
    """Mean rank 2.5 at n = T = 5, d = 10 in an independent computation; that of Frobenius solutions is 5."""
    problems = [sphere_problem(5, 5, 10, seed) for seed in range(10)]
    ranks = [solve(problem, "nuc", tol=1e-8).rank(1e-3) for problem in problems]
    assert 2.0 <= np.mean(ranks) <= 3.0
    assert [solve(problem).rank() for problem in problems] == [5] * 10


@pytest.mark.parametrize("n", [1, 4])
def test_with_one_direction_of_queries_both_norms_agree(n: int) -> None:
    data = unit_sphere(n, 6, 10, 3)
    problem = TokenSelection(data.tokens, data.queries[:1].expand(n, 10), data.best)
    fro, nuc = solve(problem, "fro", tol=TIGHT), solve(problem, "nuc", tol=TIGHT)
    assert correlation(fro.W, nuc.W) == pytest.approx(1.0, abs=1e-6)
    assert fro.rank() == nuc.rank() == 1
    assert fro.upper_bound == pytest.approx(nuc.upper_bound, rel=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_each_solution_is_the_smallest_in_its_own_norm(seed: int) -> None:
    problem = sphere_problem(5, 6, 8, seed)
    fro, nuc = (solve(problem, norm, tol=TIGHT).W for norm in ("fro", "nuc"))
    assert torch.linalg.matrix_norm(fro, "fro") <= torch.linalg.matrix_norm(nuc, "fro") * (1 + 1e-7)
    assert torch.linalg.matrix_norm(nuc, "nuc") <= torch.linalg.matrix_norm(fro, "nuc") * (1 + 1e-7)


def test_covariance_under_rotation_and_scaling_of_queries() -> None:
    problem = sphere_problem(4, 5, 6, 1)
    W = solve(problem, tol=TIGHT).W
    g = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0] for _ in range(2))
    turned = TokenSelection(problem.tokens @ U, problem.queries @ V, problem.selected)
    close(solve(turned, tol=TIGHT).W, U.T @ W @ V, 1e-6)
    longer = TokenSelection(problem.tokens, 2.0 * problem.queries, problem.selected)
    close(solve(longer, tol=TIGHT).W, W / 2, 1e-6)


# ------------------------------------------------------------------------------- feasibility


def feasible(problem: TokenSelection) -> bool:
    status = solve(problem, tol=0.5, on_failure="ignore").status
    assert status in (Status.OPTIMAL, Status.INFEASIBLE)
    return status is Status.OPTIMAL


def random_problem(n: int, T: int, d: int, seed: int, *, self_attention: bool) -> TokenSelection:
    data = unit_sphere(n, T, d, seed)
    chosen = torch.randint(T, (n,), generator=torch.Generator().manual_seed(1000 + seed))
    if self_attention:
        return TokenSelection.self_attention(data.tokens, chosen)
    return TokenSelection(data.tokens, data.queries, chosen)


@pytest.mark.parametrize("self_attention", [False, True])
@pytest.mark.parametrize("n, T", [(6, 8), (8, 6), (10, 5), (3, 3)])
def test_every_selection_is_feasible_where_the_theorem_says(n: int, T: int, self_attention: bool) -> None:
    for seed in range(20):
        assert feasible(random_problem(n, T, max(T - 1, n), seed, self_attention=self_attention))


@pytest.mark.parametrize("self_attention", [False, True])
def test_all_selections_of_a_tiny_problem_are_feasible(self_attention: bool) -> None:
    problem = random_problem(3, 4, 3, 0, self_attention=self_attention)
    for chosen in itertools.product(range(4), repeat=3):
        assert feasible(problem.with_selected(list(chosen)))


@pytest.mark.parametrize(
    "n, T, d, low, high",
    # An independent computation found 0, 52, 100 / 26 / 7, 87 of 100 for cross-attention; about three standard errors.
    [(6, 8, 2, 0, 4), (6, 8, 3, 37, 67), (6, 8, 4, 97, 100), (8, 6, 3, 13, 40), (10, 5, 3, 0, 16), (10, 5, 4, 76, 97)],
)
def test_feasibility_below_the_threshold(n: int, T: int, d: int, low: int, high: int) -> None:
    count = sum(feasible(random_problem(n, T, d, seed, self_attention=False)) for seed in range(100))
    assert low <= count <= high


@pytest.mark.parametrize("causal, d, low, high", [(True, 3, 0.9, 1.0), (False, 2, 0.0, 0.2), (False, 4, 1.0, 1.0)])
def test_feasibility_of_sequences(causal: bool, d: int, low: float, high: float) -> None:
    """n = 2, T = 4: 1.0 (causal, d = 3), 0.03 and 1.0 (all tokens, d = 2 and 4) in an independent computation."""
    outcomes = []
    for seed in range(40):
        X = unit_sphere(2, 4, d, seed).tokens
        r = np.random.default_rng(seed)
        chosen = np.array([[r.integers(0, k + 1 if causal else 4) for k in range(4)] for _ in range(2)])
        outcomes.append(feasible(TokenSelection.sequence(X, torch.from_numpy(chosen), causal=causal)))
    assert low <= np.mean(outcomes) <= high

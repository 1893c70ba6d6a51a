"""The Frobenius-norm solver: coordinate descent, its acceleration, slack, and the hand-over to Newton."""

from __future__ import annotations

import numpy as np
import pytest

from attsvm.selection.certificate import certify
from attsvm.selection.problem import TokenSelection
from attsvm.solvers import coordinate, frobenius, solve
from attsvm.solvers.coordinate import Descent
from attsvm.solvers.frobenius import frobenius_iterates
from attsvm.solvers.loop import Limits, drive
from attsvm.solvers.newton import project
from attsvm.solvers.reference import solve_reference
from attsvm.solvers.rows import Rows, compile_rows
from attsvm.solvers.solution import Status
from attsvm.solvers.view import RowView


def problem_of(n: int = 20, T: int = 8, d: int = 6, seed: int = 0, *, separable: bool = True) -> TokenSelection:
    generator = np.random.default_rng(seed)
    tokens, queries = generator.normal(size=(n, T, d)), generator.normal(size=(n, d))
    scores = np.einsum("ntd,de,ne->nt", tokens, generator.normal(size=(d, d)), queries)
    selected = scores.argmax(-1) if separable else np.zeros(n, dtype=int)
    return TokenSelection(tokens, queries, selected)


def with_ties() -> TokenSelection:
    generator = np.random.default_rng(3)
    selected = np.zeros((10, 2, 6), dtype=bool)
    selected[..., 0] = selected[:, 0, 3] = True
    offsets = generator.normal(size=(10, 2, 6))
    return TokenSelection(
        generator.normal(size=(10, 6, 8)), generator.normal(size=(10, 2, 8)), selected, offsets=offsets
    )


def dual_value(rows: Rows, dual: np.ndarray) -> float:
    return float(dual @ rows.rhs - 0.5 * np.sum(coordinate.combine(rows, dual) ** 2))


@pytest.mark.parametrize("penalty", [1e-3, 0.5, 50.0, 1e3])
@pytest.mark.parametrize("problem", [problem_of(), problem_of(40, 8, 3, separable=False), with_ties()])
def test_soft_margin_is_certified_and_agrees_with_the_reference(problem: TokenSelection, penalty: float) -> None:
    solution = solve(problem, "fro", penalty=penalty, tol=1e-8)
    assert solution.status is Status.OPTIMAL
    assert solution.duals.max() <= penalty
    expected = solve_reference(problem, "fro", penalty=penalty).value
    assert solution.upper_bound == pytest.approx(expected, rel=1e-6)
    proof = certify(problem, solution.W, solution.duals, solution.equality_duals, penalty=penalty)
    assert -1e-12 <= proof.gap <= 1e-8


def test_a_large_enough_penalty_is_the_hard_margin() -> None:
    problem = problem_of()
    hard = solve(problem, tol=1e-10)
    soft = solve(problem, penalty=2.0 * float(hard.duals.max()), tol=1e-10)
    np.testing.assert_allclose(soft.W, hard.W, atol=1e-6 * np.abs(hard.W).max())
    assert soft.upper_bound == pytest.approx(0.5 * hard.upper_bound**2, rel=1e-9)


@pytest.mark.parametrize("penalty", [np.inf, 0.3])
def test_descent_raises_the_dual_value_in_every_round(penalty: float) -> None:
    rows = compile_rows(problem_of(), penalty=penalty)
    descent = Descent(rows, np.zeros(rows.n_rows))
    values = [0.0]
    for _ in range(12):
        descent.advance()
        np.testing.assert_allclose(descent.W, coordinate.combine(rows, descent.dual), atol=1e-12)
        assert descent.dual.min() >= 0.0
        assert descent.dual.max() <= penalty
        values.append(dual_value(rows, descent.dual))
    assert np.all(np.diff(values) >= -1e-12 * values[-1])


def test_extrapolation_saves_sweeps() -> None:
    rows = compile_rows(problem_of(60, 16, 20))
    plain, W = np.zeros(rows.n_rows), np.zeros((rows.tokens.shape[2], rows.queries.shape[1]))
    for _ in range(24):
        coordinate.sweep(rows, W, plain)
    descent = Descent(rows, np.zeros(rows.n_rows))
    for _ in range(6):
        descent.advance()
    best = drive(RowView(rows=rows), frobenius_iterates(rows), norm="fro", tol=1e-12, limits=Limits()).upper
    assert 0.5 * best**2 - dual_value(rows, descent.dual) < 0.1 * (0.5 * best**2 - dual_value(rows, plain))


def test_groups_of_blocks_make_the_same_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compile_rows(problem_of(30, 8, 12))
    shape = rows.tokens.shape[2], rows.queries.shape[1]
    found = []
    for cache in (2**30, 0):
        monkeypatch.setattr(coordinate, "CACHE_BYTES", cache)
        dual, W = np.zeros(rows.n_rows), np.zeros(shape)
        for _ in range(3):
            coordinate.sweep(rows, W, dual)
        found.append((dual, W))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-10)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-10)


def test_values_and_combinations_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compile_rows(problem_of())
    generator = np.random.default_rng(1)
    W = generator.normal(size=(rows.tokens.shape[2], rows.queries.shape[1]))
    dual = generator.normal(size=rows.n_rows)
    differences, queries = rows.differences(np.arange(rows.n_rows)), rows.queries[rows.block]
    monkeypatch.setattr(coordinate, "PART_BYTES", 8 * rows.tokens.shape[2] * 7)
    np.testing.assert_allclose(coordinate.values(rows, W), np.einsum("rp,pq,rq->r", differences, W, queries))
    np.testing.assert_allclose(
        coordinate.combine(rows, dual), np.einsum("r,rp,rq->pq", dual, differences, queries), atol=1e-12
    )


@pytest.mark.parametrize("method", ["auto", "coordinate", "newton"])
def test_methods_agree(method: str) -> None:
    problem = problem_of(30, 8, 10)
    solution = solve(problem, method=method, tol=1e-9)
    assert solution.gap <= 1e-9
    assert solution.upper_bound == pytest.approx(solve(problem, tol=1e-12).upper_bound, rel=1e-9)


def test_newton_takes_over_where_descent_crawls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many more rows than dimensions leave so little room that coordinate descent needs hundreds of sweeps."""
    problem = problem_of(60, 8, 6)
    monkeypatch.setattr(frobenius, "_newton_pays", lambda *_: True)
    fast = solve(problem, tol=1e-9)
    slow = solve(problem, method="coordinate", tol=1e-9, on_failure="ignore", max_iterations=4 * fast.iterations)
    assert fast.gap <= 1e-9
    assert slow.gap > 1e-6


def test_projection_with_slack_minimises_its_objective() -> None:
    """``project`` with a price: the dual bound of its own objective meets it."""
    rows = compile_rows(problem_of(10, 5, 4, separable=False))
    generator = np.random.default_rng(2)
    V = generator.normal(size=(rows.tokens.shape[2], rows.queries.shape[1]))
    price = 0.07
    member = np.ones(rows.n_rows, dtype=bool)
    found = project(rows, V, np.zeros(rows.n_rows), member, None, penalty=price)
    slack = (rows.rhs - coordinate.values(rows, found.W)).clip(min=0.0)
    primal = 0.5 * np.sum((found.W - V) ** 2) + price * slack.sum()
    G = coordinate.combine(rows, found.dual)
    dual = found.dual @ (rows.rhs - coordinate.values(rows, V)) - 0.5 * np.sum(G**2)
    assert found.dual.min() >= 0.0
    assert found.dual.max() <= price
    assert primal == pytest.approx(dual, rel=1e-8)

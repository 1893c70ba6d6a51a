"""The nuclear norm with a bound on the rank, against known answers, scans and the convex problem."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from attsvm.selection import TokenSelection, certify
from attsvm.solvers import Status, solve
from attsvm.solvers.loop import Limits, Outcome
from attsvm.solvers.low_rank import CURVATURE, _Model, _multipliers, low_rank, truncated
from attsvm.solvers.reference import solve_reference
from attsvm.solvers.rows import Rows, compile_rows
from contract.problems import NAMED, select, sphere_problem

E1, E2, ZERO = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]


def bounded(problem: TokenSelection, rank: int, *, tol: float = 1e-6, **limits: Any) -> tuple[Outcome, Rows]:
    """The answer with the bound, judged from outside."""
    rows = compile_rows(problem)
    convex = solve(problem, "nuc", tol=1e-8)
    W = rows.reduce(np.asarray(convex.W))
    dual = rows.gather(np.asarray(convex.duals), np.asarray(convex.equality_duals))
    outcome = low_rank(rows, W=W, dual=dual, rank=rank, tol=tol, limits=Limits(**limits))
    assert np.linalg.matrix_rank(outcome.W) <= rank
    assert outcome.lower == pytest.approx(convex.lower_bound, rel=1e-7)
    if math.isfinite(outcome.upper):
        duals = rows.scatter(outcome.dual, ties=False), rows.scatter(outcome.dual, ties=True)
        proof = certify(problem, rows.expand(outcome.W), *duals, norm="nuc")
        assert proof.feasible
        assert proof.upper_bound == pytest.approx(outcome.upper, rel=1e-9)
        assert outcome.upper >= convex.lower_bound * (1.0 - 1e-12)
    return outcome, rows


@pytest.mark.parametrize("extra", [0, 1, 50])
def test_a_bound_that_does_not_bind_gives_the_convex_solution(extra: int) -> None:
    pytest.importorskip("cvxpy")
    problem = sphere_problem(6, 8, 10, 0)
    outcome, _ = bounded(problem, solve(problem, "nuc", tol=1e-8).rank(1e-5) + extra)
    assert outcome.status is Status.OPTIMAL
    assert outcome.upper == pytest.approx(solve_reference(problem, "nuc").value, rel=2e-6)


def test_another_solution_of_rank_one_is_found() -> None:
    """The identity has the smallest norm, 2, and so has the matrix of ones, whose rank is 1."""
    outcome, rows = bounded(NAMED["the identity matrix"].build(), 1)
    assert outcome.status is Status.OPTIMAL
    assert outcome.upper == pytest.approx(2.0, rel=1e-6)
    np.testing.assert_allclose(np.abs(rows.expand(outcome.W)), 1.0, atol=2e-3)


def test_one_query_needs_rank_one() -> None:
    generator = np.random.default_rng(0)
    X, Z = generator.normal(size=(5, 4, 6)), np.tile(generator.normal(size=6), (5, 1))
    best = np.einsum("ntd,de,ne->nt", X, generator.normal(size=(6, 6)), Z).argmax(-1)
    outcome, _ = bounded(TokenSelection(X, Z, best), 1)
    assert outcome.status is Status.OPTIMAL


def scanned(problem: TokenSelection) -> float:
    """The best matrix k q^T in the plane: for every direction q, the shortest k."""
    t = problem.tensors

    def shortest(angle: float) -> float:
        seen = t.queries @ torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        queries = torch.stack([seen, torch.zeros_like(seen)], dim=-1)
        one = TokenSelection(t.tokens, queries, t.selected, offsets=t.offsets)
        return float(solve(one, tol=1e-5, on_failure="ignore").upper_bound)

    coarse = np.linspace(0.0, math.pi, 121)
    values = [shortest(angle) for angle in coarse]
    centre = coarse[int(np.argmin(values))]
    return min(shortest(angle) for angle in centre + np.linspace(-0.03, 0.03, 61))


def plane(seed: int, *, offsets: bool) -> TokenSelection:
    generator = np.random.default_rng(seed)
    X, Z, W = generator.normal(size=(3, 3, 2)), generator.normal(size=(3, 2)), generator.normal(size=(2, 2))
    best = np.einsum("ntd,de,ne->nt", X, W, Z).argmax(-1)
    shift = generator.normal(size=(3, 1, 3)) if offsets else None
    return TokenSelection(X, Z, best, offsets=shift)


@pytest.mark.parametrize("seed, offsets", [(0, False), (1, False), (2, False), (3, True), (4, True)])
def test_rank_one_in_the_plane_agrees_with_a_scan_of_all_directions(seed: int, offsets: bool) -> None:
    problem = plane(seed, offsets=offsets)
    outcome, _ = bounded(problem, 1)
    known = scanned(problem)
    if math.isinf(known):
        assert math.isinf(outcome.upper)
    else:
        assert outcome.upper == pytest.approx(known, rel=1e-3)
        assert outcome.upper <= known * (1.0 + 1e-6)


def test_the_norm_falls_as_the_rank_rises() -> None:
    problem = sphere_problem(12, 8, 10, 0)
    values = [bounded(problem, rank)[0] for rank in (1, 2, 3, 10)]
    uppers = [outcome.upper for outcome in values]
    assert uppers == sorted(uppers, reverse=True)
    assert uppers[0] > 1.05 * uppers[-1]
    assert [outcome.status for outcome in values[-1:]] == [Status.OPTIMAL]
    assert values[0].status is Status.LOCAL


def test_neither_factor_can_be_improved_alone() -> None:
    problem = sphere_problem(12, 8, 10, 0)
    outcome, rows = bounded(problem, 2)
    assert outcome.status is Status.LOCAL
    U, s, Vh = np.linalg.svd(rows.expand(outcome.W))
    t, root = problem.tensors, np.sqrt(s[:2])
    # With W = K Q^T and Q held, the best K has the smallest Frobenius norm, which must be that of K.
    Q = torch.zeros(10, 10, dtype=torch.float64)
    Q[:, :2] = torch.from_numpy(Vh[:2].T * root)
    best = solve(TokenSelection(t.tokens, t.queries @ Q, t.selected), tol=1e-9)
    assert best.upper_bound**2 == pytest.approx(s[:2].sum(), rel=1e-5)
    K = torch.zeros(10, 10, dtype=torch.float64)
    K[:, :2] = torch.from_numpy(U[:, :2] * root)
    other = solve(TokenSelection(t.tokens @ K, t.queries, t.selected), tol=1e-9)
    assert other.upper_bound**2 == pytest.approx(s[:2].sum(), rel=1e-5)


def test_no_matrix_of_rank_one_is_named_as_not_found() -> None:
    """W_11, W_21, W_22 and -W_12 are asked to be 1 at least, whose signs no k q^T has."""
    first, second = [E1, ZERO], [E2, ZERO]
    problem = select([first, second, second, [ZERO, E1]], [E1, E1, E2, E2], [0, 0, 0, 0])
    outcome, rows = bounded(problem, 1)
    assert outcome.status is Status.ITERATION_LIMIT
    assert outcome.upper == math.inf
    assert outcome.gap == math.inf
    assert outcome.lower == pytest.approx(2.0 * math.sqrt(2.0), rel=1e-6)
    assert 0 < np.linalg.matrix_rank(outcome.W) <= 1
    assert np.linalg.norm(rows.expand(outcome.W)) > 0.1
    assert bounded(problem, 2)[0].upper == pytest.approx(2.0 * math.sqrt(2.0), rel=1e-6)


def test_ties_offsets_and_rows_that_ask_for_nothing_hold_exactly() -> None:
    generator = np.random.default_rng(5)
    X, Z = generator.normal(size=(5, 5, 6)), generator.normal(size=(5, 6))
    best = np.einsum("ntd,de,ne->nt", X, generator.normal(size=(6, 6)), Z).argmax(-1)
    mask = np.zeros((5, 1, 5), dtype=bool)
    mask[np.arange(5), 0, best] = True
    mask[0, 0, (best[0] + 1) % 5] = True
    tied = TokenSelection(X, Z, mask)
    shifted = TokenSelection(X, Z, best, offsets=generator.normal(size=(5, 1, 5)))
    zeros = TokenSelection(X, Z, best, margin=np.round(generator.random((5, 1, 5))))
    for problem in (tied, shifted, zeros):
        outcome, _ = bounded(problem, 2)
        assert math.isfinite(outcome.upper)


@pytest.mark.parametrize("seed", range(6))
def test_no_repair_from_outside_raises_the_rank(seed: int) -> None:
    """Once the bound was that of a repaired matrix, and the truncated one that was returned broke a row."""
    generator = np.random.default_rng(seed)
    X, Z, W = generator.normal(size=(2, 4, 6)), generator.normal(size=(2, 2, 6)), generator.normal(size=(6, 6))
    best = np.einsum("ntd,de,nqe->nqt", X, W, Z).argmax(-1)
    problem = TokenSelection(X, Z, best, offsets=2.0 * generator.normal(size=(2, 2, 4)))
    assert math.isfinite(bounded(problem, 1)[0].upper)
    assert math.isfinite(bounded(problem, 2)[0].upper)


def test_limits_and_interrupts_are_reported_as_such() -> None:
    problem = sphere_problem(12, 8, 10, 0)
    assert bounded(problem, 2, seconds=0.0)[0].status is Status.TIME_LIMIT
    stopped, _ = bounded(problem, 2, iterations=6)
    assert (stopped.status, stopped.iterations) == (Status.ITERATION_LIMIT, 6)

    def interrupt(step: int, gap: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    assert bounded(problem, 2, progress=interrupt)[0].status is Status.INTERRUPTED


def test_two_runs_agree_bit_for_bit() -> None:
    first, second = (bounded(sphere_problem(6, 8, 10, 0), 1)[0] for _ in range(2))
    np.testing.assert_array_equal(first.W, second.W)
    assert first.history == second.history


def test_truncation_keeps_the_largest_singular_values() -> None:
    generator = np.random.default_rng(0)
    W = generator.normal(size=(5, 7))
    s = np.linalg.svd(W, compute_uv=False)
    cut = np.linalg.svd(truncated(W, 2), compute_uv=False)
    np.testing.assert_allclose(cut, [*s[:2], 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(truncated(W, 9), W, atol=1e-12)


def test_more_rows_than_unknowns_do_not_make_the_quadratic_program_cycle() -> None:
    generator = np.random.default_rng(0)
    A = torch.from_numpy(100.0 * generator.normal(size=(400, 30)))
    gram, target = A @ A.T, torch.from_numpy(100.0 * generator.random(400))
    tie = torch.arange(400) < 5
    found = _multipliers(gram, target, tie, torch.zeros(400, dtype=torch.float64))
    wanted = target - gram @ found
    wanted = torch.where(tie, wanted, wanted.clamp(min=0.0))
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-6 * float(wanted.abs().max()))


def test_the_model_is_the_inverse_of_its_curvature() -> None:
    generator = np.random.default_rng(0)
    G, k, h = (generator.normal(size=shape) for shape in ((4, 6), (4, 2), (6, 2)))
    U, g, Vh = np.linalg.svd(G, full_matrices=False)
    cut = CURVATURE * (U * np.minimum(g, 1.0)) @ Vh
    left, right = _Model.of(G, 0.3).solved(k, h)
    np.testing.assert_allclose(1.3 * left - cut @ right, k, atol=1e-12)
    np.testing.assert_allclose(1.3 * right - cut.T @ left, h, atol=1e-12)

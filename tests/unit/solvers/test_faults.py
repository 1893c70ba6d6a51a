"""Problems at the edge: guilty, nearly infeasible, badly scaled, empty, of odd types; limits, Ctrl-C."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from attsvm.errors import InfeasibleError, InvalidInputError, NotConvergedError
from attsvm.selection import TokenSelection, certify, check_ray
from attsvm.solvers import Solution, Status, solve
from contract.problems import sphere_problem

NORMS = ["fro", "nuc", "op", 1.0, 1.5, math.inf]
PENALTIES = [math.inf, 0.5]

every_norm = pytest.mark.parametrize("norm", NORMS)
hard_and_soft = pytest.mark.parametrize("penalty", PENALTIES)


def proved(problem: TokenSelection, solution: Solution) -> None:
    """The bounds are those that W and the duals prove."""
    proof = certify(
        problem, solution.W, solution.duals, solution.equality_duals, norm=solution.norm, penalty=solution.penalty
    )
    np.testing.assert_allclose(proof.upper_bound, solution.upper_bound, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(proof.lower_bound, solution.lower_bound, rtol=1e-6, atol=1e-300)
    assert proof.lower_bound <= proof.upper_bound * (1 + 1e-12)


def test_one_guilty_sequence_among_ten_thousand_is_named() -> None:
    generator = np.random.default_rng(0)
    teacher = generator.standard_normal((16, 16))
    X, Z = generator.standard_normal((10_000, 4, 16)), generator.standard_normal((10_000, 16))
    selected = np.einsum("ntd,de,ne->nt", X, teacher, Z).argmax(1)
    X[7_321, selected[7_321]] = 0.5 * (X[7_321, (selected[7_321] + 1) % 4] + X[7_321, (selected[7_321] + 2) % 4])
    problem = TokenSelection(X, Z, selected)
    with pytest.raises(InfeasibleError, match=r"7321\b") as error:
        solve(problem, max_seconds=120.0)
    ray = error.value.solution.ray
    assert ray.sequences == (7_321,)
    assert check_ray(problem, ray.weights, ray.equality_weights).valid


@every_norm
def test_a_margin_of_a_billionth_is_never_called_infeasible(norm: Any) -> None:
    X = np.array([[[1.0, 1e-9], [1.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
    problem = TokenSelection(X, np.array([[1.0, 0.0], [0.0, 1.0]]), [0, 0])
    solution = solve(problem, norm, on_failure="ignore", max_iterations=20_000)
    assert solution.status is not Status.INFEASIBLE
    assert solution.ray is None
    proved(problem, solution)
    if norm in ("fro", "nuc", "op"):
        assert solution.status is Status.OPTIMAL
        assert 0.999e9 <= solution.upper_bound <= 1.001e9


@hard_and_soft
@every_norm
def test_scales_from_1e_minus_12_to_1e12_end_with_a_true_certificate(norm: Any, penalty: float) -> None:
    problem = sphere_problem(6, 5, 8, 1)
    scale = 10.0 ** np.array([-12.0, -7.0, -2.0, 2.0, 7.0, 12.0])
    t = problem.tensors
    scaled = TokenSelection(t.tokens.numpy() * scale[:, None, None], t.queries[:, 0].numpy(), t.selected.numpy())
    solution = solve(scaled, norm, penalty=penalty, on_failure="ignore", max_iterations=5_000, max_seconds=30.0)
    assert solution.status in (Status.OPTIMAL, Status.ITERATION_LIMIT, Status.TIME_LIMIT)
    proved(scaled, solution)


@hard_and_soft
@every_norm
def test_constraints_that_come_many_times_change_nothing(norm: Any, penalty: float) -> None:
    problem = sphere_problem(5, 5, 6, 2)
    t = problem.tensors
    X, Z, own = t.tokens.numpy(), t.queries[:, 0].numpy(), t.selected[:, 0].numpy().argmax(-1)
    copies = 7
    price = penalty / copies if math.isfinite(penalty) else penalty
    many = TokenSelection(np.tile(X, (copies, 1, 1)), np.tile(Z, (copies, 1)), np.tile(own, copies))
    once, often = solve(problem, norm, penalty=penalty), solve(many, norm, penalty=price)
    np.testing.assert_allclose(often.upper_bound, once.upper_bound, rtol=3e-6)


@hard_and_soft
@every_norm
def test_no_constraints_gives_zero_and_says_so(norm: Any, penalty: float) -> None:
    for tokens, selected in (([[[1.0, 2.0]]], [0]), ([[[1.0, 2.0], [3.0, 1.0]]], [-1])):
        solution = solve(TokenSelection(tokens, [[1.0, 1.0]], selected), norm, penalty=penalty)
        assert not np.asarray(solution.W).any()
        assert solution.status is Status.OPTIMAL
        assert (solution.upper_bound, solution.lower_bound, solution.method) == (0.0, 0.0, "none needed")


@every_norm
def test_one_dimension(norm: Any) -> None:
    solution = solve(TokenSelection([[[3.0], [1.0]], [[2.0], [-1.0]]], [[1.0], [0.5]], [0, 0]), norm)
    np.testing.assert_allclose(solution.upper_bound, 2.0 / 3.0, rtol=1e-6)
    soft = solve(TokenSelection([[[3.0], [1.0]]], [[1.0]], [0]), norm, penalty=0.01)
    np.testing.assert_allclose(soft.upper_bound, 0.01 - 0.5 * 0.02**2, rtol=1e-6)


@every_norm
def test_a_query_of_zeros(norm: Any) -> None:
    problem = TokenSelection([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]], [[1.0, 0.0], [0.0, 0.0]], [0, 0])
    with pytest.raises(InfeasibleError, match=r"Sequences in the proof: 1\."):
        solve(problem, norm)
    soft = solve(problem, norm, penalty=0.5)
    np.testing.assert_allclose(soft.upper_bound, 0.375 + 0.5, rtol=1e-6)
    proved(problem, soft)


@every_norm
def test_half_precision_is_read_as_it_is(norm: Any) -> None:
    problem = sphere_problem(5, 5, 6, 3)
    half = TokenSelection(problem.tensors.tokens.half(), problem.tensors.queries.half(), problem.tensors.selected)
    double = TokenSelection(half.tensors.tokens.double(), half.tensors.queries.double(), problem.tensors.selected)
    first, second = solve(half, norm), solve(double, norm)
    assert first.W.dtype is torch.float16
    np.testing.assert_allclose(first.upper_bound, second.upper_bound, rtol=1e-6)
    assert first.status is Status.OPTIMAL


@hard_and_soft
@every_norm
@pytest.mark.parametrize("limit", [{"max_seconds": 0.0}, {"max_iterations": 1}], ids=["seconds", "iterations"])
def test_limits_return_the_best_so_far(norm: Any, penalty: float, limit: dict[str, float]) -> None:
    problem = sphere_problem(12, 8, 10, 4)
    with pytest.raises(NotConvergedError) as error:
        solve(problem, norm, penalty=penalty, tol=1e-12, **limit)
    solution = error.value.solution
    assert solution.status in (Status.TIME_LIMIT, Status.ITERATION_LIMIT)
    proved(problem, solution)


def test_a_limit_of_memory_changes_the_way_and_not_the_answer() -> None:
    problem = sphere_problem(80, 24, 32, 5)
    free, tight = solve(problem, tol=1e-8), solve(problem, tol=1e-8, max_bytes=2**20)
    np.testing.assert_allclose(tight.W, free.W, atol=1e-6 * free.upper_bound)
    with pytest.raises(InvalidInputError, match="max_bytes must be at least 1048576"):
        solve(problem, max_bytes=1000)


@hard_and_soft
@every_norm
def test_ctrl_c_returns_the_best_so_far(norm: Any, penalty: float) -> None:
    problem = sphere_problem(12, 8, 10, 4)
    calls = itertools.count()

    def press(iterations: int, gap: float) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(NotConvergedError, match="interrupted") as error:
        solve(problem, norm, penalty=penalty, tol=1e-14, progress=press)
    assert error.value.solution.status is Status.INTERRUPTED
    proved(problem, error.value.solution)

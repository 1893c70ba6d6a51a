"""Every solver on every named problem: status, value, certificate, multipliers, kind, determinism, warm start."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from attsvm.selection import TokenSelection, certify, check_ray
from attsvm.solvers import Solution, Status, solve
from contract.problems import DUAL, NAMED, size

METHODS = {"fro": ("auto", "coordinate", "newton")}
SOLVERS = [(norm, method) for norm in DUAL for method in METHODS.get(norm, ("auto", "splitting", "primal-dual"))]
SOFT = [(norm, method) for norm, method in SOLVERS if method != "coordinate"]
FEASIBLE = [name for name, named in NAMED.items() if named.feasible]
INFEASIBLE = [name for name, named in NAMED.items() if not named.feasible]
PRICE = 0.5


def tolerance(norm: Any, method: str) -> float:
    """First-order methods are asked for what they are for; the methods that finish exactly, for more."""
    return 1e-8 if norm == "fro" or (norm == "nuc" and method != "primal-dual") else 1e-6


def label(value: Any) -> str:
    """The name of a norm or a method in a test's name."""
    return value if isinstance(value, str) else f"l{value:g}"


every_solver = pytest.mark.parametrize("norm, method", SOLVERS, ids=["-".join(map(label, pair)) for pair in SOLVERS])
every_soft_solver = pytest.mark.parametrize("norm, method", SOFT, ids=["-".join(map(label, pair)) for pair in SOFT])


def answer(name: str, norm: Any, method: str, **options: Any) -> Solution:
    return solve(NAMED[name].build(), norm, method=method, tol=tolerance(norm, method), **options)


@every_solver
@pytest.mark.parametrize("name", FEASIBLE)
def test_the_known_value_with_a_certificate(name: str, norm: Any, method: str) -> None:
    problem, value, tol = NAMED[name].build(), NAMED[name].value(norm), tolerance(norm, method)
    solution = answer(name, norm, method)
    slack = (tol + NAMED[name].digits) * value
    assert solution.status is Status.OPTIMAL
    assert solution.ray is None
    assert solution.lower_bound - slack <= value <= solution.upper_bound + slack
    assert solution.upper_bound <= value + slack
    assert solution.gap <= tol
    assert solution.norm == norm
    proof = certify(problem, solution.W, solution.duals, solution.equality_duals, norm=norm)
    assert proof.feasible
    np.testing.assert_allclose(proof.upper_bound, solution.upper_bound, rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(proof.lower_bound, solution.lower_bound, rtol=1e-8, atol=1e-300)


@every_solver
@pytest.mark.parametrize("name", FEASIBLE)
def test_every_row_holds_and_multipliers_are_complementary(name: str, norm: Any, method: str) -> None:
    problem = NAMED[name].build()
    solution = answer(name, norm, method)
    margins, duals = np.asarray(problem.margins(solution.W)), np.asarray(solution.duals)
    asked = np.isfinite(margins)
    wanted = np.broadcast_to(np.asarray(problem.margin), margins.shape)
    assert (margins[asked] >= wanted[asked] - 1e-12 * (1 + solution.upper_bound)).all()
    assert (duals >= 0).all()
    assert not duals[~asked].any()
    assert (np.asarray(solution.support) == (duals > 0)).all()
    # At a gap g the sum of dual x excess is at most about g times the dual objective.
    excess = (duals[asked] * (margins[asked] - wanted[asked])).sum()
    assert abs(excess) <= 10 * tolerance(norm, method) * max(1.0, solution.upper_bound) ** 2
    logits = np.asarray(problem.logits(solution.W))
    for own in (logits[query][chosen] for query, chosen in each_query(problem)):
        np.testing.assert_allclose(own, own[:1].repeat(len(own)), atol=1e-8 * (1 + solution.upper_bound))


def each_query(problem: Any) -> list[tuple[tuple[int, int], np.ndarray]]:
    selected = np.asarray(problem.selected)
    return [((i, q), selected[i, q]) for i in range(selected.shape[0]) for q in range(selected.shape[1])]


@every_solver
@pytest.mark.parametrize("name", INFEASIBLE)
def test_no_matrix_exists_and_a_ray_proves_it(name: str, norm: Any, method: str) -> None:
    problem = NAMED[name].build()
    solution = answer(name, norm, method, on_failure="ignore", max_iterations=2000)
    assert solution.upper_bound == math.inf
    if method == "coordinate" and solution.status is Status.ITERATION_LIMIT:
        return  # by itself it only approaches a ray
    assert solution.status is Status.INFEASIBLE
    assert solution.lower_bound == math.inf
    check = check_ray(problem, solution.ray.weights, solution.ray.equality_weights)
    assert check.valid
    assert check.sequences == solution.ray.sequences
    assert (np.asarray(solution.ray.weights) >= 0).all()


@every_soft_solver
@pytest.mark.parametrize("name", FEASIBLE)
def test_the_known_value_with_slack(name: str, norm: Any, method: str) -> None:
    problem, value, tol = NAMED[name].build(), NAMED[name].soft_value(norm), tolerance(norm, method)
    solution = answer(name, norm, method, penalty=PRICE)
    slack = (tol + NAMED[name].digits) * value
    assert solution.status is Status.OPTIMAL
    assert solution.penalty == PRICE
    assert solution.lower_bound - slack <= value <= solution.upper_bound + slack
    assert solution.gap <= tol
    duals = np.asarray(solution.duals)
    assert duals.min() >= 0.0
    assert duals.max() <= PRICE
    margins = np.asarray(problem.margins(solution.W))
    asked = np.isfinite(margins)
    short = (np.broadcast_to(np.asarray(problem.margin), margins.shape) - margins)[asked].clip(min=0.0).sum()
    by_hand = 0.5 * size(np.asarray(solution.W), norm) ** 2 + PRICE * short
    np.testing.assert_allclose(solution.upper_bound, by_hand, rtol=1e-9, atol=1e-15)
    proof = certify(problem, solution.W, solution.duals, solution.equality_duals, norm=norm, penalty=PRICE)
    np.testing.assert_allclose(proof.upper_bound, solution.upper_bound, rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(proof.lower_bound, solution.lower_bound, rtol=1e-8, atol=1e-300)


@every_soft_solver
@pytest.mark.parametrize("name", INFEASIBLE)
def test_slack_makes_all_but_broken_ties_feasible(name: str, norm: Any, method: str) -> None:
    solution = answer(name, norm, method, penalty=PRICE, on_failure="ignore")
    if name == "two selected that cannot be tied":
        # Equal logits of e1 and 2 e1 leave nothing for the margin: W = 0 pays for the whole slack.
        np.testing.assert_allclose(solution.upper_bound, PRICE, rtol=1e-6)
    assert solution.status is Status.OPTIMAL
    assert math.isfinite(solution.upper_bound)


@every_solver
def test_the_smallest_change_is_that_of_the_same_logits_as_offsets(norm: Any, method: str) -> None:
    problem = NAMED["sphere, seed 0"].build()
    t = problem.tensors
    center = 0.3 * np.random.default_rng(0).standard_normal((10, 10))
    changed = solve(problem, norm, method=method, tol=tolerance(norm, method), center=center)
    offsets = np.einsum("ntd,de,ne->nt", t.tokens.numpy(), center, t.queries[:, 0].numpy())
    shifted = TokenSelection(t.tokens, t.queries[:, 0], t.selected, offsets=torch.from_numpy(offsets))
    alone = solve(shifted, norm, method=method, tol=tolerance(norm, method))
    rtol = 2 * tolerance(norm, method)
    np.testing.assert_allclose(changed.upper_bound, alone.upper_bound, rtol=rtol)
    np.testing.assert_allclose(changed.upper_bound, size(np.asarray(changed.W) - center, norm), rtol=1e-9)
    assert changed.gap <= tolerance(norm, method)


@every_solver
@pytest.mark.parametrize("name", ["the identity matrix", "two selected", "sphere, seed 0"])
def test_two_runs_agree_bit_for_bit(name: str, norm: Any, method: str) -> None:
    first, second = (answer(name, norm, method) for _ in range(2))
    for field in ("W", "duals", "equality_duals"):
        np.testing.assert_array_equal(np.asarray(getattr(first, field)), np.asarray(getattr(second, field)))
    assert (first.iterations, first.upper_bound) == (second.iterations, second.upper_bound)


@every_solver
def test_a_warm_start_needs_no_more_iterations(norm: Any, method: str) -> None:
    cold = answer("sphere, seed 0", norm, method)
    warm = answer("sphere, seed 0", norm, method, warm_start=cold)
    assert warm.iterations <= cold.iterations
    assert warm.status is Status.OPTIMAL


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_answers_have_the_kind_of_the_tokens(norm: Any, method: str, dtype: torch.dtype) -> None:
    problem = NAMED["sphere, seed 0"].build()
    t = problem.tensors
    for convert, kind in ((lambda x: x.to(dtype), torch.Tensor), (lambda x: x.to(dtype).numpy(), np.ndarray)):
        cast = type(problem)(convert(t.tokens), convert(t.queries), t.selected)
        solution = solve(cast, norm, method=method)  # the default tolerance, 1e-6
        for field in ("W", "duals", "equality_duals"):
            value = getattr(solution, field)
            assert isinstance(value, kind)
            assert str(value.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
        assert isinstance(solution.support, kind)
        np.testing.assert_allclose(solution.upper_bound, NAMED["sphere, seed 0"].value(norm), rtol=1e-5)

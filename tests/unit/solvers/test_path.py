from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from attsvm.errors import InfeasibleError, InvalidInputError, NotConvergedError, UnsupportedError
from attsvm.selection import TokenSelection, certify
from attsvm.solvers import SolutionPath, Status, solve, solve_path
from contract.problems import NAMED, sphere_problem


def test_a_path_of_penalties_ends_at_the_hard_margin() -> None:
    problem = sphere_problem(6, 8, 10, 0)
    path = solve_path(problem, penalties=[0.01, 0.1, 1.0, 10.0, math.inf])
    assert path.parameter == "penalty"
    assert len(path) == 5
    assert set(path.status) == {Status.OPTIMAL}
    for C, solution in zip(path.values, path, strict=True):
        alone = solve(problem, penalty=C)
        assert solution.upper_bound == pytest.approx(alone.upper_bound, rel=2e-6)
        proof = certify(problem, solution.W, solution.duals, penalty=C)
        assert proof.upper_bound == pytest.approx(solution.upper_bound, rel=1e-12)
        assert proof.lower_bound == pytest.approx(solution.lower_bound, rel=1e-12)
        assert float(solution.duals.max()) <= C
    # The value of slack rises with its price; in the end no slack is left, and the objective is half the square.
    assert (np.diff(path.upper_bound[:-1]) > 0).all()
    assert path.margin[-1] == pytest.approx(1.0)
    assert path.upper_bound[-2] == pytest.approx(0.5 * path.upper_bound[-1] ** 2, rel=1e-5)


def test_a_path_of_margins_scales_without_offsets_and_not_with_them() -> None:
    problem = sphere_problem(6, 8, 10, 1)
    path = solve_path(problem, margins=[1.0, 2.0, 0.5], tol=1e-8)
    np.testing.assert_allclose(path.upper_bound / path.upper_bound[0], [1.0, 2.0, 0.5], rtol=1e-7)
    t = problem.tensors
    offsets = np.random.default_rng(0).normal(size=t.selected.shape)
    shifted = TokenSelection(t.tokens, t.queries, t.selected, offsets=offsets)
    moved = solve_path(shifted, margins=[0.0, 1.0, 4.0], tol=1e-8)
    assert set(moved.status) == {Status.OPTIMAL}
    assert (np.diff(moved.upper_bound) > 0).all()
    np.testing.assert_allclose(moved.margin, [0.0, 1.0, 4.0], atol=1e-6)
    assert (moved.lower_bound <= moved.upper_bound).all()


def test_warm_starts_save_iterations() -> None:
    problem = sphere_problem(40, 12, 16, 2)
    values = np.geomspace(0.05, 5.0, 6)
    path = solve_path(problem, penalties=values)  # type: ignore[arg-type]
    cold = [solve(problem, penalty=C).iterations for C in values]
    assert sum(solution.iterations for solution in path) < sum(cold)


def test_a_failure_carries_the_whole_path() -> None:
    problem = NAMED["opposite wishes"].build()
    with pytest.raises(InfeasibleError, match=r"solve_path: at penalty inf: .*Sequences in the proof: 0, 1") as caught:
        solve_path(problem, penalties=[1.0, math.inf, 2.0])
    path: Any = caught.value.solution
    assert isinstance(path, SolutionPath)
    assert path.status == (Status.OPTIMAL, Status.INFEASIBLE, Status.OPTIMAL)
    with pytest.raises(NotConvergedError, match="at margin 1"):
        solve_path(sphere_problem(20, 12, 16, 0), margins=[1.0], max_iterations=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either penalties or margins"),
        ({"penalties": [1.0], "margins": [1.0]}, "either penalties or margins"),
        ({"penalties": []}, "at least one number"),
        ({"penalties": [1.0, -1.0]}, "penalties must be > 0, got -1"),
        ({"margins": [math.inf]}, "margins must be finite and >= 0, got inf"),
        ({"margins": "many"}, "margins must be a list of numbers"),
        ({"penalties": [1.0], "penalty": 2.0}, "penalty must not be given beside"),
    ],
)
def test_bad_paths_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        solve_path(NAMED["one row"].build(), **options)


def test_a_batch_has_no_path() -> None:
    batch = TokenSelection(np.ones((2, 1, 2, 2)), np.ones((2, 1, 2)), np.zeros((2, 1), dtype=int))
    with pytest.raises(UnsupportedError, match="one problem at a time"):
        solve_path(batch, penalties=[1.0])

"""How a solve is asked for, and how it ends."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from attsvm.errors import InfeasibleError, InvalidInputError, NotConvergedError, UnsupportedError
from attsvm.selection import TokenSelection, certify, check_ray
from attsvm.solvers import Solution, Status, solve
from contract.problems import E1, E2, NAMED, ZERO, figure_one, select, sphere_problem, unit_sphere


@pytest.fixture
def problem() -> TokenSelection:
    return sphere_problem(20, 10, 12, 0)


def interrupt_after(checks: int) -> Any:
    """A progress callback that does what Ctrl-C does, at the given check."""
    seen: list[int] = []

    def progress(iterations: int, gap: float) -> None:
        seen.append(iterations)
        if len(seen) == checks:
            raise KeyboardInterrupt

    return progress


# ------------------------------------------------------------------------------- limits


LIMITS: dict[str, tuple[dict[str, Any], Status]] = {
    "iterations": ({"max_iterations": 3}, Status.ITERATION_LIMIT),
    "no iteration": ({"max_iterations": 0}, Status.ITERATION_LIMIT),
    "time": ({"max_seconds": 0.0}, Status.TIME_LIMIT),
    "Ctrl-C": ({"progress": interrupt_after(2)}, Status.INTERRUPTED),
    "Ctrl-C at once": ({"progress": interrupt_after(1)}, Status.INTERRUPTED),
}


@pytest.mark.parametrize("norm", ["fro", "nuc"])
@pytest.mark.parametrize("limit", LIMITS)
def test_at_a_limit_the_best_so_far_comes_with_a_valid_certificate(
    limit: str, norm: Any, problem: TokenSelection
) -> None:
    options, status = LIMITS[limit]
    if "progress" in options:
        options = {"progress": interrupt_after(1 if "at once" in limit else 2)}
    with pytest.raises(NotConvergedError, match="best solution found") as caught:
        solve(problem, norm, tol=1e-11, **options)
    partial = caught.value.solution
    assert partial.status is status
    best = solve(problem, norm, tol=1e-8).upper_bound
    assert partial.lower_bound <= best * (1 + 1e-8)
    assert partial.upper_bound >= best * (1 - 1e-8)
    assert partial.gap > 1e-11
    proof = certify(problem, partial.W, partial.duals, norm=norm)
    assert proof.lower_bound == pytest.approx(partial.lower_bound, rel=1e-10)
    if math.isfinite(partial.upper_bound):
        assert proof.upper_bound == pytest.approx(partial.upper_bound, rel=1e-10)
        assert partial.margin == pytest.approx(1.0)


def test_an_interrupted_solve_has_something_to_show(problem: TokenSelection) -> None:
    for norm, within in (("fro", 0.5), ("nuc", 0.5)):
        stopped = solve(problem, norm, progress=interrupt_after(3), on_failure="ignore")  # type: ignore[arg-type]
        assert stopped.status is Status.INTERRUPTED
        assert stopped.gap < within


def test_failure_raises_warns_or_is_ignored(problem: TokenSelection) -> None:
    stop: dict[str, Any] = {"max_iterations": 1, "tol": 1e-12}
    with pytest.raises(NotConvergedError, match=r"^solve: The iterations ended.*The gap reached is"):
        solve(problem, **stop)
    with pytest.warns(RuntimeWarning, match="The iterations ended") as record:
        warned = solve(problem, on_failure="warn", **stop)
    assert record[0].filename == __file__
    assert solve(problem, on_failure="ignore", **stop).status is warned.status is Status.ITERATION_LIMIT


@pytest.mark.parametrize("norm, method", [("fro", "coordinate"), ("nuc", "splitting"), ("nuc", "primal-dual")])
def test_a_tolerance_below_rounding_ends(norm: Any, method: str) -> None:
    stuck = solve(figure_one()[0], norm, tol=1e-18, method=method, on_failure="ignore", max_seconds=60)
    assert stuck.status in (Status.ITERATION_LIMIT, Status.OPTIMAL)
    assert abs(stuck.gap) < 1e-8


def test_a_gap_that_is_met_at_a_limit_counts(problem: TokenSelection) -> None:
    full = solve(problem, tol=1e-6)
    assert solve(problem, tol=1e-6, max_iterations=full.iterations).status is Status.OPTIMAL


def test_progress_tells_iterations_and_gap(problem: TokenSelection) -> None:
    seen: list[tuple[int, float]] = []
    solution = solve(problem, tol=1e-8, progress=lambda iterations, gap: seen.append((iterations, gap)))
    assert tuple(seen) == tuple(entry[:2] for entry in solution.history)
    assert seen[-1][0] == solution.iterations
    assert seen[-1][1] <= 1e-8
    assert all(later[1] <= earlier[1] for earlier, later in pairwise(seen))


# ------------------------------------------------------------------------------- infeasible


def test_infeasible_names_the_guilty_sequences() -> None:
    problem = select([[E2, ZERO], [E1, ZERO], [E2, ZERO], [ZERO, E1]], [E1, E1, E1, E1], [0, 0, 0, 0])
    for norm in ("fro", "nuc"):
        with pytest.raises(InfeasibleError, match=r"Sequences in the proof: 1, 3\.") as caught:
            solve(problem, norm)  # type: ignore[arg-type]
        solution = caught.value.solution
        assert solution.status is Status.INFEASIBLE
        assert solution.ray.sequences == (1, 3)
        assert solution.ray.residual <= 1e-9
        assert (solution.upper_bound, solution.lower_bound) == (math.inf, math.inf)
        weights = np.asarray(solution.ray)
        assert weights.max() == 1.0
        assert check_ray(problem, weights).valid


def test_one_bad_sequence_among_many_is_found() -> None:
    data = unit_sphere(8, 5, 12, 0)
    tokens = data.tokens.clone()
    tokens[5, 2] = (tokens[5, 0] + tokens[5, 1]) / 2
    chosen = data.best.clone()
    chosen[5] = 2  # the midpoint of two others cannot beat both
    solution = solve(TokenSelection(tokens, data.queries, chosen), on_failure="ignore")
    assert solution.status is Status.INFEASIBLE
    assert solution.ray.sequences == (5,)
    np.testing.assert_allclose(np.asarray(solution.ray.weights)[5, 0], [1, 1, 0, 0, 0], atol=1e-9)


def test_zero_query_is_infeasible_at_once() -> None:
    solution = solve(NAMED["zero query"].build(), on_failure="ignore")
    assert (solution.status, solution.iterations, solution.method) == (Status.INFEASIBLE, 0, "none needed")
    assert solution.ray.sequences == (1,)
    assert check_ray(NAMED["zero query"].build(), solution.ray.weights).valid


def test_zero_query_that_asks_nothing_is_no_matter() -> None:
    assert solve(select([[E1, ZERO], [E1, ZERO]], [E1, ZERO], [0, -1])).upper_bound == pytest.approx(1.0)
    assert solve(select([[E1, ZERO], [E1, E1]], [E1, ZERO], [0, 0])).upper_bound == pytest.approx(1.0)


def nearly_dependent_ties() -> TokenSelection:
    """No matrix exists, but the multipliers that prove it are 155 times larger on the ties than on the row."""
    r = np.random.default_rng(5)
    X, Z = r.normal(size=(3, 4, 2)), r.normal(size=(3, 2))
    return TokenSelection(X, Z, r.random((3, 1, 4)) < 0.4)


@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_a_ray_that_only_shows_in_the_difference_of_steps(norm: Any) -> None:
    """Once ended as ITERATION_LIMIT, with an upper bound of 2.7e10 made of what the tolerance of the ties allows."""
    solution = solve(nearly_dependent_ties(), norm, on_failure="ignore")
    assert solution.status is Status.INFEASIBLE
    assert check_ray(nearly_dependent_ties(), solution.ray.weights, solution.ray.equality_weights).valid


# ------------------------------------------------------------------------------- nothing to do


@pytest.mark.parametrize("name", ["one token", "all tokens identical", "no query asks", "offsets do it all"])
def test_nothing_asked_gives_zero(name: str) -> None:
    for norm in ("fro", "nuc"):
        solution = solve(NAMED[name].build(), norm)  # type: ignore[arg-type]
        assert not solution.W.any()
        assert (solution.status, solution.gap, solution.rank()) == (Status.OPTIMAL, 0.0, 0)
        assert not solution.support.any()


# ------------------------------------------------------------------------------- hard cases


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_tokens_and_queries_of_any_scale(norm: Any, scale: float) -> None:
    problem = sphere_problem(5, 6, 8, 0)
    value = solve(problem, norm).upper_bound
    for X, Z in ((scale, 1.0), (1.0, scale), (scale, scale)):
        scaled = TokenSelection(X * problem.tokens, Z * problem.queries, problem.selected)
        assert solve(scaled, norm).upper_bound == pytest.approx(value / (X * Z), rel=3e-6)


@pytest.mark.parametrize("norm, method", [("fro", "auto"), ("nuc", "primal-dual")])
@pytest.mark.parametrize("decades", [4, 6])
def test_sequences_of_very_different_scales(norm: Any, method: str, decades: int) -> None:
    problem = sphere_problem(3, 6, 8, 0)
    scales = torch.logspace(-decades, decades, 3, dtype=torch.float64)[:, None, None]
    scaled = TokenSelection(scales * problem.tokens, problem.queries, problem.selected)
    solution = solve(scaled, norm, method=method, on_failure="ignore")
    # Twelve decades apart, float64 leaves 1e-4 of the margin of the longest tokens; the status must say so.
    assert solution.gap <= (1e-6 if decades == 4 else 1e-4)
    assert solution.status is (Status.OPTIMAL if solution.gap <= 1e-6 else Status.ITERATION_LIMIT)
    # The shortest tokens need almost all of it: the others can only add.
    alone = solve(TokenSelection(scaled.tokens[:1], scaled.queries[:1], scaled.selected[:1]), norm)
    assert alone.upper_bound <= solution.upper_bound * (1 + 1e-5)


@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_a_large_common_part_of_the_tokens_with_offsets(norm: Any, generator: torch.Generator) -> None:
    problem = sphere_problem(4, 5, 6, 0)
    b = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    for shift in (0.0, 1e6):
        moved = TokenSelection(problem.tokens + shift, problem.queries, problem.selected, offsets=b)
        solution = solve(moved, norm)
        if shift == 0.0:
            value = solution.upper_bound
        assert solution.upper_bound == pytest.approx(value, rel=2e-6)


def test_nearly_equal_tokens() -> None:
    """A difference of 1e-6 asks for a matrix of 1e6."""
    solution = solve(select([[E1, [1.0 - 1e-6, 0.0], ZERO]], [E1], [0]))
    assert solution.upper_bound == pytest.approx(1e6, rel=1e-6)


# ------------------------------------------------------------------------------- ties found unmet: a fixed bug


@pytest.mark.parametrize("norm", ["fro", "nuc"])
@pytest.mark.parametrize("seed", range(8))
def test_ties_hold_before_a_matrix_counts(seed: int, norm: Any) -> None:
    """Coordinate descent closes the gap before the ties hold to rounding; the matrix must be repaired first."""
    r = np.random.default_rng(seed)
    selected = np.zeros((3, 1, 5), dtype=bool)
    selected[:, 0, :2] = True
    problem = TokenSelection(r.normal(size=(3, 5, 6)), r.normal(size=(3, 6)), selected)
    solution = solve(problem, norm)
    assert solution.status is Status.OPTIMAL
    logits = problem.logits(solution.W)[:, 0]
    np.testing.assert_allclose(logits[:, 0], logits[:, 1], atol=1e-8 * solution.upper_bound)


# ------------------------------------------------------------------------------- batches, warm starts


def test_a_batch_is_its_problems_one_by_one() -> None:
    problems = [sphere_problem(4, 5, 6, seed) for seed in range(3)]
    batch = TokenSelection(
        *(torch.stack([getattr(p, name) for p in problems]) for name in ("tokens", "queries", "selected"))
    )
    for norm in ("op", "fro", "nuc"):
        together = solve(batch, norm, tol=1e-9)  # type: ignore[arg-type]
        singles = [solve(p, norm, tol=1e-9) for p in problems]  # type: ignore[arg-type]
        # Small members are solved by compiled loops of their own; a gap g leaves W a distance of sqrt(2 g).
        atol = 0.0 if norm == "op" else 1e-4 * max(s.upper_bound for s in singles)
        torch.testing.assert_close(together.W, torch.stack([s.W for s in singles]), rtol=0.0, atol=atol)
        np.testing.assert_allclose(together.upper_bound, [s.upper_bound for s in singles], rtol=2e-9)
        assert together.status == (Status.OPTIMAL,) * 3
        assert max(together.gap) <= 1e-9
        for name in ("duals", "equality_duals", "support"):
            assert getattr(together, name).shape == (3, *singles[0].duals.shape)
    assert repr(together).startswith("Solution(norm='nuc', 3 of 3 optimal")


def test_a_batch_with_an_infeasible_problem_names_it() -> None:
    X = np.array([[[E1, ZERO], [E2, ZERO]], [[E1, ZERO], [ZERO, E1]]])
    batch = TokenSelection(X, np.tile(E1, (2, 2, 1)), np.zeros((2, 2), dtype=int))
    with pytest.raises(InfeasibleError, match=r"problem 1 of the batch: .*Sequences in the proof: 0, 1") as caught:
        solve(batch)
    assert caught.value.solution.status == (Status.OPTIMAL, Status.INFEASIBLE)
    assert caught.value.solution.upper_bound[1] == math.inf
    with pytest.raises(UnsupportedError, match="warm_start is not supported for a batch"):
        solve(batch, warm_start=solve(batch[0]))


@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_a_warm_start_from_a_neighbour_helps_and_agrees(norm: Any, problem: TokenSelection) -> None:
    first = solve(problem, norm, tol=1e-7)
    moved = TokenSelection(problem.tokens * (1 + 1e-6 * torch.arange(10)[:, None]), problem.queries, problem.selected)
    cold, warm = solve(moved, norm, tol=1e-6), solve(moved, norm, tol=1e-6, warm_start=first)
    assert warm.iterations < cold.iterations
    assert warm.upper_bound == pytest.approx(cold.upper_bound, rel=2e-6)


@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_a_useless_warm_start_does_no_harm(norm: Any, problem: TokenSelection) -> None:
    first = solve(problem, norm)
    for scale in (0.0, -1.0, 1e3):
        bad = replace(first, W=scale * first.W, duals=scale * first.duals)
        assert solve(problem, norm, warm_start=bad).upper_bound == pytest.approx(first.upper_bound, rel=2e-6)


def test_a_warm_start_of_another_shape_is_refused(problem: TokenSelection) -> None:
    with pytest.raises(InvalidInputError, match=r"warm_start must have duals of shape \(20, 1, 10\)"):
        solve(problem, warm_start=solve(NAMED["one row"].build()))


# ------------------------------------------------------------------------------- kind, copies, records


def test_the_problem_and_global_randomness_are_left_alone(problem: TokenSelection) -> None:
    before = [None if t is None else t.clone() for t in problem.tensors]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    state = torch.random.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    for norm in ("fro", "nuc"):
        solve(problem, norm)  # type: ignore[arg-type]
    for tensor, copy in zip(problem.tensors, before, strict=True):
        if tensor is not None:
            torch.testing.assert_close(tensor, copy, rtol=0, atol=0)
    torch.testing.assert_close(torch.random.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_answers_go_back_to_the_device(problem: TokenSelection) -> None:
    t = problem.tensors
    there = TokenSelection(t.tokens.cuda(), t.queries.cuda(), t.selected.cuda())
    for norm in ("fro", "nuc"):
        here, back = solve(problem, norm), solve(there, norm)  # type: ignore[arg-type]
        assert back.W.device.type == back.duals.device.type == back.support.device.type == "cuda"
        torch.testing.assert_close(back.W.cpu(), here.W, rtol=1e-4, atol=1e-5)


def test_exceptions_carry_their_solution_across_processes(problem: TokenSelection) -> None:
    with pytest.raises(NotConvergedError) as caught:
        solve(problem, max_iterations=1, tol=1e-12)
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert str(copy) == str(caught.value)
    torch.testing.assert_close(copy.solution.W, caught.value.solution.W)


def test_every_status_is_a_sentence() -> None:
    for status in Status:
        assert status.sentence.endswith(".")
        assert len(status.sentence) > 20


def test_repr_and_singular_values() -> None:
    solution = solve(NAMED["the identity matrix"].build(), "nuc", tol=1e-9)
    assert isinstance(solution, Solution)
    np.testing.assert_allclose(solution.singular_values, [1.0, 1.0], atol=1e-6)
    assert solution.rank() == 2
    assert repr(solution).startswith("Solution(norm='nuc', status=optimal, upper_bound=2, gap=")


# ------------------------------------------------------------------------------- bad requests


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no norm": ({"norm": "l2"}, InvalidInputError, 'norm must be "fro", "nuc", "op" or a number'),
    "zero tolerance": ({"tol": 0.0}, InvalidInputError, r"tol must be in \(0, 1\), got 0.0"),
    "a tolerance of NaN": ({"tol": math.nan}, InvalidInputError, r"tol must be in \(0, 1\), got nan"),
    "negative penalty": ({"penalty": -1.0}, InvalidInputError, "penalty must be > 0"),
    "a penalty of NaN": ({"penalty": math.nan}, InvalidInputError, "penalty must be > 0"),
    "a center of another size": ({"center": np.eye(3)}, InvalidInputError, r"center must have shape \(2, 2\)"),
    "a center with NaN": ({"center": np.full((2, 2), np.nan)}, InvalidInputError, "center must be finite"),
    "a rank for another norm": ({"rank": 1}, InvalidInputError, 'rank must be None unless norm is "nuc"'),
    "a rank with slack": (
        {"rank": 1, "norm": "nuc", "penalty": 1.0},
        InvalidInputError,
        "rank must be None for the soft margin",
    ),
    "too little memory": ({"max_bytes": 1000}, InvalidInputError, "max_bytes must be at least 1048576"),
    "a progress that is no function": ({"progress": 3}, InvalidInputError, "progress must be callable"),
    "a warm start that is no solution": ({"warm_start": np.eye(2)}, InvalidInputError, "warm_start must be a Solution"),
    "rank zero": ({"rank": 0, "norm": "nuc"}, InvalidInputError, "rank must be an integer >= 1"),
    "a method of the other norm": (
        {"method": "splitting"},
        InvalidInputError,
        "method must be one of auto, coordinate",
    ),
    "no such reaction": ({"on_failure": "print"}, InvalidInputError, "on_failure must be"),
    "negative seconds": ({"max_seconds": -1}, InvalidInputError, "max_seconds must be >= 0"),
    "negative iterations": ({"max_iterations": -1}, InvalidInputError, "max_iterations must be >= 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_named(name: str) -> None:
    options, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        solve(NAMED["the identity matrix"].build(), **options)


def test_only_problems_are_solved() -> None:
    with pytest.raises(InvalidInputError, match="problem must be a TokenSelection, got list"):
        solve([[1.0]])  # type: ignore[arg-type]


def test_a_rank_bound_that_binds_nothing_is_accepted() -> None:
    assert solve(NAMED["the identity matrix"].build(), "nuc", rank=2).rank() == 2

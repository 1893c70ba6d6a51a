"""Many small problems at once: the same answers as one by one, whatever is among them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attsvm.selection import TokenSelection, certify, check_ray
from attsvm.solvers import Status, solve
from attsvm.solvers.batched import BatchOutcome, batch_pays, solve_batch
from attsvm.solvers.solution import Solution

KINDS = [("fro", math.inf), ("nuc", math.inf), ("fro", 0.05)]


def draw(B: int, n: int, T: int, d: int, seed: int, *, Q: int = 1, **options: Any) -> TokenSelection:
    """Gaussian tokens and queries, a random selection."""
    rng = np.random.default_rng(seed)
    X, Z = rng.standard_normal((B, n, T, d)), rng.standard_normal((B, n, Q, d))
    return TokenSelection(X, Z, rng.integers(0, T, (B, n, Q)), **options)


def together(problem: TokenSelection, norm: Any, penalty: float, **options: Any) -> BatchOutcome:
    assert batch_pays(problem, norm, penalty)
    return solve_batch(problem, norm=norm, penalty=penalty, **options)


def assert_as_alone(
    problem: TokenSelection, outcome: BatchOutcome, norm: Any, penalty: float, *, tol: float = 1e-6
) -> None:
    """Status and bounds of every member that is not pending agree with what ``solve`` says of it."""
    for b in range(len(problem)):
        if b in outcome.pending:
            continue
        alone = solve(problem[b], norm, penalty=penalty, on_failure="ignore")
        status = outcome.status[b]
        assert status is alone.status or alone.status is Status.ITERATION_LIMIT
        if status is Status.OPTIMAL:
            upper, lower = outcome.upper_bound[b], outcome.lower_bound[b]
            assert upper - lower <= tol * upper
            assert upper >= alone.lower_bound * (1.0 - 1e-10)
            assert lower <= alone.upper_bound * (1.0 + 1e-10)


def assert_certified(
    problem: TokenSelection, outcome: BatchOutcome, norm: Any, penalty: float, *, rounding: float = 1e-8
) -> None:
    """The bounds and rays hold, up to the rounding of the smallest rows, when each member is judged by itself."""
    for b, status in enumerate(outcome.status):
        if b in outcome.pending:
            continue
        if status is Status.INFEASIBLE:
            ray = outcome.rays[b]
            assert ray is not None
            check = check_ray(problem[b], ray.weights, ray.equality_weights)
            assert check.valid
            assert check.sequences == ray.sequences
            continue
        W, duals, ties = outcome.W[b], outcome.duals[b], outcome.equality_duals[b]
        proof = certify(problem[b], W, duals, ties, norm=norm, penalty=penalty)
        assert proof.feasible
        if outcome.upper_bound[b] > 0:
            assert proof.scale == pytest.approx(1.0, abs=rounding)
        assert proof.upper_bound == pytest.approx(outcome.upper_bound[b], rel=rounding)
        assert proof.lower_bound == pytest.approx(outcome.lower_bound[b], rel=1e-8, abs=1e-12)
        assert proof.gap <= 1e-6 + rounding


# ------------------------------------------------------------------------------------------------ the same as alone


@pytest.mark.parametrize("norm,penalty", KINDS)
def test_every_member_is_solved_and_as_alone(norm: Any, penalty: float) -> None:
    problem = draw(24, 6, 8, 10, 0)
    outcome = together(problem, norm, penalty)
    assert set(outcome.status) == {Status.OPTIMAL}
    assert outcome.pending.size == 0
    assert_certified(problem, outcome, norm, penalty)
    assert_as_alone(problem, outcome, norm, penalty)


@pytest.mark.parametrize("norm,penalty", KINDS)
def test_a_member_does_not_see_the_others(norm: Any, penalty: float) -> None:
    problem = draw(150, 4, 5, 7, 1)
    all_of_them = together(problem, norm, penalty)
    t = problem.tensors
    for b in (0, 77, 149):
        single = TokenSelection(*(part[b : b + 1].numpy() for part in (t.tokens, t.queries, t.selected)))
        one = together(single, norm, penalty)
        np.testing.assert_array_equal(one.W[0], all_of_them.W[b])
        np.testing.assert_array_equal(one.duals[0], all_of_them.duals[b])


def test_frobenius_duals_give_back_the_matrix() -> None:
    problem = draw(5, 4, 5, 6, 2)
    outcome = together(problem, "fro", math.inf)
    for b in range(5):
        t = problem[b].tensors
        chosen = t.selected.double()
        first = torch.einsum("nqt,ntd->nqd", chosen, t.tokens)[:, :, None]
        rows = first - t.tokens[:, None]
        W = torch.einsum("nqt,nqtd,nqe->de", torch.from_numpy(outcome.duals[b]), rows, t.queries)
        np.testing.assert_allclose(outcome.W[b], W.numpy(), rtol=1e-7, atol=1e-9)


def test_nuclear_duals_have_a_dual_norm_of_one() -> None:
    problem = draw(5, 4, 5, 6, 3)
    outcome = together(problem, "nuc", math.inf)
    for b in range(5):
        t = problem[b].tensors
        first = torch.einsum("nqt,ntd->nqd", t.selected.double(), t.tokens)[:, :, None]
        G = torch.einsum("nqt,nqtd,nqe->de", torch.from_numpy(outcome.duals[b]), first - t.tokens[:, None], t.queries)
        assert float(torch.linalg.matrix_norm(G, 2)) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("norm,penalty", KINDS)
def test_threads_change_nothing(norm: Any, penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw(200, 3, 4, 5, 4)
    outcomes = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        outcomes.append(together(problem, norm, penalty))
    np.testing.assert_array_equal(outcomes[0].W, outcomes[1].W)
    assert outcomes[0].status == outcomes[1].status


# ----------------------------------------------------------------------------------------------- what may be among them


@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_infeasible_members_are_named_with_a_proof(norm: Any) -> None:
    rng = np.random.default_rng(5)
    X, Z = rng.standard_normal((40, 3, 4, 6)), rng.standard_normal((40, 3, 6))
    chosen = rng.integers(0, 4, (40, 3))
    for b in (3, 17, 39):
        # Two sequences that are equal but for the token that they select.
        X[b, 2], Z[b, 2], chosen[b, 2] = X[b, 0], Z[b, 0], (chosen[b, 0] + 1) % 4
    problem = TokenSelection(X, Z, chosen)
    outcome = together(problem, norm, math.inf)
    assert [b for b, status in enumerate(outcome.status) if status is Status.INFEASIBLE] == [3, 17, 39]
    assert outcome.pending.size == 0
    for b in (3, 17, 39):
        ray = outcome.rays[b]
        assert ray is not None
        assert ray.sequences == (0, 2)
        assert outcome.lower_bound[b] == math.inf
    assert_certified(problem, outcome, norm, math.inf)


@pytest.mark.parametrize("norm,penalty", KINDS)
def test_members_that_ask_nothing_have_the_matrix_zero(norm: Any, penalty: float) -> None:
    rng = np.random.default_rng(6)
    chosen = rng.integers(0, 4, (6, 3))
    chosen[2] = -1
    Z = rng.standard_normal((6, 3, 5))
    problem = TokenSelection(rng.standard_normal((6, 3, 4, 5)), Z, chosen)
    outcome = together(problem, norm, penalty)
    assert set(outcome.status) == {Status.OPTIMAL}
    assert not outcome.W[2].any()
    assert outcome.upper_bound[2] == outcome.lower_bound[2] == 0.0
    assert outcome.W[[0, 1, 3, 4, 5]].any(axis=(1, 2)).all()


@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_a_query_of_zeros_makes_a_member_infeasible(norm: Any) -> None:
    rng = np.random.default_rng(7)
    Z = rng.standard_normal((4, 3, 5))
    Z[1, 2] = 0.0
    problem = TokenSelection(rng.standard_normal((4, 3, 4, 5)), Z, rng.integers(0, 4, (4, 3)))
    outcome = together(problem, norm, math.inf)
    assert [status is Status.INFEASIBLE for status in outcome.status] == [False, True, False, False]
    assert outcome.rays[1] is not None
    assert outcome.rays[1].sequences == (2,)


def test_with_slack_a_query_of_zeros_pays() -> None:
    rng = np.random.default_rng(7)
    Z = rng.standard_normal((4, 3, 5))
    Z[1, 2] = 0.0
    problem = TokenSelection(rng.standard_normal((4, 3, 4, 5)), Z, rng.integers(0, 4, (4, 3)))
    outcome = together(problem, "fro", 0.5)
    assert set(outcome.status) == {Status.OPTIMAL}
    assert outcome.duals[1, 2].sum() == 3 * 0.5
    assert_certified(problem, outcome, "fro", 0.5)
    assert_as_alone(problem, outcome, "fro", 0.5)


def odd(kind: str) -> TokenSelection:
    """A batch with one of the things that a problem may have."""
    rng = np.random.default_rng(sum(map(ord, kind)))
    B, n, Q, T, d = 12, 3, 2, 5, 8
    X, Z = rng.standard_normal((B, n, T, d)), rng.standard_normal((B, n, Q, d))
    chosen: Any = rng.integers(0, T, (B, n, Q))
    options: dict[str, Any] = {}
    if kind == "ties":
        chosen = np.eye(T, dtype=bool)[chosen] | (rng.random((B, n, Q, T)) < 0.2)
    elif kind == "masks":
        options["allowed"] = np.eye(T, dtype=bool)[chosen] | (rng.random((B, n, Q, T)) < 0.5)
    elif kind == "offsets":
        options["offsets"] = rng.standard_normal((B, n, Q, T))
    elif kind == "margins":
        options["margin"] = rng.choice([0.0, 0.5, 1.0, 3.0], (B, n, Q, T))
    elif kind == "duplicates":
        X[:, :, 1] = X[:, :, 0]
        X[:, 1], Z[:, 1], chosen[:, 1] = X[:, 0], Z[:, 0], chosen[:, 0]
    elif kind == "float32":
        X, Z = X.astype(np.float32), Z.astype(np.float32)
    elif kind == "scales":
        X, Z = X * 10.0 ** rng.integers(-12, 12, (B, 1, 1, 1)), Z * 10.0 ** rng.integers(-6, 6, (B, n, 1, 1))
    return TokenSelection(X, Z, chosen, **options)


@pytest.mark.parametrize("norm,penalty", KINDS)
@pytest.mark.parametrize("kind", ["ties", "masks", "offsets", "margins", "duplicates", "float32", "scales"])
def test_whatever_a_problem_may_have(kind: str, norm: Any, penalty: float) -> None:
    problem = odd(kind)
    outcome = together(problem, norm, penalty)
    # Only scales may leave members to the solvers of single problems, and not many.
    assert len(outcome.pending) <= (0 if kind != "scales" else 6)
    # Where queries differ by a factor of 1e12, the margins of the small ones are rounded by about 1e-7.
    assert_certified(problem, outcome, norm, penalty, rounding=1e-8 if kind != "scales" else 1e-6)
    assert_as_alone(problem, outcome, norm, penalty)


# -------------------------------------------------------------------------------------------------------------- limits


def test_at_the_limit_of_iterations_bounds_are_valid() -> None:
    problem = draw(20, 6, 8, 10, 8)
    for norm in ("fro", "nuc"):
        limited = together(problem, norm, math.inf, max_iterations=1)
        exact = together(problem, norm, math.inf)
        assert Status.ITERATION_LIMIT in limited.status
        assert limited.pending.size == 0
        assert (limited.upper_bound >= exact.lower_bound).all()
        assert (limited.lower_bound <= exact.upper_bound).all()


def test_at_the_limit_of_time_the_rest_is_said_to_be_unsolved() -> None:
    outcome = together(draw(300, 3, 4, 5, 9), "fro", math.inf, max_seconds=0.0)
    assert outcome.status[0] is Status.OPTIMAL
    assert outcome.status[-1] is Status.TIME_LIMIT
    assert outcome.upper_bound[-1] == math.inf
    assert outcome.pending.size == 0


def test_ctrl_c_keeps_what_is_done() -> None:
    def interrupt(_: int, __: float) -> None:
        raise KeyboardInterrupt

    outcome = together(draw(300, 3, 4, 5, 9), "fro", math.inf, progress=interrupt)
    assert outcome.status[0] is Status.OPTIMAL
    assert outcome.status[-1] is Status.INTERRUPTED


def test_progress_counts_down() -> None:
    seen: list[tuple[int, float]] = []
    together(draw(200, 3, 4, 5, 10), "fro", math.inf, progress=lambda count, left: seen.append((count, left)))
    assert seen[-1][1] == 0.0
    assert [left for _, left in seen] == sorted((left for _, left in seen), reverse=True)


def test_a_tighter_tolerance_is_reached() -> None:
    problem = draw(20, 6, 8, 10, 11)
    for norm in ("fro", "nuc"):
        outcome = together(problem, norm, math.inf, tol=1e-10)
        assert set(outcome.status) == {Status.OPTIMAL}
        assert ((outcome.upper_bound - outcome.lower_bound) <= 1e-10 * outcome.upper_bound).all()


# ----------------------------------------------------------------------------------------------------------- the border


def test_what_is_not_solved_together() -> None:
    small = draw(3, 2, 3, 4, 12)
    assert batch_pays(small, "fro", math.inf)
    assert batch_pays(small, "fro", 1.0)
    assert batch_pays(small, "nuc", math.inf)
    assert not batch_pays(small, "nuc", 1.0)
    assert not batch_pays(small, "op", math.inf)
    assert not batch_pays(small, 3.0, math.inf)
    assert not batch_pays(small[0], "fro", math.inf)
    assert not batch_pays(draw(2, 40, 12, 4, 13), "fro", math.inf)
    assert not batch_pays(draw(2, 2, 3, 200, 14), "fro", math.inf)


def test_a_solution_takes_in_what_was_solved_alone() -> None:
    problem = draw(4, 2, 3, 4, 15)
    outcome = together(problem, "fro", math.inf)
    alone = solve(problem[2], "fro")
    merged = outcome.solution(problem, norm="fro", penalty=math.inf, alone={2: alone}, began=0.0)
    assert isinstance(merged, Solution)
    np.testing.assert_array_equal(merged.W[2], alone.W)
    np.testing.assert_array_equal(merged.W[1], outcome.W[1])
    assert merged.upper_bound[2] == alone.upper_bound
    assert len(merged.status) == len(merged.ray) == 4
    assert max(merged.gap) <= 1e-6


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 5), st.integers(1, 6)),
    odds=st.lists(
        st.sampled_from(["ties", "masks", "offsets", "margins", "duplicates", "integers", "zeros"]), max_size=3
    ),
    kind=st.sampled_from(KINDS),
)
def test_random_problems_are_answered_as_alone(
    seed: int, sizes: tuple[int, int, int, int], odds: list[str], kind: tuple[Any, float]
) -> None:
    rng = np.random.default_rng(seed)
    (n, Q, T, d), B = sizes, 4
    X, Z = rng.standard_normal((B, n, T, d)), rng.standard_normal((B, n, Q, d))
    if "integers" in odds:
        X, Z = X.round(), Z.round()
    if "zeros" in odds:
        Z *= rng.random((B, n, Q, 1)) < 0.8
    if "duplicates" in odds:
        X[:, -1], Z[:, -1] = X[:, 0], Z[:, 0]
    chosen: Any = np.eye(T, dtype=bool)[rng.integers(0, T, (B, n, Q))]
    if "ties" in odds:
        chosen = chosen | (rng.random(chosen.shape) < 0.3)
    options: dict[str, Any] = {}
    if "masks" in odds:
        options["allowed"] = chosen | (rng.random(chosen.shape) < 0.5)
    if "offsets" in odds:
        options["offsets"] = rng.integers(-2, 3, chosen.shape).astype(float)
    if "margins" in odds:
        options["margin"] = rng.integers(0, 3, chosen.shape).astype(float)
    problem = TokenSelection(X, Z, chosen, **options)
    outcome = together(problem, *kind)
    assert_certified(problem, outcome, *kind)
    assert_as_alone(problem, outcome, *kind)

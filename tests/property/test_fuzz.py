"""Ten thousand random problems, many of them degenerate: no certificate is wrong, and nothing hangs."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from attsvm.selection import TokenSelection
from attsvm.solvers import Solution, Status, solve

NORMS: list[Any] = ["fro", "fro", "nuc", "nuc", "op", 1.0, 1.3, 2.0, 4.0, math.inf]
LIMIT = 20.0
"""Seconds for one problem at most; the solver is asked to stop at half of them."""


def random_problem(r: np.random.Generator) -> tuple[TokenSelection, dict[str, Any], bool]:
    """A problem, what to ask of it, and whether its sizes are within what float64 can hold together."""
    n, T, d = int(r.integers(1, 9)), int(r.integers(1, 7)), int(r.integers(1, 7))
    kind = r.integers(0, 4)

    def numbers(*shape: int) -> np.ndarray:
        if kind == 0:  # coarse: duplicates, collinear tokens, zero queries
            return r.integers(-2, 3, shape).astype(float)
        if kind == 1:  # of very different sizes
            return r.normal(size=shape) * 10.0 ** r.integers(-6, 7, (shape[0],) + (1,) * (len(shape) - 1))
        if kind == 2:  # nearly parallel
            return r.normal(size=shape[-1]) + 1e-4 * r.normal(size=shape)
        return r.normal(size=shape)

    X, Z = numbers(n, T, d), numbers(n, d)
    extra: dict[str, Any] = {}
    if r.random() < 0.3:
        extra["offsets"] = r.normal(size=(n, T))
    if r.random() < 0.3:
        extra["margin"] = r.integers(0, 3, (n, 1, T)).astype(float)
    if r.random() < 0.3:
        extra["allowed"] = (r.random((n, T)) < 0.8) | (np.arange(T) == 0)
    asked: dict[str, Any] = {"norm": NORMS[r.integers(len(NORMS))]}
    if r.random() < 0.3:
        asked["penalty"] = float(10.0 ** r.uniform(-3, 2))
    if r.random() < 0.2:
        asked["center"] = r.normal(size=(d, d))
    selected: Any = r.integers(0, T, n)
    if r.random() < 0.3:
        selected = (r.random((n, 1, T)) < 0.4) & extra.get("allowed", np.ones((n, T), dtype=bool))[:, None]
    elif "allowed" in extra:
        extra["allowed"][np.arange(n), selected] = True
    return TokenSelection(X, Z, selected, **extra), asked, bool(kind != 1)


def check(problem: TokenSelection, asked: dict[str, Any], solution: Solution) -> None:
    """The bounds by their definitions, one row after the other, in extended precision."""
    t = problem.tensors
    X, Z = t.tokens.numpy().astype(np.longdouble), t.queries.numpy().astype(np.longdouble)
    W = np.asarray(solution.W).astype(np.longdouble)
    change = W - np.asarray(asked.get("center", 0.0))
    offsets = np.zeros(t.selected.shape) if t.offsets is None else t.offsets.numpy()
    margin = np.broadcast_to(np.asarray(problem.margin), t.selected.shape)
    duals, ties = (np.asarray(a).astype(np.longdouble) for a in (solution.duals, solution.equality_duals))
    soft = math.isfinite(solution.penalty)
    promise, slack, combination = np.longdouble(0), np.longdouble(0), np.zeros_like(W)
    crossing = np.longdouble(0)  # ties hold to a tolerance, and may let the bounds cross by what that is worth
    weights = duals, ties
    if solution.status is Status.INFEASIBLE:
        weights = tuple(
            np.asarray(a).astype(np.longdouble) for a in (solution.ray.weights, solution.ray.equality_weights)
        )
    terms = np.longdouble(0)
    rows = zip(*(t.asked | (t.selected & (t.selected.long().cumsum(-1) > 1))).numpy().nonzero(), strict=True)
    for i, q, k in rows:
        a = t.selected.numpy()[i, q].argmax()
        row = np.outer(X[i, a] - X[i, k], Z[i, q])
        tie = bool(t.selected[i, q, k])
        center = np.asarray(asked.get("center", np.zeros_like(W)))
        asks = (0.0 if tie else margin[i, q, k]) - (offsets[i, q, a] - offsets[i, q, k])
        value = (row * W).sum()
        size = np.sqrt((row * row).sum()) * (1e-300 + np.sqrt((W * W).sum() + (center * center).sum()))
        if math.isfinite(solution.upper_bound):
            if tie:
                assert abs(value - asks) <= 1e-9 * size + 1e-12 * abs(asks)
            elif soft:
                slack += max(np.longdouble(0), asks - value)
            else:
                assert value >= asks - 1e-9 * size - 1e-12 * abs(asks)
        weight = weights[1 if tie else 0][i, q, k]
        assert tie or weight >= 0
        crossing += abs(weight * (value - asks)) if tie else 0.0
        promise += weight * (asks - (row * center).sum())
        combination += weight * row
        terms += abs(weight) * np.sqrt((row * row).sum())
    if solution.status is Status.INFEASIBLE:
        assert promise > 0
        assert np.sqrt((combination * combination).sum()) <= 2e-9 * terms
        return
    size, slope = norm_of(change, asked["norm"]), dual_of(combination, asked["norm"])
    if math.isfinite(solution.upper_bound):
        upper = 0.5 * size**2 + solution.penalty * float(slack) if soft else size
        assert solution.upper_bound >= upper * (1 - 1e-9) - 1e-300
    if soft:
        assert float(duals.max(initial=0.0)) <= solution.penalty * (1 + 1e-12)
        lower = float(promise) - 0.5 * slope**2
    else:
        lower = float(promise) / slope if slope > 0 else 0.0
    assert solution.lower_bound <= lower * (1 + 1e-7) + 1e-300 or solution.lower_bound == 0.0
    crossing = float(crossing) if soft else float(crossing) / slope if slope > 0 else 0.0
    assert solution.lower_bound <= solution.upper_bound * (1 + 1e-9) + 2.0 * crossing


def norm_of(M: np.ndarray, norm: Any) -> float:
    M = M.astype(float)
    s = np.linalg.svd(M, compute_uv=False)
    return float(
        {"fro": np.linalg.norm(M), "nuc": s.sum(), "op": s.max()}.get(norm)
        or np.linalg.norm(M.ravel(), norm if not isinstance(norm, str) else 2)
    )


def dual_of(M: np.ndarray, norm: Any) -> float:
    dual = {"fro": "fro", "nuc": "op", "op": "nuc"}.get(norm)
    if dual is None:
        dual = math.inf if norm == 1 else 1.0 if norm == math.inf else norm / (norm - 1.0)
    return norm_of(M, dual)


def run(seeds: range) -> dict[Any, int]:
    """Solve, check, and count how they ended; "ordinary" are those of ordinary sizes, "settled" these with an end."""
    counts: dict[Any, int] = {}
    for seed in seeds:
        problem, asked, ordinary = random_problem(np.random.default_rng(seed))
        began = time.monotonic()
        solution = solve(problem, **asked, on_failure="ignore", max_seconds=LIMIT / 2)
        assert time.monotonic() - began < LIMIT, f"seed {seed}: no end"
        try:
            check(problem, asked, solution)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {asked}, {solution}: {error}") from error
        settled = ordinary and solution.status in (Status.OPTIMAL, Status.INFEASIBLE)
        for name, counted in ((solution.status, True), ("ordinary", ordinary), ("settled", settled)):
            counts[name] = counts.get(name, 0) + counted
    return counts


def test_random_problems() -> None:
    counts = run(range(200))
    assert counts[Status.OPTIMAL] > 100
    assert counts[Status.INFEASIBLE] > 10


def test_a_newton_step_without_rows() -> None:
    """A problem whose rows all leave the working set at once; found by the longer run."""
    run(range(7113, 7114))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(20))
def test_ten_thousand_random_problems(chunk: int) -> None:
    counts = run(range(1000 + 500 * chunk, 1500 + 500 * chunk))
    assert counts["settled"] >= 0.97 * counts["ordinary"]

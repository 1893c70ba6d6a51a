"""Verdicts, solutions and correlations of runs whose end is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from attsvm import TokenSelection, Trajectory, correlation, descend, solve
from attsvm.dynamics import ReLUHead
from attsvm.dynamics.verdict import Verdict, judge
from attsvm.errors import InvalidInputError
from attsvm.experiments.recipes.relu_descent import draw_relu_data
from attsvm.solvers import selected_from_probabilities
from attsvm.solvers.solution import Status

# "Max-Margin Token Selection in Attention Mechanism" (arXiv:2306.13596), local convergence: three tokens of one
# sequence. The second is beaten by the first alone, which lies beyond its margin.
TOKENS = np.array([[[-0.1, 1.0], [1.0, 0.0], [0.0, 0.0]]])
QUERY = np.array([[1.0, 0.0]])
SCORES = np.array([[1.0, 0.9, 0.0]])


def run_from(p: list[float], steps: int = 1000, scores: np.ndarray = SCORES) -> Trajectory:
    """With the query e_1 the first column of W is what the tokens meet."""
    start = np.zeros((2, 2))
    start[:, 0] = p
    return descend(TokenSelection(TOKENS, QUERY, [0]), scores, init=start, steps=steps)


@pytest.mark.parametrize(("y", "token"), [(1.0, 0), (0.5, 0), (0.0, 0), (-0.5, 0), (-1.0, 1), (-1.5, 1)])
def test_where_a_run_starts_decides_where_it_goes(y: float, token: int) -> None:
    run = run_from([0.0, y])
    assert run.selected.tolist() == [[token]]
    best = [[-0.1 / 1.01, 1.0 / 1.01], [1.0, 0.0]][token]
    np.testing.assert_allclose(run.solution().W[:, 0], best, atol=1e-6)
    assert run.correlation(run.solution())[-1] > 0.99
    verdict = run.verdict
    assert (verdict.kind, str(verdict)) == (("global", "global"), ("local", "local"))[token]
    assert verdict.locally_optimal is True
    assert verdict.fraction_globally_optimal == 1.0 - token
    assert run.verdicts == (verdict,)
    if token:
        assert verdict.reason == (
            "1 of 1 queries select another token than that of highest score, "
            "and every selected token outscores its support tokens."
        )


def test_a_start_that_was_left_alone_is_neither() -> None:
    """The third token scores lowest of all, and both others are its support tokens."""
    run = run_from([-10.0, -10.0], steps=0)
    assert run.selected.tolist() == [[2]]
    verdict = run.verdict
    assert (verdict.kind, verdict.locally_optimal, verdict.fraction_globally_optimal) == ("neither", False, 0.0)
    assert "2 support tokens score at least as high" in verdict.reason
    assert "not finished" not in verdict.reason
    assert "the selected tokens hold 3" in run_from([-0.05, -0.05], steps=0).verdict.reason  # a third each


def test_equal_scores_of_a_support_token_are_not_local_optimality() -> None:
    verdict = run_from([5.0, -5.0], steps=0, scores=np.array([[1.0, 0.5, 0.5]])).verdict
    assert (verdict.kind, verdict.locally_optimal) == ("neither", False)
    assert "1 support token scores at least as high" in verdict.reason


def test_ties_for_the_best_score_are_all_optimal() -> None:
    verdict = run_from([5.0, -5.0], steps=0, scores=np.array([[1.0, 1.0, 0.0]])).verdict
    assert (verdict.kind, verdict.fraction_globally_optimal) == ("global", 1.0)


def test_an_inseparable_selection_is_neither_even_if_optimal() -> None:
    line = TokenSelection([[[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]], [[1.0, 0.0]], [0])
    verdict = descend(line, [[1.0, 0.0, 0.0]], steps=0).verdict
    assert verdict == Verdict(
        kind="neither",
        reason="No key-query matrix separates the tokens that attention ended on.",
        fraction_globally_optimal=1.0,
        locally_optimal=None,
    )


def test_without_a_solution_nothing_is_said_of_local_optimality() -> None:
    run = run_from([0.0, -1.0])
    unknown = replace(run.solution(), status=Status.ITERATION_LIMIT, upper_bound=math.inf)
    verdict = judge(run.problem, run.scores, unknown, mass=1.0)
    assert (verdict.kind, verdict.locally_optimal) == ("neither", None)
    assert "there is no solution to judge it by" in verdict.reason
    best = judge(run.problem.with_selected([0]), run.scores, unknown, mass=1.0)
    assert (best.kind, best.locally_optimal) == ("global", None)


def test_queries_that_attend_to_nothing_are_not_counted() -> None:
    """One query of four is silent, one of the other three misses."""
    tokens, queries = np.repeat(TOKENS, 4, 0), np.repeat(QUERY, 4, 0)
    allowed = np.ones((4, 3), dtype=bool)[:, None].repeat(1, 1)
    both = TokenSelection(
        np.repeat(TOKENS, 2, 0),
        np.repeat(queries[None, :2], 2, 0),
        np.full((2, 2), -1),
        allowed=np.stack([allowed[:2, 0], np.array([[True] * 3, [False] * 3])]),
    )
    assert tokens.shape == (4, 3, 2)
    scores = np.array([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    verdict = descend(both, scores, init=np.array([[-1.0, 0.0], [9.0, 0.0]]), steps=0).verdict
    assert verdict.fraction_globally_optimal == pytest.approx(2 / 3)
    assert verdict.reason.startswith("1 of 3 queries select another token")


def test_the_solution_is_computed_once_for_each_norm() -> None:
    run = run_from([0.0, 1.0], steps=10)
    assert run.own_norm == "fro"
    first = run.solution(tol=1e-3)
    assert first is run.solution()
    assert first is run.solution("fro")
    assert first.norm == "fro"
    nuclear = run.solution("nuc")
    assert nuclear.norm == "nuc"
    assert nuclear is run.solution("nuc")
    assert run.verdict is run.verdict


def test_keys_and_queries_are_judged_in_the_nuclear_norm() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(3, 4))
    problem = TokenSelection.from_scores(rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 5)), scores)
    run = descend(problem, scores, parameterization="KQ", steps=500)
    assert run.own_norm == "nuc"
    assert run.solution().norm == "nuc"
    np.testing.assert_allclose(run.solution().W, solve(run.problem, "nuc").W, atol=1e-12)


def test_the_correlation_is_undefined_at_zero_and_a_cosine_elsewhere() -> None:
    run = run_from([0.0, 0.0], steps=50)
    W = run.solution().W
    values = run.correlation(run.solution())
    assert math.isnan(values[0])
    np.testing.assert_allclose(values[1:], [(V * W).sum() / np.linalg.norm(V) / np.linalg.norm(W) for V in run.W[1:]])
    np.testing.assert_array_equal(run.correlation(3.0 * W), values)
    assert values.shape == run.steps.shape


def test_a_batch_answers_in_tuples_one_for_each() -> None:
    starts = np.zeros((3, 2, 2))
    starts[:, :, 0] = [[0.0, 1.0], [0.0, -1.5], [1.0, 1.0]]
    problem = TokenSelection(np.stack([TOKENS] * 3), np.stack([QUERY] * 3), np.zeros((3, 1), dtype=int))
    run = descend(problem, np.stack([SCORES] * 3), init=starts, steps=400)
    kinds = [verdict.kind for verdict in run.verdict]
    assert kinds == ["global", "local", "global"]
    assert run.verdicts == run.verdict
    assert isinstance(run.solution(), tuple)
    values = run.correlation(run.solution())
    assert values.shape == (3, len(run.steps))
    for b, start in enumerate(starts):
        alone = descend(problem[b], SCORES, init=start, steps=400)
        np.testing.assert_allclose(values[b], alone.correlation(alone.solution()), atol=1e-9)
    for wrong in (run.solution()[0], run.solution()[:2], run.solution()[0].W):
        with pytest.raises(InvalidInputError, match="correlation: solution must be a tuple of 3 for this batch"):
            run.correlation(wrong)


def test_torch_in_is_torch_out_in_single_precision() -> None:
    problem = TokenSelection(torch.from_numpy(TOKENS).float(), torch.from_numpy(QUERY).float(), [0])
    run = descend(problem, torch.from_numpy(SCORES).float(), steps=500)
    for name in ("W", "loss", "norm", "attention_mass", "probabilities"):
        assert getattr(run, name).dtype == torch.float32, name
    assert run.selected.dtype == run.steps.dtype == torch.int64
    assert run.correlation(run.solution()).dtype == torch.float32
    # Trained in float64: only the record is rounded.
    exact = descend(TokenSelection(TOKENS, QUERY, [0]), SCORES.astype(np.float32), steps=500)
    narrow = TokenSelection(TOKENS.astype(np.float32).astype(float), QUERY, [0])
    exact = descend(narrow, SCORES.astype(np.float32), steps=500)
    np.testing.assert_array_equal(run.W.numpy(), exact.W.astype(np.float32))
    assert run.verdict.kind == "global"


def relu_run(chosen: slice | int) -> Trajectory:
    """Runs with a ReLU head, of which some keep several tokens."""
    draws = draw_relu_data(range(1, 41), n=3, T=4, d=6)
    X, Z, V, labels = (part[chosen] for part in (draws.tokens, draws.queries, draws.V, draws.labels))
    problem = TokenSelection(X, Z, torch.zeros(labels.shape, dtype=torch.int64))
    return descend(problem, head=ReLUHead(V), labels=labels, steps=1500, learning_rate=0.05)


def test_the_prediction_of_runs_that_keep_several_tokens() -> None:
    run = relu_run(slice(None))
    sets = selected_from_probabilities(run.probabilities)
    good = (~sets.ambiguous).flatten(1).all(-1) & ~sets.complete.flatten(1).all(-1)
    several = sets.selected.sum(-1).flatten(1).amax(-1) > 1
    chosen = (good & several).nonzero().flatten().tolist()
    assert len(chosen) >= 2
    for b in chosen[:2]:
        one = relu_run(b)
        found = one.prediction()
        np.testing.assert_allclose(found.correlation, float(correlation(found.W, one.W[-1])), atol=1e-9)
        assert found.correlation >= correlation(found.W_dir, one.W[-1]) - 1e-12


def test_a_prediction_needs_settled_sets() -> None:
    run = run_from([0.0, 1.0], steps=5)
    with pytest.raises(InvalidInputError, match="must have settled selected sets; no token is masked"):
        run.prediction()
    with pytest.raises(InvalidInputError, match=r"a probability lies between 1e-06 and 0\.9"):
        run.prediction(selected_above=0.9)


def test_a_prediction_of_one_token_is_the_solution() -> None:
    run = run_from([0.0, 1.0], steps=1000)
    np.testing.assert_allclose(run.prediction().correlation, run.correlation(run.solution())[-1], atol=1e-6)

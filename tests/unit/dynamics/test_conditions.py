"""The sufficient conditions, against formulas written out and cases known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attsvm import TokenSelection, solve
from attsvm.dynamics.conditions import (
    all_support,
    conditions,
    equal_scores,
    first_gradient,
    first_gradient_separates,
    overparameterised,
)
from attsvm.errors import InvalidInputError
from attsvm.experiments.recipes.draws import draw_unit_sphere


def gradient_by_autograd(problem: TokenSelection, scores: torch.Tensor, loss: str) -> torch.Tensor:
    """Of the loss as it is defined, at W = 0; one problem."""
    t, d = problem.tensors, problem.shape[-1]
    W = torch.zeros(d, d, dtype=torch.float64, requires_grad=True)
    logits = torch.einsum("ntd,de,nqe->nqt", t.tokens, W, t.queries)
    if t.offsets is not None:
        logits = logits + t.offsets
    s = torch.softmax(logits.masked_fill(~t.allowed, -math.inf), -1)
    f = (s * scores.masked_fill(~t.allowed, 0.0)).sum(-1)
    values = {"logistic": torch.nn.functional.softplus(-f), "exponential": torch.exp(-f), "correlation": -f}
    (values[loss].sum() / len(t.tokens)).backward()
    assert W.grad is not None
    return W.grad


@pytest.mark.parametrize("loss", ["logistic", "exponential", "correlation"])
def test_first_gradient_is_that_of_autograd(loss: str) -> None:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    queries = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    scores = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    allowed = torch.ones(3, 2, 5, dtype=torch.bool)
    allowed[0, :, 3:] = False
    offsets = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    problem = TokenSelection(tokens, queries, torch.zeros(3, 2, dtype=torch.int64), allowed=allowed, offsets=offsets)
    found = first_gradient(problem, scores, loss=loss)
    torch.testing.assert_close(found, gradient_by_autograd(problem, scores, loss), rtol=1e-12, atol=1e-14)


def test_smallest_margin_of_the_first_step() -> None:
    draws = draw_unit_sphere([0], n=4, T=6, d=8)
    problem, scores = draws.problem()[0], draws.scores[0]
    step = -gradient_by_autograd(problem, scores.unsqueeze(1), "logistic")
    expected = math.inf
    for i in range(4):
        best = int(scores[i].argmax())
        for t in set(range(6)) - {best}:
            margin = (draws.tokens[0, i, best] - draws.tokens[0, i, t]) @ step @ draws.queries[0, i]
            expected = min(expected, float(margin))
    assert first_gradient_separates(problem, scores) == pytest.approx(expected, rel=1e-10)


def test_a_batch_gives_what_its_members_give() -> None:
    draws = draw_unit_sphere(range(20), n=4, T=6, d=8)
    problem = draws.problem()
    together = first_gradient_separates(problem, draws.scores)
    alone = [first_gradient_separates(problem[b], draws.scores[b]) for b in range(20)]
    torch.testing.assert_close(together, torch.tensor(alone, dtype=torch.float64), rtol=0, atol=1e-14)
    assert {one > 0 for one in alone} == {True, False}
    supports = all_support(problem, solve(problem, on_failure="ignore"))
    assert supports.tolist() == [all_support(problem[b], solve(problem[b])) for b in range(20)]
    assert equal_scores(problem, draws.scores).tolist() == [False] * 20


def test_the_selection_of_the_problem_plays_no_part() -> None:
    draws = draw_unit_sphere([3], n=4, T=6, d=8)
    problem = draws.problem()[0]
    other = problem.with_selected(torch.zeros(4, dtype=torch.int64))
    assert first_gradient_separates(other, draws.scores[0]) == first_gradient_separates(problem, draws.scores[0])


def test_offsets_shape_the_gradient_but_are_not_part_of_the_margin() -> None:
    line = [[[1.0, 0.0], [0.0, 0.0]]]
    offset = TokenSelection(line, [[1.0, 0.0]], [0], offsets=[[0.0, math.log(3.0)]])
    # Softmax is (1/4, 3/4): gradient -(1/4)(3/4) on the one row of W, whatever the slope of 1.
    assert first_gradient_separates(offset, [[1.0, 0.0]], loss="correlation") == pytest.approx(3 / 16)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([3.0, 1.0, 1.0], True), ([3.0, 1.0, 1.0 + 1e-12], True), ([3.0, 1.0, 0.9], False), ([1.0, 1.0, 1.0], True)],
)
def test_equal_scores(scores: list[float], expected: bool) -> None:
    problem = TokenSelection(np.eye(3)[None], [[1.0, 0.0, 0.0]], [0])
    assert equal_scores(problem, [scores]) is expected


def test_masked_tokens_have_no_score() -> None:
    problem = TokenSelection(np.eye(3)[None], [[1.0, 0.0, 0.0]], [0], allowed=[[True, True, False]])
    assert equal_scores(problem, [[2.0, 1.0, 0.5]]) is True


def test_orthonormal_tokens_are_all_support_tokens() -> None:
    problem = TokenSelection(np.eye(4)[None], [[1.0, 0.0, 0.0, 0.0]], [0])
    assert all_support(problem, solve(problem)) is True
    # The third token lies behind the second as seen from the first: only the second is a support token.
    line = TokenSelection([[[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]], [[1.0, 0.0]], [0])
    assert all_support(line, solve(line)) is False
    assert all_support(line, np.zeros((2, 2))) is False


def test_dimension_that_is_enough() -> None:
    draws = draw_unit_sphere([0], n=4, T=6, d=5)
    assert overparameterised(draws.problem()) == (True, 5, 5)
    assert not overparameterised(draw_unit_sphere([0], n=4, T=6, d=4).problem())
    tokens = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    # Token 0 sees itself alone and asks nothing: 2 queries a sequence count.
    assert overparameterised(TokenSelection.sequence(tokens, torch.zeros(2, 3, dtype=torch.int64), causal=True)) == (
        True,
        6,
        4,
    )


def test_conditions_in_words() -> None:
    draws = draw_unit_sphere([0], n=1, T=4, d=4)
    problem = draws.problem()[0]
    found = conditions(problem, torch.tensor([[0.0, 1.0, 0.0, 0.0]]), solve(problem))
    assert found.first_gradient.holds == (first_gradient_separates(problem, [[0.0, 1.0, 0.0, 0.0]]) > 0)
    assert found.equal_scores.reason == "The tokens below the highest score of a query all score the same."
    assert found.overparameterised.reason.startswith("d = 4 >= 3 = max(T - 1, n)")
    assert "of the 3 tokens" in found.all_support.reason
    several = draw_unit_sphere([0], n=2, T=4, d=4).problem()[0]
    warned = conditions(several, torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 2), None)
    assert "does not decide where training goes" in warned.equal_scores.reason
    assert warned.all_support.holds is None
    with pytest.raises(InvalidInputError, match="single"):
        conditions(draws.problem(), draws.scores, None)


def test_unknown_loss_is_refused() -> None:
    problem = TokenSelection(np.eye(2)[None], [[1.0, 0.0]], [0])
    with pytest.raises(InvalidInputError, match="loss"):
        first_gradient_separates(problem, [[1.0, 0.0]], loss="hinge")

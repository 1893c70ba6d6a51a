"""The conditions that a verdict names. Kinds and reasons of verdicts are tested with the trajectory."""

from __future__ import annotations

import numpy as np
import torch

from attsvm import TokenSelection, solve
from attsvm.dynamics.conditions import first_gradient_separates
from attsvm.dynamics.verdict import judge
from attsvm.experiments.recipes.draws import draw_unit_sphere


def test_verdict_names_the_conditions() -> None:
    draws = draw_unit_sphere([1], n=3, T=4, d=5)
    problem, scores = draws.problem()[0], draws.scores[0].unsqueeze(1)
    verdict = judge(problem, scores, solve(problem), mass=1.0)
    assert verdict.kind == "global"
    assert verdict.conditions is not None
    assert verdict.conditions.overparameterised.holds is True
    assert verdict.conditions.first_gradient.holds == (first_gradient_separates(problem, scores) > 0)
    assert verdict.conditions.equal_scores.holds is False
    assert verdict.conditions.all_support.holds is not None


def test_the_first_gradient_is_that_of_the_loss() -> None:
    # Scores of 8 saturate the exponential loss: another sequence decides its first gradient.
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(50):
        tokens, queries = rng.standard_normal((2, 3, 3)), rng.standard_normal((2, 3))
        scores = torch.from_numpy(np.stack([[8.0, 6.0, 7.0], [0.5, -0.5, 0.0]])).unsqueeze(1)
        problem = TokenSelection(tokens, queries, [0, 0])
        solution = solve(problem, on_failure="ignore")
        pair = []
        for loss in ("correlation", "exponential"):
            verdict = judge(problem, scores, solution, mass=1.0, loss=loss)
            assert verdict.conditions is not None
            pair.append(verdict.conditions.first_gradient.holds)
        found.add(tuple(pair))
    assert found & {(True, False), (False, True)}


def test_an_inseparable_selection_has_no_support_tokens() -> None:
    line = TokenSelection([[[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]], [[1.0, 0.0]], [0])
    verdict = judge(line, torch.tensor([[[1.0, 0.0, 0.0]]]), solve(line, on_failure="ignore"), mass=1.0)
    assert verdict.kind == "neither"
    assert verdict.conditions is not None
    assert verdict.conditions.all_support.holds is None
    assert verdict.conditions.equal_scores.holds is True


def test_conditions_do_not_tell_verdicts_apart() -> None:
    draws = draw_unit_sphere([1], n=3, T=4, d=5)
    problem, scores = draws.problem()[0], draws.scores[0].unsqueeze(1)
    first = judge(problem, scores, solve(problem), mass=1.0)
    second = judge(problem, scores, solve(problem), mass=1.0, loss="correlation")
    assert first == second
    assert first.conditions != second.conditions

from __future__ import annotations

import torch

from attsvm.experiments.recipes.draws import draw_layer_init, draw_unit_sphere
from attsvm.experiments.recipes.published_step import published_descent
from attsvm.experiments.recipes.tfsvm_fig5 import RECIPE

from .trials import check_page, number, run_cases, same_alone


def test_ten_trials() -> None:
    records = run_cases(RECIPE, 10)
    summary = check_page(RECIPE, records)
    # The first ten trials are a little easier than the mean of all.
    for which, own in (("W", "W^mm"), ("KQ", "W^mm_*")):
        end = number(summary, f"training {which}: corr. with {own}, step 2000").ours
        assert end is not None
        assert 0.99 < end < 1.0
    assert all(record["feasible"] for record in records)


def test_a_trial_is_the_same_alone() -> None:
    for case in RECIPE.cases:
        same_alone(RECIPE, case, [2, 5])


def test_layers_start_as_linear_layers_do() -> None:
    (K, Q), (again, _) = draw_layer_init(range(200), d=9, count=2), draw_layer_init([7], d=9, count=2)
    assert K.shape == Q.shape == (200, 9, 9)
    torch.testing.assert_close(K[7], again[0], rtol=0, atol=0)
    assert 0.33 < float(K.abs().max()) <= 1 / 3
    torch.testing.assert_close(K.var(), torch.tensor(1 / 27, dtype=torch.float64), rtol=0.02, atol=0)
    assert abs(float((K * Q).mean())) < 1e-3


def test_published_step_is_the_published_update() -> None:
    """One step against autograd of the loss with the penalty, and division by the norm plus epsilon."""
    draws = draw_unit_sphere([4], n=3, T=4, d=5)
    epsilon = torch.finfo(torch.float64).eps
    start = draw_layer_init([4], d=5, count=2)
    run = published_descent(draws, start, record_steps=(0, 1))
    K, Q = (one[0].clone().requires_grad_() for one in start)
    s = torch.softmax(torch.einsum("ntd,nd->nt", draws.tokens[0], draws.queries[0] @ (K @ Q.mT).mT), -1)
    outputs = (s * draws.scores[0]).sum(-1)
    loss = torch.nn.functional.softplus(-outputs).mean() + epsilon * (K.square().sum() + Q.square().sum())
    loss.backward()
    moved = [one.detach() - 0.1 * one.grad / (one.grad.norm() + epsilon) for one in (K, Q)]
    torch.testing.assert_close(run.path[0, 1], moved[0] @ moved[1].mT, rtol=0, atol=1e-13)
    torch.testing.assert_close(run.mass[0, 0], s.detach().amax(-1).mean(), rtol=0, atol=1e-14)

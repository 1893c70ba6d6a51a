"""Runs whose course is known: closed forms, conserved quantities, and other integrators."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attsvm import TokenSelection, descend
from attsvm.dynamics import Adam, GradientFlow, LinearHead, MirrorDescent, Momentum, QuadraticHead


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sphere(n: int, T: int, d: int) -> tuple[TokenSelection, Tensor]:
    X, Z = (torch.nn.functional.normalize(normal(*shape, seed=7), dim=-1) for shape in ((n, T, d), (n, d)))
    scores = X @ torch.nn.functional.normalize(normal(d, seed=8), dim=-1)
    return TokenSelection.from_scores(X, Z, scores), scores


@pytest.mark.parametrize(("n", "T"), [(2, 4), (4, 3), (5, 6)])
@pytest.mark.parametrize("optimizer", ["gd", "ngd", "polyak", "flow"])
def test_orthonormal_tokens_are_followed_along_the_solution_at_every_step(n: int, T: int, optimizer: str) -> None:
    """All tokens orthonormal, equal scores but the best: W never leaves the ray of the max-margin solution."""
    X = torch.eye(n * T, dtype=torch.float64).reshape(n, T, n * T)
    scores = torch.zeros(n, T, dtype=torch.float64)
    scores[:, 1] = 1.0
    problem = TokenSelection.self_attention(X, [1] * n)
    rate = 1.0 if optimizer == "gd" else 0.1
    run = descend(problem, scores, optimizer=optimizer, learning_rate=rate, steps=100, record_every=10)
    assert (run.correlation(run.solution())[1:] > 1 - 1e-10).all()
    best = run.probabilities[:, 0, 1]
    if optimizer in ("ngd", "flow"):
        # ||W|| = 10 along a solution of norm sqrt(n (T - 1) / T), whose margins are 1.
        margin = 10.0 / math.sqrt(n * (T - 1) / T)
        expected = 1.0 / (1.0 + (T - 1) * math.exp(-margin))
        torch.testing.assert_close(best, torch.full_like(best, expected), rtol=1e-7, atol=0)
    if optimizer == "polyak":
        assert float(1 - best.min()) < 1e-12


def test_steps_of_polyak_have_the_published_length_far_beyond_float64() -> None:
    """One sequence, two tokens: with gap g and slope s the step is g / (2 s)."""
    problem = TokenSelection([[[1.0, 0.0], [0.0, 0.0]]], [[1.0, 0.0]], [0])
    for loss in ("logistic", "exponential", "correlation"):
        start = torch.zeros(2, 2, dtype=torch.float64)
        start[0, 0] = 2000.0
        run = descend(problem, [[1.0, 0.0]], loss=loss, optimizer="polyak", steps=3, init=start, record_every=1)
        # Softmax of (w, 0): the gap is -l'(1) exp(-w) and the slope l'(1) exp(-w), so every step is 1/2.
        torch.testing.assert_close(
            torch.as_tensor(run.W)[:, 0, 0] - 2000.0, torch.tensor([0.0, 0.5, 1.0, 1.5]).double()
        )


def test_mirror_descent_with_p_2_is_normalised_descent() -> None:
    problem, scores = sphere(4, 5, 6)
    start = normal(6, 6, seed=1)
    for normalised, plain in ((True, "ngd"), (False, "gd")):
        for steps in (60, 200):
            one = descend(problem, scores, optimizer=MirrorDescent(2, normalised), init=start, steps=steps)
            two = descend(problem, scores, optimizer=plain, init=start, steps=steps)
            torch.testing.assert_close(one.W, two.W, rtol=0, atol=1e-10)
    assert descend(problem, scores, optimizer=MirrorDescent(3), steps=1).own_norm == 3.0


def test_the_flow_conserves_what_the_factors_differ_by() -> None:
    problem, scores = sphere(3, 4, 5)
    K, Q = 0.5 * normal(5, 5, seed=2), 0.5 * normal(5, 5, seed=3)
    before = K.T @ K - Q.T @ Q
    errors = []
    for tol in (1e-6, 1e-9):
        run = descend(
            problem,
            scores,
            parameterization="KQ",
            optimizer=GradientFlow(tol),
            init=(K, Q),
            steps=30,
            learning_rate=0.5,
        )
        errors.append(float((run.K.T @ run.K - run.Q.T @ run.Q - before).abs().max()))
        assert float(run.norm[-1]) > 5
    assert errors[1] < 1e-8
    assert errors[1] < 0.05 * errors[0]


@pytest.mark.parametrize("parameterization", ["W", "KQ", "diagonal"])
def test_the_flow_is_the_limit_of_small_steps(parameterization: Any) -> None:
    """The time that the flow says it took, covered by plain descent in N steps, ends within O(1/N) of it."""
    problem, scores = sphere(3, 4, 5)
    init = normal(5, 5, seed=2)
    start: Any = {"W": init, "KQ": (init, normal(5, 5, seed=3)), "diagonal": (init[0], init[1])}[parameterization]
    shared: dict[str, Any] = {"parameterization": parameterization, "init": start, "record_every": 100_000}
    flow = descend(problem, scores, optimizer="flow", learning_rate=0.2, steps=5, **shared)
    assert not bool(torch.isneginf(torch.as_tensor(flow.log_time))[-1])
    time = float(flow.log_time[-1].exp())
    errors = []
    for N in (500, 5000):
        small = descend(problem, scores, optimizer="gd", learning_rate=time / N, steps=N, **shared)
        errors.append(float((small.W[-1] - flow.W[-1]).norm()))
    assert errors[1] < 1e-3 * float((flow.W[-1] - flow.W[0]).norm())
    assert errors[0] / errors[1] == pytest.approx(10.0, rel=0.05)


def test_the_flow_advances_its_arc_length_and_each_member_in_its_own_steps() -> None:
    X, Z, scores = normal(3, 2, 4, 5, seed=1), normal(3, 2, 5, seed=2), normal(3, 2, 4, seed=3)
    batch = TokenSelection.from_scores(X, Z, scores)
    run = descend(batch, scores, optimizer=GradientFlow(1e-9), learning_rate=0.25, steps=8, record_every=1)
    chords = torch.linalg.vector_norm(run.W[:, 1:] - run.W[:, :-1], dim=(-2, -1))
    assert (chords <= 0.25 * (1 + 1e-9)).all()
    assert (chords > 0.2).all()
    assert (run.loss.diff() < 0).all()
    for b in range(3):
        alone = descend(batch[b], scores[b], optimizer=GradientFlow(1e-9), learning_rate=0.25, steps=8, record_every=1)
        torch.testing.assert_close(run.W[b], alone.W, rtol=0, atol=1e-10)
        torch.testing.assert_close(run.log_time[b], alone.log_time, rtol=1e-10, atol=1e-10)


def test_the_flow_ends_where_the_gradient_does() -> None:
    """A quadratic head whose best mixture is inside the simplex: the curve is of finite length."""
    tokens = torch.eye(2, dtype=torch.float64)[None]
    problem = TokenSelection(tokens, torch.ones(1, 2, dtype=torch.float64), [0])
    head = QuadraticHead(torch.tensor([1.0, 0.5], dtype=torch.float64), 1.0)
    run = descend(problem, head=head, optimizer="flow", learning_rate=0.5, steps=8, init=torch.zeros(2, 2).double())
    assert run.stalled
    # The minimiser on the simplex is the projection of gamma / (2 penalty) = (0.5, 0.25): (0.625, 0.375).
    torch.testing.assert_close(run.probabilities[0, 0], torch.tensor([0.625, 0.375]).double(), rtol=0, atol=1e-6)


def test_adam_and_momentum_depend_on_no_scale_where_they_should_not() -> None:
    """With epsilon = 0 the steps of Adam go on where the gradient is exp(-10,000)."""
    problem, scores = sphere(3, 4, 2)
    W = normal(2, 2, seed=4)
    start = 1e6 * W / W.norm()
    still = descend(problem, scores, optimizer="adam", init=start, steps=5, record_every=1)
    moving = descend(problem, scores, optimizer=Adam(epsilon=0.0), init=start, steps=5, record_every=1)
    assert still.stalled
    assert not moving.stalled
    first = (moving.W[1] - moving.W[0]).abs()
    torch.testing.assert_close(first, torch.full_like(first, 0.1), rtol=0, atol=1e-8)
    assert descend(problem, scores, optimizer=Momentum(0.5), init=start, steps=3).stalled


def test_the_step_of_the_theory_meets_the_descent_lemma() -> None:
    X, Z, v = (torch.nn.functional.normalize(normal(*s, seed=5), dim=-1) for s in ((6, 8, 10), (6, 10), (10,)))
    problem = TokenSelection(X, Z, [0] * 6)
    labels = torch.tensor([1.0, -1.0] * 3, dtype=torch.float64)
    sizes = torch.linalg.matrix_norm(X, 2)
    L = float((Z.square().sum(-1) * sizes**3 * (0.25 * sizes + 3.0)).mean())
    shared: dict[str, Any] = {
        "head": LinearHead(v),
        "labels": labels,
        "optimizer": "gd",
        "steps": 20,
        "record_every": 1,
    }
    run = descend(problem, learning_rate="theory", **shared)
    same = descend(problem, learning_rate=1.0 / L, **shared)
    torch.testing.assert_close(run.W, same.W, rtol=1e-12, atol=1e-14)
    moves = (run.W[1:] - run.W[:-1]).square().sum((-2, -1))
    assert (run.loss.diff() <= -0.5 * L * moves + 1e-15).all()
    # From the scores alone the constant can only be smaller.
    scores = labels[:, None] * (X @ v)
    alone = descend(problem, scores, learning_rate="theory", optimizer="gd", steps=20, record_every=1)
    assert (alone.loss.diff() < 0).all()
    assert float(alone.norm[-1]) >= float(run.norm[-1])


def test_jointly_trained_head_and_prompt_reach_their_max_margin_directions() -> None:
    """arXiv:2306.13596, joint training, the tight case: p towards (4, 1) / sqrt(17).

    The values at 100 and 200 are those of an independent computation; later the plain gradient underflows.
    """
    tokens = [[[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, -1.0]], [[0.0, 0.0], [0.5, 1.0]]]
    problem = TokenSelection(tokens, [[1.0, 0.0]] * 3, [1, 1, 1])
    run = descend(
        problem,
        head=LinearHead([-1.0, 0.0], trained=True),
        labels=[1.0, -1.0, 1.0],
        parameterization="p",
        init=[0.0, -1.0],
        steps=1000,
        record_steps=[100, 200],
    )
    assert run.steps.tolist() == [100, 200, 1000]
    p = run.W[:, :, 0]
    directions = p / (p**2).sum(-1, keepdims=True) ** 0.5
    expected = [[0.978, 0.208], [0.974, 0.225]]
    assert torch.as_tensor(directions)[:2].sub(torch.tensor(expected)).abs().max() < 6e-4
    goal = torch.tensor([4.0, 1.0], dtype=torch.float64) / 17**0.5
    away = (torch.as_tensor(directions) - goal).norm(dim=-1)
    assert (away.diff() < 0).all()
    assert float(away[-1]) < 4e-3
    v = run.head[-1] / (run.head[-1] ** 2).sum() ** 0.5
    assert v[1] > 0.999


@pytest.mark.slow
def test_normalised_descent_never_freezes() -> None:
    """n=6 T=8 d=10 from W = 0: norms of 1000 and more, every run locally optimal, in torch and in compiled code."""
    from convergence.test_papers import stacked

    X, Z, scores = stacked(range(40), 6, 8, 10)
    run = descend(TokenSelection.from_scores(X, Z, scores), scores, steps=20_000, record_every=10_000)
    path = run.correlation(run.solution())
    assert float(path[:, -1].mean()) >= 0.9995
    assert round(float(path[:, -1].min()), 3) >= 0.988  # as published, to three digits
    assert float(run.norm[:, -1].mean()) == pytest.approx(1972, rel=0.01)
    assert all(verdict.locally_optimal for verdict in run.verdicts)

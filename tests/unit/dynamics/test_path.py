"""Regularisation paths: the published correlations, a general optimiser, the cone and its projection."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from attsvm import TokenSelection, correlation, solve
from attsvm.dynamics.cone import Cone, into_ball, into_nuclear_ball
from attsvm.dynamics.path import regularization_path
from attsvm.errors import InvalidInputError
from attsvm.experiments.recipes.draws import draw_unit_sphere


def small(seed: int, n: int = 2, T: int = 3, d: int = 3) -> tuple[TokenSelection, Tensor]:
    draws = draw_unit_sphere([seed], n=n, T=T, d=d)
    return draws.problem()[0], draws.scores[0]


def log_gap_by_formula(problem: TokenSelection, scores: Tensor, W: Tensor) -> Tensor:
    """Straight from the definition; only where the difference is far above rounding."""
    t = problem.tensors
    s = torch.softmax(torch.einsum("ntd,de,ne->nt", t.tokens, W, t.queries[:, 0]), -1)
    loss = torch.nn.functional.softplus(-(s * scores).sum(-1)).mean()
    return (loss - torch.nn.functional.softplus(-scores.amax(-1)).mean()).log()


@pytest.mark.parametrize("seed", [0, 3])
def test_no_general_optimiser_finds_a_better_matrix(seed: int) -> None:
    problem, scores = small(seed)
    R = 8.0
    path = regularization_path(problem, scores, [R], starts=12, steps=1500)
    torch.testing.assert_close(path.log_gap[0], log_gap_by_formula(problem, scores, path.W[0]), rtol=0, atol=1e-8)
    best = math.inf
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        V = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()
        optimiser = torch.optim.LBFGS([V], lr=0.5, max_iter=200, line_search_fn="strong_wolfe")

        def closure(V: Tensor = V, optimiser: torch.optim.LBFGS = optimiser) -> Tensor:
            optimiser.zero_grad()
            value = log_gap_by_formula(problem, scores, R * V / V.norm())
            value.backward()
            return value

        best = min(best, float(optimiser.step(closure).detach()), float(closure().detach()))
    assert float(path.log_gap[0]) <= best + 1e-4


def test_the_published_instance_turns_to_its_solution() -> None:
    draws = draw_unit_sphere([0], n=6, T=8, d=10)
    problem, scores = draws.problem()[0], draws.scores[0]
    path = regularization_path(problem, scores, [20.0, 40.0, 80.0, 160.0, 320.0], starts=4, steps=600)
    found = path.correlation(solve(problem, tol=1e-8))
    torch.testing.assert_close(
        found, torch.tensor([0.98483, 0.99441, 0.99811, 0.99942, 0.99982]).double(), rtol=0, atol=5e-4
    )
    torch.testing.assert_close(path.norm, path.radii)
    assert bool((path.selected[:, :, 0] == draws.optimal[0]).all())


def test_keys_and_queries_meet_the_nuclear_bound() -> None:
    draws = draw_unit_sphere([0], n=6, T=8, d=10)
    problem, scores = draws.problem()[0], draws.scores[0]
    path = regularization_path(problem, scores, [20.0, 40.0], parameterization="KQ", starts=4, steps=800)
    torch.testing.assert_close(path.norm, path.radii, rtol=1e-3, atol=0)
    found = path.correlation(solve(problem, "nuc", tol=1e-8))
    torch.testing.assert_close(found, torch.tensor([0.9605, 0.9815]).double(), rtol=0, atol=2e-3)


def test_a_batch_gives_what_each_problem_gives() -> None:
    draws = draw_unit_sphere([0, 1, 2], n=3, T=4, d=5)
    batch = regularization_path(draws.problem(), draws.scores, [5.0, 30.0], starts=3, steps=300)
    for b in range(3):
        alone = regularization_path(draws.problem()[b], draws.scores[b], [5.0, 30.0], starts=3, steps=300)
        torch.testing.assert_close(batch.W[b], alone.W, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(batch.log_gap[b], alone.log_gap, rtol=1e-9, atol=1e-9)


def test_numpy_in_numpy_out_and_offsets() -> None:
    problem, scores = small(1)
    t = problem.tensors
    X, Z, a = t.tokens.numpy(), t.queries[:, 0].numpy(), t.selected[:, 0].int().argmax(-1).numpy()
    offsets = np.full((2, 3), 0.7)
    plain = regularization_path(TokenSelection(X, Z, a), scores.numpy(), [4.0], steps=200)
    moved = regularization_path(TokenSelection(X, Z, a, offsets=offsets), scores.numpy(), [4.0], steps=200)
    assert isinstance(plain.W, np.ndarray)
    np.testing.assert_allclose(plain.W, moved.W, atol=1e-9)  # the same for all tokens of a query: no change


@pytest.fixture(scope="module")
def local() -> tuple[TokenSelection, Tensor]:
    """A selection that is locally optimal and not optimal: training with seed 3 ends on it."""
    from attsvm import descend

    draws = draw_unit_sphere(range(12), n=6, T=8, d=10)
    init = torch.randn(10, 10, generator=torch.Generator().manual_seed(0)).double() / 3.0
    run = descend(draws.problem(), draws.scores, steps=1500, init=init)
    b = next(b for b, verdict in enumerate(run.verdicts) if verdict.kind == "local")
    return draws.problem(run.selected[:, :, 0])[b], draws.scores[b]


@pytest.mark.parametrize(("which", "norm", "least"), [("W", "fro", 0.998), ("KQ", "nuc", 0.99)])
def test_the_path_in_a_cone_turns_to_the_solution_of_its_selection(
    local: tuple[TokenSelection, Tensor], which: str, norm: str, least: float
) -> None:
    problem, scores = local
    path = regularization_path(problem, scores, [40.0, 160.0], parameterization=which, cone="auto", starts=2, steps=400)
    towards = path.correlation(solve(problem, norm))
    assert float(towards[1]) > max(least, float(towards[0]))
    wanted = problem.tensors.selected[:, 0].int().argmax(-1)
    assert bool((path.selected[1, :, 0] == wanted).all())


def test_without_the_cone_the_path_leaves_the_selection(local: tuple[TokenSelection, Tensor]) -> None:
    problem, scores = local
    inside = regularization_path(problem, scores, [40.0], cone="auto", starts=2, steps=400)
    path = regularization_path(problem, scores, [40.0], starts=16, steps=400)
    assert float(path.log_gap[0]) < float(inside.log_gap[0]) - 0.1
    assert not bool((path.selected == inside.selected).all())


def test_the_balls() -> None:
    W = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.linalg.vector_norm(into_ball(W, 1.5), dim=(1, 2)).max() <= 1.5 + 1e-12
    inside = into_nuclear_ball(W, 2.0)
    torch.testing.assert_close(torch.linalg.svdvals(inside).sum(-1), torch.full((5,), 2.0).double())
    torch.testing.assert_close(into_nuclear_ball(0.01 * W, 2.0), 0.01 * W)


@pytest.mark.reference
@pytest.mark.parametrize("nuclear", [False, True])
def test_the_projection_is_the_nearest_point(local: tuple[TokenSelection, Tensor], nuclear: bool) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    problem, scores = local
    t = type(problem.tensors)(*(None if v is None else v.unsqueeze(0) if v.ndim else v for v in problem.tensors))
    found = solve(problem, "nuc" if nuclear else "fro")
    reach = torch.tensor([1.0 / found.upper_bound], dtype=torch.float64)
    centre = reach * found.W.unsqueeze(0)
    cone = Cone(t, scores.view(1, 6, 1, 8), t.queries, centre=centre, reach=reach, opening=None)
    W = 9.0 * centre - 4.0 * torch.randn(1, 10, 10, generator=torch.Generator().manual_seed(3)).double()
    ours = cone.project(W, 10.0, nuclear=nuclear)[0]
    V = cvxpy.Variable((10, 10))
    rows = cone.rows[0].numpy()
    held = rows @ cvxpy.vec(V, order="C") >= 10.0 * cone.need[0].clamp(min=-1.0).numpy()
    ball = cvxpy.norm(V, "nuc" if nuclear else "fro") <= 10.0
    cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(V - W[0].numpy())), [held, ball]).solve(
        solver=cvxpy.SCS if nuclear else cvxpy.CLARABEL, **({"eps": 1e-9} if nuclear else {})
    )
    distance = float((torch.from_numpy(V.value) - W[0]).norm())
    assert float((ours - W[0]).norm()) <= distance * (1 + 1e-4)
    assert bool(cone.holds(ours.unsqueeze(0), 10.0).all())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"radii": []}, "radii must be finite, > 0 and ascending, got \\[\\]"),
        ({"radii": [2.0, 1.0]}, "radii must be finite, > 0 and ascending"),
        ({"radii": [1.0, math.inf]}, "radii must be finite"),
        ({"parameterization": "V"}, 'parameterization must be "W" or "KQ", got \'V\''),
        ({"rank": 2}, 'rank must be None for parameterization="W"'),
        ({"rank": 0, "parameterization": "KQ"}, "rank must be an integer >= 1, got 0"),
        ({"starts": 0}, "starts must be an integer >= 1, got 0"),
        ({"steps": 1.5}, "steps must be an integer >= 1, got 1.5"),
        ({"cone": 0.0}, 'cone must be > 0 and finite, "auto" or None, got 0.0'),
        ({"loss": "hinge"}, "regularization_path: loss must be one of"),
    ],
)
def test_bad_arguments(given: dict[str, object], message: str) -> None:
    problem, scores = small(0)
    with pytest.raises(InvalidInputError, match=message):
        regularization_path(problem, scores, **{"radii": [1.0], **given})


def test_a_selection_that_is_not_locally_optimal_has_no_cone() -> None:
    X = [[[1.0, 0.0], [0.0, 0.0]]]
    with pytest.raises(InvalidInputError, match="A selection that is not locally optimal has no cone"):
        regularization_path(TokenSelection(X, [[1.0, 0.0]], [0]), [[0.0, 1.0]], [3.0], cone="auto")
    problem, scores = small(0)
    worst = TokenSelection(problem.tensors.tokens, problem.tensors.queries, scores.argmin(-1))
    with pytest.raises(InvalidInputError, match="cone must be at most"):
        regularization_path(worst, scores, [3.0], cone=5.0)


def test_correlation_of_a_path_with_a_matrix() -> None:
    problem, scores = small(0)
    path = regularization_path(problem, scores, [1.0, 3.0], steps=50)
    W = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(path.correlation(W), torch.as_tensor(correlation(path.W, W)))

"""Single-location regression: the closed risk against samples, its slopes, reduced dynamics against full ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from attsvm.dynamics.single_location import (
    SingleLocation,
    descend_on_spheres,
    population_risk,
    population_slopes,
    start_on_manifold,
    start_on_spheres,
)
from attsvm.dynamics.single_location_kernels import owen
from attsvm.errors import InvalidInputError

TASK = SingleLocation(d=8, L=4)


def products(k: np.ndarray, v: np.ndarray) -> list[float]:
    return [k @ v, v[0], k[0], k[1], v[1]]


def sequences(task: SingleLocation, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (*shape, L, d) with the informative one first, and answers, in all d dimensions."""
    X = torch.randn(*shape, task.L, task.d, generator=generator, dtype=torch.float64)
    X[..., 0, :] *= task.gamma
    X[..., 0, 0] += math.sqrt(task.d / 2)
    return X, X[..., 0, 1] + task.noise * torch.randn(shape, generator=generator, dtype=torch.float64)


def squared_error(X: Tensor, y: Tensor, k: Tensor, v: Tensor, sharpness: float) -> Tensor:
    return (y - (torch.erf(sharpness * (X @ k)) * (X @ v)).sum(-1)).square()


def test_risk_at_the_oracle_is_that_of_an_independent_computation() -> None:
    """arXiv:2410.01537: d=8, L=4, gamma^2=1/2, lambda=0.6 at k*, v*: 0.8475 with a standard error of 0.0014."""
    assert float(population_risk(TASK, [0, 0, 1, 0, 1], 0.6)) == pytest.approx(0.8475, abs=0.0042)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sharpness", [0.2, 0.6, 1.5])
def test_risk_against_samples(seed: int, sharpness: float, generator: torch.Generator) -> None:
    k, v = start_on_spheres(TASK, np.random.default_rng(seed))
    X, y = sequences(TASK, (100_000,), generator)
    errors = squared_error(X, y, torch.from_numpy(k), torch.from_numpy(v), sharpness)
    difference = float(errors.mean()) - float(population_risk(TASK, products(k, v), sharpness))
    assert abs(difference) < 4.5 * float(errors.std()) / math.sqrt(len(errors))


def test_owen_against_a_closed_form_and_a_fine_rule() -> None:
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for h in (0.0, 0.3, 1.0, 3.0, 6.0, 14.0):
        normal = 0.5 * math.erfc(-h / math.sqrt(2))
        assert owen(h, 1.0, nodes, weights) == pytest.approx(0.5 * normal * (1 - normal), abs=1e-15)
        for a in (0.2, 0.7):
            x = a * (np.arange(200_000) + 0.5) / 200_000  # midpoints: error a^3 |f''| / 24 N^2 < 1e-11
            fine = (np.exp(-0.5 * h * h * (1 + x * x)) / (1 + x * x)).mean() * a / (2 * math.pi)
            assert owen(h, a, nodes, weights) == pytest.approx(fine, abs=1e-11)


@pytest.mark.parametrize("sharpness", [0.1, 0.9])
def test_slopes_are_the_differences_of_the_risk(sharpness: float, rng: np.random.Generator) -> None:
    points = rng.uniform(-0.6, 0.6, (6, 5))
    for L in (1, 4, 10):
        task, step = SingleLocation(d=30, L=L, gamma=0.8), 1e-5
        found = population_slopes(task, points, sharpness)
        for i in range(5):
            shift = step * np.eye(5)[i]
            ahead, behind = (population_risk(task, points + sign * shift, sharpness) for sign in (1, -1))
            np.testing.assert_allclose(found[:, i], (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-7)


def test_reduced_descent_is_descent_in_all_dimensions() -> None:
    task = SingleLocation(d=12, L=5)
    k, v = start_on_spheres(task, np.random.default_rng(1))
    path = descend_on_spheres(task, k, v, sharpness=0.5, decay=1e-2, learning_rate=5e-3, steps=200, record_steps=[200])
    first, second = np.eye(task.d)[:2]
    for step in range(200):
        rho, theta, kappa, eta, nu = population_slopes(task, products(k, v), 0.5 / (1 + 1e-2 * step))
        moves = [(k, rho * v + kappa * first + eta * second), (v, rho * k + theta * first + nu * second)]
        k, v = (point - 5e-3 * (slope - (slope @ point) * point) for point, slope in moves)
        k, v = k / np.linalg.norm(k), v / np.linalg.norm(v)
    np.testing.assert_allclose(path.products[0, -1], products(k, v), rtol=0, atol=1e-12)
    assert path.sharpness[-1] == pytest.approx(0.5 / 3.0)


def test_reduced_sampling_has_the_law_of_full_sampling(generator: torch.Generator) -> None:
    """The mean and the second moments of the five products after two steps, from one start."""
    task, runs, rate, sharpness = SingleLocation(d=9, L=3, noise=0.3), 2000, 0.03, 0.7
    k0, v0 = start_on_spheres(task, np.random.default_rng(5))
    path = descend_on_spheres(
        task, [k0] * runs, [v0] * runs, sharpness=sharpness, learning_rate=rate, steps=2, batch=2, record_steps=[2]
    )
    k, v = (torch.from_numpy(np.repeat(start[None], runs, 0)) for start in (k0, v0))
    for _ in range(2):
        X, y = sequences(task, (runs, 2), generator)
        k.requires_grad_(), v.requires_grad_()
        output = torch.einsum("rbl,rbl->rb", torch.erf(sharpness * torch.einsum("rbld,rd->rbl", X, k)),
                              torch.einsum("rbld,rd->rbl", X, v))  # fmt: skip
        slopes = torch.autograd.grad((y - output).square().mean(1).sum(), (k, v))
        k, v = (
            torch.nn.functional.normalize(a - rate * (g - (g * a).sum(1, keepdim=True) * a), dim=1).detach()
            for a, g in ((k.detach(), slopes[0]), (v.detach(), slopes[1]))
        )
    full = torch.stack([(k * v).sum(1), v[:, 0], k[:, 0], k[:, 1], v[:, 1]], 1).numpy()
    ours = path.products[:, -1]
    assert full.std(0).min() > 0.02  # the steps are long enough to tell laws apart
    pairs = [(i, j) for i in range(5) for j in range(i, 5)]
    middle = full.mean(0)
    moments = [(ours, full)]
    moments += [
        tuple(np.stack([(a[:, i] - middle[i]) * (a[:, j] - middle[j]) for i, j in pairs], 1) for a in (ours, full))
    ]
    for one, other in moments:
        error = np.sqrt((one.var(0) + other.var(0)) / runs)
        assert np.abs((one.mean(0) - other.mean(0)) / error).max() < 4.5


@pytest.mark.parametrize("batch", [None, 3])
def test_a_run_is_the_same_alone_and_in_a_batch(batch: int | None) -> None:
    task = SingleLocation(d=20, noise=0.1)
    starts = [start_on_spheres(task, np.random.default_rng(seed)) for seed in range(3)]
    keys, values = (np.stack(part) for part in zip(*starts, strict=True))
    options = {"sharpness": 0.5, "learning_rate": 1e-3, "steps": 50, "batch": batch}
    together = descend_on_spheres(task, keys, values, seeds=[7, 8, 9], **options)
    alone = descend_on_spheres(task, keys[1], values[1], seeds=[8], **options)
    assert np.array_equal(together.products[1], alone.products[0])
    assert np.array_equal(together.risk[1], alone.risk[0])


def test_starts_on_the_manifold_stay_there_and_find_the_oracle() -> None:
    """arXiv:2410.01537: the manifold is invariant, and on it k and v turn to k* and v*."""
    task = SingleLocation(d=400)
    starts = [start_on_manifold(task, np.random.default_rng(seed)) for seed in range(5)]
    keys, values = (np.stack(part) for part in zip(*starts, strict=True))
    path = descend_on_spheres(task, keys, values, sharpness=0.1, learning_rate=4e-3, steps=20_000)
    assert path.distance.max() < 1e-12
    assert np.abs(path.kappa[:, -1]).min() > 0.98
    assert np.abs(path.nu[:, -1]).min() > 1 - 1e-6
    assert (path.kappa[:, -1] * path.nu[:, -1] > 0).all()
    assert (path.risk[:, -1] < 0.25 * task.linear_risk).all()


def test_linear_risk_is_that_of_least_squares(generator: torch.Generator) -> None:
    """The best weights of all coordinates of all tokens, when the place of the informative token is random."""
    task = SingleLocation(d=3, L=3)
    X, y = sequences(task, (200_000,), generator)
    order = torch.rand(len(X), task.L, generator=generator).argsort(1)
    flat = X.gather(1, order.unsqueeze(-1).expand(X.shape)).reshape(len(X), -1)
    flat = torch.cat([flat, torch.ones(len(X), 1, dtype=torch.float64)], 1)
    weights = torch.linalg.solve(flat.T @ flat, flat.T @ y)
    assert float((y - flat @ weights).square().mean()) == pytest.approx(task.linear_risk, rel=0.015)


def test_bad_input() -> None:
    k, v = np.eye(8)[0], np.eye(8)[1]
    good = {"sharpness": 0.5, "learning_rate": 0.1, "steps": 1}
    for change, message in [
        ({"sharpness": 0.0}, "sharpness must be > 0"),
        ({"learning_rate": math.inf}, "learning_rate must be > 0 and finite"),
        ({"decay": -1.0}, "decay must be >= 0"),
        ({"steps": -1}, "steps must be an integer >= 0"),
        ({"batch": 0}, "batch must be an integer >= 1"),
        ({"seeds": [1, 2]}, "one seed for each of the 1 runs"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            descend_on_spheres(TASK, k, v, **{**good, **change})
    with pytest.raises(InvalidInputError, match="finite and not 0"):
        descend_on_spheres(TASK, 0 * k, v, **good)
    with pytest.raises(InvalidInputError, match="d >= 6"):
        descend_on_spheres(SingleLocation(d=5), k[:5], v[:5], batch=1, **good)
    with pytest.raises(InvalidInputError, match="d must be >= 2"):
        SingleLocation(d=1)
    with pytest.raises(InvalidInputError, match=r"shape \(\.\.\., 5\)"):
        population_risk(TASK, [0.0, 1.0], 0.5)

"""The gradient that does not underflow, against autograd and against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from attsvm.dynamics.fit_head import fit_head, pool
from attsvm.dynamics.layer import Data, TokenStore, gradient
from attsvm.dynamics.losses import LOSSES
from attsvm.dynamics.optimizers import NormalisedDescent, Slopes
from attsvm.dynamics.parameters import initial_parameters, query_basis
from attsvm.errors import InvalidInputError

B, N, Q, T, D = 2, 3, 2, 5, 4


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def made(generator: torch.Generator, *, d: int = D) -> tuple[Data, Tensor, Tensor]:
    """Data with masks and offsets, its tokens, and its queries before any basis."""
    tokens, queries = normal(generator, B, N, T, d), normal(generator, B, N, Q, d)
    allowed = torch.rand(B, N, Q, T, generator=generator) < 0.7
    allowed[..., 0] = True
    allowed[0, 0, 0] = False  # a query that may attend to nothing
    active = allowed.any(-1)
    basis = query_basis(queries)
    data = Data(
        store=TokenStore(tokens, allowed),
        queries=queries if basis is None else queries @ basis.unsqueeze(1),
        allowed=allowed,
        active=active,
        offsets=normal(generator, B, N, Q, T),
        scores=normal(generator, B, N, Q, T),
    )
    return data, tokens, queries


def plain_loss(W: Tensor, data: Data, tokens: Tensor, queries: Tensor, name: str) -> Tensor:
    """The loss as the textbook writes it, one sum over all problems of the batch."""
    logits = torch.einsum("bntd,bde,bnqe->bnqt", tokens, W, queries) + data.offsets
    logits = logits.masked_fill(~data.allowed, -math.inf)
    attention = torch.softmax(torch.where(data.active[..., None], logits, torch.zeros(())), -1)
    output = (attention * data.scores).sum(-1)
    return (LOSSES[name].value(output) * data.active).sum() / N


@pytest.mark.parametrize("loss", ["logistic", "exponential", "correlation", "squared"])
@pytest.mark.parametrize("d", [D, 9])  # with d = 9 > n Q = 6 the queries are kept in a basis of their span
@pytest.mark.parametrize("parameterization", ["W", "KQ"])
def test_gradient_is_that_of_autograd(loss: str, d: int, parameterization: str, generator: torch.Generator) -> None:
    data, tokens, queries = made(generator, d=d)
    basis = query_basis(queries)
    assert (basis is not None) == (d == 9)
    rank = 3
    given = (
        normal(generator, B, d, d)
        if parameterization == "W"
        else (normal(generator, B, d, rank), normal(generator, B, d, rank))
    )
    parameters = initial_parameters(
        given,
        parameterization=parameterization,
        batch=B,
        d=d,
        rank=rank,
        basis=basis,
        generator=generator,
        device=torch.device("cpu"),
    )
    leaves = [part.clone().requires_grad_() for part in (given if isinstance(given, tuple) else (given,))]
    W = leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].mT
    value = plain_loss(W, data, tokens, queries, loss)
    value.backward()
    found = gradient(data, parameters.keys(data.queries), LOSSES[loss])
    torch.testing.assert_close(parameters.matrix(), W.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.loss.sum(), value.detach(), rtol=1e-12, atol=1e-14)
    slopes = [found.log_scale.exp().view(-1, 1, 1) * slope for slope in parameters.slopes(found, data.queries)]
    if basis is not None:
        slopes[-1] = slopes[-1] @ basis.mT if parameterization == "W" else basis @ slopes[-1]
    for slope, leaf in zip(slopes, leaves, strict=True):
        torch.testing.assert_close(slope, leaf.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("size", [30.0, 800.0, 3000.0])
def test_direction_does_not_underflow(size: float) -> None:
    """One token leads by ``size`` logits: all that is left of the gradient is a ratio that needs no exponential."""
    tokens = torch.tensor([[[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]]], dtype=torch.float64)
    scores = torch.tensor([[[[1.0, 0.25, -0.5]]]], dtype=torch.float64)
    allowed = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    data = Data(TokenStore(tokens, allowed), torch.ones(1, 1, 1, 1).double(), allowed, allowed.any(-1), None, scores)
    keys = torch.tensor([[[[size, 0.0]]]], dtype=torch.float64)
    found = gradient(data, keys, LOSSES["correlation"])
    # With s = exp(-size): weights / s -> (gamma_a - gamma_1) + (gamma_a - gamma_2) for a, gamma_t - gamma_a for t.
    own = Fraction(3, 4) + Fraction(3, 2)
    expected = torch.tensor([-float(own), 1.5], dtype=torch.float64)  # pooled = sum of weights x tokens, slope -1
    assert found.log_scale.item() == pytest.approx(-size, abs=1e-9)
    torch.testing.assert_close(found.pooled.flatten(), expected, rtol=1e-9, atol=1e-12)
    (change,) = NormalisedDescent().changes(Slopes((found.pooled.flatten(1, 2).mT,), (found.log_scale,)))
    assert torch.linalg.vector_norm(change).item() == pytest.approx(1.0)


def test_grouped_tokens_give_what_padded_ones_give(generator: torch.Generator) -> None:
    n, length, d = 40, 60, 600  # above the size at which tokens are kept in groups
    tokens = normal(generator, 1, n, length, d)
    lengths = torch.randint(3, length + 1, (n,), generator=generator)
    allowed = (torch.arange(length) < lengths[:, None])[None, :, None, :]
    tokens = tokens * allowed.squeeze(2)[..., None]
    store = TokenStore(tokens, allowed)
    assert len(store._groups) > 1
    keys, weights = normal(generator, 1, n, 1, d), normal(generator, 1, n, 1, length) * allowed
    torch.testing.assert_close(store.logits(keys) * allowed, torch.einsum("bntd,bnqd->bnqt", tokens, keys) * allowed)
    torch.testing.assert_close(store.pool(weights), torch.einsum("bnqt,bntd->bnqd", weights, tokens))


@pytest.mark.parametrize("name", list(LOSSES))
def test_slopes_are_the_derivatives(name: str) -> None:
    # Inside the domain of the log loss, and where the squared loss falls.
    ends = {"log": (0.2, 3.0), "squared": (-3.0, 0.9)}.get(name, (-3.0, 3.0))
    u = torch.linspace(*ends, 13, dtype=torch.float64)
    h = 1e-6
    numerical = (LOSSES[name].value(u + h) - LOSSES[name].value(u - h)) / (2 * h)
    torch.testing.assert_close(LOSSES[name].slope(u), numerical, rtol=1e-8, atol=1e-8)
    assert bool((LOSSES[name].slope(u) < 0).all())


def test_heads_are_stationary_points(generator: torch.Generator) -> None:
    P, Y = normal(generator, 12, 5), torch.sign(normal(generator, 12))
    penalty = P.square().sum() / 12 / 5 / 12**0.5
    for method, value in (
        ("ridge", lambda v: (P @ v - Y).square().mean()),
        ("logistic", lambda v: torch.nn.functional.softplus(-Y * (P @ v)).mean()),
    ):
        v = fit_head(P, Y, method=method).requires_grad_()
        (value(v) + penalty * v.square().sum()).backward()
        assert v.grad is not None
        assert float(v.grad.abs().max()) < 1e-9
    with pytest.raises(InvalidInputError, match="method must be one of ridge, logistic"):
        fit_head(P, Y, method="svm")


def test_pooling_ignores_masked_tokens() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    pooled = pool(tokens, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(pooled, torch.tensor([[2.0, 3.0]]))

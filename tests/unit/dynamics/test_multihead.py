"""Several heads: the gradient against autograd, one head against the engine, and members of a batch alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from attsvm import TokenSelection, correlation, descend, solve
from attsvm.dynamics.multihead import HeadsPath, descend_heads, heads_output
from attsvm.errors import AttSVMError, InvalidInputError

B, N, T, D, H = 3, 5, 4, 6, 3


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def made(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(generator, B, N, T, D), torch.where(torch.rand(B, N, generator=generator) < 0.5, -1.0, 1.0).double()


def textbook(X: Tensor, W: Tensor, U: Tensor, Z: Tensor) -> Tensor:
    """Outputs (n,) of one model, head by head."""
    total = torch.zeros(len(X), dtype=torch.float64)
    for W_h, U_h in zip(W, U, strict=True):
        attention = torch.softmax(Z @ W_h.T @ X.mT, -1)
        total = total + (U_h * (attention @ X)).sum((-2, -1))
    return total / math.sqrt(len(W))


@pytest.mark.parametrize("own_queries", [False, True])
@pytest.mark.parametrize("loss", ["logistic", "exponential", "squared"])
def test_steps_are_those_of_autograd(own_queries: bool, loss: str, generator: torch.Generator) -> None:
    X, Y = made(generator)
    queries = normal(generator, B, N, 2, D) if own_queries else None
    Z = X if queries is None else queries
    options = {"queries": queries, "heads": H, "loss": loss, "init_scale": 1.0, "seeds": [4, 5, 6]}
    start = descend_heads(X, Y, steps=0, **options)
    end = descend_heads(X, Y, steps=3, learning_rate=0.05, **options)
    value = {
        "logistic": lambda u: torch.log1p(torch.exp(-u)),
        "exponential": lambda u: torch.exp(-u),
        "squared": lambda u: (1 - u) ** 2,
    }[loss]
    for b in range(B):
        W, U = start.W[b].clone(), start.U[b].clone()
        for _ in range(3):
            W.requires_grad_(), U.requires_grad_()
            cost = value(Y[b] * textbook(X[b], W, U, Z[b])).mean()
            slopes = torch.autograd.grad(cost, (W, U))
            W, U = (W - 0.05 * slopes[0]).detach(), (U - 0.05 * slopes[1]).detach()
        torch.testing.assert_close(end.W[b], W, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(end.U[b], U, rtol=1e-10, atol=1e-12)
        output = textbook(X[b], W, U, Z[b])
        torch.testing.assert_close(end.loss[b, -1], value(Y[b] * output).mean(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(end.accuracy[b, -1], (Y[b] * output > 0).double().mean())
    found = heads_output(X, end.W, end.U, queries=queries)
    one = heads_output(X[0], end.W[0], end.U[0], queries=None if queries is None else queries[0])
    torch.testing.assert_close(found[0], one, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one, textbook(X[0], end.W[0], end.U[0], Z[0]), rtol=1e-10, atol=1e-12)


def test_one_head_with_a_fixed_readout_is_the_single_layer(generator: torch.Generator) -> None:
    X, Y = made(generator)
    Z, v = normal(generator, N, D), normal(generator, D)
    problem = TokenSelection(X[0], Z, torch.zeros(N, dtype=torch.int64))
    for optimizer in ("gd", "ngd"):
        options = {"optimizer": optimizer, "learning_rate": 0.1, "steps": 60}
        layer = descend(problem, (X[0] @ v) * Y[0].unsqueeze(-1), **options)
        heads = descend_heads(X[0], Y[0], heads=1, queries=Z.unsqueeze(1), readout=v, init_scale=0.0, **options)
        torch.testing.assert_close(heads.W[0], layer.W[-1], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(heads.loss[-1], layer.loss[-1], rtol=1e-9, atol=1e-10)
        assert torch.equal(heads.U[0, 0], v)


def test_each_head_with_a_fixed_readout_turns_to_the_svm(generator: torch.Generator) -> None:
    X = torch.nn.functional.normalize(normal(generator, 3, 4, 8), dim=-1)
    Z = torch.nn.functional.normalize(normal(generator, 3, 8), dim=-1)
    v, Y = normal(generator, 8), torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    scores = (X @ v) * Y.unsqueeze(-1)
    solution = solve(TokenSelection.from_scores(X, Z, scores))
    path = descend_heads(
        X, Y, heads=3, queries=Z.unsqueeze(1), readout=v, optimizer="ngd", learning_rate=0.05, steps=800, seeds=3
    )
    assert not torch.equal(path.W[0], path.W[1])
    for W in path.W:
        assert correlation(W, solution.W) > 0.98


@pytest.mark.parametrize("optimizer", ["gd", "ngd"])
def test_a_model_is_the_same_alone_and_in_a_batch(optimizer: str, generator: torch.Generator) -> None:
    X, Y = made(generator)
    test = made(generator)
    options = {"heads": 2, "steps": 200, "learning_rate": 0.1, "optimizer": optimizer}
    together = descend_heads(X, Y, seeds=[1, 2, 3], test=test, **options)
    alone = descend_heads(X[1], Y[1], seeds=2, test=(test[0][1], test[1][1]), **options)
    for name in ("W", "U", "loss", "accuracy", "test_loss", "test_accuracy"):
        torch.testing.assert_close(getattr(together, name)[1], getattr(alone, name), rtol=1e-10, atol=1e-10)


def test_kinds_shapes_and_records() -> None:
    X = np.random.default_rng(0).standard_normal((4, 3, 2)).astype(np.float32)
    path = descend_heads(X, np.array([1, -1, 1, -1]), heads=2, steps=7, record_steps=[0, 5, 99])
    assert isinstance(path, HeadsPath)
    assert path.steps.tolist() == [0, 5, 7]
    assert path.W.dtype == np.float32
    assert path.W.shape == (2, 2, 2)
    assert path.U.shape == (2, 3, 2)
    assert path.loss.shape == (3,)
    assert path.test_loss is None


def test_zero_start_keeps_heads_equal(generator: torch.Generator) -> None:
    X, Y = made(generator)
    path = descend_heads(X[0], Y[0], heads=2, init_scale=0.0, steps=20)
    assert torch.equal(path.W[0], path.W[1])
    assert float(path.W.abs().max()) > 0


def test_bad_input(generator: torch.Generator) -> None:
    X, Y = made(generator)
    for arguments, change, message in [
        ((X, Y), {"heads": 0}, "heads must be an integer >= 1"),
        ((X, Y), {"learning_rate": math.inf}, "learning_rate must be > 0 and finite"),
        ((X, Y), {"steps": -1}, "steps must be an integer >= 0"),
        ((X, Y), {"optimizer": "adam"}, "optimizer must be"),
        ((X, Y), {"init_scale": -1.0}, "init_scale must be >= 0"),
        ((X, Y), {"seeds": [1]}, "one seed for each of the 3 models"),
        ((X, Y), {"readout": torch.zeros(D + 1)}, "readout must have shape"),
        ((X, Y), {"test": (X,)}, "test must be"),
        ((X, 2 * Y), {}, "labels must be -1 and"),
        ((X / 0, Y), {}, "must be finite"),
        ((X[0, 0], Y), {}, "tokens must have shape"),
        ((X, Y), {"queries": X[0]}, "queries must have the shape"),
        ((X, Y), {"loss": "hinge"}, "loss must be one of"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            descend_heads(*arguments, **{"heads": 2, **change})


def test_divergence_is_an_error(generator: torch.Generator) -> None:
    X, Y = made(generator)
    with pytest.raises(AttSVMError, match="lower learning_rate"):
        descend_heads(X, Y, heads=2, loss="exponential", learning_rate=1e9, steps=50)

"""Stacked layers: the gradient against autograd and where it would lose its digits, and the problem of each layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attsvm import TokenSelection, descend, solve
from attsvm.dynamics.stack import StackLayer, _attend, descend_stack
from attsvm.errors import InvalidInputError

N, T, D = 3, 4, 6

VARIANTS = [(False, None), (True, None), (False, 7), (True, 7)]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def made(generator: torch.Generator, *lead: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.nn.functional.normalize(normal(generator, *lead, N, T, D), dim=-1)
    labels = torch.where(torch.rand(*lead, N, generator=generator) < 0.5, -1.0, 1.0).double()
    return tokens, labels, normal(generator, *lead, D)


def plain(X: Tensor, Z: Tensor, W: Tensor) -> Tensor:
    return torch.softmax(Z @ W.mT.unsqueeze(-3) @ X.mT, -1) @ X


def test_gradient_of_attention_is_that_of_autograd(generator: torch.Generator) -> None:
    X, Z, W = normal(generator, 2, N, T, D), normal(generator, 2, N, 2, D), normal(generator, 2, D, D)
    weights = normal(generator, 2, N, 2, D)
    for part in (X, Z, W):
        part.requires_grad_()
    torch.testing.assert_close(_attend(X, Z, W), plain(X, Z, W), rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad((f(X, Z, W) * weights).sum(), (X, Z, W)) for f in (_attend, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_gradient_keeps_its_digits_when_attention_saturates() -> None:
    """Two tokens with logits s and 0: the slope in W is that of the sigmoid, 1 / (4 cosh(s/2)^2), at any s."""
    X = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    Z = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    for s in (1.0, 30.0, 60.0, 300.0):
        W = torch.tensor([[s, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(_attend(X, Z, W)[0, 0, 0], W)
        exact = math.exp(-s) / (1.0 + math.exp(-s)) ** 2
        assert float(slope[0, 0].detach()) == pytest.approx(exact, rel=1e-12)
        assert float(slope[1, 0].detach()) == pytest.approx(-exact, rel=1e-12)


@pytest.mark.parametrize(("residual", "mlp"), VARIANTS)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_layers_at_the_end_fit_together(
    depth: int, residual: bool, mlp: int | None, generator: torch.Generator
) -> None:
    """The loss is that of the last layer's own tokens; each layer sees what the one below has made."""
    tokens, labels, v = made(generator)
    path = descend_stack(tokens, labels, v, depth=depth, residual=residual, mlp=mlp, steps=30, learning_rate=0.1)
    assert len(path.layers) == depth
    assert torch.equal(path.layers[0].tokens, tokens)
    last = path.layers[-1]
    assert last.queries.shape == (N, 1, D)
    output = plain(last.tokens, last.queries, last.W) + (last.queries if residual else 0.0)
    loss = torch.nn.functional.softplus(-labels * (output.squeeze(-2) @ v)).mean()
    torch.testing.assert_close(path.loss[-1], loss, rtol=1e-10, atol=1e-12)
    assert float(path.loss[-1]) < float(path.loss[0])
    for lower, upper in zip(path.layers, path.layers[1:], strict=False):
        made_below = plain(lower.tokens, lower.tokens, lower.W) + (lower.tokens if residual else 0.0)
        if mlp is None:
            torch.testing.assert_close(upper.tokens, made_below, rtol=1e-10, atol=1e-12)
        else:
            assert not torch.allclose(upper.tokens, made_below)


def test_a_step_is_normalised_for_each_matrix(generator: torch.Generator) -> None:
    tokens, labels, v = made(generator)
    start, end = (descend_stack(tokens, labels, v, depth=3, steps=steps, learning_rate=0.25) for steps in (0, 1))
    for before, after in zip(start.layers, end.layers, strict=True):
        assert float((after.W - before.W).norm()) == pytest.approx(0.25, rel=1e-12)


def test_one_layer_is_the_single_layer(generator: torch.Generator) -> None:
    tokens, labels, v = made(generator)
    start = descend_stack(tokens, labels, v, depth=1, steps=0)
    stack = descend_stack(tokens, labels, v, depth=1, steps=200, learning_rate=0.1)
    problem = TokenSelection(tokens, tokens[:, 0], torch.zeros(N, dtype=torch.int64))
    layer = descend(problem, (tokens @ v) * labels.unsqueeze(-1), init=start.layers[0].W, steps=200, learning_rate=0.1)
    torch.testing.assert_close(stack.layers[0].W, layer.W[-1], rtol=1e-8, atol=1e-8)
    assert stack.layers[0].selected.tolist() == layer.selected.tolist()


@pytest.mark.parametrize(("residual", "mlp"), VARIANTS)
def test_a_stack_is_the_same_alone_and_in_a_batch(residual: bool, mlp: int | None, generator: torch.Generator) -> None:
    tokens, labels, v = made(generator, 3)
    options = {"depth": 2, "residual": residual, "mlp": mlp, "steps": 60, "learning_rate": 0.1}
    together = descend_stack(tokens, labels, v, seeds=[3, 4, 5], **options)
    alone = descend_stack(tokens[1], labels[1], v[1], seeds=4, **options)
    torch.testing.assert_close(together.loss[1], alone.loss, rtol=1e-10, atol=1e-10)
    for one, other in zip(together.layers, alone.layers, strict=True):
        torch.testing.assert_close(one.W[1], other.W, rtol=1e-10, atol=1e-10)
        assert torch.equal(one.selected[1], other.selected)
        assert torch.equal(one.used[1], other.used)


def layer_of(tokens: list[list[float]], selected: list[int], used: list[bool]) -> StackLayer:
    X = torch.tensor([tokens], dtype=torch.float64)
    Q = len(selected)
    return StackLayer(
        W=torch.zeros(X.shape[-1], X.shape[-1], dtype=torch.float64),
        tokens=X,
        queries=X[:, :Q],
        probabilities=torch.nn.functional.one_hot(torch.tensor([selected]), X.shape[1]).double(),
        selected=torch.tensor([selected]),
        used=torch.tensor([used]),
    )


def test_problem_of_a_layer_merges_copies_and_drops_unused_queries() -> None:
    tokens = [[1.0, 0.0], [0.0, 1.0], [1.0, 1e-4], [-1.0, 0.5]]
    layer = layer_of(tokens, [2, 1, 2, 0], [True, False, True, False])
    assert layer.merged().tolist() == [[0, 1, 0, 3]]
    problem = layer.problem()
    # Token 2 became token 0: it asks nothing itself, and queries that selected it select token 0, which it equals.
    assert problem.selected.int().argmax(-1).tolist() == [[0, 1, 0, 0]]
    assert problem.selected.any(-1).tolist() == [[True, True, False, True]]
    assert problem.n_constraints == 2 + 3 + 2
    used = layer.problem(used_only=True)
    assert used.selected.any(-1).tolist() == [[True, False, False, False]]
    # A query in use that became a copy still asks, through the token that it became.
    other = layer_of(tokens, [2, 1, 2, 0], [False, False, True, False]).problem(used_only=True)
    assert other.selected.any(-1).tolist() == [[True, False, False, False]]
    assert solve(used).status.value == "optimal"


def test_used_queries_are_those_on_the_way_to_the_readout(generator: torch.Generator) -> None:
    tokens, labels, v = made(generator)
    for residual in (False, True):
        path = descend_stack(tokens, labels, v, depth=2, residual=residual, steps=400, learning_rate=0.1)
        lower, upper = path.layers
        assert upper.used.all()
        expected = upper.probabilities[:, 0] > 0.05
        if residual:
            expected[:, 0] = True
        assert torch.equal(lower.used, expected)


def test_bad_input(generator: torch.Generator) -> None:
    tokens, labels, v = made(generator)
    for arguments, change, message in [
        ((tokens, labels, v), {"depth": 0}, "depth must be an integer >= 1"),
        ((tokens, labels, v), {"mlp": 0}, "mlp must be an integer >= 1"),
        ((tokens, labels, v), {"learning_rate": 0.0}, "learning_rate must be > 0"),
        ((tokens, labels, v), {"steps": -1}, "steps must be an integer >= 0"),
        ((tokens, labels, v), {"init_scale": 0.0}, "init_scale must be > 0"),
        ((tokens, labels, v), {"seeds": [1, 2]}, "one seed for each of the 1 stacks"),
        ((tokens, 0 * labels, v), {}, "labels must be -1 and"),
        ((tokens, labels, v[:2]), {}, "v must have shape"),
        ((tokens / 0, labels, v), {}, "tokens must be finite"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            descend_stack(*arguments, **{"depth": 2, **change})

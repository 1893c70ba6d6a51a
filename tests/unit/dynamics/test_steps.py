"""Single steps of both optimisers in both parameterisations, against autograd and on what they leave alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attsvm import TokenSelection, descend
from attsvm.dynamics.arguments import find_optimizer
from attsvm.dynamics.losses import LOSSES
from attsvm.dynamics.optimizers import GradientDescent, NormalisedDescent, Slopes
from attsvm.errors import InvalidInputError

RATE = 0.05


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores_for(problem: TokenSelection) -> Tensor:
    return normal(*problem.tensors.allowed.shape, seed=9)


def causal(d: int) -> TokenSelection:
    tokens, lengths = normal(2, 5, d, seed=1), torch.tensor([[5], [3]])
    mask = torch.arange(5) < lengths
    nothing = torch.full((2, 5), -1)
    return TokenSelection.sequence(tokens, nothing, causal=True, mask=mask, offsets=normal(2, 5, 5, seed=2))


def ragged(d: int) -> TokenSelection:
    tokens = [normal(length, d, seed=length) for length in (6, 2, 1)]
    return TokenSelection(tokens, normal(3, d, seed=3), [0, 0, 0], offsets=normal(3, 6, seed=4))


def batch(d: int) -> TokenSelection:
    return TokenSelection(normal(3, 2, 4, d, seed=5), normal(3, 2, d, seed=6), torch.zeros(3, 2, dtype=torch.int64))


MAKERS = {maker.__name__: maker for maker in (causal, ragged, batch)}


def leaves(problem: TokenSelection, parameterization: str, rank: int) -> list[Tensor]:
    d, lead = problem.shape[-1], (len(problem),) if problem.is_batch else ()
    columns = [d] if parameterization == "W" else [rank, rank]
    return [normal(*lead, d, m, seed=20 + k).requires_grad_() for k, m in enumerate(columns)]


def textbook(problem: TokenSelection, scores: Tensor, W: Tensor, loss: str) -> Tensor:
    """The sum over the batch of the mean over sequences of the loss, token by token as it is defined."""
    t = problem.tensors
    logits = torch.einsum("...ntd,...de,...nqe->...nqt", t.tokens, W, t.queries)
    if t.offsets is not None:
        logits = logits + t.offsets
    total = torch.zeros((), dtype=torch.float64)
    for place in t.allowed.any(-1).nonzero():
        may = t.allowed[tuple(place)]
        attention = torch.softmax(logits[tuple(place)][may], 0)
        total = total + LOSSES[loss].value(attention @ scores[tuple(place)][may])
    return total / problem.shape[0]


@pytest.mark.parametrize("loss", ["logistic", "exponential", "correlation", "squared"])
@pytest.mark.parametrize("parameterization", ["W", "KQ"])
@pytest.mark.parametrize("d", [3, 14])  # with 14, the queries span less than the space
@pytest.mark.parametrize("maker", list(MAKERS))
@pytest.mark.parametrize("optimizer", ["gd", "ngd"])
def test_one_step_is_that_of_autograd(optimizer: str, maker: str, d: int, parameterization: Any, loss: str) -> None:
    problem = MAKERS[maker](d)
    scores, given = scores_for(problem), leaves(problem, parameterization, rank=2)
    W = given[0] if parameterization == "W" else given[0] @ given[1].mT
    value = textbook(problem, scores, W, loss)
    value.backward()
    expected = []
    for leaf in given:
        assert leaf.grad is not None
        size = torch.linalg.vector_norm(leaf.grad, dim=(-2, -1), keepdim=True)
        change = leaf.grad if optimizer == "gd" else leaf.grad / size
        expected.append(leaf.detach() - RATE * change)
    start = [leaf.detach() for leaf in given]
    run = descend(
        problem,
        scores,
        parameterization=parameterization,
        rank=None if parameterization == "W" else 2,
        loss=loss,
        optimizer=optimizer,
        learning_rate=RATE,
        steps=1,
        init=start[0] if parameterization == "W" else tuple(start),
    )
    torch.testing.assert_close(torch.as_tensor(run.loss)[..., 0].sum(), value.detach(), rtol=1e-13, atol=0)
    found = [run.W[..., -1, :, :]] if parameterization == "W" else [run.K, run.Q]
    for one, two, before in zip(found, expected, start, strict=True):
        # Relative to the change itself: the starting values would hide it.
        error = torch.linalg.vector_norm(one - two)
        assert float(error) < 1e-12 * float(torch.linalg.vector_norm(two - before)) + 1e-15 * float(before.norm())


@pytest.mark.parametrize("optimizer", ["gd", "ngd"])
def test_what_the_queries_do_not_see_stays_as_it_was(optimizer: str) -> None:
    problem = batch(14)
    W0 = normal(3, 14, 14, seed=7)
    run = descend(problem, scores_for(problem), init=W0, steps=200, optimizer=optimizer)
    basis = torch.linalg.qr(problem.tensors.queries.flatten(1, 2).mT)[0]
    rest = torch.eye(14, dtype=torch.float64) - basis @ basis.mT
    torch.testing.assert_close(run.W[:, -1] @ rest, W0 @ rest, rtol=0, atol=1e-12)
    assert float((run.W[:, -1] - W0).norm()) > 0.5
    both = descend(
        problem, scores_for(problem), parameterization="KQ", init=(W0, 2 * W0), steps=200, optimizer=optimizer
    )
    torch.testing.assert_close(rest @ both.Q, rest @ (2 * W0), rtol=0, atol=1e-12)
    torch.testing.assert_close(both.W[:, -1], both.K @ both.Q.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parameterization", ["W", "KQ"])
def test_loss_falls_with_plain_descent_at_a_small_rate(parameterization: Any) -> None:
    problem = ragged(4)
    run = descend(
        problem,
        scores_for(problem),
        parameterization=parameterization,
        init="normal",
        optimizer="gd",
        learning_rate=0.05,
        steps=300,
        record_every=1,
    )
    assert (np.diff(run.loss) < 0).all()


def test_starts_are_as_documented() -> None:
    problem = batch(14)
    scores = scores_for(problem)
    zeros = descend(problem, scores, steps=0)
    assert bool((zeros.W == 0).all())
    assert zeros.stalled.tolist() == [False] * 3
    # K = Q = 0 would never move: K starts small, Q at 0.
    pair = descend(problem, scores, parameterization="KQ", steps=0)
    assert bool((pair.Q == 0).all())
    assert float(pair.K.std()) == pytest.approx(0.01, rel=0.1)
    drawn = descend(problem, scores, parameterization="KQ", init="normal", rank=9, steps=0)
    assert drawn.K.shape == drawn.Q.shape == (3, 14, 9)
    assert float(drawn.K.std()) == pytest.approx(14**-0.5, rel=0.15)
    # The same start for every member of a batch; an array for all is an array for each.
    assert bool((drawn.K[:1] == drawn.K).all())
    W0 = normal(14, 14, seed=7)
    one, each = (descend(problem, scores, init=W, steps=3) for W in (W0, W0.expand(3, 14, 14)))
    torch.testing.assert_close(one.W, each.W, rtol=0, atol=0)
    torch.testing.assert_close(one.W[:, 0], W0.expand(3, 14, 14), rtol=0, atol=1e-14)


def test_a_query_that_may_attend_to_nothing_teaches_nothing() -> None:
    allowed = torch.ones(2, 2, 4, dtype=torch.bool)
    allowed[1, 1] = False
    tokens, queries, scores = normal(2, 4, 5, seed=1), normal(2, 2, 5, seed=2), normal(2, 2, 4, seed=3)
    runs = []
    for fill in (1.0, 1e6):
        changed = queries.clone()
        changed[1, 1] = fill
        problem = TokenSelection(tokens, changed, torch.full((2, 2), -1), allowed=allowed)
        runs.append(descend(problem, scores, steps=100))
    torch.testing.assert_close(runs[0].W, runs[1].W, rtol=0, atol=0)
    assert int(runs[0].selected[1, 1]) == -1
    assert bool((runs[0].selected.flatten()[:3] >= 0).all())
    assert bool((runs[0].probabilities[1, 1] == 0).all())
    assert float(runs[0].attention_mass[-1]) > 0.9  # the mean over the queries that attend


def test_masked_tokens_play_no_part() -> None:
    problem = ragged(4)
    scores = scores_for(problem)
    wild = torch.where(problem.tensors.allowed, scores, torch.full_like(scores, 1e9))
    one, two = descend(problem, scores, steps=50), descend(problem, wild, steps=50)
    torch.testing.assert_close(one.W, two.W, rtol=0, atol=0)
    assert bool((one.probabilities[~problem.tensors.allowed] == 0).all())


def test_sequences_of_one_token_leave_nothing_to_learn() -> None:
    problem = TokenSelection(normal(3, 1, 4, seed=1), normal(3, 4, seed=2), [0, 0, 0])
    run = descend(problem, normal(3, 1, seed=3), steps=5)
    assert run.stalled is True
    assert float(run.norm[-1]) == 0.0
    assert run.attention_mass.tolist() == [1.0] * len(run.steps)


def test_progress_is_told_every_20_steps_and_at_the_end() -> None:
    problem = ragged(4)
    told: list[tuple[int, int, float]] = []
    run = descend(problem, scores_for(problem), steps=45, progress=lambda *now: told.append(now))
    assert [(step, steps) for step, steps, _ in told] == [(0, 45), (20, 45), (40, 45), (45, 45)]
    assert told[0][2] == float(run.loss[0])
    assert told[-1][2] == float(run.loss[-1])


def test_normalised_steps_have_the_length_of_the_rate_at_any_scale() -> None:
    slope = normal(4, 3, 2, seed=1)
    scaled = slope * torch.tensor([1e-300, 1e-3, 1e300, 0.0], dtype=torch.float64).view(4, 1, 1)
    (change,) = NormalisedDescent().changes(Slopes((scaled,), (torch.tensor([0.0, -5000.0, 0.0, 0.0]),)))
    lengths = torch.linalg.vector_norm(change, dim=(-2, -1))
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    expected = slope[:3] / torch.linalg.vector_norm(slope[:3], dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(change[:3], expected)


def test_plain_steps_are_the_rate_times_the_gradient() -> None:
    slope = normal(2, 3, 2, seed=1)
    logs = torch.tensor([math.log(7.0), -2000.0], dtype=torch.float64)
    (change,) = GradientDescent().changes(Slopes((slope,), (logs,)))
    torch.testing.assert_close(change[0], 7.0 * slope[0])
    assert bool((change[1] == 0).all())


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"here: optimizer must be one of gd, ngd, .*, got 'lbfgs'"):
        find_optimizer("lbfgs", where="here")

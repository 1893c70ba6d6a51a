"""The compiled runs against the torch engine, step by step, and what makes them safe to batch and to cut."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attsvm.dynamics.compiled import LARGEST, Compiled, Outcome, compiled_pays
from attsvm.dynamics.flow import GradientFlow
from attsvm.dynamics.heads import Quadratic, ReLU
from attsvm.dynamics.layer import Data, TokenStore, gradient
from attsvm.dynamics.losses import LOSSES
from attsvm.dynamics.optimizers import (
    Adam,
    GradientDescent,
    MirrorDescent,
    Momentum,
    NormalisedDescent,
    Optimizer,
    Parts,
    Polyak,
    SignDescent,
    Slopes,
)
from attsvm.dynamics.parameters import Diagonal, Parameters

OPTIMIZERS: dict[str, Optimizer] = {
    "gd": GradientDescent(),
    "ngd": NormalisedDescent(),
    "polyak": Polyak(),
    "momentum": Momentum(beta=0.8),
    "adam": Adam(),
    "adam without epsilon": Adam(beta1=0.8, beta2=0.95, epsilon=0.0),
    "sign": SignDescent(),
    "mirror": MirrorDescent(p=3.0),
    "mirror p=1.5": MirrorDescent(p=1.5, normalised=False),
    "mirror p=2": MirrorDescent(p=2.0),
}
HEADS = ("fixed", "quadratic", "relu", "trained")
KINDS = ("W", "KQ", "diagonal")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """A batch of runs, for both engines."""

    def __init__(
        self,
        *,
        B: int = 3,
        n: int = 4,
        Q: int = 1,
        T: int = 5,
        d: int = 3,
        m: int = 2,
        kind: str = "W",
        head: str = "fixed",
        loss: str = "logistic",
        optimizer: str = "ngd",
        rate: float = 0.05,
        size: float = 0.3,
        masked: bool = False,
        offsets: bool = False,
        members: slice = slice(None),
    ) -> None:
        self.tokens = random(1, B, n, T, d)[members]
        queries = random(2, B, n, Q, d)[members]
        allowed = torch.ones(B, n, Q, T, dtype=torch.bool)
        if masked:
            allowed = random(3, B, n, Q, T) > -0.3
            allowed[:, 0, 0] = False  # a query with nothing allowed
            allowed[:, 1, 0] = False
            allowed[:, 1, 0, -1] = True  # and one with one token
        allowed = allowed[members]
        scores = random(4, B, n, Q, T)[members]
        labels = random(5, B, n, 1).sign().expand(B, n, Q)[members]
        if loss == "log":
            scores = scores.abs() + 0.1
        self.head, self.v = None, None
        if head == "quadratic":
            self.head = Quadratic(v=random(6, B, d)[members], penalty=0.2)
        elif head == "relu":
            self.head = ReLU(V=random(7, B, d, 5)[members])
        elif head == "trained":
            self.v = random(8, B, d)[members]
        self.data = Data(
            store=TokenStore(self.tokens, allowed),
            queries=queries,
            allowed=allowed,
            active=allowed.any(-1),
            offsets=random(9, B, n, Q, T)[members] if offsets else None,
            scores=scores if head == "fixed" else torch.zeros_like(scores),
            labels=labels,
        )
        self.attention: Any = {
            "W": Parameters(left=size * random(10, B, d, d)[members], right=None, basis=None, outside=torch.zeros(())),
            "KQ": Parameters(
                left=size * random(11, B, d, m)[members],
                right=size * random(12, B, d, m)[members],
                basis=None,
                outside=torch.zeros(()),
            ),
            "diagonal": Diagonal(left=size * random(13, B, d)[members], right=size * random(14, B, d)[members]),
        }[kind]
        self.loss, self.optimizer = loss, OPTIMIZERS[optimizer]
        self.rate = rate * torch.linspace(1.0, 1.5, B, dtype=torch.float64)[members]
        tensors: Parts = self.attention.tensors
        self.parts = tensors if self.v is None else (*tensors, self.v)
        self.state = self.optimizer.init(self.parts)

    def compiled(self) -> Compiled:
        options: dict[str, Any] = {"loss": self.loss, "optimizer": self.optimizer, "head": self.head, "v": self.v}
        assert compiled_pays(self.data, **options)
        return Compiled.ready(self.data, self.tokens, self.attention, rate=self.rate, **options)

    def evaluate(self, parts: Parts) -> tuple[Any, Slopes]:
        """The torch engine's gradient."""
        attention = self.attention.replaced(parts)
        v = None if self.v is None else parts[-1]
        gap = isinstance(self.optimizer, Polyak)
        keys = attention.keys(self.data.queries)
        g = gradient(self.data, keys, LOSSES[self.loss], head=self.head, v=v, gap=gap)
        values = attention.slopes(g, self.data.queries)
        logs = (g.log_scale,) * len(values)
        if g.head is not None and g.head_log is not None:
            values, logs = (*values, g.head), (*logs, g.head_log)
        return g, Slopes(values, logs, g.gap)

    def plain(self, steps: int) -> tuple[Parts, Parts, Any]:
        """The torch engine's steps, one after the other."""
        parts, state = self.parts, self.state
        for _ in range(steps):
            parts, state = self.optimizer.step(
                parts, self.evaluate(parts)[1], state, self.rate, lambda values: self.evaluate(values)[1]
            )
        return parts, state, self.evaluate(parts)[0]


def require_same(case: Case, steps: int = 200, tol: float = 1e-10) -> None:
    """Both engines agree on the parameters, relative to their change, and on what is measured at the end."""
    parts, _, g = case.plain(steps)
    outcome = case.compiled().advance(case.parts, case.state, steps)
    for ours, theirs, start in zip(outcome.parts, parts, case.parts, strict=True):
        change = torch.linalg.vector_norm((theirs - start).flatten(1), dim=-1)
        apart = torch.linalg.vector_norm((ours - theirs).flatten(1), dim=-1)
        assert bool(torch.isfinite(theirs).all())
        assert bool((apart <= tol * (change + torch.linalg.vector_norm(start.flatten(1), dim=-1))).all())
    torch.testing.assert_close(outcome.loss, g.loss, rtol=tol, atol=1e-14)
    torch.testing.assert_close(outcome.mass, g.mass, rtol=tol, atol=1e-14)
    active = case.data.active
    assert torch.equal(outcome.selected[active], g.selected[active])


def combinations() -> list[tuple[str, str, str, str]]:
    every = itertools.product(LOSSES, OPTIMIZERS, KINDS, HEADS)
    return [
        (loss, optimizer, kind, head)
        for loss, optimizer, kind, head in every
        # The logarithm is for outputs that are positive, Polyak's step for scores that are fixed.
        if (head == "fixed" or (loss != "log" and optimizer != "polyak"))
    ]


@pytest.mark.parametrize(("loss", "optimizer", "kind", "head"), combinations())
def test_each_combination_takes_the_steps_of_the_torch_engine(loss: str, optimizer: str, kind: str, head: str) -> None:
    # Few steps: the signs of slopes near 0, and the long steps of Polyak, tell roundings apart after some more.
    steps = {"sign": 10, "polyak": 2}.get(optimizer, 20)
    require_same(Case(loss=loss, optimizer=optimizer, kind=kind, head=head, rate=0.02), steps)


@pytest.mark.parametrize("optimizer", ["gd", "ngd", "momentum", "adam", "adam without epsilon", "mirror"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_steps(optimizer: str, kind: str) -> None:
    require_same(Case(optimizer=optimizer, kind=kind, rate=0.01), 200)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("Q", [1, 3])
def test_masks_offsets_and_several_queries(kind: str, head: str, Q: int) -> None:
    # Later, a run may turn around a minimum of the quadratic head, where roundings grow.
    require_same(Case(kind=kind, head=head, Q=Q, masked=True, offsets=True), 20)


@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 1},
        {"n": 1},
        {"n": 1, "T": 1, "d": 1},
        {"d": 1, "m": 1},
        {"T": 2, "d": 8},
        {"T": 9, "d": 17, "m": 9},
        {"n": 9, "Q": 2},
        {"B": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["ngd", "adam without epsilon"])
def test_other_sizes(sizes: dict[str, int], kind: str, optimizer: str) -> None:
    require_same(Case(kind=kind, optimizer=optimizer, **sizes), 30)


@pytest.mark.parametrize("optimizer", ["ngd", "momentum", "adam without epsilon", "mirror"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["logistic", "squared"])
def test_where_probabilities_underflow(optimizer: str, kind: str, loss: str) -> None:
    case = Case(optimizer=optimizer, kind=kind, loss=loss, size=500.0 if kind == "W" else 30.0, rate=1.0)
    _, slopes = case.evaluate(case.parts)
    assert float(slopes.logs[0].min()) < -300
    require_same(case, 30)


def test_a_slope_of_the_loss_that_underflows_is_no_end() -> None:
    # The head is trained until every output is large: the slopes of the loss leave the range of float64.
    case = Case(head="trained", loss="exponential", rate=1.0)
    case.parts = (*case.parts[:-1], 3000.0 * case.parts[-1])
    _, slopes = case.evaluate(case.parts)
    assert float(slopes.logs[-1].abs().min()) > 700
    require_same(case, 30)


def test_polyak_with_scores_of_exactly_one_and_the_squared_loss_goes_on() -> None:
    # The loss at the best scores is 0 and the distance from it is the square of what attention lacks.
    case = Case(optimizer="polyak", loss="squared", size=0.0, T=3, d=8)
    scores = torch.zeros_like(case.data.scores)
    scores[..., 0] = 1.0
    case.data = case.data._replace(scores=scores)
    losses = [case.compiled().advance(case.parts, case.state, steps).loss for steps in (0, 5, 20, 60, 200)]
    assert all(bool((after < before).all()) for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_member_gets_the_same_numbers_alone_in_a_batch_and_on_any_thread(
    optimizer: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = "fixed" if optimizer == "polyak" else "trained"
    steps = 5 if optimizer == "polyak" else 300
    options: dict[str, Any] = {"B": 5, "n": 6, "T": 8, "d": 10, "kind": kind, "head": head, "optimizer": optimizer}
    case = Case(**options)
    together = case.compiled()
    whole = together.advance(case.parts, case.state, steps)
    threaded = replace(together, threads=3)
    monkeypatch.setattr("attsvm.dynamics.compiled.SHARE", 1.0)
    assert len(threaded._shares(steps)) == 3
    require_identical(threaded.advance(case.parts, case.state, steps), whole, slice(None))
    monkeypatch.setattr("attsvm.dynamics.compiled.PATIENCE", 1.0)
    assert len(together._shares(steps)) == 5
    require_identical(together.advance(case.parts, case.state, steps), whole, slice(None))
    for b in range(5):
        alone = Case(members=slice(b, b + 1), **options)
        require_identical(alone.compiled().advance(alone.parts, alone.state, steps), whole, slice(b, b + 1))


def require_identical(one: Outcome, other: Outcome, members: slice) -> None:
    for ours, theirs in zip((*one.parts, *one.state), (*other.parts, *other.state), strict=True):
        assert torch.equal(ours.nan_to_num(), theirs[members].nan_to_num())
    for ours, theirs in zip(one[2:], other[2:], strict=True):
        assert torch.equal(ours.nan_to_num(), theirs[members].nan_to_num())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_may_be_cut_anywhere(optimizer: str, kind: str) -> None:
    head, steps = ("fixed", 4) if optimizer == "polyak" else ("trained", 60)
    case = Case(kind=kind, head=head, optimizer=optimizer)
    compiled = case.compiled()
    whole = compiled.advance(case.parts, case.state, steps)
    parts, state = case.parts, case.state
    for part in (1, 0, 2, steps - 3):
        last = compiled.advance(parts, state, part)
        parts, state = last.parts, last.state
    require_identical(last, whole, slice(None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_arguments_stay_as_they_are(kind: str, optimizer: str) -> None:
    case = Case(kind=kind, optimizer=optimizer)
    before = [tensor.clone() for tensor in (*case.parts, *case.state)]
    case.compiled().advance(case.parts, case.state, 3)
    for tensor, value in zip((*case.parts, *case.state), before, strict=True):
        assert torch.equal(tensor, value)


def test_it_says_which_members_moved() -> None:
    case = Case()
    scores = case.data.scores.clone()
    scores[1] = 1.0  # nothing to choose: no gradient
    case.data = case.data._replace(scores=scores)
    assert case.compiled().advance(case.parts, case.state, 10).moved.tolist() == [True, False, True]
    assert case.compiled().advance(case.parts, case.state, 0).moved.tolist() == [False] * 3


@pytest.mark.parametrize("kind", ["KQ", "diagonal"])
def test_a_run_that_diverges_says_so_and_leaves_the_others_alone(kind: str) -> None:
    case = Case(kind=kind, optimizer="gd")
    whole = case.compiled().advance(case.parts, case.state, 20)
    case.rate[1] = 1e300
    outcome = case.compiled().advance(case.parts, case.state, 20)
    finite = torch.stack([part.isfinite().flatten(1).all(-1) for part in outcome.parts]).all(0)
    assert finite.tolist() == [True, False, True]
    for ours, theirs in zip(outcome.parts, whole.parts, strict=True):
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])


def test_only_what_is_compiled_and_small_is_taken() -> None:
    def pays(case: Case, **other: Any) -> bool:
        told = {"loss": case.loss, "optimizer": case.optimizer, "head": case.head, "v": case.v}
        return compiled_pays(case.data, **(told | other))

    assert pays(Case())
    assert not pays(Case(n=LARGEST // 15 + 1))
    assert not pays(Case(), head=lambda x: (x.sum(-1), torch.ones_like(x)))
    assert not pays(Case(), loss="hinge")
    assert not pays(Case(head="quadratic", optimizer="polyak"))
    assert not pays(Case(), optimizer=GradientFlow())

"""``descend`` against a plain autograd loop in float64: every optimiser, parameterisation, head and loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attsvm import TokenSelection, Trajectory, descend
from attsvm.dynamics import LinearHead, MirrorDescent, QuadraticHead, ReLUHead

n, T, d, RATE = 3, 4, 5, 0.02


def steps_of(optimizer: str, parameterization: str, head: str) -> int:
    """How many steps the plain loop is a reference for.

    Polyak's step soon gets so far that the loop subtracts equal numbers. Mirror descent with p = 1.5 on (K, Q) and the
    quadratic head magnifies rounding: the loop itself, begun 2e-16 apart, ends up to 2e-8 apart after 50 steps.
    """
    if optimizer == "polyak":
        return 3
    return 20 if (optimizer, parameterization, head) == ("mirror 1.5", "KQ", "quadratic") else 50


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda u: torch.log1p(torch.exp(-u)),
    "exponential": lambda u: torch.exp(-u),
    "correlation": lambda u: -u,
    "squared": lambda u: (1.0 - u) ** 2,
    "log": lambda u: -torch.log(u),
}
PARAMETERIZATIONS = ("W", "KQ", "diagonal", "p")
HEADS = ("scores", "fixed", "trained", "quadratic", "relu", "callable")
OPTIMIZERS: dict[str, Any] = {
    "gd": "gd",
    "ngd": "ngd",
    "sign": "sign",
    "polyak": "polyak",
    "momentum": "momentum",
    "adam": "adam",
    "mirror 1.5": MirrorDescent(1.5),
    "mirror 3": MirrorDescent(3, normalised=False),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """One setting, and the loop that trains it the plain way."""

    def __init__(self, parameterization: str, head: str, loss: str) -> None:
        self.parameterization, self.head, self.loss = parameterization, head, loss
        self.X = normal(n, T, d, seed=1)
        # Outputs stay positive, as the log loss needs.
        self.X[..., 0] = 1.0 + self.X[..., 0].abs()
        self.Z = normal(n, d, seed=2)
        if parameterization == "p":
            self.Z = self.Z[:1].expand(n, d).clone()
        self.Y = torch.ones(n, dtype=torch.float64) if loss == "log" else torch.tensor([1.0, -1.0, 1.0]).double()
        self.v = 0.1 * normal(d, seed=3)
        self.v[0] = 1.0
        self.V = 0.3 * normal(d, 3, seed=4)
        self.V[0] = 0.5
        self.offsets = 0.3 * normal(n, 1, T, seed=5)
        W = 0.5 * normal(d, d, seed=6)
        self.start = {
            "W": (W,),
            "KQ": (W[:, :2].clone(), normal(d, 2, seed=7)),
            "diagonal": (W[0].clone(), normal(d, seed=7)),
            "p": (W[0].clone(),),
        }[parameterization]

    @property
    def scores(self) -> Tensor:
        return self.Y[:, None] * (self.X @ self.v)

    def matrix(self, leaves: list[Tensor]) -> Tensor:
        if self.parameterization == "KQ":
            return leaves[0] @ leaves[1].T
        if self.parameterization == "diagonal":
            return torch.diag(leaves[0] * leaves[1])
        if self.parameterization == "p":
            return torch.outer(leaves[0], self.Z[0]) / self.Z[0].square().sum()
        return leaves[0]

    def value(self, leaves: list[Tensor]) -> Tensor:
        keys = leaves[0].expand(n, d) if self.parameterization == "p" else self.Z @ self.matrix(leaves).T
        attention = torch.softmax(torch.einsum("ntd,nd->nt", self.X, keys) + self.offsets[:, 0], -1)
        x = torch.einsum("nt,ntd->nd", attention, self.X)
        h = {
            "scores": lambda: x @ self.v,
            "fixed": lambda: x @ self.v,
            "trained": lambda: x @ leaves[-1],
            "quadratic": lambda: x @ self.v - 0.05 * x.square().sum(-1),
            "relu": lambda: (x @ self.V).clamp(min=0).sum(-1),
            "callable": lambda: self.called(x),
        }[self.head]()
        return LOSSES[self.loss](self.Y * h).mean()

    def called(self, x: Tensor) -> Tensor:
        return 1.5 + torch.tanh(x @ self.v)

    def infimum(self) -> Tensor:
        return LOSSES[self.loss](self.scores.amax(-1)).mean()

    def loop(self, optimizer: str) -> tuple[list[float], list[Tensor]]:
        steps = steps_of(optimizer, self.parameterization, self.head)
        leaves = [part.clone().requires_grad_() for part in self.start]
        if self.head == "trained":
            leaves.append(self.v.clone().requires_grad_())
        theirs: torch.optim.Optimizer | None = None
        if optimizer == "adam":
            theirs = torch.optim.Adam(leaves, lr=RATE)
        if optimizer == "momentum":
            theirs = torch.optim.SGD(leaves, lr=RATE, momentum=0.9)
        losses = []
        for step in range(steps + 1):
            value = self.value(leaves)
            losses.append(float(value.detach()))
            if step == steps:
                break
            slopes = torch.autograd.grad(value, leaves)
            if theirs is not None:
                for leaf, slope in zip(leaves, slopes, strict=True):
                    leaf.grad = slope
                theirs.step()
                continue
            with torch.no_grad():
                for leaf, change in zip(leaves, self.changes(optimizer, leaves, slopes, value.detach()), strict=True):
                    leaf += change
        return losses, [leaf.detach() for leaf in leaves]

    def changes(self, optimizer: str, leaves: list[Tensor], slopes: tuple[Tensor, ...], value: Tensor) -> list[Tensor]:
        if optimizer == "polyak":
            square = sum(slope.square().sum() for slope in slopes)
            return [-(value - self.infimum()) / (2 * square) * slope for slope in slopes]
        if optimizer.startswith("mirror"):
            p = float(optimizer.split()[1])
            normalised = p == 1.5
            moved = []
            for leaf, slope in zip(leaves, slopes, strict=True):
                size = slope.abs().pow(p / (p - 1)).sum().pow((p - 1) / p) if normalised else 1.0
                mirror = leaf.sign() * leaf.abs().pow(p - 1) - RATE * slope / size
                moved.append(mirror.sign() * mirror.abs().pow(1 / (p - 1)) - leaf)
            return moved
        return [-RATE * {"gd": slope, "ngd": slope / slope.norm(), "sign": slope.sign()}[optimizer] for slope in slopes]

    def descend(self, optimizer: Any, **options: Any) -> Trajectory:
        head = {
            "scores": "linear",
            "fixed": LinearHead(self.v),
            "trained": LinearHead(self.v, trained=True),
            "quadratic": QuadraticHead(self.v, 0.05),
            "relu": ReLUHead(self.V),
            "callable": self.called,
        }[self.head]
        return descend(
            TokenSelection(self.X, self.Z, [0] * n, offsets=self.offsets),
            self.scores if self.head == "scores" else None,
            parameterization=self.parameterization,  # type: ignore[arg-type]
            rank=2 if self.parameterization == "KQ" else None,
            head=head,
            labels=None if self.head == "scores" else self.Y,
            loss=self.loss,
            optimizer=optimizer,
            init=self.start if len(self.start) == 2 else self.start[0],
            **{"learning_rate": RATE, "steps": 50, "record_every": 1, **options},
        )

    def compare(self, name: str) -> None:
        losses, leaves = self.loop(name)
        run = self.descend(OPTIMIZERS[name], steps=steps_of(name, self.parameterization, self.head))
        assert max(map(abs, losses)) < 1e3
        torch.testing.assert_close(run.loss, torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        scale = float(self.matrix(leaves).abs().max())
        torch.testing.assert_close(run.W[-1], self.matrix(leaves), rtol=1e-9, atol=1e-9 * scale)
        if self.head == "trained":
            torch.testing.assert_close(run.head[-1], leaves[-1], rtol=1e-9, atol=1e-9)
        if len(self.start) == 2:
            torch.testing.assert_close(run.K, leaves[0], rtol=1e-9, atol=1e-9 * scale)
            torch.testing.assert_close(run.Q, leaves[1], rtol=1e-9, atol=1e-9 * scale)


def possible(name: str, head: str, loss: str) -> bool:
    """Polyak's step needs the infimum of the loss."""
    return name != "polyak" or (head in ("scores", "fixed") and loss != "squared")


ALL = list(itertools.product(OPTIMIZERS, PARAMETERIZATIONS, HEADS))


@pytest.mark.parametrize(("name", "parameterization", "head"), ALL)
def test_a_run_is_that_of_a_plain_loop(name: str, parameterization: str, head: str) -> None:
    """One loss for each of the others; with -m slow all of them."""
    losses = list(LOSSES)
    first = ALL.index((name, parameterization, head)) % 5
    loss = next(
        loss for loss in losses[first:] + losses if possible(name, head, loss) or head not in ("scores", "fixed")
    )
    if possible(name, head, loss):
        Case(parameterization, head, loss).compare(name)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("name", "parameterization", "head"), ALL)
def test_all_runs_are_those_of_a_plain_loop(name: str, parameterization: str, head: str, loss: str) -> None:
    if possible(name, head, loss):
        Case(parameterization, head, loss).compare(name)

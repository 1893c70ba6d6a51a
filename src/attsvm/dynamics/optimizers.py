"""Steps on the trained tensors, given gradients with common factors ``exp(log)``.

All but the two plain ones (``GradientDescent``, ``Momentum``) never need those factors themselves, so that they go on
where the gradient has long left the range of float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError

__all__ = [
    "Adam",
    "Evaluate",
    "GradientDescent",
    "MirrorDescent",
    "Momentum",
    "NormalisedDescent",
    "Optimizer",
    "Parts",
    "Polyak",
    "SignDescent",
    "Slopes",
    "check_number",
    "per_member",
]

Parts: TypeAlias = tuple[Tensor, ...]
"""Tensors (B, …): the trained ones, or the state of an optimiser."""


class Slopes(NamedTuple):
    """Gradients: that of the k-th trained tensor is ``exp(logs[k]) * values[k]``."""

    values: Parts
    logs: Parts  # (B,) each
    gap: Tensor | None = None  # (B,): (loss - infimum) / exp(logs[0])


Evaluate: TypeAlias = Callable[[Parts], Slopes]
"""The gradients at other values of the trained tensors."""


class Optimizer(Protocol):
    """How the trained tensors move."""

    @property
    def turns(self) -> bool:
        """Whether the steps turn with the coordinates, so that W may be trained in any orthonormal basis."""

    def init(self, parts: Parts) -> Parts:
        """The state before the first step."""

    def step(self, parts: Parts, slopes: Slopes, state: Parts, rate: Tensor, evaluate: Evaluate) -> tuple[Parts, Parts]:
        """The tensors and the state after one step at the learning rates ``rate`` (B,)."""


def per_member(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) shaped to multiply ``like`` (B, …)."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def _top(value: Tensor) -> Tensor:
    """The largest entry (B,) of each member in size; 1 where all are 0."""
    top = value.abs().flatten(1).amax(-1)
    return torch.where(top > 0, top, torch.ones_like(top))


def _unit(value: Tensor, q: float = 2.0) -> Tensor:
    """Each member divided by its l_q norm; 0 stays 0."""
    # Dividing by the largest entry first keeps the powers inside the range of float64.
    scaled = value / per_member(_top(value), value)
    norm = torch.linalg.vector_norm(scaled.flatten(1), ord=q, dim=-1)
    return scaled / per_member(torch.where(norm > 0, norm, torch.ones_like(norm)), value)


def _plain(value: Tensor, log: Tensor) -> Tensor:
    return per_member(log.exp(), value) * value


@dataclass(frozen=True)
class _Stateless:
    """What optimisers without a memory share."""

    turns: bool = field(default=True, init=False, repr=False)

    def init(self, parts: Parts) -> Parts:
        """Nothing to remember."""
        return ()


@dataclass(frozen=True)
class _Separate(_Stateless, ABC):
    """Optimisers that change every tensor by its own slope alone."""

    def step(self, parts: Parts, slopes: Slopes, state: Parts, rate: Tensor, evaluate: Evaluate) -> tuple[Parts, Parts]:
        """Each tensor plus its own change."""
        changes = self.changes(slopes)
        moved = tuple(part - per_member(rate, part) * change for part, change in zip(parts, changes, strict=True))
        return moved, state

    @abstractmethod
    def changes(self, slopes: Slopes) -> Parts:
        """The changes of a step at rate -1."""


@dataclass(frozen=True)
class GradientDescent(_Separate):
    """``"gd"``: ``W - rate * gradient``; it stops where the gradient underflows."""

    def changes(self, slopes: Slopes) -> Parts:
        """The gradients."""
        return tuple(map(_plain, slopes.values, slopes.logs))


@dataclass(frozen=True)
class NormalisedDescent(_Separate):
    """``"ngd"``: ``W - rate * gradient / ||gradient||_F``, each trained tensor on its own."""

    def changes(self, slopes: Slopes) -> Parts:
        """The directions; the common factors drop out."""
        return tuple(_unit(value) for value in slopes.values)


@dataclass(frozen=True)
class SignDescent(_Separate):
    """``"sign"``: every entry moves by ``rate`` against the sign of its slope."""

    turns: bool = field(default=False, init=False, repr=False)

    def changes(self, slopes: Slopes) -> Parts:
        """The signs."""
        return tuple(value.sign() for value in slopes.values)


@dataclass(frozen=True)
class Polyak(_Stateless):
    r"""``"polyak"``: $W - \frac{L - L_*}{2 \|G\|^2} G$, with all trained tensors as one vector.

    $L_*$ is the mean loss at the best scores, the infimum for a fixed linear head. The learning rate plays no part.
    """

    def step(self, parts: Parts, slopes: Slopes, state: Parts, rate: Tensor, evaluate: Evaluate) -> tuple[Parts, Parts]:
        """One step of its own length."""
        assert slopes.gap is not None
        tops = torch.stack([_top(value) for value in slopes.values]).amax(0)
        scaled = tuple(value / per_member(tops, value) for value in slopes.values)
        square = torch.stack([value.square().flatten(1).sum(-1) for value in scaled]).sum(0)
        length = slopes.gap / tops / (2.0 * torch.where(square > 0, square, torch.ones_like(square)))
        moved = tuple(part - per_member(length, part) * value for part, value in zip(parts, scaled, strict=True))
        return moved, state


@dataclass(frozen=True)
class MirrorDescent(_Stateless):
    r"""Mirror descent with the potential $\frac1p \|W\|_{p,p}^p$.

    $U = \operatorname{sign}(W) |W|^{p-1} - \eta\, G$, then $W = \operatorname{sign}(U) |U|^{1/(p-1)}$, entrywise;
    normalised, G is divided by its $l_{p/(p-1)}$ norm. p = 2 is (normalised) gradient descent.

    Parameters
    ----------
    p
        > 1.
    normalised
        Whether G is divided by its norm; otherwise the steps end where the gradient underflows.

    References
    ----------
    Julistiono, Tarzanagh, Azizan. "Optimizing Attention with Mirror Descent", 2024. arXiv:2410.14581.
    """

    p: float = 2.0
    normalised: bool = True
    turns: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("MirrorDescent", "p", self.p, "> 1 and finite", lambda p: 1 < p < math.inf)

    def step(self, parts: Parts, slopes: Slopes, state: Parts, rate: Tensor, evaluate: Evaluate) -> tuple[Parts, Parts]:
        """One step in the mirror."""
        power = self.p - 1.0
        moved = []
        for part, value, log in zip(parts, slopes.values, slopes.logs, strict=True):
            change = _unit(value, self.p / power) if self.normalised else _plain(value, log)
            mirror = _signed_power(part, power) - per_member(rate, part) * change
            moved.append(_signed_power(mirror, 1.0 / power))
        return tuple(moved), state


def _signed_power(value: Tensor, power: float) -> Tensor:
    return value if power == 1.0 else value.sign() * value.abs().pow(power)


@dataclass(frozen=True)
class Momentum:
    """``"momentum"``: ``m = beta m + gradient``, ``W - rate * m``, as ``torch.optim.SGD``.

    Parameters
    ----------
    beta
        In [0, 1).
    """

    beta: float = 0.9
    turns: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("Momentum", "beta", self.beta, "in [0, 1)", lambda beta: 0 <= beta < 1)

    def init(self, parts: Parts) -> Parts:
        """For each tensor the mean of its gradients, and the logarithm of the scale that it is kept in."""
        return tuple(state for part in parts for state in (torch.zeros_like(part), _no_scale(part)))

    def step(self, parts: Parts, slopes: Slopes, state: Parts, rate: Tensor, evaluate: Evaluate) -> tuple[Parts, Parts]:
        """One step."""
        moved, after = [], []
        for k, (part, value, log) in enumerate(zip(parts, slopes.values, slopes.logs, strict=True)):
            m, scale = state[2 * k : 2 * k + 2]
            together = torch.maximum(log, scale)
            m = self.beta * _plain(m, scale - together) + _plain(value, log - together)
            top = _top(m)
            m, scale = m / per_member(top, m), together + top.log()
            moved.append(part - per_member(rate * scale.exp(), part) * m)
            after += [m, scale]
        return tuple(moved), tuple(after)


@dataclass(frozen=True)
class Adam:
    """``"adam"``, as ``torch.optim.Adam``.

    Parameters
    ----------
    beta1, beta2
        In [0, 1): memories of the mean and of the mean square of the gradient.
    epsilon
        >= 0, added to the root of the mean square. Gradients far below it move nothing; with 0 the steps depend on no
        scale, and an entry whose slope was always 0 stays.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    turns: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            check_number("Adam", name, getattr(self, name), "in [0, 1)", lambda beta: 0 <= beta < 1)
        check_number("Adam", "epsilon", self.epsilon, ">= 0 and finite", lambda value: 0 <= value < math.inf)

    def init(self, parts: Parts) -> Parts:
        """The number of steps, and for each tensor mean, mean square and the logarithm of their scale."""
        state = [torch.zeros(len(parts[0]), dtype=torch.float64, device=parts[0].device)]
        for part in parts:
            state += [torch.zeros_like(part), torch.zeros_like(part), _no_scale(part)]
        return tuple(state)

    def step(self, parts: Parts, slopes: Slopes, state: Parts, rate: Tensor, evaluate: Evaluate) -> tuple[Parts, Parts]:
        """One step."""
        count = state[0] + 1.0
        moved, after = [], [count]
        correct1, correct2 = 1.0 - self.beta1**count, 1.0 - self.beta2**count
        for k, (part, value, log) in enumerate(zip(parts, slopes.values, slopes.logs, strict=True)):
            m, square, scale = state[3 * k + 1 : 3 * k + 4]
            together = torch.maximum(log, scale)
            new = _plain(value, log - together)
            m = self.beta1 * _plain(m, scale - together) + (1.0 - self.beta1) * new
            square = self.beta2 * _plain(square, 2.0 * (scale - together)) + (1.0 - self.beta2) * new.square()
            top = _top(square)
            m, square = m / per_member(top.sqrt(), m), square / per_member(top, square)
            scale = together + 0.5 * top.log()
            moved.append(part - per_member(rate, part) * self._change(m, square, scale, correct1, correct2))
            after += [m, square, scale]
        return tuple(moved), tuple(after)

    def _change(self, m: Tensor, square: Tensor, scale: Tensor, correct1: Tensor, correct2: Tensor) -> Tensor:
        floor = self.epsilon * torch.exp(-scale) if self.epsilon > 0 else torch.zeros_like(scale)
        below = (square / per_member(correct2, square)).sqrt() + per_member(floor, square)
        return (m / per_member(correct1, m)) / torch.where(below > 0, below, torch.full_like(below, math.inf))


def _no_scale(part: Tensor) -> Tensor:
    """The scale (B,) of a state that holds nothing yet: its logarithm is that of the smallest number."""
    return torch.full((len(part),), -1e300, dtype=torch.float64, device=part.device)


def check_number(owner: str, name: str, value: Any, must: str, holds: Callable[[float], bool]) -> None:
    """Refuse a parameter that is not a number for which ``holds``."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and holds(float(value))
    if not good:
        raise InvalidInputError(f"{owner}: {name} must be {must}, got {value!r}.")

r"""Gradient flow, followed along its curve.

$\dot W = -\nabla L(W)$ slows down exponentially as the norm of W grows, but where it goes does not depend on how fast:
$dW/ds = -\nabla L / \|\nabla L\|$ draws the same curve at unit speed, with all trained tensors as one vector, and the
time of the flow is $dt/ds = 1 / \|\nabla L\|$, kept as a logarithm. Steps are those of Dormand and Prince (5th order,
with an error estimate of 4th), each member of a batch with its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attsvm.dynamics.optimizers import Evaluate, Parts, Slopes, check_number, per_member

__all__ = ["GradientFlow"]

STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""The last row holds the weights of the step itself."""

WEIGHTS = (*STAGES[-1], 0.0)
OTHER = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
ERROR = tuple(a - b for a, b in zip(WEIGHTS, OTHER, strict=True))

SMALLEST = 1e-10
"""A step this small a part of the whole has met the end of the curve, a point where the gradient is 0."""


STRAIGHT = 0.5
"""Least cosine of the directions at the two ends of a step."""


@dataclass(frozen=True)
class GradientFlow:
    """``"flow"``: the curve of gradient flow; a step advances its arc length by the learning rate.

    Parameters
    ----------
    tol
        Error of a step of the integrator, relative to the norm of the trained tensors (1 where that is smaller).
    """

    tol: float = 1e-8
    turns: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("GradientFlow", "tol", self.tol, "in (0, 0.1]", lambda tol: 0 < tol <= 0.1)

    def init(self, parts: Parts) -> Parts:
        """The logarithm of the time, and the next step as a part of the learning rate, (B,) each."""
        zero = torch.zeros(len(parts[0]), dtype=torch.float64, device=parts[0].device)
        return zero - math.inf, zero + 0.1

    def step(self, parts: Parts, slopes: Slopes, state: Parts, rate: Tensor, evaluate: Evaluate) -> tuple[Parts, Parts]:
        """Advance every member by its ``rate`` of arc length."""
        log_time, part_of_rate = state
        left, h = rate.clone(), part_of_rate * rate
        first = _direction(slopes)
        while True:
            # A direction of length 0: the curve ends here, and so does a member whose steps shrink to nothing.
            ended = (first[1] == -math.inf) | (h < SMALLEST * rate)
            going = (left > 0) & ~ended
            if not bool(going.any()):
                return parts, (log_time, torch.where(ended, torch.zeros_like(h), h / rate))
            used = torch.where(going, torch.minimum(h, left), torch.zeros_like(h))
            moved, last, time, error = self._try(parts, first, used, evaluate)
            accepted = going & (error <= 1.0)
            parts = tuple(_where(accepted, new, old) for new, old in zip(moved, parts, strict=True))
            first = (
                tuple(_where(accepted, new, old) for new, old in zip(last[0], first[0], strict=True)),
                torch.where(accepted, last[1], first[1]),
            )
            log_time = torch.where(accepted, torch.logaddexp(log_time, time), log_time)
            # What is left to rounding is nothing.
            after = torch.where(left - used <= 1e-14 * rate, torch.zeros_like(left), left - used)
            left = torch.where(accepted, after, left)
            factor = (0.9 * error.clamp(min=1e-10) ** -0.2).clamp(0.2, 5.0)
            # A step cut short by the end of the interval says nothing against the longer one.
            grown = torch.where(used < h, torch.maximum(h, used * factor), used * factor)
            h = torch.where(going, torch.where(accepted, grown, used * factor), h)

    def _try(
        self, parts: Parts, first: tuple[Parts, Tensor], h: Tensor, evaluate: Evaluate
    ) -> tuple[Parts, tuple[Parts, Tensor], Tensor, Tensor]:
        """The end of a step, the direction there, the logarithm of its time, and its error in tolerances."""
        stages = [first]
        moved = parts
        for row in STAGES:
            moved = tuple(
                part + per_member(h, part) * _weighted([stage[0][k] for stage in stages], row)
                for k, part in enumerate(parts)
            )
            stages.append(_direction(evaluate(moved)))
        errors = [_weighted([stage[0][k] for stage in stages], ERROR) for k in range(len(parts))]
        size = torch.maximum(_norm(moved), torch.ones_like(h))
        slow = torch.stack([-stage[1] for stage in stages])  # log dt/ds
        most = slow.amax(0)
        most = torch.where(torch.isfinite(most), most, torch.zeros_like(most))
        speeds = list(torch.exp(slow - most))
        whole = _weighted(speeds, WEIGHTS)
        drift = (_weighted(speeds, ERROR) / whole).abs()
        error = torch.maximum(h * _norm(tuple(errors)) / size, torch.where(h > 0, drift * h, drift * 0.0)) / self.tol
        # A step that leaves the range of float64 is too long, and so is one that turns: it has crossed the end of the
        # curve, about which short steps, which are all within the tolerance, would go to and fro for ever.
        turn = torch.stack([(a * b).flatten(1).sum(-1) for a, b in zip(first[0], stages[-1][0], strict=True)]).sum(0)
        good = torch.isfinite(error) & (whole > 0) & (turn > STRAIGHT)
        error = torch.where(good, error, torch.full_like(error, 1e10))
        return moved, stages[-1], h.log() + most + whole.clamp(min=0.0).log(), error


def _direction(slopes: Slopes) -> tuple[Parts, Tensor]:
    """The direction of descent, of length 1 over all tensors together, and log of the norm (B,) of the gradient."""
    shared = torch.stack(slopes.logs).amax(0)
    parts = tuple(
        per_member((log - shared).exp(), value) * value for value, log in zip(slopes.values, slopes.logs, strict=True)
    )
    top = torch.stack([part.abs().flatten(1).amax(-1) for part in parts]).amax(0)
    scaled = tuple(part / per_member(torch.where(top > 0, top, torch.ones_like(top)), part) for part in parts)
    norm = _norm(scaled)
    unit = tuple(-part / per_member(torch.where(norm > 0, norm, torch.ones_like(norm)), part) for part in scaled)
    return unit, shared + top.log() + norm.log()


def _norm(parts: Parts) -> Tensor:
    """Norm (B,) of all tensors as one vector."""
    return torch.stack([part.square().flatten(1).sum(-1) for part in parts]).sum(0).sqrt()


def _weighted(values: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        if weight:
            total = total + weight * value
    return total


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(per_member(chosen, one), one, other)

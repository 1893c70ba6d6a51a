"""Steps on the trained matrices, given gradients with a common factor ``exp(log_scale)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError

__all__ = ["OPTIMIZERS", "Step", "find_optimizer"]

Step: TypeAlias = Callable[[tuple[Tensor, ...], Tensor, float], tuple[Tensor, ...]]
"""``(slopes, log_scale (B,), learning_rate) -> changes``, one (B, …) tensor for each trained matrix."""


def _gradient_descent(slopes: tuple[Tensor, ...], log_scale: Tensor, rate: float) -> tuple[Tensor, ...]:
    """``-rate * gradient``; it underflows where the gradient does."""
    return tuple(-rate * log_scale.exp().view(-1, 1, 1) * slope for slope in slopes)


def _normalised(slopes: tuple[Tensor, ...], log_scale: Tensor, rate: float) -> tuple[Tensor, ...]:
    """``-rate * gradient / ||gradient||_F``, each matrix on its own; the common factor drops out."""
    changes = []
    for slope in slopes:
        # Dividing by the largest entry first keeps the squares inside the range of float64.
        top = slope.abs().amax((-2, -1), keepdim=True)
        scaled = slope / torch.where(top > 0, top, torch.ones_like(top))
        norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
        changes.append(-rate * scaled / torch.where(norm > 0, norm, torch.ones_like(norm)))
    return tuple(changes)


OPTIMIZERS: dict[str, Step] = {"gd": _gradient_descent, "ngd": _normalised}


def find_optimizer(name: str, *, where: str) -> Step:
    """The step of that name; raises InvalidInputError for another name."""
    if name not in OPTIMIZERS:
        raise InvalidInputError(f"{where}: optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}.")
    return OPTIMIZERS[name]

"""Losses of the signed output u = Y f, and their slopes.

=============  ==================  ==================
name           loss                slope
=============  ==================  ==================
logistic       log(1 + exp(-u))    -1 / (1 + exp(u))
exponential    exp(-u)             -exp(-u)
correlation    -u                  -1
=============  ==================  ==================

All three are strictly decreasing with a Lipschitz slope on bounded intervals, which is what the theory asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError

__all__ = ["LOSSES", "Loss", "find_loss"]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A decreasing loss: its value and slope at the signed output, elementwise."""

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(
            name="logistic",
            value=lambda u: torch.nn.functional.softplus(-u),
            slope=lambda u: -torch.sigmoid(-u),
        ),
        Loss(name="exponential", value=lambda u: torch.exp(-u), slope=lambda u: -torch.exp(-u)),
        Loss(name="correlation", value=lambda u: -u, slope=lambda u: -torch.ones_like(u)),
    )
}


def find_loss(name: str, *, where: str) -> Loss:
    """The loss of that name; raises InvalidInputError for another name."""
    if name not in LOSSES:
        raise InvalidInputError(f"{where}: loss must be one of {', '.join(LOSSES)}, got {name!r}.")
    return LOSSES[name]

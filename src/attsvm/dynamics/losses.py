"""Losses of the signed output u = Y f, and their slopes.

=============  ==================  ==================
name           loss                slope
=============  ==================  ==================
logistic       log(1 + exp(-u))    -1 / (1 + exp(u))
exponential    exp(-u)             -exp(-u)
correlation    -u                  -1
squared        (1 - u)^2           -2 (1 - u)
log            -log(u), u > 0      -1 / u
=============  ==================  ==================

All but the squared loss are strictly decreasing with a Lipschitz slope on bounded intervals (inside its domain for the
last), which is what the theory asks for; the squared loss is so for u < 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError

__all__ = ["LOSSES", "Loss", "Output", "find_loss"]

ROUNDING = 8.9e-16
"""A score this close to 1 is 1 to the squared loss: four roundings."""


class Output(NamedTuple):
    """Signed outputs u; for a linear head also as ``u = own - drop``, because a small drop does not survive in u."""

    value: Tensor
    own: Tensor | None = None  # the score of the selected token
    drop_sign: Tensor | None = None
    drop_log: Tensor | None = None  # log |drop|


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss of the signed output, elementwise.

    Attributes
    ----------
    name
        As in the table.
    value, slope
        At u.
    log_slope
        The sign and the logarithm of the size of the slope, where the slope itself would underflow.
    gap
        ``(best, drop) -> value(best - drop) - value(best)``, exact for small drops.
    bounds
        ``(low, high) -> (M_0, M_1)``: Lipschitz constant and largest size of the slope for u in [low, high].
    decreasing
        Whether the loss falls on its whole domain.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    log_slope: Callable[[Output], tuple[Tensor, Tensor]]
    gap: Callable[[Tensor, Tensor], Tensor]
    bounds: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    decreasing: bool = True


def _falling(log_size: Callable[[Tensor], Tensor]) -> Callable[[Output], tuple[Tensor, Tensor]]:
    """The signed logarithm of a slope that is negative everywhere."""
    return lambda output: (-torch.ones_like(output.value), log_size(output.value))


def _squared_log_slope(output: Output) -> tuple[Tensor, Tensor]:
    """Of ``-2 (1 - u)``; with a score of exactly 1 the drop is all that is left of 1 - u."""
    rest = 1.0 - output.value
    sign, log_size = -torch.sign(rest), torch.log(2.0 * rest.abs())
    if output.own is None or output.drop_sign is None or output.drop_log is None:
        return sign, log_size
    exact = (1.0 - output.own).abs() <= ROUNDING
    return torch.where(exact, -output.drop_sign, sign), torch.where(exact, math.log(2.0) + output.drop_log, log_size)


def _squared_bounds(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(low, 2.0), 2.0 * torch.maximum((1.0 - low).abs(), (1.0 - high).abs())


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(
            name="logistic",
            value=lambda u: torch.nn.functional.softplus(-u),
            slope=lambda u: -torch.sigmoid(-u),
            log_slope=_falling(lambda u: torch.nn.functional.logsigmoid(-u)),
            gap=lambda best, drop: torch.log1p(torch.expm1(drop) * torch.sigmoid(-best)),
            bounds=lambda low, high: (torch.full_like(low, 0.25), torch.ones_like(low)),
        ),
        Loss(
            name="exponential",
            value=lambda u: torch.exp(-u),
            slope=lambda u: -torch.exp(-u),
            log_slope=_falling(lambda u: -u),
            gap=lambda best, drop: torch.exp(-best) * torch.expm1(drop),
            bounds=lambda low, high: (torch.exp(-low), torch.exp(-low)),
        ),
        Loss(
            name="correlation",
            value=lambda u: -u,
            slope=lambda u: -torch.ones_like(u),
            log_slope=_falling(torch.zeros_like),
            gap=lambda best, drop: drop,
            bounds=lambda low, high: (torch.zeros_like(low), torch.ones_like(low)),
        ),
        Loss(
            name="squared",
            value=lambda u: (1.0 - u).square(),
            slope=lambda u: -2.0 * (1.0 - u),
            log_slope=_squared_log_slope,
            gap=lambda best, drop: drop * (2.0 * (1.0 - best) + drop),
            bounds=_squared_bounds,
            decreasing=False,
        ),
        Loss(
            name="log",
            value=lambda u: -torch.log(u),
            slope=lambda u: -1.0 / u,
            log_slope=_falling(lambda u: -torch.log(u)),
            gap=lambda best, drop: -torch.log1p(-drop / best),
            bounds=lambda low, high: (1.0 / low.square(), 1.0 / low),
        ),
    )
}


def find_loss(name: str, *, where: str) -> Loss:
    """The loss of that name; raises InvalidInputError for another name."""
    if name not in LOSSES:
        raise InvalidInputError(f"{where}: loss must be one of {', '.join(LOSSES)}, got {name!r}.")
    return LOSSES[name]

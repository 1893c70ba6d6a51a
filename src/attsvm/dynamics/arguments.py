"""The arguments of ``descend``: each is checked once, here, and every message names it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attsvm.dynamics.flow import GradientFlow
from attsvm.dynamics.heads import LinearHead
from attsvm.dynamics.losses import Loss
from attsvm.dynamics.optimizers import (
    Adam,
    GradientDescent,
    MirrorDescent,
    Momentum,
    NormalisedDescent,
    Optimizer,
    Polyak,
    SignDescent,
)
from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.selection.arrays import as_float
from attsvm.selection.problem import TokenSelection

__all__ = [
    "OPTIMIZERS",
    "check_arguments",
    "check_together",
    "find_optimizer",
    "planned_steps",
    "read_labels",
]

OPTIMIZERS: dict[str, Optimizer] = {
    "gd": GradientDescent(),
    "ngd": NormalisedDescent(),
    "polyak": Polyak(),
    "momentum": Momentum(),
    "adam": Adam(),
    "sign": SignDescent(),
    "flow": GradientFlow(),
}

KINDS = (Adam, GradientDescent, GradientFlow, MirrorDescent, Momentum, NormalisedDescent, Polyak, SignDescent)

PARAMETERIZATIONS = ("W", "KQ", "diagonal", "p")


def find_optimizer(optimizer: Any, *, where: str) -> Optimizer:
    """The optimiser of that name, or the given object."""
    if isinstance(optimizer, KINDS):
        return optimizer
    if not isinstance(optimizer, str) or optimizer not in OPTIMIZERS:
        raise InvalidInputError(
            f"{where}: optimizer must be one of {', '.join(OPTIMIZERS)}, or an object such as MirrorDescent(p), "
            f"got {optimizer!r}."
        )
    return OPTIMIZERS[optimizer]


def check_arguments(
    problem: Any,
    *,
    parameterization: Any,
    rank: Any,
    learning_rate: Any,
    steps: Any,
    record_every: Any,
    record_steps: Any,
    seed: Any,
) -> None:
    """Check what can be checked one by one."""
    if not isinstance(problem, TokenSelection):
        raise InvalidInputError(f"descend: problem must be a TokenSelection, got {type(problem).__name__}.")
    if parameterization not in PARAMETERIZATIONS:
        names = ", ".join(f'"{name}"' for name in PARAMETERIZATIONS)
        raise InvalidInputError(f"descend: parameterization must be one of {names}, got {parameterization!r}.")
    if rank is not None and parameterization != "KQ":
        raise InvalidInputError(
            f'descend: rank must be None for parameterization="{parameterization}"; it belongs to "KQ".'
        )
    if rank is not None and not _is_integer(rank, least=1):
        raise InvalidInputError(f"descend: rank must be an integer >= 1, got {rank!r}.")
    number = isinstance(learning_rate, (int, float)) and not isinstance(learning_rate, bool)
    if learning_rate != "theory" and not (number and 0 < learning_rate < math.inf):
        raise InvalidInputError(f'descend: learning_rate must be > 0 and finite, or "theory", got {learning_rate!r}.')
    if not _is_integer(steps, least=0):
        raise InvalidInputError(f"descend: steps must be an integer >= 0, got {steps!r}.")
    if record_every is not None and not _is_integer(record_every, least=1):
        raise InvalidInputError(f"descend: record_every must be an integer >= 1 or None, got {record_every!r}.")
    if record_steps is not None and record_every is not None:
        raise InvalidInputError("descend: record_every and record_steps must not be given together.")
    if not (_is_integer(seed, least=0) and seed < 2**63):
        raise InvalidInputError(f"descend: seed must be an integer in [0, 2**63), got {seed!r}.")


def check_together(
    *, scores: Any, labels: Any, head: Any, loss: Loss, optimizer: Optimizer, learning_rate: Any, parameterization: str
) -> None:
    """Check what must fit together."""
    if isinstance(head, str) and head != "linear":
        raise InvalidInputError(
            f'descend: head must be "linear", a LinearHead, QuadraticHead, ReLUHead or a torch callable, got {head!r}.'
        )
    if isinstance(head, str):
        if scores is None:
            raise InvalidInputError(
                'descend: scores must be given for head="linear"; with labels, give a LinearHead(v).'
            )
        if labels is not None:
            raise InvalidInputError('descend: labels must be None for head="linear": they are in the scores already.')
    elif scores is not None:
        raise InvalidInputError("descend: scores must be None when a head is given; the head makes them.")
    fixed = isinstance(head, str) or (isinstance(head, LinearHead) and not head.trained)
    if isinstance(optimizer, Polyak) and not (fixed and loss.decreasing):
        raise UnsupportedError(
            'descend: optimizer "polyak" needs the infimum of the loss, which is known for a fixed linear head and a '
            f"loss that falls with the output; use another optimizer for this head with loss={loss.name!r}."
        )
    if learning_rate == "theory" and not (fixed and isinstance(optimizer, GradientDescent) and parameterization == "W"):
        raise InvalidInputError(
            'descend: learning_rate="theory" must come with optimizer="gd", parameterization="W" and a fixed linear '
            "head; the theory has a step for these alone."
        )


def _is_integer(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def planned_steps(steps: int, every: int | None, given: Any = None) -> list[int]:
    """The steps to record, the last included.

    The given ones; or every so many; or 0, 1, 2, ... at distances that grow by a fifth.
    """
    if given is not None:
        listed = given.tolist() if hasattr(given, "tolist") else given
        if not isinstance(listed, (list, tuple, range, set)) or not all(_is_integer(step, least=0) for step in listed):
            raise InvalidInputError(f"descend: record_steps must be integers in [0, {steps}], got {given!r}.")
        if any(step > steps for step in listed):
            raise InvalidInputError(f"descend: record_steps must be at most steps = {steps}, got {max(listed)}.")
        return sorted({*listed, steps})
    if every is not None:
        return sorted({*range(0, steps + 1, every), steps})
    planned, place = [0], 1.0
    while place < steps:
        planned.append(round(place))
        place = max(place + 1.0, 1.2 * place)
    return sorted({*planned, steps})


def read_labels(labels: Any, active: Tensor) -> Tensor:
    """Labels (…, n, Q) of -1 and +1 from (…, n) or (…, n, Q); default all +1. ``active`` is (…, n, Q)."""
    if labels is None:
        return torch.ones(active.shape, dtype=torch.float64, device=active.device)
    values = as_float(labels, "labels", where="descend", device=active.device).to(torch.float64)
    if values.shape == active.shape[:-1]:
        values = values.unsqueeze(-1).expand(active.shape)
    if values.shape != active.shape or not bool((values.abs() == 1).all()):
        shape = tuple(active.shape)
        raise InvalidInputError(
            f"descend: labels must be -1 or +1 of shape {shape[:-1]} or {shape}, got {_seen(values, shape)}."
        )
    return values


def _seen(values: Tensor, shape: tuple[int, ...]) -> str:
    if tuple(values.shape) != shape:
        return f"shape {tuple(values.shape)}"
    return f"the value {float(values[values.abs() != 1].flatten()[0])}"

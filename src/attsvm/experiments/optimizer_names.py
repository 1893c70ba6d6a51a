"""Optimisers and norms as they are written on the command line: ``mirror:1.75@0.05``, ``inf``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attsvm.dynamics import MirrorDescent
from attsvm.dynamics.arguments import OPTIMIZERS
from attsvm.dynamics.optimizers import Optimizer
from attsvm.errors import InvalidInputError
from attsvm.selection.norms import Norm

__all__ = ["NamedOptimizer", "norm_label", "read_norm", "read_optimizer", "usual_norms"]

ENTRYWISE = ("sign", "adam")
"""Optimisers whose step has a length for each entry of the matrix."""


@dataclass(frozen=True, kw_only=True)
class NamedOptimizer:
    """An optimiser, as written, with its learning rate."""

    name: str
    optimizer: Optimizer
    rate: float | None

    def rate_for(self, default: float, d: int) -> float:
        """Its own rate; otherwise the default, shared out over the d entries of a row where steps are entrywise."""
        if self.rate is not None:
            return self.rate
        # All d^2 entries moving by rate / d make a step of Frobenius norm rate, as the normalised ones take.
        return default / d if self.name in ENTRYWISE else default

    @property
    def norm(self) -> Norm:
        """The norm whose geometry its steps have."""
        if isinstance(self.optimizer, MirrorDescent):
            return "fro" if self.optimizer.p == 2 else float(self.optimizer.p)
        return math.inf if self.name in ENTRYWISE else "fro"


def read_optimizer(text: str) -> NamedOptimizer:
    """Read ``NAME``, ``mirror:P``, or either with ``@RATE``.

    Raises
    ------
    InvalidInputError
        If it is none of these.
    """
    name, _, rate = text.partition("@")
    kind, _, order = name.partition(":")
    chosen: Optimizer | None = OPTIMIZERS.get(name)
    if kind == "mirror" and 1 < _number(order) < math.inf:
        chosen = MirrorDescent(_number(order))
    if chosen is None or ("@" in text and not 0 < _number(rate) < math.inf):
        raise InvalidInputError(
            f"verify: --optimizer must be one of {', '.join(OPTIMIZERS)}, or mirror:P with P > 1, each with or without "
            f"@RATE, got {text!r}."
        )
    return NamedOptimizer(name=name, optimizer=chosen, rate=_number(rate) if rate else None)


def read_norm(text: str) -> Norm:
    """Read ``fro``, ``nuc``, ``op``, or a number p >= 1 such as ``1.5`` or ``inf``."""
    if text in ("fro", "nuc", "op"):
        return text  # type: ignore[return-value]
    order = _number(text)
    if not order >= 1:
        raise InvalidInputError(f"verify: --norm must be fro, nuc, op or a number p >= 1 (or inf), got {text!r}.")
    return "fro" if order == 2 else order


def norm_label(norm: Norm) -> str:
    """A norm as it is written on the command line and in records."""
    return norm if isinstance(norm, str) else f"{norm:g}"


def usual_norms(optimizers: list[NamedOptimizer]) -> list[Norm]:
    """Frobenius, nuclear and the largest entry, and what else is the geometry of one of the optimisers."""
    norms: list[Norm] = ["fro", "nuc", math.inf]
    return norms + [norm for norm in dict.fromkeys(one.norm for one in optimizers) if norm not in norms]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

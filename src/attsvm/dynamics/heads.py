r"""Prediction heads h: what a layer makes of its pooled token $x = X^\top s$, a number for each query.

A head is given to ``descend`` in the place of scores, with the labels. Parameters may have a leading axis B, one set
for each problem of a batch. Any other torch callable ``(..., d) -> (...)`` is a head as well; its slope is taken by
autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError
from attsvm.selection.arrays import Array, as_float
from attsvm.selection.reading import require_finite

__all__ = ["Head", "LinearHead", "QuadraticHead", "ReLUHead", "prepare_head"]


class Head(Protocol):
    """A head as the engine uses it."""

    def __call__(self, x: Tensor, /) -> tuple[Tensor, Tensor]:
        """Values (B, n, Q) and slopes (B, n, Q, d) at pooled tokens (B, n, Q, d)."""


@dataclass(frozen=True, eq=False)
class LinearHead:
    r"""$h(x) = v^\top x$.

    Parameters
    ----------
    v
        (d,) or (B, d).
    trained
        Whether v is trained together with attention, by the same optimiser; it starts at the given value.
    """

    v: Array
    trained: bool = False


@dataclass(frozen=True, eq=False)
class QuadraticHead:
    r"""$h(x) = v^\top x - \lambda \|x\|^2$; a large penalty makes attention keep several tokens.

    Parameters
    ----------
    v
        (d,) or (B, d).
    penalty
        $\lambda$, a finite number.
    """

    v: Array
    penalty: float


@dataclass(frozen=True, eq=False)
class ReLUHead:
    r"""$h(x) = \mathbf 1^\top \mathrm{ReLU}(V^\top x)$: two layers, with output weights of one.

    Parameters
    ----------
    V
        (d, m) or (B, d, m).
    """

    V: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Quadratic:
    """A quadratic head at work."""

    v: Tensor  # (B, d)
    penalty: float

    def __call__(self, x: Tensor, /) -> tuple[Tensor, Tensor]:
        """Values and slopes."""
        v = self.v.unsqueeze(1).unsqueeze(1)
        return (x * v).sum(-1) - self.penalty * x.square().sum(-1), v - 2.0 * self.penalty * x


@dataclass(frozen=True, kw_only=True, eq=False)
class ReLU:
    """A ReLU head at work."""

    V: Tensor  # (B, d, m)

    def __call__(self, x: Tensor, /) -> tuple[Tensor, Tensor]:
        """Values and slopes."""
        V = self.V.unsqueeze(1)
        hidden = x @ V
        return hidden.clamp(min=0.0).sum(-1), (hidden > 0).to(x.dtype) @ V.mT


@dataclass(frozen=True, kw_only=True, eq=False)
class Called:
    """A torch callable at work."""

    function: Any

    def __call__(self, x: Tensor, /) -> tuple[Tensor, Tensor]:
        """Values, and slopes by autograd."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            try:
                value = self.function(leaf)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise InvalidInputError(
                    f"descend: head must map float64 tensors (..., d) to (...); it failed on shape {tuple(x.shape)}: "
                    f"{error}"
                ) from error
            self._check(value, x)
            (slope,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        if slope is None:
            raise InvalidInputError("descend: head must depend on its argument; its output has no gradient in it.")
        return value.detach().to(x.dtype), slope

    @staticmethod
    def _check(value: Any, x: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise InvalidInputError(f"descend: head must return a tensor, got {type(value).__name__}.")
        if value.shape != x.shape[:-1]:
            raise InvalidInputError(
                f"descend: head must map (..., d) to (...), got {tuple(value.shape)} for {tuple(x.shape)}."
            )
        if not value.requires_grad:
            raise InvalidInputError(
                "descend: head must have a gradient, but its output does not depend on its argument in a way that "
                "autograd can follow (a constant, a detached tensor, or a function without a derivative)."
            )


def prepare_head(head: Any, *, batch: int | None, d: int, device: torch.device) -> Tensor | Head:
    """The head at work, in float64 with a leading B; for a linear head its v (B, d).

    Parameters
    ----------
    head
        A :class:`LinearHead`, :class:`QuadraticHead`, :class:`ReLUHead` or a torch callable.
    batch
        Problems of the batch; None for a single problem.
    d
        Dimension of the tokens.
    device
        Where the tokens are.
    """
    if isinstance(head, LinearHead):
        return _read(head.v, "v", batch, (d,), device)
    if isinstance(head, QuadraticHead):
        penalty = torch.as_tensor(head.penalty, dtype=torch.float64)
        if penalty.ndim or not bool(torch.isfinite(penalty)):
            raise InvalidInputError(f"QuadraticHead: penalty must be a finite number, got {head.penalty!r}.")
        return Quadratic(v=_read(head.v, "v", batch, (d,), device), penalty=float(penalty))
    if isinstance(head, ReLUHead):
        return ReLU(V=_read(head.V, "V", batch, (d, None), device))
    if not callable(head):
        raise InvalidInputError(
            f'descend: head must be "linear", a LinearHead, QuadraticHead, ReLUHead or a torch callable, got {head!r}.'
        )
    return Called(function=head)


def _read(value: Array, name: str, batch: int | None, shape: tuple[int | None, ...], device: torch.device) -> Tensor:
    """A parameter (B, *shape); None in ``shape`` is any length."""
    tensor = as_float(value, name, where="descend", device=device).to(torch.float64)
    lead = 1 if batch is None else batch
    own = tensor.ndim == len(shape) + 1 and tensor.shape[0] == lead
    fits = tensor.ndim == len(shape) or own
    sizes = tensor.shape[1:] if own else tensor.shape
    if not fits or any(want not in (None, got) for want, got in zip(shape, sizes, strict=True)) or 0 in sizes:
        wanted = ", ".join("m" if size is None else str(size) for size in shape) + ("," if len(shape) == 1 else "")
        also = "" if batch is None else f" or ({batch}, {wanted.rstrip(',')})"
        raise InvalidInputError(f"descend: head.{name} must have shape ({wanted}){also}, got {tuple(tensor.shape)}.")
    require_finite(tensor, f"head.{name}", "descend")
    return tensor.expand(lead, *sizes).clone()

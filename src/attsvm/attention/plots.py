"""Pictures of masks and of attention weights, on axes of the caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError, UnsupportedError

__all__ = ["plot_mask", "plot_weights"]


def plot_mask(
    mask: Tensor, *, ax: Any = None, queries: Sequence[str] | None = None, keys: Sequence[str] | None = None
) -> Any:
    """Draw a mask (Tq, Tk), dark where a query (row) may attend to a key (column), and return the axes.

    Parameters
    ----------
    mask
        Booleans, two axes; of a batch or of several heads, give one.
    ax
        Matplotlib axes; default new ones.
    queries, keys
        Tokens to write at the rows and columns.
    """
    if mask.dtype != torch.bool:
        raise InvalidInputError(f"plot_mask: mask must be boolean (True = may be attended), got {mask.dtype}.")
    ax, _ = _draw("plot_mask", "mask", mask.float(), ax, queries, keys, "Greys")
    return ax


def plot_weights(
    weights: Tensor, *, ax: Any = None, queries: Sequence[str] | None = None, keys: Sequence[str] | None = None
) -> Any:
    """Draw the attention weights (Tq, Tk) of one head, from 0 to 1, with a scale, and return the axes."""
    if not weights.is_floating_point():
        raise InvalidInputError(f"plot_weights: weights must be floating point, got {weights.dtype}.")
    ax, image = _draw("plot_weights", "weights", weights.detach().float(), ax, queries, keys, "viridis")
    ax.figure.colorbar(image, ax=ax, label="attention weight")
    return ax


def _draw(
    where: str,
    name: str,
    values: Tensor,
    ax: Any,
    queries: Sequence[str] | None,
    keys: Sequence[str] | None,
    colours: str,
) -> tuple[Any, Any]:
    if values.ndim != 2:
        raise InvalidInputError(f"{where}: {name} must be (Tq, Tk), got shape {tuple(values.shape)}.")
    for label, words, size in (("queries", queries, values.shape[0]), ("keys", keys, values.shape[1])):
        if words is not None and len(words) != size:
            raise InvalidInputError(f"{where}: {label} must have {size} words, one for each, got {len(words)}.")
    if ax is None:
        ax = _new_axes(where)
    image = ax.imshow(values.cpu().numpy(), cmap=colours, vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    if keys is not None:
        ax.set_xticks(range(len(keys)), list(keys), rotation=45, ha="right", rotation_mode="anchor")
    if queries is not None:
        ax.set_yticks(range(len(queries)), list(queries))
    return ax, image


def _new_axes(where: str) -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise UnsupportedError(
            f"{where}: matplotlib is not installed; install attsvm[plot], or give axes of your own as ax=."
        ) from error
    return pyplot.subplots()[1]

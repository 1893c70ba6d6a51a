"""Curves of a trajectory, on axes of the caller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attsvm.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from attsvm.dynamics.trajectory import Trajectory

__all__ = ["plot_trajectory"]

LABELS = {
    "correlation": "correlation with the max-margin solution",
    "loss": "training loss",
    "norm": "norm of W",
    "attention_mass": "probability of the selected tokens",
}


def plot_trajectory(trajectory: Trajectory, quantity: str, *, ax: Any = None, solution: Any = None) -> Any:
    """Draw one quantity over the steps and return the axes; see :meth:`Trajectory.plot`."""
    if quantity not in LABELS:
        raise InvalidInputError(f"plot: quantity must be one of {', '.join(LABELS)}, got {quantity!r}.")
    if solution is not None and quantity != "correlation":
        raise InvalidInputError('plot: solution must be None unless quantity="correlation".')
    if ax is None:
        ax = _new_axes()
    if quantity == "correlation":
        values = trajectory.correlation(trajectory.solution() if solution is None else solution)
    else:
        values = getattr(trajectory, quantity)
    steps, curves = _floats(trajectory.steps), _floats(values)
    if curves.ndim == 1:
        ax.plot(steps, curves)
    else:
        # Where some members are undefined (W = 0) the others are averaged; where all are, nothing is drawn.
        known = np.isfinite(curves)
        count = np.maximum(known.sum(0), 1)
        mean = np.where(known, curves, 0.0).sum(0) / count
        spread = np.sqrt((np.where(known, curves - mean, 0.0) ** 2).sum(0) / count)
        mean[~known.any(0)] = np.nan
        (line,) = ax.plot(steps, mean)
        ax.fill_between(steps, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set_xlabel("step")
    ax.set_ylabel(LABELS[quantity])
    return ax


def _new_axes() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise UnsupportedError(
            "plot: matplotlib is not installed; install attsvm[plot], or give axes of your own as ax=."
        ) from error
    return pyplot.subplots()[1]


def _floats(values: Any) -> np.ndarray:
    return torch.as_tensor(values).detach().cpu().double().numpy()

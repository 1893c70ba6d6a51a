"""The main charts of the page as matplotlib figures, for papers (needs the extra ``[plot]``).

Each function draws one parameterisation of :func:`attsvm.report.read_page` into ``ax`` and returns it. Colours, dashes
and marks are those of the page, and stay apart in greyscale. Nothing global is changed and nothing is shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.report.page import Parameterization

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_correlation", "plot_margins", "plot_singular_values"]

_COLORS = {"fro": "#0067a8", "nuc": "#c24a00", "trained": "#1d1f23"}
_DASHES = {"fro": "-", "nuc": "--", "trained": "-"}
_MARKERS = {"fro": "s", "nuc": "^", "trained": "o"}


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "Figures need matplotlib, which is not installed: pip install 'attsvm[plot]'."
        ) from error
    # Not pyplot: it would keep every figure alive and pick a back end for the whole process.
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def plot_correlation(one: Parameterization, *, ax: Axes | None = None) -> Axes:
    """Plot the correlation of the trained matrix with both max-margin solutions over the training steps.

    Parameters
    ----------
    one
        W or (K, Q) of a run.
    ax
        Where to draw; a new figure when None.
    """
    ax = _axes(ax)
    named = (
        (one.styles[0], one.norm_name, one.curves.correlation),
        (one.styles[1], one.other_name, one.curves.correlation_other),
    )
    for style, name, values in named:
        known = [(step, value) for step, value in zip(one.curves.steps, values, strict=True) if value is not None]
        steps, shown = [step for step, _ in known], [value for _, value in known]
        ax.plot(steps, shown, color=_COLORS[style], linestyle=_DASHES[style], label=f"{name} solution")
    ax.set_xscale("symlog", linthresh=1)
    ax.set(xlabel="training step", ylabel="correlation", title=one.symbol, ylim=(None, 1.02))
    ax.legend(frameon=False)
    return ax


def plot_margins(one: Parameterization, *, ax: Axes | None = None) -> Axes:
    """Plot the histogram of the margins of the solution and of the trained matrix, scaled to the same norm.

    Parameters
    ----------
    one
        W or (K, Q) of a run.
    ax
        Where to draw; a new figure when None.

    Raises
    ------
    InvalidInputError
        If the run has no margins, as when no matrix separates its tokens.
    """
    if one.histogram is None:
        raise InvalidInputError(f"plot_margins: this run has no margins for {one.symbol} (status {one.status}).")
    ax = _axes(ax)
    edges = one.histogram.edges
    ax.stairs(one.histogram.solution, edges, fill=True, color=_COLORS["fro"], alpha=0.42, label="solution")
    if one.histogram.n_trained:
        ax.stairs(one.histogram.trained, edges, color=_COLORS["trained"], label="trained")
    ax.axvline(1.0, color=_COLORS["trained"], linestyle=":", linewidth=1)
    ax.set(xlabel="margin (logits)", ylabel="tokens", title=one.symbol)
    ax.legend(frameon=False)
    return ax


def plot_singular_values(one: Parameterization, *, ax: Axes | None = None) -> Axes:
    """Plot the singular values of both solutions and of the trained matrix, each divided by its largest.

    Parameters
    ----------
    one
        W or (K, Q) of a run.
    ax
        Where to draw; a new figure when None.

    Raises
    ------
    InvalidInputError
        If the run recorded no singular values.
    """
    if one.spectra is None:
        raise InvalidInputError(f"plot_singular_values: this run has no singular values for {one.symbol}.")
    ax = _axes(ax)
    named = (
        (one.styles[0], f"{one.norm_name} solution", one.spectra.solution),
        (one.styles[1], f"{one.other_name} solution", one.spectra.other),
        ("trained", f"trained {one.symbol}", one.spectra.trained),
    )
    for style, name, values in named:
        if values:
            ax.semilogy(
                range(1, len(values) + 1),
                values,
                color=_COLORS[style],
                linestyle=_DASHES[style],
                marker=_MARKERS[style],
                markersize=3,
                label=name,
            )
    ax.set(xlabel="index", ylabel="share of the largest", title=one.symbol, ylim=(1e-8, 1.6))
    ax.legend(frameon=False)
    return ax

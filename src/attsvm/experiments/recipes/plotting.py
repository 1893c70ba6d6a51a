"""The shared look of the figures. A recipe draws on the figure it is given; pyplot is never imported.

Colours stay apart for readers with any of the three colour deficiencies and have contrast 4.5 : 1 on white; a quantity
keeps its colour in all figures (``COLORS["fro"]``). The page shows them lighter in its dark theme.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.experiments.recipes.recipe import Recipe, Record
from attsvm.records import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = [
    "COLORS",
    "INK",
    "PALETTE",
    "SOFT",
    "Curve",
    "band",
    "bars",
    "draw_figure",
    "house",
    "mark_published",
    "mean_and_spread",
    "panels",
    "save_figure",
    "style",
]

Curve: TypeAlias = Sequence[float | None]
"""Values of one trial; None or NaN where there is none."""

PALETTE = ("#0067a8", "#c24a00", "#5121ae", "#0e5034", "#883f72", "#756839")
"""The cycle for series that have no colour of their own."""

INK, SOFT, HAIR = "#1d1f23", "#565a62", "#dfdcd3"

COLORS = {"fro": PALETTE[0], "nuc": PALETTE[1], "W": PALETTE[2], "KQ": PALETTE[3], "trained": INK}
"""Colours by meaning: the two solutions, the two parameterisations, the trained matrix."""

DASHES = ("-", (0, (6, 2.5)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (3, 1.5)), (0, (8, 2, 1.2, 2, 1.2, 2)))
"""Dashes of the series in the order they are drawn: they stay apart without colour too."""

SVG_BYTES = 2_000_000
"""Above this the curves and points of an SVG become an image inside it; text and axes stay as they are."""

PNG_DPI = 144

_HOUSE = {
    "axes.edgecolor": "#8a8d93",
    "axes.labelcolor": SOFT,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.dpi": 100,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": HAIR,
    "grid.linewidth": 0.7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "attsvm",
    "text.color": INK,
    "xtick.color": "#8a8d93",
    "xtick.labelcolor": SOFT,
    "xtick.labelsize": 8,
    "ytick.color": "#8a8d93",
    "ytick.labelcolor": SOFT,
    "ytick.labelsize": 8,
}


@contextlib.contextmanager
def house() -> Iterator[None]:
    """Draw within this: the house style, whatever the user's ``matplotlibrc`` says; settings come back at the end.

    Raises
    ------
    UnsupportedError
        If matplotlib is not installed.
    """
    try:
        import matplotlib
        from cycler import cycler
    except ImportError as error:
        raise UnsupportedError(
            "Figures need matplotlib, which is not installed: pip install 'attsvm[plot]'."
        ) from error
    # The back end is the user's: to name it here would load it.
    settings = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    with matplotlib.rc_context({**settings, **_HOUSE, "axes.prop_cycle": cycler(color=PALETTE)}):
        yield


def draw_figure(recipe: Recipe, records: Sequence[Record], folder: Path) -> tuple[Path, Path]:
    """Draw the figure of a recipe in the house style and write it to ``folder`` as SVG and PNG.

    Raises
    ------
    UnsupportedError
        If matplotlib is not installed.
    """
    with house():
        from matplotlib.figure import Figure

        figure = Figure()
        recipe.draw(figure, records)
        return save_figure(figure, folder)


def panels(
    figure: Figure,
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = 4.2,
    height: float = 3.0,
    **options: Any,
) -> list[Axes]:
    """Set the size of the figure and return its axes, row by row.

    Parameters
    ----------
    figure
        An empty figure.
    rows, columns
        Panels below and beside each other.
    width, height
        Inches of one panel.
    options
        As for ``Figure.subplots``: ``sharex``, ``sharey``, ``width_ratios``.
    """
    figure.set_size_inches(width * columns, height * rows)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return list(itertools.chain.from_iterable(axes))


def style(
    ax: Axes,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    *,
    legend: bool | Literal["best", "outside"] = True,
) -> None:
    """Name the axes, draw a faint grid, and a legend where there is something to name.

    ``legend="outside"`` puts it below the axes, where it covers nothing.
    """
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.grid(visible=True, which="major")
    ax.set_axisbelow(True)
    names = ax.get_legend_handles_labels()[1]
    if not legend or not names:
        return
    if legend == "outside":
        # The layout makes room for a legend by narrowing the axes, so it must not be wider than they are.
        longest = max(map(len, names))
        columns = 3 if longest <= 16 else 2 if longest <= 26 else 1
        ax.legend(loc="upper left", bbox_to_anchor=(0.0, -0.2), ncols=min(columns, len(names)), borderaxespad=0.0)
    else:
        ax.legend(loc="best")


def mean_and_spread(
    curves: Sequence[Curve] | np.ndarray, spread: Literal["std", "quartiles"] = "std"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre, lower and upper edge over the trials at each point; NaN where no trial has a value.

    Parameters
    ----------
    curves
        (trials, points); None, NaN and infinite values do not count.
    spread
        ``"std"``: mean, and one standard deviation (divided by the count) to each side. ``"quartiles"``: median and
        quartiles, which suit a logarithmic axis.

    Examples
    --------
    >>> middle, low, high = mean_and_spread([[1.0, 2.0], [3.0, None]])
    >>> middle.tolist(), low.tolist(), high.tolist()
    ([2.0, 2.0], [1.0, 2.0], [3.0, 2.0])
    """
    if len({len(curve) for curve in curves}) > 1:
        raise InvalidInputError("band: the curves of all trials must have the same number of points.")
    values = np.array([[np.nan if value is None else value for value in curve] for curve in curves], dtype=np.float64)
    if not values.size:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    values[~np.isfinite(values)] = np.nan
    middle, low, high = (np.full(values.shape[1], np.nan) for _ in range(3))
    for point in range(values.shape[1]):
        known = values[:, point][~np.isnan(values[:, point])]
        if not known.size:
            continue
        if spread == "std":
            middle[point], deviation = known.mean(), known.std()
            low[point], high[point] = middle[point] - deviation, middle[point] + deviation
        else:
            low[point], middle[point], high[point] = np.quantile(known, (0.25, 0.5, 0.75))
    return middle, low, high


def band(
    ax: Axes,
    x: Sequence[float],
    curves: Sequence[Curve] | np.ndarray,
    label: str,
    color: str | None = None,
    *,
    spread: Literal["std", "quartiles"] = "std",
    limits: tuple[float, float] | None = None,
    **line: Any,
) -> Line2D | None:
    """Draw the mean over the trials with a band of one standard deviation around it.

    Parameters
    ----------
    ax
        Where to draw.
    x
        The points, of the length of each curve.
    curves
        (trials, points). No trial, or none with a value, draws nothing.
    label
        For the legend.
    color
        None takes the next of ``PALETTE``; the dash follows the order in any case.
    spread
        See :func:`mean_and_spread`.
    limits
        The band is cut there, such as (0, 1) for a probability.
    line
        As for ``Axes.plot``: ``marker``, ``linestyle``.

    Returns
    -------
    Line2D or None
        The line of the mean.
    """
    middle, low, high = mean_and_spread(curves, spread)
    if not np.isfinite(middle).any():
        return None
    points = np.asarray(x, dtype=np.float64)
    if points.shape != middle.shape:
        raise InvalidInputError(f"band: x has {points.size} points, the curves have {middle.size}.")
    if limits is not None:
        low, high = np.clip(low, *limits), np.clip(high, *limits)
    order = len(ax.lines)
    line.setdefault("linestyle", DASHES[order % len(DASHES)])
    color = PALETTE[order % len(PALETTE)] if color is None else color
    drawn = ax.plot(points, middle, label=label, color=color, **line)[0]
    if np.nanmax(high - low) > 0:
        ax.fill_between(points, low, high, color=color, alpha=0.16, linewidth=0)
    return drawn


_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----")


def bars(
    ax: Axes,
    groups: Sequence[str],
    series: dict[str, Curve],
    *,
    colors: Sequence[str] = PALETTE,
    errors: dict[str, Curve] | None = None,
) -> None:
    """Draw groups of bars side by side, one bar of each series in a group; None leaves a gap.

    Parameters
    ----------
    ax
        Where to draw.
    groups
        Names below the groups.
    series
        Name in the legend -> one value for each group.
    colors
        Of the series. Hatching sets them apart as well.
    errors
        Name of a series -> half the length of its error bars.
    """
    width = 0.8 / max(len(series), 1)
    for index, (name, heights) in enumerate(series.items()):
        places = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
        spread = (errors or {}).get(name)
        ax.bar(
            places,
            [np.nan if height is None else height for height in heights],
            0.92 * width,
            label=name,
            color=colors[index % len(colors)],
            hatch=_HATCHES[index % len(_HATCHES)],
            edgecolor="#ffffff",
            linewidth=0,
            yerr=None if spread is None else [np.nan if one is None else one for one in spread],
            error_kw={"ecolor": INK, "elinewidth": 1},
        )
    ax.set_xticks(range(len(groups)), groups)
    ax.set_xlim(-0.5, len(groups) - 0.5)


def mark_published(ax: Axes, x: Sequence[float], y: Curve, label: str = "published") -> None:
    """Mark published values by hollow diamonds in ink, over whatever is drawn."""
    known = [(place, value) for place, value in zip(x, y, strict=True) if value is not None]
    if known:
        places, values = [place for place, _ in known], [value for _, value in known]
        ax.scatter(places, values, s=34, marker="D", facecolors="none", edgecolors=INK, label=label, zorder=5)


def save_figure(figure: Figure, folder: Path) -> tuple[Path, Path]:
    """Write ``figure.svg`` and ``figure.png``; the same figure always gives the same bytes.

    Letters are outlines, so that the figure looks the same without the font. No date and no version is written.

    Returns
    -------
    tuple
        The two paths, SVG first.
    """
    with house():
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        FigureCanvasAgg(figure)
        figure.set_facecolor("#ffffff")
        vector = _rendered(figure, "svg", {"Date": None, "Creator": None})
        if len(vector) > SVG_BYTES:
            for ax in figure.axes:
                for artist in (*ax.lines, *ax.collections, *ax.patches):
                    artist.set_rasterized(True)
            vector = _rendered(figure, "svg", {"Date": None, "Creator": None})
        image = _rendered(figure, "png", {"Software": None})
    written = (folder / "figure.svg", folder / "figure.png")
    write_bytes(written[0], vector)
    write_bytes(written[1], image)
    return written


def _rendered(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=PNG_DPI, metadata=metadata)
    return buffer.getvalue()

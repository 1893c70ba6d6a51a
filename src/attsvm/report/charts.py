"""Which charts the page has, as data: series, axes, and one sentence that says what is to be seen."""

from __future__ import annotations

from dataclasses import dataclass

from attsvm.report.page import Curves, Histogram, Numbers, Page, Parameterization, Spectra
from attsvm.report.text import integer, number, percent

__all__ = ["Chart", "Series", "charts"]

_FLOOR = 1e-8
"""Singular values below this share of the largest are rounding errors and are not drawn."""

_LINE_STYLES = {"W": "w", "KQ": "kq"}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or one set of bars. ``style`` names its colour and dash in the style sheet."""

    name: str
    style: str
    x: list[float]
    y: Numbers


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart; ``summary`` is its text alternative.

    Attributes
    ----------
    group
        The section that shows it: ``correlation``, ``training``, ``margins`` or ``spectra``.
    kind
        ``lines``, ``points`` (lines with a mark at each value) or ``bars`` (x are edges, one more than y).
    x_scale, y_scale
        ``linear``, ``log``, or ``steps`` for training steps, which the reader can switch.
    y_range
        Ends of the y axis, where they are fixed.
    rule
        Position of a vertical line.
    """

    id: str
    group: str
    title: str
    summary: str
    kind: str
    x_label: str
    y_label: str
    series: list[Series]
    x_scale: str = "linear"
    y_scale: str = "linear"
    y_range: tuple[float, float] | None = None
    rule: float | None = None


def charts(page: Page) -> list[Chart]:
    """Return all charts of the page; one without a single value is left out."""
    found: list[Chart | None] = [_correlation(one) for one in page.parameterizations]
    found += [_attention(page), _norm(page), _loss(page)]
    found += [_margins(one, one.histogram) for one in page.parameterizations if one.histogram]
    found += [_spectrum(one, one.spectra) for one in page.parameterizations if one.spectra]
    return [chart for chart in found if chart is not None]


def _known(values: Numbers) -> list[float]:
    return [value for value in values if value is not None]


def _last(values: Numbers) -> str:
    known = _known(values)
    return number(known[-1]) if known else "unknown"


def _steps(curves: Curves) -> list[float]:
    return [float(step) for step in curves.steps]


def _correlation(one: Parameterization) -> Chart | None:
    curves = one.curves
    pairs = [
        (one.styles[0], one.norm_name, curves.correlation),
        (one.styles[1], one.other_name, curves.correlation_other),
    ]
    if not any(_known(values) for *_, values in pairs):
        return None
    lowest = min(value for *_, values in pairs for value in _known(values))
    pairs.sort(key=lambda pair: pair[0])
    ends = " and ".join(f"{_last(values)} for the {name} solution" for _, name, values in pairs)
    return Chart(
        id=f"correlation-{one.key}",
        group="correlation",
        title=f"{one.symbol}: agreement with both solutions",
        summary=f"The correlation of the trained {one.symbol} ends at {ends}.",
        kind="lines",
        x_label="training step",
        y_label="correlation",
        x_scale="steps",
        y_range=(min(0.0, lowest), 1.0),
        series=[
            Series(name=f"{name} solution", style=style, x=_steps(curves), y=values) for style, name, values in pairs
        ],
    )


def _by_parameterization(page: Page, quantity: str) -> list[Series]:
    made = [
        Series(name=one.symbol, style=_LINE_STYLES[one.key], x=_steps(one.curves), y=getattr(one.curves, quantity))
        for one in page.parameterizations
    ]
    return [series for series in made if _known(series.y)]


def _training(
    page: Page, quantity: str, title: str, y_label: str, y_scale: str, y_range: tuple[float, float] | None
) -> Chart | None:
    series = _by_parameterization(page, quantity)
    if not series:
        return None
    ends = ", ".join(f"{one.name} from {number(_known(one.y)[0])} to {_last(one.y)}" for one in series)
    return Chart(
        id=quantity.replace("_", "-"),
        group="training",
        title=title,
        summary=f"{ends}.",
        kind="lines",
        x_label="training step",
        y_label=y_label,
        x_scale="steps",
        y_scale=y_scale,
        y_range=y_range,
        series=series,
    )


def _attention(page: Page) -> Chart | None:
    return _training(
        page, "attention_mass", "Attention on the selected token", "mean probability", "linear", (0.0, 1.0)
    )


def _norm(page: Page) -> Chart | None:
    return _training(page, "norm", "Growth of the norm", "norm", "linear", None)


def _loss(page: Page) -> Chart | None:
    positive = all(value > 0 for series in _by_parameterization(page, "loss") for value in _known(series.y))
    return _training(page, "loss", "Training loss", "loss", "log" if positive else "linear", None)


def _margins(one: Parameterization, histogram: Histogram) -> Chart:
    summary = f"{integer(histogram.n_solution)} margins of the {one.norm_name} solution"
    if histogram.n_trained:
        share = percent(histogram.n_below / histogram.n_trained)
        summary += (
            f"; of {integer(histogram.n_trained)} trained margins, scaled to the same norm, "
            f"{integer(histogram.n_below)} ({share}) are below 1"
        )
    if histogram.n_overflow:
        summary += f". The last bin also holds the {integer(histogram.n_overflow)} values beyond it"
    made = [
        Series(name="solution", style="solution", x=histogram.edges, y=list(histogram.solution)),
        Series(name="trained", style="trained", x=histogram.edges, y=list(histogram.trained)),
    ]
    return Chart(
        id=f"margins-{one.key}",
        group="margins",
        title=f"{one.symbol}: margins",
        summary=summary + ".",
        kind="bars",
        x_label="margin (logits)",
        y_label="tokens",
        rule=1.0,
        series=[series for series in made if any(series.y)],
    )


def _spectrum(one: Parameterization, spectra: Spectra) -> Chart:
    named = [
        (f"{one.norm_name} solution", one.styles[0], spectra.solution),
        (f"{one.other_name} solution", one.styles[1], spectra.other),
        (f"trained {one.symbol}", "trained", spectra.trained),
    ]
    counts = ", ".join(f"{name} {sum(v >= 1e-3 for v in values)}" for name, _, values in named if values)
    return Chart(
        id=f"spectra-{one.key}",
        group="spectra",
        title=f"{one.symbol}: singular values",
        summary=f"Singular values above a thousandth of the largest: {counts}.",
        kind="points",
        x_label="index",
        y_label="share of the largest",
        y_scale="log",
        series=[
            Series(
                name=name,
                style=style,
                x=[float(index) for index in range(1, len(values) + 1)],
                y=[value if value >= _FLOOR else None for value in values],
            )
            for name, style, values in named
            if values
        ],
    )

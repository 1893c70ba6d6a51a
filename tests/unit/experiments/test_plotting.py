"""The shared look of the figures: bands, colours for everybody, and files that are the same every time."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.figure import Figure  # noqa: E402

from attsvm.errors import AttSVMError, InvalidInputError  # noqa: E402
from attsvm.experiments.recipes import Paper, Recipe, Record, Summary  # noqa: E402
from attsvm.experiments.recipes import plotting as plotting_module  # noqa: E402
from attsvm.experiments.recipes.plotting import (  # noqa: E402
    INK,
    PALETTE,
    PNG_DPI,
    band,
    bars,
    draw_figure,
    house,
    mark_published,
    mean_and_spread,
    panels,
    save_figure,
    style,
)

Draw = Callable[[Any, Sequence[Record]], None]

# Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as readers with each deficiency see it.
DEFICIENCIES = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def recipe(draw: Draw) -> Recipe:
    return Recipe(
        name="sample",
        title="",
        about="",
        paper=Paper(title="", authors="", year=2023, arxiv=""),
        cases=[],
        trials=1,
        run=lambda case, seeds: [],
        summarize=lambda records: Summary(sentence="", numbers=[]),
        draw=draw,
    )


def sample(figure: Any, records: Sequence[Record]) -> None:
    left, right = panels(figure, 1, 2)
    band(left, [1, 10, 100], [[0.1, 0.2, None], [0.3, float("nan"), 0.9]], "W")
    style(left, "Correlation $W$", "step", "correlation")
    bars(right, ["d=2", "d=4"], {"W": [0.2, 0.5], "(K, Q)": [0.3, None]})
    mark_published(right, [0, 1], [0.25, None])
    style(right, "Share", "d", "share", legend="outside")


def linear(color: str) -> np.ndarray:
    channels = np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of linear RGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def themes() -> dict[str, tuple[list[str], str]]:
    """Colours of the series and of ink, and the ground they stand on; those of the dark theme are in the page."""
    css = (resources.files("attsvm.report") / "assets" / "gallery.css").read_text(encoding="utf-8")
    dark = {}
    for kind in ("fill", "stroke"):
        found = re.findall(rf'\[{kind}="(#\w+)"\] {{ {kind}: light-dark\((#\w+), (#\w+)\); }}', css)
        assert all(own == light for own, light, _ in found)
        dark[kind] = {own: other for own, _, other in found}
    assert dark["fill"] == dark["stroke"]
    assert list(dark["fill"]) == list(PALETTE)
    return {"light": ([*PALETTE, INK], "#ffffff"), "dark": ([*dark["fill"].values(), "#e7e6e2"], "#1b1e24")}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("deficiency", [None, *DEFICIENCIES])
def test_colours_stay_apart_for_everybody(deficiency: str | None, theme: str) -> None:
    # A difference of about 2 can just be seen; 15 is seen at a glance, in thin lines too.
    matrix = np.array(DEFICIENCIES[deficiency]) if deficiency else np.eye(3)
    seen = [lab(matrix @ linear(color)) for color in themes()[theme][0]]
    assert min(float(np.linalg.norm(one - two)) for one, two in itertools.combinations(seen, 2)) > 15


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_have_contrast(theme: str) -> None:
    def luminance(color: str) -> float:
        return float(linear(color) @ np.array([0.2126, 0.7152, 0.0722])) + 0.05

    colors, ground = themes()[theme]
    for color in colors:
        low, high = sorted((luminance(color), luminance(ground)))
        assert high / low >= 4.5, color


def test_mean_and_spread_of_the_values_that_are_there() -> None:
    middle, low, high = mean_and_spread([[1.0, None, 4.0, None], [3.0, 7.0, float("inf"), float("nan")]])
    np.testing.assert_allclose(middle, [2.0, 7.0, 4.0, np.nan])
    np.testing.assert_allclose(low, [1.0, 7.0, 4.0, np.nan])
    np.testing.assert_allclose(high, [3.0, 7.0, 4.0, np.nan])


def test_quartiles() -> None:
    curves = np.arange(5.0)[:, None] * np.array([[1.0, 100.0]])
    middle, low, high = mean_and_spread(curves, "quartiles")
    assert (middle.tolist(), low.tolist(), high.tolist()) == ([2.0, 200.0], [1.0, 100.0], [3.0, 300.0])


def test_band_draws_mean_and_spread() -> None:
    ax = panels(Figure())[0]
    line = band(ax, [1, 2], [[0.0, 0.6], [1.0, 1.0]], "W", "#123456", limits=(0.0, 0.9))
    assert line is not None
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.5], [2, 0.8]])
    assert line.get_color() == "#123456"
    corners = ax.collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == pytest.approx((0.0, 0.9))


def test_one_trial_has_no_band_and_none_draws_nothing() -> None:
    ax = panels(Figure())[0]
    assert band(ax, [1, 2], [[0.5, 0.7]], "one") is not None
    assert band(ax, [1, 2], [], "no trial") is None
    assert band(ax, [1, 2], [[None, None]], "no value") is None
    assert (len(ax.lines), len(ax.collections)) == (1, 0)


def test_bands_differ_in_colour_and_dash() -> None:
    ax = panels(Figure())[0]
    lines = [band(ax, [1, 2], [[0.5, 0.7], [0.4, 0.8]], str(index)) for index in range(6)]
    assert len({line.get_color() for line in lines if line}) == 6
    assert len({str(line._unscaled_dash_pattern) for line in lines if line}) == 6


def test_curves_of_other_lengths_are_refused() -> None:
    ax = panels(Figure())[0]
    with pytest.raises(InvalidInputError, match="same number of points"):
        band(ax, [1, 2], [[0.5, 0.7], [0.4]], "W")
    with pytest.raises(InvalidInputError, match="x has 3 points, the curves have 2"):
        band(ax, [1, 2, 3], [[0.5, 0.7]], "W")


def test_panels_are_row_by_row_and_sized() -> None:
    figure = Figure()
    axes = panels(figure, 2, 3, width=2.0, height=1.5, sharex=True)
    assert len(axes) == 6
    assert figure.get_size_inches().tolist() == [6.0, 3.0]
    assert axes[0].get_subplotspec().colspan.start == 0
    assert axes[4].get_subplotspec().rowspan.start == axes[4].get_subplotspec().colspan.start == 1


def test_bars_leave_gaps_and_stand_beside_each_other() -> None:
    ax = panels(Figure())[0]
    bars(ax, ["a", "b"], {"one": [1.0, 2.0], "two": [3.0, None]}, errors={"one": [0.1, None]})
    heights = [patch.get_height() for patch in ax.patches]
    np.testing.assert_allclose(heights, [1.0, 2.0, 3.0, np.nan])
    edges = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches)
    assert all(left[1] <= right[0] + 1e-9 for left, right in itertools.pairwise(edges))


def test_style_without_names_has_no_legend() -> None:
    ax = panels(Figure())[0]
    ax.plot([1, 2], [3, 4])
    style(ax, "title", "x", "y")
    assert ax.get_legend() is None
    assert (ax.get_title(loc="center"), ax.get_xlabel(), ax.get_ylabel()) == ("title", "x", "y")


def test_same_figure_gives_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert [path.name for path in draw_figure(recipe(sample), [], tmp_path / name)] == ["figure.svg", "figure.png"]
    for file in ("figure.svg", "figure.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_files_name_no_version_and_no_date(tmp_path: Path) -> None:
    vector, image = (path.read_bytes() for path in draw_figure(recipe(sample), [], tmp_path))
    for word in (matplotlib.__version__.encode(), b"matplotlib.org", b"<dc:date"):
        assert word not in vector
        assert word not in image
    assert b"<text" not in vector
    assert len(vector) < 100_000
    width, height = (int.from_bytes(image[place : place + 4], "big") for place in (16, 20))
    assert (width, height) == (int(8.4 * PNG_DPI), int(3.0 * PNG_DPI))


def test_settings_of_the_user_change_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    plain = draw_figure(recipe(sample), [], tmp_path / "a")
    with matplotlib.rc_context(
        {"font.size": 20, "lines.linewidth": 9, "savefig.bbox": "tight", "svg.fonttype": "none"}
    ):
        before = dict(matplotlib.rcParams)
        other = draw_figure(recipe(sample), [], tmp_path / "b")
        assert dict(matplotlib.rcParams) == before
    assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in other]


def test_many_points_become_an_image_inside_the_svg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crowd(figure: Any, records: Sequence[Record]) -> None:
        ax = panels(figure)[0]
        generator = np.random.default_rng(0)
        ax.scatter(*generator.normal(size=(2, 4000)), s=4)
        style(ax, "Crowd", "x", "y")

    free = draw_figure(recipe(crowd), [], tmp_path)[0].read_bytes()
    assert b"<image" not in free
    monkeypatch.setattr(plotting_module, "SVG_BYTES", 200_000)
    kept = draw_figure(recipe(crowd), [], tmp_path)[0].read_bytes()
    assert b"<image" in kept
    assert len(kept) < 200_000 < len(free)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    figure = Figure()
    panels(figure)
    with pytest.raises(AttSVMError, match=r"figure\.svg could not be written"):
        save_figure(figure, tmp_path / "absent")


def test_pyplot_stays_unloaded() -> None:
    code = (
        "import pathlib, sys, tempfile\n"
        "from attsvm.experiments.recipes.plotting import house, panels, save_figure\n"
        "assert 'matplotlib' not in sys.modules\n"
        "with house():\n"
        "    from matplotlib.figure import Figure\n"
        "    figure = Figure(); panels(figure)[0].plot([1, 2], [3, 4])\n"
        "    save_figure(figure, pathlib.Path(tempfile.mkdtemp()))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_house_puts_settings_back_after_an_error() -> None:
    before = dict(matplotlib.rcParams)
    with pytest.raises(ZeroDivisionError), house():
        raise ZeroDivisionError
    assert dict(matplotlib.rcParams) == before

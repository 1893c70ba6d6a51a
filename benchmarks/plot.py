"""The figures of the documentation, drawn from a record: the same record gives the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.record import Row

__all__ = ["draw"]

OURS, PEER, TARGET = "#1f5fa8", "#8a8f98", "#c2452d"
STYLE = {
    "svg.hashsalt": "attsvm",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Write ``benchmarks-growth.svg`` and ``benchmarks-ratios.svg``, those for which there are rows."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        growing = [row for row in rows if "points" in row]
        if growing:
            written.append(_saved(_growth(growing[0]), folder / "benchmarks-growth.svg"))
        ratios = [row for row in rows if any("at_least" in check for check in row["checks"])]
        if ratios:
            written.append(_saved(_ratios(ratios), folder / "benchmarks-ratios.svg"))
    return written


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return path


def _growth(row: Row) -> Any:
    """Time and memory over the number of constraints, with the fitted power and the bytes of the tokens."""
    points = row["points"]
    counts = np.array([point["sizes"]["constraints"] for point in points], dtype=float)
    seconds = np.array([point["ours"]["seconds"] for point in points])
    memory = {name: np.array([point["memory"][name] for point in points]) for name in ("extra_bytes", "tokens_bytes")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3.0), layout="constrained")
    slope, height = np.polyfit(np.log(counts), np.log(seconds), 1)
    left.loglog(counts, seconds, "o", color=OURS)
    left.loglog(counts, np.exp(height) * counts**slope, "-", color=OURS, linewidth=1)
    left.annotate(f"constraints$^{{{slope:.2f}}}$", (0.05, 0.88), xycoords="axes fraction", color=OURS)
    left.set(xlabel="constraints", ylabel="seconds to a gap of 1e-6")
    right.loglog(counts, memory["tokens_bytes"] / 2**20, "-", color=PEER, label="tokens")
    right.loglog(
        counts, 3 * memory["tokens_bytes"] / 2**20, "--", color=TARGET, linewidth=1, label="target: 3 x tokens"
    )
    right.loglog(counts, memory["extra_bytes"] / 2**20, "o-", color=OURS, linewidth=1, label="solver, at its peak")
    right.set(xlabel="constraints", ylabel="MiB")
    right.legend(frameon=False)
    return figure


def _ratios(rows: list[Row]) -> Any:
    """How many times as long each peer takes, with the target of each."""
    figure, axes = plt.subplots(figsize=(7.5, 0.6 + 0.34 * len(rows)), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        ratio, peer = row["ratio"], row["peer"]
        target = next(check["at_least"] for check in row["checks"] if "at_least" in check)
        axes.barh(place, ratio, height=0.6, color=OURS, hatch="///" if peer["stopped"] else None, edgecolor="white")
        axes.plot([target, target], [place - 0.4, place + 0.4], color=TARGET, linewidth=2)
        text = (" > " if peer["stopped"] else " ") + (f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.2g}x")
        axes.annotate(text, (1.1 * max(ratio, target), place), va="center")
    axes.set_xscale("log")
    axes.set_xlim(left=min(1.0, 0.5 * min(row["ratio"] for row in rows)))
    axes.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    axes.margins(x=0.15)
    axes.set_xlabel("time of the peer over ours; red: target; hatched: peer stopped, a lower limit")
    return figure

"""Which norm's max-margin solution each optimiser comes closest to: a table of optimisers and norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from attsvm.dynamics import Trajectory
from attsvm.errors import RecordError
from attsvm.experiments.optimizer_names import NamedOptimizer, norm_label
from attsvm.records import RunFolder, read_json, write_json
from attsvm.selection.norms import Norm
from attsvm.solvers import Solution

__all__ = ["compare_optimizers"]

Train = Callable[[NamedOptimizer], Trajectory]
Tell = Callable[[float, float, str], None]

TOLERANCE = 1e-3
"""Gap to which the solutions of the table are solved: correlations are shown with three digits."""


def compare_optimizers(
    optimizers: list[NamedOptimizer],
    norms: list[Norm],
    train: Train,
    folder: RunFolder,
    *,
    trained: dict[str, Trajectory],
    max_seconds: float,
    tell: Tell,
) -> dict[str, Any]:
    """Train W by each optimiser, and compare where it ends with the solution of its own selection in each norm.

    Parameters
    ----------
    optimizers, norms
        The rows and columns.
    train
        Trains W by one optimiser.
    folder
        Rows are kept in its checkpoint as soon as they are done.
    trained
        Runs that there are already, by the name of their row.
    max_seconds
        For each solution; one that is not certified by then is compared as it is, with its gap.
    tell
        Called with (done, total, note).

    Returns
    -------
    dict
        ``norms``, and ``rows`` with one correlation, gap and status for each of them.
    """
    names = [*trained, *(one.name for one in optimizers if one.name not in trained)]
    by_name = {one.name: one for one in optimizers}
    solved: dict[tuple[bytes, str], Solution] = {}
    rows = []
    for k, name in enumerate(names):
        place = folder.checkpoint / f"comparison-{k}.json"
        row = _saved(place, name, norms)
        if row is None:
            tell(k, len(names), f"{name}: training")
            run = trained[name] if name in trained else train(by_name[name])
            cells = []
            for j, norm in enumerate(norms):
                tell(k + (j + 1) / (len(norms) + 1), len(names), f"{name}: {norm_label(norm)}")
                key = np.ascontiguousarray(run.selected).tobytes(), norm_label(norm)
                if key not in solved:
                    solved[key] = run.solution(norm, tol=TOLERANCE, max_seconds=max_seconds)
                cells.append(_cell(run, solved[key], norm))
            row = _row(name, run, cells)
            write_json(place, row)
        rows.append(row)
    tell(len(names), len(names), "")
    return {"norms": [norm_label(norm) for norm in norms], "rows": rows}


def _cell(run: Trajectory, solution: Solution, norm: Norm) -> dict[str, Any]:
    known = math.isfinite(solution.upper_bound) and solution.upper_bound > 0
    return {
        "norm": norm_label(norm),
        "correlation": float(run.correlation(solution)[-1]) if known else None,
        "gap": solution.gap,
        "status": solution.status.value,
    }


def _row(name: str, run: Trajectory, cells: list[dict[str, Any]]) -> dict[str, Any]:
    known = [cell for cell in cells if cell["correlation"] is not None and math.isfinite(cell["correlation"])]
    # A solution within its gap of the best is not told from it.
    closest = max(known, key=lambda cell: cell["correlation"], default=None)
    return {
        "optimizer": name,
        "attention_mass": float(run.attention_mass[-1]),
        "norm": float(run.norm[-1]),
        "stalled": bool(run.stalled),
        "fraction_globally_optimal": run.verdicts[0].fraction_globally_optimal,
        "verdict": run.verdicts[0].kind,
        "closest": closest["norm"] if closest else None,
        "cells": cells,
    }


def _saved(place: Any, name: str, norms: list[Norm]) -> dict[str, Any] | None:
    """The row as it was kept, if it was."""
    try:
        row = read_json(place)
    except RecordError:
        return None
    fits = isinstance(row, dict) and row.get("optimizer") == name
    return row if fits and [cell["norm"] for cell in row["cells"]] == [norm_label(norm) for norm in norms] else None

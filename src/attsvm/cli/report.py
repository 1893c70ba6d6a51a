"""``attsvm report``: make the page of a run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from attsvm.experiments.recipes import NAMES
from attsvm.report import is_atlas, is_gallery, is_recipe, render_atlas, render_gallery, render_recipe, render_run

__all__ = ["report_command"]


def report_command(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run folder of verify, inspect or reproduce, or the folder of all recipes.",
            metavar="RUN",
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not print the path.")] = False,
) -> None:
    """Write report.html anew from the records of a run, and print its path.

    For the folder of all recipes of reproduce: the page of each, and index.html.
    """
    page = _render(run)
    if as_json:
        print(json.dumps({"run": str(run), "report": str(page)}))
    elif not quiet:
        print(page)


def _render(run: Path) -> Path:
    if is_recipe(run):
        return render_recipe(run)
    if is_atlas(run):
        return render_atlas(run)
    # A folder with a result of its own is a run, whatever else lies in it.
    if not (run / "result.json").exists() and is_gallery(run):
        return render_gallery(run, NAMES)
    return render_run(run)

"""``attsvm report``: make the page of a run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from attsvm.report import render_run

__all__ = ["report_command"]


def report_command(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not print the path.")] = False,
) -> None:
    """Write report.html anew from the records of a run, and print its path."""
    page = render_run(run)
    if as_json:
        print(json.dumps({"run": str(run), "report": str(page)}))
    elif not quiet:
        print(page)

"""``attsvm report``: make the page of a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attsvm.report import render_run

__all__ = ["report_command"]


def report_command(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN", show_default=False)],
) -> None:
    """Write report.html anew from the records of a run, and print its path."""
    print(render_run(run))

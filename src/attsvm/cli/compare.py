"""``attsvm compare``: two runs of ``attsvm inspect`` beside each other."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from attsvm.cli.terminal import say
from attsvm.errors import InvalidInputError, RecordError
from attsvm.microscope.comparison import compare_runs
from attsvm.records import SCHEMA_VERSION, RunFolder, write_json
from attsvm.report import render_comparison

__all__ = ["compare_command"]

_RECORD, _PAGE = "compare.json", "report.html"
_MOST_HEADS, _MOST_DIFFERENCES = 8, 3


def compare_command(
    first: Annotated[Path, typer.Argument(help="A run folder of inspect.", metavar="RUN", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Another one.", metavar="RUN", show_default=False)],
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Folder. Default: a new one in runs/.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier comparison.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary.")] = False,
) -> None:
    """Compare two runs of inspect head by head: a model before and after training, or two models.

    Writes report.html and compare.json. Heads are matched by kind, layer and number.
    """
    for run in (first, second):
        _check_run(run)
    folder = output_dir if output_dir is not None else _free_folder(first, second)
    _check_folder(folder, overwrite)
    record = compare_runs(first, second)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"{folder} could not be created: {error.strerror or error}.") from error
    page = render_comparison(first, second, folder / _PAGE)
    write_json(folder / _RECORD, {"schema_version": SCHEMA_VERSION, **record})
    if as_json:
        print(json.dumps({**record, "run": str(folder), "report": str(page)}))
    if not quiet:
        say(_summary(record, page))


def _check_run(run: Path) -> None:
    if not run.is_dir():
        raise InvalidInputError(f"compare: RUN must be a run folder of attsvm inspect, got {run}, which is no folder.")
    if not (run / "result.json").exists():
        raise InvalidInputError(
            f"compare: RUN must be a finished run of attsvm inspect, got {run} without result.json."
        )
    if RunFolder(run).read_result().get("kind") != "inspect":
        raise InvalidInputError(f"compare: RUN must be a run folder of attsvm inspect, got {run} of something else.")


def _check_folder(folder: Path, overwrite: bool) -> None:
    """A new or empty folder, or an earlier comparison that may be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InvalidInputError(f"compare: --output-dir must be a folder, got the file {folder}.")
    names = {path.name for path in folder.iterdir()}
    if not names <= {_RECORD, _PAGE} or (names and _RECORD not in names):
        raise InvalidInputError(f"compare: --output-dir must be new or empty, got {folder}, which holds other files.")
    if names and not overwrite:
        raise InvalidInputError(
            f"compare: --output-dir must be new, got {folder}, which holds a comparison. Hint: --overwrite replaces it."
        )


def _free_folder(first: Path, second: Path) -> Path:
    """``runs/compare-A-B``, with a number where that is taken."""
    name = f"compare-{first.resolve().name}-{second.resolve().name}"[:120]
    for number in itertools.count(1):
        path = Path("runs") / f"{name}{'' if number == 1 else f'-{number}'}"
        if not path.exists():
            return path
    raise AssertionError("itertools.count ended")


def _summary(record: dict[str, Any], page: Path) -> str:
    """The heads that differ most, for people."""
    a, b = record["runs"]
    lines = ["", f"{b['name']} minus {a['name']}: {record['matched']} heads matched"]
    for run, key in ((a, "only_first"), (b, "only_second")):
        if record[key]:
            lines.append(f"only in {run['name']}: {len(record[key])}, such as {record[key][0]}")
    shown = record["shown"]
    if shown["compared"]:
        lines.append(f"shown texts with the same tokens: {shown['same_tokens']} of {shown['compared']}")
    titles = {measure["key"]: measure["title"] for measure in record["measures"]}
    lines += ["", f"  {'heads':<20}{'same key':>9}  largest differences"]
    for head in record["heads"][:_MOST_HEADS]:
        name = head["first"] if head["first"] == head["second"] else f"{head['first']} ~ {head['second']}"
        same = "-" if head["same_selections"] is None else f"{head['same_selections']:.2f}"
        told = ", ".join(
            f"{titles[each['measure']]} {each['difference']:+.3g}" for each in head["differences"][:_MOST_DIFFERENCES]
        )
        lines.append(f"  {name:<20}{same:>9}  {told}")
    if len(record["heads"]) > _MOST_HEADS:
        lines.append(f"  and {len(record['heads']) - _MOST_HEADS} more, less different")
    return "\n".join([*lines, "", f"Report: {page}"])

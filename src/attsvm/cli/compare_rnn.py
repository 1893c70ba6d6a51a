"""``attsvm compare-rnn``: the table of what attention costs and buys, beside the networks it replaced."""

from __future__ import annotations

import io
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from attsvm.cli.terminal import Bars, complain, say
from attsvm.errors import InvalidInputError
from attsvm.experiments.compare_rnn import MODELS, CompareConfig, CompareFolder, compare_rnn

__all__ = ["compare_rnn_command"]

_WIDTH = 120
"""Characters of the tables where the output is no terminal."""


def compare_rnn_command(
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of the timed sequences. Default: 128,256,…,4096.", show_default=False)
    ] = None,
    distances: Annotated[
        str | None, typer.Option(help="Steps from a token to its copy. Default: 8,16,…,128.", show_default=False)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Trainings of each model at each distance. Default: 3.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each training. Default: 300.", show_default=False)] = None,
    d_model: Annotated[
        int | None,
        typer.Option(
            help="Width of the transformer that copies; the others are as large. Default: 64.", show_default=False
        ),
    ] = None,
    timed_d_model: Annotated[
        int | None, typer.Option(help="Width of the one that is timed. Default: 256.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds: shows that it works, and no more.")] = False,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Run folder.")] = Path("runs/compare-rnn"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the records of an earlier run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")] = False,
) -> None:
    """Time LSTM, LSTM with attention and transformer against length, and let them copy tokens over a distance.

    Writes a run folder with metrics.jsonl, result.json and a figure. A run that ended in any way goes on when the same
    command is given again; what is measured is not measured twice.
    """
    given: dict[str, Any] = {
        "lengths": _numbers("--lengths", lengths),
        "distances": _numbers("--distances", distances),
        "seeds": seeds,
        "steps": steps,
        "d_model": d_model,
        "timed_d_model": timed_d_model,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    config = CompareConfig.checked(
        **{**(CompareConfig.quick() if quick else {}), **chosen, "seed": seed, "device": device}
    )
    folder = CompareFolder(output_dir)
    try:
        with Bars(quiet=quiet) as bars:
            result = compare_rnn(
                config,
                folder,
                overwrite=overwrite,
                command=shlex.join(["attsvm", *sys.argv[1:]]),
                progress=lambda done, total, note: bars.tell("measurements", done, total, note),
            )
    except KeyboardInterrupt:
        without = " when given without --overwrite" if overwrite else ""
        complain(f"compare-rnn: interrupted; the same command goes on where it ended{without}.")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps({**result, "run": str(folder.path)}))
    if not quiet:
        _show(result, folder)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """``8,16,32`` as numbers."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidInputError(
            f"compare-rnn: {option} must be whole numbers with commas between them, got {text!r}."
        ) from None


def _show(result: dict[str, Any], folder: CompareFolder) -> None:
    """The tables, for people."""
    sizes = ", ".join(f"{MODELS[name]} {count}" for name, count in result["n_parameters"].items())
    say(f"\nParameters of what is timed: {sizes}")
    timing = result["timing"]
    for quantity, title in (
        ("whole", "A whole sequence in one call, µs per token"),
        ("single", "One more token after so many, µs"),
        ("dependent_steps", "Layers that wait for each other in one call"),
    ):
        factor, digits = (1, 0) if quantity == "dependent_steps" else (1e6, 1)
        rows = [
            [str(length), *(f"{factor * timing[quantity][name][at]:.{digits}f}" for name in MODELS)]
            for at, length in enumerate(result["lengths"])
        ]
        _print(title, ["tokens", *MODELS.values()], rows)
    rows = [
        [str(distance), *(_spread(result["copying"][name][at]) for name in MODELS)]
        for at, distance in enumerate(result["distances"])
    ]
    seeds = result["settings"]["seeds"]
    title = f"Accuracy of copies, mean of {seeds} trainings (lowest to highest); chance {result['chance']:.3f}"
    _print(title, ["distance", *MODELS.values()], rows)
    numbers = [
        [one["text"], f"{one['ours']:.3g}", _range(one["low"], one["high"]), one["verdict"] or "–"]
        for one in result["numbers"]
    ]
    _print("What this says", ["number", "ours", "wanted", "verdict"], numbers)
    say(f"\nRun: {folder.path}")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.2f} to {max(values):.2f})"


def _range(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    if low is not None:
        return f"≥ {low:g}"
    return "–" if high is None else f"≤ {high:g}"


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    is_terminal = sys.stderr.isatty()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="left" if column in ("number", "verdict") else "right")
        table.columns[number].no_wrap = column != "number"
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    console = Console(
        file=text, force_terminal=is_terminal, width=None if is_terminal else _WIDTH, markup=False, highlight=False
    )
    console.print(table)
    say(f"\n{title}\n")
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    # A terminal that knows fewer letters than a title gets the others as \\uXXXX.
    encoding = sys.stderr.encoding or "utf-8"
    say("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding))

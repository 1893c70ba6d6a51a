"""``attsvm reproduce``: the published figures, computed again and compared."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import shlex
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from attsvm.cli.exits import exit_code
from attsvm.cli.terminal import Bars, complain, say
from attsvm.errors import AttSVMError, InvalidInputError, UnsupportedError
from attsvm.experiments import Processes, ReproduceFolder, check_options, join_processes, reproduce, state_of
from attsvm.experiments.processes import LostProcessError
from attsvm.experiments.recipes import NAMES, Recipe, find_recipe, match_names
from attsvm.records import remove_halves
from attsvm.report import render_gallery

__all__ = ["reproduce_command"]

_AGAIN = "the same command goes on where it ended"

_WIDTH = 120
"""Characters of the tables where the output is no terminal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """What applies to every recipe."""

    trials: int | None
    seed: int | None
    workers: int | None
    overwrite: bool
    output_dir: Path
    quiet: bool

    def folder(self, recipe: Recipe) -> ReproduceFolder:
        """A folder for each recipe."""
        return ReproduceFolder(self.output_dir / recipe.name)

    def state(self, recipe: Recipe) -> str:
        """How far the run of a recipe is."""
        return state_of(recipe, self.folder(recipe), trials=self.trials, seed=self.seed)


def reproduce_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Recipes, by name or pattern ('maxmargin-*'). Without any: the list.",
            metavar="[NAME]...",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every recipe.")] = False,
    as_list: Annotated[bool, typer.Option("--list", help="Show the recipes, and how far each is.")] = False,
    trials: Annotated[
        int | None, typer.Option(help="Trials of each case. Default: as published.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first trial. Default: that of the recipe.", show_default=False)
    ] = None,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Gets a folder for each recipe, and the gallery.")
    ] = Path("runs/reproduce"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the records of earlier runs.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Trials that run side by side. Default: one a core.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")] = False,
) -> None:
    """Compute published figures again, and set their numbers beside ours.

    Writes a folder for each recipe (trials.jsonl, result.json, figure.svg, figure.png) and a gallery, index.html. A
    run that ended in any way goes on when the same command is given again; what is finished is not computed twice.
    Started by torchrun, the processes share the trials. Exit code 1 if a recipe failed.
    """
    options = _Options(
        trials=trials, seed=seed, workers=workers, overwrite=overwrite, output_dir=output_dir, quiet=quiet
    )
    with _one_voice(overwrite) as processes:
        recipes = _recipes(names or [], everything)
        if as_list or not recipes:
            if processes.is_first:
                _list(recipes or [find_recipe(name) for name in NAMES], options, as_json=as_json)
            return
        code = _reproduce_all(recipes, options, processes, as_json=as_json)
    if code:
        raise typer.Exit(code)


@contextlib.contextmanager
def _one_voice(overwrite: bool) -> Iterator[Processes]:
    """The processes of the job; of an error that ends it, only one of them speaks."""
    processes = Processes()
    try:
        with join_processes(command="reproduce", again=_AGAIN) as processes:
            yield processes
    except (AttSVMError, KeyboardInterrupt, MemoryError, OSError) as error:
        if processes.may_tell():
            if isinstance(error, KeyboardInterrupt):
                again = f"{_AGAIN} when given without --overwrite" if overwrite else _AGAIN
                complain(f"reproduce: interrupted; {again}.")
            elif isinstance(error, MemoryError):
                complain("reproduce: out of memory; fewer --workers need less.")
            elif isinstance(error, OSError):
                complain(f"reproduce: {error.filename or 'a file'}: {error.strerror or error}.")
            else:
                complain(str(error))
        _leave(exit_code(error))
        raise typer.Exit(exit_code(error)) from None


def _leave(code: int) -> None:
    """End the process now if workers are in the middle of a chunk, which nothing can stop otherwise."""
    if any(thread.name.startswith("reproduce-") for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _recipes(patterns: Sequence[str], everything: bool) -> list[Recipe]:
    if everything and patterns:
        raise InvalidInputError(f"reproduce: --all is every recipe, so no NAME may be given, got {patterns[0]!r}.")
    return [find_recipe(name) for name in (NAMES if everything else match_names(patterns))]


def _list(recipes: Sequence[Recipe], options: _Options, *, as_json: bool) -> None:
    """Show what there is: on stdout, for it is what was asked for."""
    rows = [
        {
            "name": recipe.name,
            "title": recipe.title,
            "paper": dataclasses.asdict(recipe.paper),
            "cases": len(recipe.cases),
            "trials": options.trials or recipe.trials,
            "state": options.state(recipe),
        }
        for recipe in recipes
    ]
    if as_json:
        print(json.dumps({"recipes": rows}))
        return
    table = _table("name", "title", "arXiv", "cases", "trials", "state")
    for recipe, row in zip(recipes, rows, strict=True):
        shown = (row["name"], row["title"], recipe.paper.arxiv, row["cases"], row["trials"], row["state"])
        table.add_row(*map(str, shown))
    _print(table, sys.stdout)


def _reproduce_all(recipes: Sequence[Recipe], options: _Options, processes: Processes, *, as_json: bool) -> int:
    """Run the recipes one after the other; a failure is told, and the others go on. Returns the exit code."""
    if options.quiet or not processes.is_first:  # what the library says of single trials, such as those that stalled
        logging.getLogger("attsvm").addHandler(logging.NullHandler())
    processes.together(lambda: _check_all(recipes, options) if processes.is_first else None)
    results: list[dict[str, Any]] = []
    codes = []
    for place, recipe in enumerate(recipes, start=1):
        folder = options.folder(recipe)
        skipped = processes.everywhere(not options.overwrite and options.state(recipe) == "finished")[0]
        try:
            result = _reproduce_one(recipe, options, processes, f"{place}/{len(recipes)} {recipe.name}")
        except (LostProcessError, UnsupportedError):
            raise
        except AttSVMError as error:
            if len(recipes) == 1:
                raise
            codes.append(1)
            results.append({"name": recipe.name, "run": str(folder.path), "state": "failed", "error": str(error)})
            if processes.is_first:
                complain(str(error))
            continue
        state = "skipped" if skipped else "finished"
        results.append({**result, "run": str(folder.path), "state": state})
        if processes.is_first and not options.quiet:
            _show(result, state)
    if processes.is_first and len(codes) < len(recipes):
        remove_halves(options.output_dir)
        page = render_gallery(options.output_dir, NAMES)
        if as_json:
            # As it was written, in strict JSON, and in ASCII, which every terminal and pipe takes.
            print(json.dumps({"recipes": results, "gallery": str(page)}))
        if not options.quiet:
            say(f"\nGallery: {page}")
    return max(codes, default=0)


def _check_all(recipes: Sequence[Recipe], options: _Options) -> None:
    """Refuse before anything is computed, rather than hours later."""
    for recipe in recipes:
        check_options(
            recipe,
            options.folder(recipe),
            trials=options.trials,
            seed=options.seed,
            workers=options.workers,
            overwrite=options.overwrite,
        )


def _reproduce_one(recipe: Recipe, options: _Options, processes: Processes, task: str) -> dict[str, Any]:
    with Bars(quiet=options.quiet or not processes.is_first) as bars:
        return reproduce(
            recipe,
            options.folder(recipe),
            trials=options.trials,
            seed=options.seed,
            workers=options.workers,
            processes=processes,
            overwrite=options.overwrite,
            command=shlex.join(["attsvm", *sys.argv[1:]]),
            progress=lambda done, total, left: bars.tell(task, done, total, _left(done, total, left)),
        )


def _left(done: int, total: int, seconds: float | None) -> str:
    """The trials, where a bar shows only their share, and the time left, in words."""
    trials = [f"{done} of {total} trials"] if sys.stderr.isatty() else []
    return ", ".join(trials if seconds is None or done >= total else [*trials, f"{_duration(seconds)} left"])


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"about {math.ceil(seconds)} s"
    if seconds < 90 * 60:
        return f"about {math.ceil(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"


def _show(result: dict[str, Any], state: str) -> None:
    """The numbers of a recipe, for people."""
    done = ", as finished before; --overwrite computes it again" if state == "skipped" else ""
    say(f"\n{result['name']}: {result['sentence']} ({result['counts']['trials']} trials{done})\n")
    table = _table("number", "published", "ours", "wanted", "verdict")
    for number in result["numbers"]:
        table.add_row(
            number["text"],
            _number(number["published"]),
            _number(number["ours"]),
            _range(number["low"], number["high"]),
            number["verdict"],
        )
    _print(table, sys.stderr)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def _range(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return _number(low) if low == high else f"{_number(low)} to {_number(high)}"
    if low is not None:
        return f"≥ {_number(low)}"
    return "–" if high is None else f"≤ {_number(high)}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number == 0 and column == "name")
    return table


def _print(table: Table, stream: Any) -> None:
    is_terminal = stream.isatty()
    text = io.StringIO()
    # No square bracket of a title is markup; _table takes plain text.
    console = Console(
        file=text, force_terminal=is_terminal, width=None if is_terminal else _WIDTH, markup=False, highlight=False
    )
    console.print(table)
    # A terminal that knows fewer letters than a title gets the others as \\uXXXX.
    encoding = stream.encoding or "utf-8"
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    print("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding), file=stream)

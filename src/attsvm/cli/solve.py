"""``attsvm solve``: the smallest matrix that makes the selection in a file, with its certificate."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attsvm.cli.exits import exit_code
from attsvm.cli.terminal import Bars, complain, say
from attsvm.errors import AttSVMError, InvalidInputError
from attsvm.experiments import Processes, SolveConfig, SolveFolder, join_processes, solve_file

__all__ = ["solve_command"]


def solve_command(
    file: Annotated[
        str,
        typer.Argument(
            help="A .npz or .safetensors file of tokens, queries and what they select.",
            metavar="FILE",
            show_default=False,
        ),
    ],
    norm: Annotated[
        str, typer.Option(help="fro, nuc, op, or a number p >= 1 (or inf) for the entrywise norm.", metavar="NORM")
    ] = "fro",
    penalty: Annotated[float, typer.Option(help="Price of a unit of slack; inf for the hard margin.")] = math.inf,
    tol: Annotated[float, typer.Option(help="Relative gap to reach.")] = 1e-6,
    rank: Annotated[int | None, typer.Option(help="Bound on the rank of W, for nuc.", show_default=False)] = None,
    method: Annotated[
        Literal["auto", "coordinate", "newton", "splitting", "primal-dual"],
        typer.Option(help="Which solver: coordinate and newton for fro, the last two for the others."),
    ] = "auto",
    max_seconds: Annotated[float | None, typer.Option(help="Time limit.", show_default=False)] = None,
    max_iterations: Annotated[int | None, typer.Option(help="Limit of the iterations.", show_default=False)] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="Memory for the solver's matrices. Default: 1.5 GiB.", show_default=False)
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Run folder. Default: a new one in runs/.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run, if there is one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the records of an earlier run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
) -> None:
    """Find the key-query matrix of smallest norm that makes the selection in FILE, and prove how small it can be.

    Writes a run folder with solution.safetensors and result.json. Started by torchrun, the processes share the
    sequences. Exit code 3 if no matrix exists, 1 if a limit came before the tolerance.
    """
    options = {
        "file": file,
        "norm": norm,
        "penalty": penalty,
        "rank": rank,
        "tol": tol,
        "method": method,
        "max_seconds": max_seconds,
        "max_iterations": max_iterations,
        "max_bytes": max_bytes,
    }
    with _one_voice() as processes:
        if resume and overwrite:
            raise InvalidInputError("solve: --resume and --overwrite exclude each other, got both.")
        config = SolveConfig.checked(**options)
        folder = SolveFolder(output_dir or processes.everywhere(_free_folder(config, resume=resume))[0])
        digits = -math.log10(config.tol)
        with Bars(quiet=quiet or not processes.is_first) as bars:
            result = solve_file(
                config,
                folder,
                command=shlex.join(["attsvm", *sys.argv[1:]]),
                resume=resume,
                overwrite=overwrite,
                progress=lambda iteration, gap: bars.tell("digits", *_certain(gap, digits), _note(iteration, gap)),
                processes=processes,
            )
        code = _code(result["status"])
        if processes.is_first:
            _show(result, folder, code, as_json=as_json, quiet=quiet)
    if code:
        raise typer.Exit(code)


@contextlib.contextmanager
def _one_voice() -> Iterator[Processes]:
    """The processes of the job; of an error that ends it, only one of them speaks."""
    processes = Processes()
    try:
        with join_processes() as processes:
            yield processes
    except (AttSVMError, KeyboardInterrupt, MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise  # no mistake of the user
        if not processes.may_tell():
            raise typer.Exit(exit_code(error)) from None
        if isinstance(error, KeyboardInterrupt):
            complain("solve: interrupted; --resume goes on from the last checkpoint, if there is one.")
            raise typer.Exit(130) from None
        if isinstance(error, (MemoryError, RuntimeError)):
            complain("solve: out of memory; a smaller --max-bytes, shorter sequences or fewer of them need less.")
            raise typer.Exit(1) from None
        raise


def _free_folder(config: SolveConfig, *, resume: bool) -> Path:
    """``runs/NAME``, or ``runs/NAME-2`` and so on; with ``resume`` the first with an unfinished run like this."""
    name = Path(config.file).stem.strip(".")[:100] or "run"
    paths = (Path("runs") / f"{name}{'' if number == 1 else f'-{number}'}" for number in itertools.count(1))
    for path in paths:
        folder = SolveFolder(path)
        if not path.exists() or (resume and not folder.is_final and folder.holds(config)):
            return path
    raise AssertionError("itertools.count ended")


def _certain(gap: float, digits: float) -> tuple[float, float]:
    """How many digits of the norm are certain, and how many are asked for."""
    known = -math.log10(gap) if gap > 0 else digits
    return round(min(max(known, 0.0), digits), 1), round(digits, 1)


def _note(iteration: int, gap: float) -> str:
    return f"iteration {iteration}, gap {gap:.1e}"


def _code(statuses: str | list[str]) -> int:
    """The exit code of an answer, or the worst of several."""
    codes = {"optimal": 0, "local": 0, "infeasible": 3, "interrupted": 130}
    return max(codes.get(status, 1) for status in ([statuses] if isinstance(statuses, str) else statuses))


def _show(result: dict[str, Any], folder: SolveFolder, code: int, *, as_json: bool, quiet: bool) -> None:
    """Say what came out: the record on stdout, words on stderr."""
    if as_json:
        # As it was written, in strict JSON, and in ASCII, which every terminal and pipe takes.
        print(json.dumps({**folder.read_result(), "run": str(folder.path)}))
    if not quiet:
        say(_summary(result, folder, said=bool(code)))
    if code == 130:
        complain(f"solve: interrupted; the best so far is in {folder.solution_file}, --resume goes on from it.")
    elif code:
        complain(f"solve: {result['verdict']}")


def _summary(result: dict[str, Any], folder: SolveFolder, *, said: bool) -> str:
    """The answer for people; ``said`` where the verdict follows as an error."""
    problems = f"{result['n_problems']} problems of " if result["n_problems"] is not None else ""
    lines = [
        "",
        f"{problems}{result['n_sequences']} sequences, {result['n_constraints']} constraints, d = {result['d_model']}",
        "",
        *([] if said else [result["verdict"]]),
    ]
    if result["n_problems"] is None:
        found = f"{result['n_support']} support tokens, rank {result['rank']}, margin {result['margin']:.6g};  "
        lines.append(
            f"  {found if result['ray_sequences'] is None else ''}"
            f"{result['method']}, {result['iterations']} iterations, {result['seconds']['solving']:.2f} s"
        )
    return "\n".join([*lines, "", f"Solution: {folder.solution_file}", ""])

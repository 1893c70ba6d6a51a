"""``attsvm verify``: the main job, from labelled text to a verdict and a page."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attsvm.cli.terminal import Bars, complain, say
from attsvm.errors import RecordError
from attsvm.experiments import VerifyConfig, verify
from attsvm.records import RunFolder
from attsvm.report import render_run

__all__ = ["verify_command"]


Head = Annotated[
    Literal["ridge", "logistic", "trained"],
    typer.Option(help="How the linear head is fitted on pooled tokens; or trained together with attention."),
]
Optimizers = Annotated[
    list[str] | None,
    typer.Option(
        help="ngd, gd, polyak, momentum, adam, sign, flow or mirror:P, with @RATE for a learning rate of its own. "
        "Given several times: a table shows which norm's SVM each comes closest to. Default: ngd.",
        show_default=False,
    ),
]
Norms = Annotated[
    list[str] | None,
    typer.Option(
        help="Column of that table: fro, nuc, op, or a number p for the entrywise norm (inf: largest entry); "
        "repeatable. Default: fro, nuc, inf and those of the optimisers.",
        show_default=False,
    ),
]


def verify_command(
    data: Annotated[
        str | None,
        typer.Argument(
            help="A .csv, .tsv, .jsonl or .parquet file of labelled texts, or .npz or .safetensors arrays. "
            "Without it: the film-review sentences that ship with attsvm.",
            show_default=False,
        ),
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts.", show_default=False)] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels.", show_default=False)] = None,
    model: Annotated[
        str,
        typer.Option(help="Hugging Face encoder, id or local path; 'none' for a seeded random embedding."),
    ] = "default",
    layer: Annotated[int, typer.Option(help="Hidden state that gives the tokens; -1 is the last.")] = -1,
    max_tokens: Annotated[
        int | None, typer.Option(help="Cut longer texts. Default: what the model takes.", show_default=False)
    ] = None,
    d_model: Annotated[int, typer.Option(help="Dimension of the random embedding.")] = 64,
    n_sequences: Annotated[
        int | None,
        typer.Option(
            "--n-sequences", "-n", help="Sequences to use. Default: 200 texts, all arrays.", show_default=False
        ),
    ] = None,
    parameterization: Annotated[
        Literal["W", "KQ", "both"], typer.Option(help="Train W, keys and queries (K, Q), or both.")
    ] = "both",
    rank: Annotated[int | None, typer.Option(help="Columns of K and Q. Default: d.", show_default=False)] = None,
    head: Head = "ridge",
    loss: Annotated[
        Literal["logistic", "exponential", "correlation", "squared"], typer.Option(help="Loss of the signed output.")
    ] = "logistic",
    optimizer: Optimizers = None,
    norm: Norms = None,
    max_seconds: Annotated[
        float, typer.Option(help="For each solution of that table, and in an entrywise norm.")
    ] = 60.0,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="Step size.")] = 0.1,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 3000,
    tol: Annotated[float, typer.Option(help="Relative gap of the max-margin solutions.")] = 1e-6,
    seed: Annotated[int, typer.Option(help="Of the choice of sequences and the start.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Texts that are embedded at once.")] = 32,
    device: Annotated[str, typer.Option(help="Device of the encoder.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Number format of the encoder.")
    ] = "float32",
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Run folder. Default: a new one in runs/.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the records of an earlier run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no verdict.")] = False,
) -> None:
    """Train attention on labelled data and see whether it goes where the max-margin theory says.

    Trains one attention layer, solves the Frobenius- and nuclear-norm SVM of the tokens that it selects, and writes
    a run folder with report.html. A run that was interrupted goes on when the same command is given again.
    """
    names = {"W": ("W",), "KQ": ("KQ",), "both": ("W", "KQ")}
    config = VerifyConfig.checked(
        data=data,
        text_column=text_column,
        label_column=label_column,
        model=model,
        layer=layer,
        max_tokens=max_tokens,
        d_model=d_model,
        n_sequences=n_sequences,
        parameterizations=names[parameterization],
        rank=rank,
        head=head,
        loss=loss,
        optimizers=tuple(optimizer or ("ngd",)),
        norms=tuple(norm or ()),
        max_seconds=max_seconds,
        learning_rate=learning_rate,
        steps=steps,
        tol=tol,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    folder = RunFolder(output_dir if output_dir is not None else _free_folder(config))
    try:
        with Bars(quiet=quiet) as bars:
            result = verify(config, folder, command=_command(), overwrite=overwrite, progress=bars.tell)
    except KeyboardInterrupt:
        again = "the same command without --overwrite" if overwrite else "the same command"
        complain(f"verify: interrupted; {again} goes on from the last checkpoint.")
        raise typer.Exit(130) from None
    page = render_run(folder.path)
    if as_json:
        # In ASCII, which every terminal and pipe takes.
        print(json.dumps({**folder.read_result(), "run": str(folder.path)}))
    if not quiet:
        say(_summary(result, page))


def _command() -> str:
    """The command line as it can be typed again."""
    return shlex.join(["attsvm", *sys.argv[1:]])


def _free_folder(config: VerifyConfig) -> Path:
    """``runs/NAME``, or ``runs/NAME-2`` and so on past finished runs and runs with other settings."""
    # ".." is no name, and a very long one leaves no room for a number.
    name = Path(config.data).stem.strip(".")[:100] if config.data else "movie-reviews"
    for number in itertools.count(1):
        path = Path("runs") / f"{name or 'run'}{'' if number == 1 else f'-{number}'}"
        if not path.exists() or _can_go_on(RunFolder(path), config):
            return path
    raise AssertionError("itertools.count ended")


def _can_go_on(folder: RunFolder, config: VerifyConfig) -> bool:
    """Whether the folder holds an unfinished run with these settings."""
    if folder.is_complete or not folder.config_file.exists():
        return False
    try:
        return folder.read_config().get("config") == config.model_dump(mode="json")
    except RecordError:
        return False


def _summary(result: dict[str, Any], page: Path) -> str:
    """The short verdict for people."""
    data = result["data"]
    lines = [
        "",
        f"{result['n_sequences']} sequences, {result['n_constraints']} constraints, d = {result['d_model']}"
        + (f"; {data['n_truncated']} texts cut to the model's length" if data["n_truncated"] else "")
        + (f"; {data['n_skipped']} rows without text or label skipped" if data["n_skipped"] else ""),
        "",
        result["verdict"],
        "",
    ]
    for name, one in result["parameterizations"].items():
        lines.append(
            f"  {name:<3} correlation {_number(one['correlation'])} with {one['norm']}, "
            f"{_number(one['correlation_other'])} with {one['norm_other']};  {one['status']}, gap {one['gap']:.1e}, "
            f"{one['n_support']} support tokens, rank {one['rank']};  attention {one['attention_mass']:.4f}, "
            f"{one['verdict']}"
        )
    if result["comparison"]:
        lines += ["", *_table(result["comparison"])]
    lines += ["", f"Report: {page}"]
    return "\n".join(lines)


def _table(comparison: dict[str, Any]) -> list[str]:
    """Correlations of each optimiser's W with the solutions in each norm; the largest of a row has a star."""
    rows = comparison["rows"]
    wide = max(len("optimizer"), *(len(row["optimizer"]) for row in rows))
    lines = ["  " + "optimizer".ljust(wide) + "".join(f"{norm:>10}" for norm in comparison["norms"])]
    for row in rows:
        cells = "".join(
            f"{_number(cell['correlation'])[:9] + ('*' if cell['norm'] == row['closest'] else ' '):>10}"
            for cell in row["cells"]
        )
        lines.append(f"  {row['optimizer']:<{wide}}{cells}")
    loose = max((cell["gap"] for row in rows for cell in row["cells"] if cell["gap"] is not None), default=0.0)
    return [*lines, f"  * closest; solutions are certified to a gap of {loose:.1e} or better"]


def _number(value: float | None) -> str:
    return "undefined" if value is None or value != value else f"{value:.4f}"

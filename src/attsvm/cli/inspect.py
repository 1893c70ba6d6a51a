"""``attsvm inspect``: the heads of a pretrained model, in one page."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attsvm.cli.terminal import Bars, complain, say
from attsvm.data import load_sample, read_text_column
from attsvm.errors import InvalidInputError, RecordError
from attsvm.experiments.generate_text import read_texts
from attsvm.microscope import HeadAtlas, InspectConfig, inspect_into
from attsvm.records import RunFolder
from attsvm.report import render_atlas

__all__ = ["inspect_command"]

_TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")


def inspect_command(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face model: a folder, a .gguf file, or an id.", show_default=False)
    ],
    data: Annotated[
        str | None,
        typer.Argument(
            help="A table (.csv, .tsv, .jsonl, .parquet), a text file, a picture, or a folder of pictures. Without "
            "it and without --text: the film-review sentences that ship with attsvm.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="A text; repeatable.", show_default=False)
    ] = None,
    text_file: Annotated[Path | None, typer.Option(help="A file with a text on each line.", show_default=False)] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts of a table.", show_default=False)] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="What the decoder reads for each text, in order; default its own output.", show_default=False
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or id of the tokenizer. Default: the model's.", show_default=False)
    ] = None,
    n_texts: Annotated[int, typer.Option("--n-texts", "-n", help="Texts to use at most.", min=1)] = 300,
    layers: Annotated[str | None, typer.Option(help="Such as 0,4-6. Default: all.", show_default=False)] = None,
    heads: Annotated[str | None, typer.Option(help="Such as L0.H3,L5.H1. Default: all.", show_default=False)] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Cut texts in windows of this length. Default: what the model takes.", show_default=False),
    ] = None,
    special: Annotated[
        Literal["keep", "drop"], typer.Option(help="Special tokens as queries and keys of the measures.")
    ] = "keep",
    space: Annotated[
        Literal["auto", "score", "residual"], typer.Option(help="Where the max-margin problems are posed.")
    ] = "auto",
    max_queries: Annotated[int, typer.Option(help="Queries of a head's max-margin problem; 0 leaves it out.")] = 600,
    shown: Annotated[int, typer.Option(help="Texts that the page shows in full.", min=0)] = 3,
    null: Annotated[bool, typer.Option("--null/--no-null", help="Compare with random matrices.")] = True,
    max_seconds: Annotated[float, typer.Option(help="For each max-margin solution.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the random matrices.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Texts that run at once.")] = 16,
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16", "float64"], typer.Option(help="Number format of the model.")
    ] = "float32",
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Run folder. Default: a new one in runs/.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the records of an earlier run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
) -> None:
    """See which tokens each attention head of a model selects, with what margin, and how near it is to max-margin.

    Writes a run folder with report.html. A run that was interrupted goes on when the same command is given again.
    """
    config = InspectConfig.checked(
        layers=_layers(layers),
        heads=tuple(part.strip() for part in heads.split(",")) if heads is not None else None,
        max_tokens=max_tokens,
        special=special,
        space=space,
        max_queries=max_queries,
        n_shown=shown,
        null=null,
        max_seconds=max_seconds,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    texts = _texts(data, text, text_file, text_column)[:n_texts]
    folder = RunFolder(output_dir if output_dir is not None else _free_folder(model))
    try:
        with Bars(quiet=quiet) as bars:
            atlas = inspect_into(
                folder,
                model,
                tokenizer,
                texts,
                targets=target or None,
                config=config,
                command=_command(),
                overwrite=overwrite,
                progress=bars.tell,
            )
    except KeyboardInterrupt:
        complain(f"inspect: interrupted; the same command with --output-dir {folder.path} goes on where it was.")
        raise typer.Exit(130) from None
    page = render_atlas(folder.path)
    if as_json:
        print(json.dumps({**atlas.record, "run": str(folder.path), "report": str(page)}))
    if not quiet:
        say(_summary(atlas, page))


def _layers(given: str | None) -> tuple[int, ...] | None:
    """Numbers and ranges, ends included."""
    if given is None:
        return None
    found: list[int] = []
    for part in given.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise InvalidInputError(f"inspect: --layers must be numbers and ranges such as 0,4-6, got {given!r}.")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(found))


def _texts(
    data: str | None,
    text: list[str] | None,
    text_file: Path | None,
    text_column: str | None,
) -> list[Any]:
    """What to look at: the given texts, the file, or the sample."""
    given = sum((data is not None, bool(text), text_file is not None))
    if given > 1 and not (text and text_file and data is None):
        raise InvalidInputError("inspect: texts must come from DATA or from --text and --text-file, got both.")
    if text_column is not None and (data is None or Path(data).suffix.lower() not in _TABLES):
        raise InvalidInputError(f"inspect: --text-column must come with a table as DATA, got {data or 'no DATA'}.")
    if data is not None:
        return _of_data(Path(data), text_column)
    return list(read_texts(text or [], text_file, where="inspect") if given else load_sample().texts)


def _of_data(path: Path, text_column: str | None) -> list[Any]:
    try:
        there = path.exists()
    except OSError:  # longer than a name may be
        there = False
    if not there:
        raise InvalidInputError(
            f"inspect: DATA must be an existing file or folder, got {str(path)!r}. Hint: --text takes a text itself."
        )
    if path.is_dir():
        pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in _PICTURES)
        if not pictures:
            raise InvalidInputError(f"inspect: DATA must be a file or a folder of pictures, got {path} without any.")
        return list(pictures)
    suffix = path.suffix.lower()
    if suffix in _PICTURES:
        return [path]
    if suffix in _TABLES:
        return list(read_text_column(path, text_column=text_column))
    return list(read_texts([], path, where="inspect"))


def _command() -> str:
    """The command line as it can be typed again."""
    return shlex.join(["attsvm", *sys.argv[1:]])


def _free_folder(model: str) -> Path:
    """``runs/inspect-NAME``, or with a number past finished runs and runs of other commands."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).name).strip(".-")[:80] or "model"
    for number in itertools.count(1):
        path = Path("runs") / f"inspect-{name}{'' if number == 1 else f'-{number}'}"
        if not path.exists() or _can_go_on(RunFolder(path)):
            return path
    raise AssertionError("itertools.count ended")


def _can_go_on(folder: RunFolder) -> bool:
    """Whether the folder holds an unfinished run of this command."""
    if folder.is_complete or not folder.config_file.exists():
        return False
    try:
        return folder.read_config().get("command") == _command()
    except RecordError:
        return False


def _summary(atlas: HeadAtlas, page: Path) -> str:
    """A table of the hardest heads and those nearest to max-margin, for people."""
    record = atlas.record
    corpus, check = record["corpus"], record["check"]
    lines = [
        "",
        f"{record['model']['name']}: {len(atlas)} heads, {corpus['n_texts']} texts, {corpus['n_tokens']} tokens",
        f"softmax of what was captured against the model's own: {check['max_difference']:.1e}"
        if check["compared"]
        else check["note"],
        *corpus["notes"],
        "",
    ]
    primary = record["primary"]
    keys = ["top_probability", "margin"]
    if primary:
        keys += [f"{primary['space']}.{primary['norm']}.{name}" for name in ("correlation", "heldout")]
    titles = ["hardness", "margin", "correlation", "held-out"][: len(keys)]
    lines.append(f"  {'head':<16}{'kind':<14}" + "".join(f"{title:>12}" for title in titles))
    ranked = sorted(atlas, key=lambda head: -(head["top_probability"] or 0.0))
    for head in ranked[:8]:
        values = [head.values.get(key) for key in keys]
        cells = "".join(f"{'-' if value is None else format(value['mean'], '.3f'):>12}" for value in values)
        lines.append(f"  {head.label:<16}{head.head_kind:<14}{cells}")
    if len(atlas) > 8:
        lines.append(f"  and {len(atlas) - 8} more, less hard")
    return "\n".join([*lines, "", f"Report: {page}"])

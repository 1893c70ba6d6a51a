"""``attsvm compare-rnn``: what attention costs and what it buys, measured so that no measurement can be lost."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch

from attsvm.errors import InvalidInputError, RecordError, UnsupportedError
from attsvm.experiments.recipes.plotting import PALETTE, SOFT, band, house, panels, save_figure, style
from attsvm.experiments.recipes.recipe import Number
from attsvm.experiments.rnn_measurements import MODELS, CompareConfig, copy_accuracy, time_models
from attsvm.records import RunFolder, package_versions, source_commit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MODELS", "CompareConfig", "CompareFolder", "compare_rnn"]

Measurement: TypeAlias = dict[str, Any]


class CompareFolder(RunFolder):
    """A run folder with a figure in it; ``metrics.jsonl`` has a line for each finished measurement."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self.svg_file = self.path / "figure.svg"
        self.png_file = self.path / "figure.png"

    def clear(self) -> None:
        """Remove the records, and the figure with them."""
        super().clear()
        self.svg_file.unlink(missing_ok=True)
        self.png_file.unlink(missing_ok=True)

    def settings(self) -> Any:
        """The settings of the run in the folder; None for no run of this kind, or a damaged record."""
        try:
            record = self.read_config()
        except RecordError:
            return None
        return record.get("config") if record.get("kind") == "compare-rnn" else None


class _Cell(NamedTuple):
    """One thing to measure: the times at a length, or what a model copies over a distance after one training."""

    kind: Literal["time", "copy"]
    size: int
    model: str = ""
    seed: int = 0

    def describe(self) -> str:
        if self.kind == "time":
            return f"time at length {self.size}"
        return f"{MODELS[self.model]}, distance {self.size}, seed {self.seed}"


def compare_rnn(
    config: CompareConfig,
    folder: CompareFolder,
    *,
    overwrite: bool = False,
    command: str = "",
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure times and copying, and leave records, numbers and a figure in ``folder``.

    Each finished measurement is on disk before the next begins; a run that ended in any way goes on when it is called
    again. A folder with a finished run of the same settings is left as it is.

    Parameters
    ----------
    config
        The settings.
    folder
        Where the records go.
    overwrite
        Whether the records of an earlier run may be replaced.
    command
        How to run it again, for the record.
    progress
        Called with (measurements done, measurements in all, what comes next).

    Returns
    -------
    dict
        The content of ``result.json``.

    Raises
    ------
    InvalidInputError
        If the folder holds something else and ``overwrite`` is False.
    RecordError
        If the folder cannot be written, is in use, or a record in it is damaged.
    """
    settings = config.model_dump(mode="json")
    _check_folder(folder, settings, overwrite)
    if folder.is_complete and not overwrite:
        return folder.read_result()
    with folder.lock():
        if overwrite:
            folder.clear()
            folder.create()
        if not folder.config_file.exists():
            _begin(folder, settings, command)
        cells = _cells(config)
        rows = _read(folder, cells)
        done = {_Cell(*row["cell"]) for row in rows}
        for cell in cells:
            if cell in done:
                continue
            if progress is not None:
                progress(len(rows), len(cells), cell.describe())
            rows.append({"cell": list(cell), **_measure(config, cell)})
            folder.write_metrics(rows)
        if progress is not None:
            progress(len(rows), len(cells), "")
        result = _result(config, settings, rows)
        _draw(result, folder.path)
        folder.write_result(result)
        shutil.rmtree(folder.checkpoint, ignore_errors=True)
    return folder.read_result()


def _read(folder: CompareFolder, cells: Sequence[_Cell]) -> list[Measurement]:
    """The finished measurements; raises RecordError for a line that is none of this run."""
    rows = folder.read_metrics() if folder.metrics_file.exists() else []
    for number, row in enumerate(rows, start=1):
        cell = row.get("cell") if isinstance(row, dict) else None
        wanted = "accuracy" if isinstance(cell, list) and cell[:1] == ["copy"] else "whole"
        if not isinstance(cell, list) or tuple(cell) not in cells or wanted not in row:
            raise RecordError(
                f"{folder.metrics_file}, line {number}, does not belong to this run; --overwrite begins anew."
            )
    return rows


def _begin(folder: CompareFolder, settings: Mapping[str, Any], command: str) -> None:
    about = {
        "kind": "compare-rnn",
        "command": command,
        "versions": package_versions("torch", "numpy"),
        "commit": source_commit(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }
    folder.write_config({**about, "config": settings})


def _check_folder(folder: CompareFolder, settings: Mapping[str, Any], overwrite: bool) -> None:
    where = f"compare-rnn: --output-dir {folder.path}"
    if not folder.path.exists():
        return
    if not folder.path.is_dir():
        raise InvalidInputError(f"{where} must be a folder, and is a file.")
    if folder.holds_other_files:
        raise InvalidInputError(f"{where} must be new, or a run of attsvm; it holds other files.")
    if not overwrite and folder.config_file.exists() and folder.settings() != settings:
        raise InvalidInputError(
            f"{where} must hold a run with these settings, and holds another; choose another folder or add --overwrite."
        )


def _cells(config: CompareConfig) -> list[_Cell]:
    """All that is measured: the times first, then for each seed every model at every distance."""
    seeds = range(config.seed, config.seed + config.seeds)
    return [
        *(_Cell("time", length) for length in config.lengths),
        *(_Cell("copy", d, name, seed) for seed, d, name in itertools.product(seeds, config.distances, MODELS)),
    ]


def _measure(config: CompareConfig, cell: _Cell) -> Measurement:
    if cell.kind == "time":
        return time_models(config, cell.size)
    return {"accuracy": copy_accuracy(config, cell.model, cell.size, cell.seed)}


def _result(config: CompareConfig, settings: Mapping[str, Any], rows: Sequence[Measurement]) -> dict[str, Any]:
    """The content of ``result.json``."""
    by_cell = {_Cell(*row["cell"]): row for row in rows}
    times = [by_cell[_Cell("time", length)] for length in config.lengths]
    seeds = range(config.seed, config.seed + config.seeds)
    copying = {
        name: [
            [by_cell[_Cell("copy", distance, name, seed)]["accuracy"] for seed in seeds]
            for distance in config.distances
        ]
        for name in MODELS
    }
    quantities = ("whole", "single", "flops", "dependent_steps")
    timing = {quantity: {name: [one[quantity][name] for one in times] for name in MODELS} for quantity in quantities}
    numbers = [*_time_numbers(config, timing), *_copy_numbers(config, copying)]
    return {
        "kind": "compare-rnn",
        "settings": dict(settings),
        "models": dict(MODELS),
        "n_parameters": times[0]["n_parameters"],
        "lengths": list(config.lengths),
        "distances": list(config.distances),
        "chance": 1 / config.symbols,
        "timing": timing,
        "copying": copying,
        "numbers": [
            {
                "text": one.text,
                "ours": one.ours,
                "low": one.low,
                "high": one.high,
                "verdict": None if one.low is None and one.high is None else one.verdict,
            }
            for one in numbers
        ],
    }


def _time_numbers(config: CompareConfig, timing: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Number]:
    """What the times say: linear or more, side by side or one after the other.

    The power of the transformer lies between 1, while its linear maps dominate, and 2; more than linear is asked for.
    """
    lengths, whole, single = config.lengths, timing["whole"], timing["single"]
    short, long = lengths[0], lengths[-1]

    def power(name: str) -> float:
        """The power of the length as which the time of a whole sequence grows, between the two longest."""
        before, after = (whole[name][at] * lengths[at] for at in (-2, -1))
        return math.log(after / before) / math.log(lengths[-1] / lengths[-2])

    def growth(name: str) -> float:
        return single[name][-1] / single[name][0]

    def lead(at: int) -> float:
        return whole["lstm"][at] / whole["transformer"][at]

    grows = f"a whole sequence takes its length to the power (from {lengths[-2]} to {long} tokens)"
    more = f"one more token after {long} tokens takes times one after {short}"
    faster = "LSTM: time of a whole sequence over that of the transformer, at {} tokens"
    return [
        Number(text=f"LSTM: {grows}", ours=power("lstm"), low=0.8, high=1.2),
        Number(text=f"Transformer: {grows}", ours=power("transformer"), low=1.2),
        Number(text=f"LSTM: {more}", ours=growth("lstm"), low=0.7, high=1.4),
        Number(text=f"LSTM with attention: {more}", ours=growth("lstm-attention"), low=1.1),
        Number(text=f"Transformer: {more}", ours=growth("transformer"), low=1.1),
        Number(text=faster.format(short), ours=lead(0)),  # depends on the hardware: no range
        Number(text=faster.format(long), ours=lead(-1)),
    ]


def _copy_numbers(config: CompareConfig, copying: Mapping[str, Sequence[Sequence[float]]]) -> list[Number]:
    """What the copies say: who still knows a token after how many steps."""
    short, long = config.distances[0], config.distances[-1]

    def accuracy(name: str, at: int, *, low: float | None = None, high: float | None = None) -> Number:
        text = f"{MODELS[name]}: accuracy of copies at distance {config.distances[at]}"
        return Number(text=text, ours=statistics.fmean(copying[name][at]), low=low, high=high)

    assert short < long
    return [
        *(accuracy(name, 0, low=0.9) for name in MODELS),
        *(accuracy(name, -1, high=0.5) for name in ("lstm", "lstm-seq2seq")),
        *(accuracy(name, -1, low=0.95) for name in ("lstm-attention", "transformer")),
    ]


def _draw(result: Mapping[str, Any], folder: Path) -> None:
    """Write the figure, where matplotlib is installed."""
    with contextlib.suppress(UnsupportedError), house():
        from matplotlib.figure import Figure

        figure = Figure()
        _draw_on(figure, result)
        save_figure(figure, folder)


def _draw_on(figure: Figure, result: Mapping[str, Any]) -> None:
    left, middle, right = panels(figure, 1, 3, width=3.8, height=3.6)
    titles = {"whole": "Whole sequence in one call", "single": "One more token"}
    for ax, (quantity, title) in zip((left, middle), titles.items(), strict=True):
        for color, (name, text) in zip(PALETTE, MODELS.items(), strict=False):
            microseconds = [1e6 * seconds for seconds in result["timing"][quantity][name]]
            ax.plot(result["lengths"], microseconds, marker="o", color=color, label=text)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        style(ax, title, "tokens", "µs per token", legend=False)
    for color, (name, text) in zip(PALETTE, MODELS.items(), strict=False):
        of_seeds = list(zip(*result["copying"][name], strict=True))
        band(right, result["distances"], of_seeds, text, color, limits=(0.0, 1.0), marker="o")
    right.axhline(result["chance"], color=SOFT, linewidth=0.8, label="chance")
    right.set_xscale("log", base=2)
    style(right, "Copying", "distance", "accuracy", legend=False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(MODELS) + 1)

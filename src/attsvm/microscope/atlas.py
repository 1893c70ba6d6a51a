"""What an inspection found: one record of every head, as plain data."""

from __future__ import annotations

import html
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from attsvm.errors import InvalidInputError, RecordError
from attsvm.records import RunFolder, read_arrays, write_arrays, write_bytes

if TYPE_CHECKING:
    import pandas

__all__ = ["MATRICES", "HeadAtlas", "HeadRecord"]

Array = npt.NDArray[Any]

MATRICES = "solutions.safetensors"
"""File of the max-margin matrices in a run folder, named ``<label>.<space>.<norm>``."""


@dataclass(frozen=True, kw_only=True)
class HeadRecord:
    """One head.

    Attributes
    ----------
    label
        ``L5.H3``, or with its kind ``cross.L0.H2``.
    kind
        ``"encoder"``, ``"decoder"`` or ``"cross"``.
    layer, head, kv_head
        From 0.
    module
        Qualified name of its module.
    head_kind
        What it mostly does: ``"previous"``, ``"same_token"``, ... or ``"mixed"``.
    values
        Measure -> ``{"mean", "low", "high", "n"}``, or None where undefined; low and high bound the 95 % interval.
    solutions
        The max-margin solutions of its own selections; :class:`~attsvm.microscope.solutions.HeadSolution` names the
        entries.
    spectra
        Singular values of the head's own matrix and of the solutions, the largest scaled to 1.
    soft
        The finite and the directional part, or None.
    top_tokens
        The tokens selected most often, with their shares.
    matrices
        ``"<space>.<norm>"`` -> W (d, d) of the solutions.
    """

    label: str
    kind: str
    layer: int
    head: int
    kv_head: int
    module: str
    head_kind: str
    values: dict[str, dict[str, float] | None]
    solutions: list[dict[str, Any]]
    spectra: dict[str, list[float]]
    soft: dict[str, Any] | None
    top_tokens: list[list[Any]]
    matrices: dict[str, Array]

    def __getitem__(self, measure: str) -> float | None:
        """The mean of one measure."""
        if measure not in self.values:
            raise InvalidInputError(f"HeadRecord: measure must be one of {', '.join(self.values)}; got {measure}.")
        value = self.values[measure]
        return None if value is None else value["mean"]

    def _repr_html_(self) -> str:
        """The values as a table, in a notebook."""
        rows = "".join(
            f"<tr><td>{html.escape(key)}</td><td>{'' if value is None else format(value['mean'], '.4g')}</td></tr>"
            for key, value in self.values.items()
        )
        return f"<table><caption>{html.escape(self.label)}, {html.escape(self.head_kind)}</caption>{rows}</table>"


class HeadAtlas:
    """All heads of one inspection.

    Made by :func:`attsvm.microscope.inspect`, or read with :meth:`load`.

    Parameters
    ----------
    record
        The content of ``result.json``.
    arrays
        The content of ``arrays.safetensors``.
    matrices
        Max-margin matrices, ``<label>.<space>.<norm>`` -> (d, d).
    settings
        The content of ``config.json``.

    Examples
    --------
    >>> atlas = HeadAtlas.load("runs/inspect")  # doctest: +SKIP
    >>> atlas["L5.H3"]["margin"]  # doctest: +SKIP
    4.2
    """

    def __init__(
        self,
        record: dict[str, Any],
        arrays: dict[str, Array],
        matrices: dict[str, Array] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.record = record
        self.arrays = arrays
        self.matrices = matrices or {}
        self.settings = settings or {}
        self._by_label = {head["label"]: head for head in record["heads"]}
        self._modules = {module["index"]: module["name"] for module in record["modules"]}

    # ---------------------------------------------------------------- heads

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of all heads, in the model's order."""
        return tuple(self._by_label)

    def __len__(self) -> int:
        """Number of heads."""
        return len(self._by_label)

    def __iter__(self) -> Iterator[HeadRecord]:
        """Go through the heads."""
        return (self[label] for label in self._by_label)

    def __getitem__(self, label: str) -> HeadRecord:
        """One head by its label.

        Raises
        ------
        InvalidInputError
            If there is none of that name; with the kinds where the label leaves them open.
        """
        if label not in self._by_label:
            alike = [known for known in self._by_label if known.endswith(f".{label}")]
            known = " or ".join(alike) if alike else f"{self.labels[0]} to {self.labels[-1]}"
            raise InvalidInputError(f"HeadAtlas: label must be one of its heads, {known}; got {label}.")
        head = self._by_label[label]
        prefix = f"{label}."
        matrices = {name.removeprefix(prefix): W for name, W in self.matrices.items() if name.startswith(prefix)}
        own = {name: head[name] for name in HeadRecord.__dataclass_fields__ if name in head and name != "module"}
        return HeadRecord(**own, module=self._modules[head["module"]], matrices=matrices)

    @property
    def similarity(self) -> Array | None:
        """(heads, heads): share of sampled queries for which two heads of the same texts select the same key."""
        return self.arrays.get("similarity")

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a head: label, kind, layer, head, head_kind, and of every measure its mean and interval.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        import pandas

        rows = []
        for head in self.record["heads"]:
            row = {name: head[name] for name in ("label", "kind", "layer", "head", "kv_head", "head_kind")}
            for key, value in head["values"].items():
                row[key] = None if value is None else value["mean"]
                if value is not None and value.get("low") is not None:
                    row |= {f"{key}_low": value["low"], f"{key}_high": value["high"]}
            rows.append(row)
        return pandas.DataFrame(rows).set_index("label")

    def layers(self) -> pandas.DataFrame:
        """One row for each kind and layer: the mean of every measure over its heads, and a 95 % interval.

        The interval is the mean of the heads' intervals. It covers at least what it says, whatever the heads have in
        common: the standard deviation of a mean is no larger than the mean of the standard deviations.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        heads = self.to_dataframe().drop(columns=["head", "kv_head", "head_kind"])
        numbers = heads.set_index(["kind", "layer"]).apply(lambda column: column.astype(float))
        means: pandas.DataFrame = numbers.groupby(level=["kind", "layer"], sort=False).mean()
        return means

    # ---------------------------------------------------------------- disk

    def save(self, path: Path | str) -> Path:
        """Write a run folder: ``config.json``, ``arrays.safetensors``, ``solutions.safetensors``, ``result.json``.

        Parameters
        ----------
        path
            A new folder, or one that holds a run, whose records are replaced.

        Raises
        ------
        RecordError
            If it cannot be written.
        """
        folder = RunFolder(path)
        if folder.path.exists() and folder.holds_other_files:
            raise RecordError(f"{folder.path} must be new, or a run of attsvm; it holds other files.")
        with folder.lock():
            self.write(folder)
        return folder.path

    def write(self, folder: RunFolder) -> None:
        """Write the records into a folder that is held already; ``result.json``, which completes it, comes last."""
        folder.write_config({name: value for name, value in self.settings.items() if name != "schema_version"})
        folder.write_arrays(self.arrays)
        write_arrays(folder.path / MATRICES, self.matrices)
        folder.write_result({name: value for name, value in self.record.items() if name != "schema_version"})
        shutil.rmtree(folder.checkpoint, ignore_errors=True)

    @classmethod
    def load(cls, path: Path | str) -> HeadAtlas:
        """Read what :meth:`save` or ``attsvm inspect`` wrote.

        Raises
        ------
        RecordError
            If a record is missing, damaged or of another kind.
        """
        folder = RunFolder(path)
        record = folder.read_result()
        if record.get("kind") != "inspect":
            raise RecordError(f"{folder.result_file} is not a record of inspect; it says {record.get('kind')}.")
        matrices = read_arrays(folder.path / MATRICES) if (folder.path / MATRICES).exists() else {}
        settings = folder.read_config() if folder.config_file.exists() else {}
        return cls(record, folder.read_arrays(), matrices, settings)

    # ---------------------------------------------------------------- showing

    def report(self, path: Path | str | None = None) -> Path:
        """Write the page: one HTML file that needs no network.

        Parameters
        ----------
        path
            Where; default ``attsvm-inspect.html`` in the working directory.

        Raises
        ------
        RecordError
            If it cannot be written.
        """
        target = Path("attsvm-inspect.html" if path is None else path)
        write_bytes(target, self.to_html().encode("utf-8", errors="backslashreplace"))
        return target

    def to_html(self) -> str:
        """The page as text."""
        from attsvm.report import atlas_html

        with tempfile.TemporaryDirectory() as folder:
            return atlas_html(self.save(Path(folder) / "run"))

    def _repr_html_(self) -> str:
        """The page in a notebook, in a frame that can touch nothing outside it."""
        page = html.escape(self.to_html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts allow-downloads" title="attention heads" '
            'style="width:100%;height:720px;border:0"></iframe>'
        )

    def __repr__(self) -> str:
        """One line."""
        corpus = self.record["corpus"]
        return f"HeadAtlas({self.record['model']['name']}: {len(self)} heads, {corpus['n_tokens']} tokens)"

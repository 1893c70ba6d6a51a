"""From what a user calls the data (nothing, or a file) to its reader."""

from __future__ import annotations

from pathlib import Path

from attsvm.data.arrays import ARRAY_SUFFIXES, LabelledArrays, read_arrays_file
from attsvm.data.files import check_file
from attsvm.data.sample import load_sample
from attsvm.data.tables import READERS
from attsvm.data.text import LabelledText, read_labelled_text
from attsvm.errors import InvalidInputError

__all__ = ["SUFFIXES", "load_data"]

SUFFIXES = (*READERS, *ARRAY_SUFFIXES)
"""Suffixes of the files that :func:`load_data` reads."""


def load_data(
    source: Path | str | None = None, *, text_column: str | None = None, label_column: str | None = None
) -> LabelledText | LabelledArrays:
    """Read labelled texts or labelled arrays.

    Parameters
    ----------
    source
        None for the sample that ships with attsvm; otherwise a file, read by its suffix:
        ``.csv .tsv .jsonl .json .parquet`` hold texts, ``.npz .safetensors`` arrays.
    text_column, label_column
        For files of texts only: the names of the columns.

    Raises
    ------
    InvalidInputError
        If the file is not usable (the readers say why), or columns are named where there are none.
    """
    named = [
        f"{name} {value!r}"
        for name, value in (("text_column", text_column), ("label_column", label_column))
        if value is not None
    ]
    path = None if source is None else Path(source)
    if named and (path is None or path.suffix.lower() in ARRAY_SUFFIXES):
        kind = "the sample" if path is None else f"a file of arrays ({path})"
        raise InvalidInputError(f"load_data: {kind} must be read without column names, got {' and '.join(named)}.")
    if path is None:
        return load_sample()
    check_file(path, SUFFIXES, "load_data")
    if path.suffix.lower() in ARRAY_SUFFIXES:
        return read_arrays_file(path)
    return read_labelled_text(path, text_column=text_column, label_column=label_column)

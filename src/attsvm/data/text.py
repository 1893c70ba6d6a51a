"""Texts with two kinds of labels: the record, its reader, and a balanced draw from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from attsvm.data.files import check_file, preview, well_formed
from attsvm.data.labels import label_name, signs
from attsvm.data.tables import READERS, Row
from attsvm.errors import InvalidInputError

__all__ = ["LabelledText", "hash_labelled_text", "read_labelled_text", "read_text_column", "subsample"]

TEXT_COLUMNS = ("text", "sentence", "review", "content", "comment", "tweet", "message", "body", "snippet")
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "target", "category", "polarity")


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """Texts, each with a label -1 or +1.

    Attributes
    ----------
    texts
        n texts, stripped of white space at both ends, none of them empty.
    labels
        n labels, -1 or +1.
    label_names
        What -1 and +1 are called in the source: (negative, positive).
    source
        Where the texts come from, for people: a path or the name of a sample.
    content_hash
        SHA-256 (hexadecimal) over texts, labels and label names.
    n_skipped
        Rows of the source that were left out because their text or label is empty.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    label_names: tuple[str, str]
    source: str
    content_hash: str
    n_skipped: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def counts(self) -> tuple[int, int]:
        """Number of texts labelled -1, and +1."""
        positive = sum(label > 0 for label in self.labels)
        return len(self.labels) - positive, positive

    def keep(self, indices: Iterable[int]) -> LabelledText:
        """The texts at ``indices``, in that order, with the hash of what is kept."""
        chosen = [int(index) for index in indices]
        texts = tuple(self.texts[index] for index in chosen)
        labels = tuple(self.labels[index] for index in chosen)
        content_hash = hash_labelled_text(texts, labels, self.label_names)
        return replace(self, texts=texts, labels=labels, content_hash=content_hash)


def hash_labelled_text(texts: Sequence[str], labels: Sequence[int], label_names: tuple[str, str]) -> str:
    """SHA-256 (hexadecimal) of the content of a :class:`LabelledText`; the source plays no part in it."""
    content = json.dumps([list(texts), list(labels), list(label_names)], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(content.encode("ascii")).hexdigest()


def read_labelled_text(
    path: Path | str, *, text_column: str | None = None, label_column: str | None = None
) -> LabelledText:
    """Read texts with two kinds of labels from a CSV, TSV, JSON lines or Parquet file.

    The smaller of two numbers becomes -1; recognised pairs (negative/positive, no/yes, ham/spam, ...) are taken as they
    say; other labels in the order of sorting. ``label_names`` of the result states it.

    Parameters
    ----------
    path
        A ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` (lines, or one array) or ``.parquet`` file, in UTF-8.
    text_column, label_column
        Names of the columns. By default the one column with a usual name (``text``, ``sentence``, ``review``, ...;
        ``label``, ``sentiment``, ``class``, ...).

    Returns
    -------
    LabelledText
        In the order of the file. Rows whose text or label is empty are left out and counted in ``n_skipped``.

    Raises
    ------
    InvalidInputError
        If the file cannot be read as what its suffix says (the message names the line), a column is missing or
        ambiguous, no row is usable, or the labels are not of exactly two kinds.
    UnsupportedError
        If a Parquet file is given and pyarrow is not installed.
    """
    path = Path(path)
    check_file(path, READERS, "read_labelled_text")
    label_columns: list[str] = []

    def choose(columns: Sequence[str]) -> tuple[str, str]:
        text, label = _choose_columns(path, columns, text_column, label_column)
        label_columns.append(label)
        return text, label

    rows = READERS[path.suffix.lower()](path, choose)
    return _labelled(rows, str(path), f"column {label_columns[0]!r} of {path}")


def read_text_column(path: Path | str, *, text_column: str | None = None) -> tuple[str, ...]:
    """Read texts without labels from a CSV, TSV, JSON lines or Parquet file; empty ones are left out.

    Parameters
    ----------
    path
        As in :func:`read_labelled_text`.
    text_column
        Name of the column. By default the one column with a usual name.

    Raises
    ------
    InvalidInputError
        As in :func:`read_labelled_text`, or if every text is empty.
    """
    path = Path(path)
    check_file(path, READERS, "read_text_column")

    def choose(columns: Sequence[str]) -> tuple[str, str]:
        name = _column(columns, text_column, "text_column", TEXT_COLUMNS)
        return name, name

    texts = tuple(text for row in READERS[path.suffix.lower()](path, choose) if (text := _text_of(row)))
    if not texts:
        raise InvalidInputError(f"read_text_column: {path} must hold at least one text that is not empty, got none.")
    return texts


def subsample(data: LabelledText, n: int, seed: int = 0) -> LabelledText:
    """Draw ``n`` texts, as many of one label as of the other where there are enough.

    The draw keeps the order of ``data``. With the same seed a smaller draw is part of a larger one, up to the odd
    text. When ``data`` has no more than ``n`` texts, all of them are returned (compare ``len``).

    Raises
    ------
    InvalidInputError
        If ``n`` is below 2 (one text of each label).
    """
    if n < 2:
        raise InvalidInputError(f"subsample: n must be at least 2, one text of each label, got {n}.")
    if n >= len(data):
        return data
    labels = np.asarray(data.labels)
    rng = np.random.default_rng(seed)
    negative, positive = (rng.permutation(np.flatnonzero(labels == sign)) for sign in (-1, 1))
    n_negative = min(len(negative), max(n // 2, n - len(positive)))
    chosen = np.concatenate([negative[:n_negative], positive[: n - n_negative]])
    return data.keep(np.sort(chosen).tolist())


def _choose_columns(path: Path, columns: Sequence[str], text: str | None, label: str | None) -> tuple[str, str]:
    """The names of the text and the label column of a file."""
    if not columns:
        raise InvalidInputError(f"read_labelled_text: {path} must hold texts and labels, got an empty file.")
    chosen_text = _column(columns, text, "text_column", TEXT_COLUMNS)
    chosen_label = _column(columns, label, "label_column", LABEL_COLUMNS)
    if chosen_text == chosen_label:
        raise InvalidInputError(
            f"read_labelled_text: text_column and label_column must be two columns, got {chosen_text!r} for both."
        )
    return chosen_text, chosen_label


def _column(columns: Sequence[str], asked: str | None, argument: str, usual: Sequence[str]) -> str:
    """The column that was asked for, or the only one with a usual name."""
    names = [name for name in columns if (name == asked if asked is not None else name.casefold() in usual)]
    if len(names) == 1:
        return names[0]
    if asked is not None:
        problem = f"name one column of the file, got {asked!r}, which {'occurs twice' if names else 'is not there'}"
    elif names:
        problem = f"be given, because several columns have a usual name ({preview(names)})"
    else:
        problem = f"be given, because no column has a usual name ({', '.join(usual[:3])}, ...)"
    raise InvalidInputError(
        f"read_labelled_text: {argument} must {problem}. Hint: the columns are {preview(columns, limit=20)}."
    )


def _labelled(rows: Iterable[Row], source: str, label_column: str) -> LabelledText:
    texts: list[str] = []
    names: list[str] = []
    n_skipped = 0
    for row in rows:
        text, name = _text_of(row), _label_of(row)
        if text and name:
            texts.append(text)
            names.append(name)
        else:
            n_skipped += 1
    if not texts:
        raise InvalidInputError(
            f"read_labelled_text: {source} must hold at least one row with a text and a label, "
            f"got {n_skipped} rows without."
        )
    labels, label_names = signs(names, "read_labelled_text", label_column)
    return LabelledText(
        texts=tuple(texts),
        labels=tuple(labels),
        label_names=label_names,
        source=source,
        content_hash=hash_labelled_text(texts, labels, label_names),
        n_skipped=n_skipped,
    )


def _text_of(row: Row) -> str:
    if row.text is None:
        return ""
    if not isinstance(row.text, str):
        raise InvalidInputError(
            f"read_labelled_text: the text column must hold text, got {type(row.text).__name__} at line {row.line}."
        )
    return well_formed(row.text).strip()


def _label_of(row: Row) -> str:
    if isinstance(row.label, (list, dict)):
        raise InvalidInputError(
            "read_labelled_text: the label column must hold text, numbers or booleans, "
            f"got {type(row.label).__name__} at line {row.line}."
        )
    return well_formed(label_name(row.label))

"""Readers of tables with one text and one label per row: CSV, TSV, JSON lines and Parquet.

Each reader finds the column names, lets ``choose`` say which two are wanted, and returns those two.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from attsvm.data.files import preview, read_utf8
from attsvm.errors import InvalidInputError, UnsupportedError

__all__ = ["READERS", "Choice", "Row"]

Choice = Callable[[Sequence[str]], tuple[str, str]]
"""From the column names of a file, in their order, to the names of its text and label columns."""

_WHERE = "read_labelled_text"
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')


class Row(NamedTuple):
    """The two values of one row, as the file holds them, and where they stand (line or row, from 1)."""

    line: int
    text: object
    label: object


def read_csv(path: Path, choose: Choice) -> list[Row]:
    """Read comma-separated values (RFC 4180): the first line names the columns, quoted fields may hold anything.

    A header without a comma but with a semicolon or tab is taken to be separated by that.
    """
    content = read_utf8(path, _WHERE)
    header = content.partition("\n")[0]
    delimiter = next((mark for mark in (",", ";", "\t") if mark in header), ",")
    with _any_field_size(len(content)):
        return _delimited(path, _csv_records(path, content, delimiter), choose)


def read_tsv(path: Path, choose: Choice) -> list[Row]:
    """Read tab-separated values: one row a line, the first line names the columns.

    Quotation marks inside a field are ordinary characters. A field that is wholly enclosed in them, with the
    inner ones doubled (as spreadsheets write it), is freed of them.
    """
    lines = read_utf8(path, _WHERE).split("\n")
    fields = ((number, _tsv_fields(line)) for number, line in enumerate(lines, start=1))
    return _delimited(path, fields, choose)


def read_json_lines(path: Path, choose: Choice) -> list[Row]:
    """Read one JSON object a line (blank lines are passed over), or one JSON array of objects."""
    records = list(_json_records(path, read_utf8(path, _WHERE)))
    columns = list(dict.fromkeys(name for _, record in records for name in record))
    text, label = choose(columns)
    return [Row(line, record.get(text), record.get(label)) for line, record in records]


def read_parquet(path: Path, choose: Choice) -> list[Row]:
    """Read the two chosen columns of a Parquet file; the others are not touched."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UnsupportedError(
            f"{_WHERE}: Parquet files need pyarrow, which is not installed. Hint: pip install 'attsvm[hf]'."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            text, label = choose(file.schema_arrow.names)
            table = file.read(columns=[text, label])
        texts, labels = table.column(text).to_pylist(), table.column(label).to_pylist()
    except InvalidInputError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:
        raise InvalidInputError(f"{_WHERE}: path must be a Parquet file, got {path} ({_sentence(error)}).") from error
    return [Row(line, *pair) for line, pair in enumerate(zip(texts, labels, strict=True), start=1)]


READERS = MappingProxyType(
    {
        ".csv": read_csv,
        ".tsv": read_tsv,
        ".jsonl": read_json_lines,
        ".json": read_json_lines,
        ".parquet": read_parquet,
    }
)
"""The reader of each suffix."""


@contextmanager
def _any_field_size(size: int) -> Iterator[None]:
    """Let the csv module take fields up to ``size``; its limit is one number for the whole process."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, size + 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_records(path: Path, content: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InvalidInputError(
                f"{_WHERE}: {path} must be a CSV file, got a row it cannot be at line {line} ({_sentence(error)}). "
                'Hint: a field with a quotation mark must be enclosed in marks, and the inner ones doubled ("").'
            ) from error
        yield line, fields


def _tsv_fields(line: str) -> list[str]:
    fields = line.removesuffix("\r").split("\t")
    matches = (_QUOTED.fullmatch(field) for field in fields)
    return [match[1].replace('""', '"') if match else field for match, field in zip(matches, fields, strict=True)]


def _delimited(path: Path, records: Iterator[tuple[int, list[str]]], choose: Choice) -> list[Row]:
    """Rows of a file whose first record is the header. Short rows count as empty in what they lack."""
    filled = ((line, fields) for line, fields in records if any(field.strip() for field in fields))
    _, header = next(filled, (0, []))
    columns = [name.strip() for name in header]
    text, label = choose(columns)
    text_at, label_at = columns.index(text), columns.index(label)
    rows = []
    for line, fields in filled:
        if len(fields) > len(columns) and any(field.strip() for field in fields[len(columns) :]):
            raise InvalidInputError(
                f"{_WHERE}: every row of {path} must have {len(columns)} fields as its header, "
                f"got {len(fields)} at line {line}. Hint: enclose text that holds the separator in quotation marks."
            )
        fields = fields + [""] * (len(columns) - len(fields))
        rows.append(Row(line, fields[text_at], fields[label_at]))
    return rows


def _json_records(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    items: Iterable[tuple[int, Any]]
    if content.lstrip().startswith("["):
        place, items = "item", enumerate(_json(path, content, 1), start=1)
    else:
        # Only "\n" ends a line: JSON strings may hold U+2028 and its like, at which str.splitlines would cut.
        lines = enumerate(content.split("\n"), start=1)
        place, items = "line", ((number, _json(path, line, number)) for number, line in lines if line.strip())
    for number, item in items:
        if not isinstance(item, dict):
            raise InvalidInputError(
                f"{_WHERE}: every {place} of {path} must be a JSON object with the text and the label, "
                f"got {type(item).__name__} at {place} {number}."
            )
        yield number, item


def _json(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidInputError(
            f"{_WHERE}: {path} must hold one JSON object a line, got {preview([text.strip()])} "
            f"at line {line + error.lineno - 1} ({error.msg})."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of more than 4,300 digits; brackets nested too deep
        raise InvalidInputError(
            f"{_WHERE}: {path} must hold one JSON object a line, got line {line}, which cannot be read ({error})."
        ) from error


def _sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__

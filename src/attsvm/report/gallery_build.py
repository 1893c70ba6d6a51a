"""From the folders of ``attsvm reproduce`` to the content of the gallery: what is shown, before how it is shown."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attsvm.errors import RecordError
from attsvm.records import RunFolder
from attsvm.report.gallery_figure import Picture, png_data, read_picture
from attsvm.report.gallery_schema import (
    Number,
    Paper,
    RecipeConfig,
    RecipeResult,
    Table,
    read_recipe_config,
    read_recipe_result,
)
from attsvm.report.text import number, visible, visible_tree

__all__ = [
    "TRIALS_FILE",
    "Card",
    "NumberRow",
    "RecipePage",
    "Scale",
    "Trials",
    "holds_recipe",
    "read_cards",
    "read_recipe_page",
    "read_trials",
    "recipe_folders",
    "shown_cell",
]

TRIALS_FILE = "trials.jsonl"
MAX_ROWS = 5_000
MAX_TRIAL_BYTES = 64_000_000
MAX_TABLE_CHARACTERS = 3_000_000
"""Limits of the table of trials in a page; above them the page names the file instead."""

MAX_SAFE_INTEGER = 2**53
"""JavaScript reads larger integers wrongly; they are shown as text."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where the numbers of a row lie on a line from 0 to 100; None where there is no such number."""

    low: float
    high: float
    ours: float
    published: float | None


@dataclass(frozen=True, kw_only=True)
class NumberRow:
    """One number, written with as many digits as its verdict needs."""

    number: Number
    ours: str
    published: str
    range: str
    scale: Scale | None


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The records of all trials as one table.

    Attributes
    ----------
    rows
        None where the table is too large for a page, or the file is missing or damaged; ``problem`` says which.
    lists
        Names of the quantities that are lists or objects; they are only in the file.
    """

    columns: list[str] = field(default_factory=list)
    rows: list[list[Any]] | None = None
    lists: list[str] = field(default_factory=list)
    count: int | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class RecipePage:
    """One finished recipe, ready to be shown."""

    result: RecipeResult
    config: RecipeConfig
    picture: Picture | None
    numbers: list[NumberRow]
    cases: Table | None
    trials: Trials
    settings: dict[str, str]

    @property
    def n_trials(self) -> int:
        """Trials of all cases."""
        return sum(case.trials or 0 for case in self.result.cases)

    @property
    def verdicts(self) -> Counter[str]:
        """How many numbers have each verdict."""
        return Counter(row.number.verdict for row in self.numbers)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One recipe in the gallery.

    Attributes
    ----------
    folder
        Name of its folder.
    state
        ``finished``, ``unfinished`` or ``damaged``.
    problem
        Why it is damaged.
    command
        What was run, where it is known.
    """

    folder: str
    state: str
    result: RecipeResult | None = None
    thumbnail: Picture | None = None
    numbers: list[NumberRow] = field(default_factory=list)
    command: str | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        """Name of the recipe, or of the folder where the recipe is not known."""
        return visible(self.folder) if self.result is None else self.result.name

    @property
    def paper(self) -> Paper | None:
        """Where the figure was published."""
        return None if self.result is None else self.result.paper

    @property
    def verdicts(self) -> Counter[str]:
        """How many numbers have each verdict."""
        return Counter(row.number.verdict for row in self.numbers)


def read_recipe_page(path: Path | str) -> RecipePage:
    """Read the folder of one finished recipe.

    Parameters
    ----------
    path
        The folder; it must hold ``config.json`` and ``result.json``.

    Raises
    ------
    RecordError
        If a record is missing, damaged or of another kind.
    """
    folder = RunFolder(path)
    if not folder.is_complete and folder.config_file.exists():
        raise RecordError(f"{folder.path} is not finished: it has no result.json. The same command resumes it.")
    result, config = read_recipe_result(folder), read_recipe_config(folder)
    return RecipePage(
        result=result,
        config=config,
        picture=read_picture(folder.path),
        numbers=[_number_row(one) for one in result.numbers],
        cases=_cases(result),
        trials=read_trials(folder.path / TRIALS_FILE),
        settings=_flat(config.config),
    )


def holds_recipe(path: Path) -> bool:
    """True for a folder that ``attsvm reproduce`` made for a recipe, finished or not, damaged or not."""
    folder = RunFolder(path)
    kinds = [_kind(file) for file in (folder.config_file, folder.result_file) if file.is_file()]
    return "reproduce" in kinds or ((path / TRIALS_FILE).is_file() and bool(kinds) and set(kinds) == {None})


def _kind(path: Path) -> str | None:
    """What a record says it is; None where it cannot be read."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    kind = record.get("kind") if isinstance(record, dict) else None
    return kind if isinstance(kind, str) else None


def recipe_folders(output_dir: Path) -> list[Path]:
    """Folders of recipes directly in ``output_dir``, in the order of their names.

    Raises
    ------
    RecordError
        If the folder cannot be read.
    """
    try:
        inside = sorted(path for path in output_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise RecordError(f"{output_dir} could not be read: {error.strerror or error}.") from error
    return [path for path in inside if holds_recipe(path)]


def read_cards(output_dir: Path, order: Sequence[str] = ()) -> list[Card]:
    """Read what the gallery shows of each recipe.

    Parameters
    ----------
    output_dir
        The folder that holds a folder for each recipe.
    order
        Names in the order of the gallery. Others follow, the oldest paper first.
    """
    cards = [_card(path) for path in recipe_folders(output_dir)]
    places = {name: place for place, name in enumerate(order)}

    def key(card: Card) -> tuple[Any, ...]:
        paper = card.paper
        published = ("9", "") if paper is None else (paper.arxiv, paper.title)
        return places.get(card.folder, len(places)), *published, _natural(card.folder)

    return sorted(cards, key=key)


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key in which ``fig10`` follows ``fig9``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _card(path: Path) -> Card:
    folder = RunFolder(path)
    try:
        config = read_recipe_config(folder)
        if not folder.is_complete:
            return Card(folder=path.name, state="unfinished", command=config.command)
        result = read_recipe_result(folder)
    except RecordError as error:
        return Card(folder=path.name, state="damaged", problem=visible(str(error).replace(f"{folder.path}/", "")))
    return Card(
        folder=path.name,
        state="finished",
        result=result,
        thumbnail=png_data(path / "figure.png"),
        numbers=[_number_row(one) for one in result.numbers],
        command=config.command,
    )


def _number_row(one: Number) -> NumberRow:
    digits = _digits(one)
    return NumberRow(
        number=one,
        ours=number(one.ours, digits),
        published=_short(one.published, digits),
        range=_range(one, digits),
        scale=_scale(one),
    )


def _digits(one: Number) -> int:
    """As few digits, from 4, as show on which side of each bound ours lies: 0.84999 is not 0.85."""
    bounds = [bound for bound in (one.low, one.high) if bound is not None and bound != one.ours]
    for digits in range(4, 15):
        if number(one.ours, digits) not in {number(bound, digits) for bound in bounds}:
            return digits
    return 15


def _short(value: float | None, digits: int) -> str:
    """A given number in as few digits as it was given in, but for rounding errors: 0.9, not 0.9000."""
    if value is None or not math.isfinite(value):
        return number(value)
    same = (few for few in range(1, digits) if math.isclose(float(f"{value:.{few - 1}e}"), value, rel_tol=1e-12))
    return number(value, next(same, digits))


def _range(one: Number, digits: int) -> str:
    low, high = _short(one.low, digits), _short(one.high, digits)
    if one.low is None:
        return "" if one.high is None else f"≤ {high}"
    if one.high is None:
        return f"≥ {low}"
    return low if one.low == one.high else f"{low} to {high}"


def _scale(one: Number) -> Scale | None:
    """Positions on a line that holds the range and all numbers, with room at both ends."""
    if one.ours is None or (one.low is None and one.high is None):
        return None
    known = [value for value in (one.low, one.high, one.ours, one.published) if value is not None]
    if not all(map(math.isfinite, known)):
        return None
    low, high = min(known), max(known)
    room = 0.12 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = low - room, high + room
    if not math.isfinite(high - low):
        return None

    def place(value: float | None, absent: float) -> float:
        return absent if value is None else round(100 * (value - low) / (high - low), 2)

    return Scale(
        low=place(one.low, 0.0),
        high=place(one.high, 100.0),
        ours=place(one.ours, 0.0),
        published=None if one.published is None else place(one.published, 0.0),
    )


def shown_cell(value: bool | int | float | str | None) -> str:
    """Write a cell of a table.

    Examples
    --------
    >>> shown_cell(0.123456), shown_cell(12345), shown_cell(True), shown_cell("d = 4")
    ('0.1235', '12,345', 'yes', 'd = 4')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,d}".replace("-", "−") if abs(value) < 10**15 else number(float(value), 6)
    return number(value, 4)


def _cases(result: RecipeResult) -> Table | None:
    """The cases as a table with a column for each parameter."""
    if not result.cases:
        return None
    names = list(dict.fromkeys(name for case in result.cases for name in case.values))
    rows = [[case.name, *(_plain(case.values.get(name)) for name in names), case.trials] for case in result.cases]
    columns = ["case", *names, "trials"]
    if any(case.accepted not in (None, case.trials) for case in result.cases):
        columns.append("of which count")
        rows = [[*row, case.accepted] for row, case in zip(rows, result.cases, strict=True)]
    return Table(title="Cases", columns=columns, rows=rows)


def _plain(value: Any) -> bool | int | float | str | None:
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _flat(tree: dict[str, Any]) -> dict[str, str]:
    """Names with dots for nested settings; lists are written as JSON."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = "–" if value is None else value if isinstance(value, str) else json.dumps(value)

    walk("", tree)
    return flat


def read_trials(path: Path) -> Trials:
    """Read the records of the trials for the table of the page; what cannot be shown is said, and not an error."""
    try:
        size = path.stat().st_size
        if size > MAX_TRIAL_BYTES:
            return Trials(problem=f"The records of the trials are too large for a page ({size:,} bytes).")
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        return Trials(problem=f"{path.name} could not be read: {error.strerror or error}.")
    if len(lines) > MAX_ROWS:
        return Trials(count=len(lines), problem=f"{len(lines):,} trials are too many for a table in a page.")
    records = []
    for place, line in enumerate(lines, start=1):
        try:
            record = visible_tree(json.loads(line))
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            return Trials(count=len(lines), problem=f"{path.name}, line {place}, is damaged.")
        records.append(record)
    return _tabulated(records)


def _tabulated(records: list[dict[str, Any]]) -> Trials:
    names = list(dict.fromkeys(("case", "trial", *(name for record in records for name in record))))
    lists = [name for name in names if any(isinstance(record.get(name), list | dict) for record in records)]
    columns = [name for name in names if name not in lists and any(name in record for record in records)]
    rows = [[_value(record.get(name)) for name in columns] for record in records]
    if sum(len(json.dumps(row)) for row in rows) > MAX_TABLE_CHARACTERS:
        return Trials(count=len(rows), lists=lists, problem="The records of the trials are too large for a page.")
    return Trials(columns=columns, rows=rows, lists=lists, count=len(rows))


def _value(value: Any) -> Any:
    """A value that strict JSON and JavaScript read as it is."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_SAFE_INTEGER:
        return str(value)
    return value

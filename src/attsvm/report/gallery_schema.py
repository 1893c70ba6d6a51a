"""What the gallery needs from the records of ``attsvm reproduce``, checked once at the border."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attsvm.errors import RecordError
from attsvm.records import RunFolder
from attsvm.report.text import visible_tree

__all__ = [
    "Case",
    "Cell",
    "Number",
    "Paper",
    "RecipeConfig",
    "RecipeResult",
    "Table",
    "Verdict",
    "read_recipe_config",
    "read_recipe_result",
]

Verdict = Literal["met", "differs", "not published"]
Cell = bool | int | float | str | None


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Paper(_Record):
    """Where a figure was published."""

    title: str
    authors: str
    year: int
    arxiv: str = ""


class Case(_Record):
    """One setting of a recipe, how many trials it had, and how many of them count."""

    name: str
    values: dict[str, Any] = Field(default_factory=dict)
    trials: int | None = None
    accepted: int | None = None


class Number(_Record):
    """One number: ours, beside what was published."""

    text: str
    ours: float | None = None
    published: float | None = None
    low: float | None = None
    high: float | None = None
    source: str = ""
    verdict: Verdict


class Table(_Record):
    """A table of the page; every row has a cell for each column."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]

    @model_validator(mode="after")
    def _is_rectangular(self) -> Table:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {index} has {len(row)} cells for {len(self.columns)} columns")
        return self


class RecipeResult(_Record):
    """``result.json`` of one recipe."""

    kind: Literal["reproduce"]
    name: str
    title: str
    about: str = ""
    paper: Paper
    cases: list[Case] = Field(default_factory=list)
    sentence: str = ""
    numbers: list[Number] = Field(default_factory=list)
    tables: list[Table] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class RecipeConfig(_Record):
    """``config.json`` of one recipe."""

    kind: Literal["reproduce"]
    name: str
    command: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    commit: str | None = None
    created: str | None = None
    computing_seconds: float | None = None
    config: dict[str, Any] = Field(default_factory=dict)


Model = TypeVar("Model", bound=_Record)


def read_recipe_result(folder: RunFolder) -> RecipeResult:
    """Read and check ``result.json``; every string in it comes back in its visible form.

    Raises
    ------
    RecordError
        If the file is missing, damaged, of another version, or not of a recipe.
    """
    return _read(RecipeResult, folder.read_result(), str(folder.result_file))


def read_recipe_config(folder: RunFolder) -> RecipeConfig:
    """Read and check ``config.json``, as :func:`read_recipe_result` does.

    Raises
    ------
    RecordError
        If the file is missing, damaged, of another version, or not of a recipe.
    """
    return _read(RecipeConfig, folder.read_config(), str(folder.config_file))


def _read(model: type[Model], record: dict[str, Any], path: str) -> Model:
    try:
        # Strings are made visible before the check: the checker refuses lone surrogates, which a text may hold.
        return model.model_validate(visible_tree(record))
    except RecursionError as error:
        raise RecordError(f"{path} cannot be shown: it is nested too deeply.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the record"
        raise RecordError(f"{path} cannot be shown: {place}: {first['msg']}.") from error

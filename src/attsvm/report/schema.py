"""What the page needs from ``result.json``, checked once at the border."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attsvm.errors import RecordError
from attsvm.records import RunFolder
from attsvm.report.text import visible_tree

__all__ = [
    "Comparison",
    "Data",
    "OtherSolution",
    "ParameterizationResult",
    "Selected",
    "Sequence",
    "VerifyResult",
    "read_result",
]

Curve = list[float | None]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Sequence(_Record):
    """One labelled text and its tokens."""

    text: str = ""
    label: str | None = None
    tokens: list[str]
    optimal: int | None = None
    n_tokens: int | None = None


class Selected(_Record):
    """The token that the trained attention selects in one sequence."""

    token: str | None = None
    index: int | None = None


class OtherSolution(_Record):
    """The max-margin solution in the other norm, for the same selection."""

    status: str | None = None
    gap: float | None = None
    upper_bound: float | None = None
    lower_bound: float | None = None
    rank: int | None = None


class ParameterizationResult(_Record):
    """Training of W, or of (K, Q), against its max-margin solution."""

    norm: str
    norm_other: str
    status: str | None = None
    status_sentence: str | None = None
    gap: float | None = None
    upper_bound: float | None = None
    lower_bound: float | None = None
    margin: float | None = None
    n_support: int | None = None
    rank: int | None = None
    method: str | None = None
    iterations: int | None = None
    solve_seconds: float | None = None
    correlation: float | None = None
    correlation_other: float | None = None
    steps: list[int] = Field(default_factory=list)
    correlation_curve: Curve = Field(default_factory=list)
    correlation_other_curve: Curve = Field(default_factory=list)
    attention_mass_curve: Curve = Field(default_factory=list)
    norm_curve: Curve = Field(default_factory=list)
    loss_curve: Curve = Field(default_factory=list)
    attention_mass: float | None = None
    fraction_globally_optimal: float | None = None
    locally_optimal: bool | None = None
    verdict: str | None = None
    reason: str | None = None
    selected: list[Selected | None] = Field(default_factory=list)
    other: OtherSolution | None = None
    ray_sequences: list[int] | None = None


class ComparisonCell(_Record):
    """One optimiser's W against the solution in one norm."""

    norm: str
    correlation: float | None = None
    gap: float | None = None
    status: str | None = None


class ComparisonRow(_Record):
    """One optimiser: where it went, and how close that is to the solution in each norm."""

    optimizer: str
    attention_mass: float | None = None
    fraction_globally_optimal: float | None = None
    verdict: str | None = None
    stalled: bool | None = None
    closest: str | None = None
    cells: list[ComparisonCell] = Field(default_factory=list)


class Comparison(_Record):
    """The table of optimisers and norms."""

    norms: list[str] = Field(default_factory=list)
    rows: list[ComparisonRow] = Field(default_factory=list)


class Data(_Record):
    """Where the tokens came from."""

    source: str | None = None
    kind: str | None = None
    label_names: list[str] | None = None
    n_truncated: int | None = None
    n_skipped: int | None = None
    model: str | None = None
    layer: int | None = None
    embedding: str | None = None
    query: str | None = None
    head: str | None = None
    content_hash: str | None = None


class VerifyResult(_Record):
    """``result.json`` of ``attsvm verify``."""

    kind: Literal["verify"]
    name: str
    created: str | None = None
    command: str | None = None
    seed: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    commit: str | None = None
    seconds: dict[str, float | None] = Field(default_factory=dict)
    data: Data = Field(default_factory=Data)
    n_sequences: int | None = None
    n_queries: int | None = None
    n_constraints: int | None = None
    n_merged: int | None = None
    d_model: int | None = None
    verdict: str | None = None
    parameterizations: dict[Literal["W", "KQ"], ParameterizationResult]
    sequences: list[Sequence]
    comparison: Comparison | None = None


def read_result(folder: RunFolder) -> VerifyResult:
    """Read and check ``result.json``; every string in it comes back in its visible form.

    Raises
    ------
    RecordError
        If the file is missing, damaged, of another version, or not of a ``verify`` run.
    """
    record: dict[str, Any] = folder.read_result()
    try:
        # Strings are made visible before the check: the checker refuses lone surrogates, which a text may hold.
        return VerifyResult.model_validate(visible_tree(record))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the record"
        raise RecordError(f"{folder.result_file} cannot be shown: {place}: {first['msg']}.") from error

"""What the page of ``attsvm inspect`` needs from ``result.json``, checked once at the border."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from attsvm.errors import RecordError
from attsvm.records import RunFolder
from attsvm.report.text import visible_token, visible_tree

__all__ = ["AtlasResult", "Estimate", "Head", "Measure", "Module", "Picture", "Piece", "Shown", "read_atlas_result"]

Kind = Literal["encoder", "decoder", "cross"]
Side = Literal["source", "target"]
Number = float | None
_PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]*")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Model(_Record):
    """The model that was read."""

    name: str = ""
    family: str = ""
    n_parameters: int | None = None
    dtype: str = ""
    tier: str = ""
    notes: list[str] = Field(default_factory=list)


class Check(_Record):
    """Our softmax against the model's own attention."""

    max_difference: Number = None
    module: str = ""
    n_rows: int = 0
    compared: bool = False
    note: str = ""


class CorpusResult(_Record):
    """The texts."""

    n_texts: int = 0
    n_windows: int = 0
    n_tokens: int = 0
    special: str = ""
    notes: list[str] = Field(default_factory=list)


class Module(_Record):
    """One attention module.

    Attributes
    ----------
    index
        Its number in the model; arrays are named by it. Numbers have gaps where only some layers were looked at.
    heads
        Heads that were looked at, in the order of the arrays; None for all.
    """

    index: int
    name: str
    kind: Kind
    layer: int
    n_heads: int
    n_kv_heads: int
    d_head: int | None = None
    heads: list[int] | None = None
    query_side: Side = "source"
    key_side: Side = "source"
    residual: str | None = None

    @property
    def kept(self) -> list[int]:
        """Heads of the arrays, in their order."""
        return [*range(self.n_heads)] if self.heads is None else self.heads


class Measure(_Record):
    """One number of a head."""

    key: str
    title: str
    unit: str = ""
    scale: str = ""
    explanation: str = ""


class Estimate(_Record):
    """A mean over the corpus with its 95 % interval."""

    mean: Number = None
    low: Number = None
    high: Number = None
    n: int | None = None


class Head(_Record):
    """One head; solutions, spectra and the soft part are shown as they are."""

    label: str
    kind: Kind
    layer: int
    head: int
    kv_head: int | None = None
    module: int
    values: dict[str, Estimate | None]
    head_kind: str = ""
    top_tokens: list[tuple[str, Number]] = Field(default_factory=list)
    solutions: list[dict[str, Any]] = Field(default_factory=list)
    spectra: dict[str, list[Number]] = Field(default_factory=dict)
    soft: dict[str, Any] | None = None

    @field_validator("top_tokens")
    @classmethod
    def _have_ink(cls, tokens: list[tuple[str, Number]]) -> list[tuple[str, Number]]:
        return [(visible_token(token), share) for token, share in tokens]


class Piece(_Record):
    """The tokens of one side of a shown text."""

    tokens: list[str]
    words: list[int] = Field(default_factory=list)
    special: list[bool] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        """Without words every token is one; without marks none is special."""
        if isinstance(value, dict) and isinstance(value.get("tokens"), list):
            count = len(value["tokens"])
            return {
                **value,
                "words": value.get("words") or [*range(count)],
                "special": value.get("special") or [False] * count,
            }
        return value

    @model_validator(mode="after")
    def _is_aligned(self) -> Piece:
        if not len(self.tokens) == len(self.words) == len(self.special):
            raise ValueError("tokens, words and special have different lengths")
        return self


class Picture(_Record):
    """The picture whose patches are the tokens."""

    width: int
    height: int
    rows: int
    columns: int
    data: str

    @field_validator("data")
    @classmethod
    def _is_a_picture(cls, data: str) -> str:
        if not _PICTURE.fullmatch(data):
            raise ValueError("data is not a PNG or JPEG picture as a data URI")
        return data


class Shown(_Record):
    """One text whose patterns are in the page."""

    window: int = 0
    text: str = ""
    source: Piece
    target: Piece | None = None
    picture: Picture | None = None
    support_known: bool = False


class SolutionName(_Record):
    """A space and norm in which max-margin solutions were found."""

    space: str
    norm: str
    title: str


class Primary(_Record):
    """The solution that measures, support tokens and twins refer to."""

    space: str = ""
    norm: str = ""
    why: str = ""


class AtlasResult(_Record):
    """``result.json`` of one run."""

    kind: Literal["inspect"]
    name: str
    created: str | None = None
    command: str | None = None
    seconds: dict[str, Number] = Field(default_factory=dict)
    seed: int | None = None
    commit: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    model: Model = Field(default_factory=Model)
    check: Check = Field(default_factory=Check)
    corpus: CorpusResult = Field(default_factory=CorpusResult)
    modules: list[Module]
    measures: list[Measure]
    heads: list[Head]
    shown: list[Shown] = Field(default_factory=list)
    solution_names: list[SolutionName] = Field(default_factory=list)
    primary: Primary | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> AtlasResult:
        modules = {module.index: module for module in self.modules}
        if len(modules) < len(self.modules):
            raise ValueError("two modules have the same index")
        labels = set()
        for head in self.heads:
            if head.label in labels:
                raise ValueError(f"two heads are called {head.label}")
            labels.add(head.label)
            if head.module not in modules or head.head not in modules[head.module].kept:
                raise ValueError(f"{head.label} belongs to no module")
        for module in self.modules:
            if not set(module.kept) <= set(range(module.n_heads)):
                raise ValueError(f"module {module.index} has heads {module.kept}, but only {module.n_heads} of them")
        if any(module.query_side == "target" for module in self.modules) and any(
            one.target is None for one in self.shown
        ):
            raise ValueError("a shown text has no target, but a module asks from it")
        return self


def read_atlas_result(folder: RunFolder) -> AtlasResult:
    """Read and check ``result.json``; every string in it comes back in its visible form.

    Raises
    ------
    RecordError
        If the file is missing, damaged, of another version, or not of ``attsvm inspect``.
    """
    record = folder.read_result()
    try:
        # Strings are made visible before the check: the checker refuses lone surrogates, which a text may hold.
        return AtlasResult.model_validate(visible_tree(record))
    except RecursionError as error:
        raise RecordError(f"{folder.result_file} cannot be shown: it is nested too deeply.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the record"
        raise RecordError(f"{folder.result_file} cannot be shown: {place}: {first['msg']}.") from error

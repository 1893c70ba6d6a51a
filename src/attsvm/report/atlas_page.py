"""The content of the page of ``attsvm inspect``, as plain records: what is shown, before how it is shown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attsvm.report.atlas_build import FEWEST_KEPT, Atlas, Packed, packed_similarity
from attsvm.report.atlas_schema import AtlasResult
from attsvm.report.text import number, percent

__all__ = [
    "AtlasPage",
    "blobs",
    "check_fact",
    "check_sentence",
    "kept_sentence",
    "model_name",
    "page_name",
    "payload",
    "rounded",
]

MAX_SAFE_INTEGER = 2**53
"""JavaScript reads larger integers wrongly; they are shown as text."""


@dataclass(frozen=True, kw_only=True)
class AtlasPage:
    """One run, or two beside each other, ready to be shown.

    Attributes
    ----------
    kept
        What of the patterns the page leaves out, as a sentence; empty where it leaves out nothing.
    """

    results: tuple[AtlasResult, ...]
    packed: Packed
    kept: str

    @property
    def name(self) -> str:
        """Name of the run, or of both."""
        return page_name(self.results)

    @property
    def is_comparison(self) -> bool:
        """Whether there are two runs."""
        return len(self.results) > 1


def kept_sentence(results: Sequence[AtlasResult], packed: Packed) -> str:
    """Say what of the patterns the page leaves out.

    Returns
    -------
    str
        Empty where it leaves out nothing.
    """
    parts = []
    if packed.level.least > 1:
        parts.append(
            f"To stay small the page leaves out weights below {number(packed.level.least_weight, 2)}, but for the "
            f"{FEWEST_KEPT} largest of each query, and keeps the {packed.level.twin} largest weights of the max-margin "
            f"twin. What is left out is {percent(packed.mean_dropped)} of the weight of a query on average and at most "
            f"{percent(packed.largest_dropped)}. All numbers were computed before."
        )
    recorded = max(len(result.shown) for result in results)
    if max(packed.n_shown) < recorded:
        kept = max(packed.n_shown)
        parts.append(f"It shows {kept} of the {recorded} recorded texts; the others are in arrays.safetensors.")
    return " ".join(parts)


def model_name(result: AtlasResult) -> str:
    """Name the model; of an absolute path only the last two parts."""
    name = result.model.name or result.name
    is_path = name.startswith(("/", "~")) or "\\" in name
    return "/".join(re.split(r"[/\\]+", name.rstrip("/\\"))[-2:]) if is_path else name


def check_sentence(result: AtlasResult) -> str:
    """Say how our attention weights compare with those of the model."""
    check = result.check
    if not check.compared or check.max_difference is None:
        return check.note or "Not compared with the model's own attention weights."
    said = f"Our weights differ from the model's own eager attention by at most {number(check.max_difference, 2)}"
    where = f" (in {check.module})" if check.module else ""
    # The note of an ordinary check says the same number.
    note = "" if f"{check.max_difference:.1e}" in check.note else f" {check.note}"
    return f"{said}{where}.{note}".rstrip()


def check_fact(result: AtlasResult) -> str:
    """Return the same in few words."""
    check = result.check
    if not check.compared or check.max_difference is None:
        return "not compared with the model's own weights"
    return f"within {number(check.max_difference, 2)} of the model's own weights"


def payload(results: Sequence[AtlasResult], n_shown: Sequence[int]) -> dict[str, Any]:
    """Return what the scripts need, patterns apart; field names are those of the record."""
    records = [_record(result, count) for result, count in zip(results, n_shown, strict=True)]
    return {"name": page_name(results), "atlases": records}


def _record(result: AtlasResult, n_shown: int) -> dict[str, Any]:
    record: dict[str, Any] = rounded(result.model_dump(mode="json"))
    heads = record.pop("heads")
    record["shown"] = record["shown"][:n_shown]
    return {"meta": record, "heads": heads}


def page_name(results: Sequence[AtlasResult]) -> str:
    """Name of the run, or of both."""
    return " and ".join(dict.fromkeys(result.name for result in results))


def blobs(atlases: Sequence[Atlas], packed: Packed) -> list[dict[str, Any]]:
    """Return the packed patterns and similarities of each run."""
    return [
        {
            "similarity": packed_similarity(atlas),
            "blobs": [{"layout": blob.layout, "data": blob.data} for blob in each],
        }
        for atlas, each in zip(atlases, packed.blobs, strict=True)
    ]


def rounded(value: Any, digits: int = 6) -> Any:
    """Round every number of a JSON value to significant digits, which keeps the page small.

    Examples
    --------
    >>> rounded({"a": [0.123456789, 3, None]})
    {'a': [0.123457, 3, None]}
    """
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_SAFE_INTEGER:
        return str(value)
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return value

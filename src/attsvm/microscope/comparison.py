"""Two inspections beside each other: which heads belong together, and how their measures differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from attsvm.errors import InvalidInputError
from attsvm.records import package_versions
from attsvm.report.atlas_build import Atlas, read_atlas
from attsvm.report.atlas_schema import Estimate, Head, Module, Shown

__all__ = ["compare_runs", "match_heads"]


def compare_runs(path_a: Path | str, path_b: Path | str) -> dict[str, Any]:
    """Compare two run folders of ``attsvm inspect``.

    Heads are matched by kind, layer and number; where both runs have one kind only, by layer and number. Differences
    are second minus first. To rank those of different measures, each is also divided by the range of its measure over
    the matched heads of both runs.

    Parameters
    ----------
    path_a, path_b
        The run folders.

    Returns
    -------
    dict
        The record ``compare.json``.

    Raises
    ------
    RecordError
        If a folder is not that of a finished inspection.
    InvalidInputError
        If the runs have no head or no measure in common.
    """
    a, b = read_atlas(path_a), read_atlas(path_b)
    pairs = match_heads(a.result.heads, b.result.heads)
    if not pairs:
        raise InvalidInputError(
            f"compare: runs must have heads in common, got {_heads(a)} and {_heads(b)}, of which none has the kind, "
            "layer and number of another."
        )
    titles = {one.key: one.title for one in a.result.measures}
    measures = [one.key for one in b.result.measures if one.key in titles]
    ranges = {key: _range(pairs, key) for key in measures}
    known = [key for key in measures if ranges[key] is not None]
    if not known:
        raise InvalidInputError("compare: runs must have measures in common, got none that is known in both.")
    same = [_same_text(a, b, s) for s in range(min(len(a.result.shown), len(b.result.shown)))]
    heads = [_pair(one, other, known, ranges, _same_selections(a, b, one, other, same)) for one, other in pairs]
    heads.sort(key=lambda head: -head["relative"])
    matched_a, matched_b = {one.label for one, _ in pairs}, {other.label for _, other in pairs}
    return {
        "kind": "compare",
        "versions": package_versions(),
        "runs": [_run(path_a, a), _run(path_b, b)],
        "matched": len(pairs),
        "only_first": [head.label for head in a.result.heads if head.label not in matched_a],
        "only_second": [head.label for head in b.result.heads if head.label not in matched_b],
        "shown": {"compared": len(same), "same_tokens": sum(same)},
        "measures": [_measure(key, titles[key], heads) for key in known],
        "heads": heads,
    }


def match_heads(first: list[Head], second: list[Head]) -> list[tuple[Head, Head]]:
    """Pairs of heads of the same kind, layer and number, in the order of the first.

    Parameters
    ----------
    first, second
        Heads of the two runs. Where each has one kind only, and not the same (an encoder and a decoder), the kind
        does not count.
    """
    kinds = [{head.kind for head in heads} for heads in (first, second)]
    by_kind = bool(kinds[0] & kinds[1]) or any(len(kind) > 1 for kind in kinds)
    others = {_place(head, by_kind): head for head in second}
    return [(head, others[_place(head, by_kind)]) for head in first if _place(head, by_kind) in others]


def _place(head: Head, by_kind: bool) -> tuple[str, int, int]:
    return head.kind if by_kind else "", head.layer, head.head


def _heads(atlas: Atlas) -> str:
    labels = [head.label for head in atlas.result.heads]
    return f"{labels[0]} to {labels[-1]}" if labels else "no head"


def _run(path: Path | str, atlas: Atlas) -> dict[str, Any]:
    result = atlas.result
    return {
        "path": str(path),
        "name": result.name,
        "model": result.model.name,
        "n_heads": len(result.heads),
        "n_texts": result.corpus.n_texts,
        "n_tokens": result.corpus.n_tokens,
    }


def _mean(head: Head, key: str) -> float | None:
    estimate = head.values.get(key)
    return None if estimate is None else estimate.mean


def _range(pairs: list[tuple[Head, Head]], key: str) -> float | None:
    """From the smallest to the largest value of matched heads; None where no pair has both."""
    both = [(_mean(one, key), _mean(other, key)) for one, other in pairs]
    values = [value for pair in both if None not in pair for value in pair if value is not None]
    return max(values) - min(values) if values else None


def _pair(
    one: Head, other: Head, keys: list[str], ranges: dict[str, float | None], same: tuple[int, int]
) -> dict[str, Any]:
    """One pair of heads, its largest differences first."""
    differences = [_difference(one, other, key, ranges[key] or 0.0) for key in keys]
    found = sorted((each for each in differences if each is not None), key=lambda each: -abs(each["relative"]))
    equal, queries = same
    return {
        "first": one.label,
        "second": other.label,
        "kinds": [one.head_kind, other.head_kind],
        "relative": float(np.mean([abs(each["relative"]) for each in found])) if found else 0.0,
        "same_selections": equal / queries if queries else None,
        "n_queries": queries,
        "differences": found,
    }


def _difference(one: Head, other: Head, key: str, extent: float) -> dict[str, Any] | None:
    a, b = _mean(one, key), _mean(other, key)
    if a is None or b is None:
        return None
    apart = _apart(one.values.get(key), other.values.get(key))
    relative = (b - a) / extent if extent > 0 else 0.0
    return {"measure": key, "first": a, "second": b, "difference": b - a, "relative": relative, "apart": apart}


def _apart(a: Estimate | None, b: Estimate | None) -> bool | None:
    """Whether the two 95 % intervals have nothing in common; None where one is not known."""
    if a is None or b is None or a.low is None or a.high is None or b.low is None or b.high is None:
        return None
    return a.high < b.low or b.high < a.low


def _measure(key: str, title: str, heads: list[dict[str, Any]]) -> dict[str, Any]:
    """What one measure does over all pairs, and where it differs most."""
    found = [(head, each) for head in heads for each in head["differences"] if each["measure"] == key]
    where, largest = max(found, key=lambda pair: abs(pair[1]["difference"]))
    return {
        "key": key,
        "title": title,
        "n": len(found),
        "mean": float(np.mean([each["difference"] for _, each in found])),
        "mean_absolute": float(np.mean([abs(each["difference"]) for _, each in found])),
        "apart": sum(each["apart"] is True for _, each in found),
        "largest": {"first": where["first"], "second": where["second"], "difference": largest["difference"]},
    }


def _same_text(a: Atlas, b: Atlas, s: int) -> bool:
    return _tokens(a.result.shown[s]) == _tokens(b.result.shown[s])


def _tokens(shown: Shown) -> tuple[list[str], list[str]]:
    return shown.source.tokens, shown.target.tokens if shown.target else []


def _same_selections(a: Atlas, b: Atlas, one: Head, other: Head, same: list[bool]) -> tuple[int, int]:
    """Queries of the shown texts, where both have the same tokens, for which both heads select the same key."""
    first, second = _module(a, one), _module(b, other)
    if (first.query_side, first.key_side) != (second.query_side, second.key_side):
        return 0, 0
    equal = queries = 0
    for s in np.flatnonzero(same):
        left = a.arrays[f"shown.{s}.{first.index}.selected"][first.kept.index(one.head)]
        right = b.arrays[f"shown.{s}.{second.index}.selected"][second.kept.index(other.head)]
        both = (left >= 0) & (right >= 0)
        equal += int(((left == right) & both).sum())
        queries += int(both.sum())
    return equal, queries


def _module(atlas: Atlas, head: Head) -> Module:
    return next(module for module in atlas.result.modules if module.index == head.module)

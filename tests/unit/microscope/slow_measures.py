"""The measures written out as loops over single rows in plain floats: the specification that the fast code must meet.

Also small calls and batches to measure.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attsvm.microscope.calls import AttentionCall, ModuleInfo
from attsvm.microscope.windows import Batch

KINDS = ("same_position", "previous", "next", "first", "same_token", "separator", "induction")
Text = dict[str, Any]  # ids, special, and the logits of its heads: a list of matrices


def softmax(logits: list[float]) -> list[float]:
    top = max(logits, default=-math.inf)
    if top == -math.inf:
        return [0.0] * len(logits)
    parts = [math.exp(value - top) for value in logits]
    total = math.fsum(parts)
    return [part / total for part in parts]


def reference_measures(
    weights: list[float],
    logits: list[float],
    *,
    sink: tuple[float, float] | None = None,
    distances: list[float] | None = None,
    first: int | None = None,
    separators: list[int] | None = None,
    kinds: dict[str, list[int]] | None = None,
) -> dict[str, float | None]:
    """All measures of one query; None where undefined.

    ``weights`` and ``logits`` are those of the keys with a token, ``sink`` the weight and score of the one without.
    ``first``, ``separators`` and ``kinds`` are indices of keys.
    """
    keys = [j for j, value in enumerate(logits) if value > -math.inf]
    everything = [(weights[j], logits[j]) for j in keys] + ([sink] if sink else [])
    if not everything:
        return {}
    everything.sort(key=lambda pair: -pair[1])
    top, top_logit = everything[0]
    n = len(everything)
    found: dict[str, float | None] = {
        "top_probability": top,
        "entropy": -math.fsum(p * math.log(p) for p, _ in everything if p > 0),
        "selected_set": float(sum(p >= 0.5 * (1 - 1e-6) * top for p, _ in everything)),
        "dropped_mass": 1 - top,
    }
    mass, count = 0.0, 0.0
    for p, _ in everything:
        if mass + p >= 0.9:
            count += (0.9 - mass) / p
            break
        mass, count = mass + p, count + 1
    found["tokens_90"] = max(count, 1.0)
    if n > 1:
        margin = top_logit - everything[1][1]
        rest = (n - 1) * math.exp(-margin)
        found |= {"margin": margin, "mass_bound": rest / (1 + rest), "near_ties": float(margin < 1e-3)}
    on_tokens = math.fsum(weights[j] for j in keys)
    if distances is not None and on_tokens > 0:
        found["distance"] = math.fsum(weights[j] * distances[j] for j in keys) / on_tokens
    found["sink_mass"] = (weights[first] if first is not None else 0.0) + (sink[0] if sink else 0.0)
    found["separator_mass"] = math.fsum(weights[j] for j in separators or [])
    for kind, members in (kinds or {}).items():
        allowed = [j for j in members if j in keys]
        if allowed and n > 1:
            found[kind] = math.fsum(weights[j] for j in allowed)
            found[f"{kind} chance"] = len(allowed) / n
    return found


def reference_kinds(
    i: int,
    query_ids: list[int],
    key_ids: list[int],
    *,
    first: int | None,
    separators: list[int],
    own: bool,
    causal: bool,
) -> dict[str, list[int]]:
    """Keys of each kind of query i."""
    token, places = query_ids[i], range(len(key_ids))
    found = {
        "first": [] if first is None else [first],
        "separator": separators,
        "same_token": [j for j in places if key_ids[j] == token and not (own and j == i)],
    }
    if own:
        found["same_position"] = [i]
        found["previous"] = [i - 1] if i else []
        found["next"] = [i + 1] if i + 1 < len(key_ids) else []
        found["induction"] = [
            j for j in places if j > 0 and key_ids[j - 1] == token and j - 1 != i and (j <= i if causal else j != i)
        ]
    return found


def reference_text(
    info: ModuleInfo,
    query_ids: list[int],
    key_ids: list[int],
    query_special: list[bool],
    key_special: list[bool],
    logits: list[list[float]],
    *,
    sink: float | None = None,
    special: str = "keep",
    separators: tuple[int, ...] = (),
) -> tuple[list[dict[str, float | None]], list[int]]:
    """Measures of all queries of a text without padding, and the ids that they select."""
    drop = special == "drop"
    kept = [j for j in range(len(key_ids)) if not (drop and key_special[j])]
    first = kept[0] if kept else None
    marks = [j for j in kept if (key_special[j] and j != first) or key_ids[j] in separators]
    rows, selected = [], []
    for i in range(len(query_ids)):
        if drop and query_special[i]:
            continue
        row = [logits[i][j] if j in kept else -math.inf for j in range(len(key_ids))]
        weights = softmax([*row, sink] if sink is not None else row)
        own = info.query_side == info.key_side
        kinds = reference_kinds(
            i, query_ids, key_ids, first=first, separators=marks, own=own, causal=info.kind == "decoder"
        )
        kinds = {kind: [j for j in members if j in kept] for kind, members in kinds.items()}
        measured = reference_measures(
            weights[: len(row)],
            row,
            sink=(weights[-1], sink) if sink is not None else None,
            distances=[abs(i - j) for j in range(len(row))] if own else None,
            first=first,
            separators=marks,
            kinds=kinds,
        )
        rows.append(measured)
        top = max(row, default=-math.inf)
        if top > -math.inf and not (sink is not None and sink > top):
            selected.append(key_ids[row.index(top)])
    return rows, selected


# ----------------------------------------------------------------------------------------------------- calls to measure


def module(name: str = "layer", **changes: Any) -> ModuleInfo:
    base = ModuleInfo(
        name=name,
        kind="encoder",
        layer=0,
        n_heads=3,
        n_kv_heads=3,
        d_head=4,
        query_side="source",
        key_side="source",
        tier="interface",
        prefixed=False,
    )
    return replace(base, **changes)


def padded(texts: list[list[Any]], filler: Any, length: int, left: bool) -> Tensor:
    return torch.tensor(
        [[filler] * (length - len(text)) + text if left else text + [filler] * (length - len(text)) for text in texts]
    )


def batch_of(
    windows: list[int],
    sides: dict[str, tuple[list[list[int]], list[list[bool]]]],
    *,
    left: bool = False,
    extra: int = 0,
) -> Batch:
    """Texts given as ids and special marks by side, filled up to the longest and ``extra`` more."""
    ids, real, special = {}, {}, {}
    for side, (texts, marks) in sides.items():
        length = max(map(len, texts)) + extra
        ids[side] = padded(texts, -1, length, left)
        real[side] = ids[side] >= 0
        special[side] = padded(marks, False, length, left)
    return Batch(windows=tuple(windows), inputs={}, ids=ids, real=real, special=special)


def call_of(
    info: ModuleInfo, q: list[Tensor], k: list[Tensor], *, left: bool = False, extra: int = 0, **parts: Any
) -> AttentionCall:
    """Queries (H, T, d) and keys of texts in one call; what stands at padding is large, so that it would be noticed."""

    def fill(vectors: list[Tensor]) -> Tensor:
        length = max(one.shape[1] for one in vectors) + extra
        whole = torch.full(
            (len(vectors), vectors[0].shape[0], length, vectors[0].shape[2]), 5.0, dtype=vectors[0].dtype
        )
        for place, one in enumerate(vectors):
            whole[place, :, length - one.shape[1] :] = one if left else whole[place, :, length - one.shape[1] :]
            if not left:
                whole[place, :, : one.shape[1]] = one
        return whole

    return AttentionCall(info=info, q=fill(q), k=fill(k), **parts)

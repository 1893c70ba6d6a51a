"""From what the passes and the solves left to the atlas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attsvm.microscope.accumulate import Accumulator
from attsvm.microscope.analysis import Wanted, read_head
from attsvm.microscope.atlas import HeadAtlas
from attsvm.microscope.calls import ModuleInfo
from attsvm.microscope.check import Check
from attsvm.microscope.loading import Loaded
from attsvm.microscope.parts import (
    corpus_part,
    head_parts,
    measure_parts,
    model_part,
    module_part,
    shown_part,
    similarity_of,
)
from attsvm.microscope.plan import SamplePlan
from attsvm.microscope.twin import MOST_KEYS
from attsvm.microscope.windows import Corpus
from attsvm.records import read_arrays

__all__ = ["Found", "atlas_of"]

Array = npt.NDArray[Any]

_NORMS = {"fro": "Frobenius", "nuc": "nuclear"}
_OF_SOLUTIONS = (
    ("correlation", "Correlation", "0-1", "Cosine of the head's own matrix and its max-margin solution"),
    (
        "excess",
        "Correlation beyond chance",
        "0-1",
        "That cosine minus the one of a random matrix of the same spectrum",
    ),
    ("heldout", "Held-out agreement", "0-1", "Held-out queries for which the solution selects the head's own key"),
    ("support_share", "Support", "0-1", "Rows with a positive multiplier, of all rows"),
    ("effective_rank", "Effective rank", "tokens", "Exponential of the entropy of the solution's singular values"),
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Everything that an inspection left.

    Attributes
    ----------
    loaded, corpus, plan
        The model, the texts, and which of them were sampled.
    modules
        All modules, by their index.
    chosen
        Heads that were looked at, by the index of their module.
    reasons
        Why a module has no residual space, by its index; None where it has.
    wanted
        Which solutions, by the index of the module.
    sums
        The measures.
    check
        Against the model's own eager attention.
    folder
        The checkpoint folder, with ``samples`` and ``heads``.
    """

    loaded: Loaded
    corpus: Corpus
    plan: SamplePlan
    modules: dict[int, ModuleInfo]
    chosen: dict[int, tuple[int, ...]]
    reasons: dict[int, str | None]
    wanted: dict[int, Wanted]
    sums: Accumulator
    check: Check
    folder: Path


def atlas_of(found: Found, about: dict[str, Any], settings: dict[str, Any]) -> HeadAtlas:
    """Put the record, the arrays and the matrices of an inspection together.

    Parameters
    ----------
    found
        What it left.
    about
        What every record begins with: name, versions, seed and so on.
    settings
        The content of ``config.json``.
    """
    shown = read_arrays(found.folder / "samples" / "shown.safetensors")
    arrays: dict[str, Array] = {
        name: value[list(found.chosen[int(name.split(".")[2])])] for name, value in shown.items()
    }
    heads = head_parts(
        found.sums, {index: (info, found.chosen[index]) for index, info in found.modules.items()}, found.corpus.names
    )
    matrices: dict[str, Array] = {}
    selected: list[Array] = []
    twins: dict[int, list[dict[str, Array]]] = {index: [] for index in found.modules}
    for head in heads:
        solved, own = read_head(found.folder / "heads", head["label"])
        head |= solved
        for solution in solved["solutions"]:
            head["values"] |= _values_of(solution)
        matrices |= {f"{head['label']}.{name[2:]}": value for name, value in own.items() if name.startswith("W.")}
        selected.append(own["selected"])
        twins[head["module"]].append(own)
    for index in found.modules:
        arrays |= _twins(index, twins[index], arrays, len(found.plan.shown))
    arrays["similarity"] = similarity_of([found.modules[head["module"]] for head in heads], selected)
    record = {
        **about,
        "model": model_part(found.loaded, next(iter(found.modules.values())).tier),
        "check": vars(found.check),
        "corpus": corpus_part(found.corpus),
        "modules": [
            module_part(index, info, found.chosen[index], found.reasons[index]) for index, info in found.modules.items()
        ],
        "measures": _measures(found),
        "heads": heads,
        "shown": [
            shown_part(found.corpus, window, support_known=_is_asked(found, window)) for window in found.plan.shown
        ],
        **_solutions(found),
    }
    return HeadAtlas(record, arrays, matrices, settings)


def _measures(found: Found) -> list[dict[str, str]]:
    """What the values of a head mean: those of the corpus, then those of each kind of solution."""
    all_of_them = measure_parts()
    for space, norm in _kinds_of_solutions(found):
        where = f"{space} space, {_NORMS[norm]} norm"
        for key, title, scale, explanation in _OF_SOLUTIONS:
            all_of_them.append(
                {
                    "key": f"{space}.{norm}.{key}",
                    "title": f"{title} ({space}, {_NORMS[norm]})",
                    "unit": "dimensions" if key == "effective_rank" else "",
                    "scale": scale,
                    "explanation": f"{explanation}; {where}.",
                }
            )
    return all_of_them


def _kinds_of_solutions(found: Found) -> list[tuple[str, str]]:
    return list(dict.fromkeys(pair for wanted in found.wanted.values() for pair in wanted))


def _solutions(found: Found) -> dict[str, Any]:
    """The kinds of solutions, and which one stands for a head."""
    kinds = _kinds_of_solutions(found)
    if not kinds:
        return {"solution_names": [], "primary": None}
    names = [{"space": space, "norm": norm, "title": f"{space} space, {_NORMS[norm]} norm"} for space, norm in kinds]
    space, norm = kinds[0]
    why = (
        "the residual space is that of the theory: W = W_K W_Q^T acts on what the layer is given"
        if space == "residual"
        else next((reason for reason in found.reasons.values() if reason), "score space was asked for")
    )
    return {"solution_names": names, "primary": {"space": space, "norm": norm, "why": why}}


def _values_of(solution: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """The measures of one solution; the interval of the held-out agreement is Wilson's, of the effective number."""
    correlation, recovery, heldout = solution["correlation"], solution["recovery"], solution["heldout"]
    excess = None if correlation is None or recovery is None else correlation - recovery
    rows = solution["n_constraints"]
    plain = {
        "correlation": correlation,
        "excess": excess,
        "support_share": solution["n_support"] / rows if rows else None,
        "effective_rank": solution["effective_rank"],
    }
    prefix = f"{solution['space']}.{solution['norm']}."
    values: dict[str, dict[str, Any] | None] = {
        prefix + key: None if value is None else {"mean": value, "low": None, "high": None, "n": solution["n_queries"]}
        for key, value in plain.items()
    }
    low, high = _wilson(heldout, solution["heldout_effective_n"] or 0)
    values[f"{prefix}heldout"] = (
        None if heldout is None else {"mean": heldout, "low": low, "high": high, "n": solution["heldout_n"]}
    )
    return values


def _wilson(share: float | None, n: float, z: float = 1.959964) -> tuple[float | None, float | None]:
    """The 95 % interval of a share of n independent queries."""
    if share is None or n == 0:
        return None, None
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def _twins(index: int, heads: list[dict[str, Array]], arrays: dict[str, Array], n_shown: int) -> dict[str, Array]:
    """The twins and support tokens of a module's heads, one array for each text shown."""
    made: dict[str, Array] = {}
    for place in range(n_shown):
        if not any(f"{place}.index" in head for head in heads):
            continue
        H, Tq, Tk = arrays[f"shown.{place}.{index}.pattern"].shape
        keys = np.full((H, Tq, min(MOST_KEYS, Tk)), -1, dtype=np.int32)
        weights = np.zeros(keys.shape, dtype=np.uint8)
        support = np.zeros((H, Tq, Tk), dtype=np.uint8)
        for number, head in enumerate(heads):
            if f"{place}.index" not in head:
                continue
            length, width = head[f"{place}.index"].shape
            keys[number, :length, :width] = head[f"{place}.index"]
            weights[number, :length, :width] = head[f"{place}.weight"]
            rows = head[f"{place}.support"]
            support[number, rows[:, 0], rows[:, 1]] = 1
        prefix = f"shown.{place}.{index}"
        made |= {f"{prefix}.twin_index": keys, f"{prefix}.twin_weight": weights, f"{prefix}.support": support}
    return made


def _is_asked(found: Found, window: int) -> bool:
    """Whether all queries of a window are in the problem, so that all its support tokens are known."""
    one = found.corpus.windows[window]
    asked = sum(where == window for rows in found.plan.train.values() for where, _ in rows)
    pieces = [one.source, *([one.target] if one.target else [])]
    left_out = sum(sum(piece.special) for piece in pieces) if found.corpus.special == "drop" else 0
    return asked >= one.n_tokens - left_out

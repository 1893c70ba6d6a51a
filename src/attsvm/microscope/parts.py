"""Parts of the record of an atlas, the same whether it comes from a corpus, one typed text, or given weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from attsvm.microscope.accumulate import Accumulator
from attsvm.microscope.calls import ModuleInfo
from attsvm.microscope.kinds import head_kind
from attsvm.microscope.loading import Loaded
from attsvm.microscope.measures import MEASURES
from attsvm.microscope.similarity import agreement
from attsvm.microscope.windows import Corpus, Piece

__all__ = [
    "UNSOLVED",
    "corpus_part",
    "head_parts",
    "measure_parts",
    "model_part",
    "module_part",
    "shown_part",
    "similarity_of",
]

Array = npt.NDArray[Any]

UNSOLVED: dict[str, Any] = {"solutions": [], "spectra": {}, "soft": None}
"""What a head's part holds where no problem was solved."""


def model_part(loaded: Loaded, tier: str) -> dict[str, Any]:
    """The model."""
    parameters = list(loaded.model.parameters())
    return {
        "name": loaded.name,
        "family": loaded.family,
        "n_parameters": sum(parameter.numel() for parameter in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "tier": tier,
        "notes": [],
    }


def corpus_part(corpus: Corpus) -> dict[str, Any]:
    """The texts."""
    return {
        "n_texts": len(corpus.texts),
        "n_windows": len(corpus.windows),
        "n_tokens": corpus.n_tokens,
        "special": corpus.special,
        "notes": list(corpus.notes),
    }


def module_part(index: int, info: ModuleInfo, heads: Sequence[int], residual: str | None) -> dict[str, Any]:
    """One attention module; ``residual`` says why it has no residual space."""
    names = ("name", "kind", "layer", "n_heads", "n_kv_heads", "d_head", "query_side", "key_side")
    own = {name: getattr(info, name) for name in names}
    return {"index": index, **own, "heads": list(heads), "residual": residual}


def measure_parts() -> list[dict[str, str]]:
    """What the values of a head mean."""
    names = ("key", "title", "unit", "scale", "explanation")
    return [{name: getattr(measure, name) for name in names} for measure in MEASURES]


def head_parts(
    sums: Accumulator, chosen: Mapping[int, tuple[ModuleInfo, Sequence[int]]], names: Mapping[int, str]
) -> list[dict[str, Any]]:
    """All heads with their measures; each still without solutions.

    Parameters
    ----------
    sums
        The measures.
    chosen
        Module index -> the module and the heads of it that are wanted.
    names
        Token id -> how it is shown.
    """
    estimates, chance, tokens = sums.finish(), sums.chance(), sums.top_tokens()
    return [
        {
            "label": (label := info.label(head)),
            "kind": info.kind,
            "layer": info.layer,
            "head": head,
            "kv_head": head // (info.n_heads // info.n_kv_heads),
            "module": index,
            "values": {key: None if value is None else vars(value) for key, value in estimates[label].items()},
            "head_kind": head_kind(estimates[label], chance[label]),
            "top_tokens": [[names.get(token, str(token)), share] for token, share in tokens[label]],
            **UNSOLVED,
        }
        for index, (info, heads) in chosen.items()
        for head in heads
    ]


def shown_part(corpus: Corpus, index: int, *, support_known: bool = False) -> dict[str, Any]:
    """One window that the page shows in full."""
    window = corpus.windows[index]
    picture = None if window.picture is None else corpus.pictures[window.picture]
    return {
        "window": index,
        "text": corpus.texts[window.text],
        "source": _piece(window.source),
        "target": None if window.target is None else _piece(window.target),
        "picture": None if picture is None else picture.record(),
        "support_known": support_known,
    }


def _piece(piece: Piece) -> dict[str, Any]:
    return {"tokens": list(piece.tokens), "words": list(piece.words), "special": list(piece.special)}


def similarity_of(infos: Sequence[ModuleInfo], selected: Sequence[Array]) -> Array:
    """Agreement of all pairs of heads whose queries and keys are of the same sides; NaN for others.

    Parameters
    ----------
    infos
        The module of each head.
    selected
        The key that each sampled query of each head selects.
    """
    sides = [(info.query_side, info.key_side) for info in infos]
    whole = np.full((len(selected), len(selected)), np.nan, dtype=np.float32)
    for pair in set(sides):
        mine = [place for place, side in enumerate(sides) if side == pair]
        whole[np.ix_(mine, mine)] = agreement(np.stack([selected[place] for place in mine]))
    return whole

"""An atlas of attention weights that somebody already has."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from attsvm.errors import InvalidInputError
from attsvm.microscope.accumulate import Accumulator
from attsvm.microscope.atlas import HeadAtlas
from attsvm.microscope.calls import AttentionCall, Kind, ModuleInfo, Side
from attsvm.microscope.display import visible
from attsvm.microscope.given import calls_from_attentions
from attsvm.microscope.parts import (
    corpus_part,
    head_parts,
    measure_parts,
    module_part,
    shown_part,
    similarity_of,
)
from attsvm.microscope.passes import shown_arrays
from attsvm.microscope.windows import Batch, Corpus, Piece, Window, content_key
from attsvm.records import package_versions

__all__ = ["from_attentions"]

_WHERE = "from_attentions"
_REASON = "only the attention weights were given"

Tokens = Sequence[str] | Sequence[Sequence[str]]


def from_attentions(
    attentions: Any,
    tokens: Tokens,
    *,
    target_tokens: Tokens | None = None,
    kinds: Kind | Sequence[Kind] | None = None,
    special: Sequence[str] = ("[CLS]", "[SEP]", "[PAD]", "<s>", "</s>", "<pad>", "<|endoftext|>"),
    n_shown: int = 3,
    name: str = "given attention",
) -> HeadAtlas:
    """Look at weights after softmax; everything is there but what needs queries and keys.

    Margins come from the logarithms of the weights; there are no max-margin solutions.

    Parameters
    ----------
    attentions
        As in :func:`~attsvm.microscope.given.calls_from_attentions`: such as ``outputs.attentions``.
    tokens
        The tokens of one text, or of each text of the batch; a text with fewer tokens than keys is padded on the right.
    target_tokens
        The same of the decoder's text, for weights with a cross or an encoder part.
    kinds
        ``"encoder"``, ``"decoder"`` or ``"cross"``, of all layers or of each. Default: what the shapes say.
    special
        Tokens that are not part of the text.
    n_shown
        Texts that the page shows in full.
    name
        For people.

    Raises
    ------
    InvalidInputError
        If the weights are none, or do not fit the tokens.

    Examples
    --------
    >>> weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]]).reshape(1, 1, 1, 2, 2)
    >>> atlas = from_attentions(weights, ["a", "b"])
    >>> round(atlas["L0.H0"]["top_probability"], 6)
    0.875
    """
    calls = calls_from_attentions(attentions, kinds=kinds)
    B = calls[0].given.shape[0] if calls[0].given is not None else 0
    pieces = {"source": _pieces(tokens, "tokens", B, special)}
    sides = {side for call in calls for side in (call.info.query_side, call.info.key_side)}
    if "target" in sides:
        if target_tokens is None:
            raise InvalidInputError(
                f"{_WHERE}: target_tokens must be given for weights of a decoder beside an encoder."
            )
        pieces["target"] = _pieces(target_tokens, "target_tokens", B, special)
    elif target_tokens is not None:
        raise InvalidInputError(f"{_WHERE}: target_tokens must be left out for weights of one text.")
    corpus = _corpus(pieces, B)
    batch = _batch(calls, pieces, B)
    sums = Accumulator([call.info for call in calls])
    arrays: dict[str, Any] = {}
    shown = range(min(B, n_shown))
    for index, call in enumerate(calls):
        sums.add(call, batch)
        for place in shown:
            arrays |= shown_arrays(_one(call, place, pieces), f"shown.{place}.{index}")
    infos = [call.info for call in calls]
    arrays["similarity"] = _similarity(infos, arrays, len(shown))
    record = {
        "kind": "inspect",
        "name": name,
        "command": "",
        "seed": 0,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": package_versions("torch", "numpy"),
        "model": {"name": name, "family": "", "n_parameters": None, "dtype": "", "tier": "given", "notes": [_REASON]},
        "check": {"max_difference": None, "module": "", "n_rows": 0, "compared": False, "note": _REASON},
        "corpus": corpus_part(corpus),
        "modules": [
            module_part(index, info, range(info.n_heads), f"{_REASON}, no queries and keys")
            for index, info in enumerate(infos)
        ],
        "measures": measure_parts(),
        "heads": head_parts(
            sums, {index: (info, range(info.n_heads)) for index, info in enumerate(infos)}, corpus.names
        ),
        "shown": [shown_part(corpus, place) for place in shown],
        "solution_names": [],
        "primary": None,
    }
    return HeadAtlas(record, arrays)


def _pieces(tokens: Tokens, argument: str, B: int, special: Sequence[str]) -> list[Piece]:
    """The tokens of each text, equal ones with equal ids."""
    rows: list[Sequence[str]] = [tokens] if all(isinstance(token, str) for token in tokens) else list(tokens)  # type: ignore[list-item]
    if len(rows) != B or not all(rows) or not all(isinstance(token, str) for row in rows for token in row):
        raise InvalidInputError(
            f"{_WHERE}: {argument} must be strings, a sequence for each of the {B} texts, got {len(rows)} sequences."
        )
    ids: dict[str, int] = {}
    return [
        Piece(
            ids=tuple(ids.setdefault(token, len(ids)) for token in row),
            special=tuple(token in special for token in row),
            tokens=tuple(visible(token) for token in row),
            words=tuple(-1 if token in special else place for place, token in enumerate(row)),
        )
        for row in rows
    ]


def _corpus(pieces: dict[str, list[Piece]], B: int) -> Corpus:
    targets = pieces.get("target", [None] * B)
    windows = tuple(
        Window(text=index, start=0, source=source, target=target, key=content_key(source, target))
        for index, (source, target) in enumerate(zip(pieces["source"], targets, strict=True))
    )
    names = {
        number: token
        for piece in (piece for part in pieces.values() for piece in part)
        for number, token in zip(piece.ids, piece.tokens, strict=True)
    }
    texts = tuple(" ".join(piece.tokens) for piece in pieces["source"])
    return Corpus(texts=texts, windows=windows, names=names)


def _batch(calls: list[AttentionCall], pieces: dict[str, list[Piece]], B: int) -> Batch:
    """Tokens and what is padding, as wide as the weights."""
    ids: dict[Side, torch.Tensor] = {}
    special: dict[Side, torch.Tensor] = {}
    for side, width in _widths(calls).items():
        rows = pieces[side]
        longest = max(len(piece) for piece in rows)
        if longest > width:
            raise InvalidInputError(
                f"{_WHERE}: tokens must be as many as the weights are wide, {width}, or fewer; got {longest} ({side})."
            )
        ids[side] = torch.tensor([[*piece.ids, *[-1] * (width - len(piece))] for piece in rows])
        special[side] = torch.tensor([[*piece.special, *[False] * (width - len(piece))] for piece in rows])
    return Batch(
        windows=tuple(range(B)),
        inputs={},
        ids=ids,
        real={side: value >= 0 for side, value in ids.items()},
        special=special,
    )


def _widths(calls: list[AttentionCall]) -> dict[Side, int]:
    """How many tokens each side has in the weights."""
    widths: dict[Side, int] = {}
    for call in calls:
        for side, width in ((call.info.query_side, call.query_length), (call.info.key_side, call.key_length)):
            if widths.setdefault(side, width) != width:
                raise InvalidInputError(
                    f"{_WHERE}: attentions must be as wide in every layer, got {widths[side]} and {width} tokens."
                )
    return widths


def _one(call: AttentionCall, place: int, pieces: dict[str, list[Piece]]) -> AttentionCall:
    """The weights of one text, without padding."""
    assert call.given is not None
    queries, keys = (len(pieces[side][place]) for side in (call.info.query_side, call.info.key_side))
    given = call.given[place : place + 1, :, :queries, :keys]
    return AttentionCall(info=call.info, q=call.q, k=call.k, given=given)


def _similarity(infos: list[ModuleInfo], arrays: dict[str, Any], n_shown: int) -> Any:
    """Agreement of the heads on the texts that are shown."""
    heads = [(index, head) for index, info in enumerate(infos) for head in range(info.n_heads)]
    none = np.zeros(0, dtype=np.int32)
    selected = [
        np.concatenate([none, *(arrays[f"shown.{place}.{index}.selected"][head] for place in range(n_shown))])
        for index, head in heads
    ]
    return similarity_of([infos[index] for index, _ in heads], selected)

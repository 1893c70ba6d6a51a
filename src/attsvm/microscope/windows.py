"""Stretches of texts that fit into a model, and batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from attsvm.errors import InvalidInputError
from attsvm.microscope.calls import Side
from attsvm.microscope.pictures import Picture, pixel_values

if TYPE_CHECKING:
    from attsvm.microscope.loading import Loaded

__all__ = ["Batch", "Corpus", "PaddingSide", "Piece", "Special", "Window", "batches", "content_key"]

PaddingSide = Literal["left", "right"]
Special = Literal["keep", "drop"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The tokens of one text in one window. All tuples have one entry for each of T tokens.

    Attributes
    ----------
    ids
        What the model is given; of a picture, the number of the token in it.
    special
        Whether it is a token that the model's format needs rather than a part of the text.
    tokens
        How it is shown: ``" "`` in front where the text has a space there, nothing that is invisible.
    words
        Number of the word in the window, from 0; -1 for special tokens and patches of pictures.
    types
        Token types (the first or the second text of a pair), or empty where the model has none.
    """

    ids: tuple[int, ...]
    special: tuple[bool, ...]
    tokens: tuple[str, ...]
    words: tuple[int, ...]
    types: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Window:
    """One input of the model.

    Attributes
    ----------
    text
        Index of the text (or picture) it is from.
    start
        Index in that text of its first token that is not special.
    source
        The text.
    target
        What the decoder of an encoder-decoder reads, or None.
    picture
        Index in ``Corpus.pictures``, or None.
    key
        A number in [0, 2^63) made from the content alone: two windows have the same one if, and but for chance only
        if, the model is given the same.
    """

    text: int
    start: int
    source: Piece
    target: Piece | None = None
    picture: int | None = None
    key: int

    def piece(self, side: Side) -> Piece:
        """The tokens of a side."""
        if side == "source":
            return self.source
        assert self.target is not None, "no decoder, no target"
        return self.target

    @property
    def n_tokens(self) -> int:
        """Of both sides."""
        return len(self.source) + (len(self.target) if self.target else 0)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Texts or pictures, as a model takes them.

    Attributes
    ----------
    texts
        As they were given; names of pictures.
    windows
        In the order of the texts.
    pictures
        Empty for texts.
    names
        How each token id is shown away from its place.
    special
        Whether special tokens are queries and keys of the measures (``"keep"``) or not (``"drop"``).
    n_windowed
        Texts that were split into several windows.
    n_truncated
        Texts of which an end was left out.
    notes
        What was decided on the way, for people.
    """

    texts: tuple[str, ...]
    windows: tuple[Window, ...]
    pictures: tuple[Picture, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    special: Special = "keep"
    n_windowed: int = 0
    n_truncated: int = 0
    notes: tuple[str, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens of all windows and both sides."""
        return sum(window.n_tokens for window in self.windows)

    @property
    def sides(self) -> tuple[Side, ...]:
        """``("source",)``, or with a decoder of its own text ``("source", "target")``."""
        return ("source", "target") if self.windows and self.windows[0].target else ("source",)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some windows as the arguments of a model. B windows, T tokens of the longest, for each side.

    Attributes
    ----------
    windows
        Indices of the windows in their corpus.
    inputs
        Arguments of the model.
    ids
        (B, T) int64, -1 at padding.
    real
        (B, T), False at padding.
    special
        (B, T), True at special tokens.
    """

    windows: tuple[int, ...]
    inputs: dict[str, Any]
    ids: dict[Side, Tensor]
    real: dict[Side, Tensor]
    special: dict[Side, Tensor]


def content_key(source: Piece, target: Piece | None = None, pixels: bytes = b"") -> int:
    """The key of a window: a hash of what the model is given, in 63 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for numbers in (source.ids, source.types, target.ids if target else ()):
        digest.update(len(numbers).to_bytes(8, "little"))
        digest.update(np.asarray(numbers, dtype=np.int64).tobytes())
    digest.update(pixels)
    return int.from_bytes(digest.digest(), "little") >> 1


def batches(
    loaded: Loaded,
    corpus: Corpus,
    indices: Sequence[int],
    *,
    batch_size: int,
    padding_side: PaddingSide | None = None,
) -> Iterator[Batch]:
    """Windows in batches of similar length, the longest first.

    Parameters
    ----------
    loaded
        The model.
    corpus
        Its windows.
    indices
        Which of them.
    batch_size
        Windows of a batch; one where the model takes no mask.
    padding_side
        Where shorter ones are filled up; by default right, where it changes no position. Left is followed only by
        models that can be told the positions, for the others would count the padding.
    """
    if batch_size < 1:
        raise InvalidInputError(f"inspect: batch_size must be at least 1, got {batch_size}.")
    if padding_side not in (None, "left", "right"):
        raise InvalidInputError(f"inspect: padding_side must be 'left' or 'right', got {padding_side!r}.")
    if not corpus.pictures and not loaded.takes("attention_mask"):
        batch_size = 1  # nothing could hide the padding
    windows = corpus.windows
    order = sorted(indices, key=lambda index: (-windows[index].n_tokens, windows[index].key, index))
    left = padding_side == "left" and loaded.takes("position_ids") and not loaded.has_target
    for start in range(0, len(order), batch_size):
        chosen = tuple(order[start : start + batch_size])
        yield _picture_batch(loaded, corpus, chosen) if corpus.pictures else _text_batch(loaded, corpus, chosen, left)


def _text_batch(loaded: Loaded, corpus: Corpus, chosen: tuple[int, ...], left: bool) -> Batch:
    sides = corpus.sides
    pieces = {side: [corpus.windows[index].piece(side) for index in chosen] for side in sides}
    ids = {side: _rows([piece.ids for piece in pieces[side]], left, -1) for side in sides}
    special = {side: _rows([piece.special for piece in pieces[side]], left, 0).bool() for side in sides}
    real = {side: ids[side] >= 0 for side in sides}
    device = loaded.device
    inputs: dict[str, Any] = {"input_ids": ids["source"].masked_fill(~real["source"], _filler(loaded))}
    if loaded.takes("attention_mask"):
        inputs["attention_mask"] = real["source"].long()
    if loaded.takes("token_type_ids") and all(piece.types for piece in pieces["source"]):
        inputs["token_type_ids"] = _rows([piece.types for piece in pieces["source"]], left, 0)
    if left:
        inputs["position_ids"] = _positions(loaded, real["source"])
    if "target" in sides:
        inputs["decoder_input_ids"] = ids["target"].masked_fill(~real["target"], _filler(loaded))
        inputs["decoder_attention_mask"] = real["target"].long()
    return Batch(
        windows=chosen,
        inputs={name: value.to(device) for name, value in inputs.items()},
        ids={side: value.to(device) for side, value in ids.items()},
        real={side: value.to(device) for side, value in real.items()},
        special={side: value.to(device) for side, value in special.items()},
    )


def _picture_batch(loaded: Loaded, corpus: Corpus, chosen: tuple[int, ...]) -> Batch:
    pictures = [corpus.pictures[corpus.windows[index].picture or 0] for index in chosen]
    pieces = [corpus.windows[index].source for index in chosen]
    weight = next(loaded.model.parameters())
    inputs = {"pixel_values": pixel_values(pictures).to(weight)}
    ids = torch.tensor([piece.ids for piece in pieces], device=weight.device)
    special = torch.tensor([piece.special for piece in pieces], device=weight.device)
    return Batch(
        windows=chosen,
        inputs=inputs,
        ids={"source": ids},
        real={"source": torch.ones_like(special)},
        special={"source": special},
    )


def _rows(rows: Sequence[Sequence[int]], left: bool, filler: int) -> Tensor:
    """Rows of different length as one tensor."""
    longest = max(len(row) for row in rows)
    filled = [[filler] * (longest - len(row)) for row in rows]
    return torch.tensor(
        [[*fill, *row] if left else [*row, *fill] for row, fill in zip(rows, filled, strict=True)], dtype=torch.int64
    )


def _filler(loaded: Loaded) -> int:
    """The id at padding. Any will do, as the mask hides it; but some models count positions by their own."""
    config = loaded.model.config
    for owner in (config, loaded.tokenizer):
        token = getattr(owner, "pad_token_id", None)
        if isinstance(token, int) and 0 <= token < (loaded.d_vocab or token + 1):
            return token
    return 0


def _positions(loaded: Loaded, real: Tensor) -> Tensor:
    """Positions as without padding."""
    return (real.long().cumsum(-1) - 1).clamp_min(0) + loaded.first_position

"""The record of embedded texts, padded, and its ragged form in which it is computed and cached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from attsvm.errors import InvalidInputError

__all__ = ["EmbeddedText", "RaggedEmbedding", "check_texts", "pad"]

Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddedText:
    """Texts as sequences of token vectors.

    Attributes
    ----------
    tokens
        (n, T, d) float32, 0 where there is no token. T is the length of the longest sequence.
    allowed
        (n, T), True for the tokens that stand for a piece of the text: neither padding nor special.
    special
        (n, T), True for the tokens that the tokenizer adds ([CLS], [SEP], [BOS], ...).
    pieces
        Per text, the tokens as the tokenizer spells them (``##ing``), special ones included.
    token_strings
        Per text, the tokens exactly as they stand in the text (``ing``); empty for special ones.
    truncated
        (n,), True for the texts that were cut because they are longer than the model takes.
    model_name
        Where the vectors come from.
    layer
        Index into the model's hidden states, as it was asked for: 0 = input embeddings, -1 = last layer.
    """

    tokens: Float32Array
    allowed: BoolArray
    special: BoolArray
    pieces: tuple[tuple[str, ...], ...]
    token_strings: tuple[tuple[str, ...], ...]
    truncated: BoolArray
    model_name: str
    layer: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_truncated(self) -> int:
        """Number of texts that were cut."""
        return int(self.truncated.sum())

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(n,) number of tokens, special ones included."""
        return np.asarray((self.allowed | self.special).sum(axis=1), dtype=np.int64)

    @property
    def has_tokens(self) -> BoolArray:
        """(n,) True for the texts with at least one allowed token; an empty text has none."""
        return np.asarray(self.allowed.any(axis=1))

    def keep(self, indices: Iterable[int] | npt.NDArray[Any]) -> EmbeddedText:
        """The texts at ``indices``, in that order. Padding that no kept text needs is dropped."""
        chosen = np.fromiter((int(index) for index in indices), dtype=np.int64)
        length = max(int(self.lengths[chosen].max(initial=1)), 1)
        return replace(
            self,
            tokens=self.tokens[chosen, :length],
            allowed=self.allowed[chosen, :length],
            special=self.special[chosen, :length],
            pieces=tuple(self.pieces[index] for index in chosen),
            token_strings=tuple(self.token_strings[index] for index in chosen),
            truncated=self.truncated[chosen],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RaggedEmbedding:
    """Texts as sequences of token vectors, one after the other, without padding.

    ``lengths`` (m,) tokens of each text, S their sum; ``vectors`` (S, d) float32; ``special`` (S,) bool; ``spans``
    (S, 2) first character and end of each token in its text; ``truncated`` (m,) bool; ``pieces`` S strings.
    """

    lengths: npt.NDArray[np.int64]
    vectors: Float32Array
    special: BoolArray
    spans: npt.NDArray[np.int64]
    truncated: BoolArray
    pieces: tuple[str, ...]


def check_texts(texts: Sequence[str], where: str) -> None:
    """Raise InvalidInputError unless ``texts`` is a non-empty sequence of strings."""
    if isinstance(texts, str):
        raise InvalidInputError(f"{where}: texts must be a sequence, got one text. Hint: put it in a list.")
    if not len(texts):
        raise InvalidInputError(f"{where}: texts must hold at least one text, got none.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidInputError(f"{where}: texts must be strings, got {type(text).__name__} at {index}.")


def pad(texts: Sequence[str], parts: Sequence[RaggedEmbedding], *, model_name: str, layer: int) -> EmbeddedText:
    """Put the parts, which hold the texts in order, into arrays padded with 0 at the end."""
    lengths = np.concatenate([part.lengths for part in parts])
    shape = len(texts), max(int(lengths.max()), 1)
    tokens = np.zeros((*shape, parts[0].vectors.shape[1]), dtype=np.float32)
    special = np.zeros(shape, dtype=np.bool_)
    real = np.arange(shape[1]) < lengths[:, None]
    tokens[real] = np.concatenate([part.vectors for part in parts])
    special[real] = np.concatenate([part.special for part in parts])
    spans = np.concatenate([part.spans for part in parts]).tolist()
    flat_pieces = [piece for part in parts for piece in part.pieces]
    pieces, strings, start = [], [], 0
    for text, length in zip(texts, lengths.tolist(), strict=True):
        end = start + length
        pieces.append(tuple(flat_pieces[start:end]))
        strings.append(tuple(text[first:stop] for first, stop in spans[start:end]))
        start = end
    return EmbeddedText(
        tokens=tokens,
        allowed=real & ~special,
        special=special,
        pieces=tuple(pieces),
        token_strings=tuple(strings),
        truncated=np.concatenate([part.truncated for part in parts]),
        model_name=model_name,
        layer=layer,
    )

"""From data to labelled sequences of token vectors, whatever the data was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from attsvm.data import (
    EmbeddedText,
    LabelledArrays,
    LabelledText,
    embed_text,
    load_data,
    random_embedding,
    subsample,
)
from attsvm.errors import InvalidInputError
from attsvm.experiments.config import VerifyConfig

__all__ = ["Sequences", "load_sequences"]

DEFAULT_TEXTS = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """Labelled sequences, ready for attention.

    Attributes
    ----------
    tokens
        (n, T, d) float64.
    queries
        (n, d): the first token of each sequence, special or not, unless the data names queries.
    allowed
        (n, T): the tokens that may be attended to; special tokens are not.
    labels
        (n,) of -1 and +1, or None.
    scores
        (n, T) given scores, or None.
    texts, token_strings
        What to show.
    label_texts
        The label of each sequence in words, or None.
    about
        The ``data`` part of the result.
    """

    tokens: npt.NDArray[np.float64]
    queries: npt.NDArray[np.float64]
    allowed: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.float64] | None
    scores: npt.NDArray[np.float64] | None
    texts: tuple[str, ...]
    token_strings: tuple[tuple[str, ...], ...]
    label_texts: tuple[str | None, ...]
    about: dict[str, Any]


def load_sequences(config: VerifyConfig, *, progress: Callable[[int, int], None] | None = None) -> Sequences:
    """Read the data, choose the sequences, and embed them if they are texts.

    Raises
    ------
    InvalidInputError
        If the data cannot be used; the message says why.
    """
    data = load_data(config.data, text_column=config.text_column, label_column=config.label_column)
    if isinstance(data, LabelledArrays):
        return _from_arrays(data, config)
    return _from_text(data, config, progress)


def _from_text(data: LabelledText, config: VerifyConfig, progress: Callable[[int, int], None] | None) -> Sequences:
    chosen = subsample(data, config.n_sequences or DEFAULT_TEXTS, config.seed)
    embedded = _embed(chosen, config, progress)
    usable = embedded.has_tokens
    if not usable.all():
        keep = np.flatnonzero(usable)
        embedded, chosen = embedded.keep(keep), chosen.keep(keep)
    if len(set(chosen.labels)) < 2:
        raise InvalidInputError(f"verify: {data.source} must have texts of two labels with at least one word each.")
    names = chosen.label_names
    return Sequences(
        tokens=embedded.tokens.astype(np.float64),
        queries=embedded.tokens[:, 0].astype(np.float64),
        allowed=embedded.allowed,
        labels=np.array(chosen.labels, dtype=np.float64),
        scores=None,
        texts=chosen.texts,
        token_strings=tuple(
            tuple(shown or piece for shown, piece in zip(*pair, strict=True))
            for pair in zip(embedded.token_strings, embedded.pieces, strict=True)
        ),
        label_texts=tuple(names[1] if label > 0 else names[0] for label in chosen.labels),
        about={
            "source": chosen.source,
            "kind": "text",
            "label_names": list(names),
            "n_truncated": embedded.n_truncated,
            "n_skipped": data.n_skipped + int((~usable).sum()),
            "n_available": len(data),
            "model": embedded.model_name,
            "layer": None if config.model == "none" else embedded.layer,
            "embedding": "random" if config.model == "none" else "model",
            "query": "first token",
            "content_hash": chosen.content_hash,
        },
    )


def _embed(data: LabelledText, config: VerifyConfig, progress: Callable[[int, int], None] | None) -> EmbeddedText:
    if config.model == "none":
        return random_embedding(
            data.texts, d_model=config.d_model, seed=config.seed, max_tokens=config.max_tokens or 512
        )
    return embed_text(
        data.texts,
        model=None if config.model == "default" else config.model,
        layer=config.layer,
        batch_size=config.batch_size,
        device=config.device,
        max_tokens=config.max_tokens,
        dtype=config.dtype,
        progress=progress,
    )


def _from_arrays(data: LabelledArrays, config: VerifyConfig) -> Sequences:
    n = len(data.tokens)
    rows = np.arange(n)
    if config.n_sequences is not None and config.n_sequences < n:
        rows = np.sort(np.random.default_rng(config.seed).permutation(n)[: config.n_sequences])
    allowed = np.ones(data.tokens.shape[:2], dtype=bool) if data.allowed is None else data.allowed
    data = replace(
        data,
        tokens=data.tokens[rows],
        queries=data.queries[rows],
        allowed=allowed[rows],
        labels=None if data.labels is None else data.labels[rows],
        scores=None if data.scores is None else data.scores[rows],
    )
    assert data.allowed is not None
    labels = data.labels
    T = data.tokens.shape[1]
    return Sequences(
        tokens=data.tokens.astype(np.float64),
        queries=data.queries.astype(np.float64),
        allowed=data.allowed,
        labels=None if labels is None else labels.astype(np.float64),
        scores=None if data.scores is None else data.scores.astype(np.float64),
        texts=("",) * len(rows),
        token_strings=(tuple(map(str, range(T))),) * len(rows),
        label_texts=(None,) * len(rows) if labels is None else tuple("+1" if y > 0 else "-1" for y in labels),
        about={
            "source": data.source,
            "kind": "arrays",
            "label_names": ["-1", "+1"] if labels is not None else None,
            "n_truncated": 0,
            "n_skipped": 0,
            "n_available": n,
            "model": None,
            "layer": None,
            "embedding": "given",
            "query": "as given",
            "content_hash": data.content_hash,
        },
    )

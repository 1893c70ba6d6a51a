"""Token vectors without a model: one random direction per word."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from attsvm.data.embedded_text import EmbeddedText, Float32Array, RaggedEmbedding, check_texts, pad
from attsvm.errors import InvalidInputError

__all__ = ["random_embedding"]

_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
_BOS = "[BOS]"


def random_embedding(
    texts: Sequence[str], *, d_model: int = 64, seed: int = 0, max_tokens: int | None = 512
) -> EmbeddedText:
    r"""Embed each word as a random unit vector that depends on nothing but the word and the seed.

    A text is cut into words and single punctuation marks, in lower case; word $w$ has the vector
    $e_w = g_w / \|g_w\|$, $g_w \sim N(0, I_d)$, drawn by a generator seeded with SHA-256 of the seed and the word. The
    sequence starts with a special token [BOS], which is not allowed as a key but serves as the query,

    $$z = e_{\text{BOS}} + \bar e / \|\bar e\|, \qquad \bar e = \frac{1}{T} \sum_t e_{w_t},$$

    a part that all texts share and one of its own; $z = e_{\text{BOS}}$ when the text has no words.

    Parameters
    ----------
    texts
        n texts. One without words becomes a sequence without an allowed token.
    d_model
        d, the size of the vectors. At least 1.
    seed
        The seed.
    max_tokens
        Longer texts are cut to this many tokens, [BOS] included, before the mean is taken; None never cuts.

    Returns
    -------
    EmbeddedText
        ``layer`` is 0.

    Raises
    ------
    InvalidInputError
        If there are no texts, ``d_model`` is below 1 or ``max_tokens`` below 2.
    """
    check_texts(texts, "random_embedding")
    if d_model < 1:
        raise InvalidInputError(f"random_embedding: d_model must be at least 1, got {d_model}.")
    if max_tokens is not None and max_tokens < 2:
        raise InvalidInputError(f"random_embedding: max_tokens must be at least 2, got {max_tokens}.")

    @cache
    def vector(name: str) -> Float32Array:
        return _unit_vector(name, d_model, seed)

    parts = []
    for text in texts:
        words = list(_WORD.finditer(text))
        kept = words[: max_tokens - 1] if max_tokens is not None else words
        names = [match[0].lower() for match in kept]
        vectors = np.stack([vector(f"special:{_BOS}"), *(vector(f"word:{name}") for name in names)])
        if names:
            mean = vectors[1:].astype(np.float64).mean(axis=0)
            vectors[0] += (mean / max(float(np.linalg.norm(mean)), np.finfo(np.float64).tiny)).astype(np.float32)
        parts.append(
            RaggedEmbedding(
                lengths=np.array([len(vectors)]),
                vectors=vectors,
                special=np.arange(len(vectors)) == 0,
                spans=np.array([(0, 0), *(match.span() for match in kept)]),
                truncated=np.array([len(kept) < len(words)]),
                pieces=(_BOS, *names),
            )
        )
    return pad(texts, parts, model_name=f"random vectors (d={d_model}, seed={seed})", layer=0)


def _unit_vector(name: str, d_model: int, seed: int) -> Float32Array:
    digest = hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()
    vector = np.random.default_rng(int.from_bytes(digest, "big")).standard_normal(d_model)
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)

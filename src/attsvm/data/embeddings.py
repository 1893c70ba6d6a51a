"""Token vectors from a pretrained text encoder. The only module of the data layer that knows transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from attsvm.data.cache import EmbeddingCache
from attsvm.data.embedded_text import EmbeddedText, Float32Array, RaggedEmbedding, check_texts, pad
from attsvm.data.files import well_formed
from attsvm.data.hub import (
    DTYPES,
    check_options,
    locate,
    no_transformers,
    quiet_transformers,
    reason_of,
    reserved_positions,
)
from attsvm.data.model_files import check_model_folder, model_identity
from attsvm.errors import InvalidInputError, UnsupportedError

__all__ = ["CHUNK_SIZE", "embed_text"]

CHUNK_SIZE = 256
"""Texts per cache entry; an interrupted run loses at most this many."""

_NO_LIMIT = 512  # tokens, for models that state no limit of their own
_WHERE = "embed_text"


def embed_text(
    texts: Sequence[str],
    *,
    model: str | Path | None = None,
    layer: int = -1,
    batch_size: int = 32,
    device: str = "cpu",
    max_tokens: int | None = None,
    dtype: str = "float32",
    cache_dir: Path | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EmbeddedText:
    """Run texts through a pretrained encoder and keep the token vectors of one layer.

    Parameters
    ----------
    texts
        n texts. An empty one becomes a sequence without an allowed token.
    model
        The folder of a Hugging Face model (then nothing goes over the network), the id of one on the Hub (which
        HF_HUB_OFFLINE=1 restricts to those already downloaded), or None for :func:`default_model_path`. Of an
        encoder-decoder the encoder is used.
    layer
        Index into the hidden states: 0 = input embeddings, k = output of layer k, negative from the end.
    batch_size
        Texts per forward pass. Memory grows with it; the result does not depend on it beyond rounding (1e-5).
    device
        Where the model runs: ``cpu``, ``cuda``, ``cuda:1``, ...
    max_tokens
        Longer texts are cut to this many tokens, special ones included. By default what the model takes.
    dtype
        Type in which the model runs: ``float32``, ``float64``, ``bfloat16`` or ``float16``. The vectors are float32.
    cache_dir
        Folder of the cache; by default :func:`attsvm.data.default_cache_dir`.
    progress
        Called with (texts done, n) as they are done.

    Returns
    -------
    EmbeddedText
        In the order of ``texts``.

    Raises
    ------
    InvalidInputError
        If an argument is out of its range, or the model is not there or not a text model.
    UnsupportedError
        If transformers is not installed, the model has pickled weights only, no fast tokenizer or code of its own, or
        a batch does not fit into memory.

    Notes
    -----
    Finished texts are cached, 256 at a time, under the content of the texts and of the model's files, so that an
    interrupted call goes on where it stopped and a repeated one does not load the model.
    """
    check_texts(texts, _WHERE)
    check_options(batch_size=batch_size, device=device, dtype=dtype, where=_WHERE)
    texts = [well_formed(text) for text in texts]
    folder, model_name = locate(model, where=_WHERE)
    check_model_folder(folder, where=_WHERE)
    cache = EmbeddingCache(cache_dir)
    recipe = {
        "model": model_identity(folder, cache),
        "transformers": _version("transformers"),
        "layer": layer,
        "max_tokens": max_tokens,
        "dtype": dtype,
    }
    encoder: _Encoder | None = None
    parts: list[RaggedEmbedding] = []
    for start in range(0, len(texts), CHUNK_SIZE):
        chunk = texts[start : start + CHUNK_SIZE]
        key = cache.key(recipe, chunk)
        part = cache.load(key)
        if part is None:
            encoder = encoder or _Encoder(folder, layer, max_tokens, torch.device(device), DTYPES[dtype])
            part = encoder.encode(chunk, batch_size, partial(_report_from, progress, start, len(texts)))
            cache.store(key, part)
        else:
            _report_from(progress, start, len(texts), len(chunk))
        parts.append(part)
    return pad(texts, parts, model_name=model_name, layer=layer)


def _report_from(progress: Callable[[int, int], None] | None, start: int, total: int, done: int) -> None:
    if progress is not None:
        progress(start + done, total)


class _Encoder:
    """A loaded model with its tokenizer. Shapes: b texts of a batch, T tokens, d sizes."""

    def __init__(
        self, folder: Path, layer: int, max_tokens: int | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.layer = layer
        self.device = device
        with quiet_transformers(_WHERE), torch.random.fork_rng(devices=[]):
            self.tokenizer = _load_tokenizer(folder)
            self.model = _load_model(folder, dtype).to(device)
        self.max_tokens = self._limit(max_tokens)

    def encode(self, texts: Sequence[str], batch_size: int, advance: Callable[[int], None]) -> RaggedEmbedding:
        """Embed texts, the longest first, in batches of similar length."""
        with quiet_transformers(_WHERE):
            encodings = self.tokenizer(
                list(texts), truncation=True, max_length=self.max_tokens, split_special_tokens=True
            ).encodings
        lengths = np.array([len(encoding.ids) for encoding in encodings], dtype=np.int64)
        order = [int(index) for index in np.argsort(-lengths, kind="stable") if lengths[index]]
        vectors: dict[int, Float32Array] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            vectors.update(zip(batch, self._forward([encodings[index].ids for index in batch]), strict=True))
            advance(len(vectors))
        if len(order) < len(texts):
            advance(len(texts))
        # With no token at all in the whole chunk the width is unknown; ask the model for one token.
        empty = np.zeros((0, self._width(vectors)), dtype=np.float32)
        spans = [span for encoding in encodings for span in encoding.offsets]
        return RaggedEmbedding(
            lengths=lengths,
            vectors=np.concatenate([empty, *(vectors[index] for index in sorted(vectors))]),
            special=np.array([mark for item in encodings for mark in item.special_tokens_mask], dtype=np.bool_),
            spans=np.array(spans, dtype=np.int64).reshape(-1, 2),
            truncated=np.array([bool(encoding.overflowing) for encoding in encodings], dtype=np.bool_),
            pieces=tuple(piece for encoding in encodings for piece in encoding.tokens),
        )

    def _forward(self, ids: Sequence[Sequence[int]]) -> list[Float32Array]:
        """Vectors (T_i, d) of each text of a batch, padded at the end."""
        longest = max(len(row) for row in ids)
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        input_ids = torch.tensor([[*row, *([padding] * (longest - len(row)))] for row in ids], device=self.device)
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        attention_mask = (torch.arange(longest, device=self.device) < lengths[:, None]).long()
        try:
            with torch.inference_mode(), quiet_transformers(_WHERE):
                output = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        except torch.OutOfMemoryError as error:
            raise UnsupportedError(
                f"{_WHERE}: a batch must fit into memory, got {len(ids)} texts of {longest} tokens. "
                "Hint: lower batch_size or max_tokens."
            ) from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UnsupportedError(f"{_WHERE}: model must be a text encoder, got one that fails ({error}).") from error
        hidden = self._pick(getattr(output, "hidden_states", None)).float().cpu().numpy()
        if not np.isfinite(hidden[attention_mask.bool().cpu().numpy()]).all():
            raise UnsupportedError(
                f"{_WHERE}: the model must give finite vectors, got NaN or infinity. Hint: use dtype='float32'."
            )
        return [np.array(row[: len(one)]) for row, one in zip(hidden, ids, strict=True)]

    def _pick(self, states: Sequence[torch.Tensor] | None) -> torch.Tensor:
        if not states:
            raise UnsupportedError(f"{_WHERE}: model must return its hidden states, got none.")
        n_layers = len(states) - 1
        if not -n_layers - 1 <= self.layer <= n_layers:
            raise InvalidInputError(
                f"{_WHERE}: layer must be in [{-n_layers - 1}, {n_layers}], got {self.layer}. "
                f"Hint: the model has {n_layers} layers; 0 stands for its input embeddings."
            )
        return states[self.layer]

    def _width(self, vectors: dict[int, Float32Array]) -> int:
        one = next(iter(vectors.values())) if vectors else self._forward([[0]])[0]
        return int(one.shape[1])

    def _limit(self, asked: int | None) -> int:
        """Tokens per text: what was asked for, but no more than the model takes."""
        least = self.tokenizer.num_special_tokens_to_add(pair=False) + 1
        if asked is not None and asked < least:
            raise InvalidInputError(
                f"{_WHERE}: max_tokens must be at least {least} for this model, got {asked}. "
                f"Hint: {least - 1} of them are special tokens."
            )
        limits = [int(self.tokenizer.model_max_length)]
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            limits.append(positions - reserved_positions(self.model))
        taken = min(limits)
        if taken > 10**9:  # how tokenizers write "no limit"
            return asked or _NO_LIMIT
        return min(taken, asked or taken)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _load_tokenizer(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise no_transformers(_WHERE) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise InvalidInputError(f"{_WHERE}: model must have a tokenizer, got {folder} ({reason_of(error)}).") from error
    if not tokenizer.is_fast:
        raise UnsupportedError(
            f"{_WHERE}: model must have a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}. "
            "Hint: only those tell where in the text a token stands."
        )
    return tokenizer


def _load_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModel

    try:
        model, loading = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a damaged file or a foreign architecture makes transformers raise
        raise InvalidInputError(
            f"{_WHERE}: model must be a text model that transformers loads, got {folder} ({reason_of(error)})."
        ) from error
    # A pooler stands behind the hidden states; many checkpoints leave it out.
    missing = sorted(name for name in loading["missing_keys"] if "pooler" not in name)
    if missing:
        raise InvalidInputError(
            f"{_WHERE}: model must have all its weights, got {folder} without {len(missing)}, such as {missing[0]}."
        )
    if model.main_input_name != "input_ids":
        raise UnsupportedError(f"{_WHERE}: model must be a text encoder, got {type(model).__name__}.")
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    module: nn.Module = model.eval()
    return module

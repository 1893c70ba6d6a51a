"""Passes of a model while it generates: prompts of one length, the cache, and tokens guessed ahead."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from attsvm.attention.cache import KeyValueCache
from attsvm.errors import InvalidInputError
from attsvm.models.checks import is_whole
from attsvm.models.decoder import Decoder
from attsvm.models.inputs import check_attention_mask
from attsvm.models.lookup import Lookup
from attsvm.models.output import ModelOutput
from attsvm.models.seq2seq import Seq2Seq

__all__ = ["Stepper", "left_padded"]

ROOM = 4096
"""New positions that the cache makes room for at once; it grows when more come."""


class Stepper:
    """The model as one function: from the tokens so far to the logits of the next one.

    Parameters
    ----------
    model
        In evaluation mode.
    prompts, mask
        From :func:`left_padded`.
    count
        New tokens, at most.
    eos_ids
        Tokens that end a sequence; None for those of the model.
    use_cache
        Whether to keep keys and values.
    weights
        Whether to keep the patterns of each pass.
    lookup
        Tokens to guess at once, at most (:mod:`attsvm.models.lookup`); of no effect for several prompts, without the
        cache and with weights, which are then those of single tokens.
    """

    def __init__(
        self,
        model: Decoder | Seq2Seq,
        prompts: Tensor,
        mask: Tensor,
        *,
        count: int,
        eos_ids: tuple[int, ...] | None,
        use_cache: bool,
        weights: bool,
        lookup: int,
    ) -> None:
        self.model, self.wants_weights = model, weights
        self.eos = _end_ids(model, eos_ids)
        self.patterns: list[dict[str, list[Tensor]]] = []
        guesses = bool(lookup) and len(prompts) == 1 and use_cache and not weights
        # A source text is looked up too: answers quote it.
        text = prompts[0].tolist() if guesses else []
        self.encoded: Tensor | None = None
        self.source_mask = None if bool(mask.all()) else mask
        if isinstance(model, Seq2Seq):
            self.encoded = model.encode(prompts, self.source_mask)
            prompts = torch.full((len(prompts), 1), _start_id(model), device=prompts.device)
            mask = torch.ones_like(prompts, dtype=torch.bool)
            self.limit = count if model.config.n_ctx is None else min(count, model.config.n_ctx)
            self.cache: Any = model.new_cache(min(self.limit, ROOM)) if use_cache else None
        else:
            room = model.config.n_ctx - prompts.shape[1]
            if room < 0:
                raise InvalidInputError(
                    f"generate: ids must fit into the context of {model.config.n_ctx} positions, "
                    f"got a prompt of {prompts.shape[1]}."
                )
            self.limit = min(count, room + 1)
            self.cache = KeyValueCache(prompts.shape[1] + min(self.limit, ROOM)) if use_cache else None
        self.all, self.mask = prompts, mask
        self.prompt_length = prompts.shape[1]
        self._new = prompts
        self._lookup = Lookup(text, lookup) if guesses else None
        self._guessed: list[int] = []
        self._ahead: list[Tensor] = []

    @property
    def new_tokens(self) -> Tensor:
        """Tokens (B, so far) behind the prompt."""
        return self.all[:, self.prompt_length :]

    def logits(self) -> Tensor:
        """Logits (B, d_vocab) of the next token, in float32 at least."""
        if self._ahead:
            return self._ahead.pop(0)
        if self._lookup is None:
            return self._pass(self.all if self.cache is None else self._new, 1)[:, -1]
        held, known = self.cache.length, self.all.shape[1]
        if held >= known:  # wrong guesses
            self.cache.truncate(known - 1, keep_room=True)
        self._guessed = self._lookup.guess(self.prompt_length + self.limit - known - 1)
        guessed = torch.tensor([self._guessed], dtype=self.all.dtype, device=self.all.device)
        found = self._pass(torch.cat([self._new, guessed], 1), len(self._guessed) + 1)
        first, *self._ahead = found.unbind(1)
        return first

    def _pass(self, ids: Tensor, last: int) -> Tensor:
        """Logits (B, last, d_vocab) after the last of new tokens (B, T)."""
        # Inference mode spares some work per operation, but what comes of it can have no gradient ever after.
        with contextlib.nullcontext() if self.wants_weights else torch.inference_mode():
            out = self._output(ids, last)
        if self.wants_weights:
            self.patterns.append(out.weights or {})
        if out.logits is None:
            raise InvalidInputError("generate: model must have a head, got a model without one.")
        return out.logits if out.logits.dtype == torch.float64 else out.logits.float()

    def _output(self, ids: Tensor, last: int) -> ModelOutput:
        # Without a cache what was generated goes in again, and may look like padding that nobody has masked.
        tells = not bool(self.mask.all()) or (self.cache is None and self.all.shape[1] > self.prompt_length)
        output: ModelOutput
        if isinstance(self.model, Seq2Seq):
            output = self.model(
                None,
                ids,
                attention_mask=self.source_mask,
                encoded=self.encoded,
                cache=self.cache,
                weights=self.wants_weights,
                last_logits=last,
            )
        else:
            output = self.model(
                ids,
                attention_mask=self.mask if tells else None,
                cache=self.cache,
                weights=self.wants_weights,
                last_logits=last,
            )
        return output

    def append(self, tokens: Tensor) -> None:
        """Take tokens (B,) as the next ones."""
        self._new = tokens.unsqueeze(-1)
        self.all = torch.cat([self.all, self._new], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(self._new, dtype=torch.bool)], 1)
        if self._lookup is not None:
            token = int(tokens[0])
            self._lookup.append(token)
            if self._guessed[:1] == [token]:
                del self._guessed[0]
            else:
                self._guessed, self._ahead = [], []

    def reorder(self, index: Tensor) -> None:
        """Go on with rows ``index``, some of them several times."""
        self.all, self.mask, self._new = self.all[index], self.mask[index], self._new[index]
        if self.source_mask is not None:
            self.source_mask = self.source_mask[index]
        if self.encoded is not None:
            self.encoded = self.encoded[index]
        if self.cache is not None:
            self.cache.reorder(index)


def left_padded(
    ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None,
    *,
    device: torch.device,
    pad_id: int | None = None,
    eos_id: int | tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Prompts (B, T) that end at the right edge, and where they are real.

    Parameters
    ----------
    ids, attention_mask
        As in :func:`attsvm.models.generation.generate`.
    device
        Of what is returned.
    pad_id, eos_id
        Of the model, to find a mask of the inverse meaning (:func:`attsvm.models.inputs.check_attention_mask`).

    Raises
    ------
    InvalidInputError
        If there is a prompt without a token, or something other than prompts.
    """
    if isinstance(ids, Tensor):
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InvalidInputError(
                f"generate: ids must be integers (B, T), or lists of tokens, got {ids.dtype} of shape "
                f"{tuple(ids.shape)}."
            )
        real = None
        if attention_mask is not None:
            real = check_attention_mask("generate", attention_mask, ids, pad_id=pad_id, eos_id=eos_id)
        rows = ids.tolist() if real is None else [row[keep].tolist() for row, keep in zip(ids, real.to(ids.device))]
    else:
        if attention_mask is not None:
            raise InvalidInputError("generate: attention_mask must be None where ids are lists, which have no padding.")
        rows = _rows(ids)
    if not rows or not all(rows):
        empty = next((k for k, row in enumerate(rows) if not row), 0)
        raise InvalidInputError(f"generate: ids must hold prompts of at least one token, got none in prompt {empty}.")
    longest = max(map(len, rows))
    padded = torch.tensor([[row[0]] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=device)
    return padded, mask


def _rows(ids: Any) -> list[list[int]]:
    """Prompts that are no tensor: lists of lists of integers, or what behaves like them."""
    if not isinstance(ids, Iterable) or isinstance(ids, (str, bytes)):
        raise InvalidInputError(
            f"generate: ids must be integers (B, T) or lists of tokens, got {type(ids).__name__}. "
            "Hint: the tokenizer of the model makes tokens of texts."
        )
    rows = []
    for place, row in enumerate(ids):
        if not isinstance(row, Iterable) or isinstance(row, (str, bytes)):
            raise InvalidInputError(
                f"generate: ids must hold a list of tokens for each prompt, got {row!r} in place {place}. "
                "Hint: the tokenizer of the model makes tokens of texts."
            )
        rows.append([_token(one, place) for one in row])
    return rows


def _token(value: Any, place: int) -> int:
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            token = operator.index(value)  # of NumPy and torch too
            if is_whole(token):
                return token
    raise InvalidInputError(f"generate: ids must hold integers of the vocabulary, got {value!r} in prompt {place}.")


def _end_ids(model: Decoder | Seq2Seq, eos_ids: tuple[int, ...] | None) -> tuple[int, ...]:
    own = model.config.eos_id if eos_ids is None else eos_ids
    return () if own is None else (own,) if isinstance(own, int) else tuple(own)


def _start_id(model: Seq2Seq) -> int:
    start = model.config.start_id
    if start is None:
        raise InvalidInputError(
            "generate: model must have a start_id in its config for the first target token, got None."
        )
    return int(start)

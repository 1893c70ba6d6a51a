"""What a model may be given: ids of its vocabulary, no more than its context, a mask that means what it must."""

from __future__ import annotations

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError

__all__ = ["check_attention_mask", "check_ids", "last_of", "positions_of"]


def check_ids(where: str, ids: Tensor, *, d_vocab: int, n_ctx: int | None, past: int = 0, name: str = "ids") -> None:
    """Make sure that ids (B, T) are of a vocabulary and end within the context.

    Raises
    ------
    InvalidInputError
        If not; says the first offender.
    """
    if not isinstance(ids, Tensor):
        raise InvalidInputError(f"{where}: {name} must be a tensor of integers (B, T), got {type(ids).__name__}.")
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InvalidInputError(
            f"{where}: {name} must be integers (B, T), got {ids.dtype} of shape {tuple(ids.shape)}."
        )
    if not ids.numel():
        raise InvalidInputError(f"{where}: {name} must hold at least one token, got the shape {tuple(ids.shape)}.")
    if n_ctx is not None and past + ids.shape[1] > n_ctx:
        cached = f" after {past} in the cache" if past else ""
        raise InvalidInputError(
            f"{where}: {name} must fit into the context of {n_ctx} positions, got {ids.shape[1]}{cached}."
        )
    if torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= d_vocab:
        raise InvalidInputError(
            f"{where}: {name} must be in [0, {d_vocab}), the vocabulary, got {low if low < 0 else high}. "
            "Hint: is the tokenizer the one of this model?"
        )


def check_attention_mask(
    where: str,
    attention_mask: Tensor | None,
    ids: Tensor,
    *,
    past: int = 0,
    pad_id: int | None = None,
    eos_id: int | tuple[int, ...] | None = None,
) -> Tensor | None:
    """Return the mask (B, past + T) as booleans, True = real token; None where every token is real.

    Parameters
    ----------
    where
        Name of the caller, for messages.
    attention_mask
        Booleans, or numbers 0 and 1; None where every token is real.
    ids
        (B, T), the tokens after the ``past`` ones that are in the cache.
    past
        Positions in the cache.
    pad_id
        Id of the padding, where the model has one that means nothing else. With it a mask of the inverse meaning, and
        padding without a mask, are found out.
    eos_id
        Ids of the end, with which models that have no such ``pad_id`` are padded. With them a mask of the inverse
        meaning is found out.

    Raises
    ------
    InvalidInputError
        If the shape or the meaning is wrong.
    """
    # What is generated may be any token, padding too, so only the first tokens tell of what is meant.
    telling = past == 0 and not torch.compiler.is_compiling()
    if attention_mask is None:
        if telling and pad_id is not None and _differ_in_padding(ids == pad_id):
            raise InvalidInputError(
                f"{where}: attention_mask must be given for sequences of unequal lengths, got None with "
                f"ids padded by {pad_id}. Hint: attention_mask=ids != {pad_id}."
            )
        return None
    mask = _as_booleans(where, attention_mask, (ids.shape[0], past + ids.shape[1]), past)
    if telling:
        _check_meaning(where, mask, ids, eos_id if pad_id is None else pad_id)
    # Without a mask attention has faster ways, and all sequences share their positions.
    return None if not torch.compiler.is_compiling() and mask.all() else mask


def _as_booleans(where: str, attention_mask: Tensor, shape: tuple[int, int], past: int) -> Tensor:
    if not isinstance(attention_mask, Tensor):
        raise InvalidInputError(f"{where}: attention_mask must be a tensor, got {type(attention_mask).__name__}.")
    if tuple(attention_mask.shape) != shape:
        raise InvalidInputError(
            f"{where}: attention_mask must be (B, T) = {shape}"
            f"{', the positions in the cache included' if past else ''}, got {tuple(attention_mask.shape)}."
        )
    mask = attention_mask.bool()
    if attention_mask.dtype != torch.bool and not torch.compiler.is_compiling() and not (attention_mask == mask).all():
        raise InvalidInputError(f"{where}: attention_mask must hold 0 and 1 (1 = real token), got other numbers.")
    return mask


def _check_meaning(where: str, mask: Tensor, ids: Tensor, pad_id: int | tuple[int, ...] | None) -> None:
    """Refuse a mask that is True exactly on padding (nowhere, if there is none)."""
    if pad_id is None:
        return
    padding = torch.isin(ids, torch.tensor(pad_id, device=ids.device))
    if not torch.equal(mask, padding) or bool(padding.all()):
        return
    got = f"True exactly on the padding (id {pad_id})" if padding.any() else "False everywhere"
    raise InvalidInputError(
        f"{where}: attention_mask must be True on real tokens, got {got}. Hint: pass ~attention_mask."
    )


def last_of(where: str, hidden: Tensor, last_logits: int | None) -> Tensor:
    """The last hidden states (B, last_logits, d_model), of which logits are wanted; all for None.

    Raises
    ------
    InvalidInputError
        If it is no integer of at least 1.
    """
    if last_logits is None:
        return hidden
    if not isinstance(last_logits, int) or last_logits < 1:
        raise InvalidInputError(f"{where}: last_logits must be an integer of at least 1 or None, got {last_logits!r}.")
    return hidden[:, -last_logits:]


def positions_of(mask: Tensor | None, *, length: int, past: int, device: torch.device) -> Tensor:
    """Positions (1, T), or (B, T) with a mask, of the last ``length`` tokens: how many real tokens come before each.

    Examples
    --------
    >>> positions_of(torch.tensor([[False, False, True, True]]), length=4, past=0, device=torch.device("cpu"))
    tensor([[0, 0, 0, 1]])
    """
    if mask is None:
        return torch.arange(past, past + length, device=device)[None]
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _differ_in_padding(padding: Tensor) -> bool:
    """Whether rows begin, or end, with different numbers of padding tokens."""
    if not bool(padding[:, [0, -1]].any()):
        return False
    counts = torch.stack([side.long().cumprod(-1).sum(-1) for side in (padding, padding.flip(-1))])
    return bool((counts != counts[:, :1]).any())

"""Attention weights that somebody already has, as calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError
from attsvm.microscope.calls import AttentionCall, Kind, ModuleInfo, Side

__all__ = ["calls_from_attentions"]

_WHERE = "from_attentions"
_KINDS: tuple[Kind, ...] = ("encoder", "decoder", "cross")
_FIX = "Hint: model.set_attn_implementation('eager'), then model(..., output_attentions=True).attentions."
_SLACK = 1e-2  # of a sum of weights, in 16 bits


def calls_from_attentions(attentions: Any, *, kinds: Kind | Sequence[Kind] | None = None) -> list[AttentionCall]:
    """Calls of which only the weights are known.

    Parameters
    ----------
    attentions
        Weights after softmax, as tensors or arrays: a sequence of layers (B, H, Tq, Tk), as ``outputs.attentions``;
        the attentions of ``generate()``, a sequence of such sequences, whose steps are stitched into one matrix; one
        array (L, H, T, T) or (L, B, H, Tq, Tk); or a mapping of kinds to any of these.
    kinds
        ``"encoder"``, ``"decoder"`` or ``"cross"``, of all layers or of each. By default what the shapes and the
        zeros above the diagonal say.

    Returns
    -------
    list of AttentionCall
        One per layer, with ``given`` set.

    Raises
    ------
    InvalidInputError
        If there are no weights, or they are not weights; the message says how to get them.
    """
    if isinstance(attentions, Mapping):
        strange = [kind for kind in attentions if kind not in _KINDS]
        if strange:
            raise InvalidInputError(f"{_WHERE}: kinds must be among {', '.join(_KINDS)}, got {strange[0]!r}.")
        pairs = [(layer, kind) for kind, part in attentions.items() for layer in _layers(part)]
        layers = [layer for layer, _ in pairs]
        named: Sequence[Kind | None] = [kind for _, kind in pairs]
    else:
        layers = _layers(attentions)
        named = _named(kinds, len(layers))
    for index, layer in enumerate(layers):
        _check(layer, index)
    return _calls(layers, [kind or _kind(layer) for layer, kind in zip(layers, named, strict=True)])


def _layers(attentions: Any) -> list[Tensor]:
    """The layers (B, H, Tq, Tk) of any of the accepted forms."""
    if hasattr(attentions, "shape"):
        whole = torch.as_tensor(attentions)
        if whole.ndim not in (4, 5):
            raise InvalidInputError(
                f"{_WHERE}: one array must be (L, H, T, T) or (L, B, H, Tq, Tk), got shape {tuple(whole.shape)}."
            )
        return [layer[None] if whole.ndim == 4 else layer for layer in whole]
    if not isinstance(attentions, Sequence) or isinstance(attentions, str):
        raise InvalidInputError(
            f"{_WHERE}: attentions must be a sequence of layers or an array, got {type(attentions).__name__}. {_FIX}"
        )
    if not attentions or any(part is None for part in attentions):
        got = "an empty sequence" if not attentions else "None in place of a layer"
        raise InvalidInputError(
            f"{_WHERE}: attentions must hold the weights of at least one layer, got {got}: models that compute "
            f"attention by sdpa or flash kernels return none. {_FIX}"
        )
    if all(isinstance(part, Sequence) for part in attentions):
        return _stitched([_layers(step) for step in attentions])
    for index, part in enumerate(attentions):
        if not hasattr(part, "shape"):
            raise InvalidInputError(f"{_WHERE}: layer {index} must be a tensor or an array, got {type(part).__name__}.")
    return [torch.as_tensor(part) for part in attentions]


def _stitched(steps: list[list[Tensor]]) -> list[Tensor]:
    """The layers of ``generate()``: each step has the rows of its new tokens, over the keys so far."""
    if len({len(step) for step in steps}) != 1:
        raise InvalidInputError(f"{_WHERE}: all steps must have the same number of layers, got {[*map(len, steps)]}.")
    layers = []
    for rows in zip(*steps, strict=True):
        widest = max(row.shape[-1] for row in rows)
        if len({row.shape[:2] for row in rows}) != 1 or any(row.ndim != 4 for row in rows):
            raise InvalidInputError(
                f"{_WHERE}: all steps of a layer must be (B, H, Tq, Tk) with the same B and H, got "
                f"{tuple(rows[0].shape)} and {tuple(rows[-1].shape)}."
            )
        layers.append(torch.cat([torch.nn.functional.pad(row, (0, widest - row.shape[-1])) for row in rows], dim=2))
    return layers


def _named(kinds: Kind | Sequence[Kind] | None, n_layers: int) -> Sequence[Kind | None]:
    if kinds is None:
        return [None] * n_layers
    each: Sequence[Kind] = [kinds] * n_layers if isinstance(kinds, str) else list(kinds)
    if len(each) != n_layers or any(kind not in _KINDS for kind in each):
        raise InvalidInputError(
            f"{_WHERE}: kinds must be one of {', '.join(_KINDS)}, or one for each of the {n_layers} layers, "
            f"got {kinds!r}."
        )
    return each


def _check(layer: Tensor, index: int) -> None:
    """Weights are finite, not negative and sum to at most one."""
    must = f"{_WHERE}: layer {index} must"
    if layer.ndim != 4 or 0 in layer.shape:
        raise InvalidInputError(f"{must} be (B, H, Tq, Tk) with nothing empty, got shape {tuple(layer.shape)}.")
    if not layer.is_floating_point():
        raise InvalidInputError(f"{must} hold floating-point weights, got {layer.dtype}.")
    if not bool(torch.isfinite(layer).all()):
        raise InvalidInputError(f"{must} be finite, got {int((~torch.isfinite(layer)).sum())} entries that are not.")
    largest = float(layer.detach().float().sum(-1).max())
    if float(layer.detach().min()) < 0 or largest > 1 + _SLACK:
        raise InvalidInputError(
            f"{must} hold weights after softmax, which are at least 0 and sum to at most 1 over the keys, got a "
            f"smallest of {float(layer.detach().min()):.3g} and a largest sum of {largest:.3g}."
        )


def _kind(layer: Tensor) -> Kind:
    """What the shape says; of square ones, whether anything is above the diagonal."""
    if layer.shape[-1] != layer.shape[-2]:
        return "cross"
    return "encoder" if layer.shape[-1] == 1 or bool(layer.triu(1).any()) else "decoder"


def _calls(layers: list[Tensor], kinds: list[Kind]) -> list[AttentionCall]:
    counts: Counter[Kind] = Counter()
    calls = []
    for layer, kind in zip(layers, kinds, strict=True):
        side: Side = "target" if kind != "encoder" and "cross" in kinds else "source"
        info = ModuleInfo(
            name=f"{kind}.{counts[kind]}",
            kind=kind,
            layer=counts[kind],
            n_heads=layer.shape[1],
            n_kv_heads=layer.shape[1],
            d_head=0,
            query_side=side,
            key_side="source" if kind == "cross" else side,
            tier="given",
            prefixed=len(set(kinds)) > 1,
        )
        counts[kind] += 1
        empty = layer.new_zeros(layer.shape[0], layer.shape[1], 0, 0)
        calls.append(AttentionCall(info=info, q=empty, k=empty, given=layer.detach()))
    return calls

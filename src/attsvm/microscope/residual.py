"""Heads as matrices on the hidden states: logits x^T W z with W = scale W_K W_Q^T, where a model has such matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attsvm.microscope.calls import AttentionCall, ModuleInfo
from attsvm.microscope.capture import attention_modules, overheard, working_inputs
from attsvm.microscope.hooks import hook_modules
from attsvm.microscope.interface import interface_modules
from attsvm.microscope.listening import evaluating

__all__ = ["ResidualHead", "check_residual", "residual_heads"]

_ENOUGH = 64  # tokens to compare
_TOLERANCE = 1e-3  # relative, between numbers that are equal but for rounding or have nothing to do with each other


@dataclass(frozen=True, kw_only=True)
class ResidualHead:
    r"""One head on hidden states that have a constant 1 appended, which carries the biases.

    Attributes
    ----------
    W_K
        (d_key + 1, d_head) float64: keys are ``inputs @ W_K``.
    W_Q
        (d_query + 1, d_head) float64: queries are ``inputs @ W_Q``.
    scale
        Factor of the products.
    """

    W_K: Tensor
    W_Q: Tensor
    scale: float

    @property
    def W(self) -> Tensor:  # noqa: N802
        """(d_key + 1, d_query + 1): the product of keys and queries is ``key_input @ W @ query_input``."""
        return self.scale * self.W_K @ self.W_Q.T


def residual_heads(model: nn.Module, info: ModuleInfo) -> list[ResidualHead] | str:
    """The matrices of all heads of a module, or why there are none.

    The projections are found by their numbers: the module is run on a few tokens, and columns of what its linear parts
    put out are compared with the queries and keys that it attends with.

    Parameters
    ----------
    model
        The model.
    info
        One of its :func:`~attsvm.microscope.capture.attention_modules`.

    Returns
    -------
    list of ResidualHead, or str
        One per query head; a clause where logits are not of this form, as with rotary positions.
    """
    found = _projections(model)[info.name]
    if isinstance(found, str):
        return found
    return _heads(model, info, found)


def check_residual(call: AttentionCall, heads: list[ResidualHead]) -> float:
    """Largest difference between the products of a call and those that the matrices give.

    Parameters
    ----------
    call
        A call with its inputs: ``captured(..., inputs_too=True)``.
    heads
        The matrices of its module.

    Returns
    -------
    float
        In logits, before offsets, cap and mask; infinite if the call has no inputs.
    """
    if call.query_input is None or call.key_input is None:
        return float("inf")
    queries, keys = _with_one(call.query_input), _with_one(call.key_input)
    group = call.info.n_heads // call.info.n_kv_heads
    largest = 0.0
    for index, head in enumerate(heads):
        ours = head.scale * (queries @ head.W_Q) @ (keys @ head.W_K).transpose(-1, -2)
        theirs = call.scale * call.q[:, index].double() @ call.k[:, index // group].double().transpose(-1, -2)
        largest = max(largest, float((ours - theirs).abs().max()))
    return largest


def _with_one(hidden: Tensor) -> Tensor:
    return torch.nn.functional.pad(hidden.double(), (0, 1), value=1.0)


def _heads(model: nn.Module, info: ModuleInfo, found: tuple[_Projection, _Projection]) -> list[ResidualHead]:
    query, key = found
    group = info.n_heads // info.n_kv_heads
    W_Q = [query.columns_of(model, head) for head in range(info.n_heads)]
    W_K = [key.columns_of(model, head) for head in range(info.n_kv_heads)]
    return [ResidualHead(W_K=W_K[head // group], W_Q=W_Q[head], scale=query.scale) for head in range(info.n_heads)]


# -------------------------------------------------------------------------------------------- finding the projections


@dataclass(frozen=True)
class _Projection:
    """Where the queries (or keys) of each head come from: columns of the output of a linear module, times a factor."""

    module: str
    starts: tuple[int, ...]
    width: int
    factor: float
    scale: float  # of the products

    def columns_of(self, model: nn.Module, head: int) -> Tensor:
        """(d_in + 1, d_head) float64: weights, and biases as the last row."""
        weight, bias = _weights(model.get_submodule(self.module))
        columns = slice(self.starts[head], self.starts[head] + self.width)
        return torch.cat([weight[:, columns], bias[None, columns]]).detach().double() * self.factor


_Found = tuple[_Projection, _Projection] | str
_KNOWN: WeakKeyDictionary[nn.Module, tuple[list[ModuleInfo], dict[str, _Found]]] = WeakKeyDictionary()


def _projections(model: nn.Module) -> dict[str, _Found]:
    """The projections of all modules of a model, or why they have none; found once."""
    infos = attention_modules(model)
    known = _KNOWN.get(model)
    if known is None or known[0] != infos:
        known = infos, _find_all(model)
        _KNOWN[model] = known
    return known[1]


def _find_all(model: nn.Module) -> dict[str, _Found]:
    parts: dict[str, list[tuple[str, Tensor, Tensor]]] = {}  # of the run in progress: name, input, output
    found: dict[str, _Found] = {}

    def heard(name: str, call: AttentionCall) -> None:
        owner = name.partition("@")[0]
        call = _first_tokens(call)
        match = _find(call, parts.pop(owner, []), model.get_submodule(owner))
        found[name] = match if isinstance(match, str) else _verified(model, call, match)

    def note(owner: str, part: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        given, result = args[0].detach()[:, :_ENOUGH], output.detach()[:, :_ENOUGH]
        parts.setdefault(owner, []).append((part, given, result))

    handles = []
    try:
        for owner, module in [*interface_modules(model), *hook_modules(model)]:
            for part, child in _linear_parts(owner, module):
                handles.append(child.register_forward_hook(partial(note, owner, part)))
        with torch.no_grad(), evaluating(model), overheard(model, heard, inputs_too=True):
            model(**working_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _first_tokens(call: AttentionCall) -> AttentionCall:
    """Queries, keys and inputs of the first tokens."""
    inputs = (None if hidden is None else hidden[:, :_ENOUGH] for hidden in (call.query_input, call.key_input))
    query_input, key_input = inputs
    q, k = call.q[:, :, :_ENOUGH], call.k[:, :, :_ENOUGH]
    return replace(call, q=q, k=k, mask=None, offsets=None, query_input=query_input, key_input=key_input)


def _verified(model: nn.Module, call: AttentionCall, found: tuple[_Projection, _Projection]) -> _Found:
    """What was found, if the weights of the projections give the products of this call."""
    largest = float((call.scale * call.q.norm(dim=-1).max() * call.k.norm(dim=-1).max()).abs())
    rounding = _TOLERANCE + 4 * torch.finfo(call.q.dtype).eps
    # Written so that NaN fails, too.
    if check_residual(call, _heads(model, call.info, found)) <= rounding * largest:
        return found
    return "what the linear parts of the module put out is not what their weights give"


def _linear_parts(owner: str, module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return ((f"{owner}.{name}", child) for name, child in module.named_modules() if _is_linear(child))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or any(base.__name__ == "Conv1D" for base in type(module).__mro__)


def _weights(module: Any) -> tuple[Tensor, Tensor]:
    """Weights (d_in, d_out) and biases of a linear module."""
    weight: Tensor = module.weight.T if isinstance(module, nn.Linear) else module.weight
    bias = getattr(module, "bias", None)
    return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias


def _find(call: AttentionCall, parts: list[tuple[str, Tensor, Tensor]], module: nn.Module) -> _Found:
    sides = (call.q, call.query_input, "queries"), (call.k, call.key_input, "keys")
    projections = []
    for states, hidden, what in sides:
        if hidden is None:
            return f"what the {what} are computed from is not known"
        match = _match_any(states, hidden, parts, _blocks)
        if match is None:
            return _why_none(states, hidden, parts, module, what)
        projections.append(_Projection(match[0], match[1], call.info.d_head, match[2], call.scale))
    return projections[0], projections[1]


_Matcher = Callable[[Tensor, Tensor], tuple[tuple[int, ...], float] | None]


def _match_any(
    states: Tensor, hidden: Tensor, parts: list[tuple[str, Tensor, Tensor]], matcher: _Matcher
) -> tuple[str, tuple[int, ...], float] | None:
    """The linear part that was given these hidden states and put out these queries or keys."""
    for name, given, output in parts:
        if given.shape != hidden.shape or output.ndim != 3 or not torch.equal(given, hidden):
            continue
        match = matcher(output[0].double(), states[0].double())
        if match is not None:
            return name, *match
    return None


def _blocks(output: Tensor, states: Tensor) -> tuple[tuple[int, ...], float] | None:
    """First columns of the blocks of an output (T, n) that are the states (H, T, d) of each head, and the factor."""
    width = states.shape[-1]
    squares = (output**2).sum(0).clamp_min(torch.finfo(output.dtype).tiny)
    starts, factor = [], None
    for head in states:
        ratios = output.T @ head[:, 0] / squares
        misses = (output * ratios - head[:, :1]).norm(dim=0)
        near = (misses <= _TOLERANCE * head[:, 0].norm()).nonzero()[:, 0].tolist()
        start = next((start for start in near if _same(output, head, start, ratios[start])), None)
        if start is None or start + width > output.shape[1]:
            return None
        starts.append(int(start))
        factor = float(ratios[start]) if factor is None else factor
    # A factor of 1 was measured with rounding errors.
    return tuple(starts), 1.0 if factor is None or abs(factor - 1) < _TOLERANCE else factor


def _same(output: Tensor, head: Tensor, start: int, ratio: Tensor) -> bool:
    block = output[:, start : start + head.shape[1]]
    return block.shape == head.shape and bool((block * ratio - head).norm() <= _TOLERANCE * head.norm())


def _first_place(output: Tensor, states: Tensor) -> tuple[tuple[int, ...], float] | None:
    """As :func:`_blocks`, but of the first token only, which a rotation leaves as it is."""
    first, width = output[0], states.shape[-1]
    windows = first.unfold(0, width, 1) if len(first) >= width else first.new_zeros(0, width)
    starts = []
    for head in states[:, 0]:
        near = ((windows - head).norm(dim=1) <= _TOLERANCE * head.norm()).nonzero()[:, 0].tolist()
        if not near:
            return None
        starts.append(near[0])
    return tuple(starts), 1.0


def _why_none(
    states: Tensor, hidden: Tensor, parts: list[tuple[str, Tensor, Tensor]], module: nn.Module, what: str
) -> str:
    if any("Norm" in type(child).__name__ for child in module.modules()):
        return f"the module normalises its {what}, so no matrix of the hidden states gives its logits"
    if _match_any(states, hidden, parts, _first_place) is not None:
        return f"rotary positions turn the {what}, so the matrix differs from pair to pair of positions"
    if not any(torch.equal(given, hidden) for _, given, _ in parts if given.shape == hidden.shape):
        return f"no linear part of the module is given the hidden states for its {what}"
    return f"no linear part of the module gives its {what}"

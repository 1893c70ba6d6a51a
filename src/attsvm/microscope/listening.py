"""What is shared by the ways to listen to attention: names of modules, their inputs, and masks without numbers."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attsvm.microscope.calls import AttentionCall, ModuleInfo, Tier

__all__ = ["Listener", "apart", "causal_mask", "evaluating", "run_name"]

_KEY_INPUTS = ("key_value_states", "encoder_hidden_states")


def run_name(name: str, run: int) -> str:
    """Name of a module's run within one forward pass: some models (ALBERT) run one module as all their layers."""
    return name if run == 0 else f"{name}@{run}"


@dataclass
class Listener:
    """Turns what a module hands over into an :class:`~attsvm.microscope.calls.AttentionCall` and passes it on.

    Attributes
    ----------
    names
        Qualified names of the modules of the model, by identity.
    on_call
        Receives the name of the module with its run, and the call, whose ``info`` has everything but kind and layer.
    wants
        Whether a module is of interest.
    """

    names: dict[int, str]
    on_call: Callable[[str, AttentionCall], None]
    wants: Callable[[str], bool] = field(default_factory=lambda: lambda name: True)
    _runs: Counter[str] = field(default_factory=Counter)
    _inputs: dict[int, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    _mask: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    def begin(self) -> None:
        """A forward pass of the whole model begins."""
        self._runs.clear()
        self._mask = None

    def note_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what a module is given until it computes its attention."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        hidden = next((value for value in given.values() if isinstance(value, Tensor)), None)
        others = (given.get(name) for name in _KEY_INPUTS)
        self._inputs[id(module)] = hidden, next((value for value in others if isinstance(value, Tensor)), hidden)

    def hear(
        self,
        module: nn.Module,
        tier: Tier,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        attention_mask: Tensor | None,
        offsets: Tensor | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
    ) -> None:
        """A module is about to compute, or has computed, its attention."""
        name = self.names.get(id(module), type(module).__name__)
        run = self._runs[name]
        self._runs[name] += 1
        name = run_name(name, run)
        query_input, key_input = self._inputs.pop(id(module), (None, None))
        if not self.wants(name):
            return
        mask, bias = self._apart(attention_mask, k.shape[-2])
        if bias is not None:
            offsets = bias if offsets is None else offsets + bias
        if offsets is not None and not bool(offsets.any()):
            offsets = None
        same = key_input is query_input and q.shape[2] == k.shape[2]
        inputs = _of_length(query_input, q), _of_length(key_input, k)
        call = AttentionCall(
            info=ModuleInfo(
                name=name,
                kind="encoder",
                layer=0,
                n_heads=q.shape[1],
                n_kv_heads=k.shape[1],
                d_head=q.shape[-1],
                query_side="source",
                key_side="source",
                tier=tier,
                prefixed=False,
            ),
            q=q.detach(),
            k=k.detach(),
            scale=scale,
            mask=mask,
            offsets=None if offsets is None else offsets.detach(),
            sinks=None if sinks is None else sinks.detach().reshape(-1),
            softcap=softcap,
            query_input=inputs[0],
            key_input=inputs[0] if same else inputs[1],
        )
        with torch.no_grad():
            self.on_call(name, call)

    def _apart(self, attention_mask: Tensor | None, n_keys: int) -> tuple[Tensor | None, Tensor | None]:
        """The parts of a mask; those of the last one are kept, as the layers of a model share their mask."""
        if attention_mask is None:
            return None, None
        if self._mask is None or self._mask[0] is not attention_mask:
            self._mask = attention_mask, *apart(attention_mask)
        return tuple(None if part is None else part[..., :n_keys] for part in self._mask[1:])  # type: ignore[return-value]


def _of_length(hidden: Tensor | None, states: Tensor) -> Tensor | None:
    """The input (B, T, d) that these states (B, H, T, d_head) were made from; keys from a cache have none."""
    if hidden is None or hidden.ndim != 3 or hidden.shape[:2] != (states.shape[0], states.shape[2]):
        return None
    return hidden.detach()


def apart(attention_mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask into booleans (True = may be attended) and finite offsets; None where there is nothing.

    Additive masks forbid by the lowest number of their type or by -inf; what is added to that is lost in it. Any other
    number, such as a relative bias, is an offset.
    """
    if attention_mask.dtype == torch.bool:
        return attention_mask, None
    if not attention_mask.is_floating_point():
        return attention_mask != 0, None
    attention_mask = attention_mask.detach()
    allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    offsets = attention_mask.masked_fill(~allowed, 0.0)
    return (None if bool(allowed.all()) else allowed), (offsets if bool(offsets.any()) else None)


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """(1, 1, n_queries, n_keys): each query and the keys up to its place."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril()[None, None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode that each module had."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training

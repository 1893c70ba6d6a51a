"""Attention that goes through transformers' AttentionInterface, heard by a function that stands in for the usual one.

While the ear is open the configurations of the model name an implementation of its own, under which a function is
registered that notes queries, keys and mask and then calls the implementation that was there. No other model sees it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from attsvm.errors import UnsupportedError
from attsvm.microscope.listening import Listener, causal_mask

__all__ = ["eager", "interface_ear", "interface_modules"]

_FUNCTIONS, _EAGER, _OWN, _KEY = (
    "ALL_ATTENTION_FUNCTIONS",
    "eager_attention_forward",
    "attsvm_",
    "_attn_implementation_internal",
)
_ABSENT = object()

Attention = Callable[..., Any]


def interface_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules whose class calls the attention interface, by qualified name, in the order of their definition."""
    known: dict[type, bool] = {}
    found = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind not in known:
            known[kind] = _globals_of(kind) is not None
        if known[kind]:
            found.append((name, module))
    return found


@contextmanager
def interface_ear(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Let a listener hear every module that uses the attention interface; everything is as before afterwards."""
    modules = interface_modules(model)
    if not modules:
        yield
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    supports_sdpa = bool(getattr(model, "_supports_sdpa", False))
    registered = set()

    def ear_for(implementation: Any) -> str:
        inner = _inner(implementation, supports_sdpa)
        name = f"{_OWN}{id(listener):x}_{inner}"
        if name not in registered:
            AttentionInterface.register(name, _ear(inner, listener))
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
            registered.add(name)
        return name

    try:
        with _implementations(_configs(model, modules), ear_for):
            yield
    finally:
        for name in registered:
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Eager attention in all parts of a model; everything is as before afterwards."""
    with _implementations(_configs(model, list(model.named_modules())), lambda _: "eager"):
        yield


@contextmanager
def _implementations(configs: list[Any], instead: Callable[[Any], str]) -> Iterator[None]:
    """Configurations that name other implementations for a while."""
    # By the dictionary: the property of that name writes through to parts of the configuration.
    before = [(config, vars(config).get(_KEY, _ABSENT)) for config in configs]
    try:
        for config, implementation in before:
            vars(config)[_KEY] = instead(implementation)
        yield
    finally:
        for config, implementation in before:
            if implementation is _ABSENT:
                vars(config).pop(_KEY, None)
            else:
                vars(config)[_KEY] = implementation


def _inner(implementation: Any, supports_sdpa: bool) -> str:
    """The implementation that computes the output: the model's own, where that takes masks that can be read."""
    if implementation in ("eager", "sdpa") or str(implementation).startswith(_OWN):
        return str(implementation)
    return "sdpa" if supports_sdpa and implementation not in (None, _ABSENT) else "eager"


def _ear(inner: str, listener: Listener) -> Attention:
    """The function to register: hear, then compute as before."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        mask = attention_mask
        if mask is None and inner == "sdpa" and query.shape[2] > 1 and _is_causal(module, kwargs):
            mask = causal_mask(query.shape[2], key.shape[2], query.device)
        scaling = kwargs.get("scaling")
        listener.hear(
            module,
            "interface",
            query,
            key,
            scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            attention_mask=mask,
            offsets=kwargs.get("position_bias"),
            sinks=kwargs.get("s_aux"),
            softcap=kwargs.get("softcap"),
        )
        return _implementation(module, inner)(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """What scaled_dot_product_attention does without a mask: forbid the future unless the module says otherwise."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _implementation(module: nn.Module, inner: str) -> Attention:
    """The function that the module would have called."""
    names = _globals_of(type(module)) or vars(sys.modules[type(module).__module__])
    found: Attention | None = names.get(_EAGER) if inner == "eager" else names[_FUNCTIONS][inner]
    if found is None:
        raise UnsupportedError(
            f"captured: model must have eager attention under its usual name, got {type(module).__name__} without it. "
            "Hint: model.set_attn_implementation('sdpa')."
        )
    return found


def _globals_of(kind: type) -> dict[str, Any] | None:
    """Names that a class of modules sees, if one of its functions asks the interface for its attention."""
    for base in kind.__mro__:
        if base is nn.Module or base.__module__ == "transformers.modeling_utils":
            return None
        for function in vars(base).values():
            plain = inspect.unwrap(function) if callable(function) else None
            code = getattr(plain, "__code__", None)
            if code is not None and _FUNCTIONS in code.co_names:
                names: dict[str, Any] = plain.__globals__  # type: ignore[union-attr]
                return names
    return None


def _configs(model: nn.Module, modules: list[tuple[str, nn.Module]]) -> list[Any]:
    """Configurations of these modules and of all that contain them, each once: one makes the masks, one calls."""
    inside = {""} | {
        ".".join(name.split(".")[:depth]) for name, _ in modules for depth in range(1, name.count(".") + 2)
    }
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if name in inside and hasattr(config, _KEY):
            found[id(config)] = config
    return list(found.values())

"""Attention outside transformers' attention interface, heard family by family.

Each family has one function that puts its ears on one attention module and returns how to take them off. The
computation stays the model's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attsvm.microscope.listening import Listener, apart, causal_mask

__all__ = ["HOOKED", "hook_ears", "hook_modules"]

Remove = Callable[[], None]
Ear = Callable[[Any, Listener], Remove]


def hook_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of the families that are heard by hooks, by qualified name."""
    return [(name, module) for name, module in model.named_modules() if _ear(module) is not None]


@contextmanager
def hook_ears(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Let a listener hear every module of these families; the hooks are gone afterwards."""
    with ExitStack() as stack:
        for _, module in hook_modules(model):
            ear = _ear(module)
            assert ear is not None
            stack.callback(ear(module, listener))
        yield


def _ear(module: nn.Module) -> Ear | None:
    names = (f"{base.__module__.rpartition('.')[2]}.{base.__name__}" for base in type(module).__mro__)
    return next((HOOKED[name] for name in names if name in HOOKED), None)


def _shadow(module: nn.Module, method: str, around: Callable[..., Any]) -> Remove:
    """Replace a method of one module by a function of the original and its arguments."""
    original, before = getattr(module, method), vars(module).get(method)
    vars(module)[method] = lambda *args, **kwargs: around(original, *args, **kwargs)

    def remove() -> None:
        if before is None:
            vars(module).pop(method, None)
        else:
            vars(module)[method] = before

    return remove


def _removal(*handles: RemovableHandle, unshadow: Remove = lambda: None) -> Remove:
    """What takes several hooks off."""

    def remove() -> None:
        unshadow()
        for handle in handles:
            handle.remove()

    return remove


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of a forward call by name, whether they were given by name or by place."""
    return dict(zip(names, args, strict=False)) | kwargs


# ---------------------------------------------------------------- families that compute attention in a method _attn


def _gpt_neo(module: Any, listener: Listener) -> Remove:
    def around(original: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
        n_queries, n_keys = query.shape[-2], key.shape[-2]
        near = module.bias[:, :, n_keys - n_queries : n_keys, :n_keys]
        mask, _ = (None, None) if attention_mask is None else apart(attention_mask[..., :n_keys])
        mask = near if mask is None else near & mask
        listener.hear(module, "hooks", query, key, scale=1.0, attention_mask=mask)
        return original(query, key, value, attention_mask)

    return _shadow(module, "_attn", around)


def _gptj(module: Any, listener: Listener) -> Remove:
    def around(original: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
        listener.hear(module, "hooks", query, key, scale=1 / float(module.scale_attn), attention_mask=attention_mask)
        return original(query, key, value, attention_mask)

    return _shadow(module, "_attn", around)


def _gpt_neox_japanese(module: Any, listener: Listener) -> Remove:
    def around(original: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
        listener.hear(module, "hooks", query, key, scale=1 / float(module.norm_factor), attention_mask=attention_mask)
        return original(query, key, value, attention_mask)

    return _shadow(module, "_attn", around)


# ----------------------------------------------------------------------- families with one projection for all three


def _after_projection(module: Any, projection: str, names: tuple[str, ...], heard: Callable[..., None]) -> Remove:
    """Call ``heard(output of the projection, arguments of the module)`` after each run of the module."""
    latest: dict[str, Any] = {}

    def on_projection(_: nn.Module, __: Any, output: Tensor) -> None:
        latest.setdefault("output", output)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latest.clear()
        latest["arguments"] = _arguments(args, kwargs, names)

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        heard(latest["output"], latest["arguments"])
        latest.clear()

    return _removal(
        getattr(module, projection).register_forward_hook(on_projection),
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    )


def _keys_so_far(module: Any, key: Tensor, past: Any) -> Tensor:
    """Keys of a cache, which the module has brought up to date, or the new ones."""
    return key if past is None else past.layers[module.layer_idx].keys


def _bloom(module: Any, listener: Listener) -> Remove:
    def heard(fused: Tensor, given: dict[str, Any]) -> None:
        query, key, _ = module._reshape(fused)
        key = _keys_so_far(module, key, given.get("layer_past"))
        alibi = given["alibi"].view(query.shape[0], module.num_heads, 1, -1) * module.beta
        mask = given.get("attention_mask")
        listener.hear(module, "hooks", query, key, scale=module.inv_norm_factor, attention_mask=mask, offsets=alibi)

    names = ("hidden_states", "residual", "alibi", "attention_mask", "layer_past")
    return _after_projection(module, "query_key_value", names, heard)


def _falcon(module: Any, listener: Listener) -> Remove:
    rotate = vars(sys.modules[_home(module, "FalconAttention")])["apply_rotary_pos_emb"]

    def heard(fused: Tensor, given: dict[str, Any]) -> None:
        query, key, _ = (part.transpose(1, 2) for part in module._split_heads(fused))
        alibi, mask = given.get("alibi"), given.get("attention_mask")
        if alibi is None:
            query, key = rotate(query, key, *given["position_embeddings"])
        key = _keys_so_far(module, key, given.get("layer_past"))
        sdpa = module.config._attn_implementation == "sdpa" and not given.get("output_attentions")
        if sdpa and mask is None and query.shape[2] > 1:
            mask = causal_mask(query.shape[2], key.shape[2], query.device)
        # The model adds the bias to its mask; only the eager branch then adds it to the products once more.
        bias = None
        if alibi is not None and not sdpa:
            bias = alibi.view(query.shape[0], module.num_heads, 1, -1) * module.inv_norm_factor
        listener.hear(module, "hooks", query, key, scale=module.inv_norm_factor, attention_mask=mask, offsets=bias)

    names = ("hidden_states", "alibi", "attention_mask", "position_ids", "layer_past", "use_cache", "output_attentions")
    return _after_projection(module, "query_key_value", names, heard)


def _home(module: nn.Module, name: str) -> str:
    """The Python module that defines a class among the ancestors of a module's class."""
    return next(base.__module__ for base in type(module).__mro__ if base.__name__ == name)


# ----------------------------------------------------------------------------- families with terms of their own


def _deberta_v2(module: Any, listener: Listener) -> Remove:
    """Content with position and position with content are offsets: they are no product of query and key."""
    latest: dict[str, Any] = {}

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latest.clear()
        latest["arguments"] = _arguments(args, kwargs, ("hidden_states", "attention_mask"))

    def first(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            # The same projections may be used again, for the embeddings of positions.
            latest.setdefault(name, output)

        return hook

    def bias(original: Any, *args: Any, **kwargs: Any) -> Any:
        latest["bias"] = original(*args, **kwargs)
        return latest["bias"]

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        query, key = (_split(latest[name], module.num_attention_heads) for name in ("query", "key"))
        terms = 1 + sum(kind in module.pos_att_type for kind in ("c2p", "p2c"))
        offsets = latest.get("bias")
        if isinstance(offsets, Tensor):
            offsets = offsets.view(query.shape[0], module.num_attention_heads, *offsets.shape[-2:])
        listener.hear(
            module,
            "hooks",
            query,
            key,
            scale=(query.shape[-1] * terms) ** -0.5,
            attention_mask=latest["arguments"]["attention_mask"].bool(),
            offsets=offsets if isinstance(offsets, Tensor) else None,
        )
        latest.clear()

    return _removal(
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.query_proj.register_forward_hook(first("query")),
        module.key_proj.register_forward_hook(first("key")),
        module.register_forward_hook(after),
        unshadow=_shadow(module, "disentangled_attention_bias", bias),
    )


def _split(states: Tensor, n_heads: int) -> Tensor:
    """(B, T, H d_head) as (B, H, T, d_head)."""
    return torch.unflatten(states, -1, (n_heads, -1)).transpose(1, 2)


def _mpnet(module: Any, listener: Listener) -> Remove:
    latest: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            latest[name] = _split(output, module.num_attention_heads)

        return hook

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "attention_mask", "position_bias")
        latest["arguments"] = _arguments(args, kwargs, names)

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        given = latest.pop("arguments")
        listener.hear(
            module,
            "hooks",
            latest.pop("query"),
            latest.pop("key"),
            scale=module.attention_head_size**-0.5,
            attention_mask=given.get("attention_mask"),
            offsets=given.get("position_bias"),
        )

    return _removal(
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.q.register_forward_hook(keep("query")),
        module.k.register_forward_hook(keep("key")),
        module.register_forward_hook(after),
    )


HOOKED: dict[str, Ear] = {
    "modeling_gpt_neo.GPTNeoSelfAttention": _gpt_neo,
    "modeling_gptj.GPTJAttention": _gptj,
    "modeling_codegen.CodeGenAttention": _gptj,
    "modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention": _gpt_neox_japanese,
    "modeling_bloom.BloomAttention": _bloom,
    "modeling_falcon.FalconAttention": _falcon,
    "modeling_mpnet.MPNetSelfAttention": _mpnet,
    "modeling_deberta_v2.DisentangledSelfAttention": _deberta_v2,
}
"""The ears of each attention class, which is named with the module that defines it."""

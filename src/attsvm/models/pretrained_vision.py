"""Configurations and names of ViT and DINOv2 checkpoints, read and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attsvm.errors import InvalidInputError
from attsvm.models.blocks import GATED
from attsvm.models.checkpoint_names import Family, Weight, layer_norm, linear
from attsvm.models.pretrained_text import activation_name, activation_of, refuse, require
from attsvm.models.vision import Vision, VisionConfig

__all__ = ["FAMILIES", "dinov2_weights", "vit_weights"]

# ----------------------------------------------------------------------------------------------------------------- ViT


def _read_vit(content: Mapping[str, Any], names: frozenset[str]) -> VisionConfig:
    pooled = "pooler.dense.weight" in names
    if pooled:
        refuse(content, pooler_act="tanh")
    return VisionConfig(
        **_read_shared(content, names),
        d_mlp=require(content, "intermediate_size"),
        activation=activation_of(content, "hidden_act", "gelu"),
        norm_eps=content.get("layer_norm_eps", 1e-12),
        d_pooled=(content.get("pooler_output_size") or require(content, "hidden_size")) if pooled else None,
    )


def _write_vit(config: VisionConfig) -> dict[str, Any]:
    return _write_shared(config) | {
        "architectures": ["ViTModel" if config.n_classes is None else "ViTForImageClassification"],
        "intermediate_size": config.d_mlp,
        "hidden_act": activation_name(config.activation),
        "pooler_output_size": config.d_pooled or config.d_model,
    }


def _is_vit(config: Any) -> bool:
    return (
        isinstance(config, VisionConfig)
        and (config.layer_scale, config.mask_token) == (None, False)
        and config.activation not in GATED
        and (config.n_classes is None or (config.head_input == "cls" and config.d_pooled is None))
    )


def vit_weights(config: VisionConfig) -> Iterator[Weight]:
    """Names of ViT."""
    yield from _embedding_weights(config)
    for layer in range(config.n_layers):
        theirs, ours = f"encoder.layer.{layer}", f"blocks.{layer}"
        yield from _attention_weights(theirs, ours, bias=config.qkv_bias)
        yield from layer_norm(f"{theirs}.layernorm_before", f"{ours}.norms.attention")
        yield from layer_norm(f"{theirs}.layernorm_after", f"{ours}.norms.mlp")
        yield from linear(f"{theirs}.intermediate.dense", f"{ours}.mlp.up")
        yield from linear(f"{theirs}.output.dense", f"{ours}.mlp.down")
    if config.d_pooled is not None:
        yield from linear("pooler.dense", "pooler")


# -------------------------------------------------------------------------------------------------------------- DINOv2


def _read_dinov2(content: Mapping[str, Any], names: frozenset[str]) -> VisionConfig:
    gated = content.get("use_swiglu_ffn", False)
    return VisionConfig(
        **_read_shared(content, names),
        d_mlp=_mlp_width(require(content, "hidden_size"), content.get("mlp_ratio", 4), gated=gated),
        activation="swiglu" if gated else activation_of(content, "hidden_act", "gelu"),
        norm_eps=content.get("layer_norm_eps", 1e-6),
        layer_scale=content.get("layerscale_value", 1.0),
        head_input="cls_mean",
    )


def _write_dinov2(config: VisionConfig) -> dict[str, Any]:
    gated = config.activation in GATED
    return _write_shared(config) | {
        "architectures": ["Dinov2Model" if config.n_classes is None else "Dinov2ForImageClassification"],
        "mlp_ratio": _mlp_ratio(config),
        "use_swiglu_ffn": gated,
        "hidden_act": "gelu" if gated else activation_name(config.activation),
        "layerscale_value": config.layer_scale,
        "use_mask_token": config.mask_token,
    }


def _is_dinov2(config: Any) -> bool:
    return (
        isinstance(config, VisionConfig)
        and config.layer_scale is not None
        and (config.activation == "swiglu" or config.activation not in GATED)
        and config.d_pooled is None
        and (config.n_classes is None or config.head_input == "cls_mean")
        and _mlp_ratio(config) is not None
    )


def dinov2_weights(config: VisionConfig) -> Iterator[Weight]:
    """Names of DINOv2, whose gated MLP has gate and up in one."""
    yield from _embedding_weights(config)
    for layer in range(config.n_layers):
        theirs, ours = f"encoder.layer.{layer}", f"blocks.{layer}"
        yield from _attention_weights(theirs, ours, bias=config.qkv_bias)
        for number, part in ((1, "attention"), (2, "mlp")):
            yield from layer_norm(f"{theirs}.norm{number}", f"{ours}.norms.{part}")
            yield Weight(f"{theirs}.layer_scale{number}.lambda1", (f"{ours}.scales.{part}",))
        if config.activation in GATED:
            for kind in ("weight", "bias"):
                parts = (f"{ours}.mlp.gate.{kind}", f"{ours}.mlp.up.{kind}")
                yield Weight(f"{theirs}.mlp.weights_in.{kind}", parts)
            yield from linear(f"{theirs}.mlp.weights_out", f"{ours}.mlp.down")
        else:
            yield from linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.up")
            yield from linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.down")


def _mlp_width(d_model: int, ratio: float, *, gated: bool) -> int:
    """Width of the MLP; a gated one has two thirds, as it has three matrices, rounded up to a multiple of 8."""
    width = int(d_model * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def _mlp_ratio(config: VisionConfig) -> int | None:
    """The whole number that gives the width of the MLP; None if there is none."""
    # A gated MLP is at most 2/3 ratio d_model + 8 wide, so twice the quotient is far enough.
    gated = config.activation in GATED
    for ratio in range(1, 2 * config.d_mlp // config.d_model + 2):
        if _mlp_width(config.d_model, ratio, gated=gated) == config.d_mlp:
            return ratio
    return None


# -------------------------------------------------------------------------------------------------------------- shared


def _read_shared(content: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {
        "image_size": _read_size(require(content, "image_size")),
        "patch_size": _read_size(require(content, "patch_size")),
        "d_model": require(content, "hidden_size"),
        "n_heads": require(content, "num_attention_heads"),
        "n_layers": require(content, "num_hidden_layers"),
        "n_channels": content.get("num_channels", 3),
        "qkv_bias": content.get("qkv_bias", True),
        "dropout": content.get("hidden_dropout_prob", 0.0),
        "attention_dropout": content.get("attention_probs_dropout_prob", 0.0),
        "mask_token": "embeddings.mask_token" in names,
        "n_classes": _read_classes(content) if "classifier.weight" in names else None,
    }


def _read_classes(content: Mapping[str, Any]) -> int:
    # Two classes, transformers' default, are not written.
    return len(content["id2label"]) if content.get("id2label") else int(content.get("num_labels") or 2)


def _read_size(size: Any) -> int | tuple[int, int]:
    if not isinstance(size, list):
        return int(size)
    if len(size) != 2:
        raise InvalidInputError(f"from_pretrained: sizes in config.json must be one number or two, got {size!r}.")
    return (size[0], size[1])


def _write_shared(config: VisionConfig) -> dict[str, Any]:
    content: dict[str, Any] = {
        "image_size": _written_size(config.image_size),
        "patch_size": _written_size(config.patch_size),
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_channels": config.n_channels,
        "qkv_bias": config.qkv_bias,
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }
    if config.n_classes is not None:
        labels = [f"LABEL_{number}" for number in range(config.n_classes)]
        content["id2label"] = {str(number): label for number, label in enumerate(labels)}
        content["label2id"] = {label: number for number, label in enumerate(labels)}
    return content


def _written_size(size: int | tuple[int, int]) -> int | list[int]:
    return size if isinstance(size, int) else list(size)


def _embedding_weights(config: VisionConfig) -> Iterator[Weight]:
    yield Weight("embeddings.cls_token", ("cls",))
    yield Weight("embeddings.position_embeddings", ("positions",))
    if config.mask_token:
        yield Weight("embeddings.mask_token", ("mask_token",))
    yield from linear("embeddings.patch_embeddings.projection", "patches")
    yield from layer_norm("layernorm", "norm")
    if config.n_classes is not None:
        yield from linear("classifier", "head")


def _attention_weights(theirs: str, ours: str, *, bias: bool) -> Iterator[Weight]:
    for matrix in ("query", "key", "value"):
        yield from linear(f"{theirs}.attention.attention.{matrix}", f"{ours}.attention.{matrix}", bias=bias)
    yield from linear(f"{theirs}.attention.output.dense", f"{ours}.attention.output")


FAMILIES = {
    "vit": Family(
        model_type="vit",
        read_config=_read_vit,
        write_config=_write_vit,
        accepts=_is_vit,
        build=Vision,
        weights=vit_weights,
        prefix="vit.",
        outside=("classifier.",),
        headed=lambda config: config.n_classes is not None,
    ),
    "dinov2": Family(
        model_type="dinov2",
        read_config=_read_dinov2,
        write_config=_write_dinov2,
        accepts=_is_dinov2,
        build=Vision,
        weights=dinov2_weights,
        prefix="dinov2.",
        outside=("classifier.",),
        headed=lambda config: config.n_classes is not None,
    ),
}
"""The families of this module by model type."""

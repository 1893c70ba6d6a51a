"""Parameters and floating-point operations, from the sizes alone."""

from __future__ import annotations

from torch import nn

from attsvm.models.blocks import GATED, BlockConfig

__all__ = ["attention_flops", "block_flops", "block_parameters", "count_parameters", "norm_parameters"]

_NORM_VECTORS = {"layer": 2, "rms": 1, "none": 0}


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes; a tensor used twice counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def norm_parameters(norm: str, d_model: int) -> int:
    """Parameters of one normalisation."""
    return _NORM_VECTORS[norm] * d_model


def block_parameters(config: BlockConfig) -> int:
    """Parameters of one block."""
    parts = 1 + config.cross + (config.d_mlp > 0)
    total = (1 + config.cross) * _attention_parameters(config)
    matrices = 3 if config.activation in GATED else 2
    if config.d_mlp:
        total += matrices * config.d_model * config.d_mlp
        total += config.d_model + (matrices - 1) * config.d_mlp if config.mlp_bias else 0
    total += parts * norm_parameters(config.norm, config.d_model)
    return total + (parts * config.d_model if config.layer_scale is not None else 0)


def block_flops(config: BlockConfig, length: int, *, context: int = 0) -> int:
    """Operations of the matrix products of one block over one sequence (2 per multiply-add).

    ``context`` is the length that cross-attention reads. Attention is counted over all pairs: a causal mask saves
    none of them in the plain formulas.
    """
    total = attention_flops(config, length, length)
    if config.cross:
        total += attention_flops(config, length, context)
    matrices = 3 if config.activation in GATED else 2
    return total + 2 * length * matrices * config.d_model * config.d_mlp


def attention_flops(config: BlockConfig, queries: int, keys: int) -> int:
    """Operations of the matrix products of one attention, its linear maps included."""
    d_head, n_kv_heads = _head_sizes(config)
    inner, outer = config.n_heads * d_head, n_kv_heads * d_head
    values = 2 * config.d_model * (keys * outer + queries * inner)
    pairs = 2 * config.n_heads * queries * keys
    if config.parameterization == "W":
        return values + 2 * queries * config.n_heads * config.d_model**2 + pairs * (config.d_model + d_head)
    return values + 2 * config.d_model * (queries * inner + keys * outer) + 2 * pairs * d_head


def _head_sizes(config: BlockConfig) -> tuple[int, int]:
    return config.d_head or config.d_model // config.n_heads, config.n_kv_heads or config.n_heads


def _attention_parameters(config: BlockConfig) -> int:
    d_head, n_kv_heads = _head_sizes(config)
    d, inner, outer = config.d_model, config.n_heads * d_head, n_kv_heads * d_head
    output_bias = config.attention_bias if config.output_bias is None else config.output_bias
    total = d * outer + inner * d + (outer if config.attention_bias else 0) + (d if output_bias else 0)
    if config.parameterization == "W":
        return total + config.n_heads * d * d
    return total + d * inner + d * outer + (inner + outer if config.attention_bias else 0)

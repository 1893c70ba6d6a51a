"""Attention: the mechanism, its masks, its positions, and what makes it sparse or hierarchical."""

from attsvm.attention.cache import KeyValueCache
from attsvm.attention.functional import Attended, attend
from attsvm.attention.hierarchical import HierarchicalAttention
from attsvm.attention.masks import (
    bigbird_mask,
    block_sparse_mask,
    causal_mask,
    check_padding,
    dilated_mask,
    global_local_mask,
    padding_mask,
    prefix_mask,
    show,
    sliding_window_mask,
    strided_mask,
    threshold_mask,
    top_k_mask,
)
from attsvm.attention.multihead import MultiHeadAttention
from attsvm.attention.plots import plot_mask, plot_weights
from attsvm.attention.positions import (
    LearnedPositions,
    RelativeBias,
    Rotary,
    RotaryTables,
    alibi_bias,
    llama3_frequencies,
    sinusoidal,
)
from attsvm.attention.sparse import attend_blocks, attend_window

__all__ = [
    "Attended",
    "HierarchicalAttention",
    "KeyValueCache",
    "LearnedPositions",
    "MultiHeadAttention",
    "RelativeBias",
    "Rotary",
    "RotaryTables",
    "alibi_bias",
    "attend",
    "attend_blocks",
    "attend_window",
    "bigbird_mask",
    "block_sparse_mask",
    "causal_mask",
    "check_padding",
    "dilated_mask",
    "global_local_mask",
    "llama3_frequencies",
    "padding_mask",
    "plot_mask",
    "plot_weights",
    "prefix_mask",
    "show",
    "sinusoidal",
    "sliding_window_mask",
    "strided_mask",
    "threshold_mask",
    "top_k_mask",
]

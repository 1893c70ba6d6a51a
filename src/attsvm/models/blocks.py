"""The parts that all transformers here are made of: normalisation, MLP, block.

Shapes: B sequences, T tokens, S tokens of the context, d = d_model, m = d_mlp, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from attsvm.attention.cache import KeyValueCache
from attsvm.attention.multihead import MultiHeadAttention, check_head_sizes
from attsvm.attention.positions import Rotary, RotaryTables
from attsvm.errors import InvalidInputError
from attsvm.models.checks import check_kinds, check_share

__all__ = ["ACTIVATIONS", "GATED", "MLP", "MLP_KINDS", "Block", "BlockConfig", "BlockOutput", "RMSNorm", "make_norm"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
"""Elementwise functions by name."""

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
"""Kinds of gated MLP, with the function of their gate."""

MLP_KINDS = (*ACTIVATIONS, *GATED)

_PLACES = ("pre", "post")
_NORMS = ("layer", "rms", "none")


class RMSNorm(nn.Module):
    r"""Root-mean-square normalisation, $x \mapsto w \odot x / \sqrt{\operatorname{mean}(x^2) + \epsilon}$.

    The mean is taken in float32 at least; the result has the dtype of ``x``.

    References
    ----------
    Zhang, Sennrich. "Root Mean Square Layer Normalization", 2019. arXiv:1910.07467, eq. 4.
    """

    def __init__(self, d_model: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)

    def extra_repr(self) -> str:
        """Size and epsilon."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def make_norm(kind: str, d_model: int, eps: float) -> nn.Module:
    """Make a normalisation of the kind ``layer`` (mean and variance), ``rms``, or ``none`` (the identity)."""
    if kind == "layer":
        return nn.LayerNorm(d_model, eps=eps)
    if kind == "rms":
        return RMSNorm(d_model, eps=eps)
    if kind == "none":
        return nn.Identity()
    raise InvalidInputError(f"make_norm: kind must be one of {', '.join(_NORMS)}, got {kind!r}.")


class MLP(nn.Module):
    r"""Two layers per token, $D f(U x)$, or gated, $D (f(G x) \odot U x)$.

    Parameters
    ----------
    d_model, d_mlp
        Width outside and inside.
    kind
        The function f: ``gelu``, ``gelu_tanh``, ``relu``, ``silu``, ``tanh``; gated: ``swiglu`` (f = silu), ``geglu``,
        ``geglu_tanh``, ``reglu``.
    bias
        Whether the layers have biases.
    dropout
        Share of the output set to 0 in training.

    Raises
    ------
    InvalidInputError
        If ``kind`` is none of these.

    References
    ----------
    Shazeer. "GLU Variants Improve Transformer", 2020. arXiv:2002.05202, eq. 5 and 6.

    Examples
    --------
    >>> MLP(d_model=8, d_mlp=32, kind="swiglu")(torch.zeros(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(
        self, *, d_model: int, d_mlp: int, kind: str = "gelu", bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if kind not in MLP_KINDS:
            raise InvalidInputError(f"MLP: kind must be one of {', '.join(MLP_KINDS)}, got {kind!r}.")
        self.kind = kind
        self.activation = ACTIVATIONS[GATED.get(kind, kind)]
        self.gate = nn.Linear(d_model, d_mlp, bias=bias) if kind in GATED else None
        self.up = nn.Linear(d_model, d_mlp, bias=bias)
        self.down = nn.Linear(d_mlp, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to (..., d_model)."""
        inner = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        output: Tensor = self.dropout(self.down(inner))
        return output


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One block: what it is made of.

    Parameters
    ----------
    d_model, n_heads, d_mlp
        Sizes. With ``d_mlp`` = 0 there is no MLP (the attention-only models of the theory).
    n_kv_heads, d_head
        Heads of keys and values (default ``n_heads``) and their width (default ``d_model / n_heads``).
    activation
        Kind of the MLP, see :class:`MLP`.
    place
        ``pre``: normalise what enters a part (GPT-2, Llama, T5, ViT); ``post``: the sum that leaves it (BERT, BART).
    norm, norm_eps
        ``layer``, ``rms`` or ``none``, and its epsilon.
    cross
        Whether there is attention to a context between self-attention and MLP, as in a decoder that reads an encoder.
    attention_bias, output_bias, mlp_bias
        Biases of queries, keys and values; of the attention output (default as ``attention_bias``); of the MLP.
    scale
        Factor of the logits; default ``1 / sqrt(d_head)``.
    layer_scale
        If not None, the start value of learned factors (d_model) on what each part adds.
    parameterization
        ``KQ`` (separate key and query matrices) or ``W`` (one combined matrix per head).
    dropout, attention_dropout
        Shares set to 0 in training, of what each part adds and of the attention weights.
    backend
        See :func:`attsvm.attention.functional.attend`.

    Raises
    ------
    InvalidInputError
        If a size or a kind is out of its range, or the heads do not divide what they share.
    """

    d_model: int
    n_heads: int
    d_mlp: int
    n_kv_heads: int | None = None
    d_head: int | None = None
    activation: str = "gelu"
    place: str = "pre"
    norm: str = "layer"
    norm_eps: float = 1e-5
    cross: bool = False
    attention_bias: bool = True
    output_bias: bool | None = None
    mlp_bias: bool = True
    scale: float | None = None
    layer_scale: float | None = None
    parameterization: str = "KQ"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.place not in _PLACES:
            raise InvalidInputError(f"BlockConfig: place must be one of {', '.join(_PLACES)}, got {self.place!r}.")
        if self.norm not in _NORMS:
            raise InvalidInputError(f"BlockConfig: norm must be one of {', '.join(_NORMS)}, got {self.norm!r}.")
        if self.activation not in MLP_KINDS:
            raise InvalidInputError(
                f"BlockConfig: activation must be one of {', '.join(MLP_KINDS)}, got {self.activation!r}."
            )
        if not isinstance(self.d_mlp, int) or self.d_mlp < 0:
            raise InvalidInputError(f"BlockConfig: d_mlp must be an integer of at least 0, got {self.d_mlp!r}.")
        check_kinds(self)
        check_share(self, "dropout", "attention_dropout")
        if self.norm_eps < 0:
            raise InvalidInputError(f"BlockConfig: norm_eps must be at least 0, got {self.norm_eps}.")
        check_head_sizes("BlockConfig", self.d_model, self.n_heads, self.n_kv_heads, self.d_head)

    def attention(self, rotary: Rotary | None = None) -> MultiHeadAttention:
        """Make the attention of this block."""
        return MultiHeadAttention(
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            d_head=self.d_head,
            bias=self.attention_bias,
            output_bias=self.output_bias,
            parameterization=self.parameterization,
            scale=self.scale,
            rotary=rotary,
            backend=self.backend,
            dropout=self.attention_dropout,
        )


class BlockOutput(NamedTuple):
    """``hidden`` (B, T, d_model); patterns (B, H, q, k) of self- and cross-attention, None when not asked for."""

    hidden: Tensor
    weights: Tensor | None
    cross_weights: Tensor | None


class Block(nn.Module):
    r"""Self-attention, optional cross-attention and MLP, each added to what it reads.

    With N the normalisation, a part f acts as $x + f(N x)$ (``place="pre"``) or $N(x + f(x))$ (``"post"``).

    Parameters
    ----------
    config
        See :class:`BlockConfig`.
    rotary
        Rotary positions of the self-attention, shared by all blocks of a model.

    References
    ----------
    Vaswani et al. "Attention Is All You Need", 2017. arXiv:1706.03762, section 3.1 (post).
    Xiong et al. "On Layer Normalization in the Transformer Architecture", 2020. arXiv:2002.04745 (pre).
    """

    def __init__(self, config: BlockConfig, *, rotary: Rotary | None = None) -> None:
        super().__init__()
        self.config = config
        parts = ["attention", *(["cross"] if config.cross else []), *(["mlp"] if config.d_mlp else [])]
        self.attention = config.attention(rotary)
        self.cross = config.attention() if config.cross else None
        self.mlp = (
            MLP(d_model=config.d_model, d_mlp=config.d_mlp, kind=config.activation, bias=config.mlp_bias)
            if config.d_mlp
            else None
        )
        self.norms = nn.ModuleDict({part: make_norm(config.norm, config.d_model, config.norm_eps) for part in parts})
        self.scales = nn.ParameterDict(
            {part: torch.full((config.d_model,), float(config.layer_scale)) for part in parts}
            if config.layer_scale is not None
            else {}
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        positions: Tensor | RotaryTables | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        context_cache: KeyValueCache | None = None,
        weights: bool = False,
    ) -> BlockOutput:
        """Map x (B, T, d_model) to the same shape.

        ``mask``, ``bias``, ``causal``, ``positions``, ``cache`` and ``layer`` are those of the self-attention;
        ``context`` (B, S, d_model), ``context_mask`` and ``context_cache`` those of the cross-attention.
        """
        attended = self.attention(
            self._enter("attention", x),
            mask=mask,
            bias=bias,
            causal=causal,
            positions=positions,
            cache=cache,
            layer=layer,
            weights=weights,
        )
        x = self._leave("attention", x, attended.output)
        cross_weights = None
        if self.cross is not None:
            if context is None:
                raise InvalidInputError("Block: context must be given to a block with cross-attention, got None.")
            read = self.cross(
                self._enter("cross", x),
                context=context,
                mask=context_mask,
                cache=context_cache,
                layer=layer,
                weights=weights,
            )
            x, cross_weights = self._leave("cross", x, read.output), read.weights
        if self.mlp is not None:
            x = self._leave("mlp", x, self.mlp(self._enter("mlp", x)))
        return BlockOutput(x, attended.weights, cross_weights)

    def _enter(self, part: str, x: Tensor) -> Tensor:
        entered: Tensor = self.norms[part](x) if self.config.place == "pre" else x
        return entered

    def _leave(self, part: str, x: Tensor, added: Tensor) -> Tensor:
        added = self.dropout(added)
        if self.config.layer_scale is not None:
            added = added * self.scales[part]
        total: Tensor = x + added
        return total if self.config.place == "pre" else self.norms[part](total)

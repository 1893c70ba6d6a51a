"""The decoder that predicts the next token: GPT-2, the Llama kind, and the one-layer models of the theory.

Shapes: B sequences, T new tokens, P tokens in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from attsvm.attention.cache import KeyValueCache
from attsvm.attention.masks import padding_mask
from attsvm.attention.positions import Rotary, RotaryTables, llama3_frequencies
from attsvm.errors import InvalidInputError
from attsvm.models.blocks import Block, BlockConfig, make_norm
from attsvm.models.checks import check_kinds
from attsvm.models.counts import block_flops, block_parameters, count_parameters, norm_parameters
from attsvm.models.inputs import check_attention_mask, check_ids, last_of, positions_of
from attsvm.models.output import ModelOutput

__all__ = ["Decoder", "DecoderConfig", "RotaryScaling"]

_POSITIONS = ("learned", "rotary", "none")


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """Stretching of long wavelengths, see :func:`attsvm.attention.positions.llama3_frequencies`."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_n_ctx: int

    def __post_init__(self) -> None:
        check_kinds(self)
        if min(self.factor, self.low_frequency_factor, self.original_n_ctx) <= 0:
            raise InvalidInputError(f"RotaryScaling: factors and original_n_ctx must be > 0, got {self}.")
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise InvalidInputError(
                "RotaryScaling: high_frequency_factor must be above low_frequency_factor "
                f"({self.low_frequency_factor}), got {self.high_frequency_factor}."
            )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and kinds of a :class:`Decoder`; the defaults are those of GPT-2.

    Parameters
    ----------
    d_vocab, d_model, n_layers, n_heads, d_mlp, n_ctx
        Sizes. With ``d_mlp`` = 0 there is attention alone. ``n_ctx`` is the longest sequence.
    n_kv_heads, d_head
        Heads of keys and values (default ``n_heads``) and their width (default ``d_model / n_heads``).
    activation, place, norm, norm_eps, attention_bias, output_bias, mlp_bias, scale, parameterization
        See :class:`attsvm.models.blocks.BlockConfig`.
    positions
        ``learned`` (added to the tokens), ``rotary`` (turns queries and keys) or ``none``.
    rotary_base, rotary_scaling
        Of rotary positions.
    head
        Whether there are logits.
    tied
        Whether their matrix is that of the token embeddings.
    dropout, attention_dropout
        Shares set to 0 in training.
    bos_id, eos_id, pad_id
        Ids of beginning, end and padding, where there are any.
    backend
        See :func:`attsvm.attention.functional.attend`.

    Raises
    ------
    InvalidInputError
        If a size or a kind is out of its range.
    """

    d_vocab: int
    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int
    n_ctx: int
    n_kv_heads: int | None = None
    d_head: int | None = None
    activation: str = "gelu_tanh"
    place: str = "pre"
    norm: str = "layer"
    norm_eps: float = 1e-5
    attention_bias: bool = True
    output_bias: bool | None = None
    mlp_bias: bool = True
    scale: float | None = None
    parameterization: str = "KQ"
    positions: str = "learned"
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    head: bool = True
    tied: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None
    pad_id: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("d_vocab", "d_model", "n_layers", "n_heads", "n_ctx"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise InvalidInputError(f"DecoderConfig: {name} must be an integer of at least 1, got {size!r}.")
        if self.positions not in _POSITIONS:
            raise InvalidInputError(
                f"DecoderConfig: positions must be one of {', '.join(_POSITIONS)}, got {self.positions!r}."
            )
        _ = self.block  # checks what blocks have
        check_kinds(self)

    @property
    def block(self) -> BlockConfig:
        """What each layer is."""
        return BlockConfig(
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_mlp=self.d_mlp,
            n_kv_heads=self.n_kv_heads,
            d_head=self.d_head,
            activation=self.activation,
            place=self.place,
            norm=self.norm,
            norm_eps=self.norm_eps,
            attention_bias=self.attention_bias,
            output_bias=self.output_bias,
            mlp_bias=self.mlp_bias,
            scale=self.scale,
            parameterization=self.parameterization,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            backend=self.backend,
        )

    @property
    def n_parameters(self) -> int:
        """Numbers that training changes; a matrix used twice counts once."""
        total = self.d_vocab * self.d_model + self.n_layers * block_parameters(self.block)
        total += self.n_ctx * self.d_model if self.positions == "learned" else 0
        total += norm_parameters(self.norm, self.d_model) if self.place == "pre" else 0
        return total + (self.d_vocab * self.d_model if self.head and not self.tied else 0)

    def flops(self, length: int) -> int:
        """Operations of the matrix products of one forward pass over one sequence (2 per multiply-add).

        All pairs of tokens are counted, though a causal mask hides half of them.
        """
        total = self.n_layers * block_flops(self.block, length)
        return total + (2 * length * self.d_model * self.d_vocab if self.head else 0)

    def rotary(self) -> Rotary | None:
        """Make the rotary positions, if there are any."""
        if self.positions != "rotary":
            return None
        d_head = self.d_head or self.d_model // self.n_heads
        frequencies = None
        if self.rotary_scaling is not None:
            scaling = self.rotary_scaling
            frequencies = llama3_frequencies(
                d_head,
                self.rotary_base,
                factor=scaling.factor,
                low_frequency_factor=scaling.low_frequency_factor,
                high_frequency_factor=scaling.high_frequency_factor,
                original_n_ctx=scaling.original_n_ctx,
            )
        return Rotary(d_head, self.rotary_base, frequencies=frequencies)


class Decoder(nn.Module):
    """Causal transformer.

    Parameters
    ----------
    config
        See :class:`DecoderConfig`.

    References
    ----------
    Radford et al. "Language Models are Unsupervised Multitask Learners", 2019.
    Touvron et al. "LLaMA: Open and Efficient Foundation Language Models", 2023. arXiv:2302.13971.

    Examples
    --------
    >>> import torch
    >>> config = DecoderConfig(d_vocab=10, d_model=8, n_layers=2, n_heads=2, d_mlp=32, n_ctx=16)
    >>> decoder = Decoder(config)
    >>> decoder(torch.tensor([[1, 2, 3]])).logits.shape, decoder.n_parameters == config.n_parameters
    (torch.Size([1, 3, 10]), True)
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.d_vocab, config.d_model)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions = nn.Embedding(config.n_ctx, config.d_model) if config.positions == "learned" else None
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.rotary = config.rotary()
        self.blocks = nn.ModuleList([Block(config.block, rotary=self.rotary) for _ in range(config.n_layers)])
        # Pre-norm blocks leave a sum behind that nobody has normalised.
        self.norm = make_norm(config.norm, config.d_model, config.norm_eps) if config.place == "pre" else None
        self.head = nn.Linear(config.d_model, config.d_vocab, bias=False) if config.head else None
        if self.head is not None and config.tied:
            self.head.weight = self.tokens.weight

    @property
    def n_parameters(self) -> int:
        """Numbers that training changes."""
        return count_parameters(self)

    def forward(
        self,
        ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        weights: bool = False,
        last_logits: int | None = None,
    ) -> ModelOutput:
        """Predict what follows each of ids (B, T).

        Parameters
        ----------
        ids
            Token ids; with a cache, those after the P tokens that are in it.
        attention_mask
            (B, P + T), True or 1 = real token. Positions are counted over real tokens, so that padding on the left and
            on the right give the same.
        cache
            Keys and values of the tokens so far; the new ones are added.
        weights
            Whether to return the attention patterns of all layers.
        last_logits
            Compute the logits of so many last tokens only (at least 1), as generation does; by default of all.

        Returns
        -------
        ModelOutput
            ``hidden`` (B, T, d_model), ``logits`` (B, T, d_vocab).

        Raises
        ------
        InvalidInputError
            If ids or mask are not what they must be, or do not fit into the context with what is in the cache.
        """
        config = self.config
        past = 0 if cache is None else cache.length
        check_ids("Decoder", ids, d_vocab=config.d_vocab, n_ctx=config.n_ctx, past=past)
        pad_id = config.pad_id if self._pads_only(config.pad_id) else None
        real = check_attention_mask("Decoder", attention_mask, ids, past=past, pad_id=pad_id, eos_id=config.eos_id)
        x, places = self._embed(ids, real, past)
        mask = None if real is None else padding_mask(real)
        patterns: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            x, pattern, _ = block(
                x, mask=mask, causal=True, positions=places, cache=cache, layer=layer, weights=weights
            )
            if pattern is not None:
                patterns.append(pattern)
        hidden = x if self.norm is None else self.norm(x)
        read = last_of("Decoder", hidden, last_logits)
        return ModelOutput(
            hidden=hidden,
            logits=None if self.head is None else self.head(read),
            weights={"decoder": patterns} if weights else None,
        )

    def _embed(self, ids: Tensor, real: Tensor | None, past: int) -> tuple[Tensor, RotaryTables | None]:
        """Vectors of the tokens, and the angles at their places where positions are rotary."""
        x: Tensor = self.tokens(ids)
        if self.config.positions == "none":
            return self.dropout(x), None
        places = positions_of(real, length=ids.shape[1], past=past, device=ids.device)
        if self.positions is not None:
            return self.dropout(x + self.positions(places)), None
        assert self.rotary is not None
        # Without a mask all sequences share their places: (T,), not (B, T).
        return self.dropout(x), self.rotary.tables(places[0] if real is None else places, x.dtype)

    def _pads_only(self, pad_id: int | None) -> bool:
        """Whether the padding id means nothing else; many models pad with their end."""
        eos = self.config.eos_id
        return (
            pad_id is not None
            and pad_id != self.config.bos_id
            and pad_id not in (eos if isinstance(eos, tuple) else (eos,))
        )

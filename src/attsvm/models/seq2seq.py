r"""Encoder-decoder transformers: the original one, BART and T5 are three settings of the same class.

The encoder turns S source tokens into hidden states, each attending to all of them. The decoder predicts the next
target token from the T target tokens so far: its self-attention is causal, and its cross-attention reads the encoder's
states. Logits are hidden states times the transposed embedding (tied head) or a matrix of their own.

================  ==========  ================  ======================  ==========================
setting           default     BART              T5 v1.0                 T5 v1.1, flan
================  ==========  ================  ======================  ==========================
``positions``     sinusoidal  learned           relative                relative
``place``         post        post              pre                     pre
``norm``          layer       layer             rms                     rms
``activation``    relu        gelu              relu                    geglu_tanh
head              tied        tied, with bias   tied, / sqrt(d_model)   own
================  ==========  ================  ======================  ==========================

Shapes: B sequences, S source and T target tokens, D = d_model, V = d_vocab, H heads.

References
----------
Vaswani et al. "Attention Is All You Need", 2017. arXiv:1706.03762, section 3.
Lewis et al. "BART: Denoising Sequence-to-Sequence Pre-training", 2019. arXiv:1910.13461.
Raffel et al. "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2019.
arXiv:1910.10683, section 2.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from attsvm.attention.cache import KeyValueCache
from attsvm.attention.masks import padding_mask
from attsvm.attention.positions import LearnedPositions, RelativeBias, sinusoidal
from attsvm.errors import InvalidInputError
from attsvm.models.blocks import Block, BlockConfig, make_norm
from attsvm.models.checks import check_kinds
from attsvm.models.counts import block_flops, block_parameters, count_parameters, norm_parameters
from attsvm.models.inputs import check_attention_mask, check_ids, last_of, positions_of
from attsvm.models.output import ModelOutput

__all__ = ["Seq2Seq", "Seq2SeqCache", "Seq2SeqConfig"]

_POSITIONS = ("sinusoidal", "learned", "relative")
_SIZES = (
    "d_vocab d_model n_heads n_layers d_mlp n_decoder_layers n_decoder_heads d_decoder_mlp d_head n_ctx n_buckets "
    "max_distance"
).split()


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """Sizes and kinds of an encoder-decoder transformer; the defaults are those of the original one.

    Parameters
    ----------
    d_vocab, d_model, n_heads, n_layers, d_mlp
        Sizes; those of the decoder are the same unless given by the next three.
    n_decoder_layers, n_decoder_heads, d_decoder_mlp
        Sizes of the decoder where they differ.
    d_head
        Width of a head; default ``d_model / n_heads``.
    n_ctx
        Longest source or target; None: no limit, which learned positions do not allow.
    positions
        ``sinusoidal`` or ``learned`` vectors added to the embeddings, or ``relative``: a learned bias on the logits of
        self-attention that depends on the distance, shared by the layers of a stack.
    position_offset
        Unused rows at the start of the learned positions (BART has 2).
    n_buckets, max_distance
        Of relative positions: number of learned values per head, and the distance from which there is only one.
    place, norm, norm_eps, activation
        See :class:`attsvm.models.blocks.BlockConfig`. With ``place="pre"`` both stacks end with a norm.
    bias
        Whether the linear layers of the blocks have biases.
    scale
        Factor of the attention logits; default ``1 / sqrt(d_head)``.
    embedding_norm
        Whether embeddings plus positions are normalised.
    scale_embedding
        Whether embeddings are multiplied by sqrt(d_model).
    tied_head, scale_head, logits_bias
        Whether the head is the embedding itself; whether what enters it is divided by sqrt(d_model); whether there is a
        bias per token (a constant, not trained).
    dropout, attention_dropout
        Shares set to 0 in training: of embeddings and of what each part adds; of the attention weights.
    pad_id, start_id, eos_id
        Tokens: padding, the first of every target, the last one (or several). For checks and for generation.
    backend
        See :func:`attsvm.attention.functional.attend`.

    Raises
    ------
    InvalidInputError
        If a size or a kind is out of its range.
    """

    d_vocab: int
    d_model: int
    n_heads: int
    n_layers: int
    d_mlp: int
    n_decoder_layers: int | None = None
    n_decoder_heads: int | None = None
    d_decoder_mlp: int | None = None
    d_head: int | None = None
    n_ctx: int | None = None
    positions: str = "sinusoidal"
    position_offset: int = 0
    n_buckets: int = 32
    max_distance: int = 128
    place: str = "post"
    norm: str = "layer"
    norm_eps: float = 1e-5
    activation: str = "relu"
    bias: bool = True
    scale: float | None = None
    embedding_norm: bool = False
    scale_embedding: bool = True
    tied_head: bool = True
    scale_head: bool = False
    logits_bias: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    pad_id: int | None = None
    start_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in _SIZES:
            if (size := getattr(self, name)) is not None and size < 1:
                raise InvalidInputError(f"Seq2SeqConfig: {name} must be at least 1, got {size}.")
        if self.position_offset < 0:
            raise InvalidInputError(f"Seq2SeqConfig: position_offset must not be negative, got {self.position_offset}.")
        if self.positions not in _POSITIONS:
            raise InvalidInputError(
                f"Seq2SeqConfig: positions must be one of {', '.join(_POSITIONS)}, got {self.positions!r}."
            )
        if self.positions == "learned" and self.n_ctx is None:
            raise InvalidInputError("Seq2SeqConfig: n_ctx must be given with learned positions, got None.")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise InvalidInputError(
                f"Seq2SeqConfig: d_model must be even with sinusoidal positions, got {self.d_model}."
            )
        _ = self.block(decoder=False), self.block(decoder=True)  # check what blocks have

    def block(self, *, decoder: bool) -> BlockConfig:
        """What the blocks of one stack are made of."""
        return BlockConfig(
            d_model=self.d_model,
            n_heads=(self.n_decoder_heads or self.n_heads) if decoder else self.n_heads,
            d_mlp=(self.d_decoder_mlp or self.d_mlp) if decoder else self.d_mlp,
            d_head=self.d_head,
            activation=self.activation,
            place=self.place,
            norm=self.norm,
            norm_eps=self.norm_eps,
            cross=decoder,
            attention_bias=self.bias,
            mlp_bias=self.bias,
            scale=self.scale,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            backend=self.backend,
        )

    def depth(self, *, decoder: bool) -> int:
        """Number of blocks of one stack."""
        return self.n_layers if not decoder or self.n_decoder_layers is None else self.n_decoder_layers

    @property
    def n_parameters(self) -> int:
        """Numbers that training changes; a tied head counts once."""
        embeddings = self.d_vocab * self.d_model * (1 if self.tied_head else 2)
        return embeddings + self._stack_parameters(decoder=False) + self._stack_parameters(decoder=True)

    def _stack_parameters(self, *, decoder: bool) -> int:
        block = self.block(decoder=decoder)
        norms = norm_parameters(self.norm, self.d_model) * (self.embedding_norm + (self.place == "pre"))
        positions = 0
        if self.positions == "learned" and self.n_ctx is not None:
            positions = (self.n_ctx + self.position_offset) * self.d_model
        elif self.positions == "relative":
            positions = self.n_buckets * block.n_heads
        return self.depth(decoder=decoder) * block_parameters(block) + norms + positions

    def flops(self, length: int, target_length: int | None = None) -> int:
        """Floating-point operations of the matrix products of one forward pass over one pair (2 per multiply-add).

        Parameters
        ----------
        length
            Source tokens.
        target_length
            Target tokens; default: as many.
        """
        target_length = length if target_length is None else target_length
        encode = self.depth(decoder=False) * block_flops(self.block(decoder=False), length)
        decode = self.depth(decoder=True) * block_flops(self.block(decoder=True), target_length, context=length)
        return encode + decode + 2 * target_length * self.d_model * self.d_vocab


class Seq2SeqCache(KeyValueCache):
    """What the decoder need not compute again: its own keys and values, and those of the encoded source.

    Filled by the first call of :class:`Seq2Seq` that gets it; later calls need neither the source nor its mask.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__(capacity)
        self.cross = KeyValueCache()
        self.encoded: Tensor | None = None
        self.mask: Tensor | None = None

    def reorder(self, index: Tensor) -> None:
        """Row b of the batch becomes what row ``index[b]`` was, for beams."""
        super().reorder(index)
        self.cross.reorder(index)
        self.encoded = None if self.encoded is None else self.encoded.index_select(0, index)
        self.mask = None if self.mask is None else self.mask.index_select(0, index)


class Stack(nn.Module):
    """The embedding norm, positions, blocks and last norm of the encoder or of the decoder."""

    def __init__(self, config: Seq2SeqConfig, *, decoder: bool) -> None:
        super().__init__()
        self.config, self.decoder = config, decoder
        block = config.block(decoder=decoder)
        self.positions: LearnedPositions | None = None
        if config.positions == "learned" and config.n_ctx is not None:
            self.positions = LearnedPositions(config.n_ctx, config.d_model, offset=config.position_offset)
        self.relative_bias: RelativeBias | None = None
        if config.positions == "relative":
            self.relative_bias = RelativeBias(
                block.n_heads,
                n_buckets=config.n_buckets,
                max_distance=config.max_distance,
                bidirectional=not decoder,
            )
        self.embedding_norm = make_norm(
            config.norm if config.embedding_norm else "none", config.d_model, config.norm_eps
        )
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.depth(decoder=decoder)))
        self.norm = make_norm(config.norm if config.place == "pre" else "none", config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, x_BTD: Tensor, places: Tensor, length: int) -> Tensor:
        """Add the positions of ``places`` (B or 1, T), all below ``length``, to embeddings; normalise."""
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(places)
        elif self.config.positions == "sinusoidal":
            table = sinusoidal(length, x_BTD.shape[-1], dtype=x_BTD.dtype)
            x_BTD = x_BTD + table.to(x_BTD.device)[places]
        output: Tensor = self.dropout(self.embedding_norm(x_BTD))
        return output

    def bias(self, n_queries: int, n_keys: int) -> Tensor | None:
        """Relative bias of the last ``n_queries`` of ``n_keys`` positions, for all blocks."""
        if self.relative_bias is None:
            return None
        bias: Tensor = self.relative_bias(n_queries, n_keys)
        return bias


class Seq2Seq(nn.Module):
    """An encoder-decoder transformer with a language-model head.

    Examples
    --------
    >>> config = Seq2SeqConfig(d_vocab=11, d_model=8, n_heads=2, n_layers=1, d_mlp=16)
    >>> model = Seq2Seq(config)
    >>> source, target = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 4]])
    >>> output = model(source, target, weights=True)
    >>> output.logits.shape, output.weights["cross"][0].shape
    (torch.Size([1, 2, 11]), torch.Size([1, 2, 2, 3]))
    """

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.d_vocab, config.d_model)
        nn.init.normal_(self.tokens.weight, std=config.d_model**-0.5)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        self.head = None if config.tied_head else nn.Linear(config.d_model, config.d_vocab, bias=False)
        self.logits_bias: Tensor | None
        self.register_buffer("logits_bias", torch.zeros(1, config.d_vocab) if config.logits_bias else None)

    @property
    def n_parameters(self) -> int:
        """Number of trainable numbers; a tied head counts once."""
        return count_parameters(self)

    def new_cache(self, capacity: int = 0) -> Seq2SeqCache:
        """Make an empty cache for :meth:`forward`, with room for ``capacity`` target tokens."""
        return Seq2SeqCache(capacity)

    def encode(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, S, d_model) of source tokens (B, S); the mask (B, S) is True on tokens that count."""
        return self._encode(ids, attention_mask, weights=False)[0]

    def forward(
        self,
        ids: Tensor | None,
        decoder_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        decoder_mask: Tensor | None = None,
        cache: Seq2SeqCache | None = None,
        encoded: Tensor | None = None,
        weights: bool = False,
        last_logits: int | None = None,
    ) -> ModelOutput:
        """Logits of the token after each target token.

        Parameters
        ----------
        ids
            Source tokens (B, S); None where ``encoded`` or a filled cache holds what they say.
        decoder_ids
            Target tokens (B, T); with a cache, those that are new.
        attention_mask
            (B, S), True or 1 on the source tokens that count; default: all. Also needed beside ``encoded``.
        decoder_mask
            The same of the target, (B, all target tokens so far).
        cache
            From :meth:`new_cache`; keeps what the next call need not compute again. Once filled it is the source: ids,
            ``attention_mask`` and ``encoded`` are not looked at.
        encoded
            What :meth:`encode` returned, (B, S, d_model).
        weights
            Whether to return the patterns.
        last_logits
            Compute the logits of so many last tokens only (at least 1), as generation does; by default of all.

        Returns
        -------
        ModelOutput
            ``hidden`` (B, T, d_model), ``logits`` (B, T, d_vocab), and under "decoder" and "cross" one pattern per
            block; under "encoder" too where this call encoded.

        Raises
        ------
        InvalidInputError
            If ids or masks are not what they must be, do not fit together, or do not fit into the context.
        """
        if isinstance(cache, KeyValueCache) and not isinstance(cache, Seq2SeqCache):
            raise InvalidInputError("Seq2Seq: cache must be a Seq2SeqCache, from new_cache, got a KeyValueCache.")
        patterns: dict[str, list[Tensor]] = {}
        if cache is not None and cache.encoded is not None:
            encoded, attention_mask = cache.encoded, cache.mask
        elif encoded is None:
            if ids is None:
                raise InvalidInputError("Seq2Seq: ids must be given unless encoded or a filled cache is, got None.")
            encoded, patterns["encoder"] = self._encode(ids, attention_mask, weights=weights)
        hidden, patterns["decoder"], patterns["cross"] = self._decode(
            decoder_ids, decoder_mask, encoded, attention_mask, cache, weights=weights
        )
        if cache is not None:
            cache.encoded, cache.mask = encoded, attention_mask
        read = last_of("Seq2Seq", hidden, last_logits)
        return ModelOutput(hidden=hidden, logits=self.logits(read), weights=patterns if weights else None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., d_vocab) of hidden states (..., d_model) of the decoder."""
        if self.config.scale_head:
            hidden = hidden * self.config.d_model**-0.5
        weight = self.tokens.weight if self.head is None else self.head.weight
        logits = F.linear(hidden, weight)
        return logits if self.logits_bias is None else logits + self.logits_bias

    def _embed(self, stack: Stack, ids: Tensor, real: Tensor | None, past: int) -> Tensor:
        x_BTD = self.tokens(ids)
        if self.config.scale_embedding:
            x_BTD = x_BTD * math.sqrt(self.config.d_model)
        places = positions_of(real, length=ids.shape[1], past=past, device=ids.device)
        return stack.embed(x_BTD, places, past + ids.shape[1])

    def _encode(self, ids: Tensor, attention_mask: Tensor | None, *, weights: bool) -> tuple[Tensor, list[Tensor]]:
        config, S = self.config, ids.shape[-1]
        check_ids("Seq2Seq", ids, d_vocab=config.d_vocab, n_ctx=config.n_ctx)
        real = check_attention_mask("Seq2Seq", attention_mask, ids, pad_id=config.pad_id)
        x_BSD = self._embed(self.encoder, ids, real, 0)
        mask = None if real is None else padding_mask(real)
        bias = self.encoder.bias(S, S)
        patterns = []
        for block in self.encoder.blocks:
            x_BSD, pattern, _ = block(x_BSD, mask=mask, bias=bias, weights=weights)
            patterns.append(pattern)
        return self.encoder.norm(x_BSD), patterns

    def _decode(
        self,
        ids: Tensor,
        decoder_mask: Tensor | None,
        encoded: Tensor,
        attention_mask: Tensor | None,
        cache: Seq2SeqCache | None,
        *,
        weights: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        config, T = self.config, ids.shape[-1]
        past = 0 if cache is None else cache.length
        check_ids("Seq2Seq", ids, d_vocab=config.d_vocab, n_ctx=config.n_ctx, past=past, name="decoder_ids")
        # Without a mask padding at the end does no harm, as no earlier token sees it; some families start with it too.
        starts = past or decoder_mask is None or config.pad_id == config.start_id
        pad_id = None if starts else config.pad_id
        real = check_attention_mask("Seq2Seq (decoder_mask)", decoder_mask, ids, past=past, pad_id=pad_id)
        self._check_encoded(ids, encoded, attention_mask)
        x_BTD = self._embed(self.decoder, ids, real, past)
        mask = None if real is None else padding_mask(real)
        # A mask that hides nothing would keep attention from its fastest ways.
        hides = attention_mask is not None and (torch.compiler.is_compiling() or not attention_mask.all())
        cross_mask = padding_mask(attention_mask) if attention_mask is not None and hides else None
        bias = self.decoder.bias(T, past + T)
        patterns, cross_patterns = [], []
        for layer, block in enumerate(self.decoder.blocks):
            x_BTD, pattern, cross_pattern = block(
                x_BTD,
                mask=mask,
                bias=bias,
                causal=True,
                cache=cache,
                layer=layer,
                context=encoded,
                context_mask=cross_mask,
                context_cache=None if cache is None else cache.cross,
                weights=weights,
            )
            patterns.append(pattern)
            cross_patterns.append(cross_pattern)
        return self.decoder.norm(x_BTD), patterns, cross_patterns

    def _check_encoded(self, ids: Tensor, encoded: Tensor, attention_mask: Tensor | None) -> None:
        if encoded.ndim != 3 or len(encoded) != len(ids) or encoded.shape[-1] != self.config.d_model:
            raise InvalidInputError(
                f"Seq2Seq: encoded must be ({len(ids)}, S, {self.config.d_model}), got {tuple(encoded.shape)}."
            )
        if attention_mask is not None and attention_mask.shape != encoded.shape[:2]:
            raise InvalidInputError(
                f"Seq2Seq: attention_mask must have the shape {tuple(encoded.shape[:2])} of the source, "
                f"got {tuple(attention_mask.shape)}."
            )

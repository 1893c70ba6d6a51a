"""The encoder that reads in both directions: BERT and its kin.

Shapes: B sequences, T tokens, d = d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attsvm.attention.masks import padding_mask
from attsvm.errors import InvalidInputError
from attsvm.models.blocks import ACTIVATIONS, Block, BlockConfig, make_norm
from attsvm.models.checks import check_kinds
from attsvm.models.counts import block_flops, block_parameters, count_parameters
from attsvm.models.inputs import check_attention_mask, check_ids, positions_of
from attsvm.models.output import ModelOutput

__all__ = ["Encoder", "EncoderConfig"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes and kinds of an :class:`Encoder`; the defaults are those of BERT.

    Parameters
    ----------
    d_vocab, d_model, n_layers, n_heads, d_mlp, n_ctx
        Sizes. ``n_ctx`` is the longest sequence.
    n_segments
        Kinds of segment (sentence A, sentence B); 0 for none.
    activation, place, norm_eps
        See :class:`attsvm.models.blocks.BlockConfig`.
    pooled
        Whether there is a pooled output, tanh of a linear map of the first token.
    masked_head
        Whether there is a head that predicts masked tokens; its last matrix is that of the token embeddings.
    tied
        Whether it is; else the head has a matrix of its own.
    next_sentence_head
        Whether there is a linear map from the pooled output to (is next, is not next).
    dropout, attention_dropout
        Shares set to 0 in training.
    pad_id
        Id of the padding; None if there is none.
    backend
        See :func:`attsvm.attention.functional.attend`.

    Raises
    ------
    InvalidInputError
        If a size is out of its range.
    """

    d_vocab: int
    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int
    n_ctx: int = 512
    n_segments: int = 2
    activation: str = "gelu"
    place: str = "post"
    norm_eps: float = 1e-12
    pooled: bool = False
    masked_head: bool = False
    tied: bool = True
    next_sentence_head: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    pad_id: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("d_vocab", "d_model", "n_layers", "n_heads", "n_ctx"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise InvalidInputError(f"EncoderConfig: {name} must be an integer of at least 1, got {size!r}.")
        if self.next_sentence_head and not self.pooled:
            raise InvalidInputError("EncoderConfig: pooled must be True for next_sentence_head, got False.")
        if self.masked_head and self.activation not in ACTIVATIONS:
            raise InvalidInputError(
                f"EncoderConfig: activation must be one of {', '.join(ACTIVATIONS)} for masked_head, "
                f"got {self.activation!r}."
            )
        _ = self.block  # checks what blocks have
        check_kinds(self)
        if self.n_segments < 0:
            raise InvalidInputError(f"EncoderConfig: n_segments must be at least 0, got {self.n_segments}.")

    @property
    def block(self) -> BlockConfig:
        """What each layer is."""
        return BlockConfig(
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_mlp=self.d_mlp,
            activation=self.activation,
            place=self.place,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            backend=self.backend,
        )

    @property
    def n_parameters(self) -> int:
        """Numbers that training changes; a matrix used twice counts once."""
        d = self.d_model
        total = (self.d_vocab + self.n_ctx + self.n_segments) * d + 2 * d
        total += self.n_layers * block_parameters(self.block)
        total += 2 * d if self.place == "pre" else 0
        total += d * d + d if self.pooled else 0
        total += 2 * d + 2 if self.next_sentence_head else 0
        if self.masked_head:
            total += d * d + d + 2 * d + self.d_vocab + (0 if self.tied else self.d_vocab * d)
        return total

    def flops(self, length: int) -> int:
        """Operations of the matrix products of one forward pass over one sequence (2 per multiply-add)."""
        total = self.n_layers * block_flops(self.block, length)
        total += 2 * self.d_model**2 if self.pooled else 0
        if self.masked_head:
            total += 2 * length * self.d_model * (self.d_model + self.d_vocab)
        return total


class MaskedHead(nn.Module):
    """From hidden states to logits: linear, activation, normalisation, token embeddings transposed."""

    def __init__(self, config: EncoderConfig, embedding: nn.Embedding) -> None:
        super().__init__()
        self.transform = nn.Linear(config.d_model, config.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = make_norm("layer", config.d_model, config.norm_eps)
        self.decoder = nn.Linear(config.d_model, config.d_vocab)
        if config.tied:
            self.decoder.weight = embedding.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, d_model) to (B, T, d_vocab)."""
        logits: Tensor = self.decoder(self.norm(self.activation(self.transform(hidden))))
        return logits


class Encoder(nn.Module):
    """Bidirectional transformer: learned positions and segments, blocks, and BERT's optional heads.

    Parameters
    ----------
    config
        See :class:`EncoderConfig`.

    References
    ----------
    Devlin, Chang, Lee, Toutanova. "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
    2018. arXiv:1810.04805.

    Examples
    --------
    >>> encoder = Encoder(EncoderConfig(d_vocab=10, d_model=8, n_layers=2, n_heads=2, d_mlp=16))
    >>> output = encoder(torch.tensor([[1, 2, 3]]), weights=True)
    >>> output.hidden.shape, output.weights["encoder"][1].shape
    (torch.Size([1, 3, 8]), torch.Size([1, 2, 3, 3]))
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.d_vocab, config.d_model)
        self.positions = nn.Embedding(config.n_ctx, config.d_model)
        self.segments = nn.Embedding(config.n_segments, config.d_model) if config.n_segments else None
        for table in (self.tokens, self.positions, self.segments):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        self.norm = make_norm("layer", config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config.block) for _ in range(config.n_layers)])
        # Pre-norm blocks leave a sum behind that nobody has normalised.
        self.final_norm = make_norm("layer", config.d_model, config.norm_eps) if config.place == "pre" else None
        self.pooler = nn.Linear(config.d_model, config.d_model) if config.pooled else None
        self.head = MaskedHead(config, self.tokens) if config.masked_head else None
        self.next_sentence = nn.Linear(config.d_model, 2) if config.next_sentence_head else None

    @property
    def n_parameters(self) -> int:
        """Numbers that training changes."""
        return count_parameters(self)

    def forward(
        self,
        ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        segments: Tensor | None = None,
        weights: bool = False,
    ) -> ModelOutput:
        """Encode ids (B, T).

        Parameters
        ----------
        ids
            Token ids.
        attention_mask
            (B, T), True or 1 = real token. Positions are counted over real tokens, so that padding on the left and on
            the right give the same.
        segments
            Segment ids (B, T); by default 0.
        weights
            Whether to return the attention patterns of all layers.

        Returns
        -------
        ModelOutput
            ``logits`` with a masked head, ``pooled`` with a pooler.

        Raises
        ------
        InvalidInputError
            If ids, mask or segments are not what they must be.
        """
        config = self.config
        check_ids("Encoder", ids, d_vocab=config.d_vocab, n_ctx=config.n_ctx)
        real = check_attention_mask("Encoder", attention_mask, ids, pad_id=config.pad_id)
        x = self.dropout(self.norm(self._embed(ids, real, segments)))
        mask = None if real is None else padding_mask(real)
        patterns: list[Tensor] = []
        for block in self.blocks:
            x, pattern, _ = block(x, mask=mask, weights=weights)
            if pattern is not None:
                patterns.append(pattern)
        hidden = x if self.final_norm is None else self.final_norm(x)
        return ModelOutput(
            hidden=hidden,
            logits=None if self.head is None else self.head(hidden),
            weights={"encoder": patterns} if weights else None,
            pooled=None if self.pooler is None else torch.tanh(self.pooler(_first_real(hidden, real))),
        )

    def _embed(self, ids: Tensor, real: Tensor | None, segments: Tensor | None) -> Tensor:
        positions = positions_of(real, length=ids.shape[1], past=0, device=ids.device)
        x: Tensor = self.tokens(ids) + self.positions(positions)
        if self.segments is None:
            if segments is not None:
                raise InvalidInputError("Encoder: segments must be None in a model without segments, got a tensor.")
            return x
        if segments is None:
            return x + self.segments.weight[0]
        if segments.shape != ids.shape:
            raise InvalidInputError(
                f"Encoder: segments must have the shape of ids, {tuple(ids.shape)}, got {tuple(segments.shape)}."
            )
        check_ids("Encoder", segments, d_vocab=self.config.n_segments, n_ctx=None, name="segments")
        total: Tensor = x + self.segments(segments)
        return total


def _first_real(hidden: Tensor, real: Tensor | None) -> Tensor:
    """The first token (B, d_model) of each sequence that is not padding."""
    if real is None:
        return hidden[:, 0]
    return hidden[torch.arange(len(hidden), device=hidden.device), real.long().argmax(-1)]

r"""Hierarchical attention: words pooled to sentences, sentences to a document, each level with weights of its own.

Of T tokens $h_t$, additive attention with a context vector u makes one vector:

$$a_t = u^\top \tanh(W h_t + b), \qquad w_t = \frac{m_t\, e^{a_t}}{\sum_s m_s\, e^{a_s}}, \qquad s = \sum_t w_t h_t ,$$

where m is 1 for tokens that may be attended. Where none may, s = 0 and no weight is given.

Shapes: B documents, S sentences, T words, D d_model, C d_context.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attsvm.errors import InvalidInputError

__all__ = ["AdditivePooling", "HierarchicalAttended", "HierarchicalAttention", "Pooled"]


class Pooled(NamedTuple):
    """One vector for each group of tokens (..., D), and the weights of the tokens (..., T)."""

    output: Tensor
    weights: Tensor


class HierarchicalAttended(NamedTuple):
    """What hierarchical attention returns.

    Attributes
    ----------
    output
        (B, D) vectors of the documents.
    sentences
        (B, S, D) vectors of the sentences, before the encoder of sentences.
    word_weights
        (B, S, T): they sum to 1 in each sentence with a word, and are 0 in others.
    sentence_weights
        (B, S): they sum to 1 in each document with a sentence, and are 0 in others.
    """

    output: Tensor
    sentences: Tensor
    word_weights: Tensor
    sentence_weights: Tensor

    def token_weights(self) -> Tensor:
        """Return the part (B, S, T) that each word has in its document: the product of the weights on its way."""
        return self.word_weights * self.sentence_weights[..., None]


class AdditivePooling(nn.Module):
    r"""Pool tokens to one vector with weights $\mathrm{softmax}_t\, u^\top \tanh(W h_t + b)$.

    Parameters
    ----------
    d_model
        Size of the tokens h.
    d_context
        Size of the context vector u; default ``d_model``.

    Notes
    -----
    Modules: ``projection`` (W and b) and the parameter ``context`` (u), which starts as a normal vector of length
    about 1. The softmax works in float32 at least. Cost 2 T D C operations for T tokens.

    References
    ----------
    Bahdanau, Cho, Bengio. "Neural Machine Translation by Jointly Learning to Align and Translate", 2014.
    arXiv:1409.0473, appendix A.1.2.

    Examples
    --------
    >>> pooling = AdditivePooling(2)
    >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> pooling(tokens, torch.tensor([[True, False]])).weights.tolist()
    [[1.0, 0.0]]
    """

    def __init__(self, d_model: int, d_context: int | None = None) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_context", d_model if d_context is None else d_context)):
            if value < 1:
                raise InvalidInputError(f"AdditivePooling: {name} must be at least 1, got {value}.")
        self.d_model = d_model
        self.d_context = d_model if d_context is None else d_context
        self.projection = nn.Linear(d_model, self.d_context)
        self.context = nn.Parameter(torch.randn(self.d_context) / self.d_context**0.5)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Pooled:
        """Pool.

        Parameters
        ----------
        tokens
            (..., T, D).
        mask
            (..., T) booleans, True = may be attended. Default: every token.

        Returns
        -------
        Pooled
            ``output`` (..., D) and ``weights`` (..., T); both 0 where no token may be attended.

        Raises
        ------
        InvalidInputError
            If a shape or a dtype does not fit; the message names the argument.
        """
        if tokens.ndim < 2 or not tokens.is_floating_point() or tokens.shape[-1] != self.d_model:
            raise InvalidInputError(
                f"AdditivePooling: tokens must be floating point of shape (..., T, {self.d_model}), got {tokens.dtype} "
                f"of shape {tuple(tokens.shape)}."
            )
        if mask is not None:
            _check_mask("AdditivePooling", "mask", mask, tokens.shape[:-1])
        # Padding may hold anything, NaN too; a weight of 0 would not keep that out of the sum, nor out of gradients.
        kept = tokens if mask is None else tokens.masked_fill(~mask[..., None], 0.0)
        logits = torch.tanh(self.projection(kept)) @ self.context
        weights = _softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), mask)
        output = (weights.to(tokens.dtype).unsqueeze(-2) @ kept).squeeze(-2)
        return Pooled(output, weights)


class HierarchicalAttention(nn.Module):
    r"""Hierarchical attention over words and sentences.

    Words (B, S, T, D) are pooled to sentences, sentences to a document, by one :class:`AdditivePooling` for each
    level:

    $$s_j = \sum_t w_{jt} h_{jt}, \qquad g = f(s_1, \dots, s_S), \qquad d = \sum_j w_j g_j ,$$

    with an optional encoder f of the sentences in between.

    Parameters
    ----------
    d_model
        Size D of tokens, sentences and documents.
    d_context
        Size of the context vectors; default ``d_model``.
    encoder
        A module ``(sentences (B, S, D), mask (B, S)) -> (B, S, D)`` such as a recurrent or attention layer, so that
        sentences know of each other. Default: none. What it returns for empty sentences is not used.

    Notes
    -----
    A sentence with no word allowed has the vector 0 and is not attended to by its document; a document with no
    sentence allowed has the vector 0. Neither sends a gradient.

    References
    ----------
    Yang, Yang, Dyer, He, Smola, Hovy. "Hierarchical Attention Networks for Document Classification", 2016. NAACL,
    equations 5 to 10.

    Examples
    --------
    >>> model = HierarchicalAttention(4)
    >>> words = torch.ones(2, 3, 5, 4)
    >>> found = model(words)
    >>> found.output.shape, found.word_weights.shape, found.sentence_weights.shape
    (torch.Size([2, 4]), torch.Size([2, 3, 5]), torch.Size([2, 3]))
    """

    def __init__(self, d_model: int, *, d_context: int | None = None, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.words = AdditivePooling(d_model, d_context)
        self.encoder = encoder
        self.sentences = AdditivePooling(d_model, d_context)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, *, sentence_mask: Tensor | None = None
    ) -> HierarchicalAttended:
        """Pool words to sentences and sentences to documents.

        Parameters
        ----------
        tokens
            (B, S, T, D), ragged documents padded anywhere.
        mask
            (B, S, T) booleans, True = may be attended. Default: every word.
        sentence_mask
            (B, S) booleans to leave whole sentences out of the document; those without words are left out anyway.
            Their words are still pooled.

        Returns
        -------
        HierarchicalAttended
            ``output`` (B, D), ``sentences`` (B, S, D), ``word_weights`` (B, S, T), ``sentence_weights`` (B, S).

        Raises
        ------
        InvalidInputError
            If a shape or a dtype does not fit; the message names the argument.
        """
        d_model = self.words.d_model
        if tokens.ndim != 4 or not tokens.is_floating_point() or tokens.shape[-1] != d_model:
            raise InvalidInputError(
                f"HierarchicalAttention: tokens must be floating point of shape (B, S, T, {d_model}), got "
                f"{tokens.dtype} of shape {tuple(tokens.shape)}."
            )
        B, S, T, _ = tokens.shape
        if mask is not None:
            _check_mask("HierarchicalAttention", "mask", mask, (B, S, T))
        if sentence_mask is not None:
            _check_mask("HierarchicalAttention", "sentence_mask", sentence_mask, (B, S))
        words = self.words(tokens, mask)
        there = tokens.new_full((B, S), T > 0, dtype=torch.bool) if mask is None else mask.any(-1)
        if sentence_mask is not None:
            there = there & sentence_mask
        sentences = words.output if self.encoder is None else self.encoder(words.output, there)
        document = self.sentences(sentences, there)
        return HierarchicalAttended(document.output, words.output, words.weights, document.weights)


def _softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the allowed places; 0 everywhere where there is none."""
    if mask is None:
        return logits.softmax(-1)
    # Rows without a place are made finite before the softmax: no NaN arises, which anomaly detection would report.
    empty = ~mask.any(-1, keepdim=True)
    logits = logits.masked_fill(~mask, -torch.inf).masked_fill(empty, 0.0)
    return logits.softmax(-1).masked_fill(empty, 0.0)


def _check_mask(where: str, name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool or mask.shape != shape:
        raise InvalidInputError(
            f"{where}: {name} must be booleans of shape {tuple(shape)}, True = may be attended, got {mask.dtype} of "
            f"shape {tuple(mask.shape)}."
        )

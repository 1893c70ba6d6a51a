r"""The recurrent networks that attention replaced: an LSTM language model, and an LSTM encoder-decoder with attention.

Shapes: B sequences, T tokens, S source tokens, d = d_model, e = width of what the encoder returns (d, or 2 d when it
reads both ways), a = d_attention, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attsvm.errors import InvalidInputError
from attsvm.models.checks import check_kinds, check_share
from attsvm.models.output import ModelOutput

__all__ = [
    "AdditiveAttention",
    "EncodedSource",
    "LSTMConfig",
    "LSTMLanguageModel",
    "LSTMSeq2Seq",
    "LSTMSeq2SeqConfig",
    "LSTMState",
    "RecurrentOutput",
]


class LSTMState(NamedTuple):
    """All that a network remembers of what it has read, however much that was: ``hidden``, ``cell`` (L, B, d)."""

    hidden: Tensor
    cell: Tensor

    def reorder(self, index: Tensor) -> LSTMState:
        """The states of sequences ``index``, as beam search needs them."""
        return LSTMState(self.hidden.index_select(1, index), self.cell.index_select(1, index))


class EncodedSource(NamedTuple):
    """What the encoder hands over: a vector per token, for attention; its last state; which tokens are real.

    ``hidden`` (B, S, e), ``keys`` (B, S, a) or None without attention, ``state``, ``mask`` (B, S) or None.
    """

    hidden: Tensor
    keys: Tensor | None
    state: LSTMState
    mask: Tensor | None


@dataclass(frozen=True, kw_only=True)
class RecurrentOutput(ModelOutput):
    """A :class:`~attsvm.models.output.ModelOutput` with the state after the last token, to go on from."""

    state: LSTMState


@dataclass(frozen=True, kw_only=True)
class LSTMConfig:
    """Sizes of an LSTM language model.

    Parameters
    ----------
    d_vocab
        Number of tokens.
    d_model
        Size of embeddings and states.
    n_layers
        LSTMs on top of each other.
    dropout
        Between the layers, in training.
    forget_bias
        Start value of the forget gate's bias. At 1 an untrained cell keeps 73 % of its content at each step, at 0 half.

    References
    ----------
    Hochreiter, Schmidhuber. "Long Short-Term Memory", Neural Computation 9(8), 1997.
    Jozefowicz, Zaremba, Sutskever. "An Empirical Exploration of Recurrent Network Architectures", ICML 2015 (the bias).
    """

    d_vocab: int
    d_model: int
    n_layers: int = 1
    dropout: float = 0.0
    forget_bias: float = 1.0

    def __post_init__(self) -> None:
        _check_sizes(self, "d_vocab", "d_model", "n_layers")

    @property
    def n_parameters(self) -> int:
        """Numbers that training changes."""
        d, V = self.d_model, self.d_vocab
        return V * d + self.n_layers * _layer_parameters(d, d) + (d + 1) * V

    def flops(self, T: int) -> int:
        """Floating-point operations of the matrix products of one sequence, forward; linear in its length."""
        return T * (self.n_layers * _layer_flops(self.d_model, self.d_model) + 2 * self.d_model * self.d_vocab)


@dataclass(frozen=True, kw_only=True)
class LSTMSeq2SeqConfig:
    """Sizes of an LSTM encoder-decoder.

    Parameters
    ----------
    d_vocab
        Number of tokens of the target.
    d_model
        Size of embeddings and states.
    d_source_vocab
        Number of tokens of the source; default: as many.
    n_layers
        Layers of the encoder, and of the decoder.
    attention
        Whether each target step looks at all source tokens. Else all it knows of them is the encoder's last state.
    d_attention
        Width of the attention's hidden layer; default: ``d_model``.
    bidirectional
        Whether the encoder reads both ways.
    dropout, forget_bias
        As in :class:`LSTMConfig`.

    References
    ----------
    Sutskever, Vinyals, Le. "Sequence to Sequence Learning with Neural Networks", 2014. arXiv:1409.3215.
    Bahdanau, Cho, Bengio. "Neural Machine Translation by Jointly Learning to Align and Translate", 2014.
    arXiv:1409.0473, appendix A.
    """

    d_vocab: int
    d_model: int
    d_source_vocab: int | None = None
    n_layers: int = 1
    attention: bool = True
    d_attention: int | None = None
    bidirectional: bool = False
    dropout: float = 0.0
    forget_bias: float = 1.0

    def __post_init__(self) -> None:
        _check_sizes(self, "d_vocab", "d_model", "n_layers", "d_source_vocab", "d_attention")

    @property
    def d_encoded(self) -> int:
        """Width of the vectors that the encoder returns."""
        return self.d_model * (2 if self.bidirectional else 1)

    @property
    def n_parameters(self) -> int:
        """Numbers that training changes."""
        d, e, a, V = self.d_model, self.d_encoded, self.d_attention or self.d_model, self.d_vocab
        ways, more = e // d, self.n_layers - 1
        tables = (V + (self.d_source_vocab or V)) * d + (d + 1) * V
        encoder = ways * (_layer_parameters(d, d) + more * _layer_parameters(e, d))
        bridge = 2 * (e + 1) * d if self.bidirectional else 0
        decoder = _layer_parameters(d + e if self.attention else d, d) + more * _layer_parameters(d, d)
        attention = (d + e + 2) * a + (d + e + 1) * d if self.attention else 0
        return tables + encoder + bridge + decoder + attention

    def flops(self, T: int, n_target: int | None = None) -> int:
        """Floating-point operations of the matrix products of one pair, forward.

        Parameters
        ----------
        T
            Tokens of the source.
        n_target
            Tokens of the target; default: as many. With attention the cost has a term in the product of both.
        """
        n_target = T if n_target is None else n_target
        d, e, a = self.d_model, self.d_encoded, self.d_attention or self.d_model
        ways = e // d
        encoder = T * ways * (_layer_flops(d, d) + (self.n_layers - 1) * _layer_flops(e, d))
        bridge = 2 * 2 * self.n_layers * e * d if self.bidirectional else 0
        first = _layer_flops(d + e if self.attention else d, d)
        decoder = n_target * (first + (self.n_layers - 1) * _layer_flops(d, d) + 2 * d * self.d_vocab)
        if not self.attention:
            return encoder + bridge + decoder
        each_pair = 2 * a + 2 * e
        return encoder + bridge + decoder + 2 * T * e * a + n_target * (2 * d * a + 2 * (d + e) * d + T * each_pair)


class AdditiveAttention(nn.Module):
    r"""Attention whose logits are a small network of query and key, $e_{qk} = v^\top \tanh(W s_q + U h_k)$.

    Unlike the scaled dot product this is no matrix product: each pair costs ``d_attention`` hyperbolic tangents.

    References
    ----------
    Bahdanau, Cho, Bengio. "Neural Machine Translation by Jointly Learning to Align and Translate", 2014.
    arXiv:1409.0473, section 3.1.
    """

    def __init__(self, d_query: int, d_context: int, d_attention: int) -> None:
        super().__init__()
        self.query = nn.Linear(d_query, d_attention, bias=False)
        self.key = nn.Linear(d_context, d_attention)
        self.score = nn.Linear(d_attention, 1, bias=False)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Parameters
        ----------
        queries
            (B, q, d_query).
        keys
            (B, k, d_attention): ``self.key`` of the context, computed once for all queries.
        values
            (B, k, d_context).
        mask
            Bool, broadcastable to (B, q, k), True = may be attended. A query without any key gets 0.

        Returns
        -------
        tuple
            What was found (B, q, d_context), and the weights (B, q, k).
        """
        logits = self.score(torch.tanh(self.query(queries)[:, :, None] + keys[:, None])).squeeze(-1)
        if mask is None:
            weights = logits.softmax(-1)
        else:
            # Rows without any key go through softmax unmasked, so that no NaN comes back in the gradient either.
            some = mask.any(-1, keepdim=True)
            weights = logits.masked_fill(~mask & some, -torch.inf).softmax(-1) * some
        return weights @ values, weights


class LSTMLanguageModel(nn.Module):
    """An LSTM that predicts each next token from a state of fixed size.

    Parameters
    ----------
    config
        The sizes.
    """

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.d_vocab, config.d_model)
        self.lstm = _lstm(config.d_model, config)
        self.head = nn.Linear(config.d_model, config.d_vocab)

    @property
    def n_parameters(self) -> int:
        """Number of trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self, ids: Tensor, *, attention_mask: Tensor | None = None, state: LSTMState | None = None
    ) -> RecurrentOutput:
        """Read tokens and predict the next after each.

        Parameters
        ----------
        ids
            (B, T).
        attention_mask
            (B, T), True or 1 for real tokens. The others are passed over as if they were not there, wherever they are,
            and get hidden state 0.
        state
            Of the tokens before these, as an earlier call returned it.

        Raises
        ------
        InvalidInputError
            If ids, mask or state do not fit.
        """
        _check_ids("ids", ids, self.config.d_vocab)
        mask = _checked_mask("attention_mask", attention_mask, ids)
        _check_state(state, ids, self.config)
        hidden, state = _run(self.lstm, self.embedding(ids), mask, state)
        return RecurrentOutput(hidden=hidden, logits=self.head(hidden), state=state)


class LSTMSeq2Seq(nn.Module):
    """An LSTM that reads a source, and one that writes the target, with or without looking back at the source.

    With attention, step t of the target asks with the state of step t - 1, and gets what it found as a part of its
    input; so the steps cannot be computed side by side, not even in training.

    Parameters
    ----------
    config
        The sizes, and whether there is attention.
    """

    def __init__(self, config: LSTMSeq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        d, e, a = config.d_model, config.d_encoded, config.d_attention or config.d_model
        self.source_embedding = nn.Embedding(config.d_source_vocab or config.d_vocab, d)
        self.embedding = nn.Embedding(config.d_vocab, d)
        self.encoder = _lstm(d, config, bidirectional=config.bidirectional)
        self.bridge = nn.ModuleList([nn.Linear(e, d), nn.Linear(e, d)]) if config.bidirectional else None
        self.attention = AdditiveAttention(d, e, a) if config.attention else None
        self.decoder = _lstm(d + e if config.attention else d, config)
        self.readout = nn.Linear(d + e, d) if config.attention else None
        self.head = nn.Linear(d, config.d_vocab)

    @property
    def n_parameters(self) -> int:
        """Number of trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def encode(self, ids: Tensor, attention_mask: Tensor | None = None) -> EncodedSource:
        """Read the source ``ids`` (B, S); ``attention_mask`` as in :meth:`LSTMLanguageModel.forward`."""
        _check_ids("ids", ids, self.config.d_source_vocab or self.config.d_vocab)
        mask = _checked_mask("attention_mask", attention_mask, ids)
        hidden, state = _run(self.encoder, self.source_embedding(ids), mask, None)
        keys = None if self.attention is None else self.attention.key(hidden)
        return EncodedSource(hidden, keys, self._bridged(state), mask)

    def _bridged(self, state: LSTMState) -> LSTMState:
        """The encoder's state as the decoder's; the two ways of a layer are merged."""
        if self.bridge is None:
            return state
        hidden, cell = (
            linear(part.reshape(self.config.n_layers, 2, *part.shape[1:]).transpose(1, 2).flatten(2))
            for linear, part in zip(self.bridge, state, strict=True)
        )
        return LSTMState(hidden.tanh().contiguous(), cell.contiguous())

    def forward(
        self,
        ids: Tensor | None,
        decoder_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        decoder_mask: Tensor | None = None,
        encoded: EncodedSource | None = None,
        state: LSTMState | None = None,
        weights: bool = False,
    ) -> RecurrentOutput:
        """Read the source, and predict the next token after each of the target.

        Parameters
        ----------
        ids
            Source (B, S). None when ``encoded`` is given.
        decoder_ids
            Target so far (B, T).
        attention_mask, decoder_mask
            Which tokens of source and target are real; the others are passed over.
        encoded
            What :meth:`encode` returned, to spare reading the source again.
        state
            Of the target tokens before these, as an earlier call returned it; default: the encoder's last.
        weights
            Also return how much each target step attends to each source token, under ``"cross"``: one (B, 1, T, S).

        Raises
        ------
        InvalidInputError
            If an argument does not fit, or weights are asked of a model without attention.
        """
        if (ids is None) == (encoded is None):
            raise InvalidInputError("LSTMSeq2Seq: either ids or encoded must be given, got both or neither.")
        if weights and self.attention is None:
            raise InvalidInputError("LSTMSeq2Seq: weights must be False for a model without attention, got True.")
        _check_ids("decoder_ids", decoder_ids, self.config.d_vocab)
        mask = _checked_mask("decoder_mask", decoder_mask, decoder_ids)
        _check_state(state, decoder_ids, self.config)
        if encoded is None:
            assert ids is not None
            encoded = self.encode(ids, attention_mask)
        if len(encoded.hidden) != len(decoder_ids):
            raise InvalidInputError(
                f"LSTMSeq2Seq: decoder_ids must have as many sequences as the source, {len(encoded.hidden)}, "
                f"got {len(decoder_ids)}."
            )
        x_BTd, state = self.embedding(decoder_ids), state or encoded.state
        if self.attention is None:
            hidden, state = _run(self.decoder, x_BTd, mask, state)
            return RecurrentOutput(hidden=hidden, logits=self.head(hidden), state=state)
        hidden, state, patterns = self._attentive(x_BTd, mask, state, encoded)
        cross = {"cross": [patterns[:, None]]} if weights else None
        return RecurrentOutput(hidden=hidden, logits=self.head(hidden), weights=cross, state=state)

    def _attentive(
        self, x_BTd: Tensor, mask: Tensor | None, state: LSTMState, encoded: EncodedSource
    ) -> tuple[Tensor, LSTMState, Tensor]:
        """Hidden states (B, T, d), the last state and the patterns (B, T, S), step after step."""
        assert self.attention is not None
        assert self.readout is not None
        assert encoded.keys is not None
        source_mask = None if encoded.mask is None else encoded.mask[:, None]
        seen, patterns = [], []
        for t in range(x_BTd.shape[1]):
            found, weights = self.attention(state.hidden[-1][:, None], encoded.keys, encoded.hidden, mask=source_mask)
            one = None if mask is None else mask[:, t : t + 1]
            step_B1d, state = _run(self.decoder, torch.cat((x_BTd[:, t : t + 1], found), -1), one, state)
            seen.append(torch.cat((step_B1d, found), -1))
            patterns.append(weights)
        hidden, pattern_BTS = torch.tanh(self.readout(torch.cat(seen, 1))), torch.cat(patterns, 1)
        if mask is not None:
            hidden, pattern_BTS = hidden * mask[..., None], pattern_BTS * mask[..., None]
        return hidden, state, pattern_BTS


def _lstm(d_input: int, config: LSTMConfig | LSTMSeq2SeqConfig, *, bidirectional: bool = False) -> nn.LSTM:
    """Torch's LSTM, with biases that start at 0 except for the forget gate."""
    lstm = nn.LSTM(
        d_input,
        config.d_model,
        config.n_layers,
        batch_first=True,
        dropout=config.dropout if config.n_layers > 1 else 0.0,  # it has no place in a single layer, and torch warns
        bidirectional=bidirectional,
    )
    d = config.d_model
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            if name.startswith("bias"):  # two biases are added; the gates are input, forget, cell, output
                parameter.zero_()
                parameter[d : 2 * d] = config.forget_bias / 2
    return lstm


def _run(lstm: nn.LSTM, x_BTd: Tensor, mask: Tensor | None, state: LSTMState | None) -> tuple[Tensor, LSTMState]:
    """Outputs (B, T, d) and the state after the last real token; tokens that are masked out leave no trace."""
    if mask is None or bool(mask.all()):
        output, last = lstm(x_BTd, state)
        return output, LSTMState(*last)
    # The real tokens are moved to the front, in their order, and back.
    order_BT = (~mask).long().argsort(dim=1, stable=True)
    lengths = mask.sum(1)
    packed = pack_padded_sequence(
        x_BTd.gather(1, order_BT[..., None].expand_as(x_BTd)),
        lengths.clamp(min=1).cpu(),  # torch takes no empty sequences; they are put right below
        batch_first=True,
        enforce_sorted=False,
    )
    output, last = lstm(packed, state)
    front, _ = pad_packed_sequence(output, batch_first=True, total_length=mask.shape[1])
    placed = torch.zeros_like(front).scatter(1, order_BT[..., None].expand_as(front), front)
    before = last if state is None else state
    some = (lengths > 0)[:, None]
    kept = (
        torch.where(some, new, torch.zeros_like(new) if state is None else old)
        for new, old in zip(last, before, strict=True)
    )
    return placed * mask[..., None], LSTMState(*kept)


def _layer_flops(d_input: int, d: int) -> int:
    """Operations of one LSTM layer for one token."""
    return 2 * 4 * d * (d_input + d)


def _layer_parameters(d_input: int, d: int) -> int:
    """Parameters of one LSTM layer, in one direction; torch adds two biases."""
    return 4 * d * (d_input + d + 2)


def _check_sizes(config: LSTMConfig | LSTMSeq2SeqConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InvalidInputError(f"{type(config).__name__}: {name} must be a positive integer, got {value!r}.")
    check_kinds(config)
    check_share(config, "dropout")


def _check_ids(name: str, ids: Tensor, d_vocab: int) -> None:
    if not isinstance(ids, Tensor):
        raise InvalidInputError(f"LSTM: {name} must be a tensor of integers (B, T), got {type(ids).__name__}.")
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise InvalidInputError(
            f"LSTM: {name} must be integers (B, T) with at least one token, got {tuple(ids.shape)} of {ids.dtype}."
        )
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= d_vocab:
        raise InvalidInputError(f"LSTM: {name} must lie in [0, {d_vocab}), got {low if low < 0 else high}.")


def _checked_mask(name: str, mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """The mask as bool; anything but zeros and ones of the shape of the tokens is refused."""
    if mask is None:
        return None
    if mask.shape != ids.shape:
        raise InvalidInputError(f"LSTM: {name} must be {tuple(ids.shape)}, as the tokens are, got {tuple(mask.shape)}.")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise InvalidInputError(f"LSTM: {name} must hold True and False, or 1 and 0, got other values.")
    return mask.bool()


def _check_state(state: LSTMState | None, ids: Tensor, config: LSTMConfig | LSTMSeq2SeqConfig) -> None:
    wanted = (config.n_layers, len(ids), config.d_model)
    for part in state or ():
        if part.shape != wanted:
            raise InvalidInputError(f"LSTM: state must be a pair of {wanted}, got {tuple(part.shape)}.")

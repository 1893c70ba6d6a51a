"""The recurrent comparators: equal to their formulas, blind to padding, and as large as they say."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attsvm.errors import InvalidInputError
from attsvm.models.recurrent import (
    AdditiveAttention,
    LSTMConfig,
    LSTMLanguageModel,
    LSTMSeq2Seq,
    LSTMSeq2SeqConfig,
)

LAYOUTS = [
    pytest.param({"attention": attention, "bidirectional": both, "n_layers": layers}, id=f"{attention}-{both}-{layers}")
    for attention in (True, False)
    for both in (True, False)
    for layers in (1, 2)
]


def language_model(**options: int) -> LSTMLanguageModel:
    torch.manual_seed(0)
    return LSTMLanguageModel(LSTMConfig(**{"d_vocab": 11, "d_model": 8, "n_layers": 2, **options})).double()


def seq2seq(**options: object) -> LSTMSeq2Seq:
    torch.manual_seed(0)
    sizes: dict[str, object] = {"d_vocab": 11, "d_source_vocab": 7, "d_model": 8}
    return LSTMSeq2Seq(LSTMSeq2SeqConfig(**{**sizes, **options})).double()  # type: ignore[arg-type]


def draw(*shape: int, high: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def test_cell_is_the_formula() -> None:
    model = language_model(n_layers=1)
    ids, d = draw(2, 5), 8
    lstm, h, c = model.lstm, torch.zeros(2, d).double(), torch.zeros(2, d).double()
    expected = []
    for t in range(5):
        gates = model.embedding(ids[:, t]) @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + h @ lstm.weight_hh_l0.T
        i, f, g, o = (gates + lstm.bias_hh_l0).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        expected.append(h)
    output = model(ids)
    torch.testing.assert_close(output.hidden, torch.stack(expected, 1), rtol=0, atol=1e-13)
    torch.testing.assert_close(output.logits, model.head(output.hidden), rtol=0, atol=0)
    torch.testing.assert_close(output.state.cell[0], c, rtol=0, atol=1e-13)


def test_forget_gate_starts_open() -> None:
    lstm = language_model().lstm
    for layer in (0, 1):
        total = getattr(lstm, f"bias_ih_l{layer}") + getattr(lstm, f"bias_hh_l{layer}")
        assert total[8:16].tolist() == [1.0] * 8
        assert total[:8].abs().max() == total[16:].abs().max() == 0


def test_additive_attention_is_the_formula() -> None:
    torch.manual_seed(0)
    attention = AdditiveAttention(3, 4, 5).double()
    queries, context = torch.randn(2, 3, 3).double(), torch.randn(2, 6, 4).double()
    found, weights = attention(queries, attention.key(context), context)
    for b in range(2):
        for q in range(3):
            hidden = [attention.query.weight @ queries[b, q] + attention.key(context[b, k]) for k in range(6)]
            logits = torch.stack([attention.score.weight[0] @ row.tanh() for row in hidden])
            alpha = logits.exp() / logits.exp().sum()
            torch.testing.assert_close(weights[b, q], alpha, rtol=0, atol=1e-13)
            torch.testing.assert_close(found[b, q], alpha @ context[b], rtol=0, atol=1e-13)


def test_fully_masked_query_gets_nothing_and_no_nan_comes_back() -> None:
    torch.manual_seed(0)
    attention = AdditiveAttention(3, 4, 5)
    queries, context = torch.randn(2, 1, 3, requires_grad=True), torch.randn(2, 6, 4)
    mask = torch.tensor([[True] * 6, [False] * 6])[:, None]
    found, weights = attention(queries, attention.key(context), context, mask=mask)
    assert found[1].abs().max() == 0
    assert weights[1].abs().max() == 0
    found.sum().backward()
    assert queries.grad is not None
    assert queries.grad.isfinite().all()


def test_attention_gradient() -> None:
    torch.manual_seed(0)
    attention = AdditiveAttention(3, 4, 5).double()
    mask = torch.tensor([[True, True, False, True], [False] * 4])[:, None]

    def outputs(queries: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return attention(queries, attention.key(context), context, mask=mask)[0]

    inputs = (torch.randn(2, 2, 3).double().requires_grad_(), torch.randn(2, 4, 4).double().requires_grad_())
    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("layers", [1, 2])
def test_language_model_passes_over_padding_wherever_it_is(layers: int) -> None:
    model = language_model(n_layers=layers)
    ids = draw(4, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    output = model(ids, attention_mask=mask)
    for b in range(4):
        alone = model(ids[b][mask[b] == 1][None])
        torch.testing.assert_close(output.logits[b][mask[b] == 1], alone.logits[0], rtol=0, atol=1e-13)
        torch.testing.assert_close(output.state.hidden[:, b], alone.state.hidden[:, 0], rtol=0, atol=1e-13)
        assert output.hidden[b][mask[b] == 0].abs().sum() == 0


def test_sequence_without_any_real_token_keeps_the_state() -> None:
    model = language_model()
    before = model(draw(2, 3)).state
    mask = torch.tensor([[True, True], [False, False]])
    after = model(draw(2, 2, seed=1), attention_mask=mask, state=before).state
    torch.testing.assert_close(after.cell[:, 1], before.cell[:, 1], rtol=0, atol=0)
    assert (after.cell[:, 0] - before.cell[:, 0]).abs().max() > 1e-3
    assert model(draw(1, 2), attention_mask=torch.zeros(1, 2)).state.hidden.abs().max() == 0


def test_language_model_token_by_token() -> None:
    model = language_model()
    ids = draw(3, 5)
    state, logits = None, []
    for t in range(5):
        output = model(ids[:, t : t + 1], state=state)
        state = output.state
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_seq2seq_token_by_token_and_alone(layout: dict[str, object]) -> None:
    model = seq2seq(**layout)
    source, target = draw(3, 5), draw(3, 4, high=11)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    whole = model(source, target, attention_mask=mask)
    encoded, state, logits = model.encode(source, mask), None, []
    for t in range(4):
        output = model(None, target[:, t : t + 1], encoded=encoded, state=state)
        state = output.state
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=0, atol=1e-13)
    for b in range(3):
        alone = model(source[b][mask[b]][None], target[b : b + 1])
        torch.testing.assert_close(whole.logits[b], alone.logits[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_seq2seq_passes_over_padding_of_the_target(layout: dict[str, object]) -> None:
    model = seq2seq(**layout)
    source, target = draw(2, 5), draw(2, 4, high=11)
    mask = torch.tensor([[False, True, False, True], [True, True, True, False]])
    output = model(source, target, decoder_mask=mask)
    for b in range(2):
        alone = model(source[b : b + 1], target[b][mask[b]][None])
        torch.testing.assert_close(output.logits[b][mask[b]], alone.logits[0], rtol=0, atol=1e-13)
        assert output.hidden[b][~mask[b]].abs().max() == 0


def test_weights_on_request() -> None:
    model = seq2seq()
    source, target = draw(2, 5), draw(2, 4, high=11)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    output = model(source, target, attention_mask=mask, weights=True)
    (pattern,) = output.weights["cross"]
    assert pattern.shape == (2, 1, 4, 5)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 1, 4).double(), rtol=0, atol=1e-13)
    assert pattern[0, ..., 3:].abs().max() == 0
    assert model(source, target).weights is None


def test_reordered_state_is_that_of_the_reordered_batch() -> None:
    model, index = seq2seq(n_layers=2), torch.tensor([2, 0, 0])
    source, target = draw(3, 5), draw(3, 4, high=11)
    state = model(source, target[:, :3]).state.reorder(index)
    output = model(source[index], target[index][:, 3:], state=state)
    torch.testing.assert_close(output.logits, model(source, target).logits[index, 3:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_learns(layout: dict[str, object]) -> None:
    model = seq2seq(**layout)
    model(draw(2, 5), draw(2, 4, high=11)).logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d_attention", [None, 5])
def test_parameters_are_counted_without_a_model(layout: dict[str, object], d_attention: int | None) -> None:
    model = seq2seq(**layout, d_attention=d_attention)
    assert model.config.n_parameters == model.n_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("layers", [1, 3])
def test_parameters_of_the_language_model(layers: int) -> None:
    model = language_model(n_layers=layers)
    assert model.config.n_parameters == model.n_parameters == sum(p.numel() for p in model.parameters())


def counted(call: object) -> int:
    """Operations of matrix products as torch counts them; its own LSTM is no matrix product to it."""
    with FlopCounterMode(display=False) as counter:
        call()  # type: ignore[operator]
    return int(counter.get_total_flops())


def lstm_products(lstm: torch.nn.LSTM, steps: int) -> int:
    return steps * sum(2 * p.numel() for name, p in lstm.named_parameters() if name.startswith("weight"))


def test_flops_of_the_language_model() -> None:
    model = language_model()
    assert model.config.flops(9) == lstm_products(model.lstm, 9) + counted(
        lambda: model.head(torch.zeros(9, 8).double())
    )
    assert model.config.flops(18) == 2 * model.config.flops(9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flops_of_the_encoder_decoder(layout: dict[str, object]) -> None:
    model = seq2seq(**layout, d_attention=6)
    n_source, n_target, d = 5, 3, 8
    e = 16 if layout["bidirectional"] else d
    wanted = lstm_products(model.encoder, n_source) + lstm_products(model.decoder, n_target) + 2 * n_target * d * 11
    if layout["bidirectional"]:
        wanted += 2 * layout["n_layers"] * 2 * e * d  # type: ignore[operator]
    if layout["attention"]:
        wanted += 2 * n_source * e * 6 + n_target * (2 * d * 6 + 2 * (e + d) * d + n_source * (2 * 6 + 2 * e))
    assert model.config.flops(n_source, n_target) == wanted
    assert model.config.flops(n_source) == model.config.flops(n_source, n_source)


def test_bad_input_is_named() -> None:
    model, pair = language_model(), seq2seq()
    ids = draw(2, 3)
    cases = [
        (lambda: model(ids.float()), "integers"),
        (lambda: model(ids[:, :0]), "at least one token"),
        (lambda: model(ids + 9), r"\[0, 11\), got"),
        (lambda: model(ids, attention_mask=torch.ones(2, 4)), r"must be \(2, 3\)"),
        (lambda: model(ids, attention_mask=torch.full((2, 3), -math.inf)), "True and False"),
        (lambda: model(ids, state=model(draw(3, 2)).state), "state must be"),
        (lambda: pair(ids, ids, encoded=pair.encode(ids)), "ids or encoded"),
        (lambda: pair(None, ids), "ids or encoded"),
        (lambda: pair(draw(3, 3), ids), "as many sequences"),
        (lambda: seq2seq(attention=False)(ids, ids, weights=True), "without attention"),
        (lambda: LSTMConfig(d_vocab=0, d_model=4), "d_vocab must be a positive"),
        (lambda: LSTMSeq2SeqConfig(d_vocab=5, d_model=4, dropout=1.0), "dropout"),
    ]
    for call, words in cases:
        with pytest.raises(InvalidInputError, match=words):
            call()

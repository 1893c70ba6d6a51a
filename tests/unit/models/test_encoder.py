"""The bidirectional encoder: counts, padding, weights, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attsvm.errors import InvalidInputError
from attsvm.models.encoder import Encoder, EncoderConfig

SIZES = {"d_vocab": 20, "d_model": 8, "n_layers": 2, "n_heads": 2, "d_mlp": 12, "n_ctx": 10}


def encoder_of(**options: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**{**SIZES, **options})).double().eval()


OPTIONS = [
    {},
    {"pooled": True},
    {"masked_head": True},
    {"masked_head": True, "tied": False, "n_segments": 0},
    {"pooled": True, "next_sentence_head": True, "masked_head": True, "place": "pre"},
    {"activation": "swiglu"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_parameters_are_counted(options: dict[str, Any]) -> None:
    encoder = encoder_of(**options)
    assert encoder.config.n_parameters == encoder.n_parameters == sum(p.numel() for p in encoder.parameters())


@pytest.mark.parametrize("options", OPTIONS)
def test_flops_are_those_counted(options: dict[str, Any]) -> None:
    encoder = encoder_of(**options, backend="eager")
    with FlopCounterMode(display=False) as counter:
        encoder(torch.tensor([[1, 2, 3, 4, 5]]))
    assert counter.get_total_flops() == encoder.config.flops(5)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_padding_changes_nothing_on_either_side(backend: str) -> None:
    encoder = encoder_of(pooled=True, masked_head=True, backend=backend)
    ids = torch.tensor([[3, 4, 5]])
    alone = encoder(ids)
    right = encoder(torch.tensor([[3, 4, 5, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]]))
    left = encoder(torch.tensor([[0, 0, 3, 4, 5]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
    for padded, part in ((right, slice(0, 3)), (left, slice(2, 5))):
        torch.testing.assert_close(padded.hidden[:, part], alone.hidden, rtol=0, atol=1e-13)
        torch.testing.assert_close(padded.logits[:, part], alone.logits, rtol=0, atol=1e-13)
        torch.testing.assert_close(padded.pooled, alone.pooled, rtol=0, atol=1e-13)


def test_weights_of_all_layers_come_on_request() -> None:
    encoder = encoder_of()
    ids, mask = torch.tensor([[3, 4, 5, 0]]), torch.tensor([[True, True, True, False]])
    plain, output = encoder(ids, attention_mask=mask), encoder(ids, attention_mask=mask, weights=True)
    assert plain.weights is None
    assert output.weights is not None
    assert list(output.weights) == ["encoder"]
    assert len(output.weights["encoder"]) == 2
    for pattern in output.weights["encoder"]:
        torch.testing.assert_close(pattern.sum(-1), torch.ones(1, 2, 4, dtype=pattern.dtype))
        assert pattern[..., 3].abs().max() == 0
    torch.testing.assert_close(output.hidden, plain.hidden, rtol=0, atol=1e-13)


def test_every_token_sees_every_other() -> None:
    encoder = encoder_of()
    first, second = encoder(torch.tensor([[3, 4, 5]])).hidden, encoder(torch.tensor([[3, 4, 6]])).hidden
    assert (first - second)[:, 0].abs().max() > 1e-4


def test_segments_default_to_the_first() -> None:
    encoder = encoder_of()
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(encoder(ids).hidden, encoder(ids, segments=torch.zeros_like(ids)).hidden)
    assert (encoder(ids).hidden - encoder(ids, segments=torch.ones_like(ids)).hidden).abs().max() > 1e-3


IDS = torch.tensor([[3, 4, 5], [3, 4, 0]])


@pytest.mark.parametrize(
    "ids, arguments, message",
    [
        (torch.full((1, 11), 3), {}, "context of 10 positions, got 11"),
        (torch.tensor([[3, 20]]), {}, r"in \[0, 20\), the vocabulary, got 20"),
        (torch.tensor([[-1, 3]]), {}, r"in \[0, 20\), the vocabulary, got -1"),
        (torch.tensor([[1.0]]), {}, r"ids must be integers \(B, T\)"),
        (torch.tensor([1, 2]), {}, r"ids must be integers \(B, T\)"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "at least one token"),
        (IDS, {}, "attention_mask must be given for sequences of unequal lengths"),
        (IDS, {"attention_mask": IDS == 0}, "True exactly on the padding"),
        (IDS, {"attention_mask": torch.ones(2, 4)}, r"must be \(B, T\) = \(2, 3\), got \(2, 4\)"),
        (IDS, {"attention_mask": torch.full((2, 3), -10000.0)}, "must hold 0 and 1"),
        (IDS[:1], {"segments": torch.tensor([[0, 1]])}, "segments must have the shape of ids"),
        (IDS[:1], {"segments": torch.tensor([[0, 1, 2]])}, r"segments must be in \[0, 2\)"),
    ],
)
def test_wrong_input_is_named(ids: torch.Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        encoder_of(pad_id=0)(ids, **arguments)


def test_segments_of_a_model_without_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="segments must be None"):
        encoder_of(n_segments=0)(IDS, segments=torch.zeros_like(IDS))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_layers": 0}, "n_layers must be an integer of at least 1, got 0"),
        ({"next_sentence_head": True}, "pooled must be True for next_sentence_head"),
        ({"masked_head": True, "activation": "swiglu"}, "for masked_head, got 'swiglu'"),
        ({"n_heads": 3}, "n_heads"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        encoder_of(**options)

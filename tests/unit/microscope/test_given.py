"""Weights that somebody already has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attsvm.errors import InvalidInputError
from attsvm.microscope.given import calls_from_attentions


def weights(*shape: int, causal: bool = False) -> Tensor:
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    if causal:
        logits = logits.masked_fill(torch.ones(shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(-1)


def test_a_tuple_of_layers() -> None:
    layers = weights(2, 3, 5, 5), weights(2, 4, 5, 5, causal=True), weights(2, 3, 5, 7)
    calls = calls_from_attentions(layers)
    assert [(call.info.kind, call.info.layer, call.info.n_heads, call.info.tier) for call in calls] == [
        ("encoder", 0, 3, "given"),
        ("decoder", 0, 4, "given"),
        ("cross", 0, 3, "given"),
    ]
    assert [call.info.label(0) for call in calls] == ["encoder.L0.H0", "decoder.L0.H0", "cross.L0.H0"]
    assert (calls[2].info.query_side, calls[2].info.key_side) == ("target", "source")
    for call, layer in zip(calls, layers, strict=True):
        torch.testing.assert_close(call.weights(), layer)
        torch.testing.assert_close(call.logits().softmax(-1), layer)


def test_one_array() -> None:
    array = weights(2, 3, 5, 5).numpy()
    calls = calls_from_attentions(array)
    assert [call.info.label(0) for call in calls] == ["L0.H0", "L1.H0"]
    torch.testing.assert_close(calls[1].weights(), torch.as_tensor(array[1:]))
    assert len(calls_from_attentions(weights(2, 1, 3, 5, 5))) == 2


def test_arrays_in_a_list() -> None:
    call = calls_from_attentions([np.full((1, 1, 2, 2), 0.5)])[0]
    assert call.weights().tolist() == [[[[0.5, 0.5], [0.5, 0.5]]]]


def test_the_steps_of_generate_become_one_matrix() -> None:
    whole = weights(2, 3, 6, 6, causal=True)
    steps = tuple((part, part) for part in (whole[:, :, :4, :4], whole[:, :, 4:5, :5], whole[:, :, 5:, :]))
    calls = calls_from_attentions(steps)
    assert [(call.info.kind, call.info.layer) for call in calls] == [("decoder", 0), ("decoder", 1)]
    torch.testing.assert_close(calls[1].weights(), whole)


def test_steps_of_cross_attention() -> None:
    rows = [weights(1, 2, 1, 7) for _ in range(3)]
    call = calls_from_attentions([[row] for row in rows])[0]
    assert call.info.kind == "cross"
    torch.testing.assert_close(call.weights(), torch.cat(rows, 2))


def test_kinds_by_name() -> None:
    square = weights(1, 2, 4, 4)
    calls = calls_from_attentions({"encoder": [square, square], "decoder": [square], "cross": [square]})
    assert [(call.info.kind, call.info.layer) for call in calls] == [
        ("encoder", 0),
        ("encoder", 1),
        ("decoder", 0),
        ("cross", 0),
    ]
    assert [call.info.kind for call in calls_from_attentions([square, square], kinds="decoder")] == ["decoder"] * 2
    assert [call.info.kind for call in calls_from_attentions([square, square], kinds=["cross", "encoder"])] == [
        "cross",
        "encoder",
    ]


def test_rows_of_zeros_and_sums_below_one_are_weights() -> None:
    layer = weights(1, 1, 3, 3)
    layer[0, 0, 0] = 0.0
    layer[0, 0, 1] *= 0.5
    torch.testing.assert_close(calls_from_attentions([layer])[0].weights(), layer)


BAD: list[tuple[Any, str]] = [
    ((), r"got an empty sequence: .*set_attn_implementation\('eager'\).*output_attentions=True"),
    ((None, None), r"got None in place of a layer: .*set_attn_implementation\('eager'\)"),
    ("weights", "must be a sequence of layers or an array, got str"),
    (None, "must be a sequence of layers or an array, got NoneType"),
    ([3.0], "layer 0 must be a tensor or an array, got float"),
    (np.zeros((2, 3)), r"one array must be \(L, H, T, T\) .* got shape \(2, 3\)"),
    ([torch.zeros(2, 3, 3)], r"layer 0 must be \(B, H, Tq, Tk\) .* got shape \(2, 3, 3\)"),
    ([torch.zeros(2, 3, 0, 3)], r"layer 0 must be \(B, H, Tq, Tk\) with nothing empty"),
    ([torch.zeros(1, 1, 2, 2, dtype=torch.int64)], "layer 0 must hold floating-point weights, got torch.int64"),
    ([torch.full((1, 1, 2, 2), torch.nan)], "layer 0 must be finite, got 4 entries"),
    ([torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)], "layer 1 must hold weights after softmax"),
    ([torch.tensor([[[[-1.0, 2.0]]]])], "smallest of -1 and a largest sum of 1"),
    ([[torch.ones(1, 1, 1, 1)], []], "empty sequence"),
    ([[torch.ones(1, 1, 1, 1)], [torch.ones(1, 1, 1, 1)] * 2], r"same number of layers, got \[1, 2\]"),
    ([[torch.ones(1, 1, 1, 1)], [torch.ones(1, 2, 1, 1)]], "with the same B and H"),
    ({"encoders": [torch.ones(1, 1, 1, 1)]}, "kinds must be among encoder, decoder, cross, got 'encoders'"),
]


@pytest.mark.parametrize("attentions, message", BAD, ids=range(len(BAD)))
def test_bad_input(attentions: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        calls_from_attentions(attentions)


@pytest.mark.parametrize("kinds", ["self", ["encoder"], ["encoder", "other"]])
def test_bad_kinds(kinds: Any) -> None:
    with pytest.raises(InvalidInputError, match="kinds must be one of encoder, decoder, cross"):
        calls_from_attentions(weights(2, 1, 3, 3), kinds=kinds)

"""Matrices on the hidden states: found by their numbers, or a reason why not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from attsvm.microscope.calls import AttentionCall
from attsvm.microscope.capture import attention_modules, captured
from attsvm.microscope.residual import check_residual, residual_heads
from reference.microscope_models import MODELS, pairs, texts

pytest.importorskip("transformers")

TINY = {tiny.family: tiny for tiny in MODELS}


def calls_of(model: nn.Module, inputs: Any) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    with torch.no_grad(), captured(model, calls.append, inputs_too=True):
        model(**inputs)
    return calls


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_bigcode", "bloom", "whisper", "albert"])
def test_products_are_those_of_the_call(family: str) -> None:
    tiny = TINY[family]
    model = tiny.build().double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs("left").items()}
    for call in calls_of(model, inputs):
        heads = residual_heads(model, call.info)
        assert not isinstance(heads, str), heads
        # Whether in double precision throughout or but for a norm in float32.
        assert check_residual(call, heads) < 1e-9


def test_matrices_of_bert_are_its_weights() -> None:
    model: Any = TINY["bert"].build()
    info = attention_modules(model)[1]
    heads = residual_heads(model, info)
    assert not isinstance(heads, str)
    module = model.encoder.layer[1].attention.self
    torch.testing.assert_close(heads[2].W_Q[:-1].float(), module.query.weight[16:24].T)
    torch.testing.assert_close(heads[2].W_K[-1].float(), module.key.bias[16:24])
    torch.testing.assert_close(heads[2].W, heads[2].W_K @ heads[2].W_Q.T / 8**0.5)
    assert heads[2].W.dtype == torch.float64


def test_a_wrong_matrix_is_noticed() -> None:
    model = TINY["bert"].build()
    call = calls_of(model, texts("right"))[0]
    heads = residual_heads(model, call.info)
    assert not isinstance(heads, str)
    assert check_residual(call, heads) < 1e-5
    assert check_residual(call, heads[::-1]) > 0.1
    assert check_residual(replace(call, query_input=None), heads) == float("inf")


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bart"])
def test_sixteen_bits(family: str) -> None:
    model = TINY[family].build().to(torch.bfloat16)
    for info in attention_modules(model):
        assert not isinstance(residual_heads(model, info), str)


def test_weights_are_read_when_asked() -> None:
    model: Any = TINY["bert"].build()
    info = attention_modules(model)[0]
    before = residual_heads(model, info)
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight.mul_(2.0)
    after = residual_heads(model, info)
    assert not isinstance(before, str)
    assert not isinstance(after, str)
    torch.testing.assert_close(after[0].W_Q[:-1], 2 * before[0].W_Q[:-1])


def test_cross_attention_has_two_inputs() -> None:
    model = TINY["bart"].build()
    call = next(call for call in calls_of(model, pairs("right")) if call.info.kind == "cross")
    heads = residual_heads(model, call.info)
    assert not isinstance(heads, str)
    assert check_residual(call, heads) < 1e-4


@pytest.mark.parametrize("family, reason", [("llama", "rotary"), ("qwen3", "normalises"), ("gptj", "rotary")])
def test_reasons(family: str, reason: str) -> None:
    model = TINY[family].build()
    found = residual_heads(model, attention_modules(model)[0])
    assert isinstance(found, str)
    assert reason in found
    assert not found.endswith(".")


def test_no_hooks_are_left() -> None:
    model = TINY["llama"].build()
    residual_heads(model, attention_modules(model)[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Scaled(nn.Linear):
    """A projection that is not its weights."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden).tanh()


def test_a_projection_that_is_not_linear_gives_a_reason() -> None:
    model: Any = TINY["bert"].build()
    attention = model.encoder.layer[0].attention.self
    bent = Scaled(32, 32)
    bent.load_state_dict(attention.query.state_dict())
    attention.query = bent
    found = residual_heads(model, attention_modules(model)[0])
    assert found == "what the linear parts of the module put out is not what their weights give"

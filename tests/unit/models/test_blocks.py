"""Normalisation, MLP and block against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from attsvm.errors import InvalidInputError
from attsvm.models.blocks import MLP, MLP_KINDS, Block, BlockConfig, RMSNorm, make_norm
from attsvm.models.counts import block_parameters, count_parameters

SIZES = {"d_model": 8, "n_heads": 2, "d_mlp": 12}


def block_of(**options: Any) -> Block:
    torch.manual_seed(0)
    return Block(BlockConfig(**{**SIZES, **options})).double()


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_rms_norm_is_its_formula() -> None:
    x = inputs(2, 3, 8)
    norm = RMSNorm(8, eps=0.1).double()
    torch.nn.init.uniform_(norm.weight)
    expected = norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-13, atol=1e-13)


def test_rms_norm_of_half_precision_takes_the_mean_in_float32() -> None:
    # 300² = 90,000 is beyond float16.
    x = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert RMSNorm(4).half()(x).tolist() == [[1.0] * 4]


ELEMENTWISE = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + (-x).exp()),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
}
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", MLP_KINDS)
def test_mlp_is_its_formula(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    mlp, x = MLP(d_model=8, d_mlp=12, kind=kind, bias=bias).double(), inputs(2, 3, 8)
    up = F.linear(x, mlp.up.weight, mlp.up.bias)
    if kind in GATES:
        assert mlp.gate is not None
        inner = ELEMENTWISE[GATES[kind]](F.linear(x, mlp.gate.weight, mlp.gate.bias)) * up
    else:
        inner = ELEMENTWISE[kind](up)
    expected = F.linear(inner, mlp.down.weight, mlp.down.bias)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)
    assert (mlp.up.bias is not None) == bias


def test_pre_and_post_norm_are_their_formulas() -> None:
    x = inputs(2, 3, 8)
    pre, post = block_of(place="pre"), block_of(place="post")
    middle = x + pre.attention(pre.norms["attention"](x)).output
    torch.testing.assert_close(pre(x).hidden, middle + pre.mlp(pre.norms["mlp"](middle)))
    middle = post.norms["attention"](x + post.attention(x).output)
    torch.testing.assert_close(post(x).hidden, post.norms["mlp"](middle + post.mlp(middle)))


def test_cross_attention_reads_the_context() -> None:
    block, x, context = block_of(cross=True), inputs(2, 3, 8), inputs(2, 5, 8)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[..., 4] = False
    output = block(x, context=context, context_mask=mask, weights=True)
    assert output.cross_weights.shape == (2, 2, 3, 5)
    assert output.cross_weights[..., 4].abs().max() == 0
    changed = context.clone()
    changed[:, 4] += 1.0
    assert torch.equal(
        block(x, context=changed, context_mask=mask).hidden, block(x, context=context, context_mask=mask).hidden
    )
    changed[:, 0] += 1.0
    assert (block(x, context=changed, context_mask=mask).hidden - output.hidden).abs().max() > 1e-4


def test_cross_attention_without_context_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="context must be given"):
        block_of(cross=True)(inputs(2, 3, 8))


def test_layer_scale_multiplies_what_a_part_adds() -> None:
    x = inputs(2, 3, 8)
    plain, scaled = block_of(d_mlp=0), block_of(d_mlp=0, layer_scale=0.25)
    torch.testing.assert_close(scaled(x).hidden - x, 0.25 * (plain(x).hidden - x))


def test_dropout_acts_in_training_alone() -> None:
    x, block = inputs(2, 3, 8), block_of(dropout=0.5)
    assert not torch.equal(block(x).hidden, block(x).hidden)
    block.eval()
    assert torch.equal(block(x).hidden, block(x).hidden)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"place": "post", "norm": "rms"},
        {"norm": "none", "d_mlp": 0, "parameterization": "W"},
        {"n_kv_heads": 1, "d_head": 6, "activation": "swiglu", "mlp_bias": False, "attention_bias": False},
        {"cross": True, "layer_scale": 1e-3, "output_bias": False},
    ],
)
def test_parameters_are_counted(options: dict[str, Any]) -> None:
    block = block_of(**options)
    assert block_parameters(block.config) == count_parameters(block)


@pytest.mark.parametrize("options", [{"place": "pre"}, {"place": "post", "norm": "rms", "activation": "swiglu"}])
def test_gradients_are_those_of_differences(options: dict[str, Any]) -> None:
    block = block_of(**options)
    x = inputs(1, 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: block(x, causal=True).hidden, (x,))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"place": "middle"}, "place must be one of pre, post, got 'middle'"),
        ({"norm": "batch"}, "norm must be one of layer, rms, none, got 'batch'"),
        ({"d_mlp": -1}, "d_mlp must be an integer of at least 0, got -1"),
        ({"activation": "gelu2"}, "activation must be one of .* got 'gelu2'"),
        ({"n_heads": 3}, "n_heads"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        block_of(**options)


def test_unknown_norm_is_named() -> None:
    with pytest.raises(InvalidInputError, match="kind must be one of layer, rms, none, got 'batch'"):
        make_norm("batch", 8, 1e-5)


def test_unknown_kind_of_mlp_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"kind must be one of .* got 'gelu2'"):
        MLP(d_model=8, d_mlp=8, kind="gelu2")

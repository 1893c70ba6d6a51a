"""The multi-head layer: heads by hand, the two parameterizations, grouped heads, the cache, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attsvm.attention import Attended, KeyValueCache, MultiHeadAttention, Rotary, alibi_bias
from attsvm.attention.masks import causal_mask, padding_mask
from attsvm.errors import InvalidInputError, UnsupportedError


def layer(seed: int = 0, **options: Any) -> MultiHeadAttention:
    torch.manual_seed(seed)
    return MultiHeadAttention(**{"d_model": 12, "n_heads": 4, **options}).double().eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def as_W(heads: MultiHeadAttention) -> MultiHeadAttention:
    """The same layer with one matrix for each head."""
    other = layer(
        n_heads=heads.n_heads,
        n_kv_heads=heads.n_kv_heads,
        d_head=heads.d_head,
        d_context=heads.d_context,
        parameterization="W",
    )
    with torch.no_grad():
        other.W.copy_(heads.combined())
    other.value.load_state_dict(heads.value.state_dict())
    other.output.load_state_dict(heads.output.state_dict())
    return other


OPTIONS: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 2},
    {"n_kv_heads": 1, "d_head": 5},
    {"d_context": 7},
    {"scale": 1.0, "output_bias": False},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_head_by_hand(options: dict[str, Any]) -> None:
    heads = layer(**options)
    x, context = tokens(2, 3, 12), tokens(2, 5, heads.d_context, seed=2)
    result = heads(x, context=context, weights=True)
    E, group = heads.d_head, heads.n_heads // heads.n_kv_heads
    parts = []
    for h in range(heads.n_heads):
        q = slice(h * E, (h + 1) * E)
        kv = slice(h // group * E, (h // group + 1) * E)
        query = x @ heads.query.weight[q].T + heads.query.bias[q]
        key = context @ heads.key.weight[kv].T + heads.key.bias[kv]
        value = context @ heads.value.weight[kv].T + heads.value.bias[kv]
        weights = (heads.scale * query @ key.mT).softmax(-1)
        close(result.weights[:, h], weights)
        parts.append(weights @ value)
    close(result.output, heads.output(torch.cat(parts, -1)))
    close(heads(x, context=context).output, result.output)


@pytest.mark.parametrize("options", OPTIONS)
def test_W_and_KQ_are_the_same_layer(options: dict[str, Any]) -> None:
    heads = layer(**options)
    if heads.output.bias is None:
        heads.output.register_parameter("bias", torch.nn.Parameter(torch.zeros(12, dtype=torch.float64)))
    with torch.no_grad():
        heads.query.bias.zero_()  # W has none; a bias of the key is seen by no softmax
    x, context = tokens(2, 3, 12), tokens(2, 5, heads.d_context, seed=2)
    mask = torch.tensor([True, True, False, True, True])
    one, two = (h(x, context=context, mask=mask, weights=True) for h in (heads, as_W(heads)))
    close(one.weights, two.weights)
    close(one.output, two.output)


def test_orientation_of_W() -> None:
    """logits = x_key^T W x_query, and W = scale W_K W_Q^T with keys X W_K and queries W_Q^T z."""
    heads = layer(parameterization="W", n_heads=2, d_context=7, d_head=3)
    x, context = tokens(1, 1, 12), tokens(1, 4, 7, seed=2)
    weights = heads(x, context=context, weights=True).weights
    for h in range(2):
        close(weights[0, h, 0], (context[0] @ heads.W[h] @ x[0, 0]).softmax(-1))
    thin = layer(n_heads=2, d_head=3, d_context=7, bias=False, scale=0.7)
    W_K, W_Q = thin.key.weight[3:].T, thin.query.weight[3:].T  # of the second head, (d, d_head)
    close(thin.combined()[1], 0.7 * W_K @ W_Q.T)
    # One key attracts through a single entry of W: row = coordinate of the key, column = coordinate of the query.
    with torch.no_grad():
        heads.W.zero_()[:, 6, 11] = 100.0
    key, query = torch.eye(7, dtype=torch.float64), torch.eye(12, dtype=torch.float64)
    close(heads(query[None, 11:], context=key[None], weights=True).weights[0, 0, 0], key[6])
    close(heads(query[None, :1], context=key[None], weights=True).weights[0, 0, 0], torch.full_like(key[6], 1 / 7))


def test_W_starts_with_logits_of_unit_variance() -> None:
    torch.manual_seed(0)
    heads = MultiHeadAttention(d_model=64, n_heads=4, parameterization="W")
    x = torch.randn(1, 200, 64)
    logits = x[:, None] @ heads.W @ x[:, None].mT
    assert logits.var().item() == pytest.approx(1.0, abs=0.1)


def test_grouped_heads_are_repeated_heads() -> None:
    grouped, full = layer(n_kv_heads=2), layer()
    for name in ("query", "output"):
        getattr(full, name).load_state_dict(getattr(grouped, name).state_dict())
    for name in ("key", "value"):
        state = {
            key: value.view(2, 3, -1).repeat_interleave(2, 0).view(12, -1).squeeze(-1)
            for key, value in getattr(grouped, name).state_dict().items()
        }
        getattr(full, name).load_state_dict(state)
    x = tokens(2, 5, 12)
    close(grouped(x, causal=True).output, full(x, causal=True).output)


@pytest.mark.parametrize(
    "options",
    [{}, {"n_kv_heads": 2}, {"rotary": True}, {"parameterization": "W"}, {"parameterization": "W", "n_kv_heads": 1}],
)
@pytest.mark.parametrize("steps", [[6], [1] * 6, [3, 2, 1]])
def test_cached_is_uncached(options: dict[str, Any], steps: list[int]) -> None:
    if "rotary" in options:
        options = {"rotary": Rotary(3 + 1), "d_head": 4}
    heads = layer(**options)
    x, padding = tokens(2, 6, 12), torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    whole = heads(x, mask=padding_mask(padding), causal=True, weights=True)
    with torch.no_grad():
        cache, begin = KeyValueCache(), 0
        for n in steps:
            seen = padding_mask(padding[:, : begin + n])
            part = heads(x[:, begin : begin + n], mask=seen, causal=True, cache=cache, weights=True)
            close(part.output, whole.output[:, begin : begin + n])
            close(part.weights, whole.weights[:, :, begin : begin + n, : begin + n])
            begin += n
    assert cache.length == 6


def test_cross_attention_reads_the_context_once() -> None:
    heads = layer(d_context=7)
    context, cache = tokens(2, 5, 7), KeyValueCache()
    with torch.no_grad():
        for step in range(3):
            x = tokens(2, 1, 12, seed=step)
            # What is cached is used: the context of later steps does not count.
            cached = heads(x, context=context if step == 0 else 0 * context, cache=cache, layer="cross").output
            close(cached, heads(x, context=context).output)
    assert cache.length == 5


def test_positions_follow_the_cache_and_may_be_given() -> None:
    heads = layer(d_head=4, rotary=Rotary(4))
    x = tokens(2, 4, 12)
    plain = heads(x, causal=True).output
    close(heads(x, causal=True, positions=torch.arange(4)).output, plain)
    close(heads(x, causal=True, positions=heads.rotary.tables(torch.arange(4), torch.float64)).output, plain)
    spread = heads(x, causal=True, positions=torch.tensor([0, 5, 9, 30])).output
    assert (spread - plain).abs().max().item() > 1e-3


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_query_that_sees_nothing_gives_the_output_bias(backend: str) -> None:
    heads = layer(backend=backend)
    x = tokens(1, 3, 12).requires_grad_()
    output = heads(x, mask=torch.tensor([[False] * 3, [True] * 3, [True] * 3])).output
    close(output[0, 0], heads.output.bias)
    output[0, 0].sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert all(bool(p.grad.isfinite().all()) for p in heads.parameters() if p.grad is not None)


@pytest.mark.parametrize("parameterization", ["KQ", "W"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_gradients_by_differences(parameterization: str, backend: str) -> None:
    heads = layer(d_model=4, n_heads=2, n_kv_heads=1, parameterization=parameterization, backend=backend)
    names = [name for name, _ in heads.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        options = {"causal": True, "bias": alibi_bias(2, 3, dtype=torch.float64)}
        result: Attended = torch.func.functional_call(heads, dict(zip(names, values)), (x,), options)
        return result.output

    inputs = [tokens(1, 3, 4), *(p.detach() for p in heads.parameters())]
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs])


def test_against_the_layer_of_torch() -> None:
    """nn.MultiheadAttention, whose masks mean the opposite."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(12, 4, batch_first=True).double().eval()
    ours = layer()
    with torch.no_grad():
        for name, weight, bias in zip(("query", "key", "value"), theirs.in_proj_weight.chunk(3), torch.randn(3, 12)):
            getattr(ours, name).weight.copy_(weight)
            getattr(ours, name).bias.copy_(bias)
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        ours.output.load_state_dict(theirs.out_proj.state_dict())
    x = tokens(2, 5, 12)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    output, weights = theirs(x, x, x, key_padding_mask=real == 0, attn_mask=~causal_mask(5), average_attn_weights=False)
    result = ours(x, mask=padding_mask(real), causal=True, weights=True)
    close(result.output, output)
    close(result.weights, weights)


def test_dropout_in_training_only() -> None:
    heads = layer(dropout=0.5)
    x = tokens(1, 4, 12)
    close(heads(x).output, heads(x, weights=True).output)
    heads.train()
    assert (heads(x).output - heads(x).output).abs().max().item() > 0


BAD: list[tuple[str, dict[str, Any]]] = [
    (r"n_heads must divide d_model \(12\) where d_head is not given, got 5", {"n_heads": 5}),
    (r"n_kv_heads must divide n_heads \(4\), got 3", {"n_kv_heads": 3}),
    ("n_heads must be >= 1, got 0", {"n_heads": 0}),
    ("n_kv_heads must be >= 1, got 0", {"n_kv_heads": 0}),
    ("d_head must be >= 1, got 0", {"d_head": 0}),
    ("d_context must be >= 1, got -1", {"d_context": -1}),
    ('parameterization must be "KQ" or "W", got \'QK\'', {"parameterization": "QK"}),
    ("backend must be one of", {"backend": "flash"}),
    (r"dropout must be in \[0, 1\)", {"dropout": -0.1}),
    ("rotary must be for heads of size 3, got one for 8", {"rotary": Rotary(8)}),
]


@pytest.mark.parametrize("message, options", BAD)
def test_sizes_and_options_that_do_not_fit_are_named(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=message):
        layer(**options)


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(UnsupportedError, match='which parameterization "W" has not'):
        layer(d_head=4, parameterization="W", rotary=Rotary(4))
    with pytest.raises(UnsupportedError, match="the query has a bias"):
        layer().combined()
    turned = layer(d_head=4, rotary=Rotary(4))
    with pytest.raises(UnsupportedError, match="W depends on the distance"):
        turned.combined()
    with pytest.raises(UnsupportedError, match="context must be None"):
        turned(tokens(1, 2, 12), context=tokens(1, 2, 12))


def test_tokens_that_do_not_fit_are_named() -> None:
    with pytest.raises(InvalidInputError, match=r"x must be \(B, T, d_model = 12\), got \(2, 11\)"):
        layer()(tokens(2, 11))
    with pytest.raises(InvalidInputError, match=r"context must be \(B = 2, S, d_context = 7\), got \(1, 3, 7\)"):
        layer(d_context=7)(tokens(2, 3, 12), context=tokens(1, 3, 7))
    with pytest.raises(InvalidInputError, match="got none and x of shape"):
        layer(d_context=7)(tokens(2, 3, 12))
    with pytest.raises(InvalidInputError, match="mask must be boolean"):
        layer()(tokens(2, 3, 12), mask=torch.ones(3, 3))

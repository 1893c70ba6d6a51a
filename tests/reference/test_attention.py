"""Attention and positions against transformers' own layers, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attsvm.attention import MultiHeadAttention, RelativeBias, Rotary, alibi_bias, sinusoidal
from attsvm.attention.masks import causal_mask, padding_mask, sliding_window_mask
from attsvm.attention.positions import llama3_frequencies, relative_buckets

pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

REAL = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)


def filled(ours: MultiHeadAttention, **modules: nn.Module) -> MultiHeadAttention:
    ours = ours.double().eval()
    for name, module in modules.items():
        getattr(ours, name).load_state_dict(module.state_dict())
    return ours


def draw(module: Any, seed: int = 0) -> Any:
    """Weights that are neither zero nor one, also where transformers starts with such."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module.double().eval()


@pytest.mark.parametrize("theirs_backend", ["eager", "sdpa"])
def test_bert(theirs_backend: str) -> None:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertSelfAttention

    config = BertConfig(hidden_size=24, num_attention_heads=4, attn_implementation=theirs_backend)
    theirs = draw(BertSelfAttention(config))
    ours = filled(MultiHeadAttention(d_model=24, n_heads=4), query=theirs.query, key=theirs.key, value=theirs.value)
    with torch.no_grad():
        ours.output.weight.copy_(torch.eye(24))
        ours.output.bias.zero_()
    x, mask = tokens(2, 7, 24), padding_mask(REAL)
    for backend in ("eager", "sdpa"):
        ours.backend = backend
        close(ours(x, mask=mask).output, theirs(x, attention_mask=additive(mask.expand(2, 1, 7, 7)))[0])


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_llama_with_gradients(n_kv_heads: int, biased: bool) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        head_dim=8,
        attention_bias=biased,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="sdpa",
    )
    theirs = draw(LlamaAttention(config, layer_idx=0))
    rotary = Rotary(8, base=500.0)
    ours = filled(
        MultiHeadAttention(d_model=24, n_heads=4, n_kv_heads=n_kv_heads, d_head=8, bias=biased, rotary=rotary),
        query=theirs.q_proj,
        key=theirs.k_proj,
        value=theirs.v_proj,
        output=theirs.o_proj,
    )
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 8, 900]])
    x = tokens(2, 7, 24).requires_grad_()
    tables = LlamaRotaryEmbedding(config)(x, positions)
    allowed = (padding_mask(REAL) & causal_mask(7)) | torch.eye(7, dtype=torch.bool)  # no row is empty
    # Their sdpa keeps float64 throughout; their eager path goes through a float32 softmax, and gives the weights.
    expected, _ = theirs(x, position_embeddings=tables, attention_mask=allowed)
    config._attn_implementation = "eager"
    _, expected_weights = theirs(x, position_embeddings=tables, attention_mask=additive(allowed))
    result = ours(x, mask=allowed, positions=positions, weights=True)
    fused = ours(x, mask=allowed, positions=positions).output
    close(result.weights, expected_weights, 1e-6)  # logits of about 10, rounded to float32
    direction = tokens(2, 7, 24, seed=3)
    (their_gradient,) = torch.autograd.grad((expected * direction).sum(), x, retain_graph=True)
    for output in (result.output, fused):
        close(output, expected)
        (gradient,) = torch.autograd.grad((output * direction).sum(), x, retain_graph=True)
        close(gradient, their_gradient)


def test_rotation_bit_for_bit_in_float64() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1e5}
    )
    q, k = tokens(2, 4, 50, 16), tokens(2, 2, 50, 16, seed=2)
    positions = torch.arange(1000, 1050)
    expected = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, positions[None]))
    for ours, theirs in zip(Rotary(16, base=1e5)(q, k, positions), expected):
        close(ours, theirs, 1e-15)


def test_llama3_frequencies() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    ours = llama3_frequencies(
        128, 5e5, factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_n_ctx=8192
    )
    torch.testing.assert_close(ours, LlamaRotaryEmbedding(config).inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("decoder", [False, True])
def test_t5(decoder: bool) -> None:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        d_model=24, d_kv=6, num_heads=4, is_decoder=decoder, dropout_rate=0.0, relative_attention_max_distance=20
    )
    theirs = draw(T5Attention(config, has_relative_attention_bias=True, layer_idx=0))
    bias = RelativeBias(4, max_distance=20, bidirectional=not decoder).double()
    with torch.no_grad():
        bias.weight.copy_(theirs.relative_attention_bias.weight)
    close(bias(40), theirs.compute_bias(40, 40))
    ours = filled(
        MultiHeadAttention(d_model=24, n_heads=4, d_head=6, bias=False, scale=1.0),
        query=theirs.q,
        key=theirs.k,
        value=theirs.v,
        output=theirs.o,
    )
    x = tokens(2, 7, 24)
    allowed = padding_mask(REAL) & causal_mask(7) if decoder else padding_mask(REAL).expand(2, 1, 7, 7)
    allowed = allowed | torch.eye(7, dtype=torch.bool)
    close(ours(x, mask=allowed, bias=bias(7)).output, theirs(x, mask=additive(allowed))[0])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_at_every_distance(bidirectional: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-2000, 2001)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
    assert torch.equal(relative_buckets(distance, bidirectional=bidirectional), theirs)


@pytest.mark.parametrize("n_heads", [1, 4, 6, 12])
def test_alibi_up_to_a_constant_in_each_row(n_heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 9), n_heads, torch.float32)  # slope times the key's place
    ours = alibi_bias(n_heads, 9)[0].masked_fill(~causal_mask(9), -torch.inf)
    expected = theirs.expand(n_heads, 9, 9).masked_fill(~causal_mask(9), -torch.inf)
    close(ours.softmax(-1), expected.softmax(-1), 1e-6)


def test_sinusoidal_of_marian() -> None:
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    theirs = MarianSinusoidalPositionalEmbedding(30, 16)
    close(sinusoidal(30, 16, interleaved=False), theirs.create_weight(), 1e-6)


@pytest.mark.parametrize("n_queries", [1, 3, 9])
def test_sliding_window_of_mistral(n_queries: int) -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    rule = sliding_window_causal_mask_function(4)
    ours = sliding_window_mask(n_queries, 9, window=4, causal=True)
    for i in range(n_queries):
        for t in range(9):
            assert bool(ours[i, t]) == bool(
                rule(torch.tensor(0), torch.tensor(0), torch.tensor(9 - n_queries + i), torch.tensor(t))
            )

"""The causal decoder: counts, cache, padding, weights, errors, and the one-layer models of the theory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attsvm.attention.cache import KeyValueCache
from attsvm.errors import InvalidInputError
from attsvm.models.decoder import Decoder, DecoderConfig, RotaryScaling

SIZES = {"d_vocab": 20, "d_model": 8, "n_layers": 2, "n_heads": 4, "d_mlp": 12, "n_ctx": 12}
LLAMA = {
    "n_kv_heads": 2,
    "activation": "swiglu",
    "norm": "rms",
    "attention_bias": False,
    "mlp_bias": False,
    "positions": "rotary",
    "tied": False,
}
THEORY = {"n_layers": 1, "n_heads": 1, "d_mlp": 0, "parameterization": "W", "norm": "none", "positions": "none"}
STRETCHED = RotaryScaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_n_ctx=8)
KINDS = {
    "gpt2": {},
    "gpt2-untied": {"tied": False, "activation": "relu", "scale": 1.0},
    "llama": LLAMA,
    "llama-stretched": {**LLAMA, "rotary_scaling": STRETCHED, "d_head": 6, "attention_bias": True},
    "theory": THEORY,
    "post": {"place": "post", "positions": "none", "head": False},
}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def decoder_of(**options: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**{**SIZES, **options})).double().eval()


@pytest.fixture(params=KINDS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


def test_parameters_are_counted(options: dict[str, Any]) -> None:
    decoder = decoder_of(**options)
    assert decoder.config.n_parameters == decoder.n_parameters == sum(p.numel() for p in decoder.parameters())


def test_flops_are_those_counted(options: dict[str, Any]) -> None:
    decoder = decoder_of(**options, backend="eager")
    with FlopCounterMode(display=False) as counter:
        decoder(IDS)
    assert counter.get_total_flops() == decoder.config.flops(6)


@pytest.mark.parametrize("cuts", [(1,) * 6, (4, 1, 1), (2, 3, 1)])
def test_cached_is_uncached(options: dict[str, Any], cuts: tuple[int, ...]) -> None:
    decoder = decoder_of(**options)
    whole = decoder(IDS, weights=True)
    cache = KeyValueCache()
    with torch.no_grad():
        parts = [decoder(part, cache=cache) for part in IDS.split(cuts, dim=1)]
    assert cache.length == 6
    torch.testing.assert_close(torch.cat([part.hidden for part in parts], 1), whole.hidden, rtol=0, atol=1e-13)
    if whole.logits is not None:
        torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), whole.logits, rtol=0, atol=1e-13)


def test_padding_changes_nothing_on_either_side(options: dict[str, Any]) -> None:
    decoder = decoder_of(**options)
    alone = decoder(IDS).hidden
    padding, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones_like(IDS)
    right = decoder(torch.cat([IDS, padding], 1), attention_mask=torch.cat([mask, padding], 1)).hidden
    left = decoder(torch.cat([padding, IDS], 1), attention_mask=torch.cat([padding, mask], 1)).hidden
    torch.testing.assert_close(right[:, :6], alone, rtol=0, atol=1e-13)
    torch.testing.assert_close(left[:, 3:], alone, rtol=0, atol=1e-13)


def test_a_batch_of_left_padded_prompts_goes_on_from_the_cache(options: dict[str, Any]) -> None:
    decoder = decoder_of(**options)
    ids = torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8]])
    mask, cache = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]), KeyValueCache()
    more = torch.tensor([[9], [10]])
    with torch.no_grad():
        decoder(ids, attention_mask=mask, cache=cache)
        step = decoder(more, attention_mask=torch.cat([mask, torch.ones_like(more)], 1), cache=cache).hidden
    expected = [decoder(torch.tensor([[3, 4, 5, 6, 9]])), decoder(torch.tensor([[7, 8, 10]]))]
    torch.testing.assert_close(step[:, 0], torch.cat([e.hidden[:, -1] for e in expected]), rtol=0, atol=1e-13)


def test_no_token_sees_a_later_one(options: dict[str, Any]) -> None:
    decoder, changed = decoder_of(**options), IDS.clone()
    changed[0, 3] = 11
    first, second = decoder(IDS).hidden, decoder(changed).hidden
    torch.testing.assert_close(first[:, :3], second[:, :3], rtol=0, atol=1e-14)
    assert (first - second)[:, 3:].abs().amax(-1).min() > 1e-7


def test_weights_of_all_layers_come_on_request(options: dict[str, Any]) -> None:
    decoder = decoder_of(**options)
    output = decoder(IDS, weights=True)
    assert decoder(IDS).weights is None
    assert output.weights is not None
    assert len(output.weights["decoder"]) == decoder.config.n_layers
    for pattern in output.weights["decoder"]:
        assert pattern.shape == (1, decoder.config.n_heads, 6, 6)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:3], dtype=pattern.dtype))
        assert pattern.triu(1).abs().max() == 0
    torch.testing.assert_close(output.hidden, decoder(IDS).hidden, rtol=0, atol=1e-13)


def test_the_last_logits_alone() -> None:
    decoder = decoder_of()
    last = decoder(IDS, last_logits=2).logits
    torch.testing.assert_close(last, decoder(IDS).logits[:, -2:], rtol=0, atol=1e-14)


def test_one_layer_of_the_theory_is_its_formula() -> None:
    decoder = decoder_of(**THEORY, attention_bias=False)
    attention = decoder.blocks[0].attention
    x = decoder.tokens(IDS)[0]
    logits = x @ attention.W[0].T @ x.T  # row: query z, column: key x, entry x' W z
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    mixed = (
        logits.masked_fill(hidden, -torch.inf).softmax(-1) @ x @ attention.value.weight.T @ attention.output.weight.T
    )
    expected = (x + mixed) @ decoder.tokens.weight.T
    torch.testing.assert_close(decoder(IDS).logits[0], expected, rtol=0, atol=1e-13)


def test_gradients_through_a_cache_are_those_without() -> None:
    decoder = decoder_of(**LLAMA)
    decoder(IDS).logits.square().sum().backward()
    expected = [parameter.grad.clone() for parameter in decoder.parameters()]
    decoder.zero_grad()
    cache = KeyValueCache()
    parts = [decoder(part, cache=cache).logits for part in IDS.split(3, dim=1)]
    torch.cat(parts, 1).square().sum().backward()
    for parameter, gradient in zip(decoder.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


BATCH = torch.tensor([[3, 4, 5], [0, 3, 4]])


@pytest.mark.parametrize(
    "ids, arguments, message",
    [
        (torch.full((1, 13), 3), {}, "context of 12 positions, got 13"),
        (torch.tensor([[20]]), {}, r"in \[0, 20\), the vocabulary, got 20"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "at least one token"),
        (BATCH, {}, "unequal lengths"),
        (BATCH, {"attention_mask": BATCH == 0}, "True exactly on the padding"),
        (BATCH, {"attention_mask": torch.ones(1, 3)}, r"must be \(B, T\) = \(2, 3\), got \(1, 3\)"),
    ],
)
def test_wrong_input_is_named(ids: torch.Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        decoder_of(pad_id=0)(ids, **arguments)


@pytest.mark.parametrize("ends", [{"eos_id": 0}, {"eos_id": (1, 0)}, {"bos_id": 0}])
def test_a_padding_id_that_means_something_else_is_no_padding(ends: dict[str, Any]) -> None:
    assert decoder_of(pad_id=0, **ends)(BATCH).logits is not None


def test_the_cache_counts_towards_the_context() -> None:
    decoder, cache = decoder_of(), KeyValueCache()
    decoder(torch.full((1, 10), 3), cache=cache)
    with pytest.raises(InvalidInputError, match="context of 12 positions, got 3 after 10 in the cache"):
        decoder(torch.full((1, 3), 3), cache=cache)
    with pytest.raises(InvalidInputError, match="the positions in the cache included"):
        decoder(torch.full((1, 1), 3), attention_mask=torch.ones(1, 1), cache=cache)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_ctx": 0}, "n_ctx must be an integer of at least 1, got 0"),
        ({"positions": "sinusoidal"}, "positions must be one of learned, rotary, none, got 'sinusoidal'"),
        ({"n_heads": 3}, "n_heads"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        decoder_of(**options)

"""The encoder-decoder: against torch's own layers, with and without cache, padded and not, and with bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attsvm.attention.cache import KeyValueCache
from attsvm.errors import InvalidInputError
from attsvm.models.seq2seq import Seq2Seq, Seq2SeqCache, Seq2SeqConfig

ORIGINAL = Seq2SeqConfig(d_vocab=13, d_model=12, n_heads=3, n_layers=2, d_mlp=20, n_decoder_layers=3)
BART = replace(
    ORIGINAL,
    n_ctx=16,
    positions="learned",
    position_offset=2,
    activation="gelu",
    embedding_norm=True,
    scale_embedding=False,
    logits_bias=True,
    n_decoder_heads=2,
    d_decoder_mlp=10,
)
T5 = replace(
    ORIGINAL,
    positions="relative",
    n_buckets=8,
    max_distance=10,
    place="pre",
    norm="rms",
    bias=False,
    scale=1.0,
    d_head=5,
    scale_embedding=False,
    scale_head=True,
)
FLAN = replace(T5, activation="geglu_tanh", tied_head=False, scale_head=False)
CONFIGS = {"original": ORIGINAL, "bart": BART, "t5": T5, "flan": FLAN}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make(config: Seq2SeqConfig) -> Seq2Seq:
    torch.manual_seed(0)
    model = Seq2Seq(config).double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(std=0.4)
    return model


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 13, shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------ against torch layers


def copy_attention(ours: Any, theirs: nn.MultiheadAttention) -> None:
    parts = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    theirs.out_proj.load_state_dict(ours.output.state_dict())


@torch.no_grad()
def torch_stack(stack: Any, *, decoder: bool, activation: str) -> nn.Module:
    """The blocks of a stack as torch has them."""
    layers = []
    for block in stack.blocks:
        kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
        sizes = (block.config.d_model, block.config.n_heads, block.config.d_mlp)
        layer = kind(*sizes, 0.0, activation, batch_first=True, norm_first=block.config.place == "pre").double()
        copy_attention(block.attention, layer.self_attn)
        norms = ["attention", "mlp"]
        if decoder:
            copy_attention(block.cross, layer.multihead_attn)
            norms.insert(1, "cross")
        for number, name in enumerate(norms, 1):
            getattr(layer, f"norm{number}").load_state_dict(block.norms[name].state_dict())
        layer.linear1.load_state_dict(block.mlp.up.state_dict())
        layer.linear2.load_state_dict(block.mlp.down.state_dict())
        layers.append(layer)
    return nn.ModuleList(layers).eval()


def sines(length: int, width: int) -> Tensor:
    table = torch.zeros(length, width, dtype=torch.float64)
    for place in range(length):
        for column in range(0, width, 2):
            angle = place / 10000 ** (column / width)
            table[place, column], table[place, column + 1] = math.sin(angle), math.cos(angle)
    return table


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("place", ["pre", "post"])
@torch.no_grad()
def test_equals_torch_layers(place: str, activation: str) -> None:
    model = make(replace(ORIGINAL, place=place, activation=activation))
    source, target = ids(2, 6), ids(2, 5)
    hidden = {}
    for name, tokens in (("encoder", source), ("decoder", target)):
        x = model.tokens(tokens) * math.sqrt(12) + sines(tokens.shape[1], 12)
        stack = getattr(model, name)
        for layer in torch_stack(stack, decoder=name == "decoder", activation=activation):
            if name == "encoder":
                x = layer(x)
            else:
                x = layer(x, hidden["encoder"], tgt_mask=nn.Transformer.generate_square_subsequent_mask(5).double())
        hidden[name] = stack.norm(x)
    output = model(source, target)
    close(model.encode(source), hidden["encoder"])
    close(output.hidden, hidden["decoder"])
    close(output.logits, hidden["decoder"] @ model.tokens.weight.T)


@torch.no_grad()
def test_relative_bias_is_that_of_the_formula() -> None:
    """The first pattern of the encoder, with 8 buckets: 4 for keys before and at the query, 4 for those after."""
    model = make(T5)
    source = ids(1, 3)
    block = model.encoder.blocks[0]
    x = block.norms["attention"](model.tokens(source))
    q = block.attention.query(x).view(3, 3, 5).transpose(0, 1)
    k = block.attention.key(x).view(3, 3, 5).transpose(0, 1)
    bias = model.encoder.relative_bias.weight
    # Exact buckets are 0 and 1; from 2 on they are shared: 2 + floor(log(2 / 2) / log(10 / 2) * 2) = 2.
    buckets = torch.tensor([[0, 5, 6], [1, 0, 5], [2, 1, 0]])
    logits = q @ k.mT + bias[buckets].permute(2, 0, 1)
    close(model(source, source, weights=True).weights["encoder"][0][0], logits.softmax(-1))


# --------------------------------------------------------------------------------------------- one pass or many


@EACH
@pytest.mark.parametrize("sizes", [[1] * 6, [3, 1, 2], [6]], ids=str)
@torch.no_grad()
def test_cached_equals_uncached(config: Seq2SeqConfig, sizes: list[int]) -> None:
    model = make(config)
    source, target = ids(2, 7), ids(2, 6)
    real = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    expected = model(source, target, attention_mask=real, weights=True)
    cache = model.new_cache(6)
    outputs = []
    for number, part in enumerate(target.split(sizes, dim=1)):
        first = number == 0
        outputs.append(
            model(source if first else None, part, attention_mask=real if first else None, cache=cache, weights=True)
        )
    close(torch.cat([output.logits for output in outputs], 1), expected.logits)
    assert cache.length == 6
    for layer in range(3):
        close(torch.cat([output.weights["cross"][layer] for output in outputs], 2), expected.weights["cross"][layer])
        last = outputs[-1].weights["decoder"][layer]
        close(last, expected.weights["decoder"][layer][:, :, -sizes[-1] :])
    assert "encoder" in outputs[0].weights
    assert all("encoder" not in output.weights for output in outputs[1:])


@EACH
@torch.no_grad()
def test_encoded_once_equals_encoded_each_time(config: Seq2SeqConfig) -> None:
    model = make(config)
    source, target, real = ids(2, 5), ids(2, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    encoded = model.encode(source, real)
    close(
        model(None, target, encoded=encoded, attention_mask=real).logits,
        model(source, target, attention_mask=real).logits,
    )


@EACH
@torch.no_grad()
def test_reordered_cache_is_that_of_the_reordered_batch(config: Seq2SeqConfig) -> None:
    model = make(config)
    source, target = ids(3, 5), ids(3, 4)
    real = torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1] * 5])
    index = torch.tensor([1, 1, 0, 2])
    cache = model.new_cache()
    model(source, target[:, :3], attention_mask=real, cache=cache)
    cache.reorder(index)
    found = model(None, target[index, 3:], cache=cache).logits
    close(found, model(source[index], target[index], attention_mask=real[index]).logits[:, 3:])


@EACH
@torch.no_grad()
def test_only_the_last_logits(config: Seq2SeqConfig) -> None:
    model = make(config)
    output = model(ids(2, 5), ids(2, 4), last_logits=1)
    close(output.logits, model(ids(2, 5), ids(2, 4)).logits[:, -1:])
    assert output.hidden.shape == (2, 4, 12)


# ------------------------------------------------------------------------------------------------------------- padding


@EACH
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(config: Seq2SeqConfig, side: str) -> None:
    model = make(config)
    source, target = ids(1, 4), ids(1, 3)
    pad, one = torch.full((1, 2), 9), torch.ones(1, 4, dtype=torch.bool)
    none = torch.zeros(1, 2, dtype=torch.bool)
    expected = model(source, target)

    def padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
        parts, masks = [tokens, pad], [one[:, : tokens.shape[1]], none]
        order = slice(None, None, -1 if side == "left" else 1)
        return torch.cat(parts[order], 1), torch.cat(masks[order], 1)

    kept = slice(2, None) if side == "left" else slice(None, 3)
    long_source, real = padded(source)
    close(model(long_source, target, attention_mask=real).logits, expected.logits)
    long_target, target_real = padded(target)
    found = model(long_source, long_target, attention_mask=real, decoder_mask=target_real).logits[:, kept]
    close(found, expected.logits)


@EACH
@torch.no_grad()
def test_a_source_of_padding_alone_gives_numbers(config: Seq2SeqConfig) -> None:
    model = make(config)
    output = model(ids(1, 4), ids(1, 3), attention_mask=torch.zeros(1, 4), weights=True)
    assert output.logits.isfinite().all()
    assert all((pattern == 0).all() for pattern in output.weights["cross"])


# ------------------------------------------------------------------------------------------------------ what attends to


@EACH
@torch.no_grad()
def test_patterns_are_distributions_and_causal_in_the_decoder(config: Seq2SeqConfig) -> None:
    model = make(config)
    weights = model(ids(2, 5), ids(2, 4), weights=True).weights
    heads = config.n_decoder_heads or 3
    for kind, shape, depth in (
        ("encoder", (2, 3, 5, 5), 2),
        ("decoder", (2, heads, 4, 4), 3),
        ("cross", (2, heads, 4, 5), 3),
    ):
        assert [pattern.shape for pattern in weights[kind]] == [shape] * depth
        for pattern in weights[kind]:
            close(pattern.sum(-1), torch.ones(shape[:3], dtype=torch.float64))
    assert all((pattern.triu(1) == 0).all() for pattern in weights["decoder"])
    assert model(ids(2, 5), ids(2, 4)).weights is None


@EACH
@torch.no_grad()
def test_asking_for_weights_changes_no_logits(config: Seq2SeqConfig) -> None:
    model = make(config)
    close(model(ids(2, 5), ids(2, 4), weights=True).logits, model(ids(2, 5), ids(2, 4)).logits)


def test_gradients_reach_every_parameter_and_are_right() -> None:
    config = replace(T5, d_vocab=5, d_model=4, n_heads=2, d_head=2, d_mlp=3, n_layers=1, n_decoder_layers=1)
    model = make(config)
    source, target = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 4]])
    names = [name for name, _ in model.named_parameters()]

    def logits(*values: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, dict(zip(names, values)), (source, target)).logits
        return output

    values = tuple(parameter.detach().clone().requires_grad_() for parameter in model.parameters())
    assert torch.autograd.gradcheck(logits, values, atol=1e-7)
    logits(*values).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in values)


# -------------------------------------------------------------------------------------------------------------- counts


@EACH
def test_counts_of_parameters_agree(config: Seq2SeqConfig) -> None:
    model = Seq2Seq(config)
    assert config.n_parameters == model.n_parameters == sum(parameter.numel() for parameter in model.parameters())


@EACH
@torch.no_grad()
def test_flops_are_those_that_torch_counts(config: Seq2SeqConfig) -> None:
    model = make(config)
    with FlopCounterMode(display=False) as counter:
        model(ids(1, 7), ids(1, 5), weights=True)
    assert config.flops(7, 5) == counter.get_total_flops()
    assert config.flops(7) == config.flops(7, 7)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"positions": "rotary"}, "positions must be one of sinusoidal, learned, relative, got 'rotary'"),
        ({"positions": "learned"}, "n_ctx must be given with learned positions"),
        ({"d_mlp": 0}, "d_mlp must be at least 1, got 0"),
        ({"n_decoder_layers": -1}, "n_decoder_layers must be at least 1, got -1"),
        ({"d_model": 9, "n_heads": 3}, "d_model must be even with sinusoidal positions, got 9"),
        ({"position_offset": -1}, "position_offset must not be negative"),
    ],
)
def test_bad_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        replace(ORIGINAL, **change)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="n_heads must divide d_model"):
        Seq2Seq(replace(ORIGINAL, n_heads=5))


@pytest.mark.parametrize(
    "source, target, options, message",
    [
        (ids(1, 17), ids(1, 2), {}, "ids must fit into the context of 16 positions, got 17"),
        (ids(1, 2), ids(1, 17), {}, "decoder_ids must fit into the context of 16 positions, got 17"),
        (ids(1, 2) + 13, ids(1, 2), {}, r"ids must be in \[0, 13\), the vocabulary"),
        (ids(1, 2), ids(1, 2) - 13, {}, r"decoder_ids must be in \[0, 13\), the vocabulary"),
        (ids(1, 2), ids(1, 0), {}, "decoder_ids must hold at least one token"),
        (ids(1, 2).double(), ids(1, 2), {}, "ids must be integers"),
        (None, ids(1, 2), {}, "ids must be given unless encoded or a filled cache is"),
        (ids(1, 2), ids(2, 2), {}, r"encoded must be \(2, S, 12\), got \(1, 2, 12\)"),
        (ids(1, 2), ids(1, 2), {"attention_mask": torch.ones(1, 3)}, "attention_mask must be"),
        (ids(1, 2), ids(1, 2), {"decoder_mask": torch.ones(1, 3)}, "attention_mask must be"),
        (None, ids(1, 2), {"encoded": torch.zeros(1, 3, 5)}, r"encoded must be \(1, S, 12\)"),
        (
            None,
            ids(1, 2),
            {"encoded": torch.zeros(1, 3, 12).double(), "attention_mask": torch.ones(1, 2)},
            r"attention_mask must have the shape \(1, 3\) of the source",
        ),
        (ids(1, 2), ids(1, 2), {"cache": KeyValueCache()}, "cache must be a Seq2SeqCache"),
    ],
)
def test_bad_input_is_refused(source: Tensor | None, target: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make(BART)(source, target, **options)


def test_inverse_and_absent_masks_are_found_out() -> None:
    model = make(replace(BART, pad_id=0))
    source = torch.tensor([[3, 4, 5], [3, 0, 0]])
    with pytest.raises(InvalidInputError, match="True exactly on the padding"):
        model(source, ids(2, 2), attention_mask=source == 0)
    with pytest.raises(InvalidInputError, match="attention_mask must be given for sequences of unequal lengths"):
        model(source, ids(2, 2))
    assert model(source, ids(2, 2), attention_mask=source != 0).logits.shape == (2, 2, 13)
    with pytest.raises(InvalidInputError, match=r"\(decoder_mask\): attention_mask must be True on real tokens"):
        model(ids(2, 2), source, decoder_mask=source == 0)


@torch.no_grad()
def test_targets_may_be_padded_without_a_mask() -> None:
    """As in training: no token before the padding sees it, and T5 even starts with it."""
    model = make(replace(T5, pad_id=0, start_id=0))
    target = torch.tensor([[0, 4, 5], [0, 3, 0]])
    close(model(ids(2, 4), target).logits[1, :2], model(ids(2, 4)[1:], target[1:, :2]).logits[0])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    close(model(ids(2, 4), target, decoder_mask=mask).logits[1, :2], model(ids(2, 4), target).logits[1, :2])


def test_the_cache_counts_towards_the_context() -> None:
    model = make(BART)
    cache = model.new_cache()
    assert isinstance(cache, Seq2SeqCache)
    model(ids(1, 2), ids(1, 15), cache=cache)
    with pytest.raises(InvalidInputError, match="got 2 after 15 in the cache"):
        model(None, ids(1, 2), cache=cache)


def test_a_refused_call_leaves_the_cache_empty() -> None:
    model, cache = make(BART), make(BART).new_cache()
    with pytest.raises(InvalidInputError, match="decoder_ids"):
        model(ids(1, 2), ids(1, 2) + 13, cache=cache)
    assert cache.encoded is None
    assert cache.length == 0
    close(model(ids(1, 4), ids(1, 2), cache=cache).logits, model(ids(1, 4), ids(1, 2)).logits)

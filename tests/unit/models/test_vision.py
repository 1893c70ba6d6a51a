"""The vision transformer: against torch's own layers, its heads, its counts, and bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attsvm.errors import InvalidInputError
from attsvm.models.vision import Vision, VisionConfig

PLAIN = VisionConfig(image_size=8, patch_size=4, d_model=12, n_heads=3, n_layers=2, d_mlp=20)
VIT = replace(PLAIN, image_size=(8, 12), patch_size=(4, 2), d_pooled=7, n_classes=5)
DINO = replace(
    PLAIN,
    qkv_bias=False,
    n_channels=1,
    activation="swiglu",
    layer_scale=0.5,
    mask_token=True,
    n_classes=4,
    head_input="cls_mean",
)
CONFIGS = {"plain": PLAIN, "vit": VIT, "dino": DINO}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make(config: VisionConfig) -> Vision:
    torch.manual_seed(0)
    model = Vision(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def images(config: VisionConfig, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, config.n_channels, *config.image_shape, generator=generator, dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_patch_is_a_linear_map_of_its_pixels() -> None:
    model, x = make(VIT), images(VIT)
    tokens = model.embed(x) - model.positions
    close(tokens[:, 0], model.cls[0].expand(2, -1))
    weight = model.patches.weight.flatten(1)
    # Patches of 4 x 2 pixels are read row by row, 6 to a row.
    for number, (row, column) in {0: (0, 0), 5: (0, 5), 6: (1, 0), 10: (1, 4)}.items():
        pixels = x[:, :, 4 * row : 4 * row + 4, 2 * column : 2 * column + 2].flatten(1)
        close(tokens[:, 1 + number], pixels @ weight.T + model.patches.bias)


@torch.no_grad()
def test_equals_torch_layers() -> None:
    model, x = make(PLAIN), images(PLAIN)
    y = model.embed(x)
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(12, 3, 20, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
        layer = layer.double().eval()
        parts = (block.attention.query, block.attention.key, block.attention.value)
        layer.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        layer.self_attn.out_proj.load_state_dict(block.attention.output.state_dict())
        layer.norm1.load_state_dict(block.norms["attention"].state_dict())
        layer.norm2.load_state_dict(block.norms["mlp"].state_dict())
        layer.linear1.load_state_dict(block.mlp.up.state_dict())
        layer.linear2.load_state_dict(block.mlp.down.state_dict())
        y = layer(y)
    output = model(x)
    close(output.hidden, model.norm(y))
    close(output.pooled, output.hidden[:, 0])
    assert output.logits is None


@torch.no_grad()
def test_layer_scale_multiplies_what_each_part_adds() -> None:
    """With factors of 0 only the embedding is left; with 1 it is the model without them."""
    model, x = make(DINO), images(DINO)
    without = Vision(replace(DINO, layer_scale=None)).double().eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if "scales" not in name}
    without.load_state_dict(state)
    factors = [scale for block in model.blocks for scale in block.scales.values()]
    assert len(factors) == 4
    for factor in factors:
        factor.fill_(1.0)
    close(model(x).hidden, without(x).hidden)
    for factor in factors:
        factor.zero_()
    close(model(x).hidden, model.norm(model.embed(x)))


@torch.no_grad()
def test_heads_see_what_they_should() -> None:
    vit, dino = make(VIT), make(DINO)
    output = vit(images(VIT))
    close(output.pooled, (output.hidden[:, 0] @ vit.pooler.weight.T + vit.pooler.bias).tanh())
    close(output.logits, output.hidden[:, 0] @ vit.head.weight.T + vit.head.bias)
    output = dino(images(DINO))
    seen = torch.cat((output.hidden[:, 0], output.hidden[:, 1:].mean(1)), -1)
    close(output.logits, seen @ dino.head.weight.T + dino.head.bias)


@torch.no_grad()
def test_masked_patches_are_not_seen() -> None:
    model, x = make(DINO), images(DINO)
    masked = torch.tensor([[False, True, False, False], [False, False, False, True]])
    other = x.clone()
    other[0, :, :4, 4:] += 1.0
    other[1, :, 4:, 4:] -= 1.0
    close(model(x, masked=masked).hidden, model(other, masked=masked).hidden)
    assert not torch.equal(model(x).hidden, model(other).hidden)
    close(model.embed(x, masked=masked)[0, 2], model.mask_token[0] + model.positions[0, 2])


@EACH
@torch.no_grad()
def test_patterns_are_distributions(config: VisionConfig) -> None:
    model, x = make(config), images(config)
    output = model(x, weights=True)
    T = config.n_ctx
    assert [pattern.shape for pattern in output.weights["encoder"]] == [(2, 3, T, T)] * 2
    for pattern in output.weights["encoder"]:
        close(pattern.sum(-1), torch.ones(2, 3, T, dtype=torch.float64))
    close(model(x).hidden, output.hidden)
    assert model(x).weights is None


@EACH
@torch.no_grad()
def test_counts_agree(config: VisionConfig) -> None:
    model = make(config)
    assert config.n_parameters == model.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(images(config, 1), weights=True)
    assert config.flops() == config.flops(config.n_ctx) == counter.get_total_flops()


def test_gradients_are_right() -> None:
    small = replace(DINO, image_size=2, patch_size=1, d_model=4, n_heads=2, n_layers=1, d_mlp=3, n_classes=2)
    model, x = make(small), images(small, 1)
    names = [name for name, _ in model.named_parameters()]
    masked = torch.tensor([[False, True, False, False]])

    def logits(*values: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, dict(zip(names, values)), (x,), {"masked": masked}).logits
        return output

    values = tuple(parameter.detach().clone().requires_grad_() for parameter in model.parameters())
    assert torch.autograd.gradcheck(logits, values, atol=1e-7)
    logits(*values).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in values)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_heads": 5}, "n_heads must divide d_model, got d_model 12 and n_heads 5"),
        ({"patch_size": 3}, "patches must fill the image, got image_size 8 and patch_size 3"),
        ({"patch_size": 0}, "image_size and patch_size must be at least 1, got 8 and 0"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"head_input": "mean"}, "head_input must be"),
    ],
)
def test_bad_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        replace(PLAIN, **change)


@pytest.mark.parametrize(
    "config, x, masked, message",
    [
        (PLAIN, torch.zeros(1, 3, 16, 16).double(), None, r"shape \(B, 3, 8, 8\), got \(1, 3, 16, 16\). Positions are"),
        (PLAIN, torch.zeros(1, 1, 8, 8).double(), None, r"shape \(B, 3, 8, 8\), got \(1, 1, 8, 8\)"),
        (PLAIN, torch.zeros(3, 8, 8).double(), None, r"shape \(B, 3, 8, 8\), got \(3, 8, 8\)"),
        (PLAIN, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, "floating-point dtype, got torch.uint8"),
        (PLAIN, torch.zeros(1, 3, 8, 8).double(), torch.ones(1, 4).bool(), "masked must be None"),
        (DINO, torch.zeros(1, 1, 8, 8).double(), torch.ones(1, 4), r"masked must be bool of the shape \(1, 4\)"),
        (DINO, torch.zeros(1, 1, 8, 8).double(), torch.ones(1, 5).bool(), r"masked must be bool of the shape \(1, 4\)"),
    ],
)
def test_bad_input_is_refused(config: VisionConfig, x: Tensor, masked: Tensor | None, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make(config)(x, masked=masked)

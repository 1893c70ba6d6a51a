"""A few tokens, or one small picture, that a model takes: enough to see which of its modules attend, and how."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["example_inputs"]

_N_SOURCE, _N_TARGET = 5, 3  # of two lengths, so that attention to another text is seen
_N_PATCHES = 4  # on a side


def example_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs that show every attention module of a model, to be tried in turn, from the smallest."""
    config: Any = getattr(model, "config", None)
    inputs = _all_inputs(model, config)
    picture = inputs.get("pixel_values")
    # Attention in windows shows only on a picture of several.
    patch = None if _find(config, "window_size") else _find(config, "patch_size")
    if picture is not None and isinstance(patch, int) and _N_PATCHES * patch < min(picture.shape[-2:]):
        side = slice(0, _N_PATCHES * patch)
        yield {**inputs, "pixel_values": picture[..., side, side]}
    yield inputs
    if picture is not None and "input_ids" in inputs:
        # A model that expects a place for the picture among the tokens.
        yield {name: value for name, value in inputs.items() if name != "pixel_values"}


def _all_inputs(model: nn.Module, config: Any) -> dict[str, Any]:
    takes = set(inspect.signature(model.forward).parameters)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs: dict[str, Any] = {}
    if "input_ids" in takes:
        inputs["input_ids"] = _ids(config, _N_SOURCE, device)
        if "attention_mask" in takes:
            inputs["attention_mask"] = torch.ones(1, _N_SOURCE, dtype=torch.int64, device=device)
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _ids(config, _N_TARGET, device)
    if "pixel_values" in takes and _find(config, "image_size") is not None:
        inputs["pixel_values"] = _picture(config).to(device, dtype)
    if "input_features" in takes and _find(config, "num_mel_bins") is not None:
        length = 2 * int(_find(config, "max_source_positions") or 50)
        inputs["input_features"] = _waves(int(_find(config, "num_mel_bins")), length).to(device, dtype)
    if "input_values" in takes:
        # Spectrograms where the configuration says how many bands they have, or else a sound.
        bands, length = _find(config, "num_mel_bins"), _find(config, "max_length")
        size = (int(length), int(bands)) if bands and length else (4000,)
        inputs["input_values"] = _waves(*size).to(device, dtype)
    if "use_cache" in takes:
        inputs["use_cache"] = False
    return inputs


def _ids(config: Any, length: int, device: torch.device) -> Tensor:
    """Different tokens, none of them padding."""
    size = int(_find(config, "vocab_size") or 8)
    padding = _find(config, "pad_token_id")
    plain = [token for token in range(min(size, 64)) if token != padding][-length:]
    return torch.tensor([(plain * length)[:length]], dtype=torch.int64, device=device)


def _picture(config: Any) -> Tensor:
    size = _find(config, "image_size")
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return _waves(int(_find(config, "num_channels") or 3), int(height), int(width))


def _waves(*size: int) -> Tensor:
    """(1, *size): numbers in [-1, 1] of which no two stretches are the same."""
    return torch.arange(math.prod(size), dtype=torch.float64).square().mul(0.01).sin().reshape(1, *size)


def _find(config: Any, name: str) -> Any:
    """A field of a configuration or of one of its parts."""
    value = getattr(config, name, None)
    for part in getattr(config, "sub_configs", {}):
        if value is None:
            value = _find(getattr(config, part, None), name)
    return value

"""What can be inspected, what cannot, and the memory it takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.microscope.families import describe
from reference.microscope_models import MODELS

pytest.importorskip("transformers")

TINY = {tiny.family: tiny for tiny in MODELS}


def test_a_model_with_rotary_positions() -> None:
    model = TINY["llama"].build()
    found = describe(model)
    assert (found.family, found.tier, found.n_heads, found.d_model) == ("llama", "interface", 8, 32)
    assert {module.spaces for module in found.modules} == {("score",)}
    assert found.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert any("score space: rotary positions" in note for note in found.notes)


def test_a_model_with_everything_additive() -> None:
    found = describe(TINY["bert"].build())
    assert {module.spaces for module in found.modules} == {("score", "residual")}
    assert found.notes == ()


@pytest.mark.parametrize(
    "family, term, note",
    [("t5", "offsets", "fixed offsets"), ("gpt_oss", "sinks", "sink"), ("gemma2", "soft cap", "capped")],
)
def test_terms(family: str, term: str, note: str) -> None:
    found = describe(TINY[family].build())
    assert any(term in module.terms for module in found.modules)
    assert any(note in line for line in found.notes)


def test_shared_layers_are_noted() -> None:
    assert any("share their parameters" in note for note in describe(TINY["albert"].build()).notes)


class Both(nn.Module):
    """Attention that is heard, and attention that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TINY["bert"].build()
        self.other = nn.MultiheadAttention(4, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.inner(input_ids=input_ids)[0]
        return hidden


def test_attention_that_is_not_heard_is_noted() -> None:
    assert any("was heard: other (1 in all)" in note for note in describe(Both()).notes)


def test_memory_grows_with_the_batch() -> None:
    found = describe(TINY["bert"].build())
    small, long, wide = found.memory_bytes(1, 8), found.memory_bytes(1, 512), found.memory_bytes(16, 512)
    assert found.parameter_bytes < small < long < wide
    # The weights of a module alone: batch, heads, queries, keys, in float32.
    assert wide > 16 * 4 * 512 * 512 * 4
    with pytest.raises(InvalidInputError, match="at least 1, got 0 and 5"):
        found.memory_bytes(0, 5)


def test_a_model_without_attention() -> None:
    with pytest.raises(UnsupportedError, match="Linear, which has no attention"):
        describe(nn.Linear(2, 2))

"""The check against eager attention, which must fail where something is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attsvm.errors import InvalidInputError
from attsvm.microscope.check import TOLERANCE, check_against_eager
from attsvm.microscope.listening import Listener
from reference.microscope_models import MODELS, pairs, texts

pytest.importorskip("transformers")

TINY = {tiny.family: tiny for tiny in MODELS}


def test_a_sound_capture() -> None:
    check = check_against_eager(TINY["t5"].build(), pairs("left"))
    assert check.compared
    assert check.max_difference <= TOLERANCE
    # Two encoder layers of 7 and 4 tokens, twice 5 queries for the decoder and for cross-attention; padding may ask.
    assert check.n_rows >= 4 * (2 * (7 + 4) + 2 * 2 * 10)
    assert "is the model's eager attention" in check.note


@pytest.mark.parametrize("what", ["scale", "attention_mask", "offsets"])
def test_what_is_heard_wrongly_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hear = Listener.hear

    def wrong(self: Listener, module: Any, *args: Any, **given: Any) -> None:
        if self.names[id(module)].startswith("encoder.block.1"):
            given |= {"scale": 1.01} if what == "scale" else {what: None}
        hear(self, module, *args, **given)

    monkeypatch.setattr(Listener, "hear", wrong)
    check = check_against_eager(TINY["t5"].build(), pairs("left"))
    assert check.max_difference > 100 * TOLERANCE
    assert check.module == "encoder.block.1.layer.0.SelfAttention"
    assert check.module in check.note


def test_modules_that_put_out_no_weights_are_named() -> None:
    model: Any = TINY["bert"].build()
    module = model.encoder.layer[1].attention.self
    module.register_forward_hook(lambda _, __, output: (output[0], None))
    check = check_against_eager(model, texts("right"))
    assert not check.compared
    assert "1 of 2 modules put out no weights" in check.note
    assert "encoder.layer.1.attention.self" in check.note


def test_sixteen_bits_are_no_error() -> None:
    check = check_against_eager(TINY["llama"].build().to(torch.bfloat16), texts("right"))
    assert 0 < check.max_difference < 0.05
    assert "16 bits" in check.note


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    model: Any = TINY["bert"].build()
    with torch.no_grad():
        model.encoder.layer[1].attention.self.key.weight[0, 0] = bad
    with pytest.raises(InvalidInputError, match=r"NaN or infinity in encoder\.layer\.1\.attention\.self"):
        check_against_eager(model, texts("right"))

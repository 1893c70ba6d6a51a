"""Captured attention against the eager attention of transformers, family by family."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attsvm.microscope.calls import AttentionCall
from attsvm.microscope.capture import attention_modules, captured
from attsvm.microscope.check import TOLERANCE, check_against_eager
from attsvm.microscope.residual import check_residual, residual_heads
from reference.microscope_models import MODELS, Tiny, document

pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

FAMILIES = pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.family)
OUTPUTS = {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}


def capture(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[AttentionCall], Any]:
    calls: list[AttentionCall] = []
    with torch.no_grad(), captured(model, calls.append, inputs_too=True):
        return calls, model(**inputs)


def traces(model: nn.Module) -> Any:
    """Whatever a careless reader could leave behind."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return (
        model.config.to_dict(),
        [getattr(vars(m).get("config"), "_attn_implementation", None) for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        [m.training for m in model.modules()],
        hooks,
        sorted(AttentionInterface._global_mapping),
        sorted(AttentionMaskInterface._global_mapping),
    )


def turn_eager(model: Any) -> None:
    model.set_attn_implementation("eager")  # also in copies of the configuration
    model.config._attn_implementation = "eager"  # also of families outside the interface


def eager_attentions(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What transformers returns, by kind."""
    turn_eager(model)
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    if "encoder_attentions" in output:
        return {kind: output[name] for kind, name in OUTPUTS.items()}
    return {"encoder": output.attentions, "decoder": output.attentions}


@FAMILIES
@pytest.mark.parametrize("padding", ["left", "right"])
def test_weights_are_the_eager_ones_and_nothing_changes(tiny: Tiny, padding: str) -> None:
    model, inputs = tiny.build(), tiny.inputs(padding)
    with torch.no_grad():
        usual = model(**inputs)[0]
    before = traces(model)
    calls, output = capture(model, inputs)
    assert traces(model) == before
    torch.testing.assert_close(output[0], usual, rtol=0, atol=0)
    own = eager_attentions(model, inputs)
    seen: Counter[str] = Counter()
    for call in calls:
        theirs = own[call.info.kind][call.info.layer]
        ours = call.weights()
        rows = ours.sum(-1) > 0
        assert rows.float().mean() > 0.5
        torch.testing.assert_close(ours[rows], theirs[rows], rtol=0, atol=TOLERANCE)
        seen[call.info.kind] += 1
    assert all(seen[kind] == len(own[kind]) for kind in seen), "a layer was not heard"
    assert [call.info for call in calls] == attention_modules(model)


@FAMILIES
def test_eager_models_are_captured_too(tiny: Tiny) -> None:
    model: Any = tiny.build()
    turn_eager(model)
    inputs = tiny.inputs("left")
    with torch.no_grad():
        usual = model(**inputs)[0]
    _, output = capture(model, inputs)
    torch.testing.assert_close(output[0], usual, rtol=0, atol=0)
    check = check_against_eager(model, inputs)
    assert check.compared, check.note
    assert check.n_rows > 0
    assert check.max_difference <= TOLERANCE, check.note


@FAMILIES
def test_residual_matrices_give_the_products_or_there_is_a_reason(tiny: Tiny) -> None:
    model = tiny.build()
    calls, _ = capture(model, tiny.inputs("right"))
    for call in calls:
        heads = residual_heads(model, call.info)
        if isinstance(heads, str):
            assert "rotary" in heads or "normalises" in heads, heads
        else:
            assert len(heads) == call.info.n_heads
            assert heads[0].W.shape == (call.key_input.shape[-1] + 1, call.query_input.shape[-1] + 1)  # type: ignore[union-attr]
            assert check_residual(call, heads) < 1e-4


def test_at_least_thirty_families() -> None:
    assert len({tiny.family for tiny in MODELS}) >= 30


def test_the_table_in_the_documents_is_this_one() -> None:
    path = Path(__file__).parents[2] / "docs" / "families.md"
    assert path.read_text(encoding="utf-8") == document(), (
        "write it anew: python -m tests.reference.microscope_models > docs/families.md"
    )

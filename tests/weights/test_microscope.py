"""Capture of real weights: the same output, eager's own weights, and matrices on the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attsvm.microscope import inspect
from attsvm.microscope.calls import AttentionCall
from attsvm.microscope.capture import captured
from attsvm.microscope.check import TOLERANCE, check_against_eager
from attsvm.microscope.families import describe
from attsvm.microscope.residual import check_residual, residual_heads

transformers = pytest.importorskip("transformers")

Inputs = dict[str, Tensor]


def texts(d_vocab: int, **more: Tensor) -> Inputs:
    """Two texts of 24 and 17 tokens, padded on the left."""
    ids = torch.randint(5, d_vocab, (2, 24), generator=torch.Generator().manual_seed(6))
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, :7] = 0
    return {"input_ids": ids, "attention_mask": mask, **more}


def look(model: Any, inputs: Inputs) -> list[AttentionCall]:
    """Calls, once it is certain that nothing changes and that they are what eager attention computes."""
    model = model.eval()
    calls: list[AttentionCall] = []
    with torch.no_grad():
        expected = model(**inputs)[0]
        with captured(model, calls.append, inputs_too=True):
            found = model(**inputs)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    check = check_against_eager(model, inputs)
    assert check.compared, check.note
    assert check.max_difference <= TOLERANCE, check.note
    return calls


def assert_residual(model: Any, calls: list[AttentionCall]) -> None:
    for call in calls:
        heads = residual_heads(model, call.info)
        assert not isinstance(heads, str), f"{call.info.name}: {heads}"
        # Logits of real heads reach tens, in float32.
        largest = float(call.logits().nan_to_num(0.0, neginf=0.0).abs().max())
        assert check_residual(call, heads) <= 1e-5 * max(1.0, largest)


def test_minilm(minilm: Path) -> None:
    model = transformers.AutoModel.from_pretrained(minilm)
    assert_residual(model, look(model, texts(30000)))


def test_smollm2(smollm2: Path) -> None:
    model = transformers.AutoModel.from_pretrained(smollm2, dtype=torch.float32)
    calls = look(model, texts(49000))
    assert len(calls) == 30
    assert {(call.info.kind, call.info.n_heads, call.info.n_kv_heads) for call in calls} == {("decoder", 9, 3)}
    assert "rotary" in str(residual_heads(model, calls[0].info))


def test_t5(t5: Path) -> None:
    model = transformers.T5ForConditionalGeneration.from_pretrained(t5, dtype=torch.float32)
    calls = look(model, texts(32000, decoder_input_ids=texts(32000)["input_ids"][:, :9]))
    assert [sum(call.info.kind == kind for call in calls) for kind in ("encoder", "decoder", "cross")] == [8, 8, 8]
    assert all((call.offsets is None) == (call.info.kind == "cross") for call in calls)
    assert_residual(model, calls)


def test_dinov2(dinov2: Path) -> None:
    model = transformers.AutoModel.from_pretrained(dinov2)
    pictures = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(7))
    calls = look(model, {"pixel_values": pictures})
    assert {call.key_length for call in calls} == {17}
    assert_residual(model, calls)


@pytest.mark.slow
def test_capture_costs_less_than_eager_attention_with_its_weights(minilm: Path) -> None:
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    ids = torch.randint(5, 30000, (16, 128), generator=torch.Generator().manual_seed(8))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def seconds(run: Callable[[], Any]) -> float:
        start = process_time()
        with torch.no_grad():
            run()
        return process_time() - start

    def capture() -> None:
        with captured(model, lambda call: None, inputs_too=True):
            model(**inputs)

    def eager() -> None:
        model.set_attn_implementation("eager")
        model(**inputs, output_attentions=True)
        model.set_attn_implementation("sdpa")

    pairs = [(seconds(capture), seconds(eager)) for _ in range(6)]
    ratio = median(ours / theirs for ours, theirs in pairs[1:])
    assert ratio <= 1.3, f"capture took {ratio:.2f} times as long"


def test_the_memory_estimate_is_above_what_a_batch_takes(minilm: Path) -> None:
    # The largest tensors of eager attention at this size: scores and weights of 16 x 12 heads, 256 x 256.
    found = describe(transformers.AutoModel.from_pretrained(minilm))
    assert 90e6 < found.parameter_bytes < 92e6
    assert found.memory_bytes(16, 256) > found.parameter_bytes + 2 * 16 * 12 * 256**2 * 4
    assert found.memory_bytes(16, 256) < 1e9


@pytest.mark.slow
def test_known_heads_of_smollm2_are_found(smollm2: Path) -> None:
    """Its induction heads and its previous-token head, measured elsewhere on repeated words: 0.91, 0.78 and 0.92."""
    words = (
        "river stone cloud table green happy window music paper orange doctor winter engine silver bridge coffee "
        "garden letter market ocean planet rabbit school ticket valley yellow zebra anchor butter candle dragon eagle"
    ).split()
    draw = np.random.default_rng(0)
    repeated = [" ".join([*part, *part]) for part in (draw.permutation(words)[:25].tolist() for _ in range(3))]
    atlas = inspect(smollm2, texts=repeated, layers=(16, 17, 18), max_queries=0)
    best = sorted(atlas, key=lambda head: -(head["induction"] or 0.0))
    assert {head.label for head in best[:4]} >= {"L18.H6", "L17.H3"}
    assert atlas["L16.H0"]["previous"] == pytest.approx(0.92, abs=0.04)
    assert (atlas["L18.H6"].head_kind, atlas["L16.H0"].head_kind) == ("induction", "previous")


def test_an_encoder_decoder_whole(t5: Path) -> None:
    atlas = inspect(t5, texts=["translate English to German: The house is small."], max_queries=10, layers=(0, 7))
    assert {head.kind for head in atlas} == {"encoder", "decoder", "cross"}
    assert atlas.record["check"]["max_difference"] <= TOLERANCE
    assert atlas.record["shown"][0]["target"]["tokens"]
    assert {one["space"] for head in atlas for one in head.solutions} == {"residual", "score"}
    assert all(one["status"] == "OPTIMAL" for head in atlas for one in head.solutions)


@pytest.mark.slow
def test_a_picture_whole(dinov2: Path, tmp_path: Path) -> None:
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    file = tmp_path / "flower.png"
    pytest.importorskip("PIL.Image").fromarray(images[1]).save(file)
    atlas = inspect(dinov2, texts=[file], layers=(11,), max_queries=10)
    shown = atlas.record["shown"][0]
    assert shown["picture"]["data"].startswith("data:image/")
    assert len(shown["source"]["tokens"]) == 1 + 37 * 37
    assert len(atlas) == 6

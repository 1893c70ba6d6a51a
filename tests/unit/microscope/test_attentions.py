"""Weights that somebody already has: the same numbers as when the model itself is looked at."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from attsvm.errors import InvalidInputError
from attsvm.microscope import from_attentions, inspect
from unit.microscope.tiny_tokenizers import SENTENCES, tiny
from unit.microscope.tiny_tokenizers import trained as train

pytest.importorskip("transformers")

trained = functools.cache(train)


def outputs(family: str, texts: list[str], **more: Any) -> tuple[Any, list[list[str]]]:
    tokenizer = trained({"bert": "bert", "gpt2": "gpt2", "t5": "t5"}[family])
    model = tiny(family)
    model.set_attn_implementation("eager")
    tokenizer.padding_side = "right"
    batch = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
    with torch.no_grad():
        found = model(**batch, **more, output_attentions=True)
    lengths = batch["attention_mask"].sum(-1).tolist()
    names = [
        tokenizer.convert_ids_to_tokens(row[:n]) for row, n in zip(batch["input_ids"].tolist(), lengths, strict=True)
    ]
    return found, names


def test_it_agrees_with_the_model_that_made_the_weights() -> None:
    found, names = outputs("bert", SENTENCES)
    given = from_attentions(found.attentions, names)
    looked = inspect(tiny("bert"), trained("bert"), SENTENCES, max_queries=0)
    assert given.labels == looked.labels
    for mine, theirs in zip(given, looked, strict=True):
        for key in ("top_probability", "entropy", "margin", "mass_bound", "distance", "previous", "separator_mass"):
            assert mine[key] == pytest.approx(theirs[key], abs=2e-5), (mine.label, key)
        assert mine.head_kind == theirs.head_kind
    assert given.record["model"]["tier"] == "given"
    page = given.to_html()
    assert page.startswith("<!doctype html>")
    np.testing.assert_allclose(
        (given.arrays["shown.1.0.pattern"] / 255.0) ** 2,
        found.attentions[0][1, :, : len(names[1]), : len(names[1])].numpy(),
        atol=2 / 255,
    )


def test_a_decoder_is_told_by_its_zeros() -> None:
    found, names = outputs("gpt2", SENTENCES[:1])
    atlas = from_attentions(found.attentions, names[0])
    assert {head.kind for head in atlas} == {"decoder"}
    assert atlas["L0.H0"].values["next"] is None or atlas["L0.H0"]["next"] == 0.0


def test_three_kinds() -> None:
    target = torch.tensor([[3, 5, 7, 9]])
    found, names = outputs("t5", SENTENCES[:1], decoder_input_ids=target)
    parts = {"encoder": found.encoder_attentions, "decoder": found.decoder_attentions, "cross": found.cross_attentions}
    atlas = from_attentions(parts, names[0], target_tokens=["a", "b", "c", "d"])
    assert {head.kind for head in atlas} == {"encoder", "decoder", "cross"}
    assert atlas.arrays["shown.0.4.pattern"].shape == (4, 4, len(names[0]))
    with pytest.raises(InvalidInputError, match="target_tokens must be given"):
        from_attentions(parts, names[0])


def test_what_does_not_fit_is_named() -> None:
    found, names = outputs("bert", SENTENCES)
    with pytest.raises(InvalidInputError, match=r"set_attn_implementation\('eager'\)"):
        from_attentions((), names)
    with pytest.raises(InvalidInputError, match=r"a sequence for each of the 3 texts, got 2"):
        from_attentions(found.attentions, names[:2])
    with pytest.raises(InvalidInputError, match=r"as many as the weights are wide, \d+, or fewer; got 40"):
        from_attentions(found.attentions, [["a"] * 40, *names[1:]])
    with pytest.raises(InvalidInputError, match="left out for weights of one text"):
        from_attentions(found.attentions, names, target_tokens=names)

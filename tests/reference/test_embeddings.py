"""embed_text against transformers itself, on a real pretrained encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from attsvm.data import EmbeddedText, default_model_path, embed_text, load_sample
from attsvm.errors import UnsupportedError

SENTENCES = [
    "The cat sat on the mat.",
    "A kitten was lying on a rug.",
    "Stocks fell sharply in early trading.",
    "",
    "Unbelievably, embeddings' café is [SEP] not <script>",
    *load_sample().texts[:40],
]


@pytest.fixture(scope="module")
def folder() -> Path:
    pytest.importorskip("transformers")
    try:
        return default_model_path()
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    return (
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval(),
    )


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("layer", [-1, 0, 3])
def test_equal_to_one_sentence_at_a_time(folder: Path, model: tuple[Any, Any], tmp_path: Path, layer: int) -> None:
    tokenizer, encoder = model
    data = embed_text(SENTENCES, model=folder, layer=layer, cache_dir=tmp_path)
    for index, sentence in enumerate(SENTENCES):
        inputs = tokenizer(sentence, return_tensors="pt", split_special_tokens=True)
        with torch.no_grad():
            expected = encoder(**inputs, output_hidden_states=True).hidden_states[layer][0].numpy()
        assert data.lengths[index] == len(expected)
        np.testing.assert_allclose(data.tokens[index, : len(expected)], expected, atol=1e-5)
        assert list(data.pieces[index]) == tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])


def mean_pooled(data: EmbeddedText) -> npt.NDArray[np.floating[Any]]:
    real = (data.allowed | data.special)[..., None]
    vectors = (data.tokens * real).sum(axis=1) / real.sum(axis=1)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def test_meaning(folder: Path, tmp_path: Path) -> None:
    cat, kitten, stocks = mean_pooled(embed_text(SENTENCES[:3], model=folder, cache_dir=tmp_path))
    assert cat @ kitten > 0.5
    assert cat @ stocks < 0.2


def test_truncation(folder: Path, tmp_path: Path) -> None:
    data = embed_text(["word " * 510, "word " * 511, "x" * 100_000, "short"], model=folder, cache_dir=tmp_path)
    assert data.tokens.shape == (4, 512, 384)
    assert data.truncated.tolist() == [False, True, False, False]  # one word of 100,000 letters is one [UNK]
    assert data.n_truncated == 1


def test_surface_strings_stand_in_the_sentence(folder: Path, tmp_path: Path) -> None:
    data = embed_text(SENTENCES, model=folder, cache_dir=tmp_path)
    for sentence, strings, special in zip(SENTENCES, data.token_strings, data.special, strict=True):
        assert "".join(strings) == "".join(sentence.split())
        assert [string == "" for string in strings] == special[: len(strings)].tolist()
    assert "##ding" in data.pieces[4]
    assert "ding" in data.token_strings[4]

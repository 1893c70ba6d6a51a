"""Checkpoints written and read back, and every way in which one can be wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.models.decoder import Decoder, DecoderConfig, RotaryScaling
from attsvm.models.encoder import Encoder, EncoderConfig
from attsvm.models.pretrained import FAMILY_HOMES, family_of, from_pretrained, save_pretrained

SIZES = {"d_vocab": 20, "d_model": 8, "n_layers": 2, "n_heads": 4, "d_mlp": 12, "n_ctx": 12}
LLAMA = {
    **SIZES,
    "n_kv_heads": 2,
    "d_head": 2,
    "activation": "swiglu",
    "norm": "rms",
    "attention_bias": False,
    "output_bias": False,
    "mlp_bias": False,
    "positions": "rotary",
}
STRETCHED = RotaryScaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_n_ctx=8)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: Encoder(EncoderConfig(**SIZES, pooled=True, pad_id=0)),
    "bert-heads": lambda: Encoder(EncoderConfig(**SIZES, pooled=True, masked_head=True, next_sentence_head=True)),
    "bert-untied": lambda: Encoder(EncoderConfig(**SIZES, masked_head=True, tied=False, activation="relu")),
    "gpt2": lambda: Decoder(DecoderConfig(**SIZES, dropout=0.25)),
    "gpt2-untied": lambda: Decoder(DecoderConfig(**SIZES, tied=False, eos_id=(3, 4), scale=1.0)),
    "gpt2-headless": lambda: Decoder(DecoderConfig(**SIZES, tied=False, head=False)),
    "llama": lambda: Decoder(DecoderConfig(**LLAMA, rotary_base=500.0)),
    "llama-untied": lambda: Decoder(DecoderConfig(**LLAMA, tied=False, rotary_scaling=STRETCHED)),
    "llama-biased": lambda: Decoder(
        DecoderConfig(**{**LLAMA, "attention_bias": True, "output_bias": True, "mlp_bias": True, "activation": "geglu"})
    ),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # biases and normalisations too, so that none is taken for another
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved GPT-2."""
    save_pretrained(make("gpt2"), tmp_path)
    return tmp_path


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_comes_back(name: str, tmp_path: Path) -> None:
    model = make(name)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    expected = dict(model.named_parameters())
    assert expected.keys() == dict(loaded.named_parameters()).keys()
    for key, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[key]), key
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_dtype_is_that_of_the_file_unless_asked_for(tmp_path: Path) -> None:
    save_pretrained(make("gpt2").bfloat16(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in from_pretrained(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}
    edit_tensors(tmp_path, lambda tensors: tensors.update({"transformer.ln_f.bias": torch.ones(8)}))
    assert {p.dtype for p in from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_loading_leaves_the_random_numbers_of_the_caller_alone(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    from_pretrained(folder)
    assert torch.equal(torch.rand(3), expected)


def test_every_family_is_where_the_table_says() -> None:
    from importlib import import_module

    for model_type, home in FAMILY_HOMES.items():
        assert import_module(home).FAMILIES[model_type].model_type == model_type


def test_shards_are_read_as_one(folder: Path) -> None:
    expected = from_pretrained(folder).state_dict()
    shard(folder)
    for name, tensor in from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, expected[name])


def shard(folder: Path, **changed: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    shards = {name: file for file, part in parts.items() for name in part} | changed
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model.safetensors").unlink()


# Names of files that a hostile index could give: one outside, one of another kind, one that is not there.
@pytest.mark.parametrize(
    "file, message",
    [
        ("../b.safetensors", "must name .safetensors files of its own folder"),
        ("/etc/passwd", "must name .safetensors files of its own folder"),
        ("weights.bin", "must name .safetensors files of its own folder"),
        ("c.safetensors", "must hold all shards of the model, got none named c.safetensors"),
    ],
)
def test_an_index_names_shards_of_its_own_folder(folder: Path, file: str, message: str) -> None:
    shard(folder, **{"transformer.wte.weight": file})
    with pytest.raises(InvalidInputError, match=message):
        from_pretrained(folder)


def test_a_weight_of_the_index_must_be_in_the_shards(folder: Path) -> None:
    shard(folder, extra="a.safetensors")
    with pytest.raises(InvalidInputError, match="got none for extra"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), r"1 missing: h\.1\.ln_2\.bias"),
        (lambda t: t.update({"transformer.h.1.extra": torch.ones(1)}), r"1 too many: h\.1\.extra"),
        (lambda t: t.update({"score.weight": torch.ones(2, 8)}), r"1 too many: score\.weight"),
        (lambda t: t.update({"lm_head.weight": torch.ones(20, 8)}), r"1 too many: lm_head\.weight"),
        (lambda t: t.update({"ln_f.bias": torch.ones(8)}), r"one name each, got ln_f\.bias twice"),
        (
            lambda t: t.update({"transformer.ln_f.bias": torch.ones(9)}),
            r"ln_f\.bias must have the shape \(8,\) .* got \(9,\)",
        ),
        (
            lambda t: t.update({"transformer.h.0.attn.c_attn.weight": torch.ones(24, 8)}),
            r"c_attn\.weight must have the shape \(8, 24\) .* got \(24, 8\)",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": torch.ones(8, dtype=torch.int8)}),
            "floating-point, got torch.int8",
        ),
    ],
)
def test_weights_must_be_exactly_those_of_the_configuration(
    folder: Path, edit: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(InvalidInputError, match=message):
        from_pretrained(folder)


def test_many_wrong_weights_are_counted(folder: Path) -> None:
    edit_config(folder, n_layer=1)
    with pytest.raises(InvalidInputError, match=r"got 12 too many: .* and 9 more"):
        from_pretrained(folder)


def test_known_buffers_and_equal_copies_are_no_surplus(folder: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    expected = from_pretrained(folder).state_dict()
    edit_tensors(folder, add)
    for name, tensor in from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_old_names_of_bert_are_understood(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        tensors["embeddings.position_ids"] = torch.arange(12)[None]

    save_pretrained(make("bert"), tmp_path)
    expected = from_pretrained(tmp_path).state_dict()
    edit_tensors(tmp_path, rename)
    for name, tensor in from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("kept", [0, 4, 100, -10])
def test_a_truncated_file_is_named(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InvalidInputError, match=r"model\.safetensors must be a whole safetensors file"):
        from_pretrained(folder)


def test_a_file_whose_header_claims_more_than_there_is(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(InvalidInputError, match="must be a whole safetensors file"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"model_type": "mamba"}, UnsupportedError, "must be one of bert, .* got 'mamba'"),
        ({"model_type": None}, UnsupportedError, "got None"),
        ({"model_type": ["gpt2"]}, UnsupportedError, r"got \['gpt2'\]"),
        ({"model_type": "bert"}, InvalidInputError, "config.json must give vocab_size|must give hidden_size"),
        ({"n_embd": None}, InvalidInputError, "config.json must give n_embd, got none"),
        ({"n_embd": "wide"}, InvalidInputError, "d_model must be an integer of at least 1, got 'wide'"),
        ({"n_inner": 8.5}, InvalidInputError, "d_mlp must be an integer of at least 0, got 8.5"),
        ({"tie_word_embeddings": False, "architectures": 3}, InvalidInputError, "must give values of the right kind"),
        ({"n_embd": 10**9}, InvalidInputError, "Hint: config.json and the weights are of two models"),
        ({"n_layer": 10**9}, InvalidInputError, "must be those of 1000000000 layers"),
        ({"n_layer": -1}, InvalidInputError, "n_layers must be an integer of at least 1, got -1"),
        ({"n_head": 3}, InvalidInputError, "n_heads"),
        ({"activation_function": "mish"}, UnsupportedError, "activation_function .* got 'mish'"),
        ({"add_cross_attention": True}, UnsupportedError, "add_cross_attention .* must be False, got True"),
        ({"scale_attn_by_inverse_layer_idx": True}, UnsupportedError, "scale_attn_by_inverse_layer_idx"),
        ({"quantization_config": {"bits": 4}}, UnsupportedError, "must not be quantised"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(
    folder: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    edit_config(folder, **values)
    with pytest.raises(error, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_another_stretching_of_rotary_positions_is_refused(tmp_path: Path, kind: str) -> None:
    save_pretrained(make("llama"), tmp_path)
    edit_config(tmp_path, rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UnsupportedError, match=f"rope_type .* got '{kind}'"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "[" * 100_000])
def test_a_configuration_that_is_no_object_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(InvalidInputError, match=r"config\.json must"):
        from_pretrained(folder)


class Bomb:
    """Sets off when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_opened(folder: Path, file: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / file)
    for path in (folder, folder / file):
        with pytest.raises(UnsupportedError, match=f"{re.escape(file)}.* is a pickle and is never opened"):
            from_pretrained(path)


def test_paths_that_are_no_model_are_named(folder: Path) -> None:
    for path in (folder / "model.safetensors", folder / "config.json"):
        with pytest.raises(InvalidInputError, match=r"path must be a folder with config\.json"):
            from_pretrained(path)
    for path in (folder / "absent", "./absent", ""):
        with pytest.raises(InvalidInputError, match="must be an existing folder"):
            from_pretrained(path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"must hold model\.safetensors, got"):
        from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InvalidInputError, match=r"without config\.json"):
        from_pretrained(folder)


def test_a_model_that_no_family_has_is_not_saved(tmp_path: Path) -> None:
    theory = Decoder(DecoderConfig(**{**SIZES, "d_mlp": 0, "parameterization": "W"}))
    for model in (theory, Encoder(EncoderConfig(**SIZES, place="pre")), nn.Linear(2, 2)):
        with pytest.raises(UnsupportedError, match="model must be of a configuration that one of bert"):
            save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_is_not_saved_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidInputError, match="path must be a folder"):
        save_pretrained(make("gpt2"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_write_that_fails_leaves_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr("attsvm.models.pretrained.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(make("gpt2"), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", MODELS)
def test_the_family_of_a_model(name: str) -> None:
    assert family_of(make(name)).model_type == name.split("-")[0]

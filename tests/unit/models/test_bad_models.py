"""Whatever is wrong with the files of a model ends in one sentence: checkpoints of every family, tokenizers, GGUF; in
scripts and at the command line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attsvm.cli.main import run
from attsvm.errors import AttSVMError, InvalidInputError, UnsupportedError
from attsvm.models import (
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    GenerationConfig,
    RotaryScaling,
    Seq2Seq,
    Seq2SeqConfig,
    Vision,
    VisionConfig,
    from_pretrained,
    generate,
    save_pretrained,
)

D_VOCAB, N_CTX, PAD = 20, 12, 0
SIZES: dict[str, Any] = {"d_vocab": D_VOCAB, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_mlp": 12}
TEXT: dict[str, Any] = {**SIZES, "n_ctx": N_CTX}
IMAGE: dict[str, Any] = {"image_size": 4, "patch_size": 2, "d_model": 8, "n_heads": 2, "n_layers": 1, "d_mlp": 32}
LLAMA = {
    "n_kv_heads": 1,
    "activation": "swiglu",
    "norm": "rms",
    "attention_bias": False,
    "mlp_bias": False,
    "positions": "rotary",
    "rotary_scaling": RotaryScaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_n_ctx=8),
}
BART = {
    "n_ctx": N_CTX,
    "positions": "learned",
    "position_offset": 2,
    "embedding_norm": True,
    "scale_embedding": False,
    "activation": "gelu",
    "logits_bias": True,
    "pad_id": 1,
    "start_id": 2,
    "eos_id": 2,
}
T5 = {
    "positions": "relative",
    "place": "pre",
    "norm": "rms",
    "bias": False,
    "scale": 1.0,
    "scale_embedding": False,
    "scale_head": True,
    "pad_id": 0,
    "start_id": 0,
    "eos_id": 1,
}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: Encoder(EncoderConfig(**TEXT, pooled=True, pad_id=PAD)),
    "gpt2": lambda: Decoder(DecoderConfig(**TEXT)),
    "llama": lambda: Decoder(DecoderConfig(**TEXT, **LLAMA)),
    "bart": lambda: Seq2Seq(Seq2SeqConfig(**SIZES, **BART)),
    "t5": lambda: Seq2Seq(Seq2SeqConfig(**SIZES, **T5)),
    "vit": lambda: Vision(VisionConfig(**IMAGE, d_pooled=8)),
    "dinov2": lambda: Vision(VisionConfig(**IMAGE, layer_scale=1.0, head_input="cls_mean", mask_token=True)),
}

# --------------------------------------------------------------------------------------------------------- checkpoints


class Bomb:
    """Sets off when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **values}))


def a_matrix(tensors: dict[str, Tensor]) -> str:
    return next(name for name, tensor in tensors.items() if tensor.ndim == 2 and ".0." in name)


def lose(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(a_matrix(tensors)))


def add(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"classifier.extra": torch.ones(2)}))


def reshape(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({a_matrix(tensors): torch.ones(3, 5)}))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(), folder / "pytorch_model.bin")


def pickle_under_another_name(folder: Path) -> None:
    torch.save(Bomb(), folder / "model.safetensors")


def of_another_family(folder: Path) -> None:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    shutil.copy(folder.parent / ("t5" if kind != "t5" else "gpt2") / "config.json", folder)


def of_no_family(folder: Path) -> None:
    edit_config(folder, model_type="mamba")


def odd_heads(folder: Path) -> None:
    names = ("n_head", "num_heads", "num_attention_heads", "encoder_attention_heads")
    content = json.loads((folder / "config.json").read_text())
    edit_config(folder, **{name: 3 for name in names if name in content}, head_dim=None, d_kv=None)


DAMAGE: dict[str, tuple[Callable[[Path], None], type[AttSVMError], str]] = {
    "missing": (lose, InvalidInputError, "got 1 missing: "),
    "surplus": (add, InvalidInputError, "got 1 too many: .*extra"),
    "shape": (reshape, InvalidInputError, "must have the shape"),
    "truncated": (truncate, InvalidInputError, r"model\.safetensors must be a whole safetensors file"),
    "pickle": (pickle_instead, UnsupportedError, r"pytorch_model\.bin .*is a pickle and is never opened"),
    "pickle, renamed": (pickle_under_another_name, InvalidInputError, "must be a whole safetensors file"),
    "family": (of_another_family, InvalidInputError, "missing: |missing|layers of the weights"),
    "unknown family": (of_no_family, UnsupportedError, "must be one of bert, .* got 'mamba'"),
    "heads": (odd_heads, InvalidInputError, "n_heads must divide|n_kv_heads must divide|must give d_kv|have the shape"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name, make in FAMILIES.items():
        save_pretrained(make(), folder / name)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_checkpoint_is_one_sentence(saved: Path, tmp_path: Path, family: str, damage: str) -> None:
    shutil.copytree(saved, tmp_path / "all")
    spoil, error, words = DAMAGE[damage]
    spoil(tmp_path / "all" / family)
    with pytest.raises(error, match=words) as caught:
        from_pretrained(tmp_path / "all" / family)
    assert "\n" not in str(caught.value)


STRANGE: tuple[Any, ...] = (None, "x", -1, 0, 1.5, float("nan"), [1, 2], {"a": 1}, True, 10**30)


def call(model: nn.Module) -> None:
    ids = torch.tensor([[3, 4]])
    with torch.no_grad():
        if isinstance(model, Vision):
            output = model(torch.zeros(1, 3, 4, 4))
        else:
            output = model(ids, ids) if isinstance(model, Seq2Seq) else model(ids)
    assert output.hidden.isfinite().all()
    if isinstance(model, (Decoder, Seq2Seq)) and output.logits is not None:
        generate(model, ids, GenerationConfig(max_new_tokens=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_of_a_configuration_ends_in_anything_but_a_sentence(saved: Path, tmp_path: Path, family: str) -> None:
    """Each value of config.json replaced by each of the strange ones: the model works, or says what is wrong."""
    folder = Path(shutil.copytree(saved / family, tmp_path / family))
    content = json.loads((folder / "config.json").read_text())
    places = [(None, key) for key in content]
    places += [("rope_parameters", key) for key in content.get("rope_parameters", ())]
    said = []
    for outer, key in places:
        for value in STRANGE:
            changed = {**content[outer], key: value} if outer else value
            (folder / "config.json").write_text(json.dumps({**content, (outer or key): changed}))
            try:
                call(from_pretrained(folder))
            except AttSVMError as error:
                said.append(str(error))
    assert [one for one in said if "\n" in one] == []
    assert len(said) > 3 * len(places)


def test_whole_numbers_are_numbers(saved: Path, tmp_path: Path) -> None:
    """JSON knows one kind of number: a layer scale of 1 is one of 1.0."""
    folder = Path(shutil.copytree(saved / "dinov2", tmp_path / "dinov2"))
    edit_config(folder, layerscale_value=1, hidden_dropout_prob=0)
    call(from_pretrained(folder))


# ------------------------------------------------------------------------------------------------ tokenizers and GGUF


def save_tokenizer(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["<pad>", "<unk>", *"the black cat ate mouse".split()]
    model = tokenizers.models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder
    )


def with_remote_code(folder: Path) -> None:
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content |= {"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}, "tokenizer_class": "Theirs"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "theirs.py").write_text("raise SystemExit('ran what came with the model')\n")


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "absent": lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
    "truncated": lambda folder: (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:200]),
    "empty": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "no text": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe\x00"),
    "of no kind": lambda folder: (folder / "tokenizer.json").write_text(
        (folder / "tokenizer.json").read_text().replace("WordLevel", "Nonsense")
    ),
    "settings": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "code": with_remote_code,
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_wrong_tokenizer_is_one_sentence(tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is run, and nothing is asked: a question would wait for an answer that a script cannot give."""
    from attsvm.models.pretrained_tokenizer import TextTokenizer

    save_tokenizer(tmp_path)
    assert TextTokenizer(tmp_path).encode(["the cat"]) == [[2, 4]]
    TOKENIZERS[damage](tmp_path)
    with pytest.raises(InvalidInputError, match="must have the files of a tokenizer") as caught:
        TextTokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""


GGUF = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") + (1).to_bytes(8, "little")


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", GGUF, GGUF[:8] + b"\xff" * 16, GGUF + b"\xff" * 40, b"PK\x03\x04" + bytes(60), b"text" * 9],
)
def test_a_wrong_gguf_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"model\.gguf must be a whole GGUF file") as caught:
        from_pretrained(file)
    assert "\n" not in str(caught.value)


def write_gguf(file: Path) -> None:
    """A Llama of 8 coordinates as GGUF."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(D_VOCAB)
    shapes = {"token_embd": (D_VOCAB, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
    shapes |= {"blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8)}
    shapes |= {"blk.0.ffn_gate": (12, 8), "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12)}
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_loading_a_gguf_file_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers draws two bars; its settings are afterwards as they were."""
    logging = pytest.importorskip("transformers").utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    write_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    model = from_pretrained(tmp_path / "tiny.gguf")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert isinstance(model, Decoder)
    assert (model.config.d_model, model.config.n_kv_heads, model.config.tied) == (8, 1, True)
    call(model)


# ------------------------------------------------------------------------------------------------------- command line


COMMANDS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "absent": (("generate", "{all}/none", "-t", "cat"), 2, "must be an existing folder"),
    "no generator": (
        ("generate", "{all}/bert", "-t", "cat"),
        3,
        "must be a decoder or an encoder-decoder, got Encoder",
    ),
    "no translator": (("translate", "{all}/gpt2", "-t", "cat"), 3, "must be an encoder-decoder, got Decoder"),
    "no tokenizer": (("generate", "{all}/llama", "-t", "cat"), 2, "must have the files of a tokenizer"),
    "truncated": (("generate", "{all}/truncated", "-t", "cat"), 2, "must be a whole safetensors file"),
    "pickle": (("generate", "{all}/pickle", "-t", "cat"), 3, "is a pickle and is never"),
    "pickle, its file": (
        ("generate", "{all}/pickle/pytorch_model.bin", "-t", "cat"),
        3,
        "is a pickle and is never opened",
    ),
    "missing": (("translate", "{all}/missing", "-t", "cat"), 2, "got 1 missing"),
    "family": (("generate", "{all}/unknown", "-t", "cat"), 3, "got 'mamba'"),
    "empty": (("generate", "{all}/gpt2", "-t", ""), 2, "--text must not be empty"),
    "long": (("generate", "{all}/gpt2", "-t", "cat " * 13), 2, "context of 12 positions"),
    "vocabulary": (("generate", "{all}/small", "-t", "mouse"), 2, "is the tokenizer the one of this model?"),
}


@pytest.fixture(scope="module")
def folders(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("commands") / "all"))
    for name in ("gpt2", "bert", "t5"):
        save_tokenizer(folder / name)
    for name, family, spoil in (
        ("truncated", "gpt2", truncate),
        ("pickle", "gpt2", pickle_instead),
        ("missing", "t5", lose),
        ("unknown", "gpt2", of_no_family),
    ):
        shutil.copytree(folder / family, folder / name)
        spoil(folder / name)
    save_pretrained(Decoder(DecoderConfig(**{**TEXT, "d_vocab": 5})), folder / "small")
    save_tokenizer(folder / "small")
    return folder


@pytest.mark.parametrize("what", COMMANDS)
def test_a_wrong_command_is_one_sentence_and_an_exit_code(
    folders: Path, what: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, code, words = COMMANDS[what]
    monkeypatch.setattr(sys, "argv", ["attsvm", *(one.replace("{all}", str(folders)) for one in arguments)])
    with pytest.raises(SystemExit) as ended:
        run()
    said = capfd.readouterr()
    assert (ended.value.code, said.out) == (code, "")
    assert said.err.startswith("attsvm: ")
    assert said.err.count("\n") == 1
    assert words in said.err

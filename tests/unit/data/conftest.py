"""Tiny models with random weights, made here: no download, no package with weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ["the", "film", "is", "good", "bad", "em", "##bed", "##ding", ".", "a", "b", "'", "s", "sep", "[", "]"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ATTSVM_CACHE", str(tmp_path / "default-cache"))


def save_tokenizer(folder: Path, *, special: bool) -> int:
    """A WordPiece tokenizer; with [CLS] and [SEP] around the text if ``special``. Returns the vocabulary's size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if special else ["[UNK]"]
    vocabulary = {word: index for index, word in enumerate([*names, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    named: dict[str, Any] = {"unk_token": "[UNK]"}
    if special:
        ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        named |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return len(vocabulary)


def save_model(folder: Path, kind: str) -> Path:
    """A model of the given kind with two layers and d = 8."""
    import transformers

    size = save_tokenizer(folder, special=kind != "gpt2")
    torch.manual_seed(0)
    wide: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    wide |= {"initializer_range": 0.5}  # or a layer hardly changes what it gets, and tests see nothing
    match kind:
        case "bert":
            config = transformers.BertConfig(vocab_size=size, max_position_embeddings=20, **wide)
        case "roberta":
            config = transformers.RobertaConfig(vocab_size=size, max_position_embeddings=20, pad_token_id=0, **wide)
        case "t5":
            config = transformers.T5Config(
                vocab_size=size, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
            )
        case "gpt2":
            config = transformers.GPT2Config(
                vocab_size=size,
                n_embd=8,
                n_layer=2,
                n_head=2,
                n_positions=20,
                initializer_range=0.5,
                bos_token_id=0,
                eos_token_id=0,
            )
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by kind: bert, roberta, t5 or gpt2."""
    pytest.importorskip("transformers")
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_model(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder

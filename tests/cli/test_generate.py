"""``attsvm generate`` and ``attsvm translate`` on tiny checkpoints with a tokenizer of words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.commands import Commands

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"the a black white cat mouse dog ate saw and . run".split()]


def save_tokenizer(folder: Path) -> None:
    model = tokenizers.models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(folder)


def save_model(model: Any, folder: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
        # Special tokens get the logit 0, which some word beats.
        model.get_input_embeddings().weight[:4] = 0.0
    model.save_pretrained(folder)
    save_tokenizer(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=None
    )
    save_model(transformers.GPT2LMHeadModel(config), folder)
    return folder


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seq2seq")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    save_model(transformers.T5ForConditionalGeneration(config), folder)
    return folder


def test_text_goes_on(attsvm: Commands, decoder: Path) -> None:
    done = attsvm("generate", str(decoder), "-t", "the black cat", "--max-new-tokens", "6")
    assert done.code == 0
    assert 1 <= len(done.out.split()) <= 6
    assert "a second" in done.err
    again = attsvm("generate", str(decoder), "--text", "the black cat", "--max-new-tokens", "6", "--json")
    answer = json.loads(again.out)
    (one,) = answer["outputs"]
    assert one["prompt"] == "the black cat"
    assert one["text"].split() == done.out.split()
    assert len(one["tokens"]) <= 6


def test_several_texts_are_those_of_each_alone(attsvm: Commands, decoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("the cat\n\na white mouse saw\n", encoding="utf-8")
    done = attsvm("generate", str(decoder), "--text-file", str(file), "-t", "dog", "--max-new-tokens", "5", "-q")
    assert (done.code, done.err.count("a second")) == (0, 0)
    lines = done.out.splitlines()
    for text, line in zip(["dog", "the cat", "a white mouse saw"], lines, strict=True):
        alone = attsvm("generate", str(decoder), "-t", text, "--max-new-tokens", "5", "-q")
        assert alone.out.split() == line.split()


def test_a_text_stops_it(attsvm: Commands, decoder: Path) -> None:
    words = attsvm("generate", str(decoder), "-t", "the cat", "--max-new-tokens", "8", "-q").out.split()
    ended = attsvm("generate", str(decoder), "-t", "the cat", "--max-new-tokens", "8", "-q", "--stop", words[2]).out
    assert ended.split() == words[: words.index(words[2]) + 1]


def test_lookup_changes_no_word(attsvm: Commands, decoder: Path) -> None:
    options = ("generate", str(decoder), "-t", "the cat the cat", "--max-new-tokens", "16", "-q", "--lookup")
    assert attsvm(*options, "0").out == attsvm(*options, "5").out


def test_the_seed_decides(attsvm: Commands, decoder: Path) -> None:
    options = ("generate", str(decoder), "-t", "the", "--temperature", "3", "--top-k", "8", "--top-p", "0.9", "-q")
    first, same, other = (attsvm(*options, "--seed", seed).out for seed in ("1", "1", "2"))
    assert first == same != other


def test_answers_by_beam_search(attsvm: Commands, seq2seq: Path) -> None:
    options = ("translate", str(seq2seq), "-t", "cat ate mouse", "--prefix", "the ", "--max-new-tokens", "6", "--json")
    done = attsvm(*options)
    assert done.code == 0
    (one,) = json.loads(done.out)["outputs"]
    assert 1 <= len(one["tokens"]) <= 6
    assert one["score"] <= 0.0
    assert set(one["text"].split()) <= set(WORDS)
    assert one["prompt"] == "cat ate mouse"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["--text or --text-file must give at least one text"]),
        (("-t", " "), ["--text must not be empty"]),
        (("-t", "cat", "--temperature", "-1"), ["temperature must be >= 0"]),
        (("-t", "cat", "--beams", "2", "--temperature", "1"), ["temperature must be 0 with beams"]),
        (("-t", "cat", "--lookup", "-1"), ["lookup must be an integer >= 0, got -1"]),
        (("-t", "cat", "--batch-size", "0"), ["--batch-size must be at least 1, got 0"]),
        (("-t", "cat " * 30), ["must fit into the context of 24 positions", "30"]),
        (("--text-file", "absent.txt"), ["--text-file must be a readable UTF-8 file", "absent.txt"]),
    ],
)
def test_mistakes_are_one_sentence(attsvm: Commands, decoder: Path, options: tuple[str, ...], words: list[str]) -> None:
    attsvm("generate", str(decoder), *options).failed(2, *words)


def test_a_model_of_another_kind(attsvm: Commands, decoder: Path, seq2seq: Path, tmp_path: Path) -> None:
    attsvm("translate", str(decoder), "-t", "cat").failed(3, "MODEL must be an encoder-decoder, got Decoder")
    assert attsvm("generate", str(seq2seq), "-t", "cat", "--max-new-tokens", "3", "-q").code == 0
    attsvm("generate", str(tmp_path / "none"), "-t", "cat").failed(2, "must be")


def test_a_model_without_words_is_not_told_about_its_tokenizer(attsvm: Commands, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path)
    attsvm("generate", str(tmp_path), "-t", "cat").failed(
        3, "MODEL must be a decoder or an encoder-decoder, got Vision"
    )

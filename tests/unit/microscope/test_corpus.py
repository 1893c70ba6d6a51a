"""Texts in windows: every token named, every position as without padding, every decision noted."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attsvm.errors import InvalidInputError
from attsvm.microscope.corpus import read_corpus
from attsvm.microscope.loading import Loaded, load
from attsvm.microscope.windows import Corpus, Piece, batches
from unit.microscope.tiny_tokenizers import HOSTILE, SENTENCES, tiny, trained

pytest.importorskip("transformers")

KINDS = {"bert": "bert", "roberta": "bert", "gpt2": "gpt2", "opt": "gpt2", "llama": "llama", "t5": "t5", "bart": "t5"}
BODIES = "A quick fox and a lazy dog. " * 20


def pair(family: str, **given: Any) -> Loaded:
    return load(tiny(family, **given), trained(KINDS[family]))


def body(piece: Piece) -> tuple[int, ...]:
    return tuple(number for number, special in zip(piece.ids, piece.special, strict=True) if not special)


# ------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_hostile_texts_are_plain_visible_tokens(family: str) -> None:
    loaded = pair(family)
    corpus = read_corpus(loaded, [*HOSTILE, *SENTENCES], targets=["a"] * 11 if family == "t5" else None)
    assert len(corpus.windows) == 11
    for window in corpus.windows:
        piece = window.source
        assert len(piece.ids) == len(piece.tokens) == len(piece.words) == len(piece.special)
        assert [word == -1 for word in piece.words] == list(piece.special)
        seen = [word for word in piece.words if word >= 0]
        assert sorted(set(seen)) == list(range(len(set(seen))))
        for token in [*piece.tokens, *(corpus.names[number] for number in piece.ids)]:
            assert token
            assert not any(unicodedata.category(character)[0] == "C" for character in token.replace("\u200d", ""))
            assert not any(character.isspace() for character in token.removeprefix(" "))
    assert corpus.n_tokens == sum(window.n_tokens for window in corpus.windows)


def test_markup_stays_text_and_bytes_are_told_apart() -> None:
    (first, second) = read_corpus(pair("gpt2"), ["<b>", "x🙂"]).windows
    assert first.source.tokens == ("<", "b", ">")
    assert second.source.tokens == ("x", "⟨F0⟩", "⟨9F⟩", "⟨99⟩", "⟨82⟩")
    assert second.source.words == (0, 1, 1, 1, 1)
    (third,) = read_corpus(pair("llama"), ["x🙂"]).windows
    assert third.source.tokens[-4:] == ("⟨F0⟩", "⟨9F⟩", "⟨99⟩", "⟨82⟩")


def test_words_of_the_language_are_no_special_tokens_but_those_of_the_format_are() -> None:
    (window,) = read_corpus(pair("bert"), ["a [MASK] [SEP] ☃ doge"]).windows
    assert window.source.tokens == ("[CLS]", "a", " [MASK]", " [SEP]", " [UNK]", " dog", "e", "[SEP]")
    assert window.source.special == (True, False, False, True, False, False, False, True)
    assert window.source.words == (-1, 0, 1, -1, 2, 3, 3, -1)


def test_half_a_surrogate_pair_is_a_replacement_character() -> None:
    corpus = read_corpus(pair("gpt2"), ["a\ud800b"])
    assert corpus.texts == ("a\ufffdb",)
    assert corpus.windows[0].source.tokens == ("a", "⟨EF⟩", "⟨BF⟩", "⟨BD⟩", "b")


def test_a_tokenizer_that_does_not_tell_places() -> None:
    from transformers import ByT5Tokenizer

    corpus = read_corpus(load(tiny("t5"), ByT5Tokenizer()), ["né ok"], targets=["x"])
    piece = corpus.windows[0].source
    assert piece.tokens == ("n", "⟨C3⟩", "⟨A9⟩", "␣", "o", "k", "</s>")
    assert piece.words == (0, 0, 0, 1, 2, 2, -1)
    assert any("does not tell" in note for note in corpus.notes)


def test_an_id_that_the_model_has_no_row_for_is_refused() -> None:
    loaded = pair("gpt2")
    small = Loaded(model=tiny("gpt2", d_vocab=50), tokenizer=loaded.tokenizer, name="x", family="gpt2")
    with pytest.raises(InvalidInputError, match="tokenizer must be the model's, with ids below 50, got"):
        read_corpus(small, ["The quick brown fox"])


def test_a_padding_token_that_the_model_has_no_row_for_does_no_harm() -> None:
    tokenizer = trained("gpt2")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    loaded = load(tiny("gpt2", d_vocab=300), tokenizer)
    corpus = read_corpus(loaded, ["a", SENTENCES[0]])
    (batch,) = batches(loaded, corpus, [0, 1], batch_size=2)
    assert int(batch.inputs["input_ids"].max()) < 300
    with pytest.raises(InvalidInputError, match="with ids below 300, got 300"):
        read_corpus(loaded, ["a [PAD]"])


# ------------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(("max_tokens", "overlap"), [(None, 0), (20, 0), (20, 5), (7, 3)])
def test_long_texts_are_split_and_nothing_is_lost(family: str, max_tokens: int | None, overlap: int) -> None:
    loaded = pair(family)
    corpus = read_corpus(loaded, ["a dog", BODIES], max_tokens=max_tokens, overlap=overlap)
    whole = loaded.tokenizer(BODIES, add_special_tokens=False)["input_ids"]
    windows = [window for window in corpus.windows if window.text == 1]
    assert len(windows) == len(corpus.windows) - 1 > 1
    assert max(len(window.source) for window in windows) == (max_tokens or 64)
    found: list[int] = []
    for window in windows:
        ids = body(window.source)
        assert list(ids) == whole[window.start : window.start + len(ids)]
        found = found[: window.start] + list(ids)
    assert found == whole
    for before, after in pairwise(windows):
        assert after.start == before.start + len(body(before.source)) - overlap
    shared = f" that share {overlap} tokens" if overlap else ""
    assert corpus.notes == (f"1 text longer than {max_tokens or 64} tokens was split into windows{shared}.",)
    assert corpus.n_windowed == 1
    tokenized = loaded.tokenizer(BODIES)["input_ids"]
    special = len(tokenized) - len(whole)
    assert all(sum(window.source.special) == special for window in windows)


def test_a_text_that_fits_is_one_window_as_the_tokenizer_makes_it() -> None:
    for family in ("bert", "gpt2", "llama"):
        loaded = pair(family)
        (window,) = read_corpus(loaded, [SENTENCES[0]]).windows
        told = loaded.tokenizer(SENTENCES[0])
        assert list(window.source.ids) == told["input_ids"]
        assert list(window.source.types) == told.get("token_type_ids", [])


def test_a_limit_above_the_context_is_lowered_with_a_note() -> None:
    corpus = read_corpus(pair("gpt2"), [BODIES], max_tokens=1000)
    assert max(len(window.source) for window in corpus.windows) == 64
    assert "The model takes 64 tokens: max_tokens was lowered from 1000." in corpus.notes


def test_a_model_without_a_context_gets_windows_all_the_same() -> None:
    corpus = read_corpus(pair("t5"), [BODIES * 4], targets=None, max_tokens=None)
    assert max(len(window.source) for window in corpus.windows) == 1024


def test_pairs_keep_their_types_and_are_cut_with_a_note() -> None:
    loaded = pair("bert")
    corpus = read_corpus(loaded, [("a quick fox", "does it jump"), (BODIES, "a dog")])
    first, second = (window.source for window in corpus.windows)
    told = loaded.tokenizer("a quick fox", "does it jump")
    assert (list(first.ids), list(first.types)) == (told["input_ids"], told["token_type_ids"])
    assert "".join(first.tokens) == "[CLS]a quick fox[SEP]does it jump[SEP]"
    assert first.words[-2] == 5
    assert len(second) == 64
    assert "".join(second.tokens).endswith("[SEP]a dog[SEP]")
    assert corpus.n_truncated == 1
    assert corpus.texts[0] == "a quick fox\ndoes it jump"
    assert any("cut" in note for note in corpus.notes)


@pytest.mark.parametrize(
    ("texts", "given", "message"),
    [
        ([], {}, "texts must hold at least one text, got none"),
        ("a text", {}, "texts must be a sequence, got one text"),
        (["a", ""], {}, "texts must not be empty, got one that is at 1"),
        (["a", ("b", "")], {}, "texts must not be empty, got one that is at 1"),
        (["a", " \t\n"], {}, r"texts must have at least one token each, got none of ' \\t\\n' at 1"),
        ([("a", "b", "c")], {}, "texts must be strings or pairs of strings, got tuple at 0"),
        ([3], {}, "texts must be strings or pairs of strings, got int at 0"),
        ([Path("x.png")], {}, "texts must be strings or pairs of strings, got the file x.png at 0; bert does not see"),
        (["a"], {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        (["a"], {"max_tokens": 2}, "max_tokens must be at least 3 for this model, got 2. Hint: 2 of them are special"),
        (["a"], {"max_tokens": 6, "overlap": 4}, r"overlap must be in \[0, 3\], got 4"),
        (["a"], {"overlap": -1}, "overlap must be in"),
        (["a"], {"special": "perhaps"}, "special must be 'keep' or 'drop', got 'perhaps'"),
        (["a"], {"targets": ["b"]}, "targets must be left out for bert, which has no decoder"),
    ],
)
def test_what_cannot_be_read_is_refused(texts: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"inspect: {message}"):
        read_corpus(pair("bert"), texts, **given)


def test_one_token_and_white_space_are_texts_where_the_tokenizer_says_so() -> None:
    corpus = read_corpus(pair("gpt2"), ["a", "  "])
    assert [window.source.tokens for window in corpus.windows] == [("a",), ("␣", "␣")]
    assert corpus.windows[1].source.words == (0, 1)


def test_keys_are_those_of_the_content() -> None:
    loaded = pair("bert")
    keys = [window.key for window in read_corpus(loaded, ["a dog", "a fox", "a dog", ("a", "dog")]).windows]
    again = [window.key for window in read_corpus(loaded, ["a fox", "a dog"]).windows]
    assert keys[:2] == again[::-1]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3
    assert all(0 <= key < 2**63 for key in keys)


# ------------------------------------------------------------------------------------------------------------ batches


def runs(loaded: Loaded, corpus: Corpus, **given: Any) -> dict[int, Tensor]:
    """Last hidden states of the real tokens of each window, both sides after one another."""
    result: dict[int, Tensor] = {}
    for batch in batches(loaded, corpus, range(len(corpus.windows)), **given):
        with torch.inference_mode():
            output = loaded.model(**batch.inputs, output_hidden_states=True)
        if loaded.has_target:
            states = {"source": output.encoder_last_hidden_state, "target": output.decoder_hidden_states[-1]}
        else:
            states = {"source": output.last_hidden_state}
        for row, index in enumerate(batch.windows):
            window = corpus.windows[index]
            parts = []
            for side in corpus.sides:
                piece, real = window.piece(side), batch.real[side][row]
                assert batch.ids[side][row][real].tolist() == list(piece.ids)
                assert batch.special[side][row][real].tolist() == list(piece.special)
                assert not batch.special[side][row][~real].any()
                assert bool((batch.ids[side][row][~real] == -1).all())
                parts.append(states[side][row][real])
            result[index] = torch.cat(parts)
    return result


@pytest.mark.parametrize("family", list(KINDS))
def test_padding_batch_size_and_order_change_no_number(family: str) -> None:
    loaded = load(tiny(family).double(), trained(KINDS[family]))
    texts = [*SENTENCES, "a", "quick fox", "A lazy dog and a quick fox."]
    targets = ["a dog", "it does", "a", "fox", "quick and lazy", "dog"] if loaded.has_target else None
    corpus = read_corpus(loaded, texts, targets=targets)
    alone = runs(loaded, corpus, batch_size=1)
    for given in ({}, {"padding_side": "left"}, {"padding_side": "right"}):
        together = runs(loaded, corpus, batch_size=4, **given)
        assert together.keys() == alone.keys()
        for index, states in alone.items():
            torch.testing.assert_close(together[index], states, rtol=0, atol=1e-10)
    back = read_corpus(loaded, texts[::-1], targets=targets and targets[::-1])
    for index, states in runs(loaded, back, batch_size=3).items():
        torch.testing.assert_close(states, alone[len(texts) - 1 - index], rtol=0, atol=1e-10)


def test_left_padding_is_on_the_left_where_positions_can_be_told() -> None:
    corpus = read_corpus(pair("gpt2"), ["a", SENTENCES[0]])
    (batch,) = batches(pair("gpt2"), corpus, [0, 1], batch_size=2, padding_side="left")
    assert batch.windows == (1, 0)
    assert batch.real["source"][1].tolist() == [False] * (batch.real["source"].shape[1] - 1) + [True]
    assert batch.inputs["position_ids"][1, -1] == 0


def test_a_batch_without_padding_is_what_the_tokenizer_gives() -> None:
    loaded = pair("bert")
    corpus = read_corpus(loaded, [("a quick fox", "a dog")])
    (batch,) = batches(loaded, corpus, [0], batch_size=1)
    told = loaded.tokenizer("a quick fox", "a dog", return_tensors="pt")
    assert batch.inputs.keys() == told.keys()
    assert all(torch.equal(batch.inputs[name], told[name]) for name in told)


def test_a_model_without_a_mask_gets_no_padding() -> None:
    class Unmasked(type(tiny("gpt2"))):  # type: ignore[misc]
        def forward(self, input_ids: Tensor) -> Any:
            return super().forward(input_ids=input_ids)

    loaded = load(Unmasked(tiny("gpt2").config), trained("gpt2"))
    corpus = read_corpus(loaded, ["a", *SENTENCES])
    found = list(batches(loaded, corpus, range(4), batch_size=4))
    assert [batch.inputs.keys() for batch in found] == [{"input_ids"}] * 4
    assert all(batch.real["source"].all() for batch in found)


def test_batches_hold_what_was_asked_for() -> None:
    loaded = pair("bert")
    corpus = read_corpus(loaded, SENTENCES * 3)
    found = [batch.windows for batch in batches(loaded, corpus, [7, 2, 5, 0], batch_size=3)]
    assert sorted(index for windows in found for index in windows) == [0, 2, 5, 7]
    assert [len(windows) for windows in found] == [3, 1]
    with pytest.raises(InvalidInputError, match="batch_size must be at least 1, got 0"):
        list(batches(loaded, corpus, [0], batch_size=0))
    with pytest.raises(InvalidInputError, match="padding_side must be 'left' or 'right', got 'both'"):
        list(batches(loaded, corpus, [0], batch_size=1, padding_side="both"))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ targets


def greedy(model: Any, ids: Sequence[int], start: int, steps: int) -> list[int]:
    """The likeliest token again and again, without a cache or padding."""
    written = [start]
    for _ in range(steps):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([list(ids)]), decoder_input_ids=torch.tensor([written])).logits
        written.append(int(logits[0, -1].argmax()))
        if written[-1] in (model.config.eos_token_id, model.generation_config.forced_eos_token_id):
            return written[:-1]
    return written


@pytest.fixture
def spread() -> Callable[[Loaded], Loaded]:
    """Weights that are large enough for a model to write different things for different texts."""

    def scaled(loaded: Loaded) -> Loaded:
        with torch.no_grad():
            for name, weight in loaded.model.named_parameters():
                if weight.ndim == 2 and "relative" not in name:
                    weight.mul_(3 if loaded.family == "t5" else 8)
        return loaded

    return scaled


def test_without_targets_the_model_writes_them(spread: Callable[[Loaded], Loaded]) -> None:
    loaded = spread(load(tiny("t5").double(), trained("t5")))
    loaded.model.train()
    corpus = read_corpus(loaded, [*SENTENCES, "a dog"])
    assert all(module.training for module in loaded.model.modules())
    loaded.model.eval()
    written = set()
    for window in corpus.windows:
        assert window.target is not None
        ids = window.target.ids
        assert list(ids) == greedy(loaded.model, window.source.ids, 0, 32)
        assert window.target.special[0]
        assert len(window.target.tokens) == len(window.target.words) == len(ids)
        written.add(ids)
    assert len(written) > 1
    assert corpus.sides == ("source", "target")
    assert "Targets are what the model itself writes, at most 32 tokens." in corpus.notes
    again = read_corpus(loaded, ["a dog", *SENTENCES[::-1]])
    assert [window.key for window in again.windows] == [window.key for window in corpus.windows[::-1]]


def test_given_targets_are_what_the_decoder_reads() -> None:
    loaded = pair("t5")
    corpus = read_corpus(loaded, ["a dog", "a fox"], targets=["it does", "lazy"])
    told = loaded.tokenizer("it does")["input_ids"]
    assert corpus.windows[0].target is not None
    assert list(corpus.windows[0].target.ids) == [0, *told[:-1]]
    assert "".join(corpus.windows[0].target.tokens).replace("␣", " ").split() == ["<pad>", "it", "does"]
    assert corpus.windows[0].target.words[0] == -1
    as_pairs = read_corpus(loaded, [("a dog", "it does"), ("a fox", "lazy")])
    assert as_pairs == corpus
    other = read_corpus(loaded, ["a dog"], targets=["lazy"])
    assert other.windows[0].key != corpus.windows[0].key


def test_a_long_target_and_a_long_text_with_a_target_are_cut_with_a_note() -> None:
    corpus = read_corpus(pair("bart"), ["a dog", BODIES], targets=[BODIES, "a fox"])
    assert [len(window.source) for window in corpus.windows][1] == 64
    assert corpus.windows[0].target is not None
    assert len(corpus.windows[0].target) <= 64
    assert len(corpus.windows) == 2
    assert corpus.notes == ("2 texts longer than 64 tokens were cut.",)


@pytest.mark.parametrize(
    ("texts", "targets", "message"),
    [
        (["a", "b"], ["c"], "targets must be one for each of 2 texts, got 1"),
        (["a"], [""], "targets must be texts that are not empty, got '' at 0"),
        ([("a", "b")], ["c"], "targets must be given once"),
        ([("a", "b"), "c"], None, "targets must be given once, for all texts or none"),
    ],
)
def test_targets_that_do_not_fit_are_refused(texts: Any, targets: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read_corpus(pair("t5"), texts, targets=targets)


def test_a_model_that_cannot_write_needs_targets() -> None:
    import transformers

    model = transformers.T5Model(tiny("t5").config).eval()
    loaded = load(model, trained("t5"))
    with pytest.raises(InvalidInputError, match="targets must be given for T5Model, which cannot write"):
        read_corpus(loaded, ["a"])
    assert read_corpus(loaded, ["a"], targets=["a"]).windows[0].target is not None


# ------------------------------------------------------------------------------------------------------- real weights


def test_minilm_reads_as_its_tokenizer_does(minilm: Path) -> None:
    loaded = load(minilm)
    corpus = read_corpus(loaded, ["Unbelievably, the cats' café isn't open.", *HOSTILE])
    piece = corpus.windows[0].source
    assert "".join(piece.tokens) == "[CLS]unbelievably, the cats' cafe isn't open.[SEP]"
    assert max(piece.words) == 8
    states = runs(loaded, corpus, batch_size=9, padding_side="left")
    for index, alone in runs(loaded, corpus, batch_size=1).items():
        torch.testing.assert_close(states[index], alone, rtol=0, atol=2e-5)

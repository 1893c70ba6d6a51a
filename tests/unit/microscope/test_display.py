"""How tokens are shown: nothing invisible, nothing that moves other text, and the right word."""

from __future__ import annotations

import sys
import unicodedata
from typing import Any

import pytest

from attsvm.microscope.display import align, in_place, spell, spelling_of, visible, word_numbers, words_of
from unit.microscope.tiny_tokenizers import SENTENCES, trained


@pytest.mark.parametrize(
    ("token", "spelling", "text"),
    [
        ("##ing", "wordpiece", "ing"),
        ("##", "wordpiece", "##"),
        ("Ġcat", "bytes", " cat"),
        ("Ċ", "bytes", "\n"),
        ("Ã¯ve", "bytes", "ïve"),
        ("ðŁ", "bytes", "\udcf0\udc9f"),
        ("日本", "bytes", "日本"),  # added to the vocabulary, not bytes
        ("▁cat", "metaspace", " cat"),
        ("<0xE2>", "metaspace", "\udce2"),
        ("<0x0A>", "metaspace", "\n"),
        ("cat</w>", "bytes", "cat"),
        ("</w>", "plain", "</w>"),
        ("Ã", "latin", "\udcc3"),
        ("a", "latin", "a"),
        ("▁cat", "plain", "▁cat"),
    ],
)
def test_a_token_is_spelled_as_the_text_it_stands_for(token: str, spelling: Any, text: str) -> None:
    assert spell(token, spelling) == text


def test_every_byte_has_its_own_letter() -> None:
    pytest.importorskip("tokenizers")
    from tokenizers import pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    spelled = {spell(letter, "bytes").encode("utf-8", "surrogateescape") for letter in letters}
    assert spelled == {bytes([byte]) for byte in range(256)}


@pytest.mark.parametrize(
    ("kind", "spelling"), [("bert", "wordpiece"), ("gpt2", "bytes"), ("llama", "metaspace"), ("t5", "metaspace")]
)
def test_the_spelling_is_read_off_the_tokenizer(kind: str, spelling: str) -> None:
    pytest.importorskip("transformers")
    tokenizer = trained(kind)
    assert spelling_of(tokenizer) == spelling

    class Slow:  # without a decoder that tells
        def get_vocab(self) -> dict[str, int]:
            return dict(tokenizer.get_vocab())

    assert spelling_of(Slow()) == spelling


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" cat", " cat"),
        ("", "⟨⟩"),
        (" ", "␣"),
        ("   ", "␣␣␣"),
        ("  a", " ␣a"),
        ("a ", "a␣"),
        ("a b", "a b"),
        ("\n", "␊"),
        ("\x00\x1b\x7f", "␀␛␡"),
        ("\x85", "⟨U+0085⟩"),
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("\u2066", "⟨U+2066⟩"),
        ("\u00ad", "⟨U+00AD⟩"),
        ("\u00a0", "⟨U+00A0⟩"),
        ("\u2028", "⟨U+2028⟩"),
        ("\udce2", "⟨E2⟩"),
        ("\ud83d", "⟨U+D83D⟩"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("\u200d", "⟨U+200D⟩"),
        ("\U0001f469\u200d\U0001f467", "\U0001f469\u200d\U0001f467"),
        ("שלום", "שלום"),
        ("<script>", "<script>"),
        ("x" * 60, "x" * 48 + "…"),
    ],
)
def test_what_cannot_be_seen_is_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_no_character_at_all_is_left_invisible() -> None:
    bad = {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp", "Zs"}
    for code in range(sys.maxunicode + 1):
        shown = visible(chr(code))
        assert not any(unicodedata.category(character) in bad for character in shown), hex(code)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("don't stop!", [["don't"], ["stop"], ["!"]]),
        ("'quoted' rock\u2019n\u2019roll", [["'"], ["quoted"], ["'"], ["rock\u2019n\u2019roll"]]),
        ("a\tb\n", [["a"], ["b"]]),
        ("<b>", [["<"], ["b"], [">"]]),
        ("snake_case 3.5", [["snake_case"], ["3"], ["."], ["5"]]),
        ("हिन्दी भाषा", [["हिन्दी"], ["भाषा"]]),
        ("e\u0301te\u0301", [["e\u0301te\u0301"]]),
        ("我喜欢 カナ", [["我"], ["喜"], ["欢"], ["カ"], ["ナ"]]),
        ("\U0001f469\u200d\U0001f467x", [["\U0001f469\u200d\U0001f467"], ["x"]]),
        ("\U0001f44d\U0001f3fd!", [["\U0001f44d\U0001f3fd"], ["!"]]),
        ("\U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea", [["\U0001f1eb\U0001f1f7"], ["\U0001f1e9\U0001f1ea"]]),
        ("שלום עולם", [["שלום"], ["עולם"]]),
        ("a\u202eb", [["a"], ["\u202e"], ["b"]]),
        (" \u0301", [["\u0301"]]),
        ("", []),
    ],
)
def test_words_are_what_people_take_for_words(text: str, words: list[list[str]]) -> None:
    found: dict[int, str] = {}
    for character, number in zip(text, word_numbers(text), strict=True):
        assert (number == -1) == character.isspace()
        if number >= 0:
            found[number] = found.get(number, "") + character
    assert list(found) == list(range(len(words)))
    assert [[word] for word in found.values()] == words


def test_tokens_of_one_word_share_its_number_and_white_space_has_its_own() -> None:
    text = "over unbelievable\n\n!"
    spans = [(0, 4), (4, 5), (5, 7), (7, 17), (17, 19), (19, 20)]
    assert words_of(spans, word_numbers(text), first=3) == [3, 4, 5, 5, 6, 7]
    assert words_of([(5, 6), (5, 6), (6, 17)], word_numbers(text)) == [0, 0, 0]


def test_a_space_stands_before_a_token_where_the_text_has_one_and_only_there() -> None:
    assert in_place([" a", "b", "c"], [(0, 1), (2, 3), (3, 4)], "a bc") == ["a", " b", "c"]
    assert in_place([" a"], [(1, 2)], " a") == [" a"]
    # T5's space is a token: the letter behind it has none of its own.
    assert in_place(["a", " ", "b"], [(0, 1), (1, 2), (2, 3)], "a b") == ["a", "␣", "b"]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_tokens_put_together_are_the_text(kind: str) -> None:
    pytest.importorskip("transformers")
    tokenizer, text = trained(kind), SENTENCES[0].lower() if kind == "bert" else SENTENCES[0]
    told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spelled = [spell(token, spelling_of(tokenizer)) for token in tokenizer.convert_ids_to_tokens(told["input_ids"])]
    shown = in_place(spelled, told["offset_mapping"], text)
    assert "".join(shown).replace("␣", " ").lstrip() == text


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_places_that_are_not_told_are_found(kind: str) -> None:
    pytest.importorskip("transformers")
    tokenizer = trained(kind)
    for text in SENTENCES:
        told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spelled = [spell(token, spelling_of(tokenizer)) for token in tokenizer.convert_ids_to_tokens(told["input_ids"])]
        words = word_numbers(text)
        assert words_of(align(spelled, text), words) == words_of(told["offset_mapping"], words)


def test_bytes_stand_where_their_character_does() -> None:
    pieces = ["n", "\udcc3", "\udca9", " ", "\udcf0", "\udc9f", "\udc91", "\udc8d", "x"]
    assert align(pieces, "né \U0001f44dx") == [(0, 1), (1, 2), (1, 2), (2, 3), *([(3, 4)] * 4), (4, 5)]
    assert align(["\udcc3"], "a") == [(0, 0)]


def test_a_token_of_other_spelling_does_not_lead_astray() -> None:
    assert align(["<unk>", " cat"], "schnäppchen cat") == [(0, 1), (12, 15)]
    assert align(["cafe", " is"], "Café is") == [(0, 1), (5, 7)]
    assert align(["caf", "##"], "CAF") == [(0, 3), (3, 3)]
    assert align([" ", "a", "  ", "b"], "a  b") == [(0, 1), (0, 1), (1, 3), (3, 4)]

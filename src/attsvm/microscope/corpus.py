"""Texts and pictures in the windows in which a model takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attsvm.data.files import well_formed
from attsvm.data.hub import quiet_transformers
from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.microscope.display import align, in_place, is_byte, spell, spelling_of, visible, word_numbers, words_of
from attsvm.microscope.loading import Loaded
from attsvm.microscope.pictures import picture_format, read_picture
from attsvm.microscope.windows import Batch, Corpus, Piece, Special, Window, batches, content_key

__all__ = ["DEFAULT_MAX_TOKENS", "TARGET_TOKENS", "Batch", "Corpus", "Text", "batches", "read_corpus"]

Text = str | tuple[str, str] | Path | Any
"""A text, a pair of texts, or a picture (a file or an array)."""

DEFAULT_MAX_TOKENS = 1024
"""Longest window where none is asked for, even if the model takes more."""

TARGET_TOKENS = 32
"""Tokens that an encoder-decoder writes where no target is given."""

_WHERE = "inspect"
_GENERATED_AT_ONCE = 16
_PROBE = "a"


def read_corpus(
    loaded: Loaded,
    texts: Sequence[Text],
    *,
    targets: Sequence[str] | None = None,
    max_tokens: int | None = None,
    special: Special = "keep",
    overlap: int = 0,
) -> Corpus:
    """Turn texts or pictures into windows of tokens.

    Parameters
    ----------
    loaded
        The model.
    texts
        Texts; or pairs of texts, which for an encoder-decoder are a text and its target; or, for models that see
        pictures, files, images of PIL or arrays. Halves of surrogate pairs become U+FFFD.
    targets
        For an encoder-decoder, what its decoder reads, one for each text; by default what the model itself writes,
        taking the likeliest token each time.
    max_tokens
        Longest window, special tokens included; by default what the model takes, but at most 1024. Longer texts are
        split into windows; pairs and targets are cut.
    special
        Whether special tokens are queries and keys of the measures (``"keep"``) or not (``"drop"``). The model is
        given them either way.
    overlap
        Tokens that neighbouring windows of a text share.

    Returns
    -------
    Corpus
        With a note on everything that was decided on the way.

    Raises
    ------
    InvalidInputError
        If there is no text, one has no token, an option is out of its range, or the tokenizer does not fit the model.
    UnsupportedError
        If the pictures of the model are not cut into one regular grid.
    """
    if isinstance(texts, str | Path):
        raise InvalidInputError(f"{_WHERE}: texts must be a sequence, got one text. Hint: put it in a list.")
    if not len(texts):
        raise InvalidInputError(f"{_WHERE}: texts must hold at least one text, got none.")
    if special not in ("keep", "drop"):
        raise InvalidInputError(f"{_WHERE}: special must be 'keep' or 'drop', got {special!r}.")
    if max_tokens is not None and max_tokens < 1:
        raise InvalidInputError(f"{_WHERE}: max_tokens must be at least 1, got {max_tokens}.")
    if loaded.sees_pictures:
        if targets is not None:
            raise InvalidInputError(f"{_WHERE}: targets must be left out for a model that sees pictures.")
        return _read_pictures(loaded, texts, max_tokens, special)
    sources, targets = _check_texts(loaded, texts, targets)
    return _Reader(loaded, sources[0][0], max_tokens, overlap).read(sources, targets, special)


def _check_texts(
    loaded: Loaded, texts: Sequence[Text], targets: Sequence[str] | None
) -> tuple[list[tuple[str, ...]], list[str] | None]:
    """Each text as one or two strings, and the targets, well-formed."""
    sources: list[tuple[str, ...]] = []
    for at, text in enumerate(texts):
        parts = text if isinstance(text, tuple) else (text,)
        if not 1 <= len(parts) <= 2 or not all(isinstance(part, str) for part in parts):
            is_file = isinstance(text, Path)
            got = f"the file {text}" if is_file else type(text).__name__
            hint = f"; {loaded.family} does not see pictures" if is_file else ""
            raise InvalidInputError(f"{_WHERE}: texts must be strings or pairs of strings, got {got} at {at}{hint}.")
        if not all(parts):
            raise InvalidInputError(f"{_WHERE}: texts must not be empty, got one that is at {at}.")
        sources.append(tuple(well_formed(part) for part in parts))
    if not loaded.has_target:
        if targets is not None:
            raise InvalidInputError(f"{_WHERE}: targets must be left out for {loaded.family}, which has no decoder.")
        return sources, None
    paired = {len(source) == 2 for source in sources}
    if paired != {False}:
        if targets is not None or len(paired) > 1:
            raise InvalidInputError(f"{_WHERE}: targets must be given once, for all texts or none, got both ways.")
        return [source[:1] for source in sources], [source[1] for source in sources]
    if targets is None:
        return sources, None
    if isinstance(targets, str) or len(targets) != len(sources):
        raise InvalidInputError(f"{_WHERE}: targets must be one for each of {len(sources)} texts, got {len(targets)}.")
    for at, target in enumerate(targets):
        if not isinstance(target, str) or not target:
            raise InvalidInputError(f"{_WHERE}: targets must be texts that are not empty, got {target!r} at {at}.")
    return sources, [well_formed(target) for target in targets]


# ------------------------------------------------------------------------------------------------------------ pictures


def _read_pictures(loaded: Loaded, sources: Sequence[Any], max_tokens: int | None, special: Special) -> Corpus:
    form = picture_format(loaded, max_tokens=max_tokens)
    names = [
        Path(source).name if isinstance(source, str | Path) else f"picture {at}" for at, source in enumerate(sources)
    ]
    pictures = tuple(read_picture(source, form, name=name) for source, name in zip(sources, names, strict=True))
    tokens, marks = pictures[0].tokens()
    piece = Piece(ids=tuple(range(len(tokens))), special=tuple(marks), tokens=tuple(tokens), words=(-1,) * len(tokens))
    windows = tuple(
        Window(text=at, start=0, source=piece, picture=at, key=content_key(piece, pixels=picture.pixels.tobytes()))
        for at, picture in enumerate(pictures)
    )
    notes = [f"Pictures are {form.width} x {form.height} pixels, {form.grid[0]} rows of {form.grid[1]} patches."]
    if not form.known:
        notes.append("The model came without a processor of pictures: usual mean and deviation of pixels were taken.")
    return Corpus(
        texts=tuple(visible(name, longest=200) for name in names),
        windows=windows,
        pictures=pictures,
        names=dict(enumerate(tokens)),
        special=special,
        notes=tuple(notes),
    )


# --------------------------------------------------------------------------------------------------------------- texts


@dataclass(frozen=True)
class _Encoded:
    """A text as tokens, without special ones around: ids, where they stand, the text, and its words by character."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    text: str
    words: list[int]


class _Reader:
    """Texts to windows with one tokenizer."""

    def __init__(self, loaded: Loaded, probe: str, max_tokens: int | None, overlap: int) -> None:
        if loaded.tokenizer is None:
            raise InvalidInputError(
                f"{_WHERE}: tokenizer must be given for {loaded.name}, which comes without one. "
                "Hint: pass the path of a folder with tokenizer.json, or a tokenizer."
            )
        self.loaded, self.tokenizer = loaded, loaded.tokenizer
        self.fast = bool(getattr(self.tokenizer, "is_fast", False))
        self.spelling = spelling_of(self.tokenizer)
        self.added = {number: token for token, number in self.tokenizer.get_added_vocab().items()}
        self.special_ids = self._special_ids()
        self.spelled: dict[int, str] = {}
        self.notes: list[str] = []
        self.n_windowed = self.n_truncated = 0
        with quiet_transformers(_WHERE):
            self._learn_frame(probe)
        self.limit = self._limit(max_tokens, loaded.n_ctx)
        self.body = self.limit - len(self.before) - len(self.after)
        if self.body < 1:
            raise InvalidInputError(
                f"{_WHERE}: max_tokens must be at least {self.limit - self.body + 1} for this model, got {self.limit}. "
                f"Hint: {self.limit - self.body} of them are special tokens."
            )
        if not 0 <= overlap < self.body:
            raise InvalidInputError(f"{_WHERE}: overlap must be in [0, {self.body - 1}], got {overlap}.")
        self.overlap = overlap

    def read(self, sources: list[tuple[str, ...]], targets: list[str] | None, special: Special) -> Corpus:
        """All texts."""
        windows: list[Window] = []
        with quiet_transformers(_WHERE):
            for at, source in enumerate(sources):
                given = targets[at] if targets is not None else None
                windows += self._windows(at, source, given)
            if self.loaded.has_target and targets is None:
                windows = self._write_targets(windows)
        self._count_notes()
        return Corpus(
            texts=tuple("\n".join(source) for source in sources),
            windows=tuple(windows),
            names={number: visible(self._spell(number)) for number in self._seen(windows)},
            special=special,
            n_windowed=self.n_windowed,
            n_truncated=self.n_truncated,
            notes=tuple(self.notes),
        )

    # ---- the tokenizer

    def _special_ids(self) -> frozenset[int]:
        """Ids of format; not those of unknown and masked words, which stand for a part of the text."""
        names = ("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "pad_token_id")
        kept = {getattr(self.tokenizer, name, None) for name in names}
        words = {getattr(self.tokenizer, name, None) for name in ("unk_token_id", "mask_token_id")} - kept
        return frozenset(set(self.tokenizer.all_special_ids) - words)

    def _learn_frame(self, probe: str) -> None:
        """Special tokens before and after a text, with their types, from a text of one letter or the first one."""
        for text in (_PROBE, probe):
            whole = self.tokenizer(text)
            ids, inner = list(whole["input_ids"]), list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if inner:
                break
        types = list(whole.get("token_type_ids") or [])
        at = next((n for n in range(len(ids) - len(inner) + 1) if ids[n : n + len(inner)] == inner), None)
        if at is None:
            raise UnsupportedError(
                f"{_WHERE}: tokenizer must put its special tokens around a text, got {type(self.tokenizer).__name__}."
            )
        end = at + len(inner)
        self.before, self.after = tuple(ids[:at]), tuple(ids[end:])
        self._check_ids(ids)
        self.types = (tuple(types[:at]), types[at] if types else 0, tuple(types[end:])) if types else None

    def _limit(self, asked: int | None, taken: int | None) -> int:
        most = min(taken or DEFAULT_MAX_TOKENS, DEFAULT_MAX_TOKENS) if asked is None else min(asked, taken or asked)
        if asked is not None and most < asked:
            self.notes.append(f"The model takes {most} tokens: max_tokens was lowered from {asked}.")
        return most

    def _encode(self, text: str, at: int, name: str = "texts") -> _Encoded:
        """A text without special tokens."""
        given: dict[str, Any] = {"return_offsets_mapping": True} if self.fast else {}
        # Some tokenizers have another vocabulary for targets.
        given["text_target" if name == "targets" else "text"] = text
        told = self.tokenizer(add_special_tokens=False, **given)
        ids = tuple(int(number) for number in told["input_ids"])
        if not ids:
            raise InvalidInputError(
                f"{_WHERE}: {name} must have at least one token each, got none of {text[:40]!r} at {at}."
            )
        self._check_ids(ids)
        spans = told.get("offset_mapping")
        spans = [(int(start), int(end)) for start, end in spans] if spans else align(map(self._spell, ids), text)
        return _Encoded(ids, tuple(spans), text, word_numbers(text))

    def _check_ids(self, ids: Sequence[int]) -> None:
        rows = self.loaded.d_vocab
        if rows and max(ids, default=0) >= rows:
            raise InvalidInputError(f"{_WHERE}: tokenizer must be the model's, with ids below {rows}, got {max(ids)}.")

    def _spell(self, number: int) -> str:
        """What a token stands for; tokens that were added to the vocabulary are spelled as they are."""
        if number not in self.spelled:
            token = self.added.get(number)
            if token is None or is_byte(token):
                token = self.tokenizer.convert_ids_to_tokens(number)
                # Models can have more rows than there are tokens, and write those.
                token = spell(token, self.spelling) if isinstance(token, str) else f"⟨{number}⟩"
            self.spelled[number] = token
        return self.spelled[number]

    # ---- windows

    def _windows(self, at: int, source: tuple[str, ...], target: str | None) -> Iterator[Window]:
        if len(source) == 2:
            yield self._window(at, 0, self._pair(source, at))
            return
        encoded = self._encode(source[0], at)
        aim = self._target(self._encode(target, at, "targets")) if target is not None else None
        starts = list(range(0, max(len(encoded.ids) - self.overlap, 1), self.body - self.overlap))
        if len(starts) > 1 and aim is not None:
            # A target belongs to a whole text, of which the model can be given only the beginning.
            starts = starts[:1]
            self.n_truncated += 1
        self.n_windowed += len(starts) > 1
        shown = in_place([self._spell(number) for number in encoded.ids], encoded.spans, encoded.text)
        for start in starts:
            yield self._window(at, start, self._piece(encoded, shown, slice(start, start + self.body)), aim)

    def _window(self, at: int, start: int, source: Piece, target: Piece | None = None) -> Window:
        return Window(text=at, start=start, source=source, target=target, key=content_key(source, target))

    def _piece(self, encoded: _Encoded, shown: list[str], part: slice) -> Piece:
        """A stretch of a text with the special tokens around it."""
        ids = encoded.ids[part]
        inner = self.types[1] if self.types else 0
        types = (*self.types[0], *([inner] * len(ids)), *self.types[2]) if self.types else ()
        special = [number in self.special_ids for number in ids]
        words = _words(encoded.spans[part], encoded.words, special)
        return Piece(
            ids=(*self.before, *ids, *self.after),
            special=(*([True] * len(self.before)), *special, *([True] * len(self.after))),
            tokens=(*self._named(self.before), *shown[part], *self._named(self.after)),
            words=(*([-1] * len(self.before)), *words, *([-1] * len(self.after))),
            types=types,
        )

    def _named(self, ids: Sequence[int]) -> list[str]:
        return [visible(self._spell(number)) for number in ids]

    def _pair(self, texts: tuple[str, ...], at: int) -> Piece:
        """Two texts in one window, the longer one cut where both do not fit."""
        first, second = (self._encode(text, at) for text in texts)
        given = {"truncation": "longest_first", "max_length": self.limit, "return_special_tokens_mask": True}
        told = self.tokenizer(*texts, **given)
        ids, frame = [int(number) for number in told["input_ids"]], [bool(mark) for mark in told["special_tokens_mask"]]
        inner = [number for number, mark in zip(ids, frame, strict=True) if not mark]
        n_first = _overlap_of(inner, first.ids, second.ids)
        self.n_truncated += len(inner) < len(first.ids) + len(second.ids)
        shown: list[str] = []
        words: list[int] = []
        for encoded, length in ((first, n_first), (second, len(inner) - n_first)):
            marks = [number in self.special_ids for number in encoded.ids[:length]]
            kept = [self._spell(number) for number in encoded.ids[:length]]
            shown += in_place(kept, encoded.spans[:length], encoded.text)
            words += _words(encoded.spans[:length], encoded.words, marks, first=max(words, default=-1) + 1)
        texts_left, words_left = iter(shown), iter(words)
        return Piece(
            ids=tuple(ids),
            special=tuple(mark or number in self.special_ids for number, mark in zip(ids, frame, strict=True)),
            tokens=tuple(
                self._named([number])[0] if mark else next(texts_left) for number, mark in zip(ids, frame, strict=True)
            ),
            words=tuple(-1 if mark else next(words_left) for mark in frame),
            types=tuple(int(number) for number in told.get("token_type_ids") or ()),
        )

    # ---- targets

    def _target(self, encoded: _Encoded) -> Piece:
        """What the decoder reads: its start, then the target without the end that only the model writes."""
        after = self.after[:-1] if self.after else ()
        limit = self.limit - len(self.before) - len(after) - 1
        self.n_truncated += len(encoded.ids) > limit
        shown = in_place([self._spell(number) for number in encoded.ids], encoded.spans, encoded.text)
        kept = max(limit, 1)
        ids = (_decoder_start(self.loaded), *self.before, *encoded.ids[:kept], *after)
        special = [number in self.special_ids for number in encoded.ids[:kept]]
        words = _words(encoded.spans[:kept], encoded.words, special)
        front, back = 1 + len(self.before), len(after)
        return Piece(
            ids=ids,
            special=(*([True] * front), *special, *([True] * back)),
            tokens=(*self._named(ids[:front]), *shown[:kept], *self._named(after)),
            words=(*([-1] * front), *words, *([-1] * back)),
        )

    def _write_targets(self, windows: list[Window]) -> list[Window]:
        """The windows with what the model itself writes for each."""
        model: Any = self.loaded.model
        if not getattr(model, "can_generate", lambda: False)():
            raise InvalidInputError(
                f"{_WHERE}: targets must be given for {type(model).__name__}, which cannot write. "
                "Hint: or give the model with its language-model head."
            )
        # By length and content, so that the company of a text, which rounding can depend on, is not chance.
        order = sorted(range(len(windows)), key=lambda at: (len(windows[at].source), windows[at].key))
        for start in range(0, len(order), _GENERATED_AT_ONCE):
            chosen = order[start : start + _GENERATED_AT_ONCE]
            for at, ids in zip(chosen, _generate(self.loaded, [windows[at] for at in chosen]), strict=True):
                target = self._written(ids)
                windows[at] = replace(windows[at], target=target, key=content_key(windows[at].source, target))
        self.notes.append(f"Targets are what the model itself writes, at most {TARGET_TOKENS} tokens.")
        return windows

    def _written(self, ids: list[int]) -> Piece:
        front = next((at for at, number in enumerate(ids) if number not in self.special_ids), len(ids))
        spelled = [self._spell(number) for number in ids]
        marks = [at == 0 or number in self.special_ids for at, number in enumerate(ids)]
        plain = ["" if mark else piece for mark, piece in zip(marks, spelled, strict=True)]
        text = "".join(plain).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        spans = align(plain, text)
        tokens = [visible(piece.removeprefix(" ") if at == front else piece) for at, piece in enumerate(spelled)]
        return Piece(
            ids=tuple(ids),
            special=tuple(marks),
            tokens=tuple(tokens),
            words=tuple(_words(spans, word_numbers(text), marks)),
        )

    # ---- notes

    def _seen(self, windows: list[Window]) -> list[int]:
        pieces = [piece for window in windows for piece in (window.source, window.target) if piece is not None]
        return sorted({number for piece in pieces for number in piece.ids})

    def _count_notes(self) -> None:
        if self.n_windowed:
            self.notes.append(
                f"{_longer(self.n_windowed, self.limit)} split into windows"
                + (f" that share {self.overlap} tokens." if self.overlap else ".")
            )
        if self.n_truncated:
            self.notes.append(f"{_longer(self.n_truncated, self.limit)} cut.")
        if not self.fast:
            self.notes.append("The tokenizer does not tell where its tokens stand: words were found by their spelling.")


def _longer(count: int, limit: int) -> str:
    noun, verb = ("text", "was") if count == 1 else ("texts", "were")
    return f"{count} {noun} longer than {limit} tokens {verb}"


def _words(
    spans: Sequence[tuple[int, int]], words: Sequence[int], special: Sequence[bool], *, first: int = 0
) -> list[int]:
    """Words of tokens, -1 for special ones."""
    plain = [span for span, mark in zip(spans, special, strict=True) if not mark]
    numbers = iter(words_of(plain, words, first=first))
    return [-1 if mark else next(numbers) for mark in special]


def _overlap_of(inner: list[int], first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens of a cut pair are of its first text; both are cut at their ends."""
    for n_first in range(min(len(first), len(inner)), -1, -1):
        rest = inner[n_first:]
        if inner[:n_first] == list(first[:n_first]) and rest == list(second[: len(rest)]):
            return n_first
    raise UnsupportedError(f"{_WHERE}: tokenizer must cut pairs of texts at their ends, got one that does not.")


def _decoder_start(loaded: Loaded) -> int:
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for owner in (loaded.model.config, getattr(loaded.model, "generation_config", None)):
            token = getattr(owner, name, None)
            if isinstance(token, int):
                return token
    return 0


def _generate(loaded: Loaded, windows: Sequence[Window]) -> list[list[int]]:
    """The likeliest continuation of each, from the start token to before the end token."""
    model: Any = loaded.model
    texts = Corpus(texts=(), windows=tuple(windows))
    [batch] = batches(loaded, texts, range(len(windows)), batch_size=len(windows))
    with _evaluating(model), torch.inference_mode():
        rows = model.generate(
            **batch.inputs,
            max_new_tokens=TARGET_TOKENS,
            num_beams=1,
            do_sample=False,
            return_dict_in_generate=False,
            decoder_start_token_id=_decoder_start(loaded),
        ).tolist()
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = set(ends if isinstance(ends, list) else [ends])
    result: list[list[int]] = [[]] * len(windows)
    for at, row in zip(batch.windows, rows, strict=True):
        # The start token of some models is their end token too.
        stop = next((n for n in range(1, len(row)) if row[n] in ends), len(row))
        result[at] = row[:stop]
    return result


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout, and afterwards every module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

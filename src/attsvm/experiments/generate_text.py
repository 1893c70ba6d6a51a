"""Text from a pretrained model: prompts in, continuations or answers out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.models.decoder import Decoder
from attsvm.models.generation import GenerationConfig, generate
from attsvm.models.pretrained import from_pretrained
from attsvm.models.pretrained_tokenizer import TextTokenizer
from attsvm.models.seq2seq import Seq2Seq

__all__ = ["generate_text", "read_texts"]


def read_texts(texts: Sequence[str], file: Path | None, *, where: str) -> list[str]:
    """The texts that were given, and the lines of the file.

    Raises
    ------
    InvalidInputError
        If there is none, one is empty, or the file cannot be read.
    """
    found = list(texts)
    if file is not None:
        try:
            found += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(
                f"{where}: --text-file must be a readable UTF-8 file, got {file} ({error})."
            ) from error
    if not found:
        raise InvalidInputError(f"{where}: --text or --text-file must give at least one text, got none.")
    if not all(text.strip() for text in found):
        raise InvalidInputError(f"{where}: --text must not be empty, got {min(found, key=len)!r}.")
    return found


def generate_text(
    model: str,
    texts: Sequence[str],
    config: GenerationConfig,
    *,
    where: str,
    prefix: str = "",
    stop: Sequence[str] = (),
    batch_size: int = 8,
    needs_source: bool = False,
    stream: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Load a model and its tokenizer, and go on from (or answer) each text.

    Parameters
    ----------
    model
        As in :func:`~attsvm.models.pretrained.from_pretrained`.
    texts
        Prompts, or source texts.
    config
        How tokens are chosen.
    where
        The command, for messages.
    prefix
        Put before each text.
    stop
        Texts that end a sequence where they come up.
    batch_size
        Texts at once.
    needs_source
        Whether the model must be an encoder-decoder.
    stream
        Called with each piece of text as it comes, where there is one text and no beams.

    Returns
    -------
    dict
        ``outputs``, with ``prompt``, ``text``, ``tokens``, ``score`` and ``ended`` for each text; ``seconds`` of the
        generation and ``tokens_per_second``.
    """
    loaded = from_pretrained(model)
    if not isinstance(loaded, (Decoder, Seq2Seq)) or (needs_source and not isinstance(loaded, Seq2Seq)):
        kind = "an encoder-decoder" if needs_source else "a decoder or an encoder-decoder"
        raise UnsupportedError(f"{where}: MODEL must be {kind}, got {type(loaded).__name__} in {model}.")
    tokenizer = TextTokenizer(model)
    prompts = tokenizer.encode([prefix + text for text in texts])
    endings = tuple(tuple(one) for one in tokenizer.encode(stop, special=False))
    settings = replace(config, stop=endings)
    outputs: list[dict[str, Any]] = []
    began = time.monotonic()
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        shown = _Shown(tokenizer, stream) if stream is not None and len(prompts) == 1 and config.beams == 1 else None
        found = generate(loaded, part, settings, on_token=None if shown is None else shown.take)
        for k, tokens in enumerate(found.tokens):
            outputs.append(
                {
                    "prompt": texts[first + k],
                    "text": tokenizer.decode(tokens),
                    "tokens": tokens,
                    "score": float(found.scores[k]),
                    "ended": bool(found.ended[k]),
                }
            )
    seconds = time.monotonic() - began
    count = sum(len(one["tokens"]) for one in outputs)
    return {"outputs": outputs, "seconds": seconds, "tokens_per_second": count / seconds if seconds > 0 else None}


class _Shown:
    """Tells the text of the tokens so far, piece by piece."""

    def __init__(self, tokenizer: TextTokenizer, tell: Callable[[str], None]) -> None:
        self._tokenizer, self._tell = tokenizer, tell
        self._tokens: list[int] = []
        self._told = ""

    def take(self, step: int, tokens: Any) -> None:
        """The next token."""
        self._tokens.append(int(tokens[0]))
        text = self._tokenizer.decode(self._tokens)
        # Half a character, which the next token completes, decodes to a replacement mark.
        if text.startswith(self._told) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._tell(text[len(self._told) :])
            self._told = text

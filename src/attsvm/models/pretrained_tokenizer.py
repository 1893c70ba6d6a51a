"""The tokenizer that travels with a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attsvm.errors import InvalidInputError

__all__ = ["TextTokenizer"]


class TextTokenizer:
    """Texts to token ids and back, by the tokenizer of a checkpoint.

    Parameters
    ----------
    path
        As in :func:`~attsvm.models.pretrained.from_pretrained`: a folder, a ``.gguf`` file, or the id of a model.

    Raises
    ------
    InvalidInputError
        If there is none.
    """

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoTokenizer

        place = Path(path)
        given: dict[str, Any] = {}
        source = str(path)
        if place.suffix == ".gguf":
            source, given = str(place.parent), {"gguf_file": place.name}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source, **given)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InvalidInputError(
                f"TextTokenizer: path must have the files of a tokenizer, {path} has none that can be read ({reason})."
            ) from error

    def encode(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Token ids of each text, with the special tokens that the model is used to."""
        return [list(self._tokenizer(text, add_special_tokens=special)["input_ids"]) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def __len__(self) -> int:
        return len(self._tokenizer)

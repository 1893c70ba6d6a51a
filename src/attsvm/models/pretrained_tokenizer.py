"""The tokenizer that travels with a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attsvm.data.hub import no_transformers, quiet_transformers, reason_of
from attsvm.errors import InvalidInputError

__all__ = ["TextTokenizer"]


class TextTokenizer:
    """Texts to token ids and back, by the tokenizer of a checkpoint.

    Code that comes with a checkpoint is never run, nor asked about.

    Parameters
    ----------
    path
        As in :func:`~attsvm.models.pretrained.from_pretrained`: a folder, a ``.gguf`` file, or the id of a model.

    Raises
    ------
    InvalidInputError
        If there is none, or its files are damaged.
    UnsupportedError
        If transformers is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise no_transformers("TextTokenizer") from error
        place = Path(path)
        given: dict[str, Any] = {"trust_remote_code": False}
        source = str(path)
        if place.suffix == ".gguf":
            source, given["gguf_file"] = str(place.parent), place.name
        try:
            with quiet_transformers():
                self._tokenizer = AutoTokenizer.from_pretrained(source, **given)
        except Exception as error:  # the readers of these files raise what they like where one is damaged
            raise InvalidInputError(
                f"TextTokenizer: path must have the files of a tokenizer, {path} has none that can be read "
                f"({reason_of(error)})."
            ) from error

    def encode(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Token ids of each text, with the special tokens that the model is used to."""
        with quiet_transformers():
            return [list(self._tokenizer(text, add_special_tokens=special)["input_ids"]) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def __len__(self) -> int:
        return len(self._tokenizer)

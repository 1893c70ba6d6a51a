"""The tokenizer that travels with a checkpoint, and transformers without its chatter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from attsvm.errors import InvalidInputError, UnsupportedError

__all__ = ["TextTokenizer", "quiet_hub", "quiet_transformers", "reason_of"]


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
            raise UnsupportedError(
                "TextTokenizer: transformers must be installed, and it is not. Hint: pip install 'attsvm[hf]'."
            ) from error
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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the log, the progress bars and the warnings of transformers, and put all back as it was."""
    with warnings.catch_warnings(), quiet_hub():
        warnings.simplefilter("ignore")
        log: Any = import_module("transformers.utils.logging")
        gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")
        verbosity, bars, gguf_bar = log.get_verbosity(), log.is_progress_bar_enabled(), gguf.tqdm
        try:
            log.set_verbosity_error()
            log.disable_progress_bar()
            gguf.tqdm = lambda items, **_: items  # this one asks nobody whether it may be shown
            yield
        finally:
            gguf.tqdm = gguf_bar
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the progress bars of downloads, and put them back as they were."""
    hub: Any = import_module("huggingface_hub.utils")
    bars = not hub.are_progress_bars_disabled()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            hub.enable_progress_bars()


def reason_of(error: Exception) -> str:
    """The first line of an error's text, as the end of a sentence: those of transformers go on for a page."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__

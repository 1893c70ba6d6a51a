"""What the heads of one model do with a text that somebody is typing: an atlas of one text, without any problem."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.microscope.accumulate import Accumulator
from attsvm.microscope.calls import AttentionCall
from attsvm.microscope.capture import attention_modules, captured
from attsvm.microscope.check import check_against_eager
from attsvm.microscope.corpus import read_corpus
from attsvm.microscope.listening import evaluating
from attsvm.microscope.loading import load
from attsvm.microscope.parts import (
    corpus_part,
    head_parts,
    measure_parts,
    model_part,
    module_part,
    shown_part,
    similarity_of,
)
from attsvm.microscope.passes import shown_arrays
from attsvm.microscope.residual import residual_heads
from attsvm.microscope.windows import Corpus, batches
from attsvm.records import package_versions

__all__ = ["EXAMPLE", "LiveAnswer", "LiveModel", "TooLongError", "speaking_as"]

Array = npt.NDArray[Any]

EXAMPLE = "The black cat ate the mouse because it was hungry."
"""Text that is read at the start: it shows that the model works, and gives the page something to show."""


class TooLongError(InvalidInputError):
    """A text has more tokens than may be asked about."""


@dataclass(frozen=True, kw_only=True)
class LiveAnswer:
    """An atlas of one text.

    Attributes
    ----------
    record
        As ``result.json`` of an inspection, without solutions.
    arrays
        As its ``arrays.safetensors``.
    seconds
        Time it took.
    """

    record: dict[str, Any]
    arrays: dict[str, Array]
    seconds: float


@contextmanager
def speaking_as(command: str) -> Iterator[None]:
    """Let errors of what is shared with ``inspect`` begin with the name of another command.

    Parameters
    ----------
    command
        Its name.

    Yields
    ------
    None
        Do the work inside.
    """
    try:
        yield
    except (InvalidInputError, UnsupportedError) as error:
        start, _, rest = str(error).partition(": ")
        if start != "inspect":
            raise
        raise type(error)(f"{command}: {rest}") from error


class LiveModel:
    """A model that answers text after text; it keeps nothing of them. Ask it from one thread at a time.

    Parameters
    ----------
    model, tokenizer
        As in :func:`attsvm.microscope.inspect`.
    max_tokens
        Tokens of a text, special ones included.
    device, dtype
        Of the model; default ``cpu`` and float32.

    Raises
    ------
    InvalidInputError
        If an argument cannot be used.
    UnsupportedError
        If the attention of the model cannot be read, or its input is pictures.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_tokens: int = 256,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        if max_tokens < 2:
            raise InvalidInputError(f"serve: max_tokens must be at least 2, got {max_tokens}.")
        with speaking_as("serve"):
            self._loaded = load(model, tokenizer, device=device, dtype=dtype)
        if self._loaded.sees_pictures:
            raise UnsupportedError(
                f"serve: model must read texts, got {self._loaded.name}, which sees pictures. "
                "Hint: attsvm inspect shows what its heads do with a picture."
            )
        taken = self._loaded.n_ctx
        self.max_tokens = max_tokens if taken is None else min(max_tokens, taken)
        self.has_target = self._loaded.has_target
        self._modules = attention_modules(self._loaded.model)
        self._index = {info.name: index for index, info in enumerate(self._modules)}
        self.example = self._beginning()
        self._about = self._describe()

    @property
    def name(self) -> str:
        """For people: the path or id of the model."""
        return self._loaded.name

    def answer(self, text: str, target: str | None = None) -> LiveAnswer:
        """Run the model on one text, and measure every head.

        Parameters
        ----------
        text
            Not empty.
        target
            What the decoder of an encoder-decoder reads; default what the model itself writes.

        Raises
        ------
        TooLongError
            If the text has more than ``max_tokens`` tokens.
        InvalidInputError
            If it has none, or a target is given to a model that takes none.
        """
        began = time.perf_counter()
        corpus = self._read(text, target)
        (batch,) = batches(self._loaded, corpus, [0], batch_size=1)
        sums = Accumulator(self._modules)
        arrays: dict[str, Array] = {}

        def keep(call: AttentionCall) -> None:
            sums.add(call, batch)
            arrays.update(shown_arrays(call, f"shown.0.{self._index[call.info.name]}"))

        model = self._loaded.model
        with torch.inference_mode(), evaluating(model), captured(model, keep):
            model(**batch.inputs)
        infos = [info for info in self._modules for _ in range(info.n_heads)]
        rows = [row for index in range(len(self._modules)) for row in arrays[f"shown.0.{index}.selected"]]
        arrays["similarity"] = similarity_of(infos, rows)
        record = {
            **self._about,
            "corpus": corpus_part(corpus),
            "heads": head_parts(
                sums,
                {index: (info, range(info.n_heads)) for index, info in enumerate(self._modules)},
                corpus.names,
            ),
            "shown": [shown_part(corpus, 0)],
        }
        return LiveAnswer(record=record, arrays=arrays, seconds=time.perf_counter() - began)

    def _read(self, text: str, target: str | None) -> Corpus:
        """One window, or an error."""
        if target is not None and not self.has_target:
            raise InvalidInputError("serve: target must be left out for a model without a decoder of its own text.")
        targets = None if target is None else [target]
        with speaking_as("serve"):
            corpus = read_corpus(self._loaded, [text], targets=targets, max_tokens=self.max_tokens)
        if len(corpus.windows) > 1 or corpus.n_truncated:
            more = "" if target is None else " and its target"
            raise TooLongError(f"serve: text{more} must have at most {self.max_tokens} tokens, got more.")
        return corpus

    def _beginning(self) -> str:
        """As much of the example as fits."""
        words = EXAMPLE.split(" ")
        for count in range(len(words), 1, -1):
            with suppress(TooLongError):
                self._read(text := " ".join(words[:count]), None)
                return text
        return words[0]

    def _describe(self) -> dict[str, Any]:
        """What is the same for every text; the model is compared with its own eager attention."""
        loaded = self._loaded
        corpus = self._read(self.example, None)
        (batch,) = batches(loaded, corpus, [0], batch_size=1)
        modules = []
        for index, info in enumerate(self._modules):
            found = residual_heads(loaded.model, info)
            reason = found if isinstance(found, str) else None
            modules.append(module_part(index, info, range(info.n_heads), reason))
        return {
            "kind": "inspect",
            "name": Path(loaded.name).name or loaded.name,
            "versions": package_versions("torch", "numpy", "transformers"),
            "model": model_part(loaded, self._modules[0].tier),
            "check": vars(check_against_eager(loaded.model, batch.inputs)),
            "modules": modules,
            "measures": measure_parts(),
            "solution_names": [],
            "primary": None,
        }

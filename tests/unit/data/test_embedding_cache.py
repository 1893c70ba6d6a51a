from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from attsvm.data import EmbeddingCache, default_cache_dir, embed_text
from attsvm.data import embeddings as embeddings_module
from attsvm.errors import InvalidInputError

Models = Callable[[str], Path]
TEXTS = [f"a {'film ' * (index % 5)} {index}" for index in range(10)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings_module, "CHUNK_SIZE", 4)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders from which a model was loaded."""
    seen: list[Path] = []
    original = embeddings_module._load_model

    def spy(folder: Path, dtype: object) -> object:
        seen.append(folder)
        return original(folder, dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(embeddings_module, "_load_model", spy)
    return seen


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "embeddings").rglob("*.safetensors"))


def test_the_second_time_the_model_is_not_loaded(tiny_model: Models, tmp_path: Path, loads: list[Path]) -> None:
    first = embed_text(TEXTS, model=tiny_model("bert"), cache_dir=tmp_path)
    second = embed_text(TEXTS, model=tiny_model("bert"), cache_dir=tmp_path)
    assert (len(loads), len(entries(tmp_path))) == (1, 3)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.allowed, second.allowed)
    np.testing.assert_array_equal(first.special, second.special)
    assert (first.pieces, first.token_strings) == (second.pieces, second.token_strings)
    assert second.tokens.dtype == np.float32


def test_everything_that_matters_is_in_the_key(tiny_model: Models, tmp_path: Path, loads: list[Path]) -> None:
    folder = Path(shutil.copytree(tiny_model("bert"), tmp_path / "model"))
    cache = tmp_path / "cache"

    def embed(count: int, texts: list[str] = TEXTS[:2], **options: object) -> None:
        embed_text(texts, model=folder, cache_dir=cache, **options)  # type: ignore[arg-type]
        assert len(entries(cache)) == len(loads) == count

    embed(1)
    embed(1, batch_size=1)  # which must not matter
    embed(2, layer=1)
    embed(3, max_tokens=4)
    embed(4, dtype="float64")
    embed(5, texts=["other"])
    config = folder / "config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    embed(6)
    os.utime(folder / "model.safetensors", (1, 1))  # the same content at another time is the same model
    embed(6)


def test_a_copy_of_the_model_elsewhere_hits(tiny_model: Models, tmp_path: Path, loads: list[Path]) -> None:
    copy = Path(shutil.copytree(tiny_model("bert"), tmp_path / "copy"))
    for folder in (tiny_model("bert"), copy):
        embed_text(TEXTS, model=folder, cache_dir=tmp_path)
    assert len(loads) == 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: path.write_bytes(path.read_bytes()[:50]),
        lambda path: path.write_bytes(b""),
        Path.unlink,
        lambda path: path.with_suffix(".json").write_text("{", encoding="utf-8"),
        lambda path: path.with_suffix(".json").write_text("[]", encoding="utf-8"),
        lambda path: path.with_suffix(".json").write_text('{"pieces": []}', encoding="utf-8"),
    ],
)
def test_a_damaged_entry_is_computed_again(
    tiny_model: Models, tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    first = embed_text(TEXTS, model=tiny_model("bert"), cache_dir=tmp_path)
    damage(entries(tmp_path)[1])
    with caplog.at_level(logging.WARNING, "attsvm"):
        second = embed_text(TEXTS, model=tiny_model("bert"), cache_dir=tmp_path)
    assert "damaged and is computed again" in caplog.text
    np.testing.assert_array_equal(first.tokens, second.tokens)
    caplog.clear()
    embed_text(TEXTS, model=tiny_model("bert"), cache_dir=tmp_path)
    assert not caplog.records


def test_an_interrupted_run_goes_on(tiny_model: Models, tmp_path: Path) -> None:
    whole = embed_text(TEXTS, model=tiny_model("bert"), cache_dir=tmp_path / "whole")

    def interrupt(done: int, total: int) -> None:
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_text(TEXTS, model=tiny_model("bert"), cache_dir=tmp_path, progress=interrupt)
    assert len(entries(tmp_path)) == 2
    seen: list[tuple[int, int]] = []
    again = embed_text(
        TEXTS, model=tiny_model("bert"), cache_dir=tmp_path, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 10), (8, 10), (10, 10)]
    np.testing.assert_array_equal(again.tokens, whole.tokens)


def test_progress_ends_at_the_total(tiny_model: Models, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    embed_text(
        ["", *TEXTS], model=tiny_model("gpt2"), batch_size=3, cache_dir=tmp_path, progress=lambda *p: seen.append(p)
    )
    assert seen == sorted(seen)
    assert seen[-1] == (11, 11)


def test_a_folder_that_cannot_be_written_is_a_warning(
    tiny_model: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with caplog.at_level(logging.WARNING, "attsvm"):
        data = embed_text(TEXTS, model=tiny_model("bert"), cache_dir=tmp_path / "file")
    assert len(data) == 10
    assert [record.getMessage().startswith("Embeddings are not cached in") for record in caplog.records] == [True]


def test_a_full_disk_is_a_warning(
    tiny_model: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING, "attsvm"):
        embed_text(TEXTS, model=tiny_model("bert"), cache_dir=tmp_path)
    assert "No space left" in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_damaged_digests_are_made_again(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "cache")
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    digest = cache.file_digest(file)
    assert cache.file_digest(file) == digest
    (memo,) = (tmp_path / "cache" / "digests").iterdir()
    for content in ("{", "[]", '{"sha256": 3}'):
        memo.write_text(content, encoding="utf-8")
        assert cache.file_digest(file) == digest
    file.write_bytes(b"changed weights")
    assert cache.file_digest(file) != digest


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTSVM_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("ATTSVM_CACHE")
    assert EmbeddingCache().directory == tmp_path / "shared" / "attsvm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "attsvm"

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(InvalidInputError, match="ATTSVM_CACHE"):
        default_cache_dir()


def test_nothing_is_touched_before_it_is_needed(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "cache")
    assert cache.load("0" * 64) is None
    assert not (tmp_path / "cache").exists()

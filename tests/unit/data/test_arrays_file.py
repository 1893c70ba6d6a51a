from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_torch

from attsvm.data import read_arrays_file
from attsvm.errors import InvalidInputError
from attsvm.records import write_arrays

N, T, D = 4, 3, 2


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    base = {"X": rng.normal(size=(N, T, D)), "z": rng.normal(size=(N, D)), "y": np.array([0, 1, 1, 0])}
    return {key: value for key, value in (base | changes).items() if value is not None}


def save(path: Path, content: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **content)
    else:
        write_arrays(path, content)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_read(tmp_path: Path, suffix: str) -> None:
    allowed = np.array([[1, 1, 0]] * N)
    content = arrays(scores=np.ones((N, T)), allowed=allowed, other=np.zeros(3))
    data = read_arrays_file(save(tmp_path / f"a{suffix}", content))
    assert len(data) == N
    np.testing.assert_array_equal(data.tokens, content["X"])
    np.testing.assert_array_equal(data.queries, content["z"])
    assert data.labels is not None
    assert data.labels.tolist() == [-1, 1, 1, -1]
    assert data.scores is not None
    assert data.scores.shape == (N, T)
    assert data.allowed is not None
    assert data.allowed.dtype == np.bool_
    assert data.allowed.tolist() == (allowed > 0).tolist()


def test_both_formats_hash_the_same_and_values_count(tmp_path: Path) -> None:
    first = read_arrays_file(save(tmp_path / "a.npz", arrays()))
    second = read_arrays_file(save(tmp_path / "a.safetensors", arrays()))
    third = read_arrays_file(save(tmp_path / "b.npz", arrays(y=np.array([1, 1, 1, 0]))))
    assert first.content_hash == second.content_hash != third.content_hash


def test_long_names_absent_queries_and_types(tmp_path: Path) -> None:
    tokens = np.arange(N * T * D, dtype=np.int32).reshape(N, T, D)
    data = read_arrays_file(
        save(tmp_path / "a.npz", {"tokens": tokens, "labels": np.array(["neg", "pos", "neg", "pos"])})
    )
    assert data.tokens.dtype == np.float64
    np.testing.assert_array_equal(data.queries, tokens[:, 0])
    assert data.labels is not None
    assert data.labels.tolist() == [-1, 1, -1, 1]
    half = read_arrays_file(save(tmp_path / "b.npz", arrays(X=tokens.astype(np.float32))))
    assert half.tokens.dtype == half.queries.dtype == np.float32


def test_signs_of_one_kind_and_scores_alone_are_fine(tmp_path: Path) -> None:
    data = read_arrays_file(save(tmp_path / "a.npz", arrays(y=np.ones(N))))
    assert data.labels is not None
    assert data.labels.tolist() == [1] * N
    data = read_arrays_file(save(tmp_path / "b.npz", arrays(y=None, scores=np.zeros((N, T)))))
    assert data.labels is None


def bad(shape: tuple[int, ...], place: tuple[int, ...], value: float) -> Any:
    array = np.zeros(shape)
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": None}, r"must hold the key X \(or tokens\), got 'z', 'y'"),
        ({"y": None}, r"must hold y \(or labels\) or scores, got 'X', 'z'"),
        ({"tokens": np.zeros((N, T, D))}, "tokens must be given once, got the keys X and tokens"),
        ({"X": np.zeros((N, T))}, r"X must have the shape \(n, T, d\), got \(4, 3\)"),
        ({"X": np.zeros((0, T, D))}, "X must not be empty"),
        ({"X": np.zeros((N, 0, D))}, "X must not be empty"),
        ({"X": bad((N, T, D), (1, 2, 0), np.nan)}, r"X must be finite, got nan at \(1, 2, 0\).*Hint"),
        ({"X": np.zeros((N, T, D), dtype=complex)}, "X must hold real numbers, got the type complex128"),
        ({"X": np.full((N, T, D), "a")}, "X must hold real numbers"),
        ({"z": np.zeros((N, D + 1))}, r"z must have the shape \(n, d\) = \(4, 2\), got \(4, 3\)"),
        ({"z": bad((N, D), (0, 1), np.inf)}, r"z must be finite, got inf at \(0, 1\)"),
        ({"y": np.zeros((N, 1))}, r"y must have the shape \(n,\) = \(4,\), got \(4, 1\)"),
        ({"y": np.array([0, 1, 2, 0])}, "y must hold exactly two different labels, got 3: '0', '1', '2'"),
        ({"y": np.zeros(N)}, "y must hold exactly two different labels, got 1"),
        ({"y": np.array([1, -1, np.nan, 1])}, "y must not hold NaN or empty labels, got one at 2"),
        ({"scores": np.zeros((N, T + 1))}, r"scores must have the shape \(n, T\) = \(4, 3\)"),
        ({"scores": bad((N, T), (3, 0), -np.inf)}, "scores must be finite"),
        ({"allowed": np.full((N, T), 0.5)}, "allowed must hold booleans or 0 and 1, got 0.5"),
        ({"mask": np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]])}, "mask must allow a token .* none at 1"),
        ({"mask": np.ones((T, N))}, "mask must have the shape"),
        ({"mask": np.ones((N, T)), "allowed": np.ones((N, T))}, "allowed must be given once"),
    ],
)
def test_bad_arrays_name_the_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        read_arrays_file(save(tmp_path / "a.npz", arrays(**changes)))
    assert str(caught.value).startswith("read_arrays_file: ")


def test_pickles_are_never_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    np.savez(tmp_path / "a.npz", X=np.array([Trap()], dtype=object))
    with pytest.raises(InvalidInputError, match="Python objects, which are never read"):
        read_arrays_file(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(InvalidInputError):
        read_arrays_file(tmp_path / "b.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 10, b"PK\x03\x04 cut off", b"\xff" * 64])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError, match="must"):
        read_arrays_file(tmp_path / name)


def test_a_single_array_and_a_cut_archive(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as handle:
        np.save(handle, np.zeros(3))
    with pytest.raises(InvalidInputError, match=r"must be an .npz archive"):
        read_arrays_file(tmp_path / "a.npz")
    whole = save(tmp_path / "b.npz", arrays()).read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInputError, match=r"must be an .npz archive"):
        read_arrays_file(tmp_path / "b.npz")


def test_bfloat16_has_a_hint(tmp_path: Path) -> None:
    save_torch({"X": torch.zeros(N, T, D, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    with pytest.raises(InvalidInputError):
        read_arrays_file(tmp_path / "a.safetensors")

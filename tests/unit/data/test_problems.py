from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attsvm import TokenSelection
from attsvm.data import read_problem
from attsvm.errors import InvalidInputError
from attsvm.records import write_arrays

N, T, D = 5, 4, 3


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    base = {
        "tokens": rng.normal(size=(N, T, D)),
        "queries": rng.normal(size=(N, D)),
        "selected": np.array([0, 1, 2, 3, -1]),
    }
    return {key: np.asarray(value) for key, value in (base | changes).items() if value is not None}


def save(path: Path, content: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **content)
    else:
        write_arrays(path, content)
    return path


def read(tmp_path: Path, **changes: Any) -> TokenSelection:
    return read_problem(save(tmp_path / "a.npz", arrays(**changes))).problem


def assert_same(found: TokenSelection, expected: TokenSelection) -> None:
    for name in ("tokens", "queries", "allowed", "selected", "asked"):
        np.testing.assert_array_equal(getattr(found.tensors, name), getattr(expected.tensors, name), err_msg=name)
    np.testing.assert_array_equal(found.tensors.margin, expected.tensors.margin)
    assert (found.offsets is None) == (expected.offsets is None)
    if expected.offsets is not None:
        np.testing.assert_array_equal(found.offsets, expected.offsets)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_read(tmp_path: Path, suffix: str) -> None:
    content = arrays(offsets=np.ones((N, T)), margin=np.full((N, 1, T), 2.0), allowed=np.arange(T) < np.full((N, 1), 4))
    data = read_problem(save(tmp_path / f"a{suffix}", content))
    expected = TokenSelection(
        content["tokens"],
        content["queries"],
        content["selected"],
        allowed=content["allowed"],
        offsets=content["offsets"],
        margin=content["margin"],
    )
    assert_same(data.problem, expected)
    assert (data.total, data.center) == (N, None)


def test_both_formats_hash_the_same_and_values_count(tmp_path: Path) -> None:
    first = read_problem(save(tmp_path / "a.npz", arrays()))
    second = read_problem(save(tmp_path / "a.safetensors", arrays()))
    third = read_problem(save(tmp_path / "b.npz", arrays(margin=2.0)))
    assert first.content_hash == second.content_hash != third.content_hash


def test_short_names_labels_and_absent_queries(tmp_path: Path) -> None:
    content = arrays()
    renamed = {"X": content["tokens"], "selected": content["selected"], "y": np.ones(N), "mask": np.ones((N, T))}
    found = read_problem(save(tmp_path / "a.npz", renamed)).problem
    assert_same(found, TokenSelection(content["tokens"], content["tokens"][:, 0], content["selected"]))


def test_scores(tmp_path: Path) -> None:
    scores = np.random.default_rng(1).normal(size=(N, T))
    allowed = np.ones((N, T), dtype=bool)
    allowed[:, scores.mean(0).argmax()] = False
    found = read(tmp_path, selected=None, scores=scores, allowed=allowed)
    expected = np.where(allowed, scores, -np.inf).argmax(1)
    assert found.selected[:, 0].argmax(1).tolist() == expected.tolist()


def test_several_queries_and_several_selected(tmp_path: Path) -> None:
    queries = np.random.default_rng(1).normal(size=(N, 2, D))
    chosen = np.zeros((N, 2, T), dtype=bool)
    chosen[:, :, :2] = True
    content = arrays()
    assert_same(read(tmp_path, queries=queries, selected=chosen), TokenSelection(content["tokens"], queries, chosen))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [None, "lengths", "mask"])
def test_sequences(tmp_path: Path, causal: bool, padded: str | None) -> None:
    lengths = np.array([4, 3, 2, 4, 1])
    real = np.arange(T) < lengths[:, None]
    selected = np.where(real, 0, -1) if padded else np.zeros((N, T), dtype=int)
    more = {} if padded is None else {"lengths": lengths} if padded == "lengths" else {"mask": real}
    found = read(tmp_path, queries=None, selected=selected, sequence=True, causal=causal, **more)
    expected = TokenSelection.sequence(arrays()["tokens"], selected, causal=causal, mask=real if padded else None)
    assert_same(found, expected)


def test_sequences_by_scores(tmp_path: Path) -> None:
    scores = np.random.default_rng(1).normal(size=(N, T))
    found = read(tmp_path, queries=None, selected=None, scores=scores, sequence=True, causal=True)
    prefixes = [[int(row[: q + 1].argmax()) for q in range(T)] for row in scores]
    assert found.selected.argmax(-1).tolist() == prefixes


@pytest.mark.parametrize("per_query", [False, True])
def test_lengths_and_allowed(tmp_path: Path, per_query: bool) -> None:
    lengths = np.array([4, 3, 2, 4, 1])
    allowed = np.ones((N, 1, T) if per_query else (N, T), dtype=bool)
    allowed[0, ..., 3] = False
    found = read(tmp_path, selected=np.zeros(N, dtype=int), lengths=lengths, allowed=allowed)
    expected = np.arange(T) < np.array([3, 3, 2, 4, 1])[:, None]
    assert found.allowed[:, 0].tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["float16", "float32", "int32", "uint8", "longdouble", ">f8"])
def test_tokens_of_any_real_type_and_results_in_float64(tmp_path: Path, kind: str) -> None:
    tokens = np.round(3 * np.abs(arrays()["tokens"])).astype(kind)
    found = read(tmp_path, tokens=tokens, queries=arrays()["queries"].astype(np.float32))
    np.testing.assert_array_equal(found.tokens, tokens.astype(np.float64))
    assert found.margins(np.eye(D)).dtype == np.float64
    # float32 is kept as it is inside, since large files are.
    assert (found.tensors.tokens.element_size() == 4) == (kind == "float32")


def test_a_batch(tmp_path: Path) -> None:
    content = {key: np.stack([value, value[::-1]]) for key, value in arrays().items()}
    data = read_problem(save(tmp_path / "a.npz", {**content, "center": np.eye(D)}))
    assert (data.problem.batch_size, data.total) == (2, 2)
    assert data.center is not None
    assert data.center.shape == (D, D)


@pytest.mark.parametrize("size", [2, 3])
def test_shares_are_the_whole(tmp_path: Path, size: int) -> None:
    path = save(tmp_path / "a.npz", arrays(offsets=np.random.default_rng(2).normal(size=(N, T)), center=np.eye(D)))
    whole = read_problem(path)
    for rank in range(size):
        share = read_problem(path, rank=rank, size=size)
        assert (share.total, share.content_hash) == (N, whole.content_hash)
        for name in ("tokens", "queries", "selected", "offsets"):
            np.testing.assert_array_equal(
                getattr(share.problem, name), getattr(whole.problem, name)[rank::size], err_msg=name
            )
        np.testing.assert_array_equal(share.center, np.eye(D))


def test_shares_of_a_batch_with_a_center_each(tmp_path: Path) -> None:
    content = {key: np.stack([value] * 3) for key, value in arrays().items()}
    centers = np.stack([np.eye(D) * b for b in range(3)])
    share = read_problem(save(tmp_path / "a.npz", {**content, "center": centers}), rank=1, size=2)
    assert len(share.problem) == 1
    np.testing.assert_array_equal(share.center, centers[1:2])


def test_a_mistake_in_a_share_is_counted_as_in_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", arrays(selected=np.array([0, 0, 0, 9, 0])))
    with pytest.raises(InvalidInputError, match="9 at sequence 3"):
        read_problem(path, rank=1, size=2)


def test_as_many_sequences_as_processes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", arrays())
    assert len(read_problem(path, rank=4, size=5).problem.tensors.tokens) == 1
    with pytest.raises(InvalidInputError, match="each of the 6 processes, got 5"):
        read_problem(path, rank=0, size=6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"allowed": np.ones((N, T, T)), "sequence": True, "queries": None}, "allowed must have shape .5, 4. where"),
        ({"allowed": np.ones((N, 2)), "lengths": np.ones(N, dtype=int)}, "allowed must have shape"),
        ({"allowed": np.full((N, T), 3), "lengths": np.ones(N, dtype=int)}, "allowed must hold booleans"),
        ({"lengths": np.ones(2, dtype=int)}, r"lengths must have shape \(5,\)"),
        ({"causal": True}, "causal must come with sequence"),
        ({"sequence": 2, "queries": None}, "sequence must be one value"),
        ({"weights": np.ones(N)}, "no other keys than tokens, X, .* got 'weights'"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = save(tmp_path / "a.npz", arrays(**changes))
    with pytest.raises(InvalidInputError, match=words):
        read_problem(path)

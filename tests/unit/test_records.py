"""Records on disk: written in one step, strict JSON, never a pickle, and damage is named."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attsvm.errors import RecordError
from attsvm.records import (
    SCHEMA_VERSION,
    RunFolder,
    dumps,
    package_versions,
    read_arrays,
    read_json,
    source_commit,
    write_arrays,
    write_bytes,
    write_json,
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


# ------------------------------------------------------------------------------------------------------------- writing


def test_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_at_any_step_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a"
    write_bytes(path, b"old")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(RecordError, match=r"a could not be written: No space left on device\."):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_crash_between_writing_and_renaming_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: Any) -> None:
        raise Crash

    path = tmp_path / "a"
    write_bytes(path, b"old")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), crash)
    with pytest.raises(Crash):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"


def test_content_is_on_the_disk_before_it_gets_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda *paths: (events.append("replace"), replace(*paths))[1])
    write_bytes(tmp_path / "a", b"x")
    assert events == ["fsync", "replace"]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="No such file"):
        write_bytes(tmp_path / "no" / "a", b"x")


# ---------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan"), np.float32("inf")])
def test_non_finite_numbers_become_null(value: float) -> None:
    assert dumps({"a": [value, 1.5], "b": (value,)}) == '{"a": [null, 1.5], "b": [null]}'


def test_what_records_hold_becomes_plain() -> None:
    value = {
        1: np.int64(3),
        "array": np.array([1.0, np.nan]),
        "flag": np.bool_(True),
        "path": Path("a/b"),
        "none": None,
    }
    assert json.loads(dumps(value)) == {"1": 3, "array": [1.0, None], "flag": True, "path": "a/b", "none": None}


def test_what_json_cannot_hold_is_an_error() -> None:
    with pytest.raises(TypeError):
        dumps({"a": object()})


def test_json_comes_back_with_any_text(tmp_path: Path) -> None:
    value = {"text": "\u202e\u05d0 \x00\x07 </script> \U0001f600", "half": "\ud83d"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1} x', b"[" * 100_000], ids=str)
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(RecordError, match=r"a\.json is not a JSON file that attsvm wrote"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_unreadable_json_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecordError, match="could not be read"):
        read_json(tmp_path / name)


# -------------------------------------------------------------------------------------------------------------- arrays


def test_arrays_come_back(tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.standard_normal((4, 6))
    arrays = {
        "turned": values.T,
        "part": values[::2, 1:],
        "flags": values > 0,
        "none": np.zeros((0, 3)),
        "i": np.arange(3),
    }
    write_arrays(tmp_path / "a.safetensors", arrays, {"made": "here"})
    back = read_arrays(tmp_path / "a.safetensors")
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


class Trap:
    """Pickled, it would create a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path, folder: RunFolder) -> None:
    content = pickle.dumps(Trap(tmp_path / "sprung"))
    for path in (folder.arrays_file, folder.result_file, folder.metrics_file):
        path.write_bytes(content)
    for read in (folder.read_arrays, folder.read_result, folder.read_metrics):
        with pytest.raises(RecordError):
            read()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"x" * 7, b"\xff" * 64])
def test_damaged_arrays_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(RecordError, match=r"a\.safetensors could not be read"):
        read_arrays(tmp_path / "a.safetensors")


def test_missing_arrays_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"a\.safetensors could not be read"):
        read_arrays(tmp_path / "a.safetensors")


# -------------------------------------------------------------------------------------------------------- a run folder


def test_the_object_alone_touches_nothing(tmp_path: Path) -> None:
    assert not RunFolder(tmp_path / "run").is_complete
    assert os.listdir(tmp_path) == []


def test_records_come_back_with_the_schema_version(folder: RunFolder) -> None:
    folder.write_config({"seed": 3})
    assert not folder.is_complete
    folder.write_result({"gap": float("nan")})
    assert folder.is_complete
    assert folder.read_config() == {"schema_version": SCHEMA_VERSION, "seed": 3}
    assert folder.read_result() == {"schema_version": SCHEMA_VERSION, "gap": None}
    rows = [{"step": 0, "loss": 0.5}, {"step": 1, "loss": None}]
    folder.write_metrics(rows)
    assert folder.read_metrics() == rows
    folder.write_arrays({"a": np.ones(2)})
    np.testing.assert_array_equal(folder.read_arrays()["a"], [1.0, 1.0])


@pytest.mark.parametrize(
    ("record", "words"),
    [([1], "no schema_version"), ({"a": 1}, "no schema_version"), ({"schema_version": 99}, "version 99")],
)
def test_foreign_records_are_refused(folder: RunFolder, record: Any, words: str) -> None:
    write_json(folder.result_file, record)
    with pytest.raises(RecordError, match=words):
        folder.read_result()


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe"])
def test_damaged_line_of_the_metrics_is_named(folder: RunFolder, line: bytes) -> None:
    folder.metrics_file.write_bytes(b'{"step": 0}\n' + line + b"\n")
    with pytest.raises(RecordError, match=r"metrics\.jsonl, line 2"):
        folder.read_metrics()
    folder.metrics_file.unlink()
    with pytest.raises(RecordError, match="could not be read"):
        folder.read_metrics()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RecordError, match="could not be created"):
            RunFolder(path).create()


def test_dots_are_settled_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder("new/..").path == Path()
    assert RunFolder(Path("runs") / "../runs/a").path == Path("runs/a")


@pytest.mark.parametrize(
    ("names", "other"),
    [
        ([], False),
        ([".lock", "checkpoint", ".config.json.12.part"], False),
        (["config.json", "notes.txt"], False),
        (["notes.txt"], True),
        ([".lock", "result.json"], True),
        (["thesis.part"], True),
    ],
)
def test_other_files(tmp_path: Path, names: list[str], other: bool) -> None:
    for name in names:
        (tmp_path / name).write_text("x")
    assert RunFolder(tmp_path).holds_other_files is other


def test_clear_and_discard_touch_only_records(folder: RunFolder) -> None:
    folder.write_config({})
    folder.write_result({})
    (folder.path / "notes.txt").write_text("mine")
    folder.clear()
    assert os.listdir(folder.path) == ["notes.txt"]
    folder.create()
    folder.discard()
    assert os.listdir(folder.path) == ["notes.txt"]
    (folder.path / "notes.txt").unlink()
    folder.discard()
    assert not folder.path.exists()


def hold(path: Path, ready: Any, done: Any) -> None:
    with RunFolder(path).lock():
        ready.set()
        done.wait(30)
        os._exit(0)  # without leaving the block, as a killed process would


def test_lock_keeps_other_processes_out_and_ends_with_its_process(folder: RunFolder) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(folder.path, ready, done))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(RecordError, match="in use by another"), folder.lock():
            pass
    finally:
        done.set()
        other.join(30)
    with folder.lock():
        pass


def test_lock_removes_halves_of_files(folder: RunFolder) -> None:
    halves = [folder.path / ".result.json.1.part", folder.checkpoint / ".W.safetensors.1.part"]
    for half in halves:
        half.write_text("x")
    (folder.path / "mine.part").write_text("x")
    with folder.lock():
        assert not any(half.exists() for half in halves)
    assert (folder.path / "mine.part").exists()


def test_lock_that_cannot_be_made(folder: RunFolder) -> None:
    (folder.path / ".lock").mkdir()
    with pytest.raises(RecordError, match="could not be written"), folder.lock():
        pass


# ---------------------------------------------------------------------------------------------------------- provenance


def test_versions_leave_out_what_is_absent() -> None:
    versions = package_versions("torch", "no-such-package")
    assert versions.keys() == {"python", "attsvm", "torch"}
    assert all(versions.values())


def test_commit_is_a_hash_or_nothing() -> None:
    commit = source_commit()
    assert commit is None or len(bytes.fromhex(commit)) == 20


def test_commit_of_an_installed_package_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attsvm.records.__file__", str(tmp_path / "site-packages" / "attsvm" / "records.py"))
    assert source_commit() is None

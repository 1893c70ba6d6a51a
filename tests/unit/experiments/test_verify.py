"""The job as a library call: what it returns, tells, raises and leaves behind."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attsvm.errors import AttSVMError, InvalidInputError, RecordError
from attsvm.experiments import VerifyConfig, verify
from attsvm.records import RunFolder


@pytest.fixture
def config(tmp_path: Path, rng: np.random.Generator) -> VerifyConfig:
    """A small problem of arrays."""
    data = tmp_path / "data.npz"
    np.savez(data, X=rng.standard_normal((4, 3, 5)), z=rng.standard_normal((4, 5)), y=[1, -1, 1, -1])
    return VerifyConfig(data=str(data), steps=40)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_returned_result_is_the_one_on_disk(config: VerifyConfig, folder: RunFolder) -> None:
    result = verify(config, folder, command="attsvm verify data.npz")
    on_disk = folder.read_result()
    assert result.keys() == on_disk.keys()
    assert on_disk["command"] == "attsvm verify data.npz"
    assert on_disk["verdict"] == result["verdict"]
    assert not folder.checkpoint.exists()


def test_progress_tells_every_task_to_its_end(config: VerifyConfig, folder: RunFolder) -> None:
    told: dict[str, list[tuple[float, float]]] = {}
    lock = threading.Lock()

    def progress(task: str, done: float, total: float, note: str) -> None:
        with lock:
            told.setdefault(task, []).append((done, total))

    verify(config, folder, progress=progress)
    assert told.keys() == {"train W", "solve W", "train KQ", "solve KQ"}
    for calls in told.values():
        assert calls == sorted(calls)
        assert calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("task", ["train W", "solve KQ"])
def test_error_in_one_thread_ends_the_run(config: VerifyConfig, folder: RunFolder, task: str) -> None:
    def fail(name: str, *_: Any) -> None:
        if name == task:
            raise AttSVMError("a reason")

    with pytest.raises(AttSVMError, match="a reason"):
        verify(config, folder, progress=fail)
    assert not folder.is_complete


def test_interrupted_run_goes_on_to_the_same_arrays(config: VerifyConfig, folder: RunFolder, tmp_path: Path) -> None:
    def stop(task: str, done: float, *_: Any) -> None:
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(config, folder, progress=stop)
    assert not folder.is_complete
    other = RunFolder(tmp_path / "other")
    verify(config, folder)
    verify(config, other)
    first, second = folder.read_arrays(), other.read_arrays()
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    assert folder.metrics_file.read_bytes() == other.metrics_file.read_bytes()


def test_no_space_for_the_result(config: VerifyConfig, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def full(handle: int) -> None:
        if "result.json" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RecordError, match=r"result\.json could not be written: No space left on device"):
            verify(config, folder)
    assert not folder.is_complete
    verify(config, folder)
    assert folder.is_complete


def test_mistake_leaves_no_new_folder(config: VerifyConfig, folder: RunFolder) -> None:
    with pytest.raises(InvalidInputError, match="does not exist"):
        verify(config.model_copy(update={"data": "no-such.csv"}), folder)
    assert not folder.path.exists()


def test_finished_run_stays(config: VerifyConfig, folder: RunFolder) -> None:
    verify(config, folder)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(InvalidInputError, match="finished run"):
        verify(config, folder)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_damaged_settings_of_an_unfinished_run_count_as_others(config: VerifyConfig, folder: RunFolder) -> None:
    folder.create()
    folder.config_file.write_text("{")
    with pytest.raises(InvalidInputError, match="other settings"):
        verify(config, folder)
    verify(config, folder, overwrite=True)
    assert json.loads(folder.config_file.read_text())["config"]["steps"] == 40


def test_one_class_of_labels_is_enough_for_arrays(config: VerifyConfig, folder: RunFolder, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", X=np.random.default_rng(0).standard_normal((3, 3, 4)), y=np.ones(3))
    result = verify(config.model_copy(update={"data": str(tmp_path / "one.npz")}), folder)
    assert result["n_sequences"] == 3

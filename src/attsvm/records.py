"""What a run leaves on disk: JSON for people, safetensors for arrays, and never a pickle.

A run folder holds

========================  =====================================================================
``config.json``           the resolved configuration, versions, commit and seed
``metrics.jsonl``         one JSON object per line: the curves, step by step
``arrays.safetensors``    all arrays, named ``<parameterization>.<quantity>``
``result.json``           the numbers and verdicts, with ``schema_version``
``report.html``           the page (written by :mod:`attsvm.report`)
``checkpoint/``           what a resumed run needs; removed when the run is complete
========================  =====================================================================

Every file is written beside its place and moved there in one step, so that a reader (or a run that
resumes after ``kill -9``) sees the old file or the new one and never half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from attsvm.errors import RecordError

__all__ = [
    "SCHEMA_VERSION",
    "RunFolder",
    "package_versions",
    "read_arrays",
    "read_json",
    "remove_halves",
    "source_commit",
    "write_arrays",
    "write_bytes",
    "write_json",
]

SCHEMA_VERSION = 1
"""Version of the layout of every JSON file here; it rises when a reader of the old one would misread the new one."""

LOCK = ".lock"
PART = ".part"
"""Ending of the name of a file that is being written."""


def _plain(value: Any) -> Any:
    """Turn arrays, paths and non-finite numbers into what JSON can hold (a non-finite number becomes null)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def dumps(value: Any, *, indent: int | None = None) -> str:
    """JSON text of ``value`` in strict JSON: NaN and infinity are written as null."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` at ``path`` so that the file is the old one or the new one at any moment.

    Raises
    ------
    RecordError
        If it cannot be written (no permission, no space).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RecordError(f"{path} could not be written: {error.strerror or error}.") from error


def remove_halves(folder: Path) -> None:
    """Remove the halves of files that killed processes left in a folder, and none that is being written."""
    for half in folder.glob(f".*{PART}"):
        writer = half.name.removesuffix(PART).rpartition(".")[2]
        if not (writer.isdecimal() and _is_alive(int(writer))):
            with contextlib.suppress(OSError):  # a folder that cannot be written keeps them
                half.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, in one step."""
    write_bytes(path, (dumps(value, indent=2) + "\n").encode("utf-8", errors="backslashreplace"))


def read_json(path: Path) -> Any:
    """Read a JSON file written by :func:`write_json`.

    Raises
    ------
    RecordError
        If the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path} could not be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not a JSON file that attsvm wrote: {error}.") from error


def package_versions(*names: str) -> dict[str, str]:
    """Versions of attsvm, Python and the named packages; a package that is absent is left out."""
    versions = {"python": platform.python_version()}
    for name in ("attsvm", *names):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def source_commit() -> str | None:
    """The commit of the source tree that attsvm runs from, or None for an installed package."""
    here = Path(__file__).resolve().parent
    if not (here.parents[1] / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


class RunFolder:
    """One run on disk. Creating the object touches nothing; :meth:`create` makes the folder.

    Parameters
    ----------
    path
        The folder ``runs/<name>``.
    """

    def __init__(self, path: Path | str) -> None:
        # "runs/.." is a folder of its own to mkdir, and the working directory once "runs" exists; settle what it means.
        self.path = Path(os.path.normpath(path))
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.arrays_file = self.path / "arrays.safetensors"
        self.result_file = self.path / "result.json"
        self.report_file = self.path / "report.html"
        self.checkpoint = self.path / "checkpoint"

    @property
    def is_complete(self) -> bool:
        """True once ``result.json`` is there, which is the last record written."""
        return self.result_file.exists()

    @property
    def holds_other_files(self) -> bool:
        """True for a folder with files in it that cannot come from a run; a model's ``config.json`` is none of ours."""
        names = {path.name for path in self.path.iterdir()}
        ours = {LOCK, self.checkpoint.name, *(name for name in names if name.startswith(".") and name.endswith(PART))}
        return not self._has_own_config and not names <= ours

    @property
    def _has_own_config(self) -> bool:
        """Whether there is a ``config.json`` that is ours, or damaged, which is for whoever reads it to say."""
        if not self.config_file.exists():
            return False
        try:
            content = read_json(self.config_file)
        except RecordError:
            return True
        return not isinstance(content, dict) or "schema_version" in content

    def create(self) -> None:
        """Make the folder and its parents.

        Raises
        ------
        RecordError
            If it cannot be made (a file of that name, no permission, no space).
        """
        try:
            self.checkpoint.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(f"{self.path} could not be created: {error.strerror or error}.") from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the lock ends with the process, however that ends.

        Raises
        ------
        RecordError
            If another process holds it, or it cannot be written.
        """
        self.create()
        try:
            handle = (self.path / LOCK).open("w")
        except OSError as error:
            raise RecordError(f"{self.path} could not be written: {error.strerror or error}.") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RecordError(f"{self.path} is in use by another attsvm process.") from error
            # Halves of files that a killed process left.
            for half in self.path.rglob(f".*{PART}"):
                half.unlink(missing_ok=True)
            yield

    def clear(self) -> None:
        """Remove the records, and nothing else; ``result.json`` goes first, so that what is left is not complete."""
        records = (self.result_file, self.report_file, self.arrays_file, self.metrics_file, self.config_file)
        for path in records:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoint, ignore_errors=True)

    def discard(self) -> None:
        """Remove the records and, if nothing else is in it, the folder."""
        self.clear()
        (self.path / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write ``config.json`` with the schema version."""
        write_json(self.config_file, {"schema_version": SCHEMA_VERSION, **config})

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json`` with the schema version."""
        write_json(self.result_file, {"schema_version": SCHEMA_VERSION, **result})

    def read_config(self) -> dict[str, Any]:
        """Read ``config.json``; raises RecordError when it is damaged or of another schema version."""
        return _checked(self.config_file)

    def read_result(self) -> dict[str, Any]:
        """Read ``result.json``; raises RecordError when it is damaged or of another schema version."""
        return _checked(self.result_file)

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write ``metrics.jsonl`` whole: one row a line."""
        write_bytes(self.metrics_file, "".join(dumps(row) + "\n" for row in rows).encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read ``metrics.jsonl``.

        Raises
        ------
        RecordError
            If a line is not JSON; the message names the line.
        """
        rows: list[dict[str, Any]] = []
        try:
            lines = self.metrics_file.read_bytes().splitlines()
        except OSError as error:
            raise RecordError(f"{self.metrics_file} could not be read: {error.strerror or error}.") from error
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise RecordError(f"{self.metrics_file}, line {number}, is not JSON.") from error
        return rows

    def write_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write ``arrays.safetensors``."""
        write_arrays(self.arrays_file, arrays)

    def read_arrays(self) -> dict[str, np.ndarray]:
        """Read ``arrays.safetensors``."""
        return read_arrays(self.arrays_file)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write named arrays to a safetensors file, in one step."""
    contiguous = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    write_bytes(path, save(contiguous, metadata=dict(metadata) if metadata else None))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file of arrays.

    Raises
    ------
    RecordError
        If it is missing or not a safetensors file.
    """
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{path} could not be read: {error}.") from error


def _checked(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not isinstance(record, dict) or "schema_version" not in record:
        raise RecordError(f"{path} is not a record that attsvm wrote (it has no schema_version).")
    if record["schema_version"] != SCHEMA_VERSION:
        raise RecordError(f"{path} has schema version {record['schema_version']}; this attsvm reads {SCHEMA_VERSION}.")
    return record

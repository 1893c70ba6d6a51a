"""The fixture that writes a run folder to render."""

from __future__ import annotations

from pathlib import Path

import pytest

from report.fake_run import Change, WriteRun, make_run, write


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Return a function that writes a run folder, after changes to its records."""

    def make(*changes: Change, count: int = 60, name: str = "run") -> Path:
        result, arrays = make_run(count)
        for change in changes:
            change(result, arrays)
        return write(tmp_path / name, result, arrays)

    return make

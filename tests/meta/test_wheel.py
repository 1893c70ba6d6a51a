"""The wheel holds what the program reads at run time."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_source_file_is_in_the_wheel(wheel_names: set[str]) -> None:
    package = Path(__file__).resolve().parents[2] / "src" / "attsvm"
    ours = {
        f"attsvm/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert ours - wheel_names == set()


def test_notices_travel_with_the_wheel(wheel_names: set[str]) -> None:
    assert "attsvm/data/samples/NOTICE" in wheel_names
    assert "attsvm/py.typed" in wheel_names
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)


def test_nothing_foreign_is_in_the_wheel(wheel_names: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel_names} <= {"attsvm", "attsvm-0.1.0.dist-info"}
    assert [name for name in wheel_names if "__pycache__" in name] == []

"""What `attsvm` offers at its top: neither less nor more."""

from __future__ import annotations

import tomllib
from pathlib import Path

import attsvm

PUBLIC = {"TokenSelection", "solve", "Solution", "Status", "descend", "Trajectory", "correlation", "__version__"}


def test_public_names_are_pinned() -> None:
    assert set(attsvm.__all__) == PUBLIC
    assert len(attsvm.__all__) == len(PUBLIC)


def test_public_names_exist() -> None:
    for name in PUBLIC:
        assert getattr(attsvm, name) is not None


def test_nothing_else_is_shown() -> None:
    assert {name for name in dir(attsvm) if not name.startswith("_")} == PUBLIC - {"__version__"}


def test_version_is_the_same_everywhere(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert attsvm.__version__ == project["version"]
    assert f"\nversion: {project['version']}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")

"""Fixtures of the command line's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.commands import Commands


@pytest.fixture
def attsvm(tmp_path: Path) -> Commands:
    """Return what runs ``attsvm`` in an empty folder, with an empty cache and no network."""
    home = tmp_path / "home"
    home.mkdir()
    return Commands(home, {"ATTSVM_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"})

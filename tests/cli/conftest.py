"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.commands import Commands


@pytest.fixture
def attsvm(tmp_path: Path) -> Iterator[Commands]:
    """Return what runs ``attsvm`` in an empty folder, with an empty cache and no network."""
    yield from commands_in(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Return the same for all tests of a module, for runs that several of them look at."""
    yield from commands_in(tmp_path_factory.mktemp("shared"))


def commands_in(folder: Path) -> Iterator[Commands]:
    home = folder / "home"
    home.mkdir()
    commands = Commands(home, {"ATTSVM_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"})
    yield commands
    commands.close()

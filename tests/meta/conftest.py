"""The files of the project, as the rules of this folder read them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FreshPython = Callable[[str], str]


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _python_files(folder: str) -> dict[str, ast.Module]:
    paths = sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)
    assert paths, f"there are no Python files under {folder}"
    return {path.relative_to(ROOT).as_posix(): _parsed(path) for path in paths}


@pytest.fixture
def source_trees() -> dict[str, ast.Module]:
    """Syntax tree of every module of the package, by path."""
    return _python_files("src/attsvm")


@pytest.fixture
def test_trees() -> dict[str, ast.Module]:
    """Syntax tree of every file under tests, by path."""
    return _python_files("tests")


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def project_texts() -> dict[str, str]:
    """Text of every file of the repository (not what is ignored, not what is binary), by path."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so that the project's files cannot be told from others")
    texts = {}
    for name in listed.stdout.splitlines():
        try:
            texts[name] = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
    return texts


@pytest.fixture
def fresh_python() -> FreshPython:
    """Run code in a fresh Python process of its own and return what it prints."""

    def run(code: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run

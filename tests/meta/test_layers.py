"""The layers of docs/architecture.md, as import-linter reads them from pyproject.toml."""

from __future__ import annotations

from collections.abc import Callable


def test_layers_are_kept(fresh_python: Callable[[str], str]) -> None:
    said = fresh_python("from importlinter.cli import lint_imports; print('exit code', lint_imports(no_cache=True))")
    assert said.rstrip().endswith("exit code 0"), said

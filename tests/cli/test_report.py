"""``attsvm report``: the page again, from the records alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.commands import SMALL, Commands


@pytest.fixture(scope="module")
def finished(shared: Commands) -> Path:
    assert shared("verify", *SMALL, "-o", "run").code == 0
    return shared.home / "run"


def test_page_is_made_again_to_the_byte(attsvm: Commands, finished: Path) -> None:
    run = shutil.copytree(finished, attsvm.home / "run")
    (run / "report.html").unlink()
    done = attsvm("report", "run")
    assert (done.code, done.out, done.err) == (0, "run/report.html\n", "")
    assert (run / "report.html").read_bytes() == (finished / "report.html").read_bytes()


def test_json_and_quiet(attsvm: Commands, finished: Path) -> None:
    shutil.copytree(finished, attsvm.home / "run")
    assert attsvm("report", "run/", "--json").json == {"run": "run", "report": "run/report.html"}
    done = attsvm("report", "run", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def cut(run: Path) -> None:
    content = (run / "arrays.safetensors").read_bytes()
    (run / "arrays.safetensors").write_bytes(content[: len(content) // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "result.json"),
    "empty folder": (lambda run: [path.unlink() for path in run.iterdir()], "result.json"),
    "no arrays": (lambda run: (run / "arrays.safetensors").unlink(), "arrays.safetensors"),
    "half the arrays": (cut, "arrays.safetensors"),
    "broken JSON": (lambda run: (run / "result.json").write_text('{"schema_version": 1,'), "result.json"),
    "deep JSON": (lambda run: (run / "result.json").write_text("[" * 100_000), "result.json"),
    "not UTF-8": (lambda run: (run / "result.json").write_bytes(b"\xff\xfe"), "result.json"),
    "foreign JSON": (lambda run: (run / "result.json").write_text('{"epochs": 3}'), "schema_version"),
    "a later version": (lambda run: (run / "result.json").write_text('{"schema_version": 99}'), "99"),
    "an empty record": (lambda run: (run / "result.json").write_text('{"schema_version": 1}'), "result.json"),
    "broken settings": (lambda run: (run / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_run(attsvm: Commands, finished: Path, name: str) -> None:
    damage, word = DAMAGES[name]
    run = shutil.copytree(finished, attsvm.home / "run")
    damage(run)
    attsvm("report", "run", "--json").failed(1, "run", word)


def test_a_file_is_no_run(attsvm: Commands, finished: Path) -> None:
    shutil.copy(finished / "result.json", attsvm.home)
    attsvm("report", "result.json").failed(1, "result.json", "Not a directory")

"""``attsvm report`` on what ``attsvm reproduce`` leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from report.fake_gallery import write_gallery


def report(home: Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "attsvm", "report", *arguments], cwd=home, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_pages_are_made_again(tmp_path: Path) -> None:
    write_gallery(tmp_path / "reproduce")
    assert report(tmp_path, "reproduce") == (0, "reproduce/index.html\n", "")
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.html"))}
    assert len(before) == 5
    for path in before:
        path.unlink()
    code, out, err = report(tmp_path, "reproduce/", "--json")
    assert (code, json.loads(out), err) == (0, {"run": "reproduce", "report": "reproduce/index.html"}, "")
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.html"))} == before
    (tmp_path / "reproduce" / "rates" / "report.html").unlink()
    assert report(tmp_path, "reproduce/rates") == (0, "reproduce/rates/report.html\n", "")
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.html"))} == before
    # The order is that of the recipes, not of the papers: the first figure of this gallery is a tfsvm one.
    index = (tmp_path / "reproduce" / "index.html").read_text(encoding="utf-8")
    places = [index.index(f'"{name}/report.html"') for name in ("tfsvm-fig2", "rates", "tfsvm-fig10")]
    assert places == sorted(places)

    for name, words in (("cones", "is not finished"), ("flow", "cannot be shown"), ("of somebody else", "result.json")):
        code, out, err = report(tmp_path, f"reproduce/{name}")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert words in err

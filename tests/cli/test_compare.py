"""``attsvm compare``: a page and a record of two runs of inspect, and what is no such run."""

from __future__ import annotations

from pathlib import Path

import pytest

from attsvm.records import RunFolder, read_json, write_json
from cli.commands import Commands
from report.fake_atlas import write_atlas


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    home = tmp_path_factory.mktemp("runs")
    return tuple(str(write_atlas(home / name, name=name, seed=seed)) for seed, name in enumerate(("base", "tuned")))  # type: ignore[return-value]


def test_record_and_page(attsvm: Commands, runs: tuple[str, str]) -> None:
    done = attsvm("compare", *runs, "--output-dir", "out", "--json")
    assert done.code == 0
    record = read_json(attsvm.home / "out" / "compare.json")
    assert record["schema_version"] == 1
    assert [run["name"] for run in record["runs"]] == ["base", "tuned"]
    assert record["matched"] == 12
    assert record["heads"][0]["relative"] >= record["heads"][-1]["relative"] > 0
    assert {**record, "run": "out", "report": "out/report.html"} == {**done.json, "schema_version": 1}
    page = (attsvm.home / "out" / "report.html").read_text(encoding="utf-8")
    assert "Two runs of attention heads beside each other" in page
    assert {path.name for path in (attsvm.home / "out").iterdir()} == {"compare.json", "report.html"}


def test_summary(attsvm: Commands, runs: tuple[str, str]) -> None:
    done = attsvm("compare", *runs)
    assert (done.code, done.out) == (0, "")
    assert "tuned minus base: 12 heads matched" in done.err
    record = read_json(attsvm.home / "runs" / "compare-base-tuned" / "compare.json")
    assert record["heads"][0]["first"] in done.err
    assert "Report: runs/compare-base-tuned/report.html" in done.err
    assert attsvm("compare", *runs, "-q").err == ""
    assert (attsvm.home / "runs" / "compare-base-tuned-2" / "report.html").exists()


def test_earlier_comparison(attsvm: Commands, runs: tuple[str, str]) -> None:
    assert attsvm("compare", *runs, "-q", "-o", "out").code == 0
    attsvm("compare", *runs, "-o", "out").failed(2, "--output-dir", "--overwrite")
    before = (attsvm.home / "out" / "compare.json").read_bytes()
    assert attsvm("compare", *reversed(runs), "-q", "-o", "out", "--overwrite").code == 0
    assert (attsvm.home / "out" / "compare.json").read_bytes() != before


def test_other_files_are_left_alone(attsvm: Commands, runs: tuple[str, str]) -> None:
    (attsvm.home / "thesis").mkdir()
    (attsvm.home / "thesis" / "report.html").write_text("mine")
    attsvm("compare", *runs, "-o", "thesis", "--overwrite").failed(2, "--output-dir", "other files")
    attsvm("compare", *runs, "-o", runs[0], "--overwrite").failed(2, "other files")
    attsvm("compare", *runs, "-o", "thesis/report.html").failed(2, "--output-dir", "file")
    assert (attsvm.home / "thesis" / "report.html").read_text() == "mine"


def test_what_is_no_run(attsvm: Commands, runs: tuple[str, str], tmp_path: Path) -> None:
    attsvm("compare", runs[0], "absent").failed(2, "RUN", "absent", "no folder")
    (attsvm.home / "empty").mkdir()
    attsvm("compare", "empty", runs[0]).failed(2, "RUN", "empty", "result.json")
    other = RunFolder(attsvm.home / "verify")
    other.create()
    other.write_result({"name": "verify"})
    attsvm("compare", runs[0], "verify").failed(2, "RUN", "verify", "inspect")
    (attsvm.home / "verify" / "result.json").write_text("{")
    attsvm("compare", runs[0], "verify").failed(1, "verify/result.json")
    damaged = write_atlas(tmp_path / "damaged")
    (damaged / "arrays.safetensors").write_bytes(b"half")
    attsvm("compare", str(damaged), runs[0]).failed(1, "arrays.safetensors")
    assert not (attsvm.home / "runs").exists(), "nothing is left of what failed"


def test_nothing_in_common(attsvm: Commands, runs: tuple[str, str], tmp_path: Path) -> None:
    other = write_atlas(tmp_path / "pair", stacks=(("cross", 1, 2), ("decoder", 1, 2)))
    attsvm("compare", runs[0], str(other)).failed(2, "heads in common", "cross.L0.H0")


def test_older_record(attsvm: Commands, runs: tuple[str, str], tmp_path: Path) -> None:
    old = write_atlas(tmp_path / "old")
    write_json(old / "result.json", {**read_json(old / "result.json"), "schema_version": 0})
    attsvm("compare", runs[0], str(old)).failed(1, "schema version 0")

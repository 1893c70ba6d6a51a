"""The benchmarks run, at sizes where nothing is to be learned from them, and keep their record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for _name in ("cvxpy", "clarabel", "osqp", "scs", "piqp", "sklearn", "transformers"):
    pytest.importorskip(_name, reason="extra [reference] is not installed")
pytestmark = pytest.mark.reference


def run(root: Path, *arguments: str) -> str:
    """Run ``python -m benchmarks`` and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def record(path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of all rows that need no pretrained model, made in two runs."""
    root, path = Path(__file__).resolve().parents[2], tmp_path_factory.mktemp("benchmarks") / "rows.json"
    run(root, "--quick", "--only", "nuc-*", "batch-*", "growth", "--json", str(path))
    run(root, "--quick", "--only", "fro-*", "descent-*", "attention-*", "models-*", "--json", str(path))
    return path


def test_a_record_keeps_the_rows_of_earlier_runs_in_the_order_of_the_list(quick: Path, root: Path) -> None:
    listed = [line.split()[0] for line in run(root, "--list").splitlines()]
    assert list(record(quick)) == [name for name in listed if not name.startswith(("minilm", "microscope"))]


def test_both_sides_of_a_row_are_accurate(quick: Path) -> None:
    for name, row in record(quick).items():
        assert row["ours"]["gap"] <= 1e-6, name
        done = name.startswith(("descent", "attention", "models"))
        assert row["ours"]["status"] == ("done" if done else "optimal"), name
        if "peer" in row and name != "nuc-tolerance":
            assert not row["peer"]["stopped"], name
            assert row["peer"]["gap"] <= 1e-6, name
        if "peer" in row and not name.startswith(("nuc-tolerance", "batch", "descent", "attention", "models")):
            assert row["peer"]["objective"] == pytest.approx(row["ours"]["objective"], rel=2e-6), name


def test_a_row_is_met_when_all_its_targets_are(quick: Path) -> None:
    for row in record(quick).values():
        for check in row["checks"]:
            reached = check["value"] >= check["at_least"] if "at_least" in check else check["value"] <= check["at_most"]
            assert check["met"] is reached
        assert row["met"] is all(check["met"] for check in row["checks"])
        assert row["conditions"]["quick"] is True


def test_memory_is_that_of_a_child_process(quick: Path) -> None:
    for point in record(quick)["growth"]["points"]:
        memory = point["memory"]
        tokens = point["sizes"]["n"] * point["sizes"]["T"] * point["sizes"]["d"] * 8
        assert memory["tokens_bytes"] == tokens
        assert memory["before_bytes"] + memory["extra_bytes"] <= memory["peak_bytes"]
        assert memory["extra_bytes"] < memory["before_bytes"]


def test_the_table_and_the_figures_come_from_the_record(quick: Path, root: Path, tmp_path: Path) -> None:
    table = run(root, "--markdown", "--json", str(quick)).splitlines()
    assert sum(line.startswith("| ") for line in table) == 1 + len(record(quick))
    assert table[-1].startswith("Measured on ")
    pytest.importorskip("matplotlib", reason="extra [plot] is not installed")
    run(root, "--plots", str(tmp_path / "a"), "--json", str(quick))
    run(root, "--plots", str(tmp_path / "b"), "--json", str(quick))
    for name in ("benchmarks-growth.svg", "benchmarks-ratios.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_table_tells_how_many_threads_there_were(quick: Path, root: Path, tmp_path: Path) -> None:
    assert {row["conditions"]["threads"] for row in record(quick).values()} == {1}
    content = json.loads(quick.read_text(encoding="utf-8"))
    content["rows"][-1]["conditions"]["threads"] = 2
    copy = tmp_path / "rows.json"
    copy.write_text(json.dumps(content), encoding="utf-8")
    *_, one, two = run(root, "--markdown", "--json", str(copy)).splitlines()
    assert ", one thread of " in one
    assert two.startswith(f"{content['rows'][-1]['name']}: measured on ")
    assert ", 2 threads of " in two


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "fro-liblinear", "nothing"], "no row is called nothing"),
        (["--quick"], "--quick needs --json"),
    ],
)
def test_what_cannot_be_run_is_refused(root: Path, arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert message in done.stderr

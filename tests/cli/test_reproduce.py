"""``attsvm reproduce``: what it shows, what it leaves, and what it says when something stands in the way."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cli.commands import Commands
from cli.data import result_at
from cli.toy_recipe import install, install_slow

FINAL = ("trials.jsonl", "result.json", "figure.svg", "figure.png")
RECORDS = {*FINAL, "config.json", "report.html", ".lock"}

NOT_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")


def final(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FINAL}


@pytest.fixture(scope="module")
def finished(shared: Commands) -> Path:
    """The output folder of an uninterrupted run of both toys."""
    done = shared("reproduce", "toy", "toy-scan", "-o", "out", "--workers", "1", before=install)
    assert done.code == 0, done.err
    return shared.home / "out"


# What it shows and leaves.


def test_a_recipe_from_start_to_end(attsvm: Commands) -> None:
    done = attsvm("reproduce", "toy", before=install)
    assert (done.code, done.out) == (0, "")
    out = attsvm.home / "runs" / "reproduce"
    assert {path.name for path in out.iterdir()} == {"toy", "index.html"}
    assert {path.name for path in (out / "toy").iterdir()} == RECORDS
    lines = done.err.splitlines()
    assert "1/1 toy: 20 of 20" in done.err
    assert "toy: The mean is the mean. (20 trials)" in lines
    mean = result_at(out / "toy")["numbers"][0]["ours"]
    row = next(line for line in lines if line.startswith("mean of the values [in brackets]"))
    assert row.split("  ")[-1].strip() == "met"
    assert f"{mean:.6g}" in row
    assert any("a number that cannot be" in line and "≥ 5" in line and line.endswith("differs") for line in lines)
    assert lines[-1] == "Gallery: runs/reproduce/index.html"
    assert all(line == line.rstrip() for line in lines)


def test_help(attsvm: Commands) -> None:
    done = attsvm("reproduce", "--help")
    assert (done.code, done.err) == (0, "")
    words = "NAME --all --list --trials --seed --output-dir -o --overwrite --workers --json --quiet torchrun".split()
    assert [word for word in words if word not in done.out] == []


def test_what_is_finished_is_skipped_and_said(attsvm: Commands) -> None:
    assert attsvm("reproduce", "toy", "-o", "out", before=install).code == 0
    before = {path: path.stat().st_mtime_ns for path in (attsvm.home / "out" / "toy").iterdir() if path.name in FINAL}
    done = attsvm("reproduce", "toy", "toy-scan", "-o", "out", "--json", before=install)
    assert done.code == 0
    assert "as finished before; --overwrite computes it again" in done.err
    assert "1/2 toy" not in done.err, "no progress of what is not computed"
    assert [(one["name"], one["state"]) for one in done.json["recipes"]] == [
        ("toy", "skipped"),
        ("toy-scan", "finished"),
    ]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_json_is_the_records_and_quiet_is_quiet(attsvm: Commands) -> None:
    done = attsvm("reproduce", "toy", "-o", "out", "--json", "--quiet", "--trials", "4", before=install)
    assert (done.code, done.err) == (0, "")
    assert done.json["gallery"] == "out/index.html"
    (one,) = done.json["recipes"]
    assert one.pop("run") == "out/toy"
    assert one.pop("state") == "finished"
    assert one == result_at(attsvm.home / "out" / "toy")
    assert one["counts"]["trials"] == 8


def install_talkative() -> None:
    import dataclasses
    import logging
    from collections.abc import Sequence

    from attsvm.experiments.recipes import Case, Record
    from cli import toy_recipe

    def run(case: Case, seeds: Sequence[int]) -> list[Record]:
        logging.getLogger("attsvm.dynamics").warning("a run stalled")
        return toy_recipe.run(case, seeds)

    install()
    toy_recipe.RECIPES["toy"] = dataclasses.replace(toy_recipe.RECIPES["toy"], run=run)


def test_what_the_library_logs_is_shown_but_not_to_the_quiet(attsvm: Commands) -> None:
    assert "a run stalled" in attsvm("reproduce", "toy", "-o", "out", before=install_talkative).err
    assert attsvm("reproduce", "toy", "-o", "out", "--overwrite", "-q", before=install_talkative).err == ""


def test_trials_and_seed(attsvm: Commands) -> None:
    assert attsvm("reproduce", "toy", "--trials", "2", "--seed", "40", "-o", "out", before=install).code == 0
    lines = (attsvm.home / "out" / "toy" / "trials.jsonl").read_text().splitlines()
    trials = [json.loads(line) for line in lines]
    assert [(one["case"], one["trial"]) for one in trials] == [("a=1", 40), ("a=1", 41), ("a=2", 40), ("a=2", 41)]


@pytest.mark.parametrize("arguments", [(), ("--list",)])
def test_list(attsvm: Commands, finished: Path, arguments: tuple[str, ...]) -> None:
    shutil.copytree(finished, attsvm.home / "out")
    (attsvm.home / "out" / "toy-scan" / "result.json").unlink()
    done = attsvm("reproduce", *arguments, "-o", "out", before=install)
    assert (done.code, done.err) == (0, "")
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[0] == ["name", "title", "arXiv", "cases", "trials", "state"]
    assert [(row[0], row[-1]) for row in rows[1:]] == [
        ("toy", "finished"),
        ("toy-scan", "unfinished"),
        ("toy-fails", "new"),
    ]
    assert rows[1][1:] == ["Uniform", "numbers", "2401.00001", "2", "10", "finished"]
    listed = attsvm("reproduce", "--list", "-o", "out", "--trials", "5", "--json", before=install).json["recipes"]
    assert [row["state"] for row in listed] == ["other settings", "other settings", "new"]
    assert listed[0]["paper"]["title"] == "On numbers"


def test_list_of_some(attsvm: Commands) -> None:
    done = attsvm("reproduce", "toy-*", "--list", before=install)
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == ["toy-scan", "toy-fails"]
    assert list(attsvm.home.iterdir()) == []


def install_with_umlauts() -> None:
    import dataclasses

    from cli import toy_recipe

    install()
    toy_recipe.RECIPES["toy"] = dataclasses.replace(toy_recipe.RECIPES["toy"], title="Gleichmäßig [verteilt]")


def test_a_terminal_without_these_letters_gets_the_list(attsvm: Commands) -> None:
    assert "Gleichmäßig [verteilt]" in attsvm("reproduce", "toy", "--list", before=install_with_umlauts).out
    done = attsvm("reproduce", "toy", "--list", before=install_in_ascii)
    assert done.code == 0, done.err
    assert r"Gleichm\xe4\xdfig [verteilt]" in done.out


def install_in_ascii() -> None:
    import sys

    install_with_umlauts()
    assert hasattr(sys.stdout, "reconfigure")
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


# What may go wrong.


def test_a_failure_is_told_and_the_others_go_on(attsvm: Commands) -> None:
    done = attsvm("reproduce", "--all", "-o", "out", "--json", before=install)
    assert done.code == 1
    said = [line for line in done.err.splitlines() if line.startswith("attsvm: ")]
    assert said == ["attsvm: reproduce: toy-fails, case a=1, seeds 0 to 2: ValueError: the loss diverged at step 3"]
    recipes = done.json["recipes"]
    assert [(one["name"], one["state"]) for one in recipes] == [
        ("toy", "finished"),
        ("toy-scan", "finished"),
        ("toy-fails", "failed"),
    ]
    assert recipes[2]["error"] == said[0].removeprefix("attsvm: ")
    assert (attsvm.home / "out" / "index.html").exists()


def test_one_that_fails(attsvm: Commands) -> None:
    done = attsvm("reproduce", "toy-fails", "-o", "out", "-q", before=install)
    done.failed(1, "toy-fails", "case a=1", "seeds 0 to 2", "the loss diverged at step 3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("toy-scam",), ("'toy-scam'", "did you mean toy-scan?")),
        (("tyo",), ("'tyo'", "did you mean toy?")),
        (("zzz*",), ("'zzz*'", "there are toy, toy-scan, toy-fails")),
        (("toy", "nonsense"), ("'nonsense'",)),
        (("--all", "toy"), ("--all", "'toy'")),
        (("toy", "--trials", "0"), ("--trials", "at least 1", "0")),
        (("--all", "--trials", "-1"), ("--trials", "at least 1", "-1")),
        (("toy", "--seed", "-1"), ("--seed", "-1")),
        (("toy", "--seed", "2147483648"), ("--seed", "2147483647")),
        (("toy", "--workers", "0"), ("--workers", "at least 1", "0")),
        (("--all", "--workers", "0"), ("--workers", "at least 1", "0")),
        (("toy", "-o", "file"), ("file/toy",)),
    ],
)
def test_mistakes(attsvm: Commands, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    (attsvm.home / "file").write_text("")
    code = 1 if "file" in arguments else 2
    attsvm("reproduce", *arguments, "--json", before=install).failed(code, *words)
    assert [path.name for path in attsvm.home.iterdir()] == ["file"]


def test_other_settings(attsvm: Commands, finished: Path) -> None:
    shutil.copytree(finished, attsvm.home / "out")
    attsvm("reproduce", "toy", "--trials", "3", "-o", "out", "-q", before=install).failed(
        2, "out/toy", "--trials 10, not 3", "--overwrite"
    )
    # Of several, all are checked before anything is computed.
    attsvm("reproduce", "--all", "--seed", "3", "-o", "out", "-q", before=install).failed(
        2, "out/toy", "--seed 0, not 3", "--overwrite"
    )
    assert final(attsvm.home / "out" / "toy") == final(finished / "toy")
    assert attsvm("reproduce", "toy", "--trials", "3", "-o", "out", "--overwrite", before=install).code == 0
    assert result_at(attsvm.home / "out" / "toy")["counts"]["trials"] == 6


def test_two_on_one_folder(attsvm: Commands, finished: Path) -> None:
    first = attsvm.start("reproduce", "toy", "-o", "out", before=install_slow)
    first.until(lambda: (attsvm.home / "out" / "toy" / "config.json").exists())
    attsvm("reproduce", "toy", "-o", "out", "-q", before=install).failed(1, "out/toy is in use by another attsvm")
    assert first.wait().code == 0
    assert final(attsvm.home / "out" / "toy") == final(finished / "toy")


@NOT_ROOT
def test_read_only_folder(attsvm: Commands) -> None:
    (attsvm.home / "out").mkdir(mode=0o555)
    attsvm("reproduce", "toy", "-o", "out", "-q", before=install).failed(1, "out/toy", "Permission denied")


def without_matplotlib() -> None:
    import sys
    from typing import cast

    install()
    cast(dict[str, Any], sys.modules)["matplotlib"] = None


def test_without_matplotlib(attsvm: Commands) -> None:
    attsvm("reproduce", "--all", "-o", "out", "-q", before=without_matplotlib).failed(3, "matplotlib", "attsvm[plot]")
    assert not (attsvm.home / "out").exists()


def fill_at(name: str) -> None:
    """Let writing to the disk fail with ENOSPC once a file of this name is written."""
    import errno

    install()
    fsync = os.fsync

    def full(handle: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    os.fsync = full


@pytest.mark.parametrize(
    "file", ["config.json", "trials-0.jsonl", ".trials.jsonl", "figure.png", "result.json", "index.html"]
)
def test_no_space_on_the_disk(attsvm: Commands, finished: Path, file: str) -> None:
    fill = functools.partial(fill_at, file)
    attsvm("reproduce", "toy", "-o", "out", "-q", before=fill).failed(
        1, file.removeprefix("."), "No space left on device"
    )
    assert not list((attsvm.home / "out").rglob("*.part"))
    done = attsvm("reproduce", "toy", "-o", "out", before=install)
    assert done.code == 0, "with space again the same command goes on"
    assert final(attsvm.home / "out" / "toy") == final(finished / "toy")
    assert {path.name for path in (attsvm.home / "out" / "toy").iterdir()} == RECORDS

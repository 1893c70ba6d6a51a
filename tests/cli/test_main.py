"""What holds for every command: help, version, usage errors, and what a fresh interpreter does."""

from __future__ import annotations

import re
from importlib import metadata

import pytest

from cli.commands import SMALL, Commands
from cli.data import assert_same_run


def plain(text: str) -> str:
    """Help without the frames that rich draws, as one line."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ["verify", "solve", "report", "--version"]),
        (("verify",), ["--text-column", "--label-column", "--parameterization", "--n-sequences", "-n", "--json", "-o"]),
        (("solve",), ["FILE", "--norm", "--penalty", "--max-seconds", "--max-bytes", "--resume", "--json", "-o"]),
        (("report",), ["RUN", "--json", "--quiet"]),
    ],
)
def test_help(attsvm: Commands, command: tuple[str, ...], words: list[str], flag: str) -> None:
    done = attsvm(*command, flag)
    assert (done.code, done.err) == (0, "")
    assert [word for word in words if word not in plain(done.out)] == []


def test_without_a_command_the_help_is_shown(attsvm: Commands) -> None:
    done = attsvm()
    assert done.code == 2
    assert "Usage: attsvm" in plain(done.out + done.err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), ["No such command", "nonsense"]),
        (("verify", "--nonsense"), ["No such option", "--nonsense"]),
        (("verify", "--steps", "many"), ["--steps", "integer"]),
        (("verify", "--learning-rate", "fast"), ["--learning-rate", "number"]),
        (("verify", "--parameterization", "Q"), ["--parameterization", "W", "KQ", "both"]),
        (("verify", "--loss", "hinge"), ["--loss", "logistic", "exponential", "correlation"]),
        (("verify", "--optimizer", "adagrad"), ["--optimizer", "ngd"]),
        (("verify", "--head", "forest"), ["--head", "ridge"]),
        (("verify", "--dtype", "int8"), ["--dtype", "float32"]),
        (("verify", "a.csv", "b.csv"), ["b.csv"]),
        (("solve",), ["FILE"]),
        (("solve", "a.npz", "--penalty", "high"), ["--penalty", "number"]),
        (("solve", "a.npz", "--method", "magic"), ["--method", "coordinate", "primal-dual"]),
        (("report",), ["RUN"]),
    ],
)
def test_usage_errors_name_the_argument(attsvm: Commands, arguments: tuple[str, ...], words: list[str]) -> None:
    done = attsvm(*arguments)
    assert (done.code, done.out) == (2, "")
    assert [word for word in words if word not in plain(done.err)] == []
    assert list(attsvm.home.iterdir()) == []


def test_version_from_a_fresh_interpreter(attsvm: Commands) -> None:
    done = attsvm.fresh("--version")
    assert (done.code, done.out, done.err) == (0, f"attsvm {metadata.version('attsvm')}\n", "")


def test_a_run_from_a_fresh_interpreter_is_the_same_run(attsvm: Commands) -> None:
    done = attsvm.fresh("verify", *SMALL, "-o", "fresh", "--json", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert done.json["run"] == "fresh"
    assert attsvm("verify", *SMALL, "-o", "forked", "--quiet").code == 0
    assert_same_run(attsvm.home / "fresh", attsvm.home / "forked")


def test_a_mistake_in_a_fresh_interpreter(attsvm: Commands) -> None:
    attsvm.fresh("verify", "missing.csv", "--json").failed(2, "missing.csv", "does not exist")


def test_a_terminal_without_unicode_gets_json(attsvm: Commands) -> None:
    """An early version died of UnicodeEncodeError where stdout takes ASCII only."""
    rows = "".join(f"{text},{label}\n" for text, label in (("großartig, 好", 1), ("schlecht, 坏", 0)))
    (attsvm.home / "data.csv").write_text("text;label\n" + rows.replace(", ", " ").replace(",", ";"), encoding="utf-8")
    done = attsvm.fresh("verify", "data.csv", *SMALL, "--json", "-q", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.code == 0
    assert [one["text"] for one in done.json["sequences"]] == ["großartig 好", "schlecht 坏"]

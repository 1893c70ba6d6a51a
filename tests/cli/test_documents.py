"""The documents describe the command line and its records as they are: every option, default, key and array."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from safetensors.numpy import load_file
from typer.main import get_command

from attsvm.cli.main import app
from cli.commands import Commands
from cli.data import arrays_at, result_at, write_csv
from cli.problems import write_problem

DOCS = Path(__file__).resolve().parents[2] / "docs"


def code_in(text: str) -> set[str]:
    """What stands between back quotes."""
    return set(re.findall(r"`([^`\n]+)`", text))


def test_options_and_defaults_of_the_quickstart() -> None:
    text = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    command = get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    parameters = [one for one in command.commands["verify"].params if one.param_type_name == "option"]
    flags = {flag: one.default for one in parameters for flag in one.opts}
    written: dict[str, str] = {}
    for names, defaults in re.findall(r"^\| (`-[^|]*`) \|([^|]*)\|", text, re.MULTILINE):
        named = re.findall(r"`([^`]+)`", names)
        values = defaults.strip().split(", ")
        long = [name for name in named if name.startswith("--")]
        same = len(values) != len(long)
        written |= {name: values[0 if same else long.index(name)] if name in long else "" for name in named}
    assert written.keys() == flags.keys() - {"--text-column", "--label-column", "--help", "-h"}
    for flag, value in written.items():
        if flag.startswith("--") and flag != "--lr" and flags[flag] not in (None, False):
            assert value.strip("`") == str(flags[flag]), flag


def test_options_that_the_documents_name_exist(attsvm: Commands) -> None:
    help_texts = "".join(attsvm(command, "--help").out for command in ("verify", "solve", "report"))
    known = set(re.findall(r"--?[a-z][a-z-]*", help_texts))
    for path in (DOCS / "quickstart.md", DOCS / "file-formats.md", DOCS.parent / "README.md"):
        named = {code for code in code_in(path.read_text(encoding="utf-8")) if re.fullmatch(r"--?[a-z][a-z-]*", code)}
        assert named - known == set(), path.name


def keys_of(text: str, section: str) -> set[str]:
    """Names in back quotes of a section of file-formats.md, up to the next heading."""
    body = text.split(f"### {section}\n")[1].split("\n#")[0]
    return code_in(body)


@pytest.mark.parametrize("feasible", [True, False])
def test_every_key_and_array_is_described(attsvm: Commands, feasible: bool) -> None:
    text = (DOCS / "file-formats.md").read_text(encoding="utf-8")
    rows = [("a good film", 1), ("a bad film", 0)] if feasible else [("good bad", 1), ("bad good", 0)]
    write_csv(attsvm.home / "data.csv", rows)
    assert attsvm("verify", "data.csv", "--model", "none", "--steps", "30", "-o", "run").code == 0
    result = result_at(attsvm.home / "run")
    described = keys_of(text, "result.json")
    one = result["parameterizations"]["KQ"]
    keys = {*result, *result["data"], *result["seconds"], *result["sequences"][0], *one, *one["selected"][0]}
    assert {key for key in keys if not key.endswith("_curve")} - described == set()
    assert {key.removesuffix("_curve") for key in one if key.endswith("_curve")} <= described
    arrays = {re.sub(r"^(W|KQ)\.", "P.", name) for name in arrays_at(attsvm.home / "run")}
    assert arrays - keys_of(text, "arrays.safetensors") == set()
    if feasible:
        written = {code for code in keys_of(text, "arrays.safetensors") if code.startswith("P.")}
        assert written - arrays == {"P.ray"}
    rows_described = keys_of(text, "metrics.jsonl")
    first = (attsvm.home / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert set(re.findall(r'"(\w+)":', first)) <= rows_described


@pytest.mark.parametrize("feasible", [True, False])
def test_every_key_and_array_of_a_solution_is_described(attsvm: Commands, feasible: bool) -> None:
    text = (DOCS / "file-formats.md").read_text(encoding="utf-8")
    write_problem(attsvm.home / "problem.npz", guilty=None if feasible else 2)
    assert attsvm("solve", "problem.npz", "-o", "run").code == (0 if feasible else 3)
    result = result_at(attsvm.home / "run")
    assert {*result, *result["seconds"]} - keys_of(text, "solve: result.json") == set()
    arrays = set(load_file(attsvm.home / "run" / "solution.safetensors"))
    described = keys_of(text, "solve: solution.safetensors")
    assert arrays - described == set()
    assert feasible or {"ray", "equality_ray"} <= arrays
    first = (attsvm.home / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert set(re.findall(r'"(\w+)":', first)) <= keys_of(text, "solve: metrics.jsonl")


def test_documented_solve_commands_run(attsvm: Commands) -> None:
    text = (DOCS / "file-formats.md").read_text(encoding="utf-8")
    written = re.findall(r"^attsvm (solve .*)$", text, re.MULTILINE)
    assert len(written) == 3
    write_problem(attsvm.home / "problem.npz")
    assert [attsvm(*command.split(), "-q").code for command in written] == [0, 0, 0]


def test_every_key_of_a_problem_file_is_described() -> None:
    from attsvm.data.problems import _KEYS

    text = (DOCS / "file-formats.md").read_text(encoding="utf-8")
    described = keys_of(text, "Problems")
    assert {key for keys in _KEYS.values() for key in keys} - described == set()

"""docs/reproduce.md describes the command as it is: every option, every command, every key; and the recipes load."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from attsvm.cli.main import app
from attsvm.experiments.recipes import NAMES, find_recipe
from attsvm.experiments.trial_plan import Plan
from cli.commands import Commands
from cli.data import result_at
from cli.test_documents import code_in, keys_of
from cli.toy_recipe import install

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "reproduce.md").read_text(encoding="utf-8")


def test_options_and_defaults() -> None:
    command = get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    options = [one for one in command.commands["reproduce"].params if one.param_type_name == "option"]
    rows = re.findall(r"^\| (`-[^|]*`) \|([^|]*)\|", TEXT, re.MULTILINE)
    written = {flag: default.strip() for names, default in rows for flag in re.findall(r"`([^`]+)`", names)}
    assert written.keys() == {flag for one in options for flag in one.opts}
    for one in options:
        if one.default not in (None, False):
            assert written[one.opts[0]] == f"`{one.default}`"


def install_under_published_names() -> None:
    """Trials that take no time, under the names of the figures."""
    from attsvm.cli import reproduce
    from cli import toy_recipe

    reproduce.find_recipe = lambda name: toy_recipe.recipe(name=name)


def test_documented_commands_run(attsvm: Commands) -> None:
    written = re.findall(r"^attsvm (reproduce.*)$", TEXT, re.MULTILINE)
    assert len(written) == 4
    made = []
    for command in written:
        done = attsvm(*shlex.split(command), "-o", f"out-{len(made)}", before=install_under_published_names)
        assert done.code == 0, done.err
        out = attsvm.home / f"out-{len(made)}"
        made.append({path.name for path in out.iterdir() if path.is_dir()} if out.exists() else set())
    assert made[:2] == [set(), {"tfsvm-fig5"}]
    assert made[2] == {"maxmargin-single", "maxmargin-multi", "maxmargin-loss", "maxmargin-joint"}
    assert made[3] == set(NAMES)


def test_every_key_is_described(attsvm: Commands) -> None:
    assert attsvm("reproduce", "toy", "-o", "out", "-q", before=install).code == 0
    result = result_at(attsvm.home / "out" / "toy")
    first = (result["cases"][0], result["numbers"][0], result["tables"][0])
    keys = {*result, *result["paper"], *result["settings"], *result["counts"], *(key for one in first for key in one)}
    assert keys - keys_of(TEXT, "result.json") == set()
    files = {path.name for path in (attsvm.home / "out" / "toy").iterdir()} - {".lock"}
    assert files <= code_in(TEXT)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_what_its_name_says(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.name == name
    assert len({case.name for case in recipe.cases}) == len(recipe.cases) > 0
    assert all((recipe.title, recipe.about, recipe.paper.title))
    assert Plan.checked(recipe).total > 0
    assert Plan.checked(recipe).settings["recipe"] == name

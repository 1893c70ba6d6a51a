"""The pages of ``attsvm reproduce``: one for each recipe, and an index that shows them all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from attsvm.records import RunFolder, write_bytes
from attsvm.report.gallery_build import (
    TRIALS_FILE,
    Card,
    RecipePage,
    holds_recipe,
    read_cards,
    read_recipe_page,
    recipe_folders,
    shown_cell,
)
from attsvm.report.gallery_schema import Cell
from attsvm.report.render import bundle, bundle_script, embed_json, environment, policy

__all__ = ["INDEX", "is_gallery", "is_recipe", "render_gallery", "render_recipe"]

INDEX = "index.html"

_SCRIPTS = ("core.js", "shell.js", "gallery.js")
_STYLES = ("page.css", "controls.css", "tables.css", "gallery.css", "print.css")


def is_recipe(path: Path | str) -> bool:
    """True for the folder of one recipe, finished or not, damaged or not."""
    return Path(path).is_dir() and holds_recipe(Path(path))


def is_gallery(path: Path | str) -> bool:
    """True for a folder that holds folders of recipes."""
    return Path(path).is_dir() and bool(recipe_folders(Path(path)))


def render_gallery(output_dir: Path | str, order: Sequence[str] = ()) -> Path:
    """Write ``report.html`` of every finished recipe and ``index.html``, which shows them all.

    The pages hold their data, styles and scripts, and open without a server or a network. A recipe that is not
    finished, or whose records are damaged, is shown as such. The same records always give the same bytes.

    Parameters
    ----------
    output_dir
        The folder that holds a folder for each recipe.
    order
        Names in the order of the gallery. Others follow, the oldest paper first.

    Returns
    -------
    Path
        The index.

    Raises
    ------
    RecordError
        If the folder cannot be read or a page cannot be written.
    """
    folder, templates = Path(output_dir), _templates()
    cards = read_cards(folder, order)
    for card in cards:
        if card.state == "finished":
            _write_recipe(templates, folder / card.folder)
    text = _finished(templates, "gallery.html.j2", {"name": "reproduce"}, **_index(cards))
    write_bytes(folder / INDEX, text.encode("utf-8", errors="backslashreplace"))
    return folder / INDEX


def render_recipe(path: Path | str) -> Path:
    """Write ``report.html`` of one finished recipe.

    Raises
    ------
    RecordError
        If the recipe is not finished, a record is damaged, or the page cannot be written.
    """
    return _write_recipe(_templates(), Path(path))


def _write_recipe(templates: Environment, path: Path) -> Path:
    target = RunFolder(path).report_file
    page = read_recipe_page(path)
    text = _finished(templates, "gallery_recipe.html.j2", _payload(page), page=page, files=_files(target.parent))
    write_bytes(target, text.encode("utf-8", errors="backslashreplace"))
    return target


def _files(folder: Path) -> dict[str, Any]:
    """Files that a page may link to."""
    figures = [name for name in ("figure.svg", "figure.png") if (folder / name).is_file()]
    return {"figures": figures, "trials": (folder / TRIALS_FILE).is_file()}


def _payload(page: RecipePage) -> dict[str, Any]:
    """What the scripts need."""
    trials = page.trials
    table = None if trials.rows is None else {"columns": trials.columns, "rows": trials.rows}
    return {"name": page.result.name, "trials": table}


def _index(cards: list[Card]) -> dict[str, Any]:
    verdicts = sum((card.verdicts for card in cards), Counter[str]())
    return {
        "cards": cards,
        "states": Counter(card.state for card in cards),
        "verdicts": verdicts,
        "total": verdicts.total(),
        "groups": [(card.folder, card.name, card.numbers) for card in cards],
    }


def _finished(templates: Environment, name: str, data: dict[str, Any], **content: Any) -> str:
    script, style = bundle_script(_SCRIPTS), bundle(_STYLES)
    return templates.get_template(name).render(
        **content,
        data=embed_json(data),
        script=Markup(script),
        style=Markup(style),
        policy=policy(script, style),
    )


def _templates() -> Environment:
    made = environment()
    made.filters |= {"exact": _exact, "cell": shown_cell, "are_numbers": _are_numbers, "is_arxiv": _is_arxiv}
    return made


def _exact(value: float | None) -> str:
    """All digits, for sorting and for the CSV file; empty for none."""
    return "" if value is None else repr(value)


def _are_numbers(rows: Sequence[Sequence[Cell]], column: int) -> bool:
    """True for a column to be aligned to the right: numbers, and gaps."""
    cells = [row[column] for row in rows if row[column] is not None]
    return bool(cells) and all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells)


def _is_arxiv(text: str) -> bool:
    return re.fullmatch(r"\d{4}\.\d{4,5}(v\d+)?", text) is not None

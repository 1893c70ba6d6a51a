"""From the content of the page to one HTML file that needs no network."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from attsvm.records import RunFolder, write_bytes
from attsvm.report.build import read_page
from attsvm.report.charts import charts
from attsvm.report.page import Page
from attsvm.report.text import integer, norm_name, number, percent, shorten, telling_digits

__all__ = ["bundle", "bundle_script", "embed_json", "environment", "policy", "render_html", "render_run"]

_SCRIPTS = ("core.js", "shell.js", "charts.js", "tooltip.js", "sentences.js", "main.js")
_STYLES = ("page.css", "charts.css", "controls.css", "tables.css", "sentences.css", "print.css")

_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def render_run(path: Path | str) -> Path:
    """Write ``report.html`` of a finished ``verify`` run.

    The page holds its data, styles and scripts, and opens without a server or a network. The file is replaced in
    one step. The same records always give the same bytes.

    Parameters
    ----------
    path
        The run folder; it must hold ``result.json`` and ``arrays.safetensors``.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    RecordError
        If a record is missing, damaged or of another kind, or the page cannot be written.
    """
    target = RunFolder(path).report_file
    # A lone surrogate would have been made visible on reading; the handler only keeps a page from being lost.
    write_bytes(target, render_html(read_page(path)).encode("utf-8", errors="backslashreplace"))
    return target


def render_html(page: Page) -> str:
    """Return the page as text."""
    script, style = bundle_script(_SCRIPTS), bundle(_STYLES)
    shown = charts(page)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            charts=shown,
            data=embed_json(_payload(page, shown)),
            script=Markup(script),
            style=Markup(style),
            policy=policy(script, style),
        )
    )


def embed_json(value: Any) -> Markup:
    r"""Write JSON that is safe inside a script element: no character of it can end the element.

    Examples
    --------
    >>> print(embed_json(["</script>"]))
    ["\u003c/script\u003e"]
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(_ESCAPES))


def _payload(page: Page, shown: list[Any]) -> dict[str, Any]:
    """Return what the scripts need; field names are those of the records."""
    return {
        "name": page.name,
        "charts": [dataclasses.asdict(chart) for chart in shown],
        "sentences": [vars(sentence) for sentence in page.sentences],
        "parameterizations": [
            {
                "key": one.key,
                "symbol": one.symbol,
                "norm": one.norm_name,
                "proof": one.ray_sequences,
                "values": [vars(values) for values in one.values],
            }
            for one in page.parameterizations
        ],
    }


def bundle(names: Sequence[str]) -> str:
    """Join files of ``assets``."""
    assets = resources.files("attsvm.report") / "assets"
    return "".join((assets / name).read_text(encoding="utf-8") for name in names)


def bundle_script(names: Sequence[str]) -> str:
    """Join scripts of ``assets`` so that none of their names is global."""
    return "(() => {\n'use strict';\n" + bundle(names) + "})();\n"


def policy(script: str, style: str) -> str:
    """Allow the two blocks of this page by their hash, and nothing else: no request, no inline handler."""

    def source(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; script-src {source(script)}; style-src {source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def environment() -> Environment:
    """Templates that escape everything and refuse unknown names, with the filters of the page."""
    made = Environment(
        loader=PackageLoader("attsvm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": number,
        "percent": percent,
        "integer": integer,
        "shorten": shorten,
        "headline": _headline,
        "telling_digits": telling_digits,
        "norm_name": norm_name,
    }
    return made


def _headline(verdict: str | None) -> tuple[str, str]:
    """Split the verdict into its first sentence, which becomes the title, and the rest."""
    if not verdict:
        return "This run recorded no verdict.", ""
    first, *rest = re.split(r"(?<=[.!?])\s+", verdict.strip(), maxsplit=1)
    return first, rest[0] if rest else ""

"""Configuration of the documentation: Sphinx, furo, MyST."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]

project = "attsvm"
author = "attsvm developers"
copyright = "attsvm developers"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
version = release

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_math_renderer = "mathml"
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"attsvm {release}"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

# Notebooks are kept without outputs and run anew by every build; one that fails fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True}
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def _markup(text: str) -> str:
    """Docstrings write formulas between dollars and norms between bars; reStructuredText wants roles."""
    pieces = re.split(r"(``.*?``)", text)
    for index in range(0, len(pieces), 2):
        formulas = re.split(r"\$([^$]+)\$", pieces[index])
        for place, part in enumerate(formulas):
            formulas[place] = f":math:`{part.strip()}`" if place % 2 else part.replace("|", r"\|")
        pieces[index] = "".join(formulas)
    return "".join(pieces)


def _formulas(text: str) -> str:
    """Turn ``$$ ... $$`` into a math directive and the rest into roles; doctests stay as they are."""
    pieces = re.split(r"\$\$(.+?)\$\$", text, flags=re.DOTALL)
    for index, piece in enumerate(pieces):
        if index % 2:
            body = " ".join(piece.split())
            pieces[index] = f"\n\n.. math::\n\n   {body}\n\n"
        else:
            blocks = re.split(r"(^[ \t]*>>>.*?(?:\n[ \t]*\n|\Z))", piece, flags=re.DOTALL | re.MULTILINE)
            pieces[index] = "".join(block if place % 2 else _markup(block) for place, block in enumerate(blocks))
    return "".join(pieces)


def _rewrite(app, what, name, obj, options, lines) -> None:  # type: ignore[no-untyped-def]
    lines[:] = _formulas("\n".join(lines)).splitlines()


def _mathml(node, display: str) -> str:  # type: ignore[no-untyped-def]
    """Formulas are part of the page: no script, no network."""
    text = convert(node.astext(), display=display)
    if unknown := re.findall(r">\\(\w+)<", text):
        logging.getLogger(__name__).warning("unknown command in a formula: %s", unknown, location=node)
    return text


def _inline(translator, node) -> None:  # type: ignore[no-untyped-def]
    translator.body.append(_mathml(node, "inline"))
    raise SkipNode


def _block(translator, node) -> None:  # type: ignore[no-untyped-def]
    translator.body.append(
        f'<div class="math" style="overflow: auto hidden; padding: 0.3em 0">{_mathml(node, "block")}</div>'
    )
    raise SkipNode


def setup(app) -> None:  # type: ignore[no-untyped-def]
    """Docstrings are rewritten before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", _rewrite, priority=100)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))

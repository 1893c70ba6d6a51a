"""The page of ``attsvm serve``: the atlas of the text that somebody types, drawn anew with every answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from attsvm.report.atlas_build import Atlas, pack
from attsvm.report.atlas_page import blobs, check_fact, check_sentence, model_name, payload
from attsvm.report.atlas_render import ATLAS_SCRIPTS, ATLAS_STYLES
from attsvm.report.atlas_schema import AtlasResult
from attsvm.report.render import bundle, bundle_script, embed_json, environment, policy
from attsvm.report.text import visible_tree

__all__ = ["LivePage", "live_answer", "live_page"]

Arrays = Mapping[str, np.ndarray[Any, Any]]

_SCRIPTS = (*ATLAS_SCRIPTS, "live.js")
_STYLES = (*ATLAS_STYLES, "live.css")


@dataclass(frozen=True, kw_only=True)
class LivePage:
    """The page and what it is served with.

    Attributes
    ----------
    content
        The HTML file.
    policy
        Its content-security policy: its own script, its own style, and requests to where it is from.
    """

    content: bytes
    policy: str


def live_answer(record: Mapping[str, Any], arrays: Arrays) -> dict[str, Any]:
    """Return what the page needs of one text, in the form in which pages of ``attsvm inspect`` hold it.

    Parameters
    ----------
    record
        As ``result.json``.
    arrays
        As ``arrays.safetensors``.

    Returns
    -------
    dict
        ``atlas`` with ``meta`` and ``heads``, and the packed ``patterns``.
    """
    atlas = _read(record, arrays)
    return {"atlas": payload([atlas.result], [1])["atlases"][0], "patterns": blobs([atlas], pack([atlas]))[0]}


def live_page(record: Mapping[str, Any], arrays: Arrays, *, max_tokens: int, has_target: bool) -> LivePage:
    """Return the page that begins with one text.

    Parameters
    ----------
    record, arrays
        Of that text.
    max_tokens
        Tokens that a text may have.
    has_target
        Whether there is a second text, for the decoder.
    """
    atlas = _read(record, arrays)
    script, style = bundle_script(_SCRIPTS), bundle(_STYLES)
    rules = f"{policy(script, style)}; connect-src 'self'"
    made = environment()
    made.filters |= {"check": check_sentence, "check_short": check_fact, "model_name": model_name}
    text = made.get_template("live.html.j2").render(
        result=atlas.result,
        text=str(record["shown"][0]["text"]),
        max_tokens=max_tokens,
        has_target=has_target,
        data=embed_json(payload([atlas.result], [1])),
        patterns=embed_json(blobs([atlas], pack([atlas]))),
        script=Markup(script),
        style=Markup(style),
        policy=rules,
    )
    return LivePage(content=text.encode("utf-8", errors="backslashreplace"), policy=rules)


def _read(record: Mapping[str, Any], arrays: Arrays) -> Atlas:
    """The same way as from a run folder, without the folder."""
    result = AtlasResult.model_validate(visible_tree(dict(record)))
    return Atlas(path=Path(result.name), result=result, arrays=arrays)

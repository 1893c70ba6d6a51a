"""A figure of a run, made safe to stand inside a page.

An SVG is a document of its own: it may hold scripts, styles, links and references to other files. Only shapes, text
and embedded images pass, and only attributes that are known here. Styles become attributes, which the page's policy
allows, and which the style sheet of the page may overrule in its dark theme.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from markupsafe import Markup, escape

from attsvm.errors import RecordError
from attsvm.report.text import visible

__all__ = ["Picture", "png_data", "read_picture", "safe_svg"]

MAX_BYTES = 8_000_000
"""Larger figures are not put into the page."""

MAX_DEPTH = 60

_SHAPES = {"path", "rect", "circle", "ellipse", "line", "polyline", "polygon"}
_GROUPS = {"svg", "g", "defs", "clipPath", "pattern", "use", "image"}
_WITH_TEXT = {"text", "tspan", "title", "desc"}
_ELEMENTS = _SHAPES | _GROUPS | _WITH_TEXT

_PROPERTIES = {
    *("fill", "fill-opacity", "fill-rule", "opacity", "clip-path", "clip-rule", "image-rendering"),
    *("stroke", "stroke-width", "stroke-opacity", "stroke-linecap", "stroke-linejoin", "stroke-miterlimit"),
    *("stroke-dasharray", "stroke-dashoffset", "font-size", "font-family", "font-weight", "font-style", "text-anchor"),
}
_ATTRIBUTES = _PROPERTIES | {
    *("d", "points", "transform", "viewBox", "preserveAspectRatio", "patternUnits", "clipPathUnits"),
    *("x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "rx", "ry", "width", "height"),
}

# No colon, slash or quote: nothing that passes can name another file.
_PLAIN = re.compile(r"[-+\w\s.,#%()]*")
_LOCAL_URL = re.compile(r"url\(#([\w.-]+)\)")
_LOCAL_LINK = re.compile(r"#([\w.-]+)")
_IMAGE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=\s]+")
_PNG = b"\x89PNG\r\n\x1a\n"
_POINT = 4 / 3
"""Pixels of CSS in a point."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure for the page: markup of an SVG, or an image as a data URI, with its size in pixels."""

    svg: Markup | None = None
    image: str | None = None
    width: int = 0
    height: int = 0


def read_picture(folder: Path) -> Picture | None:
    """``figure.svg`` of a folder, or ``figure.png`` where the SVG is missing, too large or damaged.

    Returns
    -------
    Picture or None
        None where neither can be shown.
    """
    try:
        return safe_svg(_content(folder / "figure.svg"))
    except RecordError:
        return png_data(folder / "figure.png")


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecordError(f"{path} is larger than {MAX_BYTES:,} bytes.")
        return path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path} could not be read: {error.strerror or error}.") from error


def png_data(path: Path) -> Picture | None:
    """Return a PNG file as a data URI; None where it is missing, too large or no PNG."""
    try:
        content = _content(path)
    except RecordError:
        return None
    if not content.startswith(_PNG) or content[12:16] != b"IHDR" or len(content) < 24:
        return None
    width, height = struct.unpack(">II", content[16:24])
    return Picture(image="data:image/png;base64," + base64.b64encode(content).decode(), width=width, height=height)


def safe_svg(content: bytes, prefix: str = "figure-") -> Picture:
    """Return an SVG as markup that can only draw.

    Parameters
    ----------
    content
        The file.
    prefix
        Put before every id, so that none is also an id of the page.

    Raises
    ------
    RecordError
        If it is not an SVG, or declares entities.
    """
    try:
        text = content.decode("utf-8")
        # The entities of a document may grow without bound, or stand for other files.
        if "<!ENTITY" in text:
            raise RecordError("figure.svg declares entities.")
        root = ElementTree.fromstring(text)
    except (UnicodeDecodeError, ElementTree.ParseError) as error:
        raise RecordError(f"figure.svg is not an SVG file: {error}.") from error
    box = re.split(r"[\s,]+", root.get("viewBox", "").strip())
    if _name(root) != "svg" or len(box) != 4 or not all(re.fullmatch(r"-?\d+(\.\d+)?", part) for part in box):
        raise RecordError("figure.svg is not an SVG file with a viewBox.")
    drawable = {one.get("id", "") for one in root.iter() if _name(one) in _SHAPES}
    inner = "".join(part for child in root for part in _written(child, prefix, drawable, 0))
    width, height = (max(1, round(float(part) * _POINT)) for part in box[2:])
    shape = f'viewBox="{escape(" ".join(box))}" width="{width}" height="{height}" stroke-linejoin="round"'
    return Picture(svg=Markup(f"<svg {shape}>{inner}</svg>"), width=width, height=height)


def _name(element: Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _written(element: Element, prefix: str, drawable: set[str], depth: int) -> Iterator[str]:
    """Write an element and what is in it; an unknown one is left out with all its content."""
    name = _name(element)
    if name not in _ELEMENTS or depth > MAX_DEPTH:
        return
    attributes = _attributes(element, prefix)
    if name == "use":
        # A use of a use of a use … would draw without end: only a shape may be used.
        target = _LOCAL_LINK.fullmatch(_link(element))
        if target is None or target[1] not in drawable:
            return
        attributes["href"] = f"#{prefix}{target[1]}"
    if name == "image":
        if not _IMAGE.fullmatch(_link(element)):
            return
        attributes["href"] = _link(element)
    yield f"<{name}" + "".join(f' {key}="{escape(value)}"' for key, value in attributes.items())
    inside = str(escape(visible(element.text))) if name in _WITH_TEXT and element.text else ""
    inside += "".join(part for child in element for part in _written(child, prefix, drawable, depth + 1))
    yield f">{inside}</{name}>" if inside else "/>"


def _link(element: Element) -> str:
    return element.get("{http://www.w3.org/1999/xlink}href") or element.get("href") or ""


def _attributes(element: Element, prefix: str) -> dict[str, str]:
    given = {key: value for key, value in element.attrib.items() if key in _ATTRIBUTES}
    for declaration in element.get("style", "").split(";"):
        key, _, value = declaration.partition(":")
        if key.strip() in _PROPERTIES:
            given[key.strip()] = value.strip()
    kept = {}
    if _PLAIN.fullmatch(element.get("id", "")) and element.get("id"):
        kept["id"] = prefix + element.get("id", "")
    for key, value in given.items():
        local = _LOCAL_URL.fullmatch(value)
        if local:
            kept[key] = f"url(#{prefix}{local[1]})"
        elif "url" not in value.lower() and _PLAIN.fullmatch(value):
            # Line ends inside a path are only there for people.
            kept[key] = " ".join(value.split())
    return kept

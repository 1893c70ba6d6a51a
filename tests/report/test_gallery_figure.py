"""What of an SVG may stand in a page: shapes and images that hold their own data, and nothing that acts or loads."""

from __future__ import annotations

import base64
import re
from xml.etree import ElementTree

import pytest

from attsvm.errors import RecordError
from attsvm.report.gallery_figure import MAX_DEPTH, safe_svg

XLINK = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


def svg(inside: str, attributes: str = "", before: str = "") -> bytes:
    root = f'<svg xmlns="http://www.w3.org/2000/svg" {XLINK} viewBox="0 0 90 60" {attributes}>'
    return f"{before}{root}{inside}</svg>".encode()


def cleaned(inside: str, attributes: str = "", before: str = "") -> str:
    return str(safe_svg(svg(inside, attributes, before)).svg)


def test_shapes_pass_with_their_size() -> None:
    picture = safe_svg(svg('<g id="a"><path d="M 0 0 \n L 1 1" style="stroke: #0067a8; stroke-width: 2"/></g>'))
    assert (picture.width, picture.height) == (120, 80)
    assert picture.svg == (
        '<svg viewBox="0 0 90 60" width="120" height="80" stroke-linejoin="round">'
        '<g id="figure-a"><path d="M 0 0 L 1 1" stroke="#0067a8" stroke-width="2"/></g></svg>'
    )


@pytest.mark.parametrize(
    "inside",
    [
        "<script>alert(1)</script>",
        '<g onclick="alert(1)" onload="alert(2)"/>',
        '<a xlink:href="https://example.org"><path d="M 0 0"/></a>',
        '<foreignObject><b xmlns="http://www.w3.org/1999/xhtml"><img src="x" onerror="alert(1)"/></b></foreignObject>',
        "<style>* { background: url(https://example.org) }</style>",
        '<image xlink:href="https://example.org/a.png" width="1" height="1"/>',
        '<image href="file:///etc/passwd"/>',
        '<image xlink:href="data:image/svg+xml;base64,AAAA"/>',
        '<image xlink:href="data:image/png;base64,AA&quot; onload=&quot;alert(1)"/>',
        '<use xlink:href="https://example.org/a.svg#b"/>',
        '<path d="M 0 0" style="fill: url(https://example.org/#a)"/>',
        '<path d="M 0 0" fill="URL(//example.org#a)"/>',
        '<path d="M 0 0" fill="url(other.svg#a)"/>',
        '<path d="M 0 0" style="stroke: url(other.svg)"/>',
        '<path d="M 0 0" style="fill: url( &quot;https://example.org&quot; )"/>',
        '<path d="M 0 0" style="background: url(https://example.org)"/>',
        '<path d="M 0 0" clip-path="url(https://example.org#a)"/>',
        '<path d="javascript:alert(1)"/>',
        '<animate attributeName="href" to="javascript:alert(1)"/>',
        '<set attributeName="onload" to="alert(1)"/>',
        '<path d="M 0 0" id="a&quot; onload=&quot;alert(1)"/>',
        '<iframe xmlns="http://www.w3.org/1999/xhtml" src="https://example.org"/>',
        "<?xml-stylesheet href='https://example.org'?>",
        "<!-- --><title>&lt;script&gt;alert(1)&lt;/script&gt;</title>",
    ],
)
def test_nothing_acts_and_nothing_loads(inside: str) -> None:
    text = cleaned(inside)
    ElementTree.fromstring(text)
    assert not re.search(r"<(?!/?(svg|g|path|title|use|image)\b)", text)
    tags = "".join(re.findall(r"<[^>]*>", text))
    assert not re.search(r"example|passwd|alert|javascript|\son\w+=|href=|url\(|AAAA", tags)


def test_text_is_escaped_and_visible() -> None:
    assert "<text>a&lt;b\u27e8U+202E\u27e9</text>" in cleaned("<text>a&lt;b\u202e</text>")


def test_ids_and_references_move_together() -> None:
    text = cleaned(
        '<defs><path id="m" d="M 0 0"/><clipPath id="c"><rect width="1" height="1"/></clipPath></defs>'
        '<g clip-path="url(#c)"><use xlink:href="#m" x="3"/><use href="#m"/></g>'
    )
    assert 'id="figure-m"' in text
    assert 'clip-path="url(#figure-c)"' in text
    assert text.count('href="#figure-m"') == 2


def test_embedded_images_pass() -> None:
    assert f'href="data:image/png;base64,{PIXEL}"' in cleaned(f'<image xlink:href="data:image/png;base64,{PIXEL}"/>')


def test_a_use_of_uses_is_left_out() -> None:
    # Ten levels of ten uses each would draw ten thousand million shapes.
    levels = "".join(f'<g id="l{k + 1}">' + f'<use href="#l{k}"/>' * 10 + "</g>" for k in range(10))
    assert "<use" not in cleaned(f'<defs><g id="l0"><path d="M 0 0"/></g>{levels}</defs><use href="#l10"/>')


def test_entities_are_refused() -> None:
    laughs = "".join(f'<!ENTITY a{k + 1} "' + f"&a{k};" * 10 + '">' for k in range(9))
    with pytest.raises(RecordError, match="entities"):
        safe_svg(svg("<text>&a9;</text>", before=f'<!DOCTYPE svg [<!ENTITY a0 "ha">{laughs}]>'))
    with pytest.raises(RecordError, match="entities"):
        safe_svg(svg("<text>&x;</text>", before='<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>'))


def test_the_document_type_that_matplotlib_writes_is_read() -> None:
    before = '<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN"\n "http://www.w3.org/svg11.dtd">\n'
    assert "<g/>" in cleaned("<g/>", before=before)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<svg",
        b"\xff\xfe<\x00s\x00",
        b"<html/>",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b'<svg viewBox="0 0 1 url(x)"/>',
        b'<svg viewBox="0 0 1"/>',
        '<?xml version="1.0" encoding="utf-16"?><svg viewBox="0 0 1 1"/>'.encode("utf-16"),
        b'<a><svg viewBox="0 0 1 1"/></a>',
    ],
)
def test_what_is_no_figure_is_refused(content: bytes) -> None:
    with pytest.raises(RecordError, match="not an SVG file"):
        safe_svg(content)


def test_deep_nesting_ends() -> None:
    depth = 20_000
    text = cleaned("<g>" * depth + '<path d="M 0 0"/>' + "</g>" * depth)
    assert text.count("<g") == MAX_DEPTH + 1
    assert "<path" not in text

"""The page of ``attsvm inspect``, and the page of two runs beside each other: one HTML file that needs no network."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from attsvm.errors import RecordError
from attsvm.records import RunFolder, write_bytes
from attsvm.report.atlas_build import LIMIT_BYTES, TARGET_BYTES, pack, read_atlas
from attsvm.report.atlas_page import AtlasPage, blobs, check_fact, check_sentence, kept_sentence, model_name, payload
from attsvm.report.render import bundle, bundle_script, embed_json, environment, policy

__all__ = ["ATLAS_SCRIPTS", "ATLAS_STYLES", "atlas_html", "is_atlas", "render_atlas", "render_comparison"]

ATLAS_SCRIPTS = (
    *("core.js", "shell.js", "tooltip.js", "atlas_data.js", "atlas_export.js", "atlas_matrix.js", "atlas_lines.js"),
    *(
        "atlas_text.js",
        "atlas_spectra.js",
        "atlas_head.js",
        "atlas_map.js",
        "atlas_similarity.js",
        "atlas_table.js",
        "atlas_compare.js",
    ),
    "atlas_app.js",
)
ATLAS_STYLES = ("page.css", "controls.css", "tables.css", "atlas.css", "atlas_head.css", "print.css")


def is_atlas(path: Path | str) -> bool:
    """True for the folder of a finished run of ``attsvm inspect``, damaged or not."""
    try:
        return RunFolder(path).read_result().get("kind") == "inspect"
    except RecordError:
        return False


def render_atlas(path: Path | str) -> Path:
    """Write ``report.html`` of a finished run of ``attsvm inspect``.

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
    _write(target, atlas_html(path))
    return target


def render_comparison(path_a: Path | str, path_b: Path | str, target: Path | str) -> Path:
    """Write the page of two runs of ``attsvm inspect`` beside each other.

    Parameters
    ----------
    path_a, path_b
        The run folders. Heads are matched by kind, layer and number.
    target
        The file to write.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    RecordError
        If a record is missing, damaged or of another kind, or the page cannot be written.
    """
    _write(Path(target), atlas_html(path_a, path_b))
    return Path(target)


def atlas_html(*paths: Path | str, target_bytes: int = TARGET_BYTES, limit_bytes: int = LIMIT_BYTES) -> str:
    """Return the page of one run, or of two, as text.

    Parameters
    ----------
    paths
        One run folder, or two.
    target_bytes
        Size of the page up to which all weights are kept; above it the page keeps the largest only.
    limit_bytes
        Size of the page above which it keeps fewer texts.

    Raises
    ------
    RecordError
        If a record is missing, damaged or of another kind.
    """
    atlases = [read_atlas(path) for path in paths]
    results = tuple(atlas.result for atlas in atlases)
    script, style = bundle_script(ATLAS_SCRIPTS), bundle(ATLAS_STYLES)
    data = embed_json(payload(results, [len(result.shown) for result in results]))
    packed = pack(atlases, target=target_bytes, limit=limit_bytes, rest=_size(script, style, data))
    data = embed_json(payload(results, packed.n_shown))
    patterns = embed_json(blobs(atlases, packed))
    size = _size(script, style, data, patterns)
    made = environment()
    made.filters |= {"check": check_sentence, "check_short": check_fact, "model_name": model_name}
    return made.get_template("atlas.html.j2").render(
        page=AtlasPage(results=results, packed=packed, kept=kept_sentence(results, packed)),
        data=data,
        patterns=patterns,
        script=Markup(script),
        style=Markup(style),
        policy=policy(script, style),
        # What the template itself adds is a few kB, less than the last digit shows.
        size=f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(1, round(size / 1e3))} kB",
    )


def _size(*parts: str) -> int:
    return sum(len(part.encode(errors="backslashreplace")) for part in parts)


def _write(target: Path, text: str) -> None:
    # A lone surrogate would have been made visible on reading; the handler only keeps a page from being lost.
    write_bytes(target, text.encode("utf-8", errors="backslashreplace"))

"""The page of ``attsvm inspect``: what it keeps of the records, how, and what it refuses."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from attsvm.errors import RecordError
from attsvm.records import RunFolder
from attsvm.report import atlas_html, is_atlas, render_atlas, render_comparison
from attsvm.report.atlas_build import FEWEST_KEPT, LEVELS, Blob, largest, pack, packed_similarity, read_atlas
from attsvm.report.atlas_page import kept_sentence, rounded
from report.fake_atlas import BERT, HOSTILE, T5, Change, Result, write_atlas

Array = npt.NDArray[Any]


def embedded(html: str, which: str) -> Any:
    """The JSON of a script element of the page."""
    found = re.search(rf'<script type="application/json" id="{which}">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def sections(blob: Blob) -> dict[str, bytes]:
    """The sections of a blob by their names."""
    content = zlib.decompress(base64.b64decode(blob.data))
    made, start = {}, 0
    for name, length in blob.layout["sections"]:
        made[name] = content[start : start + length]
        start += length
    assert start == len(content)
    return made


def matrix(parts: dict[str, bytes], name: str, shape: tuple[int, ...]) -> Array:
    """Read a matrix again, written whole or entry by entry."""
    if name in parts:
        return np.frombuffer(parts[name], np.uint8).reshape(shape)
    made = np.zeros((shape[0] * shape[1], shape[2]), np.uint8)
    values = parts.get(f"{name}.values")
    gaps, entry = iter(parts[f"{name}.gaps"]), 0
    for row, count in enumerate(np.frombuffer(parts[f"{name}.counts"], "<u2")):
        column = 0
        for _ in range(count):
            while (step := next(gaps)) == 255:
                column += 255
            column += step
            made[row, column] = 1 if values is None else values[entry]
            entry += 1
    return made.reshape(shape)


@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_everything_of_a_small_run_can_be_read_again(tmp_path: Path, spread: float) -> None:
    atlas = read_atlas(write_atlas(tmp_path / "run", stacks=T5, spread=spread, n_tokens=300))
    packed = pack([atlas])
    assert packed.level == LEVELS[0]
    assert (packed.mean_dropped, packed.largest_dropped) == (0, 0)
    assert len(packed.blobs[0]) == 2 * 6
    forms = set()
    for blob in packed.blobs[0]:
        layout, parts = blob.layout, sections(blob)
        shape = (layout["H"], layout["Tq"], layout["Tk"])
        arrays = {
            name.rpartition(".")[2]: array
            for name, array in atlas.arrays.items()
            if name.startswith(f"shown.{layout['s']}.{layout['m']}.")
        }
        assert np.array_equal(matrix(parts, "pattern", shape), arrays["pattern"])
        assert np.array_equal(matrix(parts, "support", shape), arrays["support"])
        assert np.array_equal(np.frombuffer(parts["selected"], "<u2").reshape(shape[:2]), arrays["selected"])
        margins = np.frombuffer(parts["margin"], "<f2").reshape(shape[:2])
        assert np.array_equal(margins, arrays["margin"].astype(np.float16))
        twin = np.zeros(shape, np.uint8)
        np.put_along_axis(twin, arrays["twin_index"].astype(np.int64), arrays["twin_weight"], -1)
        assert np.array_equal(matrix(parts, "twin", shape), twin)
        forms.add("pattern" in parts)
    # Soft patterns are written whole, hard ones entry by entry.
    assert (spread == 1.0) in forms


def test_unselected_queries_and_special_margins(tmp_path: Path) -> None:
    def edit(result: Result, arrays: dict[str, Array]) -> None:
        arrays["shown.0.0.selected"][0, :2] = [-1, -2]
        arrays["shown.0.0.margin"][0, :4] = [np.inf, np.nan, 1e30, 3.25]

    blob = pack([read_atlas(write_atlas(tmp_path / "run", None, edit))]).blobs[0][0]
    # Nothing, and the model's own sink.
    assert np.frombuffer(sections(blob)["selected"], "<u2")[:2].tolist() == [0xFFFF, 0xFFFE]
    margins = np.frombuffer(sections(blob)["margin"], "<f2")[:4]
    assert np.array_equal(margins, np.array([np.inf, np.nan, 65504, 3.25], np.float16), equal_nan=True)


def test_some_heads_of_some_layers(tmp_path: Path) -> None:
    """Arrays hold only the heads that were looked at; in the page each has its own place."""

    def edit(result: Result, arrays: dict[str, Array]) -> None:
        del result["modules"][1]
        result["modules"][1]["heads"] = [1, 3]
        result["heads"] = [head for head in result["heads"] if head["module"] != 1]
        result["heads"] = [head for head in result["heads"] if head["module"] == 0 or head["head"] in (1, 3)]
        for name in [name for name in arrays if ".1." in name.removeprefix("shown.")[1:]]:
            del arrays[name]
        for name in [name for name in arrays if name.startswith(("shown.0.2.", "shown.1.2."))]:
            arrays[name] = arrays[name][[1, 3]]
        arrays["similarity"] = arrays["similarity"][:6, :6]

    atlas = read_atlas(write_atlas(tmp_path / "run", None, edit))
    (blob,) = (one for one in pack([atlas]).blobs[0] if (one.layout["s"], one.layout["m"]) == (1, 2))
    shape = (blob.layout["H"], blob.layout["Tq"], blob.layout["Tk"])
    assert shape == (4, 14, 14)
    whole = matrix(sections(blob), "pattern", shape)
    assert np.array_equal(whole[[1, 3]], atlas.arrays["shown.1.2.pattern"])
    assert not whole[[0, 2]].any()
    selected = np.frombuffer(sections(blob)["selected"], "<u2").reshape(shape[:2])
    assert np.array_equal(selected[[1, 3]], atlas.arrays["shown.1.2.selected"])
    assert (selected[[0, 2]] == 0xFFFF).all()
    assert atlas_html(atlas.path)


def test_a_large_run_keeps_the_largest_weights(tmp_path: Path) -> None:
    atlas = read_atlas(write_atlas(tmp_path / "run", stacks=(("encoder", 2, 4),), n_tokens=160, n_shown=2))
    whole = pack([atlas])
    packed = pack([atlas], target=whole.n_bytes // 2)
    assert packed.level.least > 1
    assert packed.n_bytes <= whole.n_bytes // 2
    assert packed.n_shown == (2,)
    blob = packed.blobs[0][0]
    parts, codes = sections(blob), atlas.arrays["shown.0.0.pattern"]
    kept = matrix(parts, "pattern", codes.shape)
    assert np.array_equal(kept[kept > 0], codes[kept > 0])
    assert np.array_equal(kept[codes >= packed.level.least], codes[codes >= packed.level.least])
    assert (np.count_nonzero(kept, -1) >= FEWEST_KEPT).all()
    few = np.count_nonzero(codes >= packed.level.least, -1) < FEWEST_KEPT
    assert (np.count_nonzero(kept, -1)[few] == FEWEST_KEPT).all()
    # The twin keeps fewer, but the largest.
    weights = atlas.arrays["shown.0.0.twin_weight"]
    twin = matrix(parts, "twin", codes.shape)
    assert np.array_equal(np.sort(twin, -1)[..., ::-1][..., :4], np.sort(weights, -1)[..., ::-1][..., :4])
    # What is left out is said, for each query and on average.
    left_out = (np.square(codes / 255.0) - np.square(kept / 255.0)).sum(-1)
    tail = np.square(np.frombuffer(parts["tail"], np.uint8).reshape(left_out.shape) / 255.0)
    assert np.max(np.abs(np.sqrt(tail) - np.sqrt(left_out))) <= 0.5 / 255 + 1e-6
    assert blob.dropped == pytest.approx((left_out.sum(), left_out.max()), rel=1e-4)
    sentence = kept_sentence([atlas.result], packed)
    assert f"the {FEWEST_KEPT} largest of each query" in sentence
    assert kept_sentence([atlas.result], whole) == ""


def test_a_run_that_is_too_large_keeps_fewer_texts(tmp_path: Path) -> None:
    atlas = read_atlas(write_atlas(tmp_path / "run", n_tokens=60, n_shown=3))
    coarsest = pack([atlas], target=1)
    assert (coarsest.level, coarsest.n_shown) == (LEVELS[-1], (3,))
    fewer = pack([atlas], target=1, limit=coarsest.n_bytes - 1)
    assert fewer.n_shown == (2,)
    assert {blob.layout["s"] for blob in fewer.blobs[0]} == {0, 1}
    # One text is always there.
    assert pack([atlas], target=1, limit=1).n_shown == (1,)
    # The limit is that of the whole page.
    whole = len(atlas_html(atlas.path, target_bytes=1).encode())
    html = atlas_html(atlas.path, target_bytes=1, limit_bytes=whole - coarsest.n_bytes // 5)
    assert len(embedded(html, "data")["atlases"][0]["meta"]["shown"]) == 2
    assert "It shows 2 of the 3 recorded texts" in html


def test_the_similarity_of_heads(tmp_path: Path) -> None:
    def edit(result: Result, arrays: dict[str, Array]) -> None:
        arrays["similarity"][0, 1] = np.nan

    atlas = read_atlas(write_atlas(tmp_path / "run", None, edit))
    codes = np.frombuffer(zlib.decompress(base64.b64decode(packed_similarity(atlas) or "")), np.uint8).reshape(12, 12)
    assert codes[0, 1] == 255
    known = np.isfinite(atlas.arrays["similarity"])
    assert np.abs(codes / 250 - atlas.arrays["similarity"])[known].max() <= 0.5 / 250 + 1e-6


def test_the_page_holds_the_record(tmp_path: Path) -> None:
    path = write_atlas(tmp_path / "run", stacks=T5)
    assert render_atlas(path) == path / "report.html"
    html = (path / "report.html").read_text(encoding="utf-8")
    record = json.loads((path / "result.json").read_text(encoding="utf-8"))
    (shown,) = embedded(html, "data")["atlases"]
    assert [head["label"] for head in shown["heads"]] == [head["label"] for head in record["heads"]]
    for ours, theirs in zip(shown["heads"], record["heads"], strict=True):
        for key, estimate in theirs["values"].items():
            assert ours["values"][key] == (None if estimate is None else pytest.approx(estimate, rel=1e-5))
        assert ours["solutions"] == [rounded(one) for one in theirs["solutions"]]
    assert shown["meta"]["check"] == record["check"]
    for text in (record["command"], record["commit"], *record["model"]["notes"], *record["corpus"]["notes"]):
        assert text in html
    assert "2.4 × 10⁻⁷" in html
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    path = write_atlas(tmp_path / "run")
    assert atlas_html(path) == atlas_html(path)


def test_the_size_is_stated(tmp_path: Path) -> None:
    html = atlas_html(write_atlas(tmp_path / "run", stacks=BERT, n_tokens=40))
    stated = re.search(r"This file is complete \((\d+\.\d) MB\)", html)
    assert stated is not None
    assert abs(float(stated[1]) - len(html.encode()) / 1e6) < 0.1


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    html = atlas_html(write_atlas(tmp_path / "run", hostile=True))
    assert HOSTILE[0] not in html
    assert "<img" not in html
    assert "\u202e" not in html
    assert "\x00" not in html
    assert html.count("<script") == 3
    assert "default-src &#39;none&#39;" in html
    tokens = embedded(html, "data")["atlases"][0]["meta"]["shown"][0]["source"]["tokens"]
    assert any("⟨U+202E⟩" in token for token in tokens)
    # Characters that would not be seen are shown as symbols.
    assert embedded(html, "data")["atlases"][0]["heads"][0]["top_tokens"][2][0] == "a⟨U+202E⟩b⟨U+200B⟩c"


def _drop(name: str) -> Change:
    def edit(result: Result, arrays: dict[str, Array]) -> None:
        del arrays[name]

    return edit


def _shorten(result: Result, arrays: dict[str, Array]) -> None:
    arrays["shown.1.2.pattern"] = arrays["shown.1.2.pattern"][:, :-1]


def _twice(result: Result, arrays: dict[str, Array]) -> None:
    result["heads"][1]["label"] = result["heads"][0]["label"]


def _stray(result: Result, arrays: dict[str, Array]) -> None:
    result["heads"][1]["head"] = 99


def _misaligned(result: Result, arrays: dict[str, Array]) -> None:
    result["shown"][0]["source"]["words"].pop()


def _address(result: Result, arrays: dict[str, Array]) -> None:
    result["shown"][0]["picture"] = {"width": 1, "height": 1, "rows": 1, "columns": 1, "data": "https://example.org/a"}


def _kind(result: Result, arrays: dict[str, Array]) -> None:
    result["kind"] = "verify"


def _lonely(result: Result, arrays: dict[str, Array]) -> None:
    result["modules"][0]["query_side"] = "target"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop("shown.0.1.pattern"), r"shown\.0\.1\.pattern is missing"),
        (_shorten, r"shown\.1\.2\.pattern has shape \(4, 13, 14\)"),
        (_twice, "two heads are called L0.H0"),
        (_stray, "L0.H1 belongs to no module"),
        (_misaligned, "tokens, words and special have different lengths"),
        (_address, "data is not a PNG or JPEG picture"),
        (_kind, "kind: Input should be 'inspect'"),
        (_lonely, "a shown text has no target"),
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, edit: Change, message: str) -> None:
    path = write_atlas(tmp_path / "run", None, edit)
    with pytest.raises(RecordError, match=message):
        render_atlas(path)
    assert not (path / "report.html").exists()


def test_what_may_be_absent(tmp_path: Path) -> None:
    def edit(result: Result, arrays: dict[str, Array]) -> None:
        del arrays["similarity"]
        for head in result["heads"]:
            head.update(solutions=[], spectra={}, soft=None, top_tokens=[], head_kind="")
        result.update(solution_names=[], primary=None, commit=None, seed=None)
        result["check"] = {"compared": False, "max_difference": None, "note": "The model has no eager attention."}

    path = write_atlas(tmp_path / "run", None, edit, twin=False, support=False, values=False)
    html = atlas_html(path)
    (packed,) = embedded(html, "blobs")
    assert packed["similarity"] is None
    assert {name for name, _ in packed["blobs"][0]["layout"]["sections"]} == {"selected", "margin", "pattern"}
    assert "The model has no eager attention." in html


def test_a_run_without_shown_texts(tmp_path: Path) -> None:
    html = atlas_html(write_atlas(tmp_path / "run", n_shown=0))
    assert embedded(html, "blobs")[0]["blobs"] == []


def test_a_path_is_named_by_its_end(tmp_path: Path) -> None:
    def edit(result: Result, arrays: dict[str, Array]) -> None:
        result["model"]["name"] = "/home/somebody/models/minilm/model/"

    html = atlas_html(write_atlas(tmp_path / "run", None, edit))
    assert "<bdi>minilm/model</bdi></h1>" in html
    assert "<bdi>models/tiny</bdi></h1>" in atlas_html(write_atlas(tmp_path / "other"))


def test_is_atlas(tmp_path: Path) -> None:
    path = write_atlas(tmp_path / "run")
    assert is_atlas(path)
    assert not is_atlas(tmp_path / "nothing")
    RunFolder(path).write_result({"kind": "reproduce"})
    assert not is_atlas(path)


def test_two_runs_in_one_page(tmp_path: Path) -> None:
    paths = [write_atlas(tmp_path / name, name=name, seed=seed) for seed, name in enumerate(("base", "tuned"))]
    target = tmp_path / "compare.html"
    assert render_comparison(*paths, target) == target
    html = target.read_text(encoding="utf-8")
    data = embedded(html, "data")
    assert [atlas["meta"]["name"] for atlas in data["atlases"]] == ["base", "tuned"]
    assert data["name"] == "base and tuned"
    assert len(embedded(html, "blobs")) == 2


def test_rounded_keeps_what_json_can_hold() -> None:
    assert rounded({"a": [1.23456789, True, None, "x", 2**60, float("nan")]}) == {
        "a": [1.23457, True, None, "x", str(2**60), None]
    }


def test_of_equal_weights_the_first_are_kept() -> None:
    codes = np.array([[5, 5, 9, 5], [0, 1, 0, 0]], np.uint8)
    assert largest(codes, 2).tolist() == [[5, 0, 9, 0], [0, 1, 0, 0]]
    assert largest(codes, 4) is codes

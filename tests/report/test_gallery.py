"""The gallery as text: what it says, what it escapes, how it shows what is not whole. No browser is needed."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from attsvm.errors import RecordError
from attsvm.records import RunFolder
from attsvm.report import gallery_build, is_gallery, is_recipe, render_gallery, render_recipe
from attsvm.report.gallery_build import read_cards, read_recipe_page
from report.fake_gallery import (
    HOSTILE,
    Change,
    Result,
    hostile_trials,
    make_hostile,
    make_result,
    make_trials,
    number,
    write_config,
    write_gallery,
    write_recipe,
)
from report.test_render import Elements, embedded, words


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = write_gallery(tmp_path_factory.mktemp("gallery") / "reproduce")
    assert render_gallery(home, ["tfsvm-fig2"]) == home / "index.html"
    return home


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    def make(*changes: Change, name: str = "tfsvm-fig5", records: Any = None, figure: bool = False) -> Path:
        result = make_result(name)
        for change in changes:
            change(result)
        return write_recipe(tmp_path / "reproduce" / name, result, records, figure)

    return make


def text_of(folder: Path) -> str:
    return render_recipe(folder).read_text(encoding="utf-8")


def pages(home: Path) -> list[Path]:
    return sorted(home.rglob("*.html"))


def test_every_finished_recipe_gets_a_page(written: Path) -> None:
    assert [path.relative_to(written).as_posix() for path in pages(written)] == [
        "hostile/report.html",
        "index.html",
        "rates/report.html",
        "tfsvm-fig10/report.html",
        "tfsvm-fig2/report.html",
    ]


def test_same_records_give_same_bytes(written: Path, tmp_path: Path) -> None:
    before = {path.relative_to(written): path.read_bytes() for path in pages(written)}
    render_gallery(written, ["tfsvm-fig2"])
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(written, elsewhere, ignore=shutil.ignore_patterns("*.html"))
    render_gallery(elsewhere, ["tfsvm-fig2"])
    for home in (written, elsewhere):
        assert {path.relative_to(home): path.read_bytes() for path in pages(home)} == before
    assert render_recipe(elsewhere / "rates").read_bytes() == before[Path("rates/report.html")]


def test_page_says_what_the_record_says(written: Path) -> None:
    shown = words((written / "tfsvm-fig10" / "report.html").read_text(encoding="utf-8"))
    for part in (
        "Global convergence, as in tfsvm-fig10",
        "W goes to the Frobenius solution and (K, Q) to the nuclear one in every trial.",
        "2 met 1 differs 1 not published",
        "120 trials 2 cases 12.5 s of computing",
        "correlation of W with the Frobenius solution 0.99 0.9934 0.98 to 1 met Fig. 5(b)",
        "share of feasible problems, d = 4 – 1.000 ≥ 0.97 met independent computation",
        "largest step until the first margin – 3.200 × 10⁻⁷ – not published –",
        "d feasible rank of the nuclear solution remark 2 0.3100 – most are infeasible",
        "The published code counts an infeasible problem as one of rank 1",
        "attsvm reproduce tfsvm-fig10 --seed 0 --output-dir runs/reproduce",
        "case n T d init trials of which count d=4 6 8 4 – 60 – d=10 6 8 10 zeros 60 58",
        "torch 2.13.0",
        "0123456789abcdef0123456789abcdef01234567",
        "cases.d=10 60",
        "120 records, as in trials.jsonl . Only there: curve.",
    ):
        assert part in shown, part


def test_a_number_beside_its_bound_is_written_with_the_digits_that_tell(written: Path) -> None:
    # 0.84996 is below 0.85, which four digits would hide.
    shown = words((written / "tfsvm-fig10" / "report.html").read_text(encoding="utf-8"))
    assert "correlation of (K, Q) with the nuclear solution 0.9 0.84996 0.85 to 0.95 differs" in shown


def test_index_counts_and_lists_all_numbers(written: Path) -> None:
    text = (written / "index.html").read_text(encoding="utf-8")
    shown = words(text)
    # Three recipes with two met and one that differs, and one with one number.
    assert "7 of 10 compared numbers are met." in shown
    assert "4 figures 1 unfinished 1 damaged 3 numbers differ 4 not published" in shown
    assert text.count('<tr role="row">') == 1 + 4 + 4 + 5 + 1
    links = [a["href"] for tag, a in Elements(text).elements if tag == "a" and (a.get("href") or "").endswith(".html")]
    assert set(links) == {f"{name}/report.html" for name in ("tfsvm-fig2", "tfsvm-fig10", "rates", "hostile")}


def test_order_of_the_gallery(written: Path) -> None:
    def names(*order: str) -> list[str]:
        return [card.folder for card in read_cards(written, order)]

    # The oldest paper first, figure 10 after figure 2; what has no paper follows.
    assert names() == ["tfsvm-fig2", "tfsvm-fig10", "rates", "cones", "flow", "hostile"]
    assert names("rates", "cones", "tfsvm-fig10")[:3] == ["rates", "cones", "tfsvm-fig10"]


def test_unfinished_and_damaged_are_shown_as_such(written: Path) -> None:
    shown = words((written / "index.html").read_text(encoding="utf-8"))
    assert (
        "cones unfinished This run has not ended. The same command goes on where it stopped: "
        "attsvm reproduce cones --seed 0 --output-dir runs/reproduce" in shown
    )
    assert "flow damaged result.json cannot be shown: name: Input should be a valid string." in shown
    assert str(written) not in shown
    assert "of somebody else" not in shown


def test_nothing_is_loaded_from_anywhere(written: Path) -> None:
    for path in pages(written):
        text = path.read_text(encoding="utf-8")
        for tag, attributes in Elements(text).elements:
            for name in ("src", "srcset", "action", "poster", "data"):
                assert (attributes.get(name) or "data:").startswith("data:"), (tag, name)
            href = attributes.get("href") or "#"
            allowed = ("#", "data:") if tag != "a" else ("#", "https://arxiv.org/abs/2", "../index.html")
            sibling = tag == "a" and re.fullmatch(r"[\w-]+/report\.html|figure\.(svg|png)|trials\.jsonl", href)
            assert href.startswith(allowed) or sibling, (tag, href)
            assert "style" not in attributes, tag
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert not re.search(r"@import|\bimport\s*\(|\bfetch\s*\(|XMLHttpRequest", text)


def test_policy_allows_only_the_two_blocks_of_the_page(written: Path) -> None:
    for path in pages(written):
        parsed = Elements(path.read_text(encoding="utf-8"))
        policy = next(a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        blocks = [(tag, data) for tag, attributes, data in parsed.blocks if attributes.get("id") != "data"]
        assert sorted(tag for tag, _ in blocks) == ["script", "style"]
        for tag, content in blocks:
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy


def test_hostile_text_is_text(written: Path) -> None:
    for path in (written / "index.html", written / "hostile" / "report.html"):
        text = path.read_text(encoding="utf-8")
        parsed = Elements(text)
        assert not [a for tag, a in parsed.elements if tag == "img" and not (a.get("src") or "").startswith("data:")]
        assert "</script><script>window.pwned=1</script>⟨U+202E⟩<img src=x onerror=window.pwned=2>␀{{ 7*7 }}" in (
            parsed.shown
        )
        assert not re.search(r"[\x00\u202e]", text)
        assert "javascript:" not in {(a.get("href") or "")[:11] for _, a in parsed.elements}
    data = embedded(text)
    assert data["trials"]["rows"] == [
        [
            "</script><script>window.pwned=1</script>⟨U+202E⟩<img src=x onerror=window.pwned=2>␀{{ 7*7 }}",
            str(2**70),
            "=cmd|'/C calc'!A0",
        ]
    ]


def test_names_of_controls_and_ids_are_unique(written: Path) -> None:
    for path in pages(written):
        parsed = Elements(path.read_text(encoding="utf-8"))
        ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        named = {a.get("aria-labelledby") for _, a in parsed.elements} - {None}
        assert named <= set(ids)


# --------------------------------------------------------------------------------------------------------- the figure


def test_figure_is_in_the_page_with_a_text_alternative(written: Path) -> None:
    text = (written / "tfsvm-fig10" / "report.html").read_text(encoding="utf-8")
    parsed = Elements(text)
    shapes = [tag for tag, _ in parsed.elements]
    assert shapes.count("path") > 50
    label = next(a["aria-label"] for tag, a in parsed.elements if tag == "div" and a.get("role") == "img")
    assert label == (
        "Figure: Global convergence, as in tfsvm-fig10. W goes to the Frobenius solution and (K, Q) to the nuclear one "
        "in every trial."
    )


def test_without_the_svg_the_png_is_shown_and_without_both_a_notice(recipe: Callable[..., Path]) -> None:
    folder = recipe(figure=True)
    (folder / "figure.svg").write_text("<svg", encoding="utf-8")
    images = [a for tag, a in Elements(text_of(folder)).elements if tag == "img"]
    assert [(image["src"] or "")[:22] for image in images] == ["data:image/png;base64,"]
    (folder / "figure.png").write_bytes(b"GIF89a")
    text = text_of(folder)
    assert "neither figure.svg nor figure.png can be shown" in words(text)
    assert not [a for tag, a in Elements(text).elements if tag == "img"]


# --------------------------------------------------------------------------------------------------------- the trials


def test_trials_are_embedded_with_all_digits(recipe: Callable[..., Path]) -> None:
    records = make_trials()
    data = embedded(text_of(recipe(records=records)))
    assert data["trials"]["columns"] == ["case", "trial", "correlation", "rank", "verdict", "feasible"]
    assert data["trials"]["rows"] == [[one[name] for name in data["trials"]["columns"]] for one in records]


def test_too_many_trials_stay_in_their_file(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recipe()
    monkeypatch.setattr(gallery_build, "MAX_ROWS", 119)
    text = text_of(folder)
    assert embedded(text)["trials"] is None
    assert "120 trials are too many for a table in a page. They are in trials.jsonl , one record a line." in words(text)
    monkeypatch.setattr(gallery_build, "MAX_ROWS", 120)
    assert embedded(text_of(folder))["trials"] is not None
    monkeypatch.setattr(gallery_build, "MAX_TABLE_CHARACTERS", 1000)
    assert "too large for a page" in words(text_of(folder))


def test_trials_that_cannot_be_read_are_said_and_the_page_is_made(recipe: Callable[..., Path]) -> None:
    folder = recipe()
    lines = (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "trials.jsonl").write_text("\n".join([*lines[:6], lines[6][:9], *lines[7:]]), encoding="utf-8")
    assert "trials.jsonl, line 7, is damaged." in words(text_of(folder))
    (folder / "trials.jsonl").unlink()
    text = text_of(folder)
    assert "trials.jsonl could not be read: No such file or directory." in words(text)
    assert 'href="trials.jsonl"' not in text


def test_records_of_different_forms_share_a_table(recipe: Callable[..., Path]) -> None:
    records = [{"case": "a", "trial": 0, "x": 1.5}, {"case": "b", "trial": 1, "y": {"z": 1}, "w": "text"}]
    assert embedded(text_of(recipe(records=records)))["trials"] == {
        "columns": ["case", "trial", "x", "w"],
        "rows": [["a", 0, 1.5, None], ["b", 1, None, "text"]],
    }


def test_a_recipe_without_trials_numbers_and_notes(recipe: Callable[..., Path]) -> None:
    def bare(result: Result) -> None:
        result |= {"numbers": [], "tables": [], "notes": [], "cases": [], "about": "", "sentence": ""}

    shown = words(text_of(recipe(bare, records=[])))
    for part in ("This recipe has no numbers.", "No trial was recorded.", "0 trials"):
        assert part in shown


# ---------------------------------------------------------------------------------------------------------- the scale


@pytest.mark.parametrize(
    "values",
    [
        {"ours": 0.5, "published": 0.6, "low": 0.4, "high": 0.7},
        {"ours": 5.0, "low": 0.0, "high": 1.0},
        {"ours": -5.0, "published": 0.0, "low": 0.0},
        {"ours": 1.0, "low": 1.0, "high": 1.0},
        {"ours": 0.0, "low": 0.0, "high": 0.0},
        {"ours": 1e308, "low": -1e308},
    ],
)
def test_scale_keeps_the_order_of_the_numbers(recipe: Callable[..., Path], values: dict[str, float]) -> None:
    def change(result: Result) -> None:
        result["numbers"] = [number("n", **values)]

    scale = read_recipe_page(recipe(change)).numbers[0].scale
    if abs(values["ours"]) > 1e307:
        assert scale is None  # no float holds the length of such a line
        return
    assert scale is not None
    places = {"ours": scale.ours, "published": scale.published, "low": scale.low, "high": scale.high}
    known = sorted(values, key=lambda name: values[name])
    assert all(0 < (places[name] or 0) < 100 for name in known)
    for one, two in itertools.pairwise(known):
        assert (places[one] or 0) <= (places[two] or 0)
        assert (places[one] == places[two]) == (values[one] == values[two])


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.26 - 0.025, 0.26 + 0.025, "0.235 to 0.285"),
        (None, 1e-9, "≤ 1 × 10⁻⁹"),
        (-5e-4, 5e-4, "−5 × 10⁻⁴ to 5 × 10⁻⁴"),
        (1 / 3, None, "≥ 0.3333"),
        (1.0, 1.0, "1"),
        (120.0, 1500.0, "120 to 1,500"),
    ],
)
def test_bounds_are_written_in_the_digits_they_were_given_in(
    recipe: Callable[..., Path], low: float | None, high: float | None, shown: str
) -> None:
    def change(result: Result) -> None:
        result["numbers"] = [number("n", 0.9, None, low, high)]

    assert read_recipe_page(recipe(change)).numbers[0].range == shown


def test_nothing_to_compare_has_no_scale(recipe: Callable[..., Path]) -> None:
    def change(result: Result) -> None:
        result["numbers"] = [number("a", 1.0), number("b", None, 1.0, 0.0, 2.0)]

    page = read_recipe_page(recipe(change))
    assert [row.scale for row in page.numbers] == [None, None]
    assert [(row.ours, row.range) for row in page.numbers] == [("1.000", ""), ("–", "0 to 2")]


# ------------------------------------------------------------------------------------------------------------- damage


def change_result(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = {**make_result("tfsvm-fig5"), **values}
        RunFolder(folder).write_result({key: value for key, value in record.items() if value is not ...})

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "half a result": (lambda folder: (folder / "result.json").write_text('{"schema_version": 1,'), "result.json"),
    "not UTF-8": (lambda folder: (folder / "result.json").write_bytes(b"\xff\xfe"), "result.json"),
    "deep": (lambda folder: (folder / "result.json").write_text("[" * 100_000), "result.json"),
    "a later version": (lambda folder: (folder / "result.json").write_text('{"schema_version": 99}'), "99"),
    "another kind": (change_result(kind="verify"), "kind: Input should be 'reproduce'"),
    "no paper": (change_result(paper=...), "paper: Field required"),
    "a row too short": (
        change_result(tables=[{"title": "t", "columns": ["a", "b"], "rows": [[1]]}]),
        "tables.0: Value error, row 0 has 1 cells for 2 columns",
    ),
    "a number that is text": (change_result(numbers=[{**number("n", 1.0), "ours": "1.0"}]), "numbers.0.ours"),
    "a verdict of its own": (change_result(numbers=[{**number("n", 1.0), "verdict": "fine"}]), "numbers.0.verdict"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "half a config": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_an_error_of_the_page_and_a_card_of_the_gallery(recipe: Callable[..., Path], name: str) -> None:
    damage, word = DAMAGES[name]
    whole, folder = recipe(name="rates"), recipe()
    damage(folder)
    with pytest.raises(RecordError, match=re.escape(word)):
        render_recipe(folder)
    shown = words(render_gallery(folder.parent).read_text(encoding="utf-8"))
    assert "tfsvm-fig5 damaged" in shown
    assert word in shown
    assert (whole / "report.html").exists()


def test_unfinished_recipe_has_no_page(tmp_path: Path) -> None:
    (tmp_path / "cones").mkdir()
    write_config(tmp_path / "cones", "cones")
    with pytest.raises(RecordError, match=r"cones is not finished: it has no result\.json\. The same command resumes"):
        render_recipe(tmp_path / "cones")


def test_empty_gallery_says_so(tmp_path: Path) -> None:
    shown = words(render_gallery(tmp_path).read_text(encoding="utf-8"))
    assert "There is no recipe in this folder." in shown
    assert "No number has been compared yet." in shown


def test_gallery_of_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="absent could not be read: No such file or directory"):
        render_gallery(tmp_path / "absent")


def test_what_a_folder_is(written: Path, tmp_path: Path) -> None:
    assert is_gallery(written)
    assert not is_recipe(written)
    for name in ("rates", "cones", "flow"):
        assert is_recipe(written / name)
        assert not is_gallery(written / name)
    for path in (written / "of somebody else", written / "index.html", tmp_path, tmp_path / "absent"):
        assert not is_recipe(path)
        assert not is_gallery(path)
    RunFolder(tmp_path).write_config({"kind": "verify"})
    assert not is_recipe(tmp_path)


def test_hostile_names_of_folders(tmp_path: Path) -> None:
    name = 'a"b <i>&#%?'
    write_recipe(tmp_path / name, make_result("tfsvm-fig5"), [], figure=False)
    parsed = Elements(render_gallery(tmp_path).read_text(encoding="utf-8"))
    links = [
        a["href"] for tag, a in parsed.elements if tag == "a" and not (a["href"] or "").startswith(("#", "https:"))
    ]
    # The thumbnail, the title, and a number in each of four rows.
    assert links == ["a%22b%20%3Ci%3E%26%23%25%3F/report.html"] * 6
    assert "i" not in {tag for tag, _ in parsed.elements}


def test_hostile_records_are_read_whole(recipe: Callable[..., Path]) -> None:
    folder = recipe(make_hostile, records=hostile_trials())
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))["title"] == HOSTILE
    assert "\x00" not in read_recipe_page(folder).result.title

"""The page as text: what it says, what it escapes, and what it refuses. No browser is needed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attsvm.errors import AttSVMError, InvalidInputError, RecordError
from attsvm.report import read_page, render_run
from attsvm.report.build import histogram, joined_tokens, significant
from attsvm.report.charts import charts
from attsvm.report.text import number, percent, telling_digits, visible, visible_token
from report.fake_run import HOSTILE, Change, WriteRun, make_hostile, make_infeasible

Result = dict[str, Any]
Arrays = dict[str, np.ndarray]


class Elements(HTMLParser):
    """Collects elements, the text of scripts and styles, and the text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: list[tuple[str, dict[str, str | None], str]] = []
        self.shown = ""
        self._open: tuple[str, dict[str, str | None]] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._end_word(tag)
        if tag in ("script", "style"):
            self._open = (tag, dict(attrs))

    def _end_word(self, tag: str) -> None:
        if tag not in ("bdi", "var", "sub", "sup", "code"):
            self.shown += " "

    def handle_endtag(self, tag: str) -> None:
        self._end_word(tag)
        if tag in ("script", "style"):
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is None:
            self.shown += data
        else:
            self.blocks.append((*self._open, data))


def read(path: Path) -> str:
    return render_run(path).read_text(encoding="utf-8")


def embedded(text: str) -> dict[str, Any]:
    found = [data for _, attributes, data in Elements(text).blocks if attributes.get("id") == "data"]
    assert len(found) == 1
    return json.loads(found[0])  # type: ignore[no-any-return]


def words(text: str) -> str:
    return " ".join(Elements(text).shown.split())


def test_page_is_written_beside_the_records(write_run: WriteRun) -> None:
    folder = write_run()
    assert render_run(str(folder)) == folder / "report.html"
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".part") == []


def test_same_records_give_same_bytes(write_run: WriteRun) -> None:
    folder = write_run()
    first = render_run(folder).read_bytes()
    assert render_run(folder).read_bytes() == first
    assert render_run(write_run(name="again")).read_bytes() == first


def test_verdict_and_numbers_are_readable_without_scripts(write_run: WriteRun) -> None:
    shown = words(read(write_run()))
    for part in (
        "Training moved both W and (K, Q) in the direction of their max-margin token separators.",
        "0.9620 correlation with its max-margin solution",
        "attention on selected 99.8 %",
        "gap of the bounds 3.10 × 10⁻⁷",
        "attsvm verify --seed 0 --output-dir runs/movie-reviews",
        "0123456789abcdef0123456789abcdef01234567",
        "Duplicate tokens merged 3",
        "Upper bound 12.3456789",
        "Lower bound 12.3456751",
    ):
        assert part in shown


def test_nothing_is_loaded_from_anywhere(write_run: WriteRun) -> None:
    text = read(write_run())
    for tag, attributes in Elements(text).elements:
        for name in ("src", "href", "srcset", "action", "poster"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:")) or not value, (tag, name, value)
    assert set(re.findall(r"https?://[^\s'\"<)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\(|@import|\bimport\s*\(|\bfetch\s*\(|XMLHttpRequest|\bexport\s", text)


def test_policy_allows_only_the_two_blocks_of_the_page(write_run: WriteRun) -> None:
    parsed = Elements(read(write_run()))
    policy = next(a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    blocks = [(tag, data) for tag, attributes, data in parsed.blocks if attributes.get("id") != "data"]
    assert sorted(tag for tag, _ in blocks) == ["script", "style"]
    for tag, data in blocks:
        digest = base64.b64encode(hashlib.sha256(data.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not any(name.startswith("on") or name == "style" for _, a in parsed.elements for name in a)


def test_hostile_strings_add_no_element(write_run: WriteRun) -> None:
    def tags(text: str) -> list[str]:
        return sorted({tag for tag, _ in Elements(text).elements})

    plain, hostile = read(write_run(name="plain")), read(write_run(make_hostile, name="hostile"))
    assert tags(hostile) == tags(plain)
    assert len([tag for tag, _ in Elements(hostile).elements if tag == "script"]) == 2
    assert hostile.count("</script>") == 2
    assert "</script><script>window.pwned=1</script> ⟨U+202E⟩" in words(hostile)


def test_embedded_json_holds_the_hostile_tokens_in_visible_form(write_run: WriteRun) -> None:
    text = read(write_run(make_hostile))
    tokens = embedded(text)["sentences"][0]["tokens"]
    assert tokens[:10] == [
        "</script><script>window.pwned=1</script>",
        "<img src=x onerror=window.pwned=2>",
        "⟨U+202E⟩gnp.exe",
        "␀␇␛[31m",
        "line⟨U+2028⟩break⟨U+2029⟩",
        "⟨empty⟩",
        "␠␠␠",
        "⟨U+200B⟩",
        "⟨U+D800⟩",
        "z" * 5000,
    ]
    data = text[text.index('id="data">') : text.index("</script>")]
    assert not set("<>&\u2028\u2029") & set(data.removeprefix('id="data">'))
    assert len(embedded(text)["sentences"][0]["text"]) == 1_000_000


@pytest.mark.parametrize("token", HOSTILE)
def test_no_shown_token_holds_a_hidden_character(token: str) -> None:
    shown = visible_token(token)
    assert shown.strip()
    assert not re.search("[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    assert visible(shown) == shown


def test_joiners_inside_a_word_stay() -> None:
    assert visible("می\u200cخواهم") == "می\u200cخواهم"
    assert visible_token("\u200d") == "⟨U+200D⟩"


@pytest.mark.parametrize("absent", ["W", "KQ"])
def test_one_parameterization_alone(write_run: WriteRun, absent: str) -> None:
    def drop(result: Result, arrays: Arrays) -> None:
        del result["parameterizations"][absent]
        for name in [name for name in arrays if name.startswith(f"{absent}.")]:
            del arrays[name]

    text = read(write_run(drop))
    assert [one["key"] for one in embedded(text)["parameterizations"]] == [{"W": "KQ", "KQ": "W"}[absent]]
    assert f'id="card-{absent}"' not in text
    assert 'name="parameterization"' not in text


def test_infeasible_problem_shows_its_proof(write_run: WriteRun) -> None:
    folder = write_run(make_infeasible)
    text = read(folder)
    page = read_page(folder)
    shown = words(text)
    assert "The proof uses 2 sentences" in shown
    assert "No matrix separates these tokens, so there is no solution to compare with." in shown
    assert page.sentences[11].text in shown
    assert '<li value="11">' in text
    assert 'id="recheck-W"' not in text
    assert 'id="recheck-KQ"' in text
    assert "badge-infeasible" in text
    found = [chart.id for chart in charts(page)]
    assert "correlation-W" not in found
    assert "margins-W" not in found
    assert "correlation-KQ" in found


def nullify(value: Any) -> Any:
    """Return the same structure with every number, text and truth value null."""
    return {key: nullify(item) for key, item in value.items()} if isinstance(value, dict) else None


def test_every_number_may_be_null(write_run: WriteRun) -> None:
    def change(result: Result, arrays: Arrays) -> None:
        for own in result["parameterizations"].values():
            lists = {"steps": [], "selected": []} | {name: [] for name in own if name.endswith("_curve")}
            own |= nullify(own) | lists | {"norm": own["norm"], "norm_other": own["norm_other"]}
        for name in ("created", "command", "seed", "commit", "verdict", "n_queries", "n_constraints", "d_model"):
            result[name] = None
        result["data"] = nullify(result["data"])
        result["seconds"] = {"total": None}
        for row in result["sequences"]:
            row |= {"label": None, "optimal": None, "text": ""}
        arrays.clear()

    text = read(write_run(change))
    assert "This run recorded no verdict." in words(text)
    assert "nan" not in words(text).lower().split()
    assert "None" not in words(text)
    assert embedded(text)["sentences"][0]["scores"][0] is None


def test_keys_that_a_record_lacks_are_like_null(write_run: WriteRun) -> None:
    def change(result: Result, arrays: Arrays) -> None:
        keep = {"kind", "name", "parameterizations", "sequences", "schema_version"}
        for name in set(result) - keep:
            del result[name]
        result["parameterizations"] = {"W": {"norm": "fro", "norm_other": "nuc"}}

    assert "This run recorded no verdict." in words(read(write_run(change)))


@pytest.mark.parametrize("name", ["result.json", "arrays.safetensors"])
def test_missing_file_is_named(write_run: WriteRun, name: str) -> None:
    folder = write_run()
    (folder / name).unlink()
    with pytest.raises(RecordError, match=name):
        render_run(folder)
    assert not (folder / "report.html").exists()


def test_missing_folder_is_a_record_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="could not be read"):
        render_run(tmp_path / "nowhere")


def test_config_is_shown_and_may_be_absent(write_run: WriteRun) -> None:
    folder = write_run()
    assert "training.optimizer ngd" in words(read(folder))
    (folder / "config.json").unlink()
    assert "All settings" not in words(read(folder))


def _kind(result: Result, arrays: Arrays) -> None:
    result["kind"] = "sweep"


def _no_tokens(result: Result, arrays: Arrays) -> None:
    del result["sequences"][2]["tokens"]


def _other_rows(result: Result, arrays: Arrays) -> None:
    arrays["W.margins"] = arrays["W.margins"][:-1]


def _too_short(result: Result, arrays: Arrays) -> None:
    arrays["scores"] = arrays["scores"][:, :3]


def _selected(result: Result, arrays: Arrays) -> None:
    arrays["KQ.selected"] = arrays["KQ.selected"][:4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_kind, "kind"),
        (_no_tokens, r"sequences\.2\.tokens"),
        (_other_rows, r"W\.margins has shape"),
        (_too_short, "scores has shape"),
        (_selected, r"KQ\.selected has shape"),
    ],
)
def test_damaged_records_are_refused(write_run: WriteRun, change: Change, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        render_run(write_run(change))


def test_failed_write_is_a_record_error_and_leaves_nothing(write_run: WriteRun) -> None:
    folder = write_run()
    (folder / "report.html").mkdir()
    with pytest.raises(RecordError, match="could not be written"):
        render_run(folder)
    assert not list(folder.glob(".*.part"))


def test_token_values_are_those_of_the_arrays(write_run: WriteRun) -> None:
    kept: Arrays = {}
    page = read_page(write_run(lambda result, arrays: kept.update(arrays)))
    for one in page.parameterizations:
        own = {name.split(".")[1]: array for name, array in kept.items() if name.startswith(f"{one.key}.")}
        for row, (sentence, values) in enumerate(zip(page.sentences, one.values, strict=True)):
            length = len(sentence.tokens)
            assert values.selected == own["selected"][row]
            assert values.attention == pytest.approx(own["probabilities"][row, values.selected], rel=1e-3)
            assert values.smallest_margin == pytest.approx(own["margins"][row].min(), rel=1e-3)
            assert values.smallest_trained_margin == pytest.approx(own["trained_margins"][row].min(), rel=1e-3)
            assert values.support == np.flatnonzero(own["support"][row]).tolist()
            assert [v is None for v in values.margins] == np.isinf(own["margins"][row, :length]).tolist()
        assert one.certificate.n_positive_duals == own["support"].sum()
        assert one.certificate.smallest_margin == own["margins"].min()
        assert one.certificate.dual_sum == pytest.approx(own["duals"].sum())
    assert page.sentences[0].masked == [0, len(page.sentences[0].tokens) - 1]


def test_certificate_reports_a_violated_condition(write_run: WriteRun) -> None:
    def change(result: Result, arrays: Arrays) -> None:
        row, column = np.argwhere(arrays["W.duals"] > 0)[0]
        arrays["W.margins"][row, column] = 0.75

    check = read_page(write_run(change)).parameterizations[0].certificate
    assert (check.smallest_margin, check.slackness) == (0.75, 0.25)


def test_histogram_counts_every_margin_once() -> None:
    generator = np.random.default_rng(3)
    margins = np.where(generator.random((40, 9)) < 0.2, np.inf, 1 + generator.gamma(1.0, 2.0, (40, 9)))
    margins[0, 0] = 1 - 1e-9
    found = histogram(margins, margins - 0.5)
    assert found is not None
    finite = margins[np.isfinite(margins)]
    assert sum(found.solution) == sum(found.trained) == finite.size
    assert found.n_below == (finite - 0.5 < 1 - 1e-6).sum()
    assert 1.0 in found.edges
    # A margin of 1 up to rounding is not counted below 1.
    assert sum(found.solution[: found.edges.index(1.0)]) == 0
    assert found.n_overflow == (np.concatenate([finite, finite - 0.5]) > found.edges[-1]).sum() > 0


def test_histogram_of_equal_and_of_absent_margins() -> None:
    found = histogram(np.ones((2, 3)), None)
    assert found is not None
    assert sum(found.solution) == 6
    assert histogram(None, None) is None
    assert histogram(np.full((2, 2), np.inf), None) is None


def test_significant_digits() -> None:
    values = np.array([1234567.0, 0.000123456, -9.99999, 0.0, np.inf, 1e-300, 5e-324])
    expected = np.array([1235000.0, 0.0001235, -10.0, 0.0, np.inf, 1e-300, 0.0])
    np.testing.assert_allclose(significant(values), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("inf"), "–"), (0, "0"), (-0.5, "−0.500"), (12345.678, "12,346"), (2.5e-9, "2.50 × 10⁻⁹")],
)
def test_numbers_as_text(value: float | None, text: str) -> None:
    assert number(value) == text


def test_percent_never_rounds_up_to_all() -> None:
    assert percent(0.99999) == "> 99.9 %"
    assert percent(None) == "–"


def test_bounds_show_where_they_differ() -> None:
    upper, gap = 12.3456789, 3.1e-7
    digits = telling_digits(gap)
    assert number(upper, digits) != number(upper * (1 - gap), digits)


def test_charts_have_values_and_a_text_alternative(write_run: WriteRun) -> None:
    found = {chart.id: chart for chart in charts(read_page(write_run()))}
    assert set(found) == {
        *("correlation-W", "correlation-KQ", "attention-mass", "norm", "loss"),
        *("margins-W", "margins-KQ", "spectra-W", "spectra-KQ"),
    }
    for chart in found.values():
        extra = 1 if chart.kind == "bars" else 0
        assert all(len(series.x) == len(series.y) + extra for series in chart.series)
    assert "0.962 for the Frobenius solution" in found["correlation-W"].summary
    nuclear = next(series for series in found["spectra-W"].series if series.style == "nuc")
    # Rounding errors of a low-rank solution are not drawn.
    assert nuclear.y.count(None) == 18


def test_figures_draw_into_the_axes_they_are_given(write_run: WriteRun) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from attsvm.report.figures import plot_correlation, plot_margins, plot_singular_values

    page = read_page(write_run(make_infeasible))
    blocked, one = page.parameterizations
    axes = Figure().subplots(3)
    for ax, plot in zip(axes, (plot_correlation, plot_margins, plot_singular_values), strict=True):
        assert plot(one, ax=ax) is ax
        assert ax.get_legend() is not None
    shown = axes[0].get_lines()[0].get_ydata()
    np.testing.assert_allclose(shown, [value for value in one.curves.correlation if value is not None])
    assert plot_correlation(one).figure is not axes[0].figure
    with pytest.raises(InvalidInputError, match="infeasible"):
        plot_margins(blocked)
    assert issubclass(InvalidInputError, AttSVMError)


def test_tokens_that_continue_a_word_are_joined_to_it() -> None:
    assert joined_tokens("It's fine, ok", ["[CLS]", "It", "'", "s", "fine", ",", "ok", "[SEP]"]) == [2, 3, 5]
    assert joined_tokens("", ["0", "1", "2"]) == []

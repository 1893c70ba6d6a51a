from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from attsvm.data import LabelledText, read_labelled_text, read_text_column, subsample
from attsvm.data.text import hash_labelled_text
from attsvm.errors import InvalidInputError, UnsupportedError

ROWS = [("a good film", "pos"), ("a bad film", "neg"), ('said "so, so"', "neg"), ("fine", "pos")]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def write_rows(path: Path, rows: list[tuple[Any, Any]], columns: tuple[str, str] = ("text", "label")) -> Path:
    match path.suffix:
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as handle:
                csv.writer(handle).writerows([columns, *rows])
        case ".tsv":
            write(path, "".join("\t".join(map(str, row)) + "\n" for row in [columns, *rows]))
        case ".jsonl":
            write(path, "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
        case ".json":
            write(path, json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=1))
        case ".parquet":
            pyarrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            lists = zip(*rows, strict=True)
            parquet.write_table(pyarrow.table(dict(zip(columns, map(list, lists), strict=True))), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same(tmp_path: Path, suffix: str) -> None:
    data = read_labelled_text(write_rows(tmp_path / f"data{suffix}", ROWS))
    assert data.texts == tuple(text for text, _ in ROWS)
    assert data.labels == (1, -1, -1, 1)
    assert data.label_names == ("neg", "pos")
    assert data.source == str(tmp_path / f"data{suffix}")
    assert data.content_hash == hash_labelled_text(data.texts, data.labels, data.label_names)
    assert (len(data), data.counts, data.n_skipped) == (4, (2, 2), 0)


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ((0, 1), ("0", "1")),
        ((1, -1), ("-1", "1")),
        ((10, 9), ("9", "10")),
        ((1.0, 2.0), ("1", "2")),
        ((True, False), ("False", "True")),
        (("spam", "ham"), ("ham", "spam")),
        (("Yes", "No"), ("No", "Yes")),
        (("POSITIVE", "NEGATIVE"), ("NEGATIVE", "POSITIVE")),
        (("good", "bad"), ("bad", "good")),
        (("zebra", "ant"), ("ant", "zebra")),
        ((1, "0"), ("0", "1")),
    ],
)
def test_which_label_is_positive(tmp_path: Path, labels: tuple[Any, Any], order: tuple[str, str]) -> None:
    data = read_labelled_text(write_rows(tmp_path / "data.jsonl", [("x", labels[0]), ("y", labels[1])]))
    assert data.label_names == order
    assert sorted(data.labels) == [-1, 1]
    assert data.labels[0] == (1 if str(labels[0]).removesuffix(".0") == order[1] else -1)


@pytest.mark.parametrize("labels", [["a", "a"], ["a", "b", "c"], [str(number) for number in range(50)]])
def test_labels_of_one_or_three_kinds(tmp_path: Path, labels: list[str]) -> None:
    path = write_rows(tmp_path / "data.csv", [("text", label) for label in labels], ("text", "mood"))
    with pytest.raises(InvalidInputError, match=r"column 'mood' of .* exactly two different labels, got") as caught:
        read_labelled_text(path, label_column="mood")
    assert repr(labels[0]) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_rows_without_text_or_label_are_counted(tmp_path: Path) -> None:
    content = 'text,label\ngood,1\n   ,0\nbad,0\nnothing,\n\n"",1\nshort\n'
    data = read_labelled_text(write(tmp_path / "data.csv", content))
    assert (data.texts, data.n_skipped) == (("good", "bad"), 4)


def test_missing_values_of_json_and_parquet_are_skipped(tmp_path: Path) -> None:
    rows = [("good", 1.0), (None, 0.0), ("bad", 0.0), ("odd", float("nan")), ("none", None)]
    for name in ("data.jsonl", "data.parquet"):
        data = read_labelled_text(write_rows(tmp_path / name, rows))
        assert (data.texts, data.label_names, data.n_skipped) == (("good", "bad"), ("0", "1"), 3)


@pytest.mark.parametrize("content", ["text,label\n", "text,label\n,\n ,1\n"])
def test_no_usable_row(tmp_path: Path, content: str) -> None:
    with pytest.raises(InvalidInputError, match=r"at least one row"):
        read_labelled_text(write(tmp_path / "data.csv", content))


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.jsonl", "data.json"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(InvalidInputError, match="empty file"):
        read_labelled_text(write(tmp_path / name, content))


def test_columns_by_their_usual_names(tmp_path: Path) -> None:
    data = read_labelled_text(write(tmp_path / "d.csv", "id,Review,Sentiment\n1,good,pos\n2,bad,neg\n"))
    assert data.texts == ("good", "bad")


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("a,b", {}, "text_column must be given, because no column has a usual name .*the columns are 'a', 'b'"),
        ("text,review,label", {}, r"several columns have a usual name \('text', 'review'\)"),
        ("text,b", {}, "label_column must be given"),
        ("text,label", {"text_column": "body"}, "got 'body', which is not there.*'text', 'label'"),
        ("text,label", {"label_column": "text"}, "got 'text' for both"),
        ("text,text,label", {"text_column": "text"}, "which occurs twice"),
    ],
)
def test_columns_that_cannot_be_chosen(tmp_path: Path, header: str, options: dict[str, str], message: str) -> None:
    path = write(tmp_path / "d.csv", header + "\n" + ",".join("x" for _ in header.split(",")) + "\n")
    with pytest.raises(InvalidInputError, match=message):
        read_labelled_text(path, **options)


def test_many_and_long_columns_make_a_short_message(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", ",".join(f"{number}" + "x" * 1000 for number in range(500)) + "\n")
    with pytest.raises(InvalidInputError) as caught:
        read_labelled_text(path)
    assert len(str(caught.value)) < 2000


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + 'text,label\r\nschön,1\r\n"zwei\r\nZeilen",0\r\n'.encode()
    assert read_labelled_text(write(tmp_path / "d.csv", content)).texts == ("schön", "zwei\r\nZeilen")
    content = b"\xef\xbb\xbf" + "text\tlabel\r\nschön\t1\r\nzwei\t0\r\n".encode()
    data = read_labelled_text(write(tmp_path / "d.tsv", content))
    assert (data.texts, data.label_names) == (("schön", "zwei"), ("0", "1"))


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl"])
def test_bytes_that_are_not_utf8_name_the_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match=r"UTF-8 text, got byte 0xe9 at line 3.*Hint"):
        read_labelled_text(write(tmp_path / name, b"text,label\nok,1\ncaf\xe9,0\n"))


def test_semicolons(tmp_path: Path) -> None:
    assert read_labelled_text(write(tmp_path / "d.csv", "text;label\ngood, yes;1\nbad;0\n")).texts == (
        "good, yes",
        "bad",
    )


def test_tsv_keeps_quotation_marks_inside(tmp_path: Path) -> None:
    content = 'text\tlabel\na "great" film\t1\n"unclosed\t0\n"it said ""no"""\t0\n'
    data = read_labelled_text(write(tmp_path / "d.tsv", content))
    assert data.texts == ('a "great" film', '"unclosed', 'it said "no"')


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", 'text,label\nok,1\n"open,0\nmore,1\n', "at line 3.*Hint"),
        ("d.csv", "text,label\nok,1\none, two,0\n", "2 fields as its header, got 3 at line 3.*Hint"),
        ("d.tsv", "text\tlabel\nok\t1\tx\n", "got 3 at line 2"),
        ("d.jsonl", '{"text": "a", "label": 1}\n\n{"text": \n', "at line 3"),
        ("d.jsonl", '{"text": "a", "label": 1}\n[1, 2]\n', "got list at line 2"),
        ("d.jsonl", "[" * 100_000 + "\n", "at line 1|line 1, which cannot be read"),
        ("d.json", '[{"text": "a", "label": 1}, 3]', "got int at item 2"),
        ("d.jsonl", '{"text": 5, "label": 1}\n', "text column must hold text, got int at line 1"),
        ("d.jsonl", '{"text": "a", "label": {"x": 1}}\n', "label column must hold .*got dict at line 1"),
        ("d.parquet", "no parquet at all", "must be a Parquet file"),
        ("d.parquet", "", "must be a Parquet file"),
        ("d.txt", "text", "must end in .csv, .tsv"),
        ("d", "text", "must end in"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(InvalidInputError, match=message) as caught:
        read_labelled_text(write(tmp_path / name, content))
    assert len(str(caught.value)) < 600
    assert str(caught.value).startswith("read_labelled_text: ")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InvalidInputError, match="is a directory"):
        read_labelled_text(tmp_path / "folder.csv")
    with pytest.raises(InvalidInputError, match="does not exist"):
        read_labelled_text(str(tmp_path / "absent.csv"))
    with pytest.raises(InvalidInputError, match="readable"):
        read_labelled_text(tmp_path / ("x" * 5000 + ".csv"))
    with pytest.raises(InvalidInputError):
        read_labelled_text(tmp_path / "nul\0.csv")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InvalidInputError, match=r"must be readable.*Permission denied"):
        read_labelled_text(write(tmp_path / "d.csv", "text,label\n"))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'attsvm\[hf\]'"):
        read_labelled_text(write(tmp_path / "d.parquet", b"PAR1"))


HOSTILE = [
    "x" * 1_000_000,
    "a\x00b\x07c\x1b[31m",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd",
    "<script>alert('x')</script>",
    "=cmd|' /C calc'!A0",
    "\u2028 separators \u0085 inside \u000b",
    "👩‍👩‍👧 e\u0301",
]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".tsv", ".parquet"])
def test_hostile_text_comes_through_unchanged(tmp_path: Path, suffix: str) -> None:
    before = csv.field_size_limit()
    rows = [(text, index % 2) for index, text in enumerate(HOSTILE)]
    assert read_labelled_text(write_rows(tmp_path / f"d{suffix}", rows)).texts == tuple(t.strip() for t in HOSTILE)
    assert csv.field_size_limit() == before


def test_half_surrogates_are_replaced(tmp_path: Path) -> None:
    content = '{"text": "a\\ud800b", "label": 1}\n{"text": "\\ud83d\\ude00", "label": 0}\n'
    assert read_labelled_text(write(tmp_path / "d.jsonl", content)).texts == ("a\ufffdb", "😀")


def labelled(labels: list[int]) -> LabelledText:
    texts = tuple(f"text {index}" for index in range(len(labels)))
    names = ("neg", "pos")
    return LabelledText(
        texts=texts,
        labels=tuple(labels),
        label_names=names,
        source="test",
        content_hash=hash_labelled_text(texts, labels, names),
    )


@pytest.mark.parametrize(
    ("counts", "n", "expected"),
    [
        ((50, 50), 20, (10, 10)),
        ((50, 50), 21, (10, 11)),
        ((3, 50), 20, (3, 17)),
        ((50, 3), 20, (17, 3)),
        ((5, 5), 2, (1, 1)),
    ],
)
def test_subsample_is_balanced(counts: tuple[int, int], n: int, expected: tuple[int, int]) -> None:
    drawn = subsample(labelled([-1] * counts[0] + [1] * counts[1]), n, seed=3)
    assert drawn.counts == expected
    assert list(drawn.texts) == sorted(drawn.texts, key=lambda text: int(text.split()[1]))
    assert len(set(drawn.texts)) == n


def test_subsample_is_seeded_and_nested() -> None:
    data = labelled([-1, 1] * 50)
    assert subsample(data, 10, seed=1) == subsample(data, 10, seed=1)
    assert subsample(data, 10, seed=1).texts != subsample(data, 10, seed=2).texts
    assert set(subsample(data, 10, seed=1).texts) < set(subsample(data, 20, seed=1).texts)
    assert subsample(data, 10, seed=1).content_hash != data.content_hash


def test_subsample_takes_all_there_is() -> None:
    data = labelled([-1, 1, 1])
    assert subsample(data, 3) is data
    assert subsample(data, 1000) is data
    with pytest.raises(InvalidInputError, match="n must be at least 2"):
        subsample(data, 1)


def test_the_hash_depends_on_everything_but_the_source() -> None:
    base = hash_labelled_text(["a", "b"], [1, -1], ("n", "p"))
    assert base == hash_labelled_text(("a", "b"), (1, -1), ("n", "p"))
    others = [(["ab", ""], [1, -1], ("n", "p")), (["a", "b"], [-1, 1], ("n", "p")), (["a", "b"], [1, -1], ("p", "n"))]
    assert len({base, *(hash_labelled_text(*other) for other in others)}) == 4


def test_texts_without_labels(tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    file.write_text('text,other\n"a, b",1\n  ,2\nc,3\n', encoding="utf-8")
    assert read_text_column(file) == ("a, b", "c")
    assert read_text_column(file, text_column="other") == ("1", "2", "3")
    with pytest.raises(InvalidInputError, match=r"text_column must name one column of the file, got 'body'"):
        read_text_column(file, text_column="body")
    file.write_text("text\n\n  \n", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="at least one text that is not empty"):
        read_text_column(file)

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attsvm.data import LabelledArrays, LabelledText, load_data
from attsvm.errors import InvalidInputError


def test_nothing_means_the_sample() -> None:
    data = load_data()
    assert isinstance(data, LabelledText)
    assert len(data) == 1000


def test_the_suffix_picks_the_reader(tmp_path: Path) -> None:
    (tmp_path / "a.CSV").write_text("body,mood\ngood,1\nbad,0\n", encoding="utf-8")
    assert isinstance(load_data(tmp_path / "a.CSV", text_column="body", label_column="mood"), LabelledText)
    np.savez(tmp_path / "a.npz", X=np.zeros((2, 3, 4)), y=np.array([1, -1]))
    assert isinstance(load_data(str(tmp_path / "a.npz")), LabelledArrays)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x", encoding="utf-8")
    with pytest.raises(
        InvalidInputError, match=r"load_data: path must end in .csv, .tsv.*\.npz, \.safetensors, got 'a.xlsx'"
    ):
        load_data(tmp_path / "a.xlsx")
    with pytest.raises(InvalidInputError, match="is a directory"):
        load_data(tmp_path)
    with pytest.raises(InvalidInputError, match="does not exist"):
        load_data(tmp_path / "b.csv")


@pytest.mark.parametrize("source", [None, "a.npz"])
def test_columns_where_there_are_none(source: Any) -> None:
    with pytest.raises(InvalidInputError, match="without column names, got text_column 'body'"):
        load_data(source, text_column="body")

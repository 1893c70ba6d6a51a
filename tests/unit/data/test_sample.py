from __future__ import annotations

import hashlib
from importlib import resources

import pytest

from attsvm.data import load_sample, sample_names
from attsvm.errors import InvalidInputError

FOLDER = resources.files("attsvm.data") / "samples"


def test_the_sample_is_what_its_readme_says() -> None:
    data = load_sample()
    assert data.counts == (500, 500)
    assert data.label_names == ("negative", "positive")
    assert data.source == "sample movie-reviews"
    assert data.n_skipped == 0
    assert len({text.casefold() for text in data.texts}) == 1000
    assert all(5 <= len(text.split()) <= 40 and text.isprintable() and '"' not in text for text in data.texts)
    digest = hashlib.sha256((FOLDER / "movie-reviews.tsv").read_bytes()).hexdigest()
    assert digest in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_licence_and_citation_ship_with_it() -> None:
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    for part in ("The MIT License (MIT)", "Copyright (c) 2014 cjhutto", "WITHOUT WARRANTY", "Hutto, C.J. & Gilbert"):
        assert part in notice


def test_unknown_name_lists_the_names() -> None:
    assert sample_names() == ("movie-reviews",)
    for name in ("films", "../movie-reviews", ""):
        with pytest.raises(InvalidInputError, match="one of movie-reviews, got"):
            load_sample(name)

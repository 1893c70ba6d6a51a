"""How often heads select the same key."""

from __future__ import annotations

import numpy as np
import pytest

from attsvm.errors import InvalidInputError
from attsvm.microscope.similarity import agreement


def test_against_a_loop() -> None:
    generator = np.random.default_rng(3)
    selected = generator.integers(-1, 4, size=(6, 50))
    found = agreement(selected)
    for g in range(6):
        for h in range(6):
            both = [(a, b) for a, b in zip(selected[g], selected[h], strict=True) if a >= 0 and b >= 0]
            assert found[g, h] == pytest.approx(sum(a == b for a, b in both) / len(both), abs=1e-7)
    assert found.dtype == np.float32


def test_the_same_and_the_opposite() -> None:
    found = agreement(np.array([[0, 1, 2], [0, 1, 2], [1, 2, 0]], dtype=np.int32))
    assert found.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_heads_without_a_common_query_are_not_compared() -> None:
    found = agreement([[0, -1, -1], [-1, 2, -1], [-1, -1, -1]])
    assert found[0, 0] == found[1, 1] == 1
    assert np.isnan(found[0, 1])
    assert np.isnan(found[2]).all()


def test_no_query_and_no_head() -> None:
    assert np.isnan(agreement(np.zeros((2, 0), dtype=np.int64))).all()
    assert agreement(np.zeros((0, 3), dtype=np.int64)).shape == (0, 0)


@pytest.mark.parametrize("bad", [[0, 1], [[0.5, 1.0]], [[True, False]]])
def test_what_is_no_list_of_keys_is_refused(bad: object) -> None:
    with pytest.raises(InvalidInputError, match="whole numbers"):
        agreement(bad)  # type: ignore[arg-type]

"""Each layer of a trained stack and the SVM of its own selections."""

from __future__ import annotations

import pytest

from unit.experiments.recipes.trials import full, number

pytestmark = pytest.mark.slow


def test_residual_stacks_are_max_margin_layer_by_layer() -> None:
    """Fifty stacks each: the queries in use are separated with maximal margin, and chance does not do that."""
    records, summary = full("depth", ["1 layer", "layers, plain", "layers, residual"])
    assert number(summary, "1 layer: correlation").verdict == "met"
    for depth in (2, 4):
        smallest = number(summary, f"{depth} layers, residual: smallest").ours
        assert smallest is not None
        assert smallest > 0.95
    for one in records:
        if one["case"].endswith("layers, residual"):
            assert set(one["used_status"]) == {"optimal"}
    rows = [row for row in summary.tables[0].rows if str(row[0]).endswith("layers, residual")]
    for row in rows:
        used, used_error, null, null_error = row[3:7]
        for value in (used, used_error, null, null_error):
            assert isinstance(value, float)
        assert used - 10 * used_error > null + 10 * null_error

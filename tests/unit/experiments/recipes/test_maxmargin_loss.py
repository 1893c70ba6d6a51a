from __future__ import annotations

import pytest

from attsvm.experiments.recipes.maxmargin_loss import RECIPE

from .trials import check_page, run_cases


def test_published_paths_and_their_common_limit() -> None:
    records = run_cases(RECIPE, 1)
    summary = check_page(RECIPE, records)
    assert [n.text for n in summary.numbers if n.verdict == "differs"] == []
    assert all(r["best"] for r in records)
    for record in records:
        assert record["direction"] == pytest.approx([1.0, 0.0], abs=1e-9)
    # The correlation loss pulls towards the larger score, the two others away from it.
    seconds = {r["case"]: r["read"][-1][1] for r in records}
    assert seconds["correlation"] > 0 > seconds["logistic"]
    assert seconds["exponential"] < 0

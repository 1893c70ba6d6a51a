from __future__ import annotations

import torch

from attsvm.experiments.recipes.maxmargin_multi import RECIPE, draw_tokens

from .trials import check_page, number, run_cases


def test_published_draw_and_another() -> None:
    records = run_cases(RECIPE, 2)
    summary = check_page(RECIPE, records)
    assert [n.text for n in summary.numbers if n.verdict == "differs"] == []
    assert number(summary, "half squared norm with the score").published == 0.31319
    assert all(record["ngd"]["best"] for record in records)


def test_tokens_of_other_sizes() -> None:
    tokens = draw_tokens(3, n=2, T=4, noise=0.0)
    assert tokens.shape == (2, 4, 3)
    expected = torch.tensor([[1.0, 0.0, 1.0], [-1.0, 1.0, 0.5], [-0.5, -0.5, 0.5], [-0.5, -0.5, 0.5]])
    torch.testing.assert_close(tokens[0], expected.double())

"""The condition on the first gradient does what the theorem says, for every loss that the theorem allows."""

from __future__ import annotations

import pytest

from attsvm import descend
from attsvm.dynamics.conditions import first_gradient_separates
from attsvm.experiments.recipes.draws import draw_unit_sphere
from attsvm.selection import TokenSelection

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("loss", ["logistic", "exponential", "correlation"])
def test_a_separating_first_gradient_leads_to_the_optimum(loss: str) -> None:
    draws = draw_unit_sphere(range(500), n=4, T=6, d=8)
    holds = first_gradient_separates(draws.problem(), draws.scores, loss=loss) > 0
    places = holds.nonzero()[:, 0]
    assert len(places) > 60
    scores = draws.scores[places]
    problem = TokenSelection(draws.tokens[places], draws.queries[places], draws.optimal[places])
    start = descend(problem, scores, loss=loss, learning_rate=20.0, steps=1).W[:, -1]
    run = descend(problem, scores, loss=loss, init=start, steps=2000)
    assert bool((run.selected[..., 0] == draws.optimal[places]).all())

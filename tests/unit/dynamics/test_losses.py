"""The table of losses, as it is documented."""

from __future__ import annotations

import math

import pytest
import torch

from attsvm.dynamics.losses import LOSSES, find_loss
from attsvm.errors import InvalidInputError

TABLE = {
    "logistic": (lambda u: math.log1p(math.exp(-u)), lambda u: -1.0 / (1.0 + math.exp(u))),
    "exponential": (lambda u: math.exp(-u), lambda u: -math.exp(-u)),
    "correlation": (lambda u: -u, lambda u: -1.0),
}


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("u", [-30.0, -2.5, -0.1, 0.0, 0.7, 3.0, 40.0])
def test_values_and_slopes_are_those_of_the_table(name: str, u: float) -> None:
    value, slope = TABLE[name]
    loss, at = LOSSES[name], torch.tensor(u, dtype=torch.float64)
    assert loss.name == name
    assert float(loss.value(at)) == pytest.approx(value(u), rel=1e-13)
    assert float(loss.slope(at)) == pytest.approx(slope(u), rel=1e-13)


def test_the_table_is_complete() -> None:
    assert set(LOSSES) == set(TABLE)
    assert find_loss("logistic", where="here") is LOSSES["logistic"]
    with pytest.raises(InvalidInputError, match=r"here: loss must be one of logistic, exponential, correlation, got"):
        find_loss("hinge", where="here")


def test_the_logistic_loss_does_not_overflow() -> None:
    far = torch.tensor([-800.0, 800.0], dtype=torch.float64)
    assert LOSSES["logistic"].value(far).tolist() == [800.0, 0.0]
    torch.testing.assert_close(LOSSES["logistic"].slope(far), torch.tensor([-1.0, 0.0], dtype=torch.float64))

"""The table of losses, as it is documented."""

from __future__ import annotations

import math

import pytest
import torch

from attsvm.dynamics.losses import LOSSES, Output, find_loss
from attsvm.errors import InvalidInputError

TABLE = {
    "logistic": (lambda u: math.log1p(math.exp(-u)), lambda u: -1.0 / (1.0 + math.exp(u))),
    "exponential": (lambda u: math.exp(-u), lambda u: -math.exp(-u)),
    "correlation": (lambda u: -u, lambda u: -1.0),
    "squared": (lambda u: (1.0 - u) ** 2, lambda u: -2.0 * (1.0 - u)),
    "log": (lambda u: -math.log(u), lambda u: -1.0 / u),
}


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("u", [-30.0, -2.5, -0.1, 0.0, 0.7, 3.0, 40.0])
def test_values_and_slopes_are_those_of_the_table(name: str, u: float) -> None:
    if name == "log" and u <= 0:
        pytest.skip("outside the domain")
    value, slope = TABLE[name]
    loss, at = LOSSES[name], torch.tensor(u, dtype=torch.float64)
    assert loss.name == name
    assert float(loss.value(at)) == pytest.approx(value(u), rel=1e-13)
    assert float(loss.slope(at)) == pytest.approx(slope(u), rel=1e-13)


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("u", [-30.0, -0.1, 0.0, 0.7, 3.0, 40.0])
def test_logarithms_of_slopes_and_gaps_agree_with_slopes_and_values(name: str, u: float) -> None:
    loss, at = LOSSES[name], torch.tensor(u, dtype=torch.float64)
    if name == "log" and u <= 0:
        pytest.skip("outside the domain")
    sign, log_size = loss.log_slope(Output(at))
    torch.testing.assert_close(sign * log_size.exp(), loss.slope(at), rtol=1e-13, atol=0)
    drop = torch.tensor(0.25, dtype=torch.float64)
    expected = loss.value(at - drop) - loss.value(at)
    torch.testing.assert_close(loss.gap(at, drop), expected, rtol=1e-9, atol=1e-15 * float(loss.value(at).abs()))
    tiny = torch.tensor(1e-30, dtype=torch.float64)
    torch.testing.assert_close(loss.gap(at, tiny), -loss.slope(at) * tiny, rtol=1e-12, atol=1e-300)


def test_the_squared_loss_keeps_a_slope_that_its_output_no_longer_holds() -> None:
    """With a score of 1 the slope is minus twice the drop, of any size."""
    one = torch.ones((), dtype=torch.float64)
    for own in (one, one + 4.4e-16):
        sign, log_size = LOSSES["squared"].log_slope(Output(own - 1e-300, own, one, torch.tensor(-2000.0).double()))
        assert float(sign) == -1.0
        assert float(log_size) == pytest.approx(math.log(2.0) - 2000.0)


@pytest.mark.parametrize("name", list(LOSSES))
def test_bounds_hold_on_the_interval(name: str) -> None:
    low, high = torch.tensor(0.5).double(), torch.tensor(2.5).double()
    u = torch.linspace(0.5, 2.5, 401, dtype=torch.float64)
    slopes = LOSSES[name].slope(u)
    M0, M1 = LOSSES[name].bounds(low, high)
    assert float(slopes.abs().max()) <= float(M1) * (1 + 1e-12)
    assert float((slopes.diff() / u.diff()).abs().max()) <= float(M0) * (1 + 1e-9) + 1e-12


def test_the_table_is_complete() -> None:
    assert set(LOSSES) == set(TABLE)
    assert find_loss("logistic", where="here") is LOSSES["logistic"]
    with pytest.raises(InvalidInputError, match=r"here: loss must be one of logistic, .*, squared, log, got"):
        find_loss("hinge", where="here")


def test_the_logistic_loss_does_not_overflow() -> None:
    far = torch.tensor([-800.0, 800.0], dtype=torch.float64)
    assert LOSSES["logistic"].value(far).tolist() == [800.0, 0.0]
    torch.testing.assert_close(LOSSES["logistic"].slope(far), torch.tensor([-1.0, 0.0], dtype=torch.float64))

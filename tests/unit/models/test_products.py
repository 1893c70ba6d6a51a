"""Quick products are products, for as long as they are wanted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attsvm.models.products import quick_products


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_differ_by_rounding(rows: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 1024, bias=bias, dtype=dtype)
    x = torch.randn(2, rows, 512, dtype=dtype)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
    with torch.no_grad(), quick_products(layer):
        found = layer(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_model_is_what_it_was_afterwards() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2**18), nn.Tanh(), nn.Linear(2**18, 2))
    before, keys = [dict(part.__dict__) for part in model], list(model.state_dict())
    with quick_products(model):
        assert list(model.state_dict()) == keys
    with pytest.raises(ZeroDivisionError), quick_products(model):
        _ = 1 / 0
    assert [part.__dict__.keys() for part in model] == [one.keys() for one in before]
    x = torch.randn(3, 4)
    with quick_products(model):
        inside = model(x)  # with gradients, as ever
    inside.sum().backward()
    torch.testing.assert_close(inside, model(x), rtol=0.0, atol=0.0)
    assert model[0].weight.grad is not None


def test_hooks_and_other_kinds_of_linear_stay() -> None:
    class Twice(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(input)

    torch.manual_seed(0)
    layer, twice, x = nn.Linear(512, 1024), Twice(512, 1024), torch.randn(1, 512)
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        wanted = twice(x)
        with quick_products(nn.Sequential(layer, twice)):
            layer(x)
            torch.testing.assert_close(twice(x), wanted, rtol=0.0, atol=0.0)
    assert calls == [1]

"""Quick products of tokens with the weights of a model, for generation on a CPU in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

__all__ = ["quick_products"]

_NUMBERS = 2**19
"""A call of oneDNN takes some 15 microseconds before it begins, which smaller matrices do not make up for."""


@contextmanager
def quick_products(model: nn.Module) -> Iterator[None]:
    """Multiply tokens by weights with the kernels of oneDNN, inside a ``with`` block that records no gradient.

    Parameters
    ----------
    model
        Its ``nn.Linear`` modules with large matrices in float32 on a CPU are meant; others stay as they are.

    Notes
    -----
    torch multiplies float32 matrices with the BLAS it was built with. That is good for many rows, but for one or a few,
    where reading the weights is all the work, the kernels of oneDNN (which torch has too, and uses where it compiles a
    model) come nearer to the speed of the memory. Sums are taken in another order, so that results differ by
    rounding. Without oneDNN nothing changes.
    """
    changed: list[nn.Linear] = []
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        changed = [module for module in model.modules() if isinstance(module, nn.Linear) and _is_meant(module)]
    for module in changed:
        setattr(module, "forward", partial(_product, module))  # noqa: B010
    try:
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _is_meant(module: nn.Linear) -> bool:
    # No subclass, and nothing that somebody else has put in place of the method.
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    weight = module.weight
    return (
        type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.numel() >= _NUMBERS
    )


def _product(module: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if x.dtype != torch.float32 or torch.is_grad_enabled() or not torch.backends.mkldnn.enabled:
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product

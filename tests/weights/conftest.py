"""transformers, quiet and exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMS normalisation of transformers goes by float32 even in float64, which would hide what is compared."""
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    def forward(self: Any, x: Tensor) -> Tensor:
        result: Tensor = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
        return result

    for norm in (LlamaRMSNorm, T5LayerNorm):
        monkeypatch.setattr(norm, "forward", forward)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers = pytest.importorskip("transformers")
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)

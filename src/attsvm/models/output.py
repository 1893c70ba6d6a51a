"""What every model returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ModelOutput"]


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """Result of one forward pass over B sequences of T tokens.

    Parameters
    ----------
    hidden
        Last hidden states (B, T, d_model), after the final normalisation.
    logits
        (B, T, d_vocab), or whatever the head of the model makes of ``hidden``; None if it has no head.
    weights
        None unless asked for. Else, under ``"encoder"``, ``"decoder"`` and ``"cross"`` as far as the model has them,
        one attention pattern (B, H, q, k) per layer; rows are queries.
    pooled
        One vector (B, d_model) per sequence, of the models that make one.
    """

    hidden: Tensor
    logits: Tensor | None = None
    weights: dict[str, list[Tensor]] | None = None
    pooled: Tensor | None = None

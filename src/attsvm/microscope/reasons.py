"""Why a model cannot be inspected, in one sentence, and what to do instead."""

from __future__ import annotations

from torch import nn

__all__ = ["REASONS", "is_unsupported", "why_unsupported"]

_SPARSE = "whose attention looks at windows of the text in shapes of its own, not at queries x keys"
_WINDOWS = "whose attention cuts its inputs into windows and puts these in the place of the batch"
_STATES = "which has no attention: it passes states from token to token"
REASONS = {
    "longformer": _SPARSE,
    "led": _SPARSE,
    "big_bird": _SPARSE,
    "bigbird_pegasus": _SPARSE,
    "reformer": "whose attention sorts tokens into buckets",
    "mra": _SPARSE,
    "yoso": "whose attention is estimated by hashing",
    "nystromformer": "whose attention is a product of three smaller ones",
    "xlnet": "whose attention has two streams and relative terms outside the attention interface",
    "funnel": "whose attention pools its queries between layers outside the attention interface",
    "fnet": "which has no attention: it mixes tokens by Fourier transforms",
    "convbert": "whose heads are partly convolutions",
    "deberta": "whose attention is outside the attention interface (its successor deberta-v2 is read by hooks)",
    "mamba": _STATES,
    "mamba2": _STATES,
    "falcon_mamba": _STATES,
    "rwkv": _STATES,
    "xlstm": _STATES,
}
"""Families of transformers whose attention cannot be read, and what about it."""


def is_unsupported(model: nn.Module) -> bool:
    """Whether the family of a model is one of :data:`REASONS`; some of its attention may be readable all the same."""
    return _family(model) in REASONS


def why_unsupported(model: nn.Module, *, windows: bool = False) -> str:
    """One sentence: which model, what about its attention (it may be cut in windows), and the way out."""
    family = _family(model)
    none = "which has no attention that goes through transformers' attention interface"
    reason = REASONS.get(family, _WINDOWS if windows else none)
    return (
        f"attention_modules: model must have attention that can be read, got {family}, {reason}. "
        "Hint: if it returns its attentions, give them to from_attentions(attentions, tokens)."
    )


def _family(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__)

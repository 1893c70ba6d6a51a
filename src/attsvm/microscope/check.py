"""Whether what was heard is what the model computes: weights from captured calls against the model's eager ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attsvm.errors import InvalidInputError
from attsvm.microscope.calls import AttentionCall
from attsvm.microscope.capture import attention_modules, captured
from attsvm.microscope.interface import eager
from attsvm.microscope.listening import evaluating, run_name

__all__ = ["TOLERANCE", "Check", "check_against_eager"]

TOLERANCE = 1e-5
"""Largest difference between two float32 computations of the same weights that is called rounding."""


@dataclass(frozen=True)
class Check:
    """How far captured attention is from the model's own eager attention.

    Attributes
    ----------
    max_difference
        Largest difference of two weights.
    module
        The module where it is.
    n_rows
        Queries compared, over all heads; those that may attend to nothing are left out.
    compared
        Whether every module could be compared.
    note
        A sentence.
    """

    max_difference: float
    module: str
    n_rows: int
    compared: bool
    note: str


def check_against_eager(model: nn.Module, inputs: Mapping[str, Any]) -> Check:
    """Compare the weights that captured calls give with those of the model's eager attention.

    The model runs twice: with eager attention, where its modules put out their weights, and as it is, captured.

    Parameters
    ----------
    model
        A transformers model.
    inputs
        Keyword arguments of its forward pass; a small batch, as all weights of the first run are kept.

    Returns
    -------
    Check
        The largest difference. Beyond :data:`TOLERANCE` the note names the module.

    Raises
    ------
    InvalidInputError
        If queries or keys are not finite.
    """
    infos = {info.name for info in attention_modules(model)}
    given = {**inputs, "output_attentions": True}
    with torch.no_grad(), evaluating(model):
        with eager(model), _same_hooks(model), _own_weights(model, infos) as own:
            model(**given)
        comparison = _Comparison(own)
        with captured(model, comparison.add):
            model(**inputs)
    return comparison.result(infos)


_RECORDS = "_output_capturing_hooks_installed"
"""Set by transformers on a model that it has given its own hooks, which record what ``output_attentions`` asks for."""


@contextmanager
def _same_hooks(model: nn.Module) -> Iterator[None]:
    """Take away the hooks that transformers leaves on a model when it is first asked for its attentions."""
    had = hasattr(model, _RECORDS)
    before = [(module, set(module._forward_hooks)) for module in model.modules()]
    try:
        yield
    finally:
        for module, known in before:
            for key in set(module._forward_hooks) - known:
                del module._forward_hooks[key]
        if not had and hasattr(model, _RECORDS):
            delattr(model, _RECORDS)


@contextmanager
def _own_weights(model: nn.Module, infos: set[str]) -> Iterator[dict[str, Tensor]]:
    """The weights that each attention module puts out beside its result."""
    own: dict[str, Tensor] = {}
    runs: Counter[str] = Counter()

    def note(name: str, output: Any) -> None:
        run = run_name(name, runs[name])
        runs[name] += 1
        parts = output[1:] if isinstance(output, tuple) else ()
        # The last one: T5 puts out its bias, too.
        weights = next((part for part in reversed(parts) if isinstance(part, Tensor) and part.ndim == 4), None)
        if run in infos and weights is not None:
            own[run] = weights

    names = {name.partition("@")[0] for name in infos}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name in names
    ]
    try:
        yield own
    finally:
        for handle in handles:
            handle.remove()


class _Comparison:
    """The largest difference so far."""

    def __init__(self, own: dict[str, Tensor]) -> None:
        self.own = own
        self.done: set[str] = set()
        self.largest, self.module, self.n_rows = 0.0, "", 0
        self.exact = True

    def add(self, call: AttentionCall) -> None:
        theirs = self.own.pop(call.info.name, None)
        if not bool(torch.isfinite(call.q).all() and torch.isfinite(call.k).all()):
            raise InvalidInputError(
                "check_against_eager: model must give finite queries and keys, got NaN or infinity in "
                f"{call.info.name}. Hint: look for such numbers in its weights."
            )
        ours = call.weights()
        if theirs is None or theirs.shape != ours.shape:
            return
        self.done.add(call.info.name)
        self.exact &= theirs.dtype in (torch.float32, torch.float64)
        # A query that may attend to nothing has equal weights in eager attention and none here.
        rows = ours.sum(-1) > 0
        difference = (ours - theirs.to(ours.dtype)).abs().amax(-1)[rows]
        self.n_rows += int(rows.sum())
        worst = float(difference.max()) if len(difference) else 0.0
        if not self.module or not worst <= self.largest:
            self.largest, self.module = worst, call.info.name

    def result(self, infos: set[str]) -> Check:
        missing = sorted(infos - self.done)
        if missing:
            note = f"{len(missing)} of {len(infos)} modules put out no weights to compare with, such as {missing[0]}."
        elif self.largest <= TOLERANCE:
            note = f"Captured attention is the model's eager attention to {self.largest:.1e}."
        elif not self.exact:
            note = f"Captured attention differs by {self.largest:.1e} from weights that the model rounds to 16 bits."
        else:
            note = (
                f"Captured attention differs by {self.largest:.1e} from the model's eager attention in {self.module}."
            )
        return Check(self.largest, self.module, self.n_rows, not missing, note)

"""What can be inspected in a model, what cannot and why, and how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attsvm.errors import InvalidInputError
from attsvm.microscope.calls import AttentionCall, ModuleInfo, Tier
from attsvm.microscope.capture import attention_modules, captured, working_inputs
from attsvm.microscope.listening import evaluating
from attsvm.microscope.residual import residual_heads

__all__ = ["Inspectable", "InspectableModule", "describe"]

_BLOCK = 64 * 1024**2  # bytes of weights that the measures look at in one go
_STATES = 16  # numbers per token, position of d_model and module that a forward pass has in use at once, about


@dataclass(frozen=True, kw_only=True)
class InspectableModule:
    """What can be said about one attention module.

    Attributes
    ----------
    info
        The module.
    residual
        None where its heads are matrices of the hidden states; else why they are not.
    terms
        What its logits have beside products of queries and keys: ``"offsets"``, ``"sinks"``, ``"soft cap"``.
    """

    info: ModuleInfo
    residual: str | None
    terms: tuple[str, ...]

    @property
    def spaces(self) -> tuple[str, ...]:
        """Spaces in which max-margin problems can be posed."""
        return ("score",) if self.residual else ("score", "residual")


@dataclass(frozen=True, kw_only=True)
class Inspectable:
    """What can be inspected in a model.

    Attributes
    ----------
    family
        The model type in its configuration.
    modules
        Its attention modules, in the order in which it runs them.
    tier
        How they are heard.
    n_parameters
        Numbers in the model.
    parameter_bytes
        Memory that they take.
    d_model
        Width of its hidden states.
    notes
        Sentences on what to know before reading numbers of this model.
    """

    family: str
    modules: tuple[InspectableModule, ...]
    tier: Tier
    n_parameters: int
    parameter_bytes: int
    d_model: int
    notes: tuple[str, ...]

    @property
    def n_heads(self) -> int:
        """Heads of all modules."""
        return sum(module.info.n_heads for module in self.modules)

    def memory_bytes(self, batch_size: int, n_tokens: int) -> int:
        """Memory for a batch, about: parameters, hidden states, and the weights of one module at a time.

        Parameters
        ----------
        batch_size
            Texts in a batch.
        n_tokens
            Tokens of the longest.

        Returns
        -------
        int
            An upper estimate for float32, without what Python and its libraries take.
        """
        if batch_size < 1 or n_tokens < 1:
            raise InvalidInputError(
                f"memory_bytes: batch_size and n_tokens must be at least 1, got {batch_size} and {n_tokens}."
            )
        widest = max(module.info.n_heads for module in self.modules)
        states = 4 * _STATES * batch_size * n_tokens * self.d_model
        # Scores, weights and their sum with a mask, of a model that computes eager attention.
        eager = 3 * 4 * batch_size * widest * n_tokens**2
        return self.parameter_bytes + states + eager + _BLOCK


def describe(model: nn.Module) -> Inspectable:
    """What can be inspected in a model.

    Parameters
    ----------
    model
        A transformers model; it is run on a few tokens and left as it is.

    Returns
    -------
    Inspectable
        Its attention modules with the spaces that each has, and notes.

    Raises
    ------
    UnsupportedError
        If nothing can be inspected; the message says why and what to do.
    """
    infos = attention_modules(model)
    terms: dict[str, tuple[str, ...]] = {}

    def heard(call: AttentionCall) -> None:
        terms[call.info.name] = _terms(call)

    with torch.no_grad(), evaluating(model), captured(model, heard):
        model(**working_inputs(model))
    modules = []
    for info in infos:
        found = residual_heads(model, info)
        reason = found if isinstance(found, str) else None
        modules.append(InspectableModule(info=info, residual=reason, terms=terms.get(info.name, ())))
    parameters = list(model.parameters())
    return Inspectable(
        family=str(getattr(getattr(model, "config", None), "model_type", type(model).__name__)),
        modules=tuple(modules),
        tier=infos[0].tier,
        n_parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        d_model=_width(model, infos),
        notes=tuple(_notes(model, modules)),
    )


def _terms(call: AttentionCall) -> tuple[str, ...]:
    parts: dict[str, Any] = {"offsets": call.offsets, "sinks": call.sinks, "soft cap": call.softcap}
    return tuple(name for name, part in parts.items() if part is not None)


def _width(model: nn.Module, infos: list[ModuleInfo]) -> int:
    sizes = getattr(getattr(model, "config", None), "hidden_size", None)
    return int(sizes) if isinstance(sizes, int) else max(info.n_heads * info.d_head for info in infos)


def _notes(model: nn.Module, modules: list[InspectableModule]) -> list[str]:
    """What a reader of the numbers has to know."""
    notes = []
    reasons = {module.residual for module in modules if module.residual}
    if reasons:
        notes.append(f"Max-margin problems of this model are posed in score space: {'; '.join(sorted(reasons))}.")
    if any("offsets" in module.terms for module in modules):
        notes.append("Logits have terms that depend on the two positions; they go in as fixed offsets.")
    if any("sinks" in module.terms for module in modules):
        notes.append("Each head has a sink, a key of fixed score without a token; its weight is no token's.")
    if any("soft cap" in module.terms for module in modules):
        notes.append("Logits are capped by a tanh; margins are those after the cap.")
    if any("@" in module.info.name for module in modules):
        notes.append("Layers share their parameters: one module is run several times.")
    if {"input_ids", "pixel_values"} <= working_inputs(model).keys():
        notes.append("This model has a tower for text and one for pictures: inspect one of them at a time.")
    silent = _silent(model, {module.info.name.partition("@")[0] for module in modules})
    if silent:
        notes.append(f"Not everything that looks like attention was heard: {silent[0]} ({len(silent)} in all).")
    return notes


def _silent(model: nn.Module, heard: set[str]) -> list[str]:
    """Modules with a class named attention that neither are, nor contain, nor are part of what was heard."""
    named = [name for name, module in model.named_modules() if type(module).__name__.endswith("Attention")]
    return [name for name in named if not any(_overlap(name, other) for other in heard)]


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")

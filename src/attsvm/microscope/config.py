"""The settings of ``attsvm inspect``, checked once at the border."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attsvm.errors import InvalidInputError
from attsvm.microscope.calls import ModuleInfo

__all__ = ["InspectConfig", "chosen_heads"]


class InspectConfig(BaseModel):
    """Settings of an inspection; a run folder keeps them in ``config.json``.

    Attributes
    ----------
    layers
        Layers to look at, counted within each kind; None for all.
    heads
        Labels such as ``"L5.H3"`` or ``"cross.L0.H2"``; None for all heads of the layers.
    max_tokens
        Longer texts are cut in windows of this length; None for what the model takes.
    special
        ``"keep"``, or ``"drop"`` special tokens as queries and keys of the measures and problems.
    batch_size
        Windows that run at once.
    device, dtype
        Of a model that is given by name; one that is given as an object stays as it is.
    space
        ``"auto"``: Frobenius and nuclear norm in score space, and where there is a residual space the Frobenius norm in
        it; or ``"score"``, ``"residual"``: both norms there alone.
    max_queries
        Queries of the max-margin problem of a head; 0 leaves the problems out.
    n_shown
        Texts that the report shows in full.
    null
        Whether random matrices are put through the same, to compare with.
    max_seconds
        For each solve.
    seed
        Of those random matrices.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    heads: tuple[str, ...] | None = Field(default=None, min_length=1)
    max_tokens: int | None = Field(default=None, ge=2)
    special: Literal["keep", "drop"] = "keep"
    batch_size: int = Field(default=16, ge=1)
    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    space: Literal["auto", "score", "residual"] = "auto"
    max_queries: int = Field(default=600, ge=0)
    n_shown: int = Field(default=3, ge=0)
    null: bool = True
    max_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @classmethod
    def checked(cls, **values: Any) -> InspectConfig:
        """Build a configuration; raises InvalidInputError with one sentence for the first bad value."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            wanted = first["msg"].replace("Input should be", "must be")
            raise InvalidInputError(f"inspect: {first['loc'][0]} {wanted}, got {first['input']!r}.") from error


def chosen_heads(modules: list[ModuleInfo], config: InspectConfig) -> dict[int, tuple[int, ...]]:
    """Heads to look at, by the index of their module.

    Raises
    ------
    InvalidInputError
        If a layer or a head does not exist.
    """
    depth = 1 + max(info.layer for info in modules)
    for layer in config.layers or ():
        if not 0 <= layer < depth:
            raise InvalidInputError(f"inspect: layers must lie in [0, {depth}), got {layer}.")
    by_label = {label: (m, h) for m, info in enumerate(modules) for h, label in enumerate(info.labels)}
    for label in config.heads or ():
        if label not in by_label:
            raise InvalidInputError(f"inspect: heads must name heads of this model, {_known(by_label, label)}.")
    chosen: dict[int, list[int]] = {}
    for label, (m, h) in by_label.items():
        if (config.layers is None or modules[m].layer in config.layers) and (
            config.heads is None or label in config.heads
        ):
            chosen.setdefault(m, []).append(h)
    if not chosen:
        raise InvalidInputError("inspect: heads and layers must have a head in common; none of heads lies in layers.")
    return {m: tuple(heads) for m, heads in chosen.items()}


def _known(by_label: dict[str, tuple[int, int]], label: str) -> str:
    """What the labels look like, and what was perhaps meant."""
    alike = [known for known in by_label if known.endswith("." + label)] if re.fullmatch(r"L\d+\.H\d+", label) else []
    if alike:
        return f"with their kind: {' or '.join(alike)}; got {label}"
    labels = list(by_label)
    return f"{labels[0]} to {labels[-1]}; got {label}"

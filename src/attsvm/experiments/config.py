"""The settings of a run, checked once at the border."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attsvm.errors import InvalidInputError
from attsvm.experiments.optimizer_names import NamedOptimizer, read_norm, read_optimizer, usual_norms
from attsvm.selection.norms import Norm

__all__ = ["VerifyConfig"]

_OPTIONS = {"optimizers": "optimizer", "norms": "norm", "parameterizations": "parameterization"}
"""Options that are not called as the setting is."""


class VerifyConfig(BaseModel):
    """Settings of ``attsvm verify``; a run folder keeps them in ``config.json``.

    Attributes
    ----------
    data
        A file of texts or arrays; None for the sample that ships with attsvm.
    text_column, label_column
        Columns of a file of texts.
    model
        Path or id of a Hugging Face encoder, ``"default"`` for the small one of the ``[demo]`` extra, ``"none"`` for
        a seeded random embedding.
    layer
        Hidden state that gives the tokens; -1 is the last.
    max_tokens
        Longer texts are cut; None for what the model takes.
    d_model
        Dimension of the random embedding.
    n_sequences
        Sequences to use, drawn evenly from both labels; None for 200 texts, or all arrays.
    parameterizations
        ``("W",)``, ``("KQ",)`` or both.
    rank
        Columns of K and Q; None for d.
    head
        ``"ridge"`` or ``"logistic"``: fitted on pooled tokens and fixed, as in :func:`attsvm.dynamics.fit_head`;
        ``"trained"``: trained together with attention, from the ridge fit.
    loss, learning_rate, steps
        As in :func:`attsvm.descend`.
    optimizers
        As :func:`~attsvm.experiments.optimizer_names.read_optimizer` reads them. The first trains; with several, a
        table compares them all.
    norms
        Columns of that table, as :func:`~attsvm.experiments.optimizer_names.read_norm` reads them. Empty: the usual
        ones, if there are several optimisers.
    max_seconds
        For each solution in a norm of the entries, and each of the table.
    tol
        Relative gap of the solution in a parameterisation's own norm.
    seed
        For the choice of sequences, the start values and the random embedding.
    batch_size, device, dtype
        For the encoder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    data: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    model: str = Field(default="default", min_length=1)
    layer: int = -1
    max_tokens: int | None = Field(default=None, ge=3)
    d_model: int = Field(default=64, ge=2)
    n_sequences: int | None = Field(default=None, ge=2)
    parameterizations: tuple[Literal["W", "KQ"], ...] = Field(default=("W", "KQ"), min_length=1)
    rank: int | None = Field(default=None, ge=1)
    head: Literal["ridge", "logistic", "trained"] = "ridge"
    loss: Literal["logistic", "exponential", "correlation", "squared"] = "logistic"
    optimizers: tuple[str, ...] = Field(default=("ngd",), min_length=1)
    norms: tuple[str, ...] = ()
    max_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    learning_rate: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    steps: int = Field(default=3000, ge=1)
    tol: float = Field(default=1e-6, gt=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    batch_size: int = Field(default=32, ge=1)
    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @classmethod
    def checked(cls, **values: Any) -> VerifyConfig:
        """Build a configuration; raises InvalidInputError with one sentence for the first bad value."""
        try:
            config = cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = "--" + _OPTIONS.get(str(first["loc"][0]), str(first["loc"][0])).replace("_", "-")
            wanted = first["msg"].replace("Input should be", "must be")
            raise InvalidInputError(f"verify: {name} {wanted}, got {first['input']!r}.") from error
        names = [read_optimizer(text).name for text in config.optimizers]
        for norm in config.norms:
            read_norm(norm)
        if len(set(names)) < len(names):
            raise InvalidInputError(f"verify: --optimizer must not be given twice, got {', '.join(names)}.")
        return config

    @property
    def named_optimizers(self) -> list[NamedOptimizer]:
        """The optimisers, read."""
        return [read_optimizer(text) for text in self.optimizers]

    @property
    def table_norms(self) -> list[Norm]:
        """Columns of the table of optimisers and norms; empty where none is asked for."""
        if not self.norms and len(self.optimizers) == 1:
            return []
        return [read_norm(text) for text in dict.fromkeys(self.norms)] or usual_norms(self.named_optimizers)

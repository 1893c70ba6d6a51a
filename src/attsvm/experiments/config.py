"""The settings of a run, checked once at the border."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attsvm.errors import InvalidInputError

__all__ = ["VerifyConfig"]


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
    head, loss, optimizer, learning_rate, steps
        As in :func:`attsvm.dynamics.fit_head` and :func:`attsvm.descend`.
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
    head: Literal["ridge", "logistic"] = "ridge"
    loss: Literal["logistic", "exponential", "correlation"] = "logistic"
    optimizer: Literal["ngd", "gd"] = "ngd"
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
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = "--" + str(first["loc"][0]).replace("_", "-")
            wanted = first["msg"].replace("Input should be", "must be")
            raise InvalidInputError(f"verify: {name} {wanted}, got {first['input']!r}.") from error

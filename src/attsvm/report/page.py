"""The content of the page, as plain records: what is shown, before how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from attsvm.report.schema import Comparison, Data, OtherSolution
from attsvm.report.text import norm_name

__all__ = [
    "SYMBOLS",
    "Certificate",
    "Curves",
    "Histogram",
    "Page",
    "Parameterization",
    "Sentence",
    "Spectra",
    "TokenValues",
]

Numbers = list[float | None]

SYMBOLS = {"W": "W", "KQ": "(K, Q)"}


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One text and its tokens, every string in its visible form.

    Attributes
    ----------
    scores
        Label score of each token (Y v^T x); the optimal token has the highest.
    masked
        Positions that may not be attended.
    joined
        Positions of tokens that continue the word of the token before them.
    """

    text: str
    label: str | None
    tokens: list[str]
    optimal: int | None
    n_tokens: int
    scores: Numbers
    masked: list[int]
    joined: list[int]


@dataclass(frozen=True, kw_only=True)
class TokenValues:
    """What one parameterisation says of the tokens of one sentence; None where nothing is asked or known.

    Attributes
    ----------
    margins, trained_margins
        Logit of the selected token minus the token's own, under the solution and under the trained matrix
        (scaled to the solution's norm).
    probabilities
        Trained attention.
    duals
        Multipliers; the tokens with a positive one are the support tokens.
    """

    selected: int | None
    margins: Numbers
    trained_margins: Numbers
    probabilities: Numbers
    duals: Numbers
    support: list[int]
    smallest_margin: float | None
    smallest_trained_margin: float | None
    attention: float | None


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What was recorded during training, all of the length of ``steps``."""

    steps: list[int]
    correlation: Numbers
    correlation_other: Numbers
    attention_mass: Numbers
    norm: Numbers
    loss: Numbers


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of margins in bins of equal width; the last bin also holds everything above it.

    Attributes
    ----------
    edges
        One more than there are bins.
    n_below
        Trained margins below the required margin 1.
    """

    edges: list[float]
    solution: list[int]
    trained: list[int]
    n_solution: int
    n_trained: int
    n_below: int
    n_overflow: int


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """Singular values of three matrices, each divided by its largest."""

    solution: list[float]
    other: list[float]
    trained: list[float]


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The optimality conditions, evaluated again from the arrays when the page is made.

    Attributes
    ----------
    smallest_margin
        Over all rows; feasible when it is 1 or more.
    slackness
        Largest ``|margin - 1|`` over the rows with a positive dual; 0 at the optimum.
    n_positive_duals
        Rows with a positive dual.
    dual_sum
        Sum of the duals.
    """

    smallest_margin: float | None = None
    slackness: float | None = None
    n_positive_duals: int | None = None
    dual_sum: float | None = None


@dataclass(frozen=True, kw_only=True)
class Parameterization:
    """Everything about W, or about (K, Q)."""

    key: str
    norm: str
    norm_other: str
    status: str | None
    status_sentence: str | None
    gap: float | None
    upper_bound: float | None
    lower_bound: float | None
    n_support: int | None
    rank: int | None
    method: str | None
    iterations: int | None
    solve_seconds: float | None
    correlation: float | None
    correlation_other: float | None
    attention_mass: float | None
    fraction_globally_optimal: float | None
    locally_optimal: bool | None
    verdict: str | None
    reason: str | None
    other: OtherSolution | None
    ray_sequences: list[int]
    curves: Curves
    certificate: Certificate
    values: list[TokenValues]
    histogram: Histogram | None
    spectra: Spectra | None

    @property
    def symbol(self) -> str:
        """``W`` or ``(K, Q)``."""
        return SYMBOLS[self.key]

    @property
    def norm_name(self) -> str:
        """Name of the norm whose solution training is compared with."""
        return norm_name(self.norm)

    @property
    def other_name(self) -> str:
        """Name of the other norm."""
        return norm_name(self.norm_other)

    @property
    def styles(self) -> tuple[str, str]:
        """How the curves of the own and of the other norm are drawn; only one of the two can be Frobenius."""
        own, other = ("fro" if norm == "fro" else "nuc" for norm in (self.norm, self.norm_other))
        return own, other

    @property
    def is_infeasible(self) -> bool:
        """True when no matrix separates the selected tokens."""
        return self.status == "infeasible"


@dataclass(frozen=True, kw_only=True)
class Page:
    """One run, ready to be shown."""

    name: str
    created: str | None
    command: str | None
    seed: int | None
    commit: str | None
    verdict: str | None
    versions: dict[str, str]
    seconds: dict[str, float | None]
    data: Data
    n_sequences: int
    n_queries: int | None
    n_constraints: int | None
    n_merged: int | None
    d_model: int | None
    parameterizations: list[Parameterization]
    sentences: list[Sentence]
    comparison: Comparison | None = None
    settings: dict[str, str] = field(default_factory=dict)

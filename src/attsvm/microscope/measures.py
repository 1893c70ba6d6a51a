r"""What is measured of each query: how hard it selects, with what margin, and where its attention goes.

A query with allowed keys $A$, $n = |A|$, has logits $s_j$ and weights $p_j$ that sum to 1 over $A$. A sink of the model
(a key of fixed score without a token) counts as one more key. Queries that may attend to nothing are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError

__all__ = ["KINDS", "MEASURES", "NOTHING", "ROW_MEASURES", "SINK", "Measure", "Rows", "measure", "measure_rows"]

NOTHING = -1
"""Selected key of a query that may attend to nothing."""

SINK = -2
"""Selected key of a query whose largest weight is the model's sink."""

NEAR_TIE = 1e-3
"""Margin in logits below which two keys are nearly tied: rounding could turn the selection."""

_SLACK = 1 - 1e-6  # as in row_kernel

Scale = Literal["0-1", "logits", "nats", "tokens"]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure of a head: the mean of a number over the queries of a corpus.

    Attributes
    ----------
    key
        Name in records.
    title
        Name for people.
    unit
        Of the mean.
    scale
        ``"0-1"`` (shares and weights), ``"logits"``, ``"nats"`` or ``"tokens"``.
    explanation
        What the number is, in a sentence.
    """

    key: str
    title: str
    unit: str
    scale: Scale
    explanation: str

    @property
    def largest(self) -> float | None:
        """Bound that no mean exceeds: 1 for shares, None for what has no bound. All measures are at least 0."""
        return 1.0 if self.scale == "0-1" else None


def _measure(key: str, title: str, scale: Scale, explanation: str, unit: str | None = None) -> Measure:
    return Measure(
        key=key, title=title, unit=unit or {"0-1": "share"}.get(scale, scale), scale=scale, explanation=explanation
    )


_HARDNESS = (
    _measure("top_probability", "Top probability", "0-1", "Weight of the key that gets most, mean over queries."),
    _measure("entropy", "Entropy", "nats", "Entropy of the weights: 0 for one key, log n for n equal ones."),
    _measure(
        "tokens_90",
        "Tokens for 90 %",
        "tokens",
        "Fewest keys with 90 % of the weight, the last one in part.",
    ),
    _measure("selected_set", "Selected set", "tokens", "Keys with at least half the weight of the largest."),
    _measure("margin", "Margin", "logits", "Largest minus second largest logit, of queries with two keys or more."),
    _measure(
        "mass_bound",
        "Bound on dropped mass",
        "0-1",
        "Weight outside the selected key that the margin m of n keys allows: (n - 1) e^-m / (1 + (n - 1) e^-m).",
    ),
    _measure("dropped_mass", "Dropped mass", "0-1", "Weight outside the selected key: 1 minus the top probability."),
    _measure("near_ties", "Near ties", "0-1", "Share of queries whose margin is below 0.001.", "share of queries"),
    _measure("distance", "Distance", "tokens", "Mean distance in tokens from query to key under the weights."),
)

_PLACES = (
    _measure("sink_mass", "Sink mass", "0-1", "Weight on the first token of the text and on the model's own sink."),
    _measure("separator_mass", "Separator mass", "0-1", "Weight on separators, over all queries."),
)

KINDS: tuple[Measure, ...] = (
    _measure("same_position", "Same position", "0-1", "Weight on the query's own token."),
    _measure("previous", "Previous token", "0-1", "Weight on the token before the query."),
    _measure("next", "Next token", "0-1", "Weight on the token after the query."),
    _measure("first", "First token", "0-1", "Weight on the first token of the text."),
    _measure("same_token", "Same token", "0-1", "Weight on other places where the query's token stands."),
    _measure("separator", "Separator", "0-1", "Weight on separators, of queries that may attend to one."),
    _measure("induction", "Induction", "0-1", "Weight on tokens that follow another occurrence of the query's token."),
)
"""Masses that name the kind of a head, each over the queries that have such a key and another one."""

ROW_MEASURES = _HARDNESS
"""Measures that the logits of a row decide alone, in the order of :attr:`Rows.values`."""

MEASURES: tuple[Measure, ...] = _HARDNESS + _PLACES + KINDS

_BY_KEY = {entry.key: entry for entry in MEASURES}


def measure(key: str) -> Measure:
    """The measure of a name."""
    if key not in _BY_KEY:
        raise InvalidInputError(f"measure: key must be one of {', '.join(_BY_KEY)}, got {key!r}.")
    return _BY_KEY[key]


class Rows(NamedTuple):
    """Measures of single queries.

    ``values`` (9, B, H, R) in float64, NaN where undefined, in the order of :data:`ROW_MEASURES`; ``weights``
    (B, H, R, Tk) on tokens; ``n_keys`` (B, H, R) allowed keys, the sink among them; ``selected`` (B, H, R) index of the
    largest weight, the first among equal ones, or NOTHING or SINK; ``sink`` (B, H, R) the sink's weight, None without.
    """

    values: Tensor
    weights: Tensor
    n_keys: Tensor
    selected: Tensor
    sink: Tensor | None


def measure_rows(
    logits: Tensor,
    sinks: Tensor | None = None,
    *,
    query_places: Tensor | None = None,
    key_places: Tensor | None = None,
) -> Rows:
    r"""Measures of every row of a block of logits.

    With $p = \mathrm{softmax}(s)$ over the allowed keys (and the sink), the largest weight at $a$ and $n$ keys:
    top probability $p_a$; entropy $-\sum_j p_j \log p_j$; tokens_90, the k - 1 largest weights that sum to
    $C < 0.9$ and the part $(0.9 - C) / p$ of the next, or 1 if that is less (a part, so that it moves little where the
    weights do); selected_set, the number of $p_j \ge p_a / 2$, less one part in a million for rounding; margin
    $m = s_a - \max_{j \ne a} s_j$ where n >= 2; mass_bound $(n-1) e^{-m} / (1 + (n-1) e^{-m})$; dropped_mass
    $1 - p_a$; near_ties, 1 where $m < 10^{-3}$; distance $\sum_j p_j |i - j| / \sum_j p_j$ over keys with a token.

    Parameters
    ----------
    logits
        (B, H, R, Tk), minus infinity where a key may not be attended.
    sinks
        (H,): score of a key without a token, or None.
    query_places
        (B, R): place of each query in its text, or None, which leaves the distance undefined, as across two texts.
    key_places
        (B, Tk): place of each key.

    Returns
    -------
    Rows
        Measures, weights and selected keys.

    Raises
    ------
    InvalidInputError
        If a logit is NaN or plus infinity.
    """
    n_tokens = logits.shape[-1]
    if sinks is not None:
        sink = sinks.to(logits)[None, :, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], -1)
    top = logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -torch.inf)
    if bool((top.isnan() | (top == torch.inf)).any()):
        raise InvalidInputError("measure_rows: logits must be finite or minus infinity, got NaN or plus infinity.")
    weights = logits.softmax(-1)
    if query_places is None or key_places is None:
        # Places of no key: the distance stays undefined.
        query_places = torch.zeros(logits.shape[0], logits.shape[2], dtype=torch.int32, device=logits.device)
        key_places = torch.zeros(logits.shape[0], 0, dtype=torch.int32, device=logits.device)
    compute = _compiled if logits.device.type == "cpu" else _vectorised
    values, n_keys, selected = compute(logits, weights, query_places, key_places)
    dead = n_keys == 0
    if bool(dead.any()):
        weights = weights.masked_fill(dead[..., None], 0.0)
    selected = selected.masked_fill(selected == n_tokens, SINK) if sinks is not None else selected
    return Rows(values, weights[..., :n_tokens], n_keys, selected, weights[..., -1] if sinks is not None else None)


def _compiled(
    logits: Tensor, weights: Tensor, query_places: Tensor, key_places: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from attsvm.microscope import row_kernel

    shape = logits.shape[:-1]
    values = torch.empty(len(ROW_MEASURES), *shape, dtype=torch.float64)
    n_keys, selected = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64)
    row_kernel.measure_rows(
        logits.contiguous().numpy(),
        weights.contiguous().numpy(),
        query_places.to(torch.int32).contiguous().numpy(),
        key_places.to(torch.int32).contiguous().numpy(),
        values.numpy(),
        n_keys.numpy(),
        selected.numpy(),
    )
    return values, n_keys, selected


def _vectorised(
    logits: Tensor, weights: Tensor, query_places: Tensor, key_places: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for devices that the compiled code cannot reach; there, sorting a row costs little."""
    n_keys = (logits > -torch.inf).sum(-1)
    dead, several = n_keys == 0, n_keys > 1
    weights = weights.masked_fill(dead[..., None], 0.0)
    selected = logits.argmax(-1)
    p_top = weights.gather(-1, selected[..., None]).squeeze(-1)
    margin = _margin(logits)
    rest = (n_keys - 1) * torch.exp(-margin)
    places = key_places.shape[-1]
    apart = (query_places[:, None, :, None] - key_places[:, None, None, :]).abs().to(weights)
    on_tokens = weights[..., :places].double()
    columns = [
        p_top,
        torch.special.entr(weights.double()).sum(-1),
        _needed(weights),
        (weights >= 0.5 * _SLACK * p_top[..., None]).sum(-1),
        torch.where(several, margin, torch.nan),
        torch.where(several, rest / (1 + rest), torch.nan),
        1 - p_top.double(),
        torch.where(several, (margin < NEAR_TIE).double(), torch.nan),
        (on_tokens * apart).sum(-1) / on_tokens.sum(-1),
    ]
    values = torch.stack([column.double().masked_fill(dead, torch.nan) for column in columns])
    return values, n_keys, selected.masked_fill(dead, NOTHING)


def _needed(weights: Tensor) -> Tensor:
    """How many of the largest weights it takes to reach 0.9, the last one in part, but at least 1."""
    ordered = weights.double().sort(-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    whole = (before + ordered < 0.9).sum(-1, keepdim=True).clamp(max=weights.shape[-1] - 1)
    part = (0.9 - before.gather(-1, whole)) / ordered.gather(-1, whole)
    return (whole + part).squeeze(-1).clamp(min=1)


def _margin(logits: Tensor) -> Tensor:
    """Largest minus second largest logit, infinite for one key."""
    if logits.shape[-1] < 2:
        return torch.full(logits.shape[:-1], torch.inf, dtype=torch.float64, device=logits.device)
    first, second = logits.topk(2, -1).values.double().unbind(-1)
    return first - second

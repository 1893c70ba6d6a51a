r"""Known kinds of heads, by where the tokens stand that they attend to.

A kind is a set of keys of each query; its score is the mean weight on that set. Queries count that may attend to a key
of the set and to two keys at least. What uniform attention of the same queries over their allowed keys would score is
the kind's chance level: ten keys of which three are separators give 0.3.

========== ============================================================================================================
kind       keys j of a query i; places are counted from the first token of the text
========== ============================================================================================================
same_position  j = i
previous       j = i - 1
next           j = i + 1
first          the first token of the text
same_token     other places with the id of i
separator      special tokens but the first token of the text, and ids that were named separators
induction      tokens after another occurrence of the id of i: id(j - 1) = id(i), with j - 1 != i, and j != i, or j <= i
               in a decoder
========== ============================================================================================================

Where queries and keys are of two texts only first, same_token and separator exist.

References
----------
Clark, Khandelwal, Levy, Manning. "What Does BERT Look At?", 2019. arXiv:1906.04341 (previous, next, separators).
Olsson et al. "In-context Learning and Induction Heads", 2022. arXiv:2209.11895.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attsvm.microscope.calls import ModuleInfo
from attsvm.microscope.measures import KINDS
from attsvm.microscope.statistics import Estimate
from attsvm.microscope.windows import Batch

__all__ = ["CLEAR", "KIND_KEYS", "KindMass", "Pairs", "Places", "head_kind", "kind_mass", "kind_pairs", "places_of"]

KIND_KEYS: tuple[str, ...] = tuple(entry.key for entry in KINDS)

CLEAR = 0.3
"""Least excess over chance, as a share of what is possible, that names a head."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the tokens of a batch stand, for the queries and keys of a module.

    Attributes
    ----------
    queries, keys
        (B, Tq), (B, Tk): place among the real tokens of the text, from 0.
    asking, kept
        (B, Tq), (B, Tk): queries and keys that are measured.
    query_ids, key_ids
        Token ids.
    before
        (B, Tk): id of the token one place before, -1 for the first.
    first, separator
        (B, Tk): the first key that is kept; separators.
    own
        Whether queries and keys are of one text.
    causal
        Whether queries see what came before them only.
    """

    queries: Tensor
    keys: Tensor
    asking: Tensor
    kept: Tensor
    query_ids: Tensor
    key_ids: Tensor
    before: Tensor
    first: Tensor
    separator: Tensor
    own: bool
    causal: bool


class Pairs(NamedTuple):
    """Queries and keys that belong to a kind: sequence, row of the block, key and number of the kind, each (P,)."""

    sequence: Tensor
    row: Tensor
    key: Tensor
    kind: Tensor


class KindMass(NamedTuple):
    """Of each kind and query, (7, B, H, R).

    ``mass``: weight on its keys, whether the query counts or not; ``chance``: that of uniform weights over the allowed
    keys, NaN where the query does not count.
    """

    mass: Tensor
    chance: Tensor


def places_of(batch: Batch, info: ModuleInfo, *, special: str = "keep", separators: Collection[int] = ()) -> Places:
    """Places of the tokens of a batch.

    Parameters
    ----------
    batch
        Tokens.
    info
        The module.
    special
        ``"drop"``: special tokens are neither queries nor keys.
    separators
        Ids that count as separators though they are not special, such as those of full stops.
    """
    asking, kept = (
        batch.real[side] & ~batch.special[side] if special == "drop" else batch.real[side]
        for side in (info.query_side, info.key_side)
    )
    real, key_ids = batch.real[info.key_side], batch.ids[info.key_side]
    keys = real.long().cumsum(-1) - 1
    first = kept & (kept.long().cumsum(-1) == 1)
    named = torch.tensor(sorted(separators), dtype=key_ids.dtype, device=key_ids.device)
    return Places(
        queries=batch.real[info.query_side].long().cumsum(-1) - 1,
        keys=keys,
        asking=asking,
        kept=kept,
        query_ids=batch.ids[info.query_side],
        key_ids=key_ids,
        before=_ids_before(key_ids, real),
        first=first,
        separator=kept & ((batch.special[info.key_side] & ~first) | torch.isin(key_ids, named)),
        own=info.query_side == info.key_side,
        causal=info.kind == "decoder",
    )


def _ids_before(ids: Tensor, real: Tensor) -> Tensor:
    """Id of the last real token before each, -1 for none; padding may stand anywhere."""
    index = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    latest = torch.where(real, index, -1).cummax(-1).values.roll(1, -1)
    latest[:, :1] = -1
    return torch.where(latest >= 0, ids.gather(-1, latest.clamp(min=0)), -1)


def kind_pairs(places: Places, rows: slice = slice(None)) -> Pairs:
    """All queries and keys of each kind, of some rows.

    Parameters
    ----------
    places
        Of the batch.
    rows
        Queries, by their position in the batch; the pairs count rows from the first of them.
    """
    i, j = places.queries[:, rows, None], places.keys[:, None, :]
    id_i, id_j = places.query_ids[:, rows, None], places.key_ids[:, None, :]
    wanted = places.asking[:, rows, None] & places.kept[:, None, :]
    here, after = i == j, j == i + 1
    same = (id_i == id_j) & (id_i >= 0)
    repeated = (places.before[:, None, :] == id_i) & (id_i >= 0) & ~after & ((j <= i) if places.causal else ~here)
    keys_of = {
        "same_position": here,
        "previous": j == i - 1,
        "next": after,
        "first": places.first[:, None, :],
        "same_token": same & ~here if places.own else same,
        "separator": places.separator[:, None, :],
        "induction": repeated,
    }
    if not places.own:
        keys_of = {kind: keys_of[kind] for kind in ("first", "same_token", "separator")}
    found = [(kind & wanted).nonzero(as_tuple=True) for kind in keys_of.values()]
    sizes = torch.tensor([len(place[0]) for place in found], device=i.device)
    numbers = torch.tensor([KIND_KEYS.index(kind) for kind in keys_of], device=i.device)
    sequence, row, key = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Pairs(sequence, row, key, numbers.repeat_interleave(sizes))


def kind_mass(pairs: Pairs, weights: Tensor, allowed: Tensor, n_keys: Tensor) -> KindMass:
    """Weight of each query on the keys of each kind.

    Parameters
    ----------
    pairs
        From :func:`kind_pairs`.
    weights
        (B, H, R, Tk).
    allowed
        Logits (B, H, R, Tk), minus infinity where a key may not be attended, or booleans of that shape.
    n_keys
        (B, H, R) number of allowed keys.
    """
    B, H, R, _ = weights.shape
    where = (pairs.kind * B + pairs.sequence) * R + pairs.row
    at = (pairs.sequence, slice(None), pairs.row, pairs.key)
    open_ = allowed[at] if allowed.dtype == torch.bool else allowed[at] > -torch.inf
    sums = torch.zeros(2, len(KIND_KEYS) * B * R, H, dtype=torch.float64, device=weights.device)
    sums[0].index_add_(0, where, weights[at].double())
    sums[1].index_add_(0, where, open_.double())
    mass, count = sums.view(2, len(KIND_KEYS), B, R, H).transpose(-1, -2)
    counts = (count > 0) & (n_keys > 1)
    return KindMass(mass, torch.where(counts, count / n_keys.clamp(min=1), torch.nan))


def head_kind(values: Mapping[str, Estimate | None], chance: Mapping[str, float | None]) -> str:
    r"""Name the kind of a head: the one whose score is furthest above chance, as a share of what is possible.

    The excess of a score s over the chance level c is $(s - c) / (1 - c)$: 0 for uniform attention, 1 where all weight
    goes to the kind's keys. A kind is named from an excess of :data:`CLEAR` on, if chance lies below the interval of
    the score (where there is one); otherwise the head is ``"mixed"``.

    Parameters
    ----------
    values
        Estimates by key of the measure; those of the kinds are read.
    chance
        Chance level of each kind.

    Returns
    -------
    str
        A key of :data:`KIND_KEYS`, the first among equals, or ``"mixed"``.
    """
    best, name = CLEAR, "mixed"
    for kind in KIND_KEYS:
        value, level = values.get(kind), chance.get(kind)
        if value is None or level is None or level >= 1 or (value.low is not None and value.low <= level):
            continue
        excess = (value.mean - level) / (1 - level)
        if excess > best or (excess == best and name == "mixed"):
            best, name = excess, kind
    return name

r"""Attention that keeps several tokens: the finite part, the direction, and the matrix that they predict.

Where training leaves a query with several tokens, the logits inside the selected set converge and those of the rest
fall without end. The matrix then grows like $W^{fin} + C\, W^{dir}$: the direction $W^{dir}$, solved by ``solve``,
ties the selected tokens and puts the others a margin below; the finite part holds the ratios of the
probabilities that the selected tokens share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attsvm.errors import InfeasibleError, InvalidInputError, NotConvergedError
from attsvm.selection.arrays import Array, as_bool, as_float, kind_of
from attsvm.selection.geometry import correlation
from attsvm.selection.norms import Norm
from attsvm.selection.problem import TokenSelection
from attsvm.selection.reading import as_came, first, per_query, place
from attsvm.solvers.solution import Solution, Status
from attsvm.solvers.solve import solve

__all__ = ["SVMEquivalent", "SelectedSets", "selected_from_probabilities", "solve_finite_part", "svm_equivalent"]

SAME_LOGIT = 1e-6
"""Difference of logits of two equal tokens that is taken for rounding of their probabilities."""


@dataclass(frozen=True, kw_only=True)
class SelectedSets:
    """Which tokens attention keeps, by the size of their probabilities.

    Attributes
    ----------
    selected
        (…, T) booleans: probability at or above ``selected_above``.
    masked
        (…, T) booleans: probability at or below ``masked_below``.
    ambiguous
        (…) booleans, for each query: some probability lies between the two, so the sets are not settled.
    complete
        (…) booleans: every allowed token is selected. A problem all of whose queries are complete has no direction.
    """

    selected: Any
    masked: Any
    ambiguous: Any
    complete: Any


def selected_from_probabilities(
    probabilities: Array, selected_above: float = 1e-3, masked_below: float = 1e-6, *, allowed: Array | None = None
) -> SelectedSets:
    """Sort tokens into selected and masked ones by their attention probabilities.

    Parameters
    ----------
    probabilities
        (…, T), such as the softmax of a trained layer.
    selected_above
        A token is selected from this probability on.
    masked_below
        A token is masked up to this probability; in between the query is ambiguous.
    allowed
        (…, T) booleans, True = may be attended; other tokens are neither. Default: all.

    Returns
    -------
    SelectedSets
        Arrays of the kind and device of the probabilities.

    Raises
    ------
    InvalidInputError
        If a value is not a probability, or the thresholds are not ``0 <= masked_below <= selected_above <= 1``.

    References
    ----------
    Tarzanagh, Li, Thrampoulidis, Oymak. "Transformers as Support Vector Machines", 2023. arXiv:2308.16898.

    Examples
    --------
    >>> sets = selected_from_probabilities([[0.7, 0.3, 0.0], [0.9, 0.0999, 0.0001]])
    >>> sets.selected
    array([[ True,  True, False],
           [ True,  True, False]])
    >>> sets.ambiguous
    array([False,  True])
    """
    where = "selected_from_probabilities"
    p = as_float(probabilities, "probabilities", where=where)
    numbers = all(isinstance(value, (int, float, np.number)) for value in (selected_above, masked_below))
    if not (numbers and 0 <= masked_below <= selected_above <= 1):
        raise InvalidInputError(
            f"{where}: thresholds must satisfy 0 <= masked_below <= selected_above <= 1, got masked_below="
            f"{masked_below!r} and selected_above={selected_above!r}."
        )
    if p.ndim == 0 or p.shape[-1] == 0:
        raise InvalidInputError(f"{where}: probabilities must have a token axis, got shape {tuple(p.shape)}.")
    may = torch.ones_like(p, dtype=torch.bool)
    if allowed is not None:
        may = as_bool(allowed, "allowed", where=where, device=p.device)
        if may.shape != p.shape:
            raise InvalidInputError(
                f"{where}: allowed must have the shape {tuple(p.shape)} of probabilities, got {tuple(may.shape)}."
            )
    bad = may & ~((p >= 0) & (p <= 1 + 1e-5))
    if bool(bad.any()):
        raise InvalidInputError(f"{where}: probabilities must lie in [0, 1], got {first(p, bad)}.")
    selected, masked = may & (p >= selected_above), may & (p <= masked_below)
    back = kind_of(probabilities).back
    return SelectedSets(
        selected=back(selected),
        masked=back(masked),
        ambiguous=back((may & ~selected & ~masked).any(-1)),
        complete=back((selected | ~may).all(-1)),
    )


def solve_finite_part(problem: TokenSelection, probabilities: Array, *, tol: float = 1e-9) -> Solution:
    r"""Find the smallest matrix that gives the selected tokens their probabilities relative to each other.

    Solves, with $s_i$ the probabilities of query i and $O_i$ its selected set,

    $$W^{fin} = \mathrm{argmin}_W \|W\|_F \quad\text{s.t.}\quad
    (x_{it} - x_{i\tau})^\top W z_i = \log(s_{it} / s_{i\tau}) \quad \text{for all } i \text{ and } t, \tau \in O_i .$$

    Parameters
    ----------
    problem
        The selected sets; a batch too. Its offsets are part of the logits; its margin is of no account, since
        nothing is asked of tokens that are not selected.
    probabilities
        (n, T) or (n, Q, T), with a leading B for a batch; > 0 on selected tokens, others are not read. Only ratios
        inside a selected set count.
    tol
        As in :func:`~attsvm.solvers.solve`.

    Returns
    -------
    Solution
        ``W`` (d, d) is a combination of the rows, so it is orthogonal to every matrix that ties the selected tokens.

    Raises
    ------
    InfeasibleError
        If the probabilities contradict each other: no matrix has these ratios. Names the sequences that prove it.
        The softmax of a matrix never does, but its rounding may where there are more ties than the space has
        dimensions; give probabilities in float64.
    InvalidInputError
        If a shape does not fit, or a selected token has no positive probability.

    Notes
    -----
    These are the ties of a selection with offsets ``-log s``; ``solve`` does the work.

    References
    ----------
    Tarzanagh, Li, Thrampoulidis, Oymak. "Transformers as Support Vector Machines", 2023. arXiv:2308.16898.

    Examples
    --------
    >>> problem = TokenSelection([[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]], [[1.0, 0.0]], [[True, True, False]])
    >>> solve_finite_part(problem, [[0.75, 0.25, 0.0]]).W.round(4)
    array([[1.0986, 0.    ],
           [0.    , 0.    ]])
    """
    where = "solve_finite_part"
    chosen = _problem(problem, where).tensors.selected
    p = _probabilities(problem, probabilities, where)
    logits = torch.where(chosen, p.log(), torch.zeros((), dtype=torch.float64))
    if problem.tensors.offsets is not None:
        logits = logits - problem.tensors.offsets.double()
    logits = _level_twins(problem, logits)
    # Without competitors no margin is asked. A sequence that selects nothing keeps its tokens; it asks nothing.
    alone = chosen | (problem.tensors.allowed & ~chosen.any(-1, keepdim=True))
    try:
        return solve(_variant(problem, chosen, allowed=alone, offsets=-logits), tol=tol)
    except InfeasibleError as error:
        raise InfeasibleError(
            f"{where}: probabilities contradict each other, no matrix has their ratios inside the selected sets."
            f"{_culprits(error.solution)}",
            error.solution,
        ) from None


@dataclass(frozen=True, kw_only=True)
class SVMEquivalent:
    """What the theory predicts for a trained matrix, and how close three predictions are to it.

    In a batch arrays and numbers have a leading B.

    Attributes
    ----------
    W
        (d, d): ``W_fin + C * W_dir``.
    W_fin, W_dir
        (d, d): the finite part, and the solution of the problem without offsets: selected tokens tied, others a margin
        below.
    W_one_token
        (d, d): the solution that selects only the token of highest probability; NaN where none exists.
    C
        How far the trained matrix went along ``W_dir``; 0 where the problem has no direction (``W_dir = 0``).
    correlation, correlation_dir, correlation_one_token
        Cosines of the trained matrix with ``W``, ``W_dir`` and ``W_one_token``; NaN where that matrix is 0 or absent.
    finite_part, direction, one_token
        The three solutions with their certificates.
    """

    W: Any
    W_fin: Any
    W_dir: Any
    W_one_token: Any
    C: Any
    correlation: Any
    correlation_dir: Any
    correlation_one_token: Any
    finite_part: Solution
    direction: Solution
    one_token: Solution


def svm_equivalent(
    problem: TokenSelection, W: Array, probabilities: Array, *, norm: Norm = "fro", tol: float = 1e-9
) -> SVMEquivalent:
    r"""Predict a trained matrix from what it selects: $W^{fin} + C\, W^{dir}$.

    Parameters
    ----------
    problem
        The selected sets, such as ``problem.with_selected(selected_from_probabilities(s).selected)``; a batch too.
    W
        (d, d) the trained matrix; (B, d, d) for a batch.
    probabilities
        Its attention, as in :func:`solve_finite_part`.
    norm
        Norm that ``W_dir`` and ``W_one_token`` minimise: ``"fro"`` for a layer trained as W, ``"nuc"`` for keys and
        queries. The finite part is Frobenius for both.
    tol
        As in :func:`~attsvm.solvers.solve`.

    Returns
    -------
    SVMEquivalent
        The prediction, and its correlation with W beside those of two simpler ones.

    Raises
    ------
    InfeasibleError
        If no matrix ties the selected tokens and separates the others, or the probabilities contradict each other.
    NotConvergedError
        If a solution did not reach ``tol``.
    InvalidInputError
        If a shape does not fit or a probability of a selected token is not positive.

    Notes
    -----
    C minimises $\|W^{fin} + C\, W^{dir} - W\|_F$, a parabola in C, so
    $C = \langle W - W^{fin}, W^{dir}\rangle / \|W^{dir}\|_F^2$. The finite part is a combination of the tie rows
    $(x_t - x_\tau) z^\top$, on each of which $W^{dir}$ is 0; the two are orthogonal and
    $C = \langle W, W^{dir}\rangle / \|W^{dir}\|_F^2$, whichever norm $W^{dir}$ minimises.

    Offsets of the problem belong to the finite part: in the direction they vanish beside growing logits.

    References
    ----------
    Tarzanagh, Li, Thrampoulidis, Oymak. "Transformers as Support Vector Machines", 2023. arXiv:2308.16898.

    Examples
    --------
    >>> problem = TokenSelection([[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]], [[1.0, 0.0]], [[True, True, False]])
    >>> prediction = svm_equivalent(problem, [[0.9, 0.1], [-9.0, 0.0]], [[0.7, 0.3, 0.0]])
    >>> round(prediction.C, 6), round(prediction.correlation, 4)
    (9.0, 0.9999)
    """
    where = "svm_equivalent"
    selected = _problem(problem, where).tensors.selected
    trained = problem.matrix(W, where).double()
    p = _probabilities(problem, probabilities, where)
    best = p.masked_fill(~selected, -math.inf).argmax(-1)
    best = torch.where(selected.any(-1), best, -1)
    finite_part = solve_finite_part(problem, p, tol=tol)
    try:
        direction = solve(_variant(problem, selected), norm, tol=tol)
    except InfeasibleError as error:
        raise InfeasibleError(
            f"{where}: no matrix ties the selected tokens and separates the others.{_culprits(error.solution)}",
            error.solution,
        ) from None
    one_token = solve(_variant(problem, best), norm, tol=tol, on_failure="ignore")
    fin, way, one = (torch.as_tensor(part.W).to(trained) for part in (finite_part, direction, one_token))
    one = torch.where(_exists(one_token, where).to(trained.device)[..., None, None], one, math.nan)
    square = way.square().sum((-2, -1))
    C = torch.where(square > 0, (trained * way).sum((-2, -1)) / square, 0.0)
    predicted = fin + C[..., None, None] * way
    back = problem.kind.back

    def cosine(prediction: Tensor) -> Any:
        value = correlation(trained, prediction)
        return back(value) if isinstance(value, Tensor) else value

    return SVMEquivalent(
        W=back(predicted),
        W_fin=finite_part.W,
        W_dir=direction.W,
        W_one_token=back(one),
        C=back(C) if problem.is_batch else float(C),
        correlation=cosine(predicted),
        correlation_dir=cosine(way),
        correlation_one_token=cosine(one),
        finite_part=finite_part,
        direction=direction,
        one_token=one_token,
    )


def _problem(problem: Any, where: str) -> TokenSelection:
    if not isinstance(problem, TokenSelection):
        raise InvalidInputError(f"{where}: problem must be a TokenSelection, got {type(problem).__name__}.")
    return problem


def _probabilities(problem: TokenSelection, probabilities: Array, where: str) -> Tensor:
    """(…, n, Q, T) in float64, checked to be positive on selected tokens."""
    chosen = problem.tensors.selected
    p = as_float(probabilities, "probabilities", where=where, device=chosen.device).double()
    p = per_query(p, tuple(chosen.shape), "probabilities", where)
    bad = chosen & ~((p > 0) & torch.isfinite(p))
    if bool(bad.any()):
        raise InvalidInputError(
            f"{where}: probabilities must be positive on selected tokens, got {first(p, bad)} at "
            f"{place(bad, problem.tensors.tokens)}."
        )
    return p


def _variant(
    problem: TokenSelection, selected: Tensor, *, allowed: Tensor | None = None, offsets: Tensor | None = None
) -> TokenSelection:
    """The problem with another selection, and offsets only if given."""
    t = problem.tensors
    return TokenSelection(
        as_came(t.tokens, problem.kind),
        t.queries,
        selected,
        allowed=t.allowed if allowed is None else allowed,
        offsets=offsets,
        margin=t.margin if t.margin.ndim else float(t.margin),
    )


def _level_twins(problem: TokenSelection, logits: Tensor) -> Tensor:
    """Give selected tokens that are equal one logit where theirs differ by rounding only; no matrix could.

    A repeated word is the common case. Larger differences stay, and are found infeasible.
    """
    X, chosen = problem.tensors.tokens, problem.tensors.selected
    several = chosen.sum(-1).amax(-1) > 1  # (…, n)
    leveled = logits.clone()
    for index in several.nonzero().tolist():
        at = tuple(index)
        _, member, counts = torch.unique(X[at], dim=0, return_inverse=True, return_counts=True)
        for group in (counts > 1).nonzero().flatten():
            for q in range(chosen.shape[-2]):
                twins = (chosen[at][q] & (member == group)).nonzero().flatten()
                values = logits[at][q, twins]
                if len(twins) > 1 and float(values.amax() - values.amin()) <= SAME_LOGIT:
                    leveled[at][q, twins] = values[0]
    return leveled


def _culprits(solution: Solution) -> str:
    """The sequences of the first proof of infeasibility, as a sentence."""
    rays = solution.ray if isinstance(solution.ray, tuple) else (solution.ray,)
    index = next(i for i, ray in enumerate(rays) if ray is not None)
    named = ", ".join(map(str, rays[index].sequences[:10])) + (", ..." if len(rays[index].sequences) > 10 else "")
    where = f" In problem {index} of the batch, s" if len(rays) > 1 else " S"
    return f"{where}equences in the proof: {named}."


def _exists(solution: Solution, where: str) -> Tensor:
    """Whether there is a solution, () or (B,); it may be absent, but not unfinished."""
    statuses = solution.status if isinstance(solution.status, tuple) else (solution.status,)
    for status in statuses:
        if status not in (Status.OPTIMAL, Status.INFEASIBLE):
            raise NotConvergedError(f"{where}: the one-token solution is not settled. {status.sentence}", solution)
    found = torch.tensor([status is Status.OPTIMAL for status in statuses])
    return found if isinstance(solution.status, tuple) else found[0]

"""Train one attention layer and record the path of its key-query matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from attsvm.dynamics.arguments import check_arguments, check_together, find_optimizer, planned_steps
from attsvm.dynamics.compiled import Compiled, compiled_pays
from attsvm.dynamics.heads import LinearHead, prepare_head
from attsvm.dynamics.layer import probabilities
from attsvm.dynamics.losses import Loss, find_loss
from attsvm.dynamics.optimizers import MirrorDescent, Optimizer
from attsvm.dynamics.run import MembersDivergedError, Progress, Run
from attsvm.dynamics.smoothness import smoothness
from attsvm.dynamics.start import Start, begin, final_scores, fingerprint, linear_scores, read_data, require_slope
from attsvm.dynamics.trajectory import DivergedError, Trajectory
from attsvm.selection.arrays import Array
from attsvm.selection.norms import Norm
from attsvm.selection.problem import TokenSelection
from attsvm.threads import threads_for

__all__ = ["descend"]

COMPILED_FROM = 100
"""Steps from which compiled code pays: loading it takes a moment. Not the size of a batch, which no number may see."""


def descend(
    problem: TokenSelection,
    scores: Array | None = None,
    *,
    parameterization: Literal["W", "KQ", "diagonal", "p"] = "W",
    rank: int | None = None,
    head: Any = "linear",
    labels: Array | None = None,
    loss: str = "logistic",
    optimizer: str | Optimizer = "ngd",
    learning_rate: float | Literal["theory"] = 0.1,
    steps: int = 2000,
    init: Any = "zeros",
    record_every: int | None = None,
    record_steps: Any = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Trajectory:
    r"""Train one attention layer: its key-query matrix, and a linear head with it if asked for.

    Minimises $\frac1n \sum_{i,q} \ell(Y_{iq}\, h(X_i^\top \mathrm{softmax}(X_i W z_{iq} + b_{iq})))$ over W or what
    W is made of. For a fixed linear head v this is $\ell(\gamma_{iq}^\top \mathrm{softmax}(\cdot))$ with the scores
    $\gamma_{iqt} = Y_{iq} v^\top x_{it}$.

    Parameters
    ----------
    problem
        Tokens, queries, what is allowed, and offsets. Its ``selected`` plays no part. A batch trains B layers at once;
        a member gets the numbers that it gets alone.
    scores
        $\gamma$ (n, T) or (n, Q, T): label times the head's value of each token; with a leading B for a batch. None
        when a head is given.
    parameterization
        ``"W"``; ``"KQ"``, $W = K Q^\top$; ``"diagonal"``, $W = \mathrm{diag}(k \odot q)$; or ``"p"``, logits
        $x_t^\top p$ with a trained prompt vector, which needs the same query z everywhere in a problem and is
        recorded as $W = p z^\top / \|z\|^2$.
    rank
        Columns m of K and Q; default d. Only for ``"KQ"``.
    head
        ``"linear"``: the scores say it all. Otherwise a :class:`~attsvm.dynamics.LinearHead` (fixed or trained),
        :class:`~attsvm.dynamics.QuadraticHead`, :class:`~attsvm.dynamics.ReLUHead`, or any torch callable
        ``(..., d) -> (...)`` of the pooled tokens in float64.
    labels
        (n,) or (n, Q) of -1 and +1, or with a leading B, for a head; default all +1.
    loss
        ``"logistic"``, ``"exponential"``, ``"correlation"``, ``"squared"`` or ``"log"``; see
        :mod:`attsvm.dynamics.losses`.
    optimizer
        ``"ngd"``: each trained tensor moves by ``learning_rate`` along its normalised gradient. ``"gd"``,
        ``"momentum"``, ``"adam"``, ``"sign"``; ``"polyak"``, which takes its own step; ``"flow"``: gradient flow,
        ``learning_rate`` of arc length a step. Or an object: :class:`~attsvm.dynamics.MirrorDescent`,
        :class:`~attsvm.dynamics.Momentum`, :class:`~attsvm.dynamics.Adam`, :class:`~attsvm.dynamics.GradientFlow`.
        Only ``"gd"``, ``"momentum"`` and Adam with an epsilon stop where the gradient leaves the range of float64.
    learning_rate
        > 0 and finite; or ``"theory"``, with ``"gd"`` on W and a fixed linear head: one over the smoothness constant of
        each problem.
    steps
        >= 0.
    init
        ``"zeros"``, ``"normal"``, an array (d, d), a pair (K, Q) or (k, q), or p (d,); with a leading B for each
        problem its own. See :func:`attsvm.dynamics.parameters.initial_parameters`.
    record_every
        Record every so many steps; default about 40 records at growing distances. The last step is always recorded.
    record_steps
        The steps to record, instead of ``record_every``.
    seed
        For the random part of ``init``.
    checkpoint
        A safetensors file to which the run is saved every 500 steps, and on Ctrl-C; if it exists, the run goes on from
        there, to the identical result.
    progress
        Called with (step, steps, loss) every 20 steps and at the end.

    Returns
    -------
    Trajectory
        Computed in float64; arrays have the problem's kind and dtype.

    Raises
    ------
    InvalidInputError
        If an argument is not what it must be, such as a head without a gradient.
    RecordError
        If the checkpoint is damaged or belongs to another run.
    DivergedError
        If a member's run leaves the range of float64. It names the members, and its ``trajectory`` holds what was
        recorded of all of them before.

    Notes
    -----
    A step costs two passes over the tokens and products of the queries with the trained matrices; gradient flow takes
    six of those for each of its inner steps.

    References
    ----------
    Tarzanagh, Li, Thrampoulidis, Oymak. "Transformers as Support Vector Machines", 2023. arXiv:2308.16898.

    Examples
    --------
    >>> problem = TokenSelection([[[1.0, 0.0], [0.0, 0.0]]], [[1.0, 0.0]], [0])
    >>> trajectory = descend(problem, [[1.0, 0.0]], steps=100)
    >>> str(trajectory.verdict), float(trajectory.correlation(trajectory.solution())[-1])
    ('global', 1.0)
    """
    check_arguments(
        problem,
        parameterization=parameterization,
        rank=rank,
        learning_rate=learning_rate,
        steps=steps,
        record_every=record_every,
        record_steps=record_steps,
        seed=seed,
    )
    rule, mover = find_loss(loss, where="descend"), find_optimizer(optimizer, where="descend")
    check_together(
        scores=scores,
        labels=labels,
        head=head,
        loss=rule,
        optimizer=mover,
        learning_rate=learning_rate,
        parameterization=parameterization,
    )
    run, tokens = _prepare_run(
        problem,
        scores if isinstance(head, str) else None,
        labels,
        head=head,
        loss=rule,
        optimizer=mover,
        learning_rate=learning_rate,
        planned=planned_steps(steps, record_every, record_steps),
        start=Start(parameterization=parameterization, rank=rank, init=init, seed=seed),
    )
    if checkpoint is not None:
        run.restore(Path(checkpoint), fingerprint=fingerprint(tokens, run))
    n, Q, T, d = problem.shape
    with threads_for(4.0 * len(problem) * n * Q * (T * d + d * run.data.queries.shape[-1])):
        try:
            run.go(progress)
        except MembersDivergedError as error:
            so_far = _trajectory(problem, run, tokens, parameterization) if run.rewind() else None
            raise DivergedError(str(error), members=error.members, trajectory=so_far) from None
    return _trajectory(problem, run, tokens, parameterization)


def _prepare_run(
    problem: TokenSelection,
    scores: Array | None,
    labels: Array | None,
    *,
    head: Any,
    loss: Loss,
    optimizer: Optimizer,
    learning_rate: float | str,
    planned: list[int],
    start: Start,
) -> tuple[Run, Tensor]:
    """The run before its first step, and the tokens (B, n, T, d) in float64."""
    data, tokens = read_data(problem, scores, labels)
    working, v = None, None
    if not isinstance(head, str):
        batch = len(problem) if problem.is_batch else None
        found = prepare_head(head, batch=batch, d=problem.shape[-1], device=tokens.device)
        if isinstance(found, Tensor):
            v = found
            data = data._replace(scores=linear_scores(data, tokens, v))
        else:
            working = found
    if isinstance(learning_rate, str):
        rate = 1.0 / smoothness(data, tokens, data.queries, loss, v)
    else:
        rate = torch.full((len(problem),), float(learning_rate), dtype=torch.float64, device=tokens.device)
    data, attention = begin(data, start, turns=optimizer.turns)
    if working is not None:
        require_slope(working, tokens, data, attention)
    trained = isinstance(head, LinearHead) and head.trained
    run = Run(
        data=data,
        loss=loss,
        optimizer=optimizer,
        rate=rate,
        steps=planned[-1],
        planned=planned,
        attention=attention,
        head=working,
        v=v if trained else None,
        single=not problem.is_batch,
    )
    told: dict[str, Any] = {"optimizer": optimizer, "head": working, "v": run.v}
    if run.steps >= COMPILED_FROM and compiled_pays(data, loss=loss.name, **told):
        run.compiled = Compiled.ready(data, tokens, attention, loss=loss.name, rate=rate, **told)
    return run, tokens


def _trajectory(problem: TokenSelection, run: Run, tokens: Tensor, parameterization: str) -> Trajectory:
    """Put the records into the problem's kind and shape."""
    g = run.last
    assert g is not None
    single = not problem.is_batch
    selected = torch.where(run.data.active, g.selected, torch.full_like(g.selected, -1))
    attention = probabilities(run.data, run.attention.keys(run.data.queries))
    columns = {name: torch.stack([record[name] for record in run.records], 1) for name in run.records[0]}
    factors = run.attention.factors()
    stalled = run.stalled if run.stalled is not None else torch.zeros(len(problem), dtype=torch.bool)
    scores = final_scores(run, tokens, attention)

    def out(value: Tensor) -> Any:
        return problem.kind.back(value[0] if single else value)

    def maybe(name: str) -> Any:
        return out(columns[name]) if name in columns else None

    return Trajectory(
        steps=problem.kind.back(torch.tensor(run.planned[: len(run.records)])),
        W=out(columns["W"]),
        loss=out(columns["loss"]),
        norm=out(columns["norm"]),
        attention_mass=out(columns["mass"]),
        selected=out(selected),
        probabilities=out(attention),
        K=None if factors is None else out(factors[0]),
        Q=None if factors is None else out(factors[1]),
        problem=problem.with_selected(selected[0] if single else selected),
        scores=scores[0] if single else scores,
        parameterization=parameterization,
        stalled=bool(stalled[0]) if single else out(stalled),
        own_norm=_own_norm(parameterization, run.optimizer),
        head=maybe("head"),
        log_time=maybe("log_time"),
        loss_name=run.loss.name,
        optimizer=repr(run.optimizer),
    )


def _own_norm(parameterization: str, optimizer: Optimizer) -> Norm:
    """The norm whose max-margin solution the theory sets."""
    if parameterization == "KQ":
        return "nuc"
    if parameterization == "diagonal":
        return 1.0
    return float(optimizer.p) if isinstance(optimizer, MirrorDescent) and optimizer.p != 2 else "fro"

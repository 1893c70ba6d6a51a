r"""Projection onto the part of a ball in which higher-scoring tokens stay below lower-scoring ones.

Of a selection $\alpha$, let $\tau$ run over the tokens that score at least as high as $\alpha_i$, and let $t_i$ be the
one of the others, $\alpha_i$ left out, that the max-margin solution $W^{mm}_\alpha$ ranks first: where the selection is
locally optimal, a support token. The cone of opening $\epsilon$ holds the W with

$$(x_{i t_i} - x_{i\tau})^\top W z_i \ge \epsilon \|W\| ,$$

so that what attention loses in it, it loses to tokens of lower score. Where there is no $t_i$, a token at the margin
takes its place: $(x_{i\alpha_i} - x_{i\tau})^\top W z_i \ge (\epsilon + 1/\|W^{mm}_\alpha\|) \|W\|$. The norm is
that of the ball, Frobenius or nuclear; on its sphere of radius R the inequalities are linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attsvm.errors import UnsupportedError
from attsvm.selection.geometry import token_ranks
from attsvm.selection.problem import ProblemTensors

__all__ = ["Cone", "into_nuclear_ball", "into_ball"]

MAX_ENTRIES = 100_000_000
ROUNDS, SWEEPS = 100, 200
"""Alternations between cone and ball, and dual steps of each projection onto the inequalities."""


def into_ball(W: Tensor, radius: float) -> Tensor:
    """Scale matrices (B, …) of Frobenius norm above ``radius`` to it."""
    norm = torch.linalg.vector_norm(W.flatten(1), dim=-1).clamp(min=torch.finfo(W.dtype).tiny)
    scale: Tensor = (radius / norm).clamp(max=1.0)
    return W * scale.view(-1, *[1] * (W.ndim - 1))


def into_nuclear_ball(W: Tensor, radius: float) -> Tensor:
    """Project matrices (B, d, r) onto those of nuclear norm at most ``radius``: singular values onto a simplex."""
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    counts = torch.arange(1, s.shape[-1] + 1, device=s.device)
    levels = (s.cumsum(-1) - radius) / counts
    last = (s > levels).sum(-1, keepdim=True).clamp(min=1)
    shrunk = (s - levels.gather(-1, last - 1).clamp(min=0.0)).clamp(min=0.0)
    projected: Tensor = U @ (shrunk.unsqueeze(-1) * V)
    return projected


class Cone:
    """The inequalities of a batch of problems, and the projection onto them.

    Parameters
    ----------
    problem
        Tensors with a batch axis B, one selected token a query.
    scores
        (B, n, Q, T).
    queries
        (B, n, Q, r): in the basis in which W is written (B, d, r).
    centre
        (B, d, r): the max-margin directions of the selections, of norm 1.
    reach
        (B,): their margins, 1 / ||W^mm||.
    opening
        eps > 0, or None for half of what the centre has, each problem its own.
    """

    def __init__(
        self,
        problem: ProblemTensors,
        scores: Tensor,
        queries: Tensor,
        *,
        centre: Tensor,
        reach: Tensor,
        opening: float | None,
    ) -> None:
        low, high = token_ranks(problem, scores)
        X = problem.tokens.to(queries.dtype)
        B, _, Q, T = low.shape
        logits = torch.einsum("bntd,bdr,bnqr->bnqt", X, centre, queries)
        rest = low & ~problem.selected
        leader = torch.where(rest.any(-1, keepdim=True), rest, low)
        leader_index = logits.masked_fill(~leader, -torch.inf).argmax(-1)
        pairs = high.flatten(1)  # (B, n Q T)
        most = int(pairs.sum(-1).max()) if pairs.numel() else 0
        d, r = X.shape[-1], queries.shape[-1]
        if B * most * max(most, d * r) > MAX_ENTRIES:
            raise UnsupportedError(
                f"regularization_path: cone is for small problems; this one has {most} inequalities in {d * r} numbers."
            )
        # Rows that hold first, in their order; the rest of the places are rows of zeros.
        place = (~pairs).to(torch.int8).argsort(dim=-1, stable=True)[:, :most]
        asked = pairs.gather(-1, place)
        query, second = place // T, place % T
        member = torch.arange(B, device=place.device).unsqueeze(-1)
        first = leader_index.flatten(1)[member, query]
        left = X[member, query // Q, first] - X[member, query // Q, second]
        right = queries.flatten(1, 2)[member, query]
        rows = torch.einsum("bkd,bkr->bkdr", left, right).flatten(2) * asked.unsqueeze(-1)
        alone = ~rest.any(-1).flatten(1)[member, query]
        least = torch.where(alone, reach.unsqueeze(-1), 0.0)
        depth = ((rows @ centre.flatten(1).unsqueeze(-1)).squeeze(-1) - least).masked_fill(~asked, torch.inf)
        self.depth = depth.amin(-1) if most else queries.new_full((B,), torch.inf)
        """(B,): the largest opening with which the cone holds its centre; +inf where nothing scores higher."""
        self.opening = 0.5 * self.depth if opening is None else torch.full_like(self.depth, opening)
        # Of size 1, which makes the dual steps even; rows of zeros ask nothing.
        size = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        unit = torch.where(size > 0, size, 1.0)
        self.rows = rows / unit
        self.need = ((self.opening.unsqueeze(-1) + least) / unit.squeeze(-1)).masked_fill(~asked, -torch.inf)
        self.gram = self.rows @ self.rows.mT
        self.curvature = torch.linalg.eigvalsh(self.gram)[:, -1:].clamp(min=1e-300) if most else queries.new_ones(B, 1)

    def holds(self, W: Tensor, radius: float) -> Tensor:
        """(B,): whether the inequalities hold on the sphere of ``radius``, to a millionth of it."""
        return _hold(self.rows, self.need, W, radius)

    def project(self, W: Tensor, radius: float, *, nuclear: bool) -> Tensor:
        """Nearest matrices (B, d, r) in the ball that satisfy the inequalities, by Dykstra's alternation."""
        onto = into_nuclear_ball if nuclear else into_ball
        out = onto(W, radius)
        left = (~self.holds(out, radius)).nonzero().flatten()
        if len(left) == 0:
            return out
        x = W[left]
        p, q = torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(ROUNDS):
            y = self._onto_rows(x + p, left, radius)
            p = x + p - y
            x = onto(y + q, radius)
            q = y + q - x
            done = _hold(self.rows[left], self.need[left], x, radius)
            out[left] = x
            if bool(done.all()):
                break
            x, p, q, left = (part[~done] for part in (x, p, q, left))
        return out

    def _onto_rows(self, W: Tensor, members: Tensor, radius: float) -> Tensor:
        """Nearest matrices that satisfy the inequalities: accelerated projected gradient on the multipliers."""
        rows, gram, curvature = self.rows[members], self.gram[members], self.curvature[members]
        flat = W.flatten(1)
        lack = radius * self.need[members] - (rows @ flat.unsqueeze(-1)).squeeze(-1)
        lack = torch.where(torch.isfinite(lack), lack, -radius)
        dual = torch.zeros_like(lack)
        ahead, t = dual, 1.0
        for _ in range(SWEEPS):
            slope = lack - (gram @ ahead.unsqueeze(-1)).squeeze(-1)
            new = (ahead + slope / curvature).clamp(min=0.0)
            t_new = 0.5 * (1.0 + (1.0 + 4.0 * t * t) ** 0.5)
            ahead = new + ((t - 1.0) / t_new) * (new - dual)
            change = float((new - dual).abs().max())
            dual, t = new, t_new
            if change <= 1e-9 * radius:
                break
        return (flat + (dual.unsqueeze(1) @ rows).squeeze(1)).view_as(W)


def _hold(rows: Tensor, need: Tensor, W: Tensor, radius: float) -> Tensor:
    if rows.shape[1] == 0:
        return torch.ones(len(W), dtype=torch.bool, device=W.device)
    slack = (rows @ W.flatten(1).unsqueeze(-1)).squeeze(-1) - radius * need
    return (slack >= -1e-6 * radius).all(-1)

"""What a run leaves: the path of W, and what it says about the selection."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attsvm.dynamics.own_solution import solve_diagonal, split
from attsvm.dynamics.plots import plot_trajectory
from attsvm.dynamics.storage import read_trajectory, write_trajectory
from attsvm.dynamics.verdict import Verdict, judge
from attsvm.errors import AttSVMError, InvalidInputError
from attsvm.selection.geometry import correlation
from attsvm.selection.norms import Norm
from attsvm.selection.problem import TokenSelection
from attsvm.solvers.generalized import SVMEquivalent, selected_from_probabilities, svm_equivalent
from attsvm.solvers.solution import Solution
from attsvm.solvers.solve import solve

__all__ = ["DivergedError", "Trajectory"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """The record of ``descend``. Arrays are of the problem's kind; a batch adds a leading B to all but ``steps``.

    Attributes
    ----------
    steps
        (records,) int64: the steps at which the path was recorded.
    W
        (records, d, d).
    loss, norm, attention_mass
        (records,): the loss, ``||W||_F``, and the mean probability of the most probable token.
    selected
        (n, Q) int64: the most probable token of each query at the end; -1 for a query with nothing allowed.
    probabilities
        (n, Q, T): attention at the end.
    K, Q
        At the end (d, m) for ``parameterization="KQ"`` and (d,) for ``"diagonal"``, otherwise None.
    head
        (records, d): v of a linear head that was trained, otherwise None.
    log_time
        (records,): logarithm of the time of gradient flow for ``optimizer="flow"``, otherwise None.
    problem
        The given problem with the final tokens selected.
    scores
        (n, Q, T), those of the linear head; of another head the local ones at the end, ``Y`` times its slope at the
        pooled token times the token.
    parameterization
        ``"W"``, ``"KQ"``, ``"diagonal"`` or ``"p"``.
    optimizer, loss_name
        What it was trained by, in words.
    own_norm
        The norm whose max-margin solution the theory sets for this run: ``"fro"`` for W and p, ``"nuc"`` for (K, Q), p
        for mirror descent, 1 for the diagonal.
    stalled
        Whether the last step changed nothing: the gradient was exactly 0, or too small to change float64 numbers. A
        warning is logged as well.
    """

    steps: Any
    W: Any
    loss: Any
    norm: Any
    attention_mass: Any
    selected: Any
    probabilities: Any
    K: Any
    Q: Any
    problem: TokenSelection
    scores: Tensor
    parameterization: str
    stalled: Any
    own_norm: Norm = "fro"
    head: Any = None
    log_time: Any = None
    loss_name: str = "logistic"
    optimizer: str = "NormalisedDescent()"
    _solutions: dict[Any, Any] = field(default_factory=dict, repr=False)

    def solution(self, norm: Norm | None = None, **options: Any) -> Any:
        """Max-margin solution for the tokens selected at the end (a tuple of them for a batch), computed once.

        Parameters
        ----------
        norm
            Default: the norm of this run; for ``parameterization="diagonal"`` then among diagonal matrices.
        **options
            Passed to :func:`attsvm.solve` the first time; failures are reported in the status.
        """
        diagonal = norm is None and self.parameterization == "diagonal"
        norm = self.own_norm if norm is None else norm
        key = "diagonal" if diagonal else norm
        if key not in self._solutions:
            options = {"on_failure": "ignore", **options}
            # One call for a whole batch: small problems are then solved together.
            found = solve_diagonal(self.problem, **options) if diagonal else solve(self.problem, norm, **options)
            self._solutions[key] = split(found) if self.problem.is_batch else found
        return self._solutions[key]

    def correlation(self, solution: Solution | Any) -> Any:
        """Cosine of W with a solution (or a matrix) at every record, (records,) or (B, records); NaN where W is 0.

        Parameters
        ----------
        solution
            A Solution, a matrix (d, d), or for a batch a tuple of B of them.
        """
        if not self.problem.is_batch:
            return correlation(self.W, getattr(solution, "W", solution))
        if not isinstance(solution, (tuple, list)) or len(solution) != len(self.problem):
            raise InvalidInputError(f"correlation: solution must be a tuple of {len(self.problem)} for this batch.")
        rows = [correlation(W, getattr(s, "W", s)) for W, s in zip(self.W, solution, strict=True)]
        return torch.stack(rows) if isinstance(rows[0], Tensor) else np.stack(rows)

    @property
    def verdict(self) -> Any:
        """The :class:`Verdict` of the run; a tuple of them for a batch. Solves the max-margin problem if needed."""
        if "verdict" not in self._solutions:
            found = self.solution()
            mass, loss = self.attention_mass, self.loss_name
            if not self.problem.is_batch:
                verdict: Any = judge(self.problem, self.scores, found, mass=float(mass[-1]), loss=loss)
            else:
                verdict = tuple(
                    judge(problem, self.scores[b], found[b], mass=float(mass[b, -1]), loss=loss)
                    for b, problem in enumerate(_members(self.problem))
                )
            self._solutions["verdict"] = verdict
        return self._solutions["verdict"]

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdicts as a tuple, of one for a single problem."""
        return self.verdict if isinstance(self.verdict, tuple) else (self.verdict,)

    def prediction(self, *, selected_above: float = 1e-3, masked_below: float = 1e-6) -> SVMEquivalent:
        r"""What theory predicts for a run that may keep several tokens, beside two simpler predictions.

        The tokens with a probability of ``selected_above`` or more at the end are the selected sets. The prediction is
        $W^{fin} + C\, W^{dir}$ of :func:`attsvm.solvers.svm_equivalent`; ``W_dir`` alone and ``W_one_token``, the
        solution for the most probable tokens only, come with it, each with its correlation with the last W.

        Parameters
        ----------
        selected_above, masked_below
            As in :func:`attsvm.solvers.selected_from_probabilities`.

        Raises
        ------
        InvalidInputError
            If a probability lies between the two thresholds, so that the sets are not settled, or if every token of
            all queries is selected, so that there is no direction.
        InfeasibleError
            If no matrix selects these sets.
        """
        t = self.problem.tensors
        sets = selected_from_probabilities(
            torch.as_tensor(self.probabilities).to(t.allowed.device), selected_above, masked_below, allowed=t.allowed
        )
        for members, why in (
            (sets.ambiguous.flatten(-2).any(-1), f"a probability lies between {masked_below:g} and {selected_above:g}"),
            (sets.complete.flatten(-2).all(-1), "no token is masked"),
        ):
            bad = members.reshape(-1).nonzero().flatten().tolist()
            if bad:
                which = f" of member {bad[0]}" if self.problem.is_batch else ""
                raise InvalidInputError(f"prediction: the run{which} must have settled selected sets; {why}.")
        settled = self.problem.with_selected(sets.selected)
        last = self.W[:, -1] if self.problem.is_batch else self.W[-1]
        norm: Norm = "nuc" if self.parameterization == "KQ" else "fro"
        return svm_equivalent(settled, last, self.probabilities, norm=norm)

    def plot(self, quantity: str = "correlation", ax: Any = None, solution: Any = None) -> Any:
        """Draw a curve over the steps; for a batch the mean over its members, in a band of one standard deviation.

        Parameters
        ----------
        quantity
            ``"correlation"``, ``"loss"``, ``"norm"`` or ``"attention_mass"``.
        ax
            Matplotlib axes; default a new figure.
        solution
            What the correlation is with; default :meth:`solution`.

        Returns
        -------
        Axes
            Those drawn on.

        Raises
        ------
        UnsupportedError
            If matplotlib is not installed.
        """
        return plot_trajectory(self, quantity, ax=ax, solution=solution)

    def save(self, path: Path | str) -> None:
        """Write everything but the solutions to a safetensors file, in one step.

        Parameters
        ----------
        path
            A file, replaced if it exists.

        Raises
        ------
        RecordError
            If it cannot be written.
        """
        write_trajectory(self, Path(path))

    @classmethod
    def load(cls, path: Path | str) -> Trajectory:
        """Read what :meth:`save` wrote; arrays come back in the kind that they had, tensors on the CPU.

        Parameters
        ----------
        path
            The file.

        Raises
        ------
        RecordError
            If the file is missing, damaged, or none of these.
        """
        return cls(**read_trajectory(Path(path)))


class DivergedError(AttSVMError):
    """The run of some members left the range of float64.

    Attributes
    ----------
    members
        Their places in the batch, (0,) for a single problem.
    trajectory
        What was recorded of all members before, or None if that is nothing.
    """

    def __init__(self, message: str, *, members: tuple[int, ...] = (), trajectory: Trajectory | None = None) -> None:
        super().__init__(message)
        self.members = members
        self.trajectory = trajectory

    def __reduce__(self) -> Any:
        # Exceptions cross process borders by pickling their arguments; the default forgets what this one carries.
        return _diverged, (str(self), self.members, self.trajectory)


def _diverged(message: str, members: tuple[int, ...], trajectory: Trajectory | None) -> DivergedError:
    return DivergedError(message, members=members, trajectory=trajectory)


def _members(problem: TokenSelection) -> list[TokenSelection]:
    return [problem[b] for b in range(len(problem))] if problem.is_batch else [problem]

"""From trajectories and solutions to the records of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attsvm.dynamics import Trajectory, Verdict
from attsvm.experiments.config import VerifyConfig
from attsvm.experiments.optimizer_names import norm_label
from attsvm.experiments.sequences import Sequences
from attsvm.selection import TokenSelection
from attsvm.selection.norms import matrix_norm
from attsvm.solvers import Solution

__all__ = ["Finding", "arrays_of", "metrics_of", "result_of", "summarize"]

AGREES, APPROACHES = 0.95, 0.8
"""Correlations from which a direction is said to agree with, or to approach, a solution."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """What one parameterisation's run says."""

    trajectory: Trajectory
    own: Solution
    other: Solution
    correlation: list[float]
    correlation_other: list[float]
    verdict: Verdict


def summarize(trajectory: Trajectory, own: Solution, other: Solution) -> Finding:
    """Compare the path with both solutions."""
    return Finding(
        trajectory=trajectory,
        own=own,
        other=other,
        correlation=trajectory.correlation(own).tolist(),
        correlation_other=trajectory.correlation(other).tolist(),
        verdict=trajectory.verdicts[0],
    )


def metrics_of(findings: dict[str, Finding]) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``."""
    rows = []
    for name, finding in findings.items():
        path = finding.trajectory
        columns = zip(
            path.steps.tolist(),
            path.loss.tolist(),
            path.norm.tolist(),
            path.attention_mass.tolist(),
            finding.correlation,
            finding.correlation_other,
            strict=True,
        )
        keys = ("step", "loss", "norm", "attention_mass", "correlation", "correlation_other")
        rows += [{"parameterization": name, **dict(zip(keys, row, strict=True))} for row in columns]
    return rows


def arrays_of(finding: Finding) -> dict[str, Any]:
    """The arrays of one parameterisation in ``arrays.safetensors``."""
    path, own = finding.trajectory, finding.own
    trained = path.W[-1]
    arrays = {
        "probabilities": path.probabilities[:, 0],
        "selected": path.selected[:, 0],
        "weights": trained,
        "trained_singular_values": torch.linalg.svdvals(trained),
    }
    if own.ray is not None:
        arrays["ray"] = own.ray.weights[:, 0]
    if np.isfinite(own.upper_bound):
        size = matrix_norm(trained, path.own_norm)
        factor = own.upper_bound / size if size > 0 else 0.0
        arrays |= {
            "margins": path.problem.margins(own.W)[:, 0],
            "trained_margins": path.problem.margins(factor * trained)[:, 0],
            "support": own.support[:, 0],
            "duals": own.duals[:, 0],
            "solution": own.W,
            "singular_values": torch.from_numpy(own.singular_values.copy()),
        }
    if np.isfinite(finding.other.upper_bound):
        arrays["other_singular_values"] = torch.from_numpy(finding.other.singular_values.copy())
        arrays["other_solution"] = finding.other.W
    return {key: value.numpy() for key, value in arrays.items()}


def _bounds(solution: Solution) -> dict[str, Any]:
    known = np.isfinite(solution.upper_bound)
    return {
        "norm": norm_label(solution.norm),
        "status": solution.status.value,
        "status_sentence": solution.status.sentence,
        "gap": solution.gap,
        "upper_bound": solution.upper_bound,
        "lower_bound": solution.lower_bound,
        "margin": solution.margin,
        "max_margin": solution.margin / solution.upper_bound if known and solution.upper_bound > 0 else None,
        "n_support": int(solution.support.sum()),
        "rank": solution.rank() if known else None,
        "method": solution.method,
        "iterations": solution.iterations,
        "solve_seconds": solution.seconds,
    }


def _record(name: str, finding: Finding, sequences: Sequences) -> dict[str, Any]:
    path, verdict = finding.trajectory, finding.verdict
    chosen = path.selected[:, 0].tolist()
    bounds = _bounds(finding.own)
    return {
        "parameterization": name,
        "norm_other": norm_label(finding.other.norm),
        **bounds,
        "correlation": finding.correlation[-1],
        "correlation_other": finding.correlation_other[-1],
        "steps": path.steps.tolist(),
        "correlation_curve": finding.correlation,
        "correlation_other_curve": finding.correlation_other,
        "attention_mass_curve": path.attention_mass.tolist(),
        "norm_curve": path.norm.tolist(),
        "loss_curve": path.loss.tolist(),
        "attention_mass": float(path.attention_mass[-1]),
        "fraction_globally_optimal": verdict.fraction_globally_optimal,
        "locally_optimal": verdict.locally_optimal,
        "verdict": verdict.kind,
        "reason": verdict.reason,
        "stalled": path.stalled,
        "ray_sequences": list(finding.own.ray.sequences) if finding.own.ray is not None else None,
        "selected": [
            {"text": text, "token": tokens[index], "index": index}
            for text, tokens, index in zip(sequences.texts, sequences.token_strings, chosen, strict=True)
        ],
        "other": _bounds(finding.other),
    }


def result_of(
    sequences: Sequences,
    problem: TokenSelection,
    findings: dict[str, Finding],
    config: VerifyConfig,
) -> dict[str, Any]:
    """All of ``result.json`` but what concerns the run itself."""
    n, Q, _, d = problem.shape
    optimal = problem.tensors.selected[:, 0].to(torch.int8).argmax(-1).tolist()
    records = {name: _record(name, finding, sequences) for name, finding in findings.items()}
    return {
        "data": {**sequences.about, "head": None if sequences.scores is not None else config.head},
        "n_sequences": n,
        "n_queries": n * Q,
        "n_constraints": problem.n_constraints,
        "n_merged": len(problem.merged),
        "d_model": d,
        "verdict": _sentence(findings),
        "parameterizations": records,
        "sequences": [
            {"text": text, "label": label, "tokens": list(tokens), "optimal": best, "n_tokens": len(tokens)}
            for text, label, tokens, best in zip(
                sequences.texts, sequences.label_texts, sequences.token_strings, optimal, strict=True
            )
        ],
    }


def _sentence(findings: dict[str, Finding]) -> str:
    """The verdict on top, for a person."""
    return " ".join(_one_sentence(name, finding) for name, finding in findings.items())


def _one_sentence(name: str, finding: Finding) -> str:
    who = "W" if name == "W" else "(K, Q)"
    names = {"fro": "Frobenius-norm", "nuc": "nuclear-norm"}
    svm = names.get(str(finding.own.norm), f"l{norm_label(finding.own.norm)}-norm") + " SVM"
    if finding.own.ray is not None:
        return f"Training {who} ended on tokens that no matrix separates, so there is no SVM to compare with."
    value = finding.correlation[-1]
    if not np.isfinite(value):
        return f"Training {who} left nothing to compare: the matrix or its SVM solution is zero."
    how = "went where" if value >= AGREES else "is on its way to where" if value >= APPROACHES else None
    share = f"{finding.verdict.fraction_globally_optimal:.0%} of the sequences ended on their best-scoring token"
    if how is None:
        return f"Training {who} did not go where the {svm} says: correlation {value:.4f}; {share}."
    return f"Training {who} {how} the {svm} says: correlation {value:.4f}; {share}."

"""Certified minimum-norm solvers for token selection."""

from attsvm.solvers.finite_part import GraphFinitePart, graph_finite_part
from attsvm.solvers.generalized import (
    SelectedSets,
    SVMEquivalent,
    selected_from_probabilities,
    solve_finite_part,
    svm_equivalent,
)
from attsvm.solvers.path import SolutionPath, solve_path
from attsvm.solvers.solution import Ray, Solution, Status
from attsvm.solvers.solve import solve

__all__ = [
    "GraphFinitePart",
    "Ray",
    "SVMEquivalent",
    "SelectedSets",
    "Solution",
    "SolutionPath",
    "Status",
    "graph_finite_part",
    "selected_from_probabilities",
    "solve",
    "solve_finite_part",
    "solve_path",
    "svm_equivalent",
]
